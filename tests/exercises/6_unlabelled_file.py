"""Exercise 6: texts without a label, from a file.

    python -m pytest tests/exercises/6_unlabelled_file.py

QUESTION. A black-box teacher draws a picture of any text, labelled or not. `--limit 120
--unlabelled 480` therefore trains on 480 more texts whose labels nobody reads; but they are rows of
the task's own file, which has a label for each. Real unlabelled text lies in a file of sentences.
Let the program read it:

    python train.py --task objects --epochs 10 --unlabelled 480 --unlabelled-file /tmp/questions.txt

WHERE TO LOOK. README, "Unlabelled text". data.py: NO_LABEL, without_label, read_examples (how a
damaged file is told). train.py: Config, resolve, splits_in_use, and who calls load_task: Data and
examples_at_hand (for --plan, as is planned_rows). A text that joins the training split before
anyone looks at it gets tokens, a place in tiny's vocabulary, a picture and its -100 from what is
there already: look for the one right place.

WHAT TO CHANGE.
1. data.py: read_texts(task, path) -> [Example], one for each line that is not blank: the text as it
   stands (without LF or CRLF at its end or a byte-order mark; a CR inside stays), NO_LABEL for a
   label, any idx, "PATH:LINE" for where. A file that is missing, no file, not UTF-8 or without a
   text is a UserError that names its path. So is a task of more than one field, since nobody could
   tell where to cut a line (cola, sst2, objects and say/objects have one).
2. train.py: the flag, Config.unlabelled_file. With it --unlabelled N takes the first N texts of the
   file, in place of the task's own rows behind --limit, which still says how many keep their label.
   resolve refuses, before anything is loaded: what read_texts refuses; fewer than N texts (say how
   many the file has); the flag without --unlabelled; and --teacher vectors:, which goes by row and
   would give a text another text's vector. A --limit beyond the task's own rows is refused later.
3. train.py: let the texts join, in a run and in --plan, also where --plan has not the task's data.

THEN, these must be green:  python -m pytest tests/test_unlabelled.py
                            python -m pytest tests/test_train.py -k flag_with

AND RUN IT. This writes a file of the very questions that --unlabelled 480 reads; with it the
command above must end as the same command without the file does, at 93.2 or nearby:

    python -c "import data; print(*[row.fields['text'] for row in
        data.load_task('objects')['train'][120:]], sep=chr(10))" > /tmp/questions.txt

Then write 480 sentences of which the painter knows nothing (itertools.product of lists of words;
set(words) & set(data.OBJECTS) must be empty). Do they help, do they harm, or neither? Compare

    python train.py --task objects --seeds 0,1,2 --arms undistilled,armada FLAGS

with FLAGS --epochs 10 --unlabelled 480 --unlabelled-file FILE, with --epochs 10 alone, and with
--epochs 48 alone: the 120 rows for as many steps. All vectors are divided by the root mean square
of the training vectors: what does the file do to those of labelled rows? And which line of the
manifest.jsonl of --teacher images: would still give a text another text's picture?
"""
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
from data import NO_LABEL, TASKS, UserError, load_task
from teacher import build_teacher
from train import ARMS, Config, Data, plan, resolve, train

TEXTS = ["is a whale bigger than a mug?", "would a pea be larger than a zeppelin?  ",
         "  does a bus take up\rmore room\u2028than a bee?", "the committee adjourned"]


@pytest.fixture
def file(tmp_path):
    """A file of four texts with a byte-order mark, blank lines, line ends of two kinds and none."""
    path = tmp_path / "questions.txt"
    text = f"{TEXTS[0]}\r\n\r\n{TEXTS[1]}\n{TEXTS[2]}\r\n   \n{TEXTS[3]}"
    path.write_bytes(text.encode("utf-8-sig"))
    return path


@pytest.fixture
def many(file):
    """A file of 160 texts."""
    path = Path(f"{file}-more")
    path.write_bytes("\n".join(TEXTS * 40).encode())
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
    """The line of the UserError that a call ends with, or ""; another error fails the check."""
    try:
        function(*arguments, **flags)
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        pytest.fail(f"data.py or train.py: this should be a UserError, in words: {error!r}")
    return ""


def plan_of(config):
    """What --plan prints, or the line that it ends with."""
    try:
        return plan(config, [replace(config, **ARMS["armada"])])
    except UserError as error:
        return str(error)


def test_every_line_with_a_text_becomes_an_example_without_a_label(file):
    examples = read_texts("objects", file)
    found = [example.fields for example in examples]
    assert found == [{"text": text} for text in TEXTS], (
        "data.py, read_texts(): a text should stay as it stands (blanks, a CR and U+2028 inside) "
        f"but for the LF or CRLF at its end; found {found}")
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
        f"data.py, read_texts() of a file that is {fault} should raise a UserError that names its "
        f"path; it says {line!r}")
    line = told(config_of, path)
    assert str(path) in line, (
        f"train.py, resolve() should refuse a file that is {fault}, also for --plan; it says "
        f"{line!r}")


def test_a_task_of_several_fields_cannot_be_read_from_lines(file):
    line = told(read_texts, "rte", file)
    assert "premise" in line and "hypothesis" in line, (
        f"data.py, read_texts(): RTE reads a premise and a hypothesis; it says {line!r}")
    line = told(config_of, file, task="rte")
    assert "premise" in line, (
        f"train.py, resolve(): RTE should be refused before it is fetched; it says {line!r}")


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
        "train.py, Data: the vectors of the file's rows are not those of its texts: is "
        "open_teachers handed the joined examples, or the task's own?")


def test_flags_that_do_not_fit_are_refused(file):
    line = told(config_of, file, unlabelled=0)
    assert "--unlabelled " in line, (
        f"train.py, resolve(): --unlabelled-file without --unlabelled says {line!r}")
    assert told(config_of, ""), "train.py, resolve(): --unlabelled-file \"\" passes unnoticed"
    line = told(config_of, "", unlabelled=0)
    assert "--unlabelled " in line, (
        f"train.py, resolve(): --unlabelled-file \"\" without --unlabelled says {line!r}")


def test_fewer_texts_than_asked_for_are_refused(file):
    line = told(config_of, file, unlabelled=5)
    assert str(file) in line and re.search(r"\b4\b", line.replace(str(file), "")), (
        "train.py, resolve(): five texts of a file of four should be a UserError that names the "
        f"file and says how many it has; it says {line!r}")


def test_a_teacher_that_goes_by_row_is_refused(file):
    """600 rows of vectors would fit 120 rows and 480 texts, and each text get another's vector."""
    line = told(config_of, file, teacher="vectors:folder")
    assert "vectors:" in line, (
        f"train.py, resolve(): --teacher vectors: with --unlabelled-file says {line!r}")


def test_texts_do_not_stand_in_for_labelled_rows(many):
    """The task has 600 rows of its own, which the file's texts must not bring to --limit 700."""
    line = told(Data, config_of(many, limit=700))
    assert "--limit 700" in line, (
        "train.py: --limit 700 of a task with 600 rows takes texts of the file for labelled rows, "
        f"or says {line!r}")


def test_a_run_trains_on_them_and_says_how_many(file, tmp_path):
    config = config_of(file, limit=600, arms=("armada",), seeds=(0,), out=str(tmp_path / "run"))
    line = told(train, config)
    assert not line, f"train.py: a run on all 600 rows and 3 texts ends with {line!r}"
    metrics = data.read_json(tmp_path / "run" / "armada" / "0" / "metrics.json")
    counts = (metrics["labelled"], metrics["unlabelled"])
    assert counts == (600, 3), f"train.py: metrics.json counts {counts}, not 600 and 3"


def test_plan_counts_them_too(many):
    """32 rows a step: 600 rows and 40 texts are 20 steps, the task's own rows alone would be 19."""
    text = plan_of(config_of(many, limit=600, unlabelled=40))
    assert "steps: 20 of the student" in text, (
        f"train.py, examples_at_hand(): 600 rows and 40 texts are 20 steps; --plan says {text}")


def test_plan_counts_them_where_the_tasks_data_is_not_at_hand(many, tmp_path):
    config = config_of(many, task="cola", student="tiny", limit=8551, unlabelled=40,
                       cache_dir=str(tmp_path / "empty"))
    text = plan_of(config)
    assert "8,591 examples" in text, (
        f"train.py, planned_rows(): 8,551 rows and 40 texts are 8,591 examples; --plan says {text}")
