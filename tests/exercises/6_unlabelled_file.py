"""Exercise 6: texts without a label, from a file.

    python -m pytest tests/exercises/6_unlabelled_file.py

QUESTION. A black-box teacher draws a picture of any text, labelled or not. `--limit 120
--unlabelled 480` therefore trains on 480 more texts whose labels nobody reads; but they are rows of
the task's own file, which has a label for each. Real unlabelled text lies in a file of sentences.
Let the program read it:

    python train.py --task objects --epochs 10 --unlabelled 480 --unlabelled-file questions.txt

WHERE TO LOOK. data.py: NO_LABEL, without_label, read_examples (how a damaged file is told).
train.py: Config, resolve, splits_in_use, and who calls load_task: Data and examples_at_hand (for
--plan). A text that joins the training split early enough gets its tokens, its words in tiny's
vocabulary, its picture and its -100 from what is there already: look for the one right place.

WHAT TO CHANGE.
1. data.py: read_texts(task, path) -> [Example], one for each line that is not blank: the text as it
   stands (no line end, no byte-order mark), NO_LABEL for a label, "PATH:LINE" for where. A file
   that is missing, no file, not UTF-8 or without a text is a UserError of one line that names its
   path. So is a task that reads more than one field, since nobody could tell where to cut a line.
2. train.py: the flag, Config.unlabelled_file. With it --unlabelled N takes the first N texts of the
   file, in place of the task's own rows behind --limit. Without --unlabelled it is a UserError,
   told before anything is loaded.
3. train.py: where the two calls of load_task are, let the texts join.

THEN, these must be green:  python -m pytest tests/test_unlabelled.py
                            python -m pytest tests/test_train.py -k flag_with

AND RUN IT. This writes a file of the very questions that --unlabelled 480 reads; with it the
command above, half a minute, must end as the same command without the file does:

    python -c "import data; print(*[row.fields['text'] for row in
        data.load_task('objects')['train'][120:]], sep=chr(10))" > questions.txt

Then write a file of sentences about which the painter knows nothing, as many of them: do they help,
do they harm, or neither? And why must the teacher be asked about a text, not about a row number?
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
from data import NO_LABEL, TASKS, UserError, load_task
from teacher import build_teacher
from train import ARMS, Config, Data, plan, resolve, train

TEXTS = ["is a whale bigger than a mug?", "would a pea be larger than a zeppelin?",
         "  does a bus take up more room than a bee?", "the committee adjourned"]


@pytest.fixture
def file(tmp_path):
    """A file of four texts, with a byte-order mark, blank lines and no line end at its end."""
    path = tmp_path / "questions.txt"
    lines = [TEXTS[0], "", TEXTS[1], TEXTS[2], "   ", TEXTS[3]]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


def read_texts(task, path):
    """The student's own reader; a check that needs it fails with what is missing."""
    reader = getattr(data, "read_texts", None)
    assert reader, "data.py: there is no function read_texts(task, path) yet"
    return reader(TASKS[task], path)


def config_of(file, unlabelled=3, **flags):
    """A resolved Config of a run on ten questions and some texts of the file."""
    is_there = "unlabelled_file" in Config.__dataclass_fields__
    assert is_there, "train.py: Config has no field unlabelled_file yet"
    flags = {"task": "objects", "limit": 10, "epochs": 1, "eval_limit": 20, **flags}
    return resolve(Config(**flags, unlabelled=unlabelled, unlabelled_file=str(file)))


def told(function, *arguments, **flags):
    """The one line of the UserError that a call ends with."""
    try:
        function(*arguments, **flags)
    except UserError as error:
        assert "\n" not in str(error), "a UserError is one line"
        return str(error)
    return ""


def test_every_line_with_a_text_becomes_an_example_without_a_label(file):
    examples = read_texts("objects", file)
    found = [example.fields for example in examples]
    assert found == [{"text": text} for text in TEXTS], f"data.py, read_texts(): found {found}"
    labels = {example.label for example in examples}
    assert labels == {NO_LABEL["classify"]}, f"data.py, read_texts(): the labels are {labels}"
    places = [example.where for example in examples]
    expected = [f"{file}:{line}" for line in (1, 3, 4, 6)]
    assert places == expected, f"data.py, read_texts(): `where` is {places}"


@pytest.mark.parametrize("fault", ["missing", "a folder", "blank", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(fault, tmp_path):
    path = tmp_path / "texts.txt"
    if fault == "a folder":
        path.mkdir()
    elif fault == "blank":
        path.write_text("\n  \n")
    elif fault == "not UTF-8":
        path.write_bytes(b"\xff\xfe\xfa")
    line = told(read_texts, "objects", path)
    assert str(path) in line, (
        f"data.py, read_texts(): of a file that is {fault} should be said in a UserError which; "
        f"it says {line!r}")


def test_a_task_of_several_fields_cannot_be_read_from_lines(file):
    line = told(read_texts, "rte", file)
    assert "premise" in line and "hypothesis" in line, (
        f"data.py, read_texts(): RTE reads a premise and a hypothesis; it says {line!r}")


def test_the_files_texts_join_behind_the_labelled_rows(file):
    splits = Data(config_of(file)).splits
    found = [example.fields["text"] for example in splits["train"]]
    own = [example.fields["text"] for example in load_task("objects")["train"][:10]]
    assert found == own + TEXTS[:3], f"train.py, Data: behind ten rows stand {found[10:]}"
    assert len(splits["dev"]) == 20, "train.py, Data: dev should be as it was"


def test_they_have_no_label_and_their_words_are_known(file):
    made = Data(config_of(file))
    assert made.labels[10:].tolist() == [-100] * 3, "train.py, Data: a label was read or invented"
    assert (made.labels[:10] >= 0).all(), "train.py, Data: a labelled row has lost its label"
    assert any("zeppelin" in text for text in made.training_texts()), (
        "train.py, Data: tiny's vocabulary lacks the file's words")


def test_each_has_the_picture_of_its_own_text(file):
    """Not of the task's row at the same place, which the file's texts have replaced."""
    read = Data(config_of(file)).vectors["painter"]["train"]
    expected = build_teacher("painter").encode(TEXTS[:3])  # (3, d_e)
    found = read([10, 11, 12])                             # (3, d_e), all divided by one number
    expected = expected / np.linalg.norm(expected)
    found = found / np.linalg.norm(found)
    assert np.allclose(found, expected, atol=1e-5), (
        "train.py, Data: the vectors of the file's rows are not those of its texts")


def test_flags_that_do_not_fit_are_refused(file):
    line = told(config_of, file, unlabelled=0)
    assert "--unlabelled" in line, (
        f"train.py, resolve(): --unlabelled-file without --unlabelled says {line!r}")
    line = told(Data, config_of(file, unlabelled=5))
    assert "5" in line, f"train.py, Data: five texts of a file of four: it says {line!r}"


def test_a_run_trains_on_them_and_says_how_many(file, tmp_path):
    config = config_of(file, arms=("armada",), seeds=(0,), out=str(tmp_path / "run"))
    metrics = train(config)["armada"][0]
    counts = (metrics["labelled"], metrics["unlabelled"])
    assert counts == (10, 3), f"train.py: metrics.json counts {counts}, not 10 and 3"


def test_plan_counts_them_too(file):
    """32 rows a step: ten rows and 23 texts are two steps, ten alone would be one."""
    many = Path(f"{file}-more")
    many.write_text("\n".join(TEXTS * 6), encoding="utf-8")
    config = config_of(many, unlabelled=23)
    text = plan(config, [replace(config, **ARMS["armada"])])
    assert "steps: 2 of the student" in text, f"train.py, examples_at_hand(): --plan says\n{text}"
