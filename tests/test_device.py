"""What a CPU can show of how a run uses its device: who trains where, who waits for whom, what a
checkpoint costs, what is compiled. tests/test_cuda.py has what only a GPU shows."""
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

import student as student_module
import train as training
from data import UserError
from student import Student, _tiny, build_student, precision, send
from tests.conftest import FAMILIES, REASONING, TEXTS, family_config, write_reasoning
from tests.test_train import (QUICK, assert_identical, cell_of, copy_of, lines, switch_dropout_off,
                              weights)
from train import ARMS, Cell, Config, Data, main, resolve, run, train


# ---- which device ----
def test_tiny_trains_on_the_cpu_wherever_it_runs(monkeypatch):
    """Its matrices are done before a GPU has started a kernel. Who asks for the GPU gets it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = resolve(Config(task="objects"))
    device, _, _, why = precision(config)
    assert device == torch.device("cpu")
    assert why == "cpu, amp off (float32 on cpu)"
    assert not student_module.wants_cuda(config)
    assert student_module.wants_cuda(replace(config, device="cuda"))
    assert student_module.wants_cuda(replace(config, student="bert-base"))


# ---- nothing waits ----
def as_on_another_device(cell, monkeypatch):
    """Move a cell to the meta device, whose tensors have shapes and no numbers: whoever reads one,
    and on a GPU would wait for it, gets an error. The tokens and labels stay on the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # meta has none
    cell.models.to("meta")
    cell.device = torch.device("meta")
    cell.optimizers = {role: torch.optim.SGD(model.parameters())
                       for role, model in cell.models.items()}


def test_no_step_reads_a_number_from_the_device(tmp_path, monkeypatch):
    """To read one (.item(), .tolist(), a boolean mask) the CPU waits until the GPU has computed all
    that it was given: it then has nothing to do until the CPU has given it more."""
    cell = cell_of(tmp_path, micro_batch=8)
    as_on_another_device(cell, monkeypatch)
    values = training.update(cell, 0, "aligner", 0, [*range(16)])
    assert values["loss"].is_meta
    with pytest.raises(RuntimeError, match="meta"):  # transformers asks whether the mask is full
        training.update(cell, 0, "student", 0, [*range(16)])
    cell.student.never_wait()
    values = training.update(cell, 0, "student", 0, [*range(16)])
    assert values.keys() == {"task", "output", "manifold", "loss", "grad_norm"}
    assert all(value.is_meta for value in values.values())


def test_no_step_of_a_student_that_generates_reads_a_number(tmp_path, monkeypatch, causal_folder):
    """Where the answers stand, and how long they are, is known from the labels on the CPU."""
    config = resolve(Config(
        task="reason/arc_e", data_dir=write_reasoning(tmp_path), student=causal_folder(),
        teacher="painter", lora=2, batch_size=4, max_length=200, max_new_tokens=32, device="cpu",
        out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache")))
    (tmp_path / "cell").mkdir()
    cell = Cell(replace(config, **ARMS["armada"]), Data(config), tmp_path / "cell")
    as_on_another_device(cell, monkeypatch)
    cell.student.never_wait()
    values = training.update(cell, 0, "student", 0, [*range(4)])
    assert all(value.is_meta for value in values.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_never_waits_computes_the_same(family, tmp_path):
    """With texts of several lengths, and of one, where transformers would leave the mask out."""
    _, tokenizer = _tiny(TEXTS)
    torch.manual_seed(0)
    lm = transformers.AutoModel.from_config(family_config(family, len(tokenizer)))
    student = Student(lm, tokenizer, 2, 16).eval()
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    batches = [student.batch(rows), student.batch(rows[:1] * 3)]
    before = [student(**batch) for batch in batches]
    student.never_wait()
    asks_no_more = lm.config._attn_implementation == student_module.ATTENTION_THAT_NEVER_WAITS
    assert asks_no_more == (family != "deberta-v2")  # whose own attention never asked
    for batch, expected in zip(batches, before):
        torch.testing.assert_close(student(**batch), expected, atol=1e-5, rtol=1e-5)
    student.save(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


def test_a_tensor_is_sent_from_pinned_memory_to_a_gpu_and_plainly_elsewhere(monkeypatch):
    class Fake:
        device = torch.device("cpu")
        calls = []

        def pin_memory(self):
            self.calls.append("pinned")
            return self

        def to(self, device, **how):
            self.calls.append((device.type, how))
            return self

    send(Fake(), torch.device("cpu"))
    send(Fake(), torch.device("cuda"))
    assert Fake.calls == [("cpu", {}), "pinned", ("cuda", {"non_blocking": True})]


# ---- the longest batch first ----
def test_the_rehearsal_runs_the_longest_texts_and_changes_nothing(tmp_path, monkeypatch):
    """The same weights, no gradient, no moment; and the run after it ends bit for bit the same."""
    run(cell_of(tmp_path / "plain", micro_batch=8))

    cell = cell_of(tmp_path / "rehearsed", micro_batch=8)
    seen = []
    token_batch = cell.token_batch
    monkeypatch.setattr(cell, "token_batch", lambda rows: seen.append(rows) or token_batch(rows))
    before = copy_of(cell.models)
    training.rehearse(cell)
    assert_identical(copy_of(cell.models), before)
    assert all(weight.grad is None for weight in cell.models.parameters())
    assert not any(optimizer.state for optimizer in cell.optimizers.values())
    shown = sorted(cell.data.lengths[row] for row in seen[0])
    assert shown == sorted(cell.data.lengths)[-8:]
    run(cell)
    for name in ("plain", "rehearsed"):
        assert (tmp_path / name / "metrics.json").exists()
    assert_identical(weights(tmp_path / "rehearsed/last"), weights(tmp_path / "plain/last"))


def test_a_run_on_a_gpu_begins_with_the_rehearsal(tmp_path, monkeypatch):
    """Before anything that takes time, such as the answers of an untrained student."""
    class Rehearsed(Exception):
        pass

    def rehearse(cell):
        raise Rehearsed

    monkeypatch.setattr(training, "rehearse", rehearse)
    run(cell_of(tmp_path / "cpu", "undistilled", epochs=1))
    cell = cell_of(tmp_path / "gpu", "undistilled", epochs=1)
    cell.device = torch.device("cuda")
    cell.student.generates = True
    with pytest.raises(Rehearsed):
        run(cell)


def test_out_of_memory_is_one_line_with_flags_that_fit(
        tmp_path, monkeypatch, capsys, causal_folder):
    """They are --plan's, for the memory of the card that is there."""
    flags = ["--task=reason/arc_e", "--data-dir", write_reasoning(tmp_path),
             "--student", causal_folder(), "--lora=0", "--teacher=painter", "--device=cpu",
             "--max-length=200", f"--cache-dir={tmp_path / 'cache'}"]

    def too_little(cell):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB ...")

    monkeypatch.setattr(training, "run", too_little)
    gibibytes = {"enough": 0.05, "nothing": 1e-6}
    said = {}
    for case in gibibytes:
        monkeypatch.setattr(training, "card_memory", lambda config: gibibytes[case])
        with pytest.raises(SystemExit) as stop:
            main([*flags, f"--out={tmp_path / case}"])
        assert stop.value.code == 2
        said[case] = capsys.readouterr().err
        assert said[case].count("\n") == 1
    assert "0.05 GiB should do with --grad-checkpoint on" in said["enough"]
    assert "try a smaller --micro-batch" in said["nothing"]


# ---- files and seconds ----
def test_a_checkpoint_waits_twenty_times_as_long_as_the_last_one_took(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    cell = cell_of(tmp_path)
    # Before the first: 12 bytes a weight at half a gigabyte a second.
    expected = 12 * sum(weight.numel() for weight in cell.student.parameters()) / 0.5e9
    clock.now = 100.0 + 19 * expected
    assert not cell.checkpoint_is_due()
    clock.now = 100.0 + 21 * expected
    assert cell.checkpoint_is_due()

    checksum = training.checksum

    def slow_checksum(folder):
        clock.now += 3.0
        return checksum(folder)

    monkeypatch.setattr(training, "checksum", slow_checksum)
    cell.save("last")
    saved = clock.now
    clock.now = saved + 59.0
    assert not cell.checkpoint_is_due()
    clock.now = saved + 61.0
    assert cell.checkpoint_is_due()
    cell.done = cell.total_steps  # finish() saves the last step's
    assert not cell.checkpoint_is_due()


def test_the_end_is_always_written_and_without_moments(tmp_path, monkeypatch):
    """Nobody goes on from there, so that two thirds of the bytes are spared. A kill while test is
    scored loses nothing: the resumed run scores again."""
    monkeypatch.setattr(Cell, "checkpoint_is_due", lambda cell: False)
    run(cell_of(tmp_path / "whole"))

    cell = cell_of(tmp_path / "killed")
    evaluate = cell.evaluate

    def dies(split):
        if split == "test":
            raise RuntimeError("killed")
        return evaluate(split)

    cell.evaluate = dies
    with pytest.raises(RuntimeError, match="killed"):
        run(cell)
    state = json.loads((tmp_path / "killed/last/training.json").read_text())
    assert state["done"] == cell.total_steps
    size = (tmp_path / "killed/last/optimizers.safetensors").stat().st_size
    assert size < 1000

    steps = []
    monkeypatch.setattr(training, "update", lambda *args: steps.append(args))
    run(cell_of(tmp_path / "killed"))
    assert not steps
    assert_identical(weights(tmp_path / "killed/last"), weights(tmp_path / "whole/last"))
    for name in ("predictions_dev.tsv", "predictions_test.tsv"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole


def test_the_best_student_is_kept_only_on_demand_and_its_scores_always(tmp_path):
    for keeps in (False, True):
        folder = tmp_path / str(keeps)
        cell = cell_of(folder, "undistilled", keep_best=keeps)
        run(cell)
        assert (folder / "best").exists() == keeps
        best = json.loads((folder / "metrics.json").read_text())["best"]
        assert best["dev"]["accuracy"] == max(line["dev"]["accuracy"] for line in lines(folder)
                                              if "dev" in line)


def test_seconds_are_told_by_part_and_add_up(tmp_path, monkeypatch, capsys):
    """A clock that moves by 1 in each step, 10 in each evaluation and 100 in each save."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slowed(function, seconds):
        def call(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)
        return call

    monkeypatch.setattr(training, "update", slowed(training.update, 1))
    monkeypatch.setattr(Cell, "evaluate", slowed(Cell.evaluate, 10))
    monkeypatch.setattr(Cell, "save", slowed(Cell.save, 100))
    monkeypatch.setattr(Cell, "checkpoint_is_due", lambda cell: cell.done < cell.total_steps)
    metrics = train(Config(**QUICK, arms="armada", seeds="0", out=str(tmp_path / "run")))
    # Two epochs of three steps for two roles; dev twice and test once; a checkpoint, and the end.
    spent = {"steps": 12, "evaluation": 30, "files": 200}
    assert metrics["armada"][0]["seconds"] == spent
    assert "seconds: steps 12.0, evaluation 30.0, files 200.0" in capsys.readouterr().out
    evaluated = [line for line in lines(tmp_path / "run/armada/0") if "dev" in line]
    assert evaluated[0]["seconds"] == {"steps": 6, "evaluation": 10, "files": 0}
    assert evaluated[1]["seconds"] == {"steps": 12, "evaluation": 20, "files": 100}


# ---- --compile ----
def test_compiled_blocks_train_and_score_to_the_same_losses(tmp_path, monkeypatch):
    """Texts are padded to multiples of 8. Dropout, off here, draws other numbers when compiled."""
    torch._dynamo.reset()
    switch_dropout_off(monkeypatch)
    found = {}
    for compiles in (False, True):
        cell = cell_of(tmp_path / str(compiles), compile=compiles, eval_limit=64)
        if compiles:
            assert cell.token_batch([0, 1, 2])["input_ids"].size(1) % 8 == 0
        found[compiles] = [training.update(cell, 0, "student", step, [*range(16)])
                           for step in range(2)]
        found[compiles] += [{"dev": torch.tensor(cell.evaluate("dev")[0]["accuracy"])}]
    for compiled, plain in zip(found[True], found[False]):
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


def test_a_compiled_student_generates_what_it_would_without_and_compiles_nothing_for_it(
        causal_folder):
    """Each new token makes the kept keys and values longer by one."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    student = build_student(causal_folder(), 2, 16, vocabulary=(5, 6), max_new_tokens=8, lora=2)
    rows = [{"input_ids": [*range(5, 5 + length)]} for length in (3, 9)]
    plain = student.generate(rows)
    for block in student.layers():
        block.compile(dynamic=True)  # when it is called first
    student.compiled = True
    counters.clear()
    assert student.generate(rows) == plain
    assert not counters["stats"]


def test_without_a_compiler_compile_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    from torch._inductor import cpp_builder

    torch._dynamo.reset()

    def no_compiler():
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(SystemExit) as stop:
        main(["--task=objects", "--limit=8", "--epochs=1", "--compile",
              f"--out={tmp_path / 'run'}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--compile: bert cannot be compiled here" in error
    assert error.rstrip().endswith("leave it out")
    assert error.count("\n") == 1
