"""Tasks, official files, shortening, batches. Read beside data.py."""
import io
import json
import os
import random
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import data
from data import (
    KEEP, OBJECTS, TASKS, Example, UserError, collate, encode, find_task, length_grouped_batches,
    load_task)
from student import _tiny
from tests.conftest import SUPERGLUE, respond, write_official

UNDERSTANDING = [
    name for name, task in TASKS.items() if name != "objects" and task.kind != "generate"]

# Written by hand, not read from the registry: what each task's files hold and the student must see.
TEXT_COLUMNS = {
    "cola": {"sentence"},
    "sst2": {"sentence"},
    "mrpc": {"sentence1", "sentence2"},
    "stsb": {"sentence1", "sentence2"},
    "qqp": {"question1", "question2"},
    "mnli": {"sentence1", "sentence2"},
    "qnli": {"question", "sentence"},
    "rte": {"premise", "hypothesis"},
    "wnli": {"sentence1", "sentence2"},
    "boolq": {"question", "passage"},
    "cb": {"premise", "hypothesis"},
    "copa": {"premise", "question", "choice1", "choice2"},
    "wic": {"word", "sentence1", "sentence2"},
    "wsc": {"text", "span1_text", "span2_text"},
}


# ---- official files ----


@pytest.mark.parametrize("name", UNDERSTANDING)
def test_every_field_reaches_student_and_teacher_and_the_label_reaches_neither(name, official):
    """A lost column makes a task unsolvable in silence (see the DEVIATION at TASKS)."""
    if name not in TEXT_COLUMNS:
        pytest.fail(f"new task {name!r}: add a line to TEXT_COLUMNS in tests/test_data.py with the "
                    "columns of its files that the student must see")
    task = TASKS[name]
    spelled_labels = [label for label in task.labels if not label.isdigit()]
    for example in load_task(name, official)["train"]:
        pair = " ".join(filter(None, task.pair(example)))
        prompt = task.prompt(example)
        assert set(example.fields) == TEXT_COLUMNS[name]
        for text in example.fields.values():
            assert text in pair
            assert text in prompt
        if name not in ("copa", "wsc"):  # whose made-up texts are written differently
            for field in task.fields:
                assert f"{field}word" in prompt
        for label in spelled_labels:
            assert label not in prompt.lower().split()


@pytest.mark.parametrize("name", UNDERSTANDING)
def test_labels_are_numbered_as_the_registry_lists_them_and_test_rows_have_none(name, official):
    """Two labels swapped would cost nothing in training, and every point of a submission."""
    task = TASKS[name]
    splits = load_task(name.upper(), official)  # names are case-insensitive
    assert [len(splits[split]) for split in ("train", "dev", "test")] == [12, 6, 3]
    assert [example.label for example in splits["test"]] == [None] * 3
    if task.labels:
        expected = [i % len(task.labels) for i in range(12)]
    else:
        expected = [pytest.approx(i % 6 * 0.9) for i in range(12)]
    assert [example.label for example in splits["train"]] == expected
    assert [example.idx for example in splits["train"]] == list(range(12))


def test_mnli_has_two_dev_sets(official):
    splits = load_task("mnli", official)
    assert len(splits["dev"]) == 6
    assert len(splits["dev_mismatched"]) == 4


def test_mrpc_is_read_past_its_byte_order_mark_and_quotes_are_part_of_the_text(tmp_path):
    """A csv reader would take the quote for the start of a field and swallow the next lines."""
    root = write_official(TASKS["mrpc"], tmp_path)
    path = tmp_path / "MRPC" / "train.tsv"
    text = path.read_text(encoding="utf-8")
    text = text.replace("sentence1word0 stands", ' " sentence1word0 stands')
    path.write_text(text, encoding="utf-8")
    train = load_task("mrpc", root)["train"]
    assert train[0].fields["sentence1"] == ' " sentence1word0 stands here .'  # the blank as well
    assert len(train) == 12


def test_rte_prefers_the_jsonl_form_and_reads_the_tsv_form_where_it_is_alone(tmp_path):
    write_official(TASKS["rte"], tmp_path)
    tsv = "index\tsentence1\tsentence2\tlabel\n0\tthe premise\tthe hypothesis\tnot_entailment\n"
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "RTE" / name).write_text(tsv)
    assert len(load_task("rte", tmp_path)["train"]) == 12
    (tmp_path / "RTE" / "train.jsonl").unlink()
    example = load_task("rte", tmp_path)["train"][0]
    assert example.fields == {"premise": "the premise", "hypothesis": "the hypothesis"}
    assert example.label == 1


def test_wsc_marks_both_spans_in_place_and_asks_with_the_span_texts(tmp_path):
    """Indices count words between white space; a span of two words may have a line break inside."""
    (tmp_path / "WSC").mkdir()
    row = {
        "text": "Then  the\ntall man, said Ann's aunt, lost his hat. ",
        "label": True,
        "idx": 7,
        "target": {
            "span1_text": "tall man", "span1_index": 2, "span2_text": "his", "span2_index": 8},
    }
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / "WSC" / name).write_text(json.dumps(row) + "\n")
    example = load_task("wsc", tmp_path)["train"][0]
    text_a, text_b = TASKS["wsc"].pair(example)
    assert text_a == "Then  the\n[tall man,] said Ann's aunt, lost *his* hat. "
    assert text_b == "his refers to tall man"
    assert (example.label, example.idx) == (1, 7)


def test_copa_tells_cause_from_effect_and_offers_both_choices(official):
    """The question is one word in the file; without it both choices may be right."""
    first, second = load_task("copa", official)["train"][:2]
    text_a, text_b = TASKS["copa"].pair(first)
    assert "What was the cause?" in text_a
    assert "choice1word0" in text_b
    assert "choice2word0" in text_b
    assert "What was the effect?" in TASKS["copa"].pair(second)[0]


def test_a_task_may_have_more_classes_than_a_score_has_points(tmp_path):
    """Only a score ends at 5: class ids go as far as the labels do."""
    labels = tuple("abcdefgh")
    task = data.Task("many", "Many", "{sentence}", None, labels)
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"a text\t{label}\n" for label in labels))
    examples = data.read_examples(task, path, "train")
    assert [example.label for example in examples] == list(range(8))


def edit(old, new):
    """Return a function that replaces the first `old` of a text."""
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize("name, change, says", [
    ("rte", lambda text: "", "has no rows"),
    ("rte", lambda text: text[:-20], r"train.jsonl:12 is not JSON"),
    ("rte", edit('"premise"', '"prem"'), r"train.jsonl:1 has no text 'premise'"),
    ("rte", edit('"entailment"', '"perhaps"'),
     r"train.jsonl:1 has the label 'perhaps' in column label: "
     "expected one of entailment, not_entailment"),
    ("rte", lambda text: "[]\n" + text, "train.jsonl:1 is not a JSON object"),
    ("sst2", edit("\t1\n", "\n"), r"train.tsv:3 has 1 columns, not 2: sentence, label"),
    ("cola", edit("\t1\t", "\t7\t"),
     r"train.tsv:2 has the label '7' in column label: expected one of 0, 1"),
    ("stsb", edit("0.900", "5.9"),
     r"train.tsv:3 has the label '5.9' in column score: expected a number from 0 to 5"),
    ("stsb", edit("0.900", "high"), r"train.tsv:3 has the label 'high'"),
    ("wsc", edit('"span2_index": 4', '"span2_index": 99'),
     r"train.jsonl:1 has no text with two spans"),
])
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, change, says):
    root = write_official(TASKS[name], tmp_path)
    file_name = "train.tsv"
    if name in SUPERGLUE:
        file_name = "train.jsonl"
    path = tmp_path / TASKS[name].folder / file_name
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=says):
        load_task(name, root)


def test_a_file_that_is_missing_or_not_utf8_and_a_task_that_is_unknown_are_named(tmp_path):
    with pytest.raises(UserError, match="RTE/train.tsv is missing: give --data-dir"):
        load_task("rte", tmp_path)
    write_official(TASKS["rte"], tmp_path)
    (tmp_path / "RTE" / "val.jsonl").write_bytes("{\"premise\": \"caf\xe9\"}".encode("latin-1"))
    with pytest.raises(UserError, match="val.jsonl is not UTF-8"):
        load_task("rte", tmp_path)
    with pytest.raises(UserError, match="unknown task 'rtee': did you mean rte?"):
        find_task("rtee")


# ---- messages ----


@pytest.mark.parametrize("rank, waits", [(None, []), ("0", []), ("1", [5])])
def test_a_last_line_is_told_once_by_several_processes(rank, waits, monkeypatch, capsys):
    """Torchrun ends the others once rank 0 has ended, so whoever waits is not heard."""
    slept = []
    monkeypatch.setattr(data.time, "sleep", slept.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        data.exit_with_message(3, "train.py: error: no")
    assert stop.value.code == 3
    assert capsys.readouterr().err == "train.py: error: no\n"
    assert slept == waits


# ---- fetching them: from a server on this machine that breaks, stalls, truncates and lies ----


@pytest.fixture
def packed(tmp_path):
    """The bytes of a small RTE.zip, as the official archive is laid out."""
    root = write_official(TASKS["rte"], tmp_path / "made")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted((tmp_path / "made").rglob("*.jsonl")):
            archive.write(path, path.relative_to(root))
    return file.getvalue()


@pytest.fixture
def mirror(loopback, monkeypatch):
    """mirror(answer): all of ARCHIVES now leads to that server; nobody waits between tries."""
    def set_up(answer):
        monkeypatch.setenv("ARMADA_MIRROR", loopback(answer))

    set_up.waits = []
    monkeypatch.setattr(data.time, "sleep", set_up.waits.append)
    return set_up


def test_an_archive_is_fetched_once_from_the_mirror_and_unpacked(mirror, packed, tmp_path):
    """The second call asks nobody, and nothing but the folder and its lock stays behind."""
    asked = []

    def answer(request, body):
        asked.append(request.path)
        respond(request, packed)

    mirror(answer)
    folder = data.download(TASKS["rte"], tmp_path / "cache")
    assert len(load_task("rte", folder)["train"]) == 12
    assert {path.name for path in folder.iterdir()} <= {"RTE", "RTE.lock"}
    assert data.download(TASKS["rte"], tmp_path / "cache") == folder
    assert asked == ["/glue/superglue/data/v2/RTE.zip"]  # once
    with pytest.raises(UserError, match=r"\(12, 6\) rows in train and dev, not \(2490, 277\)"):
        load_task("rte", None, tmp_path / "cache")  # what we fetched ourselves must be whole


def test_the_addresses_are_the_official_ones():
    """Written by hand, not read from the code: a typo here costs every user a download."""
    glue = "https://dl.fbaipublicfiles.com/glue/data"
    superglue = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
    assert {name: data.SITE + path for name, path in data.ARCHIVES.items()} == {
        "cola": f"{glue}/CoLA.zip",
        "sst2": f"{glue}/SST-2.zip",
        "stsb": f"{glue}/STS-B.zip",
        "qqp": f"{glue}/QQP-clean.zip",
        "mnli": f"{glue}/MNLI.zip",
        "qnli": f"{glue}/QNLIv2.zip",
        "wnli": f"{glue}/WNLI.zip",
        "boolq": f"{superglue}/BoolQ.zip",
        "cb": f"{superglue}/CB.zip",
        "copa": f"{superglue}/COPA.zip",
        "rte": f"{superglue}/RTE.zip",
        "wic": f"{superglue}/WiC.zip",
        "wsc": f"{superglue}/WSC.zip",
    }


def test_a_broken_transfer_goes_on_where_it_stopped_also_in_the_next_run(mirror, packed, tmp_path):
    ranges = []

    def answer(request, body):
        """Each answer stops after 300 bytes."""
        wanted = request.headers.get("Range")
        ranges.append(wanted)
        start, status = 0, 200
        if wanted:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206
        respond(request, packed[start:start + 300], status, length=len(packed) - start)

    mirror(answer)
    for _ in range(len(packed) // 1200 + 1):
        try:
            folder = data.download(TASKS["rte"], tmp_path)
        except UserError as error:
            assert f"of {len(packed)} bytes came" in str(error)
    assert len(load_task("rte", folder)["train"]) == 12
    # The last byte that came is asked for again.
    assert ranges == [None] + [f"bytes={start}-" for start in range(299, len(packed), 299)]


def test_a_server_that_knows_no_ranges_is_asked_from_the_start(mirror, packed, tmp_path):
    """Its second answer is the whole file: appended to what is there it would be a broken zip."""
    answers = iter([packed[:300], packed])
    mirror(lambda request, body: respond(request, next(answers), length=len(packed)))
    url = f"{os.environ['ARMADA_MIRROR']}/RTE.zip"
    part = tmp_path / "part"
    with pytest.raises(OSError, match=f"300 of {len(packed)} bytes came"):
        data.transfer(url, part)
    data.transfer(url, part)
    assert part.read_bytes() == packed


def test_an_overloaded_server_is_asked_again_after_growing_pauses_or_as_it_says(
        mirror, packed, tmp_path):
    answers = iter([
        (b"", 503, {}),
        (b"", 429, {"Retry_After": "7"}),
        (packed, 200, {}),
    ])

    def answer(request, body):
        content, status, headers = next(answers)
        respond(request, content, status, **headers)

    mirror(answer)
    data.download(TASKS["rte"], tmp_path)
    assert mirror.waits == [1, 7]


def test_a_server_that_asks_for_a_pause_of_hours_is_not_waited_for(mirror, tmp_path):
    mirror(lambda request, body: respond(request, b"", 503, Retry_After="7200"))
    with pytest.raises(UserError, match="503"):
        data.download(TASKS["rte"], tmp_path)
    assert mirror.waits == []


def test_an_error_whose_text_is_cut_is_asked_again_too(mirror, packed, tmp_path):
    answers = iter([(b"sor", 503, 300), (packed,)])
    mirror(lambda request, body: respond(request, *next(answers)))
    assert (data.download(TASKS["rte"], tmp_path) / "RTE").is_dir()


def test_an_error_whose_text_stalls_is_told_without_it():
    def stall(size):
        raise TimeoutError("timed out")

    error = types.SimpleNamespace(code=503, reason="busy", read=stall)
    assert data.describe_http_error(error).split() == ["503", "busy"]


def test_a_line_that_stalls_is_given_up_after_a_while(mirror, tmp_path, monkeypatch):
    real = data.urllib.request.urlopen
    monkeypatch.setattr(data.urllib.request, "urlopen",
                        lambda request, timeout: real(request, timeout=0.1))
    over = threading.Event()
    mirror(lambda request, body: over.wait(20))
    with pytest.raises(UserError, match="RTE.zip.*timed out"):
        data.download(TASKS["rte"], tmp_path)
    over.set()


def zip_with_member(name):
    """The bytes of a zip file whose only member is called `name`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "mine")
    return file.getvalue()


@pytest.mark.parametrize("status, body, says", [
    pytest.param(404, b"", "404", id="missing"),
    pytest.param(200, b"PK half of a zip file", "not a zip file", id="half"),
    pytest.param(200, zip_with_member("../evil"), "evil would leave the folder", id="above"),
    pytest.param(200, zip_with_member("/etc/evil"), "would leave", id="elsewhere"),
    pytest.param(200, zip_with_member("CB/train.jsonl"), "RTE", id="another task"),
])
def test_an_archive_that_cannot_be_had_is_one_line_and_leaves_nothing(
        mirror, tmp_path, status, body, says):
    """A folder or a part that stayed would be taken for the real one by the next run."""
    mirror(lambda request, _: respond(request, body, status))
    with pytest.raises(UserError, match=f"(?s)RTE.zip.*{says}") as error:
        load_task("rte", None, tmp_path / "cache")
    assert "give --data-dir FOLDER" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.rglob("*")} <= {"cache", "data", "RTE.lock"}


def test_a_member_whose_checksum_is_wrong_is_refused(mirror, packed, tmp_path):
    """The texts would still parse: only the checksum tells that a letter is another one."""
    damaged = packed.replace(b"stands here", b"stands Here", 1)
    mirror(lambda request, _: respond(request, damaged))
    with pytest.raises(UserError, match="damaged files .*CRC"):
        data.download(TASKS["rte"], tmp_path)


def test_two_downloads_at_once_are_one(mirror, packed, tmp_path):
    """Several processes of one run start at once on an empty cache."""
    asked = []

    def answer(request, body):
        asked.append(request.path)
        respond(request, packed)

    mirror(answer)
    arguments = (TASKS["rte"], tmp_path)
    threads = [threading.Thread(target=data.download, args=arguments) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


def test_offline_uses_what_is_there_and_asks_for_nothing(mirror, packed, tmp_path, monkeypatch):
    mirror(lambda request, _: respond(request, packed))
    data.download(TASKS["rte"], tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mirror(lambda request, _: pytest.fail("asked"))
    assert (data.download(TASKS["rte"], tmp_path) / "RTE").is_dir()
    with pytest.raises(UserError, match="--offline, but there is no copy here of .*CB.zip"):
        data.download(TASKS["cb"], tmp_path)


def test_mrpc_has_no_archive_and_the_error_says_where_to_put_its_files(tmp_path):
    says = "mrpc has no official archive: put MRPC/ .* give --data-dir FOLDER"
    with pytest.raises(UserError, match=says):
        load_task("mrpc", None, tmp_path)


# ---- objects ----


def objects_named(example):
    """The objects that a question names, in order."""
    words = example.fields["text"].replace("?", "").replace(":", "").split()
    return [word for word in words if word in OBJECTS]


def test_objects_shares_no_pair_between_splits_in_either_order_and_shows_every_object_in_training():
    """Dev is new pairs of known words: of a word never read nothing can be known.

    The first 120 training rows are all that trains by default.
    """
    pairs = {}
    for split, examples in load_task("objects").items():
        pairs[split] = [frozenset(objects_named(example)) for example in examples]
    assert {split: len(rows) for split, rows in pairs.items()} == {
        "train": 600, "dev": 500, "test": 600}
    everything = pairs["train"] + pairs["dev"] + pairs["test"]
    assert all(len(pair) == 2 for pair in everything)
    assert len(set(everything)) == len(everything)
    assert frozenset.union(*pairs["train"][:120]) == OBJECTS.keys()


def test_objects_labels_say_whether_the_first_named_object_is_the_larger_by_a_quarter_at_least():
    for example in load_task("objects")["dev"]:
        first, second = [OBJECTS[name][0] for name in objects_named(example)]
        assert example.label == (first > second)
        assert max(first, second) >= 1.25 * min(first, second)


# ---- shortening ----

WORDS = [f"w{i}" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    _, tokenizer = _tiny([" ".join(WORDS) + " what was the cause 1 2 : ?"])
    return tokenizer


def example_of(name, **fields):
    return Example(fields, 0, 0, f"{name}:1")


@pytest.mark.parametrize("decoder", [False, True])
def test_a_long_text_loses_the_end_of_its_longest_field_and_nothing_else(tokenizer, decoder):
    premise, hypothesis = WORDS[:200], WORDS[200:210]
    example = example_of("rte", premise=" ".join(premise), hypothesis=" ".join(hypothesis))
    rows, shortened = encode(TASKS["rte"], [example], tokenizer, 40, decoder)
    words = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert shortened == 1
    assert len(words) == 40
    assert [word for word in words if word in WORDS[200:]] == hypothesis  # whole
    kept = [word for word in words if word in premise]
    assert kept == premise[:len(kept)]  # a prefix
    assert len(kept) >= 27  # as long as fits


def test_two_long_fields_are_shortened_to_about_equal_length(tokenizer):
    """To cut the longest alone would leave nothing of it where the second is as long."""
    premise, hypothesis = WORDS[:150], WORDS[150:280]
    example = example_of("rte", premise=" ".join(premise), hypothesis=" ".join(hypothesis))
    rows, _ = encode(TASKS["rte"], [example], tokenizer, 64, False)
    words = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    of_premise = sum(word in premise for word in words)
    of_hypothesis = sum(word in hypothesis for word in words)
    assert abs(of_premise - of_hypothesis) <= 1
    assert of_premise + of_hypothesis == 61


def test_the_question_and_the_templates_own_words_are_never_shortened(tokenizer):
    example = example_of("copa", premise=" ".join(WORDS[:90]), question="cause",
                         choice1=" ".join(WORDS[90:180]), choice2="w299")
    rows, _ = encode(TASKS["copa"], [example], tokenizer, 32, False)
    text = tokenizer.decode(rows[0]["input_ids"])
    assert "what was the cause ?" in text
    assert "1 :" in text
    assert "2 : w299" in text
    assert "question" in KEEP


def test_a_maximum_too_small_for_what_must_stay_is_an_error_that_gives_the_number(tokenizer):
    example = example_of("boolq", question=" ".join(WORDS[:20]), passage="w50 w51")
    says = "--max-length 10 is too small for boolq:1.* takes 22 tokens"
    with pytest.raises(UserError, match=says):
        encode(TASKS["boolq"], [example], tokenizer, 10, False)


def test_a_task_all_of_whose_fields_must_stay_is_told_so_too(tokenizer):
    task = data.Task("asked", "Asked", "{question}", None, ("no", "yes"))
    example = example_of("asked", question=" ".join(WORDS[:20]))
    with pytest.raises(UserError, match="--max-length 10 is too small for asked:1"):
        encode(task, [example], tokenizer, 10, False)


def test_texts_that_fit_are_left_alone(tokenizer):
    example = example_of("rte", premise="w1 w2", hypothesis="w3")
    rows, shortened = encode(TASKS["rte"], [example] * 3, tokenizer, 7, False)
    assert shortened == 0
    assert rows[2]["input_ids"] == tokenizer("w1 w2", "w3")["input_ids"]


def test_an_emoji_of_several_byte_tokens_can_be_cut_off():
    """Byte-level tokenizers (OPT, RoBERTa, LLaMA) give a character's bytes the same offsets."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    example = example_of("cola", sentence="good \U0001F600")
    rows, shortened = encode(TASKS["cola"], [example], byte_level, 8, True)
    assert shortened == 1
    assert "".join(byte_level.convert_ids_to_tokens(rows[0]["input_ids"])) == "good"


def test_an_empty_second_text_costs_the_others_nothing(tokenizer):
    """Whether a chunk is tokenised as pairs must not hang on any one of its examples."""
    examples = [example_of("rte", premise="w1", hypothesis=""),
                example_of("rte", premise="w2", hypothesis="w3")]
    rows, _ = encode(TASKS["rte"], examples, tokenizer, 20, False)
    assert rows[1]["input_ids"] == tokenizer("w2", "w3")["input_ids"]


# ---- batches ----


def random_lengths(n):
    return [random.Random(i).randint(5, 100) for i in range(n)]


@pytest.mark.parametrize("n, batch_size", [(100, 8), (7, 8), (8, 8), (1000, 32)])
def test_every_row_comes_exactly_once_and_only_one_batch_is_short(n, batch_size):
    batches = length_grouped_batches(random_lengths(n), batch_size, seed=3)
    assert sorted(row for batch in batches for row in batch) == list(range(n))
    sizes = sorted(len(batch) for batch in batches)
    assert sizes[1:] == [batch_size] * (len(batches) - 1)


def test_batches_depend_on_the_seed_alone_and_come_in_no_order_of_length():
    """Short texts first would be a curriculum, and one that epochs share."""
    lengths = random_lengths(400)
    batches = length_grouped_batches(lengths, 8, seed=1)
    assert batches == length_grouped_batches(lengths, 8, seed=1)
    assert batches != length_grouped_batches(lengths, 8, seed=2)
    totals = [sum(lengths[row] for row in batch) for batch in batches]
    assert totals[:16] != sorted(totals[:16])  # nor do those of one pool


def test_grouping_saves_most_of_the_padding():
    """Padding is paid for like text; batches at random are the baseline."""
    lengths = random_lengths(1000)
    order = list(range(1000))
    random.Random(0).shuffle(order)

    def padding(batches):
        """How many places of these batches hold no token."""
        places = 0
        for batch in batches:
            batch_lengths = [lengths[row] for row in batch]
            places += max(batch_lengths) * len(batch) - sum(batch_lengths)
        return places

    grouped = length_grouped_batches(lengths, 16, 0)
    ungrouped = [order[i:i + 16] for i in range(0, 1000, 16)]
    assert padding(grouped) < 0.25 * padding(ungrouped)


def test_collate_pads_to_the_longest_row_of_the_batch_and_masks_the_padding():
    rows = [{"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1]},
            {"input_ids": [8], "token_type_ids": [1]}]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert all(value.dtype == torch.int64 for value in batch.values())


# ---- one line, JSON and text of any sort -------------------------------------------------------


@pytest.mark.parametrize("text, line", [
    ("one\ntwo\tthree\r\n", r"one\ntwo\tthree"),
    ("a name\x1b[31m with\x07 an escape\x9b2J", r"a name\x1b[31m with\x07 an escape\x9b2J"),
    ("half \ud800, turned \u202e round", r"half \ud800, turned \u202e round"),
    ("für 语言 😀 ± 1", "für 语言 😀 ± 1"),
    ("", ""),
])
def test_one_line_shows_what_a_console_would_obey(text, line):
    assert data.one_line(text) == line
    assert data.one_line(line) == line  # a message that is put into another one stays as it is
    assert str(UserError(text)) == line


def test_one_line_cuts_the_middle_of_a_long_text_between_words():
    """What was found stands at the start of a message, and what to type at its end."""
    line = data.one_line("found " + "word " * 1000 + "type this")
    assert len(line) <= 1000
    assert set(line.split()) == {"found", "word", "...", "type", "this"}
    assert line.startswith("found word") and line.endswith("word type this")


def test_one_line_cuts_a_text_without_blanks_too():
    line = data.one_line("x" * 5000, most=50)
    assert len(line) == 50 and line.replace(" ... ", "") == "x" * 45


def test_an_unknown_name_of_any_sort_is_one_short_line_with_the_known_ones():
    for name in ("new\nline", "\x1b[2Jclear", "x" * 10**5, "many words " * 999, "\ud800"):
        with pytest.raises(UserError) as error:
            find_task(name)
        message = str(error.value)
        assert message.isprintable() and len(message) <= 1000
        assert message.startswith("unknown task '")
        assert message.endswith(f"{list(TASKS)[-2]}, {list(TASKS)[-1]}")


def test_the_last_line_of_a_program_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        data.exit_with_message(2, "train.py: error: two\nlines\x1b[2J")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: error: two\\nlines\\x1b[2J\n"


@pytest.mark.parametrize("text, kind, says", [
    ("", dict, r"x.json:3 is not JSON \(Expecting value\): the file may be cut"),
    ("{", dict, "x.json:3 is not JSON"),
    ('{"a": 1,\n"b": }', dict, "x.json:3 is not JSON .*in line 2"),
    ("\ufeff{}", dict, "x.json:3 is not JSON"),
    ("[" * 10**5, list, r"x.json:3 is not JSON \(it is nested too deeply\)"),
    ('{"a": ' * 10**5, dict, r"x.json:3 is not JSON \(it is nested too deeply\)"),
    ('{"a": ' + "9" * 5000 + "}", dict, "x.json:3 is not JSON .*digits"),
    ("[]", dict, "x.json:3 is not a JSON object: the file may be cut"),
    ("{}", list, "x.json:3 is not a JSON list: the file may be cut"),
    ("3", dict, "x.json:3 is not a JSON object"),
    ("null", list, "x.json:3 is not a JSON list"),
])
def test_what_is_no_json_of_the_wanted_kind_is_one_line_that_names_the_place(text, kind, says):
    with pytest.raises(UserError, match=says):
        data.parse_json(text, "x.json:3", kind)


def test_json_is_read_and_a_hint_may_say_what_to_do(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes('\ufeff{"é": [1e999, -0.5]}'.encode())
    assert data.read_json(path) == {"é": [float("inf"), -0.5]}
    with pytest.raises(UserError, match="x.json is not a JSON list: delete it$"):
        data.read_json(path, list, "delete it")


def test_a_json_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"caf\xe9": 1}')
    (tmp_path / "empty.json").touch()
    for name, says in (("latin.json", "is not UTF-8"), ("empty.json", "is not JSON"),
                       ("gone.json", "cannot be read"), ("latin.json/x", "cannot be read"),
                       (".", "cannot be read"), ("y" * 300, "cannot be read"),
                       ("zero\0byte", "cannot be read")):
        with pytest.raises(UserError, match=f"(?s){tmp_path}.*{says}.*: delete it"):
            data.read_json(tmp_path / name, hint="delete it")


def test_half_of_a_character_is_refused_and_a_whole_one_is_not():
    data.check_text("😀 é", "x:1")
    with pytest.raises(UserError, match=r"x:1 holds half of a character, '\\ud83d'"):
        data.check_text("a \ud83d", "x:1")


def test_a_console_that_knows_only_ascii_gets_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(data.sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    data.prepare_console()
    print("81.5 ± 0.3", flush=True)
    assert raw.getvalue() == b"81.5 ? 0.3\n"
    monkeypatch.setattr(data.sys, "stdout", io.StringIO())  # which cannot be reconfigured
    data.prepare_console()


# ---- unusual rows: right, or refused in one line that names them -------------------------------


def rewrite(path, change):
    """Write change(rows) of a .jsonl or .tsv file's lines, or of a .json file's list of objects."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(text))))
    else:
        path.write_text("\n".join(change(text.splitlines())) + "\n", encoding="utf-8")


WSC_TEXT = "Ann told Bob that she saw her sister , said Ann's aunt; \"She won,\" he said."


def read_wsc(folder, **target):
    """The marked text of WSC_TEXT with Ann and she as spans, where `target` says no other."""
    (folder / "WSC").mkdir()
    whole = {"span1_index": 0, "span1_text": "Ann", "span2_index": 4, "span2_text": "she", **target}
    row = {"text": WSC_TEXT, "label": False, "target": whole}
    for name in ("train.jsonl", "val.jsonl"):
        (folder / "WSC" / name).write_text(json.dumps(row) + "\n")
    return load_task("wsc", folder)["train"][0].fields["text"]


@pytest.mark.parametrize("target, marked", [
    ({}, "[Ann] told Bob that *she*"),
    ({"span1_text": "ANN"}, "[Ann] told"),                       # another case
    ({"span1_text": "Bob,", "span1_index": 2}, "told [Bob] that"),  # other punctuation
    ({"span1_index": 10}, "said [Ann's] aunt"),                   # a possessive, at its index
    ({"span1_text": "Bob", "span1_index": 0}, "told [Bob] that"),  # two words off
    ({"span2_index": 3}, "that *she* saw"),                      # one word off, though it is twice
    ({"span2_index": 14}, "aunt; *\"She* won"),                  # at the other one
    ({"span1_text": "said Ann's aunt", "span1_index": 9}, "[said Ann's aunt;]"),
    ({"span1_text": "Bob", "span1_index": 14}, "told [Bob] that"),  # far off, but the only one
])
def test_wsc_marks_the_words_of_a_span_and_not_whatever_its_index_says(tmp_path, target, marked):
    assert marked in read_wsc(tmp_path, **target)


@pytest.mark.parametrize("target, says", [
    ({"span1_text": "Carol"}, "whose text stands neither at its index"),
    ({"span2_text": "sh"}, "whose text stands neither at its index"),
    ({"span2_index": 8}, "neither at its index nor at one other place"),  # four words from either
    ({"span2_index": -12}, "no text with two spans"),  # from the end it would be right
    ({"span2_index": 99}, "no text with two spans"),
    ({"span2_index": 10**400}, "no text with two spans"),
    ({"span2_index": "4"}, "no text with two spans"),
    ({"span2_index": 4.0}, "no text with two spans"),
    ({"span2_text": " "}, "no text with two spans"),
    ({"span2_text": None}, "no text with two spans"),
])
def test_wsc_refuses_a_row_whose_span_is_not_to_be_found(tmp_path, target, says):
    with pytest.raises(UserError, match=rf"train.jsonl:1 has .*{says}"):
        read_wsc(tmp_path, **target)


def test_an_idx_is_kept_as_the_file_has_it(tmp_path):
    root = write_official(TASKS["rte"], tmp_path)
    values = ["a-7", 70, True, None, 1.5, [3]]

    def change(lines):
        rows = [{**json.loads(line), "idx": value} for line, value in zip(lines, values)]
        return map(json.dumps, rows)

    rewrite(tmp_path / "RTE/val.jsonl", change)
    ids = [example.idx for example in load_task("rte", root)["dev"]]
    assert ids == ["a-7", 70, 2, 3, 4, 5]  # what is no name is the row's number


@pytest.mark.parametrize("spelled", [-1, None, "-1", "-1.0", -1.0])
def test_a_test_row_may_say_that_its_label_is_unknown(tmp_path, spelled):
    root = write_official(TASKS["rte"], tmp_path)

    def change(lines):
        last = {**json.loads(lines[1]), "label": "not_entailment"}
        return [json.dumps({**json.loads(lines[0]), "label": spelled}), json.dumps(last)]

    rewrite(tmp_path / "RTE/test.jsonl", change)
    assert [example.label for example in load_task("rte", root)["test"]] == [None, 1]
    rewrite(tmp_path / "RTE/val.jsonl", change)
    with pytest.raises(UserError, match="val.jsonl:1 has the label"):
        load_task("rte", root)


def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(tmp_path):
    root = write_official(TASKS["rte"], tmp_path)
    rewrite(tmp_path / "RTE/train.jsonl", lambda lines: ["", lines[0], "  \t", *lines[1:], "", ""])
    examples = load_task("rte", root)["train"]
    assert len(examples) == 12
    assert [example.where.rpartition(":")[2] for example in examples[:3]] == ["2", "4", "5"]


def write_answers(folder, answers):
    """A folder whose addsub test has these answers, one row each."""
    question = {"instruction": "how many?", "input": "", "output": "The answer is 7."}
    rows = [{**question, "answer": answer} for answer in answers]
    (folder / "reasoning/AddSub").mkdir(parents=True)
    (folder / "reasoning/train_math.json").write_text(json.dumps(rows[:1] * 2))
    (folder / "reasoning/AddSub/test.json").write_text(json.dumps(rows))
    return folder


def test_an_answer_may_be_a_number_a_boolean_or_a_list_of_accepted_ones(tmp_path):
    """As in math_data.json of LLM-Adapters; the other files spell them "72.0", "9.8", "true"."""
    answers = ["72.0", 72, 72.0, 9.8, 1e-05, -0.5, 1430.0, True, False, [68.0], ["A"],
               [1, "one half", 0.5][::2], ["true", False]]
    examples = load_task("reason/addsub", write_answers(tmp_path, answers))["test"]
    assert [example.label for example in examples] == [
        ("72.0",), ("72",), ("72",), ("9.8",), ("0.00001",), ("-0.5",), ("1430",), ("true",),
        ("false",), ("68",), ("A",), ("1", "0.5"), ("true", "false")]


@pytest.mark.parametrize("answer", [None, {}, [], [None], [["A"]], float("inf"), float("nan"),
                                    "perhaps", ["7", "perhaps"], ["7", "\ud800"]])
def test_an_answer_that_nothing_can_be_compared_with_is_refused(tmp_path, answer):
    with pytest.raises(UserError, match=r"test.json:2 (has|holds) "):
        load_task("reason/addsub", write_answers(tmp_path, ["7", answer]))


def test_a_bag_is_of_the_accepted_answer_that_the_output_names():
    cases = ((("8", "7"), "7", "7"), (("7", "8"), "7", "7"), (("8",), "7", None),
             (("-7",), "\u22127", "\u22127"))  # a minus sign where the reference has a hyphen
    for answers, said, word in cases:
        tokenizer = _tiny([f"the answer is {said} or 8"])[1]
        example = Example({}, answers, 0, "x:1", f"the answer is {said}")
        bag, = data.answer_bags(TASKS["reason/addsub"], [example], tokenizer)
        assert "".join(tokenizer.convert_ids_to_tokens(bag)) == (word or "")


def test_a_row_broken_over_several_lines_is_left_out_and_counted(tmp_path, capsys):
    """The first official QQP has texts with a new line in them."""
    root = write_official(TASKS["qqp"], tmp_path)
    whole = load_task("qqp", root)["train"]
    assert capsys.readouterr().out == ""
    rewrite(tmp_path / "QQP/train.tsv", lambda lines: [
        *lines[:4],
        lines[4].replace(" stands", "\nstands", 1),     # in the first question
        lines[5].replace(" here .\t0", "\n\nhere .\t0"),  # in the second, with an empty line
        lines[6].replace(" ", "\n"),                    # in both, several times
        *lines[7:]])
    examples = load_task("qqp", root)["train"]
    kept = [example.fields for example in whole[:3] + whole[6:]]
    assert [example.fields for example in examples] == kept
    assert examples[3].where.endswith("train.tsv:17")
    printed = capsys.readouterr().out
    assert printed == (f"{tmp_path}/QQP/train.tsv: rows left out, since they are broken over "
                       "several lines: 3\n")


@pytest.mark.parametrize("change", [
    lambda lines: [*lines[:3], lines[3].rpartition("\t")[0], *lines[4:]],  # a column is lost
    lambda lines: [*lines[:3], lines[3].replace("\t", "\t\t", 1), *lines[4:]],  # one too many
    lambda lines: [*lines[:3], lines[3].replace("\t", " ")],  # at the end of the file
    lambda lines: [*lines[:3], "a piece", "with\tfour\tcolumns\t1"],
])
def test_a_damaged_row_is_no_broken_one(tmp_path, change):
    root = write_official(TASKS["qqp"], tmp_path)
    rewrite(tmp_path / "QQP/train.tsv", change)
    with pytest.raises(UserError, match=r"train.tsv:4 has \d columns, not 3: question1"):
        load_task("qqp", root)


def test_in_other_files_a_broken_row_is_damage(tmp_path):
    root = write_official(TASKS["wnli"], tmp_path)
    rewrite(tmp_path / "WNLI/dev.tsv", lambda lines: [lines[0], lines[1].replace(" ", "\n", 1)])
    with pytest.raises(UserError, match="dev.tsv:2 has 1 columns, not 3"):
        load_task("wnli", root)


def test_the_official_form_of_a_broken_row_has_six_columns(tmp_path):
    """As in line 97,931 of the first official file: three columns are left of a row."""
    (tmp_path / "QQP").mkdir()
    text = ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            "1\t3\t4\twho is it?\twho was it?\t0\n"
            "2\t5\t6\t\"\n\"\twas it real?\t0\n"
            "3\t7\t8\twhat is it?\t\"\nwhat\n\t1\n"
            "4\t9\t1\twhere is it?\twhere was it?\t1\n")
    for name in ("train", "dev"):
        (tmp_path / f"QQP/{name}.tsv").write_text(text)
    examples = load_task("qqp", tmp_path)["dev"]
    assert [(example.label, example.where[-1]) for example in examples] == [(0, "2"), (1, "8")]


HOSTILE = ["[" * 10**5, "9" * 5000, "1e999", "1" + "0" * 400, "NaN", "{}", '"\\ud800"', "[[[]]]"]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: value[:9])
@pytest.mark.parametrize("key", ["premise", "label"])
def test_a_hostile_value_is_one_line_that_names_file_and_line(tmp_path, key, value):
    root = write_official(TASKS["rte"], tmp_path)
    row = json.dumps({"premise": "p", "hypothesis": "h", "label": "entailment", key: "HERE"})
    rewrite(tmp_path / "RTE/val.jsonl", lambda lines: [lines[0], row.replace('"HERE"', value)])
    with pytest.raises(UserError, match="RTE/val.jsonl:2 ") as error:
        load_task("rte", root)
    assert len(str(error.value)) <= 1000


@pytest.mark.parametrize("score", ["1" + "0" * 400, "9" * 5000, "1e999", "-1e999", "nan", ""])
def test_a_score_of_any_size_is_one_line(tmp_path, score):
    root = write_official(TASKS["stsb"], tmp_path)
    rewrite(tmp_path / "STS-B/dev.tsv",
            lambda lines: [*lines[:2], lines[2].rpartition("\t")[0] + "\t" + score])
    with pytest.raises(UserError, match="dev.tsv:3 has the label .*a number from 0 to 5"):
        load_task("stsb", root)


@pytest.mark.parametrize("column", ["instruction", "input", "output", "answer"])
def test_half_of_a_character_in_any_text_names_the_row(tmp_path, column):
    row = {"instruction": "how many?", "input": "", "output": "7", "answer": "7"}
    folder = write_answers(tmp_path, ["7"])
    rewrite(tmp_path / "reasoning/train_math.json",
            lambda rows: [row, {**row, column: "7 \ud83d"}])
    with pytest.raises(UserError, match=r"train_math.json:2 holds half of a character"):
        load_task("reason/addsub", folder)


def test_a_data_folder_of_any_name_is_one_line(tmp_path):
    for name in ("x" * 5000, "no\nfolder", str(tmp_path / "file")):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="give --data-dir") as error:
            load_task("rte", name)
        assert str(error.value).isprintable()
    (tmp_path / "RTE/train.tsv").mkdir(parents=True)
    with pytest.raises(UserError, match="RTE/train.tsv cannot be read"):
        load_task("rte", tmp_path)


# ---- texts without a token, tokenizers of any sort ---------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_text_of_no_token_is_refused_where_nothing_else_would_be_read(tokenizer, text):
    """An encoder still reads [CLS]; of no token at all there is nothing to pool."""
    examples = [example_of("cola", sentence="w1"), example_of("cola", sentence=text)]
    rows, _ = encode(TASKS["cola"], examples, tokenizer, 20, False)
    assert rows[1]["input_ids"] == tokenizer("")["input_ids"] != []

    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"w1": 0, "?": 1}, "?")))
    bare.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="cola:1 holds no token"):
        encode(TASKS["cola"], examples, bare, 20, True)


def test_a_prompt_never_ends_with_the_end_of_text_that_a_tokenizer_appends(causal_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal_folder())
    example = Example({"instruction": "say a", "input": ""}, ("a",), 0, "x:1", "a")
    plain, _ = encode(TASKS["instruct/dolly"], [example], tokenizer, 512, True, 16)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)])
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(TASKS["instruct/dolly"], [example], tokenizer, 512, True, 16)[0] == plain


def test_a_tokenizer_that_knows_no_places_is_refused_where_they_are_needed():
    """Those that are written in Python alone return no offsets, and say nothing."""
    byte_tokenizer = transformers.ByT5Tokenizer()
    short = [example_of("cola", sentence="good")]
    assert len(encode(TASKS["cola"], short, byte_tokenizer, 8, False)[0]) == 1
    long = [example_of("cola", sentence="good morning")]
    with pytest.raises(UserError, match="where in a text its tokens stand"):
        encode(TASKS["cola"], long, byte_tokenizer, 8, False)


# ---- servers and archives of any sort ----------------------------------------------------------


def test_a_stale_part_that_is_longer_than_the_file_is_fetched_anew(mirror, packed, tmp_path):
    ranges = []

    def answer(request, body):
        ranges.append(request.headers.get("Range"))
        start = int((ranges[-1] or "bytes=0-")[6:-1])
        if start >= len(packed):
            respond(request, b"", 416)
        else:
            respond(request, packed[start:], 206 if start else 200)

    mirror(answer)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/RTE.zip.part").write_bytes(b"x" * 99999)
    assert (data.download(TASKS["rte"], tmp_path) / "RTE").is_dir()
    assert ranges == ["bytes=99998-", None]


def test_a_server_that_always_answers_416_is_not_asked_for_ever(mirror, tmp_path):
    asked = []
    mirror(lambda request, body: (asked.append(1), respond(request, b"", 416)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/RTE.zip.part").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="RTE.zip.* 416 "):
        data.download(TASKS["rte"], tmp_path)
    assert len(asked) == 2


@pytest.mark.parametrize("length", [None, "many", "-5", "9" * 5000])
def test_a_length_that_is_absent_or_no_number_is_done_without(mirror, packed, tmp_path, length):
    def answer(request, body):
        request.send_response(200)
        if length is not None:
            request.send_header("Content-Length", length)
        request.end_headers()
        request.wfile.write(packed)

    mirror(answer)
    assert (data.download(TASKS["rte"], tmp_path) / "RTE").is_dir()


def test_a_redirect_is_followed_and_a_circle_is_one_line(mirror, packed, tmp_path):
    def answer(request, body):
        if request.path.startswith("/moved"):
            respond(request, packed)
        elif "CB" in request.path:
            respond(request, b"", 302, Location=request.path)
        else:
            respond(request, b"", 301, Location="/moved" + request.path)

    mirror(answer)
    assert (data.download(TASKS["rte"], tmp_path) / "RTE").is_dir()
    with pytest.raises(UserError, match="CB.zip.* 302 "):
        data.download(TASKS["cb"], tmp_path)


@pytest.mark.parametrize("asks, waited", [
    ("7.5", 7.5), ("-5", 1), ("soon", 1), ("", 1), ("²", 1), ("nan", 1),
    ("Thu, 01 Jan 1970 00:02:10 GMT", 30),   # the clock below stands at 100 seconds
    ("Thu, 01 Jan 1970 00:00:10 GMT", 1),    # in the past
    ("9" * 5000, None), ("1e999", None), ("Fri, 31 Dec 9999 23:59:59 GMT", None),
])
def test_whatever_pause_a_server_asks_for_is_understood(mirror, packed, tmp_path, monkeypatch,
                                                        asks, waited):
    """None: it is too long to be waited for."""
    answers = iter([(b"", 503, {"Retry_After": asks}), (packed, 200, {})])

    def answer(request, body):
        content, status, headers = next(answers)
        respond(request, content, status, **headers)

    mirror(answer)
    monkeypatch.setattr(data.time, "time", lambda: 100.0)
    if waited is None:
        with pytest.raises(UserError, match="503"):
            data.download(TASKS["rte"], tmp_path)
        assert mirror.waits == []
    else:
        data.download(TASKS["rte"], tmp_path)
        assert mirror.waits == [waited]


def zip_of(**options):
    """zip_of(name=text, ...): the bytes of a compressed zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in options.items():
            archive.writestr(name, text)
    return file.getvalue()


@pytest.mark.parametrize("members, says", [
    ({"..\\evil": "x"}, "would leave"), ({"\\evil": "x"}, "would leave"),
    ({"C:\\evil": "x"}, "would leave"), ({"RTE/../../evil": "x"}, "would leave"),
    ({"RTE": "a file"}, "no folder RTE"), ({}, "no folder RTE"),
    ({"RTE/train.jsonl": " " * 10**6}, "would grow to 1000000 bytes"),
])
def test_a_strange_archive_is_one_line_and_leaves_nothing(mirror, tmp_path, members, says):
    mirror(lambda request, _: respond(request, zip_of(**members)))
    with pytest.raises(UserError, match=f"damaged files .*{says}"):
        data.download(TASKS["rte"], tmp_path / "cache")
    assert {path.name for path in tmp_path.rglob("*")} <= {"cache", "data", "RTE.lock"}


def test_an_archive_may_hold_folders_of_their_own(mirror, packed, tmp_path):
    file = io.BytesIO(packed)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("__MACOSX/", "")
        archive.writestr("RTE/empty/", "")
    mirror(lambda request, _: respond(request, file.getvalue()))
    folder = data.download(TASKS["rte"], tmp_path)
    assert len(load_task("rte", folder)["train"]) == 12


# ---- models of any sort ------------------------------------------------------------------------


def test_a_model_with_code_of_its_own_is_one_line_and_none_of_it_runs(tmp_path, capfd):
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    automatic = {"auto_map": {"AutoConfig": "code.A", "AutoTokenizer": ["code.B", None]}}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "odd", **automatic}))
    with pytest.raises(UserError, match="could not load it: it brings code of its own") as error:
        with data.explain_loading("it"):
            data.load_tokenizer("it", data.check_available(str(tmp_path)))
    assert "trust_remote_code" not in str(error.value)
    assert "run the custom code" not in capfd.readouterr().out  # nor is the keyboard asked


@pytest.mark.parametrize("error", [TypeError("x"), AttributeError("x"), IndexError("x"), EOFError(),
                                   AssertionError(), MemoryError(), RecursionError("x")])
def test_whatever_loading_raises_is_one_line(error):
    with pytest.raises(UserError, match=f"^could not load it: {type(error).__name__}"):
        with data.explain_loading("it"):
            raise error


def test_a_model_name_of_any_length_is_one_line():
    with pytest.raises(UserError, match="could not fetch x") as error:
        data.check_available("x" * 5000)
    assert len(str(error.value)) <= 1000


def test_the_batches_of_one_pool_come_in_no_order_of_length_either():
    """Up to 16 batches are one pool: in order, every epoch would end with the longest texts."""
    lengths = [random.Random(i).randint(5, 100) for i in range(16 * 8)]
    totals = [sum(lengths[row] for row in batch) for batch in length_grouped_batches(lengths, 8, 1)]
    assert totals != sorted(totals)

def test_collate_asks_for_no_token_beside_an_answer():
    """-100 is "no loss"; a label 0 would be a token to learn."""
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
            {"input_ids": [8, 9], "labels": [-100, 9]}]
    assert collate(rows, pad_id=0)["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert collate(rows, 0, "left")["labels"].tolist() == [[-100, 6, 7], [-100, -100, 9]]


def test_a_seed_is_the_same_in_every_process():
    """Python's own hash() of a text is another one in each: a resumed run would draw otherwise."""
    program = "from data import seed_of; print(seed_of(0, 'student', 3))"
    printed = []
    for hash_seed in "12":
        child = subprocess.run([sys.executable, "-c", program], cwd=Path(data.__file__).parent,
                               env={**os.environ, "PYTHONHASHSEED": hash_seed},
                               capture_output=True, text=True, check=True)
        printed.append(int(child.stdout))
    assert printed[0] == printed[1]
