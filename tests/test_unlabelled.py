"""Texts without labels (--unlabelled): what they bring to the losses, and what is not read of them.

The losses themselves are in test_losses.py, two processes in test_parallel.py.
"""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import train as training
from align import Outputs
from data import NO_LABEL, TASKS, UserError, collate, encode, load_task, without_label
from student import AnswerOutputs, build_student, load_student
from tests.conftest import write_reasoning
from train import ARMS, Cell, Config, Data, resolve, train, update


@pytest.fixture(scope="module")
def kinds(official, causal_folder, tmp_path_factory):
    """Flags of a run with 6 labelled and 4 unlabelled rows, for each kind of task."""
    shared = {"limit": 6, "unlabelled": 4, "batch_size": 5, "epochs": 2, "eval_every": 2,
              "teacher": "painter", "seeds": "0", "device": "cpu", "student": "tiny", "lr": 1e-3}
    reasoning = write_reasoning(tmp_path_factory.mktemp("unlabelled"), [
        (f"what is {i} plus {i}?", f"the correct answer is answer{1 + i % 3}", f"answer{1 + i % 3}")
        for i in range(1, 13)])
    return {
        "classify": shared | {"task": "cb", "data_dir": official},
        "regress": shared | {"task": "stsb", "data_dir": official},
        "generate": shared | {"task": "reason/arc_e", "data_dir": reasoning, "lora": 2,
                              "student": causal_folder(), "max_length": 400, "max_new_tokens": 8},
    }


def cell_of(folder, arm="armada", **flags):
    """A cell as train() makes it, but without dropout."""
    config = resolve(Config(**{**flags, "arms": (arm,)}))
    config = dataclasses.replace(config, **ARMS[arm])
    Path(folder).mkdir(parents=True, exist_ok=True)
    cell = Cell(config, Data(config), Path(folder))
    for module in cell.models.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return cell


def gradient(cell, role, rows):
    """{parameter: clipped gradient} of one step of a role, which is not taken back."""
    cell.optimizers[role].zero_grad = lambda: None
    update(cell, 0, role, 0, rows)
    return {name: weight.grad for name, weight in cell.models[role].named_parameters()
            if weight.grad is not None}


# ---- what is read ----
def with_wrong_labels(task, examples):
    """The examples from the seventh on with a label, and for an answer a text, of their own."""
    wrong = []
    for example in examples[6:]:
        if task.kind == "classify":
            example = example._replace(label=(example.label + 1) % len(task.labels))
        elif task.kind == "regress":
            example = example._replace(label=5 - example.label)
        else:
            example = example._replace(label=("answer1",), output="answer1 it is, it is, it is")
        wrong.append(example)
    return examples[:6] + wrong


@pytest.mark.parametrize("kind", ["classify", "regress", "generate"])
def test_a_label_that_is_not_used_is_not_read_anywhere(kind, kinds, tmp_path, monkeypatch):
    """Wrong ones change no weight, no score and no hash of the data, but for the clock's numbers.

    That the same labels do change a run that reads them is shown beside it.
    """
    found = []
    flags = kinds[kind] | {"arms": "undistilled,armada"}
    for name in ("right", "wrong", "wrong and read"):
        if name == "wrong":
            def load_with_wrong_labels(*arguments, load=training.load_task):
                splits = load(*arguments)
                return {**splits, "train": with_wrong_labels(TASKS[flags["task"]], splits["train"])}

            monkeypatch.setattr(training, "load_task", load_with_wrong_labels)
        if name == "wrong and read":
            flags = flags | {"limit": 10, "unlabelled": 0}
        out = tmp_path / name
        train(Config(**flags, out=str(out)))
        files = {}
        for path in sorted(out.rglob("last/*.safetensors")):
            files[path.relative_to(out)] = path.read_bytes()
        assert len(files) >= 4
        for path in sorted(out.glob("*/*/metrics.json")):
            metrics = json.loads(path.read_text())
            del metrics["seconds"]
            files[path.relative_to(out)] = metrics
        files["data.json"] = (out / "data.json").read_text()
        found.append(files)
    right, wrong, read = found
    assert right == wrong
    assert right.keys() == read.keys()
    assert right != read


def test_the_vocabularies_are_those_of_the_rows_in_use(kinds, official):
    """tiny knows the words of unlabelled texts; V_a only the tokens of labelled answers."""
    texts = Data(resolve(Config(**kinds["classify"]))).training_texts()
    assert any("word9" in text for text in texts)
    assert not any("word10" in text for text in texts)

    data = Data(resolve(Config(**kinds["generate"])))
    labelled = Data(resolve(Config(**kinds["generate"] | {"unlabelled": 0})))
    assert data.vocabulary == labelled.vocabulary
    assert torch.equal(data.labels[:6], labelled.labels)
    assert data.labels.shape == (10, len(data.vocabulary))
    assert not data.labels[6:].any()


def test_labels_that_are_missing_are_told_from_all_that_a_file_may_hold(kinds):
    classes = Data(resolve(Config(**kinds["classify"]))).labels
    assert (classes[:6] >= 0).all()
    assert classes[6:].tolist() == [-100] * 4
    scores = Data(resolve(Config(**kinds["regress"]))).labels
    assert scores[:6].isfinite().all()
    assert scores[6:].isnan().all()


def test_a_regressions_biases_start_at_the_mean_of_the_labels_that_there_are(kinds, tmp_path):
    cell = cell_of(tmp_path, **kinds["regress"])
    mean = np.mean([example.label for example in cell.data.splits["train"][:6]])
    for name, weight in cell.models.named_parameters():
        if name.endswith("classifier.bias"):
            assert weight.item() == pytest.approx(mean)


def test_objects_trains_on_its_first_120_rows_by_default():
    """As it did before it had 480 more, for --unlabelled: the same questions, in the same order."""
    assert [example.idx for example in load_task("objects")["train"]] == [
        *range(120), *range(1220, 1700)]
    data = Data(resolve(Config(task="objects", arms="undistilled")))
    assert [example.idx for example in data.splits["train"]] == list(range(120))


# ---- what a step makes of them ----
@pytest.mark.parametrize("kind", ["classify", "regress", "generate"])
@pytest.mark.parametrize("role", ["aligner", "student"])
def test_micro_batches_with_and_without_labels_add_up_to_the_whole_batch(kind, role, kinds,
                                                                         tmp_path):
    """Of [2, 7 | 8, 9 | 1, 6] the second has no label at all; a mean over labels would be 0 / 0."""
    rows = [2, 7, 8, 9, 1, 6]
    flags = kinds[kind] | {"batch_size": 6}
    whole = gradient(cell_of(tmp_path / "1", **flags), role, rows)
    parts = gradient(cell_of(tmp_path / "2", **flags | {"micro_batch": 2}), role, rows)
    assert sum(g.abs().sum() for g in whole.values()) > 1e-3
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["classify", "regress", "generate"])
def test_without_a_teacher_an_unlabelled_text_moves_nothing(kind, kinds, tmp_path):
    cell = cell_of(tmp_path, "undistilled", **kinds[kind])
    assert all((g == 0).all() for g in gradient(cell, "student", [6, 7, 8, 9]).values())


@pytest.mark.parametrize("kind", ["classify", "regress", "generate"])
@pytest.mark.parametrize("flags", [{"alpha": 0.0}, {"beta": 0.0}])
def test_the_teacher_moves_the_student_on_unlabelled_texts_through_both_of_its_losses(
        kind, flags, kinds, tmp_path):
    cell = cell_of(tmp_path, **kinds[kind] | flags)
    assert sum(g.abs().sum() for g in gradient(cell, "student", [6, 7, 8, 9]).values()) > 1e-4


def test_a_text_without_an_answer_has_the_bag_of_its_next_token(causal_folder, kinds):
    """In one batch with answered texts and padding; the oracle is the prompt alone."""
    task = TASKS["reason/arc_e"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal_folder())
    examples = load_task("reason/arc_e", kinds["generate"]["data_dir"])["train"][:4]
    examples[1] = without_label(task, examples[1])  # the shortest of all
    longer = {**examples[3].fields, "instruction": "why? " * 30}
    examples[3] = without_label(task, examples[3]._replace(fields=longer))
    rows, _ = encode(task, examples, tokenizer, 400, True, 8)
    lengths = [len(row["input_ids"]) for row in rows]
    assert sorted(range(4), key=lengths.__getitem__)[::3] == [1, 3]
    torch.manual_seed(0)
    student = build_student(causal_folder(), 5, 16, vocabulary=range(10, 15)).eval()
    with torch.no_grad():
        out = student(**collate(rows, 0))
        answered = student(**collate([rows[0], rows[2]], 0))
        unlabelled = student(**collate([rows[3]], 0))
    assert type(out) is type(unlabelled) is AnswerOutputs
    for found, expected in zip(answered, out):
        torch.testing.assert_close(found, expected[[0, 2]], rtol=1e-4, atol=1e-5)
    for row in (1, 3):
        assert rows[row]["labels"] == [-100] * lengths[row]
        ids = torch.tensor([rows[row]["input_ids"]])  # (1, L)
        with torch.no_grad():
            alone = student(ids, torch.ones_like(ids))
            log_p = student.lm(input_ids=ids).logits[0, -1].log_softmax(-1)  # (V,)
        assert type(alone) is Outputs
        torch.testing.assert_close(out.logits[row], log_p[10:15], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.proj[row], alone.proj[0], rtol=1e-4, atol=1e-5)
    assert (out.answer_loss[[1, 3]] == 0).all()
    assert (out.answer_loss[[0, 2]] > 0).all()


# ---- the controls ----
def test_controls_shuffle_and_draw_for_unlabelled_texts_too(kinds, tmp_path):
    cell = cell_of(tmp_path, **kinds["classify"])
    found = {}
    for pairing in ("own", "shuffled", "noise"):
        config = dataclasses.replace(cell.config, pairing=pairing)
        found[pairing] = cell.data.lookup(config, 0)(list(range(10)))
    assert sorted(found["shuffled"].tolist()) == sorted(found["own"].tolist())
    for pairing in ("shuffled", "noise"):
        assert (found[pairing] != found["own"]).any(1).all()


def test_a_costly_teacher_is_asked_for_unlabelled_texts_too(kinds, tmp_path, monkeypatch):
    """And for no text behind them, of which a row of a folder may well be there."""
    asked = []
    monkeypatch.setattr(training, "open_vectors", lambda *arguments: asked.append(arguments)
                        or ({"train": None, "dev": None}, 0))
    Data(resolve(Config(**kinds["classify"])))
    _, _, examples, _, limit, _, _ = asked[0]
    assert len(examples["train"]) == 12
    assert limit == 10


def test_self_training_asks_the_seeds_undistilled_student(kinds, tmp_path):
    """Oracle: the saved student, one text at a time."""
    for kind in ("classify", "regress"):
        flags = kinds[kind] | {"seeds": "3"}
        out = tmp_path / kind
        metrics = train(Config(**flags, arms="undistilled,self-training", out=str(out)))
        assert metrics["self-training"][3]["control"]
        cell = cell_of(out / "self-training/3/again", **flags)
        cell.config = dataclasses.replace(cell.config, **ARMS["self-training"])
        cell.folder = out / "self-training" / "3"
        labels = cell.ask_twin()
        twin = load_student(out / "undistilled/3/last").eval()
        for row, label in enumerate(labels):
            batch = collate([cell.data.encoded["train"][row]], 0)
            with torch.no_grad():
                logits = twin(**batch).logits[0]
            true_label = cell.data.labels[row]
            if row >= 6:
                expected = logits.softmax(-1) if kind == "classify" else logits[0].clamp(0, 5)
            elif kind == "classify":
                expected = torch.eye(3)[true_label]
            else:
                expected = true_label
            torch.testing.assert_close(label, expected, rtol=1e-4, atol=1e-5)


def test_a_stopped_self_training_goes_on_to_the_same_student(kinds, tmp_path, monkeypatch):
    """Also where its cell alone is resumed, whose config names no other arm."""
    flags = kinds["classify"] | {"arms": "undistilled,self-training", "eval_every": 1}
    train(Config(**flags, out=str(tmp_path / "whole")))
    out = str(tmp_path / "cut")
    original = update

    def stop(cell, epoch, *rest):
        if epoch == 1 and cell.config.self_training:
            raise KeyboardInterrupt
        return original(cell, epoch, *rest)

    monkeypatch.setattr(training, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        train(Config(**flags, out=out))
    monkeypatch.setattr(training, "update", original)
    train(Config(resume=f"{out}/self-training/0"))
    last = "self-training/0/last/model.safetensors"
    assert (tmp_path / "cut" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


# ---- what a user may get wrong ----
@pytest.mark.parametrize("flags, says", [
    ({"task": "cb", "unlabelled": 4, "limit": None}, "give --limit"),
    ({"task": "cb", "unlabelled": -1}, "--unlabelled -1 must be a number at least 0"),
    ({"task": "cb", "arms": "self-training,undistilled"}, "name undistilled before it"),
    ({"task": "cb", "arms": "undistilled", "self_training": True}, "name undistilled before it"),
    ({"task": "reason/arc_e", "student": "opt-125m", "arms": "undistilled,self-training"},
     "classes or scores"),
])
def test_what_cannot_be_is_refused_before_anything_is_loaded(flags, says):
    with pytest.raises(UserError, match=says):
        resolve(Config(**{"limit": 6, "unlabelled": 4, **flags}))


def test_fewer_rows_than_the_flags_count_on_are_told_before_a_vector_is_made(kinds, monkeypatch):
    """Else a table would speak of unlabelled texts that were not there. --limit alone says "at
    most"."""
    monkeypatch.setattr(training, "open_vectors", None)
    config = resolve(Config(**kinds["classify"] | {"unlabelled": 7}))
    with pytest.raises(UserError, match="cb has 12 training examples, --limit 6 and --unlabelled 7 "
                                        "want 13: lower one of them"):
        Data(config)
    config = resolve(Config(**kinds["classify"] | {"unlabelled": 0, "limit": 99,
                                                   "arms": "undistilled"}))
    assert len(Data(config).labels) == 12


def test_a_missing_label_is_no_label_of_any_task():
    for task in TASKS.values():
        missing = NO_LABEL[task.kind]
        if task.kind == "classify":
            assert missing not in range(len(task.labels))
        elif task.kind == "regress":
            assert math.isnan(missing)
        else:
            assert missing == ()
