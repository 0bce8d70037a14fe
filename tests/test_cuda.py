"""What only a CUDA device shows: mixed precision with a real GradScaler, peak memory, and that
generating and drawing repeat themselves there.

Skipped elsewhere.
"""
import gc
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers

import train as training
from student import LoRA, Student, build_student
from teacher import build_teacher
from tests.conftest import family_config, write_reasoning
from tests.test_plan import TOKENIZER, VOCABULARY, planned, sized, train_for
from tests.test_teacher import clip_folder, diffusion_folder, quick_recipe  # noqa: F401, fixtures
from tests.test_train import switch_dropout_off
from train import ARMS, Cell, Config, Data, resolve, train, update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def needs(amp):
    """Skip the test where the GPU only emulates bf16."""
    if amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")


# ---- mixed precision ----
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_each_precision_trains_and_stays_close_to_float32(amp, tmp_path):
    needs(amp)
    flags = dict(task="objects", epochs=1, limit=40, arms="armada", seeds="0", device="cuda",
                 grad_checkpoint="on")
    losses = {}
    for setting in ("off", amp):
        out = tmp_path / setting
        if not out.exists():
            metrics = train(Config(**flags, amp=setting, out=str(out)))["armada"][0]
            assert metrics["peak_memory_mib"] > 0
        log = (out / "armada/0/log.jsonl").read_text()
        rows = [json.loads(line) for line in log.splitlines()]
        losses[setting] = [row["loss"] for row in rows if row.get("role") == "student"]
    assert losses[amp] == pytest.approx(losses["off"], rel=0.02)


def test_an_infinite_gradient_skips_the_step_and_halves_the_scale(tmp_path, monkeypatch):
    config = resolve(Config(task="objects", limit=40, arms="undistilled", seeds="0", device="cuda",
                            amp="fp16", out=str(tmp_path)))
    cell = Cell(replace(config, **ARMS["undistilled"]), Data(config), tmp_path)
    scaler = cell.scalers["student"]
    real = training.student_loss

    def infinite(*args, **kwargs):
        loss, parts = real(*args, **kwargs)
        return loss * torch.inf, parts

    def weights():
        return [weight.detach().clone() for weight in cell.student.parameters()]

    before = weights()
    scale = scaler.get_scale()
    cell.optimizers["student"].param_groups[0]["lr"] = 1e-3
    with monkeypatch.context() as patched:
        patched.setattr(training, "student_loss", infinite)
        norm = update(cell, 0, "student", 0, [*range(8)])["grad_norm"]
    assert not norm.isfinite()
    assert scaler.get_scale() == scale / 2
    assert all(map(torch.equal, before, weights()))
    # And it goes on: the first scale, 65536, may overflow a few times more.
    for step in range(1, 9):
        update(cell, 0, "student", step, [*range(8)])
    assert not all(map(torch.equal, before, weights()))
    assert all(weight.isfinite().all() for weight in weights())


# ---- nobody waits ----
def small_cell(folder, amp, model=None, **flags):
    """A Cell on the GPU: tiny on objects, or a causal model that learns ARC-Easy with LoRA."""
    task = dict(task="objects", limit=64)
    if model:
        task = dict(task="reason/arc_e", data_dir=write_reasoning(folder), student=model, lora=2,
                    teacher="painter", max_length=200, max_new_tokens=32,
                    cache_dir=str(folder / "cache"))
    config = resolve(Config(**task, batch_size=8, device="cuda", amp=amp, arms="armada", seeds="0",
                            out=str(folder / "run"), **flags))
    (folder / "cell").mkdir()
    return Cell(replace(config, **ARMS["armada"]), Data(config), folder / "cell")


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("generates", [False, True])
def test_no_step_waits_for_the_gpu(generates, amp, tmp_path, causal_folder):
    """torch raises where the CPU would wait: .item(), .tolist(), a boolean mask, a copy from
    memory that is not pinned. The first steps are free to: libraries are loaded."""
    needs(amp)
    cell = small_cell(tmp_path, amp, causal_folder() if generates else None)
    rows = [*range(8)]
    for role in ("aligner", "student"):
        update(cell, 0, role, 0, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for role in ("aligner", "student"):
            update(cell, 0, role, 1, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_compiled_blocks_give_the_same_losses(amp, tmp_path, monkeypatch):
    """Within mixed precision's tolerance. Dropout, off here, draws other numbers when compiled."""
    needs(amp)
    switch_dropout_off(monkeypatch)
    losses = {}
    for compiles in (False, True):
        (tmp_path / str(compiles)).mkdir()
        cell = small_cell(tmp_path / str(compiles), amp, compile=compiles)
        losses[compiles] = [update(cell, 0, "student", step, [*range(8)])["loss"].item()
                            for step in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4 if amp == "off" else 0.02)


def test_after_the_rehearsal_the_allocator_grows_no_more(tmp_path):
    """What the longest batch, gradients and moments need has been asked of the driver by then."""
    cell = small_cell(tmp_path, "off")
    training.rehearse(cell)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _, role, step, rows in training.schedule(cell):
        update(cell, 0, role, step, rows)
        if role == "student" and step == 7:
            break
    assert torch.cuda.memory_reserved() <= reserved + 2**21  # one more block at most


# ---- memory ----
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "opt", "llama"])
def test_checkpointing_changes_no_gradient(family, amp):
    """Dropout included: the recomputed layer draws the same masks."""
    needs(amp)
    torch.manual_seed(0)
    lm = transformers.AutoModel.from_config(family_config(family, VOCABULARY))
    student = Student(lm, TOKENIZER, 2, 32).to("cuda").train()
    ids = torch.randint(4, VOCABULARY, (4, 24), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    gradients = {}
    for checkpointing in (False, True):
        if checkpointing:
            student.checkpoint_gradients()
        torch.manual_seed(1)
        with torch.autocast("cuda", DTYPES[amp], amp != "off"):
            out = student(ids, mask)
        loss = sum(output.float().square().sum() for output in out)
        loss.backward()
        gradients[checkpointing] = {name: weight.grad.clone()
                                    for name, weight in student.named_parameters()
                                    if weight.grad is not None}
        student.zero_grad()
    plain = gradients[False]
    recomputed = gradients[True]
    assert plain.keys() == recomputed.keys()
    assert any(grad.any() for grad in plain.values())
    for name, grad in plain.items():  # sums by atomic additions come in another order each time
        tolerance = 1e-4 * grad.abs().max().item()
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_the_plan_knows_the_peak_memory(family, checkpointing, amp):
    """Within 20 % of three real steps; a few hundred MiB, so that cuBLAS's own 30 count for
    little."""
    needs(amp)
    autocast = partial(torch.autocast, "cuda", DTYPES[amp], amp != "off")
    config = sized(family, width=512, layers=8)
    rows = 32
    length = 128
    # The libraries' workspaces are made once, and stay.
    small = sized(family, width=32, layers=2)
    train_for(small, checkpointing, 1, rows=2, length=8, device="cuda", autocast=autocast)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train_for(config, checkpointing, 3, rows, length, "cuda", autocast)
    measured = torch.cuda.max_memory_allocated() - before
    told = planned(config, checkpointing, amp, device="cuda", batch_size=rows, max_length=length)
    assert told == pytest.approx(measured, rel=0.2)


# ---- a teacher's vectors ----
def test_stable_diffusion_gives_a_text_its_vector_the_first_time_too(
        diffusion_folder, quick_recipe):  # noqa: F811
    """In float16, whose rounding shows the least difference; a program around may choose TF32 and
    cuDNN's fastest kernels after the first vectors were made."""
    teacher = build_teacher(f"stable-diffusion:{diffusion_folder}")
    assert teacher.pipes[0].unet.dtype == torch.float16
    texts = ["a mouse", "a piano"]
    first = teacher.encode(texts)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            again = teacher.encode(texts)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(teacher.encode(texts[1:])[0], first[1])
    other = build_teacher(f"stable-diffusion:{diffusion_folder}")
    np.testing.assert_array_equal(other.encode(texts[::-1])[::-1], first)


def test_clip_gives_the_same_vectors_whether_training_has_allowed_tf32_or_not(
        clip_folder):  # noqa: F811
    teacher = build_teacher(f"clip:{clip_folder}")
    before = torch.get_float32_matmul_precision()
    vectors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            vectors[precision] = teacher.encode(["a mouse", "a piano"])
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(vectors["high"], vectors["highest"])


# ---- generating ----
def test_generating_merges_a_rounded_base_and_gives_it_back(causal_folder, monkeypatch):
    """Under bf16, as llama-7b generates; the memory of the merged maps is given back too."""
    needs("bf16")
    torch.manual_seed(0)
    student = build_student(causal_folder(), 2, 16, vocabulary=(5, 6), max_new_tokens=12, lora=4)
    student.to("cuda").round_frozen_weights()
    for lora in student.loras().values():
        torch.nn.init.normal_(lora.lora_B.weight, std=0.1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    rows = [{"input_ids": [*range(5, 5 + length)]} for length in (3, 9, 6)]
    autocast = partial(torch.autocast, "cuda", torch.bfloat16)
    student.generate(rows, autocast=autocast)
    held = torch.cuda.memory_allocated()
    monkeypatch.setattr(LoRA, "forward", lambda *_: pytest.fail("a LoRA was called"))
    texts = student.generate(rows, autocast=autocast)
    assert texts == student.generate(rows, autocast=autocast)
    assert torch.cuda.memory_allocated() <= held + 2**16
    after = student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
