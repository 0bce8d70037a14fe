"""Tasks: a registry, readers of the official files, and batches.

A task is ONE entry of TASKS: a name, a kind, a text template whose {fields} are columns of the official file, labels,
metrics. Every field reaches the student and the teacher, word for word; the label reaches neither.

    splits = load_task("rte", "data")                 # {"train": [Example, ...], "dev": [...], "test": [...]}
    TASKS["rte"].pair(splits["train"][0])             # (text_a, text_b): what an encoder reads
    TASKS["rte"].prompt(splits["train"][0])           # one text: what the teacher and a decoder read

Only the standard library is imported here, so that `train.py --help` and a mistyped task answer at once.
"""
import json
import os
import random
import re
import string
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path


CACHE = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armada")  # downloads and teacher vectors


class UserError(ValueError):
    """Something the person at the keyboard can mend: one line that says what was found and what to type instead."""


@dataclass(frozen=True)
class Example:
    """One row: its text fields as they stand in the file; label a class id, a float, or None (test rows); idx, the id
    that a submission file wants; where, "file:line" for messages."""

    fields: dict
    label: int | float | None
    idx: int
    where: str


@dataclass(frozen=True)
class Task:
    """One registry entry. kind: "classify" | "regress" ("generate" is left room for: same fields, other labels)."""

    name: str
    folder: str                    # below --data-dir, as the official archive names it
    text_a: str                    # template over the columns
    text_b: str | None = None
    labels: tuple = ()             # as the files spell them, lower case; class id = position
    kind: str = "classify"
    metrics: tuple = ("accuracy",)  # the first one is the headline
    label_column: str = "label"
    columns: dict = field(default_factory=dict)  # field -> column, where a file names it otherwise
    header: tuple = ()             # column names of train and dev files that have no header line
    archive: str = ""              # official address
    rows: tuple = ()               # official number of train and dev rows
    defaults: dict = field(default_factory=dict)  # Config overrides

    @property
    def fields(self):
        """The columns that the templates read, in order."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.text_a + (self.text_b or "")) if name]
        return tuple(dict.fromkeys(names))

    def pair(self, example):
        """(text_a, text_b) for an encoder; text_b is None for a single text."""
        return self.text_a.format(**example.fields), self.text_b and self.text_b.format(**example.fields)

    def prompt(self, example):
        """All of the example's text as one string: what the teacher and a decoder read."""
        return "\n".join(text for text in self.pair(example) if text is not None)

    def text(self, example, decoder):
        """What this kind of student reads: one prompt for a decoder, a pair for an encoder."""
        return (self.prompt(example), None) if decoder else self.pair(example)


# ---- the registry --------------------------------------------------------------------------------------------------------
GLUE, SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/data/", "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
TWO, NLI, BOOL = ("0", "1"), ("entailment", "not_entailment"), ("false", "true")

# DEVIATION: the authors' code never tokenises the columns text_c ... text_g (COPA's second choice, WiC's word, WSC's
# spans are lost); here a column that the task needs stands in the template and reaches both student and teacher.
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", "{sentence}", labels=TWO, metrics=("mcc",), header=("source", "label", "mark", "sentence"),
         archive=GLUE + "CoLA.zip", rows=(8551, 1043)),
    Task("sst2", "SST-2", "{sentence}", labels=TWO, archive=GLUE + "SST-2.zip", rows=(67349, 872)),
    Task("mrpc", "MRPC", "{sentence1}", "{sentence2}", TWO, metrics=("accuracy", "f1"), label_column="Quality",
         columns={"sentence1": "#1 String", "sentence2": "#2 String"}, rows=(3668, 408)),
    Task("stsb", "STS-B", "{sentence1}", "{sentence2}", kind="regress", metrics=("pearson", "spearman"),
         label_column="score", archive=GLUE + "STS-B.zip", rows=(5749, 1500)),
    Task("qqp", "QQP", "{question1}", "{question2}", TWO, metrics=("accuracy", "f1"), label_column="is_duplicate",
         archive=GLUE + "QQP-clean.zip", rows=(363846, 40430)),
    Task("mnli", "MNLI", "{sentence1}", "{sentence2}", ("entailment", "neutral", "contradiction"),
         label_column="gold_label", archive=GLUE + "MNLI.zip", rows=(392702, 9815)),
    Task("qnli", "QNLI", "{question}", "{sentence}", NLI, archive=GLUE + "QNLIv2.zip", rows=(104743, 5463)),
    Task("rte", "RTE", "{premise}", "{hypothesis}", NLI, columns={"premise": "sentence1", "hypothesis": "sentence2"},
         archive=SUPERGLUE + "RTE.zip", rows=(2490, 277)),
    Task("wnli", "WNLI", "{sentence1}", "{sentence2}", TWO, archive=GLUE + "WNLI.zip", rows=(635, 71)),
    Task("boolq", "BoolQ", "{question}", "{passage}", BOOL, archive=SUPERGLUE + "BoolQ.zip", rows=(9427, 3270)),
    Task("cb", "CB", "{premise}", "{hypothesis}", ("entailment", "neutral", "contradiction"),
         metrics=("accuracy", "f1"), archive=SUPERGLUE + "CB.zip", rows=(250, 56)),
    Task("copa", "COPA", "{premise} What was the {question}?", "1: {choice1} 2: {choice2}", TWO,
         archive=SUPERGLUE + "COPA.zip", rows=(400, 100)),
    Task("wic", "WiC", "{word}: {sentence1}", "{sentence2}", BOOL, archive=SUPERGLUE + "WiC.zip", rows=(5428, 638)),
    Task("wsc", "WSC", "{text}", "{span2_text} refers to {span1_text}", BOOL, archive=SUPERGLUE + "WSC.zip",
         rows=(554, 104)),
    Task("objects", "", "{text}", labels=("no", "yes"), rows=(120, 500),
         # From scratch on 120 sentences: a pretrained student's 2e-5 would not move these weights at all.
         defaults={"student": "tiny", "teacher": "painter", "lr": 4e-3, "epochs": 40, "beta": 20.0, "eval_every": 10}),
)}
# Never shortened when a text is too long: without them the rest cannot be answered.
KEEP = ("question", "word", "span1_text", "span2_text")

# ---- the embedded task: everyday objects, their size in centimetres, colour (red, green, blue) and shape -----------------
# A student trained from scratch has never seen a piano; a picture knows how big one is.
_COLOURS = {"red": (.9, .1, .1), "green": (.1, .7, .2), "blue": (.1, .3, .9), "brown": (.5, .3, .1), "grey": (.5, .5, .5),
            "white": (1, 1, 1), "black": (.1, .1, .1), "yellow": (.95, .85, .1), "orange": (.95, .5, .1), "pink": (1, .6, .7)}
_OBJECTS = """
ant .5 black disc; seed .6 brown disc; ladybird .8 red disc; pea .9 green disc; bee 1.4 yellow disc; coin 2.2 grey disc;
ring 2 yellow disc; button 1.6 blue disc; grape 2.4 green disc; snail 3.2 brown disc; stamp 3 red box; walnut 4 brown disc;
matchbox 5.5 red box; key 6.5 grey bar; egg 6 white disc; lemon 8 yellow disc; mouse 9 grey disc; apple 8.6 red disc;
orange 9.5 orange disc; mug 11 blue box; sparrow 15 brown cone; pencil 18 yellow bar; banana 19 yellow bar; shoe 29 black cone;
book 24 red box; spoon 16 grey bar; squirrel 38 brown cone; bottle 31 green bar; cat 46 black cone; laptop 35 grey box;
pillow 60 white box; umbrella 90 blue cone; guitar 100 brown bar; dog 75 brown cone; chair 95 brown box; suitcase 70 black box;
goose 85 white cone; bicycle 175 red cone; door 205 white box; sofa 200 green box; bed 215 pink box; piano 150 black box;
cow 240 white cone; horse 245 brown cone; boat 650 blue cone; car 430 red box; elephant 600 grey disc; van 560 white box;
giraffe 520 yellow bar; tree 1200 green cone; bus 1150 red box; truck 900 orange box; house 1400 brown cone; whale 2500 blue disc;
lorry 1700 green box; aeroplane 4000 white bar; church 3500 grey cone; lighthouse 3000 red bar; ferry 5200 white box;
bridge 6000 grey bar
"""
OBJECTS = {name: (float(size), _COLOURS[colour], shape)
           for name, size, colour, shape in (entry.split() for entry in _OBJECTS.split(";"))}
_QUESTIONS = ("is {a} bigger than {b}?", "would {a} be larger than {b}?", "{a} or {b}: is the first one bigger?",
              "does {a} take up more room than {b}?")


def _objects():
    """120 training pairs and two held-out sets, no pair shared in either order; sizes closer than 1.25 are left out."""
    rng = random.Random(4)  # the first seed whose training pairs show every object: a word never read has no vector
    names = sorted(OBJECTS)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]
             if max(OBJECTS[a][0], OBJECTS[b][0]) >= 1.25 * min(OBJECTS[a][0], OBJECTS[b][0])]
    rng.shuffle(pairs)
    rows = []
    for i, pair in enumerate(pairs):
        a, b = rng.sample(pair, 2)  # either may be the subject; the four questions all name it first
        article = {name: ("an " if name[0] in "aeiou" else "a ") + name for name in pair}
        rows.append(Example({"text": rng.choice(_QUESTIONS).format(a=article[a], b=article[b])},
                            int(OBJECTS[a][0] > OBJECTS[b][0]), i, f"objects:{i}"))
    return {"train": rows[:120], "dev": rows[120:620], "test": rows[620:]}


# ---- reading the official files ------------------------------------------------------------------------------------------
FILES = {"jsonl": {"train": "train.jsonl", "dev": "val.jsonl", "test": "test.jsonl"},
         "tsv": {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"},
         "mnli": {"train": "train.tsv", "dev": "dev_matched.tsv", "dev_mismatched": "dev_mismatched.tsv",
                  "test": "test_matched.tsv", "test_mismatched": "test_mismatched.tsv"}}


def find_task(name):
    """The registry entry of a case-insensitive name; UserError with the nearest names otherwise."""
    return TASKS[known(name.lower(), TASKS, "task")]


def known(name, names, what):
    """`name` itself when it is one of `names`; else a UserError that suggests the nearest and lists the others."""
    import difflib

    if name in names:
        return name
    near = difflib.get_close_matches(str(name), list(names), 1)
    raise UserError(f"unknown {what} {name!r}: " + (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(names)}")


def load_task(name, data_dir=None, cache_dir=CACHE):
    """{"train": [Example], "dev": [...], "test": [...]} of a task from its official files in data_dir/FOLDER.

    Without data_dir the official archive is fetched into cache_dir. test (and dev_mismatched) may be missing; objects
    needs no files. Raises UserError naming file and line.
    """
    task = find_task(name)
    if task.name == "objects":
        return _objects()
    folder = (Path(data_dir) if data_dir else download(task, cache_dir)) / task.folder
    if not folder.is_dir():
        raise UserError(f"task {task.name} reads the official files in {folder}, which is not there: give --data-dir the "
                        f"folder that holds {task.folder}/, or leave it out to download")
    form = "mnli" if task.name == "mnli" else "jsonl" if (folder / "train.jsonl").exists() else "tsv"  # RTE: jsonl wins
    splits = {}
    for split, file in FILES[form].items():
        if (folder / file).exists():
            splits[split] = _read(task, folder / file, split)
        elif split in ("train", "dev"):
            raise UserError(f"{folder / file} is missing: task {task.name} needs it; see the README's table of tasks")
    return splits


def _read(task, path, split):
    """Examples of one official file, jsonl or tsv."""
    examples, columns = [], None
    try:
        # utf-8-sig drops MRPC's byte-order mark; newline="\n" keeps a stray carriage return from splitting a row.
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                where, line = f"{path}:{number}", line.rstrip("\r\n")
                if path.suffix == ".jsonl":
                    if not line.strip():
                        continue
                    row = json.loads(line)
                elif columns is None and not (task.header and not split.startswith("test")):
                    columns = line.split("\t")
                    continue
                else:
                    # GLUE's tsv is not quoted: a " is part of the text, and a csv reader would swallow lines after it.
                    columns = columns or list(task.header)
                    values = line.split("\t")
                    if len(values) != len(columns):
                        raise UserError(f"{where} has {len(values)} columns, expected {len(columns)} ({', '.join(columns)})")
                    row = dict(zip(columns, values))
                examples.append(_example(task, row, split, len(examples), where))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not a JSON object ({error.msg}): the file may be cut; fetch it again") from None
    if not examples:
        raise UserError(f"{path} has no rows: fetch it again")
    return examples


def _example(task, row, split, number, where):
    """One row of a file -> Example: text fields verbatim, the label checked against the registry."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object")
    if task.name == "wsc":
        row = {**row, **_mark_spans(row, where)}
    fields = {}
    for name in task.fields:
        column = name if name in row else task.columns.get(name, name)
        if not isinstance(row.get(column), str):
            raise UserError(f"{where} has no text {column!r}: found {', '.join(map(str, row))}")
        fields[name] = row[column]
    idx = row["idx"] if isinstance(row.get("idx"), int) else number
    raw = row.get(task.label_column)
    if raw is None and split.startswith("test"):
        return Example(fields, None, idx, where)
    if task.kind == "regress":
        try:
            label = float(raw)
        except (TypeError, ValueError):
            label = float("nan")
        if not 0 <= label <= 5:
            raise UserError(f"{where} has the score {raw!r}: expected a number from 0 to 5")
    elif str(raw).lower() not in task.labels:  # JSON's true and 1 become "true" and "1"
        raise UserError(f"{where} has the label {raw!r}: expected one of {', '.join(task.labels)}")
    else:
        label = task.labels.index(str(raw).lower())
    return Example(fields, label, idx, where)


def _mark_spans(row, where):
    """WSC: put [ ] around the noun and * * around the pronoun, in place; indices count whitespace-separated words."""
    try:
        text, target = row["text"], row["target"]
        words = list(re.finditer(r"\S+", text))
        marks = []
        for key, left, right in (("span1", "[", "]"), ("span2", "*", "*")):
            first, length = target[key + "_index"], len(target[key + "_text"].split())
            marks += [(words[first].start(), left), (words[first + length - 1].end(), right)]
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{where} has no text with two spans inside it: expected text and target.span1_index ... span2_text") from None
    for position, mark in sorted(marks, reverse=True):  # from the end, so that earlier positions stay true
        text = text[:position] + mark + text[position:]
    return {"text": text, "span1_text": target["span1_text"], "span2_text": target["span2_text"]}


def download(task, cache_dir):
    """Fetch and unpack the official archive once; returns the data_dir that load_task wants."""
    data_dir = Path(cache_dir) / "data"
    if (data_dir / task.folder).is_dir():
        return data_dir
    if not task.archive:
        raise UserError(f"task {task.name} has no single official archive: put its files into a folder and give --data-dir FOLDER")
    part = data_dir / (task.folder + ".zip.part")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        print(f"downloading {task.archive} to {data_dir}", flush=True)
        with urllib.request.urlopen(task.archive, timeout=10) as answer, open(part, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
        with zipfile.ZipFile(part) as archive:
            archive.extractall(data_dir / (task.folder + ".part"))  # zipfile itself keeps members inside the folder
        os.rename(next((data_dir / (task.folder + ".part")).glob("*/")), data_dir / task.folder)
    except (OSError, StopIteration, zipfile.BadZipFile) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise UserError(f"could not fetch {task.archive} ({reason}): unpack it yourself into a folder and give --data-dir FOLDER") from None
    finally:
        part.unlink(missing_ok=True)
    return data_dir


# ---- from examples to batches --------------------------------------------------------------------------------------------
def encode(task, examples, tokenizer, max_length, decoder):
    """Tokenise once, before training. Returns ([{"input_ids": [...], ...} an example], number of shortened examples).

    A text over max_length tokens has its longest FIELD shortened before the template is filled, so that the template's
    own words, the question and the second text stay: cutting the filled text would drop the hypothesis of a long premise.
    """
    rows, shortened = [], 0
    for start in range(0, len(examples), 1000):
        chunk = examples[start:start + 1000]
        a, b = zip(*(task.text(example, decoder) for example in chunk))
        encoded = tokenizer(list(a), None if b[0] is None else list(b), verbose=False)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        for i, example in enumerate(chunk):
            row = {key: encoded[key][i] for key in keys}
            if len(row["input_ids"]) > max_length:
                short = tokenizer(*task.text(_shorten(task, example, tokenizer, max_length, decoder), decoder))
                row, shortened = {key: short[key] for key in keys}, shortened + 1
            rows.append(row)
    return rows, shortened


def _shorten(task, example, tokenizer, max_length, decoder):
    """The same example with its longest fields cut, longest first, until it fits."""
    fields = dict(example.fields)
    while True:
        short = Example(fields, example.label, example.idx, example.where)
        over = len(tokenizer(*task.text(short, decoder), verbose=False)["input_ids"]) - max_length
        if over <= 0:
            return short
        ends = {name: [end for _, end in tokenizer(fields[name], add_special_tokens=False, return_offsets_mapping=True,
                                                   verbose=False)["offset_mapping"]] for name in fields if name not in KEEP}
        (second, _), (length, longest) = sorted([(0, "")] + [(len(end), name) for name, end in ends.items()])[-2:]
        if length == 0:
            raise UserError(f"--max-length {max_length} is too small: {example.where} needs {over} tokens more with nothing left to cut")
        # Down to the second longest field, or, when the two are about equal, half of the excess from this one.
        keep = max(length - over, min(second, length - (over + 1) // 2), 0)
        fields[longest] = fields[longest][: ends[longest][keep - 1]] if keep else ""


def length_grouped_batches(lengths, batch_size, seed):
    """[[row, ...], ...]: every row exactly once, rows of similar length together, the short last batch kept.

    Shuffle, sort within pools of 16 batches, shuffle the batches: padding shrinks, the order stays random.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches, pool = [], 16 * batch_size
    for start in range(0, len(order), pool):
        rows = sorted(order[start:start + pool], key=lengths.__getitem__)
        batches += [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(rows, pad_id):
    """Encoded rows -> {"input_ids", "attention_mask"[, "token_type_ids"]}, int64 (B, L), L the longest row of THIS batch."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def pad(key, value):
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])  # (B, L)

    batch = {"input_ids": pad("input_ids", pad_id)}
    batch["attention_mask"] = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = pad("token_type_ids", 0)
    return batch
