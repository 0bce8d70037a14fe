"""Several processes are one process that is quicker: the same gradients, the same weights, the
same files.

Two real processes talk over gloo on this machine. Dropout is 0 here: each process draws its own
otherwise.
"""
import json
import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing

import train as training
from losses import KINDS
from student import load_student
from tests.conftest import write_reasoning
from train import (Cell, Config, Data, gather_to_rank0, init_processes, resolve, schedule,
                   update)


# ---- two processes, and what each of them does ----
def as_rank(rank, port, work, arguments, result):
    """In a process of its own: what torchrun sets, then work(*arguments); each rank's answer goes
    to a file of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_processes(Config(device="cpu"))
    torch.save(work(*arguments), f"{result}{rank}")
    torch.distributed.barrier()


def on_two(tmp_path, work, *arguments):
    """work(*arguments) in two processes -> what it returned in each. Forked: imports take
    seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = tmp_path / "result"
    torch.multiprocessing.start_processes(as_rank, (port, work, arguments, result), 2,
                                          start_method="fork")
    return [torch.load(tmp_path / f"result{rank}", weights_only=False) for rank in (0, 1)]


def open_cell(flags, folder):
    """A cell as train() makes it, but without dropout."""
    config = resolve(Config(**{"device": "cpu", "teacher": "painter", **flags}))
    config = replace(config, arms=config.arms[:1], **training.ARMS[config.arms[0]])
    folder.mkdir(parents=True, exist_ok=True)
    cell = Cell(config, Data(config), folder)
    for module in cell.models.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # OPT's, a function of its layers
            module.dropout = 0.0
    return cell


def keep_the_gradients():
    """What stands in for zero_grad(), so that a step's gradients can be read after it."""


def as_numbers(logged):
    return {name: value.item() for name, value in logged.items()}


def first_gradient(flags, folder, rows):
    """{parameter: gradient} of one student step, clipped, and the step's logged values."""
    cell = open_cell(flags, folder)
    cell.optimizers["student"].zero_grad = keep_the_gradients
    logged = update(cell, 0, "student", 0, rows)
    gathered = {}
    for name, weight in cell.student.named_parameters():
        if weight.grad is not None:
            gathered[name] = gather_to_rank0(weight.grad)
    return gathered, as_numbers(logged)


def gradients(cases, folder):
    return [first_gradient(flags, folder / str(i), rows) for i, (flags, rows) in enumerate(cases)]


def weights_of(cell):
    """Student's and aligner's, but for the keys' biases: softmax ignores them, so that their
    gradient is rounding, and AdamW divides rounding by rounding."""
    gathered = {}
    for name, value in cell.models.state_dict().items():
        if not name.endswith(("key.bias", "k_proj.bias")):
            gathered[name] = gather_to_rank0(value)
    return gathered


def ten_steps(cases, folder):
    """The weights after ten steps of each role, and all that the steps logged."""
    found = []
    for i, flags in enumerate(cases):
        cell = open_cell(flags, folder / str(i))
        logged = []
        left = {"aligner": 10, "student": 10}
        for epoch, role, step, rows in schedule(cell):
            if left[role]:
                left[role] -= 1
                logged.append(as_numbers(update(cell, epoch, role, step, rows)))
        found.append((weights_of(cell), logged))
    return found


OBJECTS = dict(task="objects", student="tiny", arms="armada", seeds="0", limit=32, batch_size=8,
               epochs=3)


@pytest.fixture(scope="module")
def kinds_of_student(official, model_folder, causal_folder, tmp_path_factory):
    """Flags of a plain, a checkpointed and a LoRA student, a decoder and one that generates."""
    rte = dict(task="rte", data_dir=official, arms="armada", seeds="0", batch_size=5, epochs=4,
               lr=1e-3, max_length=60)
    reasoning = write_reasoning(tmp_path_factory.mktemp("parallel"))
    return {
        "plain": OBJECTS,
        "checkpointed": OBJECTS | {"grad_checkpoint": "on"},
        "lora": rte | {"student": model_folder("llama"), "lora": 2, "grad_checkpoint": "on"},
        "decoder": rte | {"student": model_folder("opt"), "micro_batch": 5, "batch_size": 5},
        "generates": dict(task="reason/arc_e", data_dir=reasoning, student=causal_folder(),
                          seeds="0", arms="armada", lora=2, epochs=4, batch_size=3,
                          max_length=400),
    }


def close(ours, theirs, tolerance):
    """Equal within an absolute tolerance."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0,
                                   msg=lambda m: f"{name}: {m}")


# ---- the same gradients and the same weights ----
def test_two_processes_have_the_gradient_of_one_on_the_same_batch(kinds_of_student, tmp_path):
    cases = []
    for kind in KINDS:
        cases.append(({**OBJECTS, "loss": kind}, [0, 1, 2, 3, 4]))  # uneven shares, 3 + 2
        cases.append(({**OBJECTS, "loss": kind}, [7]))  # one row alone: rank 1 has none
    cases.append(({**OBJECTS, "micro_batch": 4}, [*range(7)]))
    for flags in kinds_of_student.values():
        cases += [({**flags, "loss": kind}, [4, 0, 2]) for kind in KINDS]
    two, _ = on_two(tmp_path, gradients, cases, tmp_path / "two")
    one = gradients(cases, tmp_path / "one")
    for (mine, mine_logged), (theirs, theirs_logged) in zip(two, one):
        assert sum(g.abs().sum() for g in theirs.values()) > 1e-3
        close(mine, theirs, 1e-6)
        assert mine_logged == pytest.approx(theirs_logged, rel=1e-5, abs=1e-7)


def test_rows_without_a_label_are_divided_over_processes_and_micro_batches_exactly(
        kinds_of_student, official, tmp_path):
    """A process, or a micro-batch, may have no labelled row: its share of the sum is 0."""
    half = OBJECTS | {"limit": 16, "unlabelled": 16, "batch_size": 32}
    scores = OBJECTS | {"task": "stsb", "data_dir": official, "limit": 4, "unlabelled": 8}
    texts = kinds_of_student["generates"] | {"limit": 4, "unlabelled": 5}
    mixed = [0, 20, 1, 21, 22, 23]  # the first process has 0, 1 and 22, the second no label
    cases = [(half, mixed), (half, [20, 21, 22]), (scores, [0, 7, 1, 8, 9]), (texts, [0, 7, 1])]
    whole = [*range(24, 32), *range(8), *range(16, 20), *range(8, 12), *range(20, 24),
             *range(12, 16)]
    cases += [(half, whole), ({**half, "micro_batch": 8}, whole)]  # 8 without, 8 with, 4 and 4 ...
    two, _ = on_two(tmp_path, gradients, cases, tmp_path / "two")
    one = gradients(cases, tmp_path / "one")
    for (mine, mine_logged), (theirs, theirs_logged) in zip(two, one):
        assert sum(g.abs().sum() for g in theirs.values()) > 1e-3
        close(mine, theirs, 1e-6)
        assert mine_logged == pytest.approx(theirs_logged, rel=1e-5, abs=1e-7)
    (in_one, _), (in_pieces, _) = one[-2:]
    close(in_pieces, in_one, 1e-6)


def test_ten_steps_of_two_processes_end_at_the_weights_of_one(kinds_of_student, tmp_path):
    cases = [*kinds_of_student.values()]
    both = on_two(tmp_path, ten_steps, cases, tmp_path / "two")
    one = ten_steps(cases, tmp_path / "one")
    for two in both:  # the aligner too, which each process trains for itself
        for (mine, mine_logged), (theirs, theirs_logged) in zip(two, one):
            assert len(mine_logged) == 20
            for values, expected in zip(mine_logged, theirs_logged):
                assert values == pytest.approx(expected, rel=1e-3, abs=1e-5)
            close(mine, theirs, 1e-5)


def test_a_student_split_by_fsdp_is_the_same_student(kinds_of_student, tmp_path, monkeypatch):
    cases = [*kinds_of_student.values()]
    split = [flags | {"fsdp": True} for flags in cases]
    two, _ = on_two(tmp_path, ten_steps, split, tmp_path / "two")
    one = ten_steps(cases, tmp_path / "one")
    for (mine, _), (theirs, _) in zip(two, one):
        close(mine, theirs, 1e-5)


def local_share(flags, folder):
    """The part of the student's numbers that this process holds."""
    weights = [*open_cell(flags, folder).student.parameters()]
    held = sum(weight.to_local().numel() for weight in weights)
    return held / sum(weight.numel() for weight in weights)


def test_fsdp_leaves_half_of_the_student_in_each_process(tmp_path):
    flags = OBJECTS | {"fsdp": True}
    for part in on_two(tmp_path, local_share, flags, tmp_path / "cell"):
        assert 0.45 < part < 0.55


def own_outputs(flags, folder):
    """p_s of this process's row, when both have the same text."""
    cell = open_cell(flags, folder)
    cell.student.drop.p = 0.0
    for module in cell.student.lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    rows = cell.data.encoded["train"]
    rows[1] = rows[0]
    seen = []

    def note_projection(module, inputs, out):
        seen.append(out.proj.detach())

    cell.student.register_forward_hook(note_projection)
    update(cell, 0, "student", 0, [0, 1])
    return seen[0]


def test_each_process_draws_its_own_dropout(tmp_path):
    first, second = on_two(tmp_path, own_outputs, OBJECTS, tmp_path / "cell")
    assert first.shape == second.shape
    assert not torch.allclose(first, second)


# ---- the same files ----
def whole_run(flags, stop_in=None):
    """train(), stopped at the first step of an epoch as Ctrl-C stops it."""
    def stopping(cell, epoch, *rest):
        if epoch == stop_in:
            raise KeyboardInterrupt
        return update(cell, epoch, *rest)

    training.update = stopping
    try:
        return training.train(Config(**flags))
    except KeyboardInterrupt:
        return None
    finally:
        training.update = update


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("fsdp, lora, family",
                         [(False, 2, "llama"), (True, 2, "llama"), (True, 0, "opt")])
def test_two_processes_write_one_run(fsdp, lora, family, causal_folder, tmp_path):
    reasoning = write_reasoning(tmp_path)
    flags = dict(task="reason/arc_e", data_dir=reasoning, student=causal_folder(family), seeds="0",
                 arms="armada", teacher="painter", lora=lora, epochs=2, batch_size=4,
                 max_length=400, device="cpu", max_new_tokens=4, eval_limit=9, fsdp=fsdp,
                 out=str(tmp_path / "run"))
    metrics = on_two(tmp_path, whole_run, flags)[0]["armada"][0]
    assert metrics["test"].keys() == {"accuracy", "answered"}
    cell = tmp_path / "run/armada/0"
    written = lines(cell / "predictions_test.jsonl")
    assert len(written) == 9  # each example once
    assert [line["epoch"] for line in lines(cell / "log.jsonl") if "dev" in line] == [0, 1, 2]
    student = load_student(cell / "last")
    if not lora:  # OPT's vocabulary is tied: written once
        size = sum(weight.nbytes for weight in student.lm.parameters())
        assert size < (cell / "last/model.safetensors").stat().st_size < size + 10_000
    task = training.find_task("reason/arc_e")
    examples = training.load_task("reason/arc_e", reasoning)["test"][:9]
    rows, _ = training.encode(task, examples, student.tokenizer, 400, True, 4)
    assert student.generate(rows, batch_size=2) == [line["output"] for line in written]


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one(fsdp, tmp_path):
    flags = {**OBJECTS, "epochs": 2, "eval_every": 1, "out": str(tmp_path / "run"),
             "device": "cpu"}
    assert on_two(tmp_path, whole_run, {**flags, "fsdp": fsdp}, 1) == [None, None]
    cell = tmp_path / "run/armada/0"
    assert (cell / "last/training.json").exists()
    # The second epoch's first steps, with the moments of the first.
    two, _ = on_two(tmp_path, resumed_step, {**flags, "fsdp": fsdp}, cell)
    two_weights, two_done = two
    one_weights, one_done = resumed_step(flags, cell)
    assert one_done == two_done
    assert two_done > 0
    close(two_weights, one_weights, 1e-6)
    metrics = training.train(Config(resume=str(tmp_path / "run")))["armada"][0]
    steps = [line["step"] for line in lines(cell / "log.jsonl") if line.get("role") == "student"]
    assert steps == [4, 8]
    assert 0 <= metrics["dev"]["accuracy"] <= 1


def resumed_step(flags, folder):
    """(weights after one more step, how many had been done) from a checkpoint."""
    cell = open_cell(flags, folder)
    update(cell, 1, "aligner", 0, [*range(8)])
    update(cell, 1, "student", 0, [*range(8)])
    return weights_of(cell), cell.done


# ---- the same aligner ----
def aligner_after_three_steps(flags, folder):
    """With dropout, which is off in the other tests here."""
    cell = open_cell(flags, folder)
    cell.aligner.drop.p = 0.5
    cell.optimizers["aligner"].param_groups[0]["lr"] = 1e-3
    for step in range(3):
        update(cell, 0, "aligner", step, [*range(8)])
    return cell.aligner.state_dict()


def test_all_processes_train_the_same_aligner_dropout_included(tmp_path):
    """Nothing brings them together again: other draws would be another teacher in each process."""
    first, second = on_two(tmp_path, aligner_after_three_steps, OBJECTS, tmp_path / "cell")
    close(first, second, 0)
