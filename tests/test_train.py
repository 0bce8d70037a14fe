"""The loop: seeds, schedules, accumulation, checkpoints, the command line. Read beside train.py.

Most tests train the "objects" demonstration on 40 texts, for two epochs of three steps (QUICK).
"""
import dataclasses
import functools
import itertools
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import eval as evaluation
import losses
import train as training
from align import Householder
from data import TASKS, UserError, collate, load_task
from student import load_student
from teacher import Painter, build_teacher
from train import (ARMS, Cell, Config, Data, is_distilled, lr_factor, main, resolve, run, schedule,
                   seed_of, train)

ROOT = Path(__file__).resolve().parent.parent
# 3 steps an epoch, the last one of 8. On the CPU, for a GPU would round and draw otherwise than
# what these runs are compared with.
QUICK = dict(task="objects", epochs=2, eval_every=1, limit=40, batch_size=16, device="cpu")
QUICK_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]


@pytest.fixture(scope="module", autouse=True)
def painted_once():
    """The runs below look at the same 620 pictures again and again: painting each once saves a
    fifth of the time."""
    original = Painter.paint

    @functools.cache
    def paint(rho, text):
        return original(build_teacher(f"painter:{rho}"), text)

    Painter.paint = lambda self, text: paint(self.rho, text)
    yield
    Painter.paint = original


def cell_of(folder, arm="armada", seed=0, **flags):
    """A cell as train() makes it, not yet run."""
    config = resolve(Config(**{**QUICK, "arms": (arm,), "seeds": (seed,), **flags}))
    config = dataclasses.replace(config, **ARMS[arm])
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Cell(config, Data(config), Path(folder))


def copy_of(module):
    """{name: tensor}, which later steps do not change."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def weights(folder):
    """All saved tensors of a folder, under "file.name"."""
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            tensors[f"{file.stem}.{name}"] = tensor
    return tensors


def assert_identical(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 0
    for name in a:
        assert torch.equal(a[name], b[name]), name


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines(folder):
    return read_lines(Path(folder) / "log.jsonl")


def lines_of(folder, role):
    return [row for row in lines(folder) if row.get("role") == role]


def steps_done(checkpoint):
    return json.loads((checkpoint / "training.json").read_text())["done"]


def outcome(folder):
    """metrics.json without the clock and the memory, which differ from run to run."""
    metrics = json.loads((Path(folder) / "metrics.json").read_text())
    return {name: metrics[name] for name in metrics if name not in ("seconds", "peak_memory_mib")}


def switch_dropout_off(monkeypatch):
    """Let every module stay in evaluation mode: dropout's draws differ by micro-batch."""
    original = torch.nn.Module.train

    def stay_in_evaluation_mode(self, mode=True):
        return original(self, False)

    monkeypatch.setattr(torch.nn.Module, "train", stay_in_evaluation_mode)


def fail_if_trained(cell):
    """What stands in for run() where nothing is left to train."""
    pytest.fail("trained again")


# ---- seeds and schedules ----
def test_the_rate_rises_for_a_tenth_of_the_steps_at_most_a_hundred_and_falls_linearly_to_zero():
    factors = [lr_factor(step, 80) for step in range(80)]
    assert factors[:8] == pytest.approx([(i + 1) / 8 for i in range(8)])
    assert factors[8] == 1
    assert np.diff(factors[8:]) == pytest.approx(-1 / 72)
    assert factors[-1] == pytest.approx(1 / 72)
    assert max(range(5000), key=lambda step: lr_factor(step, 5000)) in (99, 100)
    # too short for a warm-up
    assert [lr_factor(step, 3) for step in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])


def test_every_step_has_a_seed_of_its_own():
    places = itertools.product((0, 1), ("aligner", "student"), range(5), range(5), (0, 8))
    seeds = {seed_of(*place) for place in places}
    assert len(seeds) == 2 * 2 * 5 * 5 * 2
    assert seed_of(0, "student") == seed_of(0, "student")


def test_arms_of_one_seed_share_initial_weights_data_order_and_dropout(tmp_path, monkeypatch):
    """So that their differences are paired. The dropout is seen in the first student step, before
    any update: all arms must report the same main logits."""
    class FirstStudentStep(Exception):
        pass

    def stop(out, *args, **kwargs):
        raise FirstStudentStep(out.logits.detach())

    monkeypatch.setattr(training, "student_loss", stop)
    config = resolve(Config(**{**QUICK, "arms": tuple(ARMS), "seeds": (0,)}))
    data = Data(config)
    seen = {}
    for arm in ARMS:
        folder = tmp_path / arm / "0"
        folder.mkdir(parents=True)
        cell_config = dataclasses.replace(config, arms=(arm,), **ARMS[arm])
        cell = Cell(cell_config, data, folder)
        cell.student.save(folder / "last")  # self-training asks undistilled's
        start = copy_of(cell.student)
        order = [rows for _, role, _, rows in schedule(cell) if role == "student"]
        with pytest.raises(FirstStudentStep) as step:
            run(cell)
        seen[arm] = (start, order, step.value.args[0])
    start, order, logits = seen["armada"]
    for arm in ARMS:
        assert_identical(start, seen[arm][0])
        assert seen[arm][1] == order
        assert torch.equal(seen[arm][2], logits)
    other = cell_of(tmp_path / "other", seed=1).student.state_dict()
    embedding = "lm.embeddings.word_embeddings.weight"
    assert not torch.equal(start[embedding], other[embedding])


def test_each_epoch_shows_every_example_once_to_the_aligner_and_then_once_to_the_student(tmp_path):
    cell = cell_of(tmp_path)
    plan = list(schedule(cell))
    places = [(epoch, role, step) for epoch, role, step, _ in plan]
    assert places == [*itertools.product(range(2), ("aligner", "student"), range(3))]
    for start in range(0, 12, 3):
        shown = []
        for *_, rows in plan[start:start + 3]:
            shown.extend(rows)
        assert sorted(shown) == list(range(40))
    undistilled = cell_of(tmp_path / "u", "undistilled")
    assert [role for _, role, _, _ in schedule(undistilled)] == ["student"] * 6


def looked_up(cell, pairing, seed, rows=range(40)):
    config = dataclasses.replace(cell.config, pairing=pairing)
    return cell.data.lookup(config, seed)(list(rows))


def test_shuffling_gives_every_text_another_texts_vector_and_each_vector_once(tmp_path):
    cell = cell_of(tmp_path)
    own = looked_up(cell, "own", 0)
    mixed = looked_up(cell, "shuffled", 0)
    again = looked_up(cell, "shuffled", 0)
    other = looked_up(cell, "shuffled", 1)
    assert torch.equal(own, torch.from_numpy(cell.vectors["train"](range(40))))
    assert (mixed != own).any(1).all()
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)
    assert sorted(mixed.tolist()) == sorted(own.tolist())


def test_noise_has_the_vectors_moments_and_belongs_to_its_example(tmp_path):
    """Mean and variance of each dimension are the pictures'; nothing else is, and no batch changes
    it."""
    cell = cell_of(tmp_path)
    own = looked_up(cell, "own", 0)
    draws = torch.cat([looked_up(cell, "noise", seed) for seed in range(50)])  # (2000, d_e)
    deviation = own.std(0, correction=0)
    distance = (draws.mean(0) - own.mean(0)).abs()
    assert (distance <= 5 * deviation / 2000**0.5 + 1e-6).all()
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.15, atol=1e-6)
    alone = looked_up(cell, "noise", 0, [7])
    again = looked_up(cell, "noise", 0)[[7]]
    assert torch.equal(alone, again)
    assert not torch.equal(alone, looked_up(cell, "noise", 1, [7]))
    assert not torch.equal(alone, looked_up(cell, "noise", 0, [8]))


def test_every_arm_is_one_line_of_overrides_and_controls_are_those_without_the_teachers_vectors(
        tmp_path, monkeypatch):
    fields = {field.name for field in dataclasses.fields(Config)}
    for overrides in ARMS.values():
        assert overrides.keys() <= fields
        assert len(overrides) <= 4
    few = {split: rows[:60] for split, rows in load_task("objects").items()}
    monkeypatch.setattr(training, "load_task", lambda *_: few)
    out = str(tmp_path / "run")
    config = resolve(Config(task="objects", arms=tuple(ARMS), epochs=1, limit=40, out=out,
                            device="cpu"))
    found = train(config)
    controls = {arm for arm in ARMS if found[arm][0]["control"]}
    assert {"undistilled", "undistilled-aux", "shuffled", "noise"} <= controls  # yours may be more
    assert not controls & {"armada", "random-aligner", "no-output", "alpha-0", "no-manifold",
                           "no-aux", "euclidean", "cosine", "dose-0", "dose-0.75"}
    for arm in ARMS:
        spaces = found[arm][0]["spaces"]
        without_teacher = not is_distilled(dataclasses.replace(config, **ARMS[arm]))
        assert (spaces is None) == without_teacher
        if spaces is not None:
            assert 0 <= spaces["retrieval@1"] <= 1
            assert 0 <= spaces["cka"] <= 1
    assert found["dose-0.25"][0]["teacher"] == "painter:0.25"
    assert found["armada"][0]["teacher"] == "painter"


def test_controls_and_alpha_0_stay_without_soft_labels_whatever_the_flags(tmp_path):
    flags = {**QUICK, "arms": ("undistilled", "undistilled-aux", "alpha-0"), "beta": 0.0}
    found = train(Config(**flags, output_factor=0.5, out=str(tmp_path / "run")))
    for seeds in found.values():
        assert seeds[0]["control"]
        assert seeds[0]["aligner"] is None


def test_an_arm_whose_overrides_are_out_of_range_stops_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(ARMS, "mine", {"beta": -5})
    with pytest.raises(UserError, match="--beta -5 must be"):
        resolve(Config(arms=("armada", "mine")))
    monkeypatch.setitem(ARMS, "mine", {"pairing": "own "})
    with pytest.raises(UserError, match="unknown --pairing 'own '"):
        resolve(Config(arms=("armada", "mine")))


def test_arms_without_a_teacher_pay_for_no_vectors():
    data = Data(resolve(Config(**{**QUICK, "arms": ("undistilled", "undistilled-aux")})))
    assert data.vectors == {}
    assert data.dim == 1024


def raw_vectors(spec, examples):
    """What the teacher makes of the examples' prompts, before any scaling."""
    return build_teacher(spec).encode([TASKS["objects"].prompt(example) for example in examples])


def test_a_dose_is_read_from_its_own_painter():
    data = Data(resolve(Config(**{**QUICK, "arms": ("undistilled", "armada", "dose-0.25")})))
    assert set(data.vectors) == {"painter", "painter:0.25"}
    for spec, vectors in data.vectors.items():
        raw = raw_vectors(spec, data.splits["dev"])
        found = vectors["dev"](range(500))
        scale = np.linalg.norm(found) / np.linalg.norm(raw)
        np.testing.assert_allclose(found, raw * scale, rtol=1e-4, atol=1e-5)


def test_an_untrained_aligner_stays_as_it_was(tmp_path):
    cell = cell_of(tmp_path, "random-aligner", epochs=1)
    before = copy_of(cell.aligner)
    run(cell)
    assert_identical(cell.aligner.state_dict(), before)


def test_the_alignment_in_metrics_json_is_that_of_the_saved_student(tmp_path):
    cell = cell_of(tmp_path)
    run(cell)
    student = load_student(tmp_path / "last")
    rows = cell.data.encoded["dev"]
    e = torch.from_numpy(cell.vectors["dev"](range(500)))  # (500, d_e)
    p_t = cell.aligner.eval()(e).proj.detach().numpy()  # (500, d_p)
    with torch.inference_mode():
        p_s = student(**collate(rows, student.tokenizer.pad_token_id)).proj.numpy()  # (500, d_p)
    expected = {"retrieval@1": evaluation.retrieval_at_1(p_t, p_s),
                "cka": evaluation.linear_cka(p_t, p_s)}
    assert outcome(tmp_path)["spaces"] == pytest.approx(expected, abs=1e-4)


def test_teacher_vectors_are_divided_by_the_training_root_mean_square_and_not_centred(tmp_path):
    data = cell_of(tmp_path).data
    vectors = data.vectors["painter"]
    raw = raw_vectors("painter", data.splits["train"])
    scale = np.sqrt((raw.astype(float) ** 2).mean())
    for split in ("train", "dev"):  # dev vectors by the TRAINING root mean square
        raw = raw_vectors("painter", data.splits[split])
        np.testing.assert_allclose(vectors[split](range(len(raw))), raw / scale, rtol=1e-5)


# ---- the step ----
def test_micro_batches_give_the_update_of_the_whole_batch(tmp_path, monkeypatch):
    """With dropout off (its draws differ by micro-batch).
    37 examples in batches of 16: the last has 5, cut into 4 + 1."""
    switch_dropout_off(monkeypatch)
    results = []
    for i, micro in enumerate((16, 8, 4)):
        cell = cell_of(tmp_path / str(i), batch_size=16, micro_batch=micro, limit=37, epochs=1)
        run(cell)
        results.append(copy_of(cell.student))
    whole, halves, quarters = results
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(whole[name], quarters[name], atol=2e-4, rtol=1e-3)


def test_three_steps_of_each_role_are_adamw_with_clipped_gradients_and_the_scheduled_rate(
        tmp_path, monkeypatch):
    """Against a loop written by hand: clip at 1, the role's own rate times lr_factor, weight decay
    .01."""
    switch_dropout_off(monkeypatch)
    cell = cell_of(tmp_path / "a", epochs=1, batch_size=8)
    twin = cell_of(tmp_path / "b", epochs=1, batch_size=8)
    run(cell)
    rates = {"aligner": 1e-3, "student": 4e-3}
    optimizers = {role: torch.optim.AdamW(twin.models[role].parameters(), weight_decay=0.01)
                  for role in rates}
    for _, role, step, rows in schedule(twin):
        model = twin.models[role].eval()
        y = twin.data.labels[rows]  # (B,)
        e = twin.teacher_vectors(rows)  # (B, d_e)
        if role == "aligner":
            loss = losses.aligner_loss(model(e), y, 1.0)
        else:
            texts = [twin.data.encoded["train"][i] for i in rows]
            x = collate(texts, model.tokenizer.pad_token_id)
            loss, _ = losses.student_loss(model(**x), twin.aligner(e), y, alpha=0.5, beta=20.0,
                                          gamma=1.0, temperature=5.0, kind="manifold")
        optimizers[role].zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / norm.item())
        optimizers[role].param_groups[0]["lr"] = rates[role] * lr_factor(step, 5)
        optimizers[role].step()
    for role in rates:
        for a, b in zip(cell.models[role].parameters(), twin.models[role].parameters()):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_the_rate_runs_on_over_the_epochs(tmp_path):
    run(cell_of(tmp_path))
    for role, peak in (("aligner", 1e-3), ("student", 4e-3)):
        rates = [row["lr"] for row in lines_of(tmp_path, role)]
        assert rates == pytest.approx([peak * lr_factor(2, 6), peak * lr_factor(5, 6)])


def test_every_flag_of_the_losses_reaches_them(tmp_path, monkeypatch):
    seen = []

    def noting_student_loss(*args, **kwargs):
        seen.append(kwargs)
        return losses.student_loss(*args, **kwargs)

    def noting_aligner_loss(out, y, gamma):
        seen.append(gamma)
        return losses.aligner_loss(out, y, gamma)

    monkeypatch.setattr(training, "student_loss", noting_student_loss)
    monkeypatch.setattr(training, "aligner_loss", noting_aligner_loss)
    cell = cell_of(tmp_path, epochs=1, alpha=0.3, beta=7.0, gamma=0.2, temperature=3.0,
                   loss="cosine", proj_dim=50, orthogonal_student=True, grad_checkpoint="on",
                   output_factor=0.1)
    run(cell)
    assert seen[0] == 0.2
    assert seen[-1] == dict(alpha=0.3, beta=7.0, gamma=0.2, temperature=3.0, kind="cosine",
                            output_factor=0.1, answer_loss=None)
    lm = cell.student.lm
    assert lm.is_activation_checkpointing or lm.is_gradient_checkpointing
    assert isinstance(cell.student.heads["projection"], Householder)
    assert cell.aligner.projection.out_dim == 50


DISTILLED = [arm for arm, overrides in ARMS.items()
             if is_distilled(dataclasses.replace(resolve(Config(task="objects")), **overrides))]


@pytest.mark.parametrize("arm", DISTILLED)
def test_the_aligner_sees_the_vector_that_the_pairing_names(tmp_path, monkeypatch, arm):
    """In the controls both roles learn from wrong pictures: else the control would control
    nothing."""
    cell = cell_of(tmp_path, arm, epochs=1)
    seen = []

    def note_input(module, args):
        seen.append(args[0])

    cell.aligner.register_forward_pre_hook(note_input)
    run(cell)
    lookup = cell.data.lookup(cell.config, 0)
    for (_, _, _, rows), e in zip(schedule(cell), seen):
        assert torch.equal(e, lookup(rows))
        own = torch.from_numpy(cell.vectors["train"](rows))
        assert torch.equal(e, own) == (cell.config.pairing == "own")


def test_no_two_steps_of_a_run_draw_the_same_dropout_and_no_two_epochs_the_same_order(
        tmp_path, monkeypatch):
    drawn = []
    original = training.seed_all

    def noting_seed_all(seed, *at):
        drawn.append(seed)
        return original(seed, *at)

    cell = cell_of(tmp_path, micro_batch=8)
    monkeypatch.setattr(training, "seed_all", noting_seed_all)
    run(cell)
    assert len(drawn) == 2 * 2 * 5  # epochs, roles, micro-batches of 16 + 16 + 8
    assert len(set(drawn)) == len(drawn)
    orders = {0: [], 1: []}
    for epoch, role, _, rows in schedule(cell):
        if role == "student":
            orders[epoch].append(rows)
    assert orders[0] != orders[1]


def test_the_best_folder_holds_the_epoch_with_the_highest_dev_score(tmp_path, monkeypatch):
    scores = iter([0.5, 0.7, 0.6, 0.0, 0.0])
    monkeypatch.setattr(evaluation, "score", lambda *args: {"accuracy": next(scores, 0.0)})
    cell = cell_of(tmp_path, "undistilled", epochs=3, keep_best=True)
    run(cell)
    assert cell.best == {"epoch": 2, "dev": {"accuracy": 0.7}}
    best = weights(tmp_path / "best").values()
    last = weights(tmp_path / "last").values()
    assert any(not torch.equal(a, b) for a, b in zip(best, last))


def test_fp16_forgives_a_skipped_step_but_not_a_scale_that_vanishes():
    class Scaler:
        def is_enabled(self):
            return True

        def get_scale(self):
            return self.scale

    scaler = Scaler()
    facts = {"role": "student", "step": 2, "epoch": 1}
    waiting = [{"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))},
               {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(3.0)}]
    scaler.scale = 2.0**15
    assert training.average_logs(waiting, facts, scaler)["grad_norm"] == 3.0
    scaler.scale = 2.0**-3
    with pytest.raises(UserError, match="overflow at every loss scale"):
        training.average_logs(waiting, facts, scaler)


def test_the_student_step_leaves_the_aligner_alone_and_the_aligner_step_the_student(
        tmp_path, monkeypatch):
    cell = cell_of(tmp_path, epochs=1)
    aligner = []
    student = []

    def fingerprint(model):
        return sum(p.double().sum().item() for p in model.parameters())

    def noting_lr_factor(step, steps):
        aligner.append(fingerprint(cell.aligner))
        student.append(fingerprint(cell.student))
        return lr_factor(step, steps)

    monkeypatch.setattr(training, "lr_factor", noting_lr_factor)
    run(cell)
    # three aligner steps
    assert len(set(student[:4])) == 1
    assert len(set(aligner[:4])) == 4
    # three student steps
    assert len(set(aligner[3:])) == 1
    assert len(set(student[3:])) == 3


def test_mixed_precision_on_the_cpu_stays_close_to_float32(tmp_path):
    losses_of = {}
    for amp in ("off", "bf16"):
        run(cell_of(tmp_path / amp, amp=amp, epochs=1))
        losses_of[amp] = [row["loss"] for row in lines_of(tmp_path / amp, "student")]
    assert losses_of["off"] != losses_of["bf16"]
    assert losses_of["off"] == pytest.approx(losses_of["bf16"], rel=0.02)


@pytest.mark.parametrize("term", ["task", "output", "manifold"])
def test_a_loss_that_is_not_finite_stops_the_run_naming_the_term_and_the_first_bad_step(
        tmp_path, monkeypatch, term):
    calls = []

    def spoiled(*args, **kwargs):
        total, parts = losses.student_loss(*args, **kwargs)
        calls.append(1)
        if len(calls) >= 5:
            parts = {**parts, term: parts[term] * float("nan")}
        return total, parts

    monkeypatch.setattr(training, "student_loss", spoiled)
    cell = cell_of(tmp_path)
    says = rf"the student's {term} is not finite at step 5 \(epoch 2\)"
    with pytest.raises(UserError, match=says):
        run(cell)
    assert steps_done(tmp_path / "last") == 6  # the first epoch's checkpoint stands


def regression(official, tmp_path):
    """The configuration of one tiny regression, and its data."""
    config = resolve(Config(task="stsb", data_dir=official, student="tiny", teacher="painter",
                            epochs=1, arms="armada", out=str(tmp_path / "x"), device="cpu"))
    return config, Data(config)


def test_a_regression_starts_all_four_heads_at_the_mean_label(official, tmp_path):
    """A relu that starts below zero has no gradient and stays there."""
    config, data = regression(official, tmp_path)
    cell = Cell(config, data, tmp_path)
    mean = np.mean([example.label for example in data.splits["train"]])
    heads = [cell.aligner.classifier, cell.aligner.aux_classifier,
             cell.student.heads["classifier"], cell.student.heads["aux_classifier"]]
    assert [head.bias.item() for head in heads] == pytest.approx([mean] * 4)
    assert data.labels.dtype == torch.float32


# ---- checkpoints ----
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run to compare with."""
    folder = tmp_path_factory.mktemp("whole")
    run(cell_of(folder, keep_best=True))
    return folder


def without_the_clock(rows):
    clocks = ("tokens_per_second", "seconds")
    return [{name: row[name] for name in row if name not in clocks} for row in rows]


@pytest.mark.parametrize("stop", [1, 4, 7, 10, 12])
def test_a_run_killed_at_any_step_and_resumed_ends_bit_identical(
        tmp_path, monkeypatch, whole, stop):
    """Killed in the aligner's pass or the student's, before or after the first checkpoint: same
    weights, same optimizer moments, same best epoch, same log but for the clock."""
    calls = []

    def dies(step, steps):
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("killed")
        return lr_factor(step, steps)

    monkeypatch.setattr(training, "lr_factor", dies)
    # However fast this machine is, there is a checkpoint after the first epoch.
    monkeypatch.setattr(Cell, "checkpoint_is_due", lambda cell: cell.done < cell.total_steps)
    with pytest.raises(RuntimeError, match="killed"):
        run(cell_of(tmp_path, keep_best=True))
    assert (tmp_path / "last").exists() == (stop > 6)
    monkeypatch.setattr(training, "lr_factor", lr_factor)
    run(cell_of(tmp_path, keep_best=True))
    for part in ("last", "best"):
        assert_identical(weights(tmp_path / part), weights(whole / part))
    assert outcome(tmp_path) == outcome(whole)
    assert without_the_clock(lines(tmp_path)) == without_the_clock(lines(whole))


def test_ctrl_c_saves_at_the_next_step_and_the_resumed_run_ends_bit_identical(
        tmp_path, monkeypatch, whole, capsys):
    calls = []

    def pressed(step, steps):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return lr_factor(step, steps)

    monkeypatch.setattr(training, "lr_factor", pressed)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main([*QUICK_FLAGS, "--arms=armada", "--seeds=0", f"--out={out}"])
    assert stop.value.code == 130
    error = capsys.readouterr().err
    assert f"python train.py --resume {out}" in error
    assert "Traceback" not in error
    assert steps_done(out / "armada/0/last") == 8
    main(["--resume", str(out)])
    assert_identical(weights(out / "armada/0/last"), weights(whole / "last"))
    assert outcome(out / "armada/0") == outcome(whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_other_stop_signals_save_too_and_say_how_to_go_on(tmp_path, monkeypatch, capsys, name):
    """A cluster's time limit, docker stop, a closed ssh: what they send is no reason to lose
    work."""
    number = getattr(signal, name)
    calls = []

    def signalled(step, steps):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # some send it twice; only a second Ctrl-C is impatience
        return lr_factor(step, steps)

    monkeypatch.setattr(training, "lr_factor", signalled)
    before = signal.getsignal(number)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main([*QUICK_FLAGS, "--arms=armada", "--seeds=0", f"--out={out}"])
    assert stop.value.code == 128 + number
    assert f"python train.py --resume {out}" in capsys.readouterr().err
    assert steps_done(out / "armada/0/last") == 4
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    def pressed_twice(step, steps):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    monkeypatch.setattr(training, "lr_factor", pressed_twice)
    with pytest.raises(KeyboardInterrupt):
        run(cell_of(tmp_path))
    assert not (tmp_path / "last").exists()


def test_a_signal_before_the_first_step_tells_how_to_go_on(tmp_path, monkeypatch, capsys):
    def signalled_while_reading(config):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "Data", signalled_while_reading)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main([*QUICK_FLAGS, "--arms=armada", "--seeds=0", f"--out={out}"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert f"--resume {out}" in capsys.readouterr().err


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training.interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.pressed
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform != "linux", reason="opens a terminal of its own")
def test_a_closed_terminal_loses_nothing(tmp_path):
    """After SIGHUP every write to the terminal is an error, of the progress bar's too."""
    import fcntl
    import pty
    import termios

    out = tmp_path / "run"
    flags = ["--arms=armada", "--seeds=0", "--epochs=400", "--eval-every=400", f"--out={out}"]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *flags])
    size = struct.pack("HHHH", 24, 100, 0, 0)  # rows, columns: in a terminal of none is no bar
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    log = out / "armada/0/log.jsonl"
    shown = b""
    deadline = time.time() + 60
    while time.time() < deadline:
        if b"armada seed 0" in shown and log.exists() and log.read_text():
            break  # the bar is there, by its name, and steps were taken
        # Read, else the child waits for room to write; but do not wait for what it does not write.
        if select.select([terminal], [], [], 0.05)[0]:
            shown += os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert steps_done(out / "armada/0/last") > 0


def test_a_signal_that_comes_after_the_question_of_saving_is_answered_at_the_next_step(
        tmp_path, monkeypatch):
    """Between that question and the end of the run lies an instant in which nothing was saved."""
    lap = Cell.lap

    def late_signal(cell, part):
        lap(cell, part)
        if part == "files" and cell.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Cell, "lap", late_signal)
    with pytest.raises(training.Stopped):
        run(cell_of(tmp_path))
    assert steps_done(tmp_path / "last") == 4


def test_a_process_killed_by_the_system_is_resumed_from_its_last_checkpoint(tmp_path, whole):
    """SIGKILL, which no handler sees, as soon as there is a checkpoint."""
    out = tmp_path / "run"
    flags = [f"--out={out}", "--arms=armada", "--seeds=0", *QUICK_FLAGS]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cell = out / "armada/0"
    deadline = time.time() + 60
    while not (cell / "last").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    main(["--resume", str(out)])
    assert_identical(weights(cell / "last"), weights(whole / "last"))
    assert outcome(cell) == outcome(whole)


def test_an_atomic_write_leaves_one_whole_folder_wherever_it_is_killed(tmp_path):
    folder = tmp_path / "last"

    def replace(content, error=None):
        with training.atomic_write(folder) as new:
            new.mkdir()
            (new / "a").write_text(content)
            if error:
                raise error

    replace("1")
    with pytest.raises(OSError):
        replace("half", OSError("disk full"))
    assert (folder / "a").read_text() == "1"
    # As a kill leaves it that comes while the old one is being deleted.
    folder.rename(tmp_path / "last.new")
    folder.mkdir()
    (folder / "half").write_text("deleted")
    training.finish_write(folder)
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("a", "1")]
    replace("2")
    assert (folder / "a").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after its first epoch, and the flags that go on with it."""
    out = tmp_path / "stopped"

    def stop_in_epoch_2(step, steps):
        if (out / "armada/0/last").exists():
            raise KeyboardInterrupt
        return lr_factor(step, steps)

    with monkeypatch.context() as patched:
        patched.setattr(training, "lr_factor", stop_in_epoch_2)
        with pytest.raises(KeyboardInterrupt):
            train(Config(**QUICK, arms="armada", seeds="0", out=str(out)))
    return out


def test_damage_to_any_file_of_a_checkpoint_is_one_line(stopped):
    """A flipped bit of the moments would only train another student; of a shape, end in a
    crash."""
    last = stopped / "armada/0/last"
    files = [path for path in last.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"model.safetensors", "optimizers.safetensors", "training.json", "checksum",
            "aligner.safetensors"} <= names
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = bytes([whole[middle] ^ 1])
        for damaged in (whole[:middle] + flipped + whole[middle + 1:], whole[:-1], b""):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="last is damaged: delete it"):
                train(Config(resume=str(stopped)))
        path.write_bytes(whole)
    (last / "config.json").unlink()
    with pytest.raises(UserError, match="last is damaged"):
        train(Config(resume=str(stopped)))


def test_one_run_has_one_writer(stopped, capsys):
    """Two would end with the weights of one and the moments of the other."""
    with FileLock(stopped / "lock"), pytest.raises(SystemExit) as stop:
        main(["--resume", str(stopped)])
    assert stop.value.code == 2
    assert f"{stopped} is being written by another process" in capsys.readouterr().err
    assert (stopped / "armada/0/last/training.json").exists()
    train(Config(resume=str(stopped)))  # the lock is free again


@pytest.mark.parametrize("change, says", [
    (lambda rows: rows[:5], "train had 40 rows, has 5 now"),
    (lambda rows: [rows[0]._replace(label=1 - rows[0].label), *rows[1:]],
     "train has other texts or labels now"),
    (lambda rows: [rows[0]._replace(fields={"text": "is it?"}), *rows[1:]],
     "train has other texts or labels now")])
def test_a_run_goes_on_with_the_data_it_began_with(stopped, monkeypatch, change, says):
    splits = load_task("objects")
    changed = {**splits, "train": change(splits["train"])}
    monkeypatch.setattr(training, "load_task", lambda *_: changed)
    with pytest.raises(UserError, match=says):
        train(Config(resume=str(stopped)))


def test_a_kill_between_the_last_deletions_leaves_a_finished_cell(tmp_path, monkeypatch):
    config = Config(**QUICK, arms="armada", seeds="0", out=str(tmp_path / "run"))
    unlink = Path.unlink
    deleted = []

    def dies_at_the_second(path, missing_ok=False):
        if len(deleted) == 1:
            raise RuntimeError("killed")
        deleted.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", dies_at_the_second)
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
    last = tmp_path / "run/armada/0/last"
    assert (last / "optimizers.safetensors").exists()
    monkeypatch.setattr(training, "run", fail_if_trained)
    assert train(Config(resume=config.out))["armada"][0]["dev"]
    assert not (last / "optimizers.safetensors").exists()


def test_a_student_that_is_not_finite_is_neither_saved_nor_judged(official, tmp_path, capsys):
    """The loss of the last step is finite; what that step makes of the weights is not."""
    with pytest.raises(SystemExit) as stop:
        main(["--task=stsb", "--data-dir", official, "--student=tiny", "--teacher=painter",
              "--epochs=1", "--lr=1e12", "--device=cpu", f"--out={tmp_path / 'run'}"])
    assert stop.value.code == 2
    assert "not finite" in capsys.readouterr().err
    cell = tmp_path / "run/armada/0"
    for name in ("last", "best", "metrics.json"):
        assert not (cell / name).exists()


def test_an_aligner_that_is_not_finite_is_neither_saved_nor_judged(tmp_path):
    cell = cell_of(tmp_path, epochs=1, limit=8, aligner_lr=1e12)
    with pytest.raises(UserError, match="not finite"):
        run(cell)
    assert not (tmp_path / "last").exists()


def test_a_finished_cell_is_read_and_not_trained_again(tmp_path, monkeypatch):
    config = Config(**QUICK, arms="armada", seeds="0", out=str(tmp_path / "run"))
    first = train(config)
    monkeypatch.setattr(training, "run", fail_if_trained)
    assert train(Config(resume=str(tmp_path / "run"))) == first


def test_one_cell_of_a_grid_can_be_resumed_alone(tmp_path):
    train(Config(**QUICK, arms="undistilled,armada", seeds="0", out=str(tmp_path / "run")))
    cell = tmp_path / "run/undistilled/0"
    (cell / "metrics.json").unlink()
    results = train(Config(resume=str(cell)))
    assert list(results) == ["undistilled"]
    assert (cell / "metrics.json").exists()


# ---- the command line ----
def test_every_field_of_the_configuration_is_a_flag_with_a_sentence_of_help():
    for field in dataclasses.fields(Config):
        sentence = field.metadata["help"]
        assert sentence[0].isupper(), field.name
        assert sentence.endswith("."), field.name
        assert len(sentence.split()) >= 4, field.name
    choices = Config.__dataclass_fields__["loss"].metadata["choices"]
    assert choices == losses.KINDS, "name the kind in train.py:Config.loss, too"


def test_help_and_errors_of_flags_come_before_torch_is_imported(tmp_path):
    """A torch that refuses to be imported stands in the way."""
    (tmp_path / "torch.py").write_text("raise ImportError('too early')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def call(*args):
        command = [sys.executable, str(ROOT / "train.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    answer = call("--help")
    assert answer.returncode == 0
    assert "--grad-checkpoint" in answer.stdout
    for args, says in ((["--bta", "1"], "did you mean --beta?"),
                       (["--task", "rtee"], "did you mean rte?"),
                       (["--micro-batch", "12", "--batch-size", "64"], "try 8")):
        answer = call(*args)
        assert answer.returncode == 2
        assert says in answer.stderr
        assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ["{", '{"tasks": "rte"}'])
def test_a_config_that_cannot_be_read_is_one_line(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["--resume", str(tmp_path)])
    assert stop.value.code == 2
    assert "not one of this version" in capsys.readouterr().err


def test_a_run_that_never_began_leaves_the_folder_free_and_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="reads at most"):
        train(Config(**QUICK, max_length=600, arms="undistilled", seeds="0", out=str(out)))
    train(Config(**QUICK, arms="undistilled", seeds="0", out=str(out)))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text((out / "config.json").read_text())  # then killed
    assert list(train(Config(resume=str(begun)))) == ["undistilled"]


def test_an_output_folder_that_holds_a_run_is_not_touched_and_a_resumed_run_keeps_its_flags(
        tmp_path, capsys):
    out = str(tmp_path / "run")
    first = [*QUICK_FLAGS, "--arms=undistilled", "--seeds=0", "--out", out]
    main(first)
    metrics = tmp_path / "run/undistilled/0/metrics.json"
    before = metrics.read_text()
    other_flags = ["--resume", out, "--lr=1", "--beta=20"]
    for again, says in ((first, f"go on with --resume {out}"),
                        (other_flags, "--lr is 0.004, not 1.0: leave it out")):
        with pytest.raises(SystemExit) as stop:
            main(again)
        assert stop.value.code == 2
        assert says in capsys.readouterr().err
    main(["--resume", out, "--beta=20"])  # the same value may be typed again
    assert metrics.read_text() == before


def test_from_official_files_to_predictions_and_back_through_eval(official, tmp_path, capsys):
    """The whole command line on small RTE files: train, table, eval.py from the saved folder,
    AutoModel, one's own texts."""
    out = tmp_path / "run"
    arms = ("undistilled", "armada", "shuffled")
    main(["--task=RTE", "--data-dir", official, "--student=tiny", "--teacher=painter", "--arms",
          ",".join(arms), "--seeds=0,1", "--epochs=1", "--batch-size=8", "--device=cpu",
          "--out", str(out)])
    trained = capsys.readouterr().out
    assert "mean ± standard deviation over seeds" in trained
    for arm, seed in itertools.product(arms, "01"):
        names = {path.name for path in (out / arm / seed).iterdir()}
        assert names == {"config.json", "log.jsonl", "last", "metrics.json",
                         "predictions_dev.jsonl", "predictions_test.jsonl"}

    # The score is that of the written predictions.
    cell = out / "armada/1"
    metrics = outcome(cell)
    assert metrics["test"] is None
    assert metrics["aligner"]
    assert outcome(out / "undistilled/1")["aligner"] is None
    written = cell / "predictions_dev.jsonl"
    examples = load_task("rte", official)["dev"]
    labels = [TASKS["rte"].labels[example.label] for example in examples]

    def predicted(path):
        return [prediction["label"] for prediction in read_lines(path)]

    def right(path):
        return [ours == label for ours, label in zip(predicted(path), labels)]

    predictions = predicted(written)
    assert metrics["dev"]["accuracy"] == pytest.approx(np.mean(right(written)))

    # eval.py makes the table and the predictions again.
    before = written.read_text()
    written.unlink()
    evaluation.main([str(out), "--rescore"])
    assert capsys.readouterr().out.strip() in trained
    assert written.read_text() == before

    # Two cells are compared example by example.
    evaluation.main([f"{out}/armada/0/", f"{out}/undistilled/0"])
    said = capsys.readouterr().out
    counts, p = evaluation.mcnemar(right(out / "armada/0/predictions_dev.jsonl"),
                                   right(out / "undistilled/0/predictions_dev.jsonl"))
    both, only_a, only_b, neither = counts
    assert f"both right {both}," in said
    assert f"both wrong {neither}; McNemar's exact p {p:.2g}" in said
    assert f"only run/armada/0 {only_a}, only run/undistilled/0 {only_b}," in said

    # The saved student answers one's own texts.
    student = load_student(cell / "last")
    assert student.predict([TASKS["rte"].pair(example) for example in examples]) == predictions


@pytest.mark.parametrize("family", ["opt", "llama", "deberta-v2"])
def test_the_documented_command_trains_a_folder_in_place_of_the_short_name(
        family, official, model_folder, tmp_path):
    """`--task rte --student opt-1.3b` with a tiny float16 folder for opt-1.3b:
    trained in float32, saved in float32."""
    dtype = torch.float32
    if family == "opt":
        dtype = torch.float16
    folder = model_folder(family, dtype)
    main(["--task=rte", "--data-dir", official, "--student", folder, "--teacher=painter",
          "--epochs=1", "--max-length=64", "--grad-checkpoint=on", "--orthogonal-student",
          "--device=cpu", "--out", str(tmp_path / "run")])
    last = tmp_path / "run/armada/0/last"
    assert {value.dtype for value in weights(last).values()} == {torch.float32}
    assert load_student(last).decoder == (family != "deberta-v2")


@pytest.mark.parametrize("name", ["cola", "stsb", "mnli", "cb"])
def test_other_kinds_of_task_run_through_the_same_loop(name, official, tmp_path):
    config = Config(task=name, data_dir=official, student="tiny", teacher="painter", epochs=1,
                    device="cpu", out=str(tmp_path / "run"))
    metrics = train(config)["armada"][0]
    assert set(metrics["dev"]) == set(TASKS[name].metrics)
    assert ("dev_mismatched" in metrics) == (name == "mnli")


def test_the_bare_command_is_the_demonstration_and_a_named_task_one_cell():
    bare = resolve(Config())
    assert bare.task == "objects"
    assert bare.student == "tiny"
    assert bare.teacher == "painter"
    assert bare.arms == ("undistilled", "armada", "shuffled")
    assert bare.seeds == tuple(range(7))
    named = resolve(Config(task="rte"))
    assert named.student == "bert-base"
    assert named.teacher == "clip"
    assert named.arms == ("armada",)
    assert named.seeds == (0,)
    assert named.lr == 2e-5
    assert named.epochs == 10
    assert named.beta == 1.0


# ---- found by mutation ----
def test_arms_of_one_seed_share_the_aligners_first_weights_and_two_seeds_do_not(tmp_path):
    first = cell_of(tmp_path / "armada").aligner.state_dict()
    for arm in ("shuffled", "noise", "random-aligner", "no-output"):
        assert_identical(first, cell_of(tmp_path / arm, arm).aligner.state_dict())
    other = cell_of(tmp_path / "other", seed=1).aligner.state_dict()
    for name in first:
        assert not torch.equal(first[name], other[name]), name


def test_two_seeds_share_neither_the_order_of_the_data_nor_the_dropout(tmp_path, monkeypatch):
    """Else the spread over seeds would be that of the initial weights alone, and too small."""
    orders = []
    drawn = []

    def note_seed(seed, device):
        drawn.append(seed)

    monkeypatch.setattr(training, "seed_all", note_seed)
    for seed in (0, 1):
        cell = cell_of(tmp_path / str(seed), "undistilled", seed=seed)
        orders.append([rows for *_, rows in schedule(cell)])
        training.seed_step(cell, 0, "student", 0, 0)
    assert orders[0] != orders[1]
    assert drawn[0] != drawn[1]


def test_shuffling_leaves_no_text_its_own_vector_whatever_the_seed(tmp_path):
    """Of plain permutations two in three would leave one."""
    cell = cell_of(tmp_path)
    own = looked_up(cell, "own", 0)
    for seed in range(10):
        assert (looked_up(cell, "shuffled", seed) != own).any(1).all()


def test_a_run_whose_flags_leave_nothing_of_the_teacher_is_a_control():
    """Soft labels go with alpha or with output_factor, projections with beta."""
    for flags in ({"beta": 0.0, "alpha": 0.0}, {"beta": 0.0, "output_factor": 0.0}):
        config = resolve(Config(**QUICK, arms=("armada",), **flags))
        assert not is_distilled(config)
        assert training.is_control(config)
        config = dataclasses.replace(config, beta=1.0)
        assert is_distilled(config)
        assert not training.is_control(config)


def test_in_the_students_step_the_aligner_keeps_nothing_for_a_backward_pass(tmp_path, monkeypatch):
    seen = []

    def noting_student_loss(out_s, out_t, *args, **kwargs):
        seen.extend(out_t)
        return losses.student_loss(out_s, out_t, *args, **kwargs)

    monkeypatch.setattr(training, "student_loss", noting_student_loss)
    training.update(cell_of(tmp_path), 0, "student", 0, [0, 1])
    assert len(seen) == 3
    assert not any(tensor.requires_grad for tensor in seen)


def test_a_weight_without_a_gradient_decays_by_a_hundredth_of_the_rate(tmp_path):
    """No text has a 512th token: weight decay alone moves its position."""
    cell = cell_of(tmp_path, "undistilled", epochs=1)
    position = cell.student.lm.embeddings.position_embeddings.weight[511]  # (d,)
    before = position.detach().clone()
    run(cell)
    factor = np.prod([1 - 0.01 * 4e-3 * lr_factor(step, 3) for step in range(3)])
    torch.testing.assert_close(position.detach(), before * factor, rtol=1e-6, atol=0)


def test_a_loss_scale_changes_no_update_and_grows_where_nothing_overflows(tmp_path):
    """fp16's scaler on a CPU: before a gradient is measured and clipped it is divided by the scale
    again."""
    norms = {}
    updated = {}
    for enabled in (False, True):
        folder = tmp_path / str(enabled)
        cell = cell_of(folder, "undistilled", epochs=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2,
                                      enabled=enabled)
        cell.scalers["student"] = scaler
        run(cell)
        norms[enabled] = [row["grad_norm"] for row in lines(folder) if "grad_norm" in row]
        updated[enabled] = [weight.detach() for weight in cell.student.parameters()]
    assert norms[True] == pytest.approx(norms[False], rel=1e-4)
    torch.testing.assert_close(updated[True], updated[False], atol=1e-4, rtol=1e-3)
    assert scaler.get_scale() == 2.0**11  # three steps


def test_of_two_equal_epochs_the_first_is_the_best(tmp_path):
    cell = cell_of(tmp_path, "undistilled")
    for epoch, score in enumerate((0.5, 0.7, 0.7, 0.6), 1):
        cell.keep_if_best(epoch, {"accuracy": score})
    assert cell.best == {"epoch": 2, "dev": {"accuracy": 0.7}}


def test_a_line_of_the_log_is_the_mean_over_the_steps_since_the_line_before(tmp_path, monkeypatch):
    update = training.update
    seen = {}

    def noting_update(cell, epoch, role, step, rows):
        values = update(cell, epoch, role, step, rows)
        seen.setdefault((epoch + 1, role), []).append((values, rows))
        return values

    monkeypatch.setattr(training, "update", noting_update)
    cell = cell_of(tmp_path)
    run(cell)
    written = [row for row in lines(tmp_path) if "role" in row]
    assert [row["step"] for row in written] == [3, 3, 6, 6]  # a line for each role and epoch
    for row in written:
        steps = seen[row["epoch"], row["role"]]
        assert len(steps) == 3
        assert row["steps"] == 3
        shown = list(itertools.chain.from_iterable(rows for _, rows in steps))
        assert row["tokens"] == sum(cell.data.lengths[i] for i in shown)
        for name in steps[0][0]:
            mean = np.mean([values[name].item() for values, _ in steps])
            assert row[name] == pytest.approx(mean)


def test_micro_batches_are_logged_as_the_mean_over_the_batch(tmp_path, monkeypatch):
    """Weighted by their share of it; with dropout off, whose draws differ by micro-batch."""
    switch_dropout_off(monkeypatch)
    logged = []
    for micro in (16, 8):
        cell = cell_of(tmp_path / str(micro), micro_batch=micro)
        logged.append(training.update(cell, 0, "student", 0, [*range(13)]))
    whole, parts = logged
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_the_mean_gradient_norm_is_over_the_students_steps_and_not_over_lines():
    rows = [{"role": "student", "grad_norm": 1.0, "steps": 50},
            {"role": "student", "grad_norm": 4.0, "steps": 25},
            {"role": "aligner", "grad_norm": 99.0, "steps": 75},
            {"epoch": 1, "dev": {}}]
    assert training.mean_gradient_norm(rows) == 2.0


def test_a_resumed_regression_keeps_the_biases_that_it_has_learnt(official, tmp_path):
    config, data = regression(official, tmp_path)
    cell = Cell(config, data, tmp_path)
    heads = [name for name, _ in cell.models.named_parameters()
             if name.endswith("classifier.bias")]
    for name in heads:
        torch.nn.init.constant_(cell.models.get_parameter(name), 1.25)
    cell.save("last")
    resumed = Cell(config, data, tmp_path)
    assert [resumed.models.get_parameter(name).item() for name in heads] == [1.25] * 4


def test_in_the_students_step_the_aligner_answers_without_dropout(tmp_path, monkeypatch):
    """Its own step, which comes first, has left it in training mode."""
    seen = []

    def noting_student_loss(out_s, out_t, *args, **kwargs):
        seen.append(out_t)
        return losses.student_loss(out_s, out_t, *args, **kwargs)

    monkeypatch.setattr(training, "student_loss", noting_student_loss)
    cell = cell_of(tmp_path)
    rows = [*range(8)]
    training.update(cell, 0, "aligner", 0, rows)
    training.update(cell, 0, "student", 0, rows)
    with torch.no_grad():
        expected = cell.aligner.eval()(cell.teacher_vectors(rows))
    torch.testing.assert_close(seen, [expected])


def test_the_dev_score_in_metrics_json_is_the_last_epochs_and_not_the_best_ones(
        tmp_path, monkeypatch):
    """The best one is chosen on dev, and its student is not the one that is kept."""
    evaluate = Cell.evaluate
    accuracies = iter((0.9, 0.4, 0.5))  # of two epochs on dev, then of test

    def falling(self, split):
        _, answers, p_s = evaluate(self, split)
        return {"accuracy": next(accuracies)}, answers, p_s

    monkeypatch.setattr(Cell, "evaluate", falling)
    run(cell_of(tmp_path, "undistilled"))
    written = outcome(tmp_path)
    assert written["dev"] == {"accuracy": 0.4}
    assert written["best"] == {"epoch": 1, "dev": {"accuracy": 0.9}}
