"""Tasks: a registry (a task is ONE entry), readers of their files, batches. Every field reaches student and
teacher, the label neither. Only the standard library is imported here: `--help` answers at once.

    splits = load_task("rte", "data")             # {"train": [Example, ...], "dev": [...], "test": [...]}
    TASKS["rte"].pair(splits["train"][0])         # (text_a, text_b): what an encoder reads
    TASKS["rte"].prompt(splits["train"][0])       # one text: what the teacher and a decoder read
"""
import argparse
import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CACHE = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armada")

class UserError(ValueError):
    """What the person at the keyboard can mend: one line saying what was found and what to type instead."""

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the nearest flag."""
    def error(self, message):
        wrong = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(wrong[1], self._option_string_actions, 1) if wrong else []
        hint = f": did you mean {near[0]}?" if near else f" (see python {self.prog} --help)"
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")

    def exit(self, status=0, message=None):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # had rank 0 found the same, torchrun would end this process before it repeats it
        super().exit(status, message)

class Example(NamedTuple):
    fields: dict               # the texts of one row, as they stand in the file
    label: int | float | tuple | None  # class id, score, None (official test rows); for generation references
    idx: int                   # what a submission file calls it
    where: str                 # "file:line", for messages
    output: str = ""           # for generation the text to learn

class Task(NamedTuple):
    """One registry entry; kind is "classify", "regress" or "generate"."""
    name: str
    folder: str                     # below --data-dir, as the official archive names it
    text_a: str                     # template over the columns
    text_b: str | None = None
    labels: tuple = ()              # as the files spell them, in lower case; the class id is the position
    kind: str = "classify"
    metrics: tuple = ("accuracy",)  # the first one is the headline
    label_column: str = "label"
    columns: dict = {}              # field -> column, where a file names it otherwise
    header: tuple = ()              # columns of a train or dev file without a header line
    rows: tuple = ()                # official number of train and dev rows
    files: tuple = ()               # where it is to generate: possible training files, and the scored one
    defaults: dict = {}             # overrides of train.Config

    @property
    def fields(self):
        """The columns that the templates read, each once, in order."""
        return tuple(dict.fromkeys(re.findall(r"{(\w+)}", self.text_a + (self.text_b or ""))))

    def pair(self, example):
        """(text_a, text_b) for an encoder; text_b is None for a single text."""
        return self.text_a.format(**example.fields), self.text_b and self.text_b.format(**example.fields)

    def prompt(self, example):
        """All of the example's text in one string: what the teacher and a decoder read."""
        if self.kind == "generate":
            return ALPACA[bool(example.fields["input"])].format(**example.fields)
        return "\n".join(filter(None, self.pair(example)))

# ---- the registry ------------------------------------------------------------------------------------------
TWO, TRUTH, NLI = ("0", "1"), ("false", "true"), ("entailment", "not_entailment")
NLI3, F1 = ("entailment", "neutral", "contradiction"), ("accuracy", "f1")
# DEVIATION: the authors' code never tokenises text_c ... text_g (COPA's second choice, WiC's word and WSC's
# spans are lost); here whatever column the task needs stands in the template and reaches student and teacher.
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", "{sentence}", None, TWO, metrics=("mcc",), rows=(8551, 1043),
         header=("source", "label", "mark", "sentence")),
    Task("sst2", "SST-2", "{sentence}", None, TWO, rows=(67349, 872)),
    Task("mrpc", "MRPC", "{sentence1}", "{sentence2}", TWO, metrics=F1, rows=(3668, 408),
         columns={"sentence1": "#1 String", "sentence2": "#2 String"}, label_column="Quality"),
    Task("stsb", "STS-B", "{sentence1}", "{sentence2}", kind="regress", metrics=("pearson", "spearman"),
         rows=(5749, 1500), label_column="score"),
    Task("qqp", "QQP", "{question1}", "{question2}", TWO, metrics=F1, rows=(363846, 40430),
         label_column="is_duplicate"),
    Task("mnli", "MNLI", "{sentence1}", "{sentence2}", NLI3, rows=(392702, 9815), label_column="gold_label"),
    Task("qnli", "QNLI", "{question}", "{sentence}", NLI, rows=(104743, 5463)),
    Task("rte", "RTE", "{premise}", "{hypothesis}", NLI, rows=(2490, 277),
         columns={"premise": "sentence1", "hypothesis": "sentence2"}),  # in the tsv form; the jsonl form wins
    Task("wnli", "WNLI", "{sentence1}", "{sentence2}", TWO, rows=(635, 71)),
    Task("boolq", "BoolQ", "{question}", "{passage}", TRUTH, rows=(9427, 3270)),
    Task("cb", "CB", "{premise}", "{hypothesis}", NLI3, metrics=F1, rows=(250, 56)),
    Task("copa", "COPA", "{premise} What was the {question}?", "1: {choice1} 2: {choice2}", TWO,
         rows=(400, 100)),
    Task("wic", "WiC", "{word}: {sentence1}", "{sentence2}", TRUTH, rows=(5428, 638)),
    Task("wsc", "WSC", "{text}", "{span2_text} refers to {span1_text}", TRUTH, rows=(554, 104)),
    Task("objects", "", "{text}", None, ("no", "yes"), defaults={  # from scratch 2e-5 would move nothing
        "student": "tiny", "teacher": "painter", "lr": 4e-3, "epochs": 40, "beta": 20.0, "eval_every": 10}),
)}
# Generation: one training file serves several tasks, a seeded tenth of it is dev, a task's own file is test.
# The Alpaca prompt, as MiniLLM fills it; LLM-Adapters' has the same lines, indented like its code.
ALPACA = [f"Below is an instruction that describes a task{more}. Write a response that appropriately "
          f"completes the request.\n\n### Instruction:\n{{instruction}}\n\n{context}### Response:\n"
          for more, context in (("", ""), (", paired with an input that provides further context",
                                           "### Input:\n{input}\n\n"))]

def _to_generate(group, names, files, metrics, column="answer", **more):
    """Register the tasks of a group, "NAME[:FOLDER]" each; files: possible training files, the scored one."""
    # 3e-4 is LLM-Adapters' for LoRA: 2e-5 would hardly move adapters that start at zero.
    defaults = {"student": "llama-7b", "lora": 8, "epochs": 3, "lr": 3e-4, "max_length": 512, **more}
    root = group.replace("reason", "reasoning")
    for name, _, folder in (each.partition(":") for each in names.split()):
        TASKS[f"{group}/{name}"] = Task(
            f"{group}/{name}", f"{root}/{folder or name}", "{instruction}", "{input}", kind="generate",
            files=files, metrics=metrics, label_column=column, defaults=defaults)

_to_generate("reason", "boolq piqa social_i_qa hellaswag winogrande arc_e:ARC-Easy arc_c:ARC-Challenge "
             "openbookqa", ("train_commonsense.json", "commonsense_15k.json", "test.json"),
             ("accuracy", "answered"), max_new_tokens=32)
_to_generate("reason", "addsub:AddSub multiarith:MultiArith singleeq:SingleEq svamp:SVAMP aqua:AQuA gsm8k",
             ("train_math.json", "math_10k.json", "test.json"), ("accuracy", "answered"))
_to_generate("instruct", "dolly self-inst vicuna s-ni:sinst un-ni:uinst",
             ("dolly/train.jsonl", "valid.jsonl"), ("rouge_l", "rouge_l_unstemmed"), column="output")

# What an answer looks like. The reference tells which of these it is: one training file mixes several.
ANSWERS = ("(?i:true|false)", r"(?i:answer)\d", r"(?i:solution)\d", r"(?i:ending)\d", r"(?i:option)\d",
           "[A-E]", r"(?:(?<![\w)])-)?(?:\d[\d,]*)?\.?\d+")
KEEP = ("question", "word", "span1_text", "span2_text")  # never cut: the rest means nothing without them

# Official archives, each one folder named as Task.folder; MRPC has none. ARMADA_MIRROR=URL is another SITE.
SITE = "https://dl.fbaipublicfiles.com"
ARCHIVES = {name: f"/glue/data/{file}.zip" for name, file in {
    "cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B", "qqp": "QQP-clean", "mnli": "MNLI", "qnli": "QNLIv2",
    "wnli": "WNLI"}.items()} | {name: f"/glue/superglue/data/v2/{TASKS[name].folder}.zip" for name in (
        "boolq", "cb", "copa", "rte", "wic", "wsc")}

def known(name, names, what):
    """`name` itself when it is among `names`; else a UserError that suggests the nearest one."""
    if name not in names:
        near = "".join(f"did you mean {each}? " for each in difflib.get_close_matches(name, names, 1))
        raise UserError(f"unknown {what} {name!r}: {near}known: {', '.join(names)}")
    return name

def find_task(name):
    """The registry entry of a case-insensitive name."""
    return TASKS[known(name.lower(), TASKS, "task")]

# ---- the embedded task: everyday objects, their size in centimetres, colour and shape ----------------------
OBJECTS = {name: (float(size), colour, shape) for name, size, colour, shape in map(str.split, """
ant .5 black disc, seed .6 brown disc, ladybird .8 red disc, pea .9 green disc, bee 1.4 yellow disc,
button 1.6 blue disc, ring 2 yellow disc, coin 2.2 grey disc, grape 2.4 green disc, stamp 3 red box,
snail 3.2 brown disc, walnut 4 brown disc, matchbox 5.5 red box, egg 6 white disc, key 6.5 grey bar,
lemon 8 yellow disc, apple 8.6 red disc, mouse 9 grey disc, orange 9.5 orange disc, mug 11 blue box,
sparrow 15 brown cone, spoon 16 grey bar, pencil 18 yellow bar, banana 19 yellow bar, book 24 red box,
shoe 29 black cone, bottle 31 green bar, laptop 35 grey box, squirrel 38 brown cone, cat 46 black cone,
pillow 60 white box, suitcase 70 black box, dog 75 brown cone, goose 85 white cone, umbrella 90 blue cone,
chair 95 brown box, guitar 100 brown bar, piano 150 black box, bicycle 175 red cone, sofa 200 green box,
door 205 white box, bed 215 pink box, cow 240 white cone, horse 245 brown cone, car 430 red box,
giraffe 520 yellow bar, van 560 white box, elephant 600 grey disc, boat 650 blue cone, truck 900 orange box,
bus 1150 red box, tree 1200 green cone, house 1400 brown cone, lorry 1700 green box, whale 2500 blue disc,
lighthouse 3000 red bar, church 3500 grey cone, aeroplane 4000 white bar, ferry 5200 white box,
bridge 6000 grey bar""".split(","))}
_QUESTIONS = ("is a {} bigger than a {}?", "would a {} be larger than a {}?",
              "does a {} take up more room than a {}?", "a {} or a {}: is the first one bigger?")

def _objects():
    """120 training pairs, two held-out sets; none shared in either order, sizes at least 1 to 1.25 apart."""
    rng = random.Random(4)  # first seed whose training pairs show all objects: a word never read says nothing
    pairs = [(a, b) for a in OBJECTS for b in OBJECTS if OBJECTS[b][0] >= 1.25 * OBJECTS[a][0]]
    rng.shuffle(pairs)
    rows = []
    for i, pair in enumerate(pairs):
        a, b = rng.sample(pair, 2)  # either may be the subject, which all four questions name first
        text = re.sub(r"\ba (?=[aeiou])", "an ", rng.choice(_QUESTIONS).format(a, b))
        rows.append(Example({"text": text}, int(OBJECTS[a][0] > OBJECTS[b][0]), i, f"objects:{i}"))
    return {"train": rows[:120], "dev": rows[120:620], "test": rows[620:]}

# ---- reading the official files, and fetching them ---------------------------------------------------------
def load_task(name, data_dir=None, cache_dir=CACHE):
    """{"train": [Example], "dev": [...], "test": [...]} from official files in data_dir/FOLDER, else fetched
    into cache_dir. Test (and dev_mismatched) may be missing. Raises UserError naming file and line."""
    task = find_task(name)
    if task.name == "objects":
        return _objects()
    folder = (Path(data_dir) if data_dir else download(task, cache_dir)) / task.folder
    if task.kind == "generate":
        *train, scored = [folder.parent / name for name in task.files]
        rows = _read(task, next(filter(Path.exists, train), train[0]), "train")
        if len(rows) < 2:
            raise UserError(f"{train[0]} has one row: a tenth of its rows, at least one, is to be dev")
        dev = set(random.Random(0).sample(range(len(rows)), -(-len(rows) // 10)))
        return {"train": [row for i, row in enumerate(rows) if i not in dev],
                "dev": [rows[i] for i in sorted(dev)], "test": _read(task, folder / scored.name, "test")}
    form, names = "tsv", {"dev": "dev_matched", "test": "test_matched"} if task.name == "mnli" else {}
    if (folder / "train.jsonl").exists():
        form, names = "jsonl", {"dev": "val"}
    paths = {split: folder / f"{names.get(split, split)}.{form}"
             for split in ("train", "dev", "dev_mismatched", "test", "test_mismatched")}
    splits = {split: _read(task, path, split) for split, path in paths.items()
              if split in ("train", "dev") or path.exists()}
    if not data_dir and (found := (len(splits["train"]), len(splits["dev"]))) != task.rows:
        raise UserError(f"{folder} has {found} rows in train and dev, not {task.rows}: delete it to refetch")
    return splits

def _read(task, path, split):
    """The Examples of one official jsonl or tsv file."""
    columns = () if split.startswith("test") else task.header  # CoLA's test file has a header line
    examples = []
    try:
        # utf-8-sig drops MRPC's byte-order mark; newline="\n" keeps a stray \r from splitting a row.
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            where = str(path)
            if path.suffix == ".json" and not isinstance(file := json.load(file), list):
                raise UserError(f"{path} is not a list of JSON objects: the file may be cut; fetch it again")
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if path.suffix == ".json":  # one list; the number is the item's
                    row = line
                elif path.suffix == ".jsonl":
                    row = json.loads(line)
                elif not columns:
                    columns = line.rstrip("\r\n").split("\t")
                    continue
                elif len(values := line.rstrip("\r\n").split("\t")) != len(columns):
                    raise UserError(f"{where} has {len(values)} columns, not {len(columns)}: "
                                    f"{', '.join(columns)}")
                else:  # GLUE's tsv is not quoted: a " is part of the text; a csv reader would swallow lines
                    row = dict(zip(columns, values))
                examples.append(_example(task, row, split, len(examples), where))
    except FileNotFoundError:
        more = ", or leave it out to download them" if task.name in ARCHIVES else ""
        folder = task.folder.split("/")[0]  # of reasoning/ARC-Easy reasoning, where the training file lies
        raise UserError(f"{path} is missing: give --data-dir the folder that holds {folder}/ with the "
                        f"official files{more}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}): the file may be cut; fetch it again") from None
    if not examples:
        raise UserError(f"{path} has no rows: fetch it again")
    return examples

def _example(task, row, split, number, where):
    """A file's row -> Example: texts word for word, the label checked against the registry."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: the file may be cut; fetch it again")
    if task.name == "wsc":
        row = _mark_spans(row, where)
    if task.kind == "generate":
        row = {"input": "", **row}  # vicuna has no such column
    fields = {}
    for name in task.fields:
        names = dict.fromkeys((name, task.columns.get(name, name)))
        fields[name] = next((row[each] for each in names if each in row), None)
        if not isinstance(fields[name], str):
            raise UserError(f"{where} has no text {' or '.join(map(repr, names))}: found {', '.join(row)}")
    raw, label = row.get(task.label_column), None
    if task.kind == "generate":
        # s-ni has several references, a list.
        texts, answers = ([*text] if isinstance(text, list) else [text] for text in (row.get("output"), raw))
        if not texts or not answers or not all(isinstance(text, str) for text in texts + answers):
            raise UserError(f"{where} has no text 'output' or {task.label_column!r}: found {', '.join(row)}")
        if task.label_column == "answer" and not any(re.fullmatch(like, answers[0]) for like in ANSWERS):
            raise UserError(f"{where} has the answer {raw!r}: expected true, answer1 ..., A ... or a number")
        return Example(fields, tuple(answers), number, where, texts[0])
    if raw is not None or not split.startswith("test"):
        try:  # a class is spelled in lower case, and JSON's true and 1 are "true" and "1"
            label = float(raw) if task.kind == "regress" else task.labels.index(str(raw).lower())
        except (TypeError, ValueError):
            label = -1
        if not 0 <= label <= 5:  # a class id is found or -1; a score is out of range or nan
            wanted = f"one of {', '.join(task.labels)}" if task.labels else "a number from 0 to 5"
            raise UserError(f"{where} has the label {raw!r} in column {task.label_column}: expected {wanted}")
    return Example(fields, label, row["idx"] if isinstance(row.get("idx"), int) else number, where)

def _mark_spans(row, where):
    """WSC: [ ] around the noun, * * around the pronoun, in place. Indices count words between white space."""
    try:
        target, words, spaces = row["target"], row["text"].split(), re.split(r"\S+", row["text"])
        for span, left, right in (("span1", "[", "]"), ("span2", "*", "*")):
            first, count = target[span + "_index"], len(target[span + "_text"].split())
            words[first] = left + words[first]
            words[first + count - 1] += right
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{where} has no text with two spans (text, target.span1_index ...)") from None
    text = "".join(space + word for space, word in zip(spaces, [*words, ""]))
    return {**row, **target, "text": text}

def retry(ask, what, secret=None, pauses=(1, 2, 4, 8, 16)):
    """ask(), and again after growing pauses (or as Retry-After says) where that may help: 429, 5xx, a line
    that breaks or stalls, an answer that is cut. Else a UserError, in which `secret` is blotted out."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"--offline, but there is no copy here of {what}")
    for pause in (*pauses, None):
        try:
            return ask()
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason} "
            with contextlib.suppress(Exception):  # its text may be cut or stall as well
                why += error.read(9999).decode(errors="replace")
            wait = int(said) if (said := error.headers.get("Retry-After", "")).isdigit() else 0
            if error.code < 500 and error.code != 429 or wait > 600:
                break
        except Exception as error:  # no or half an answer, or not what was asked for
            why, wait = f"{type(error).__name__} {getattr(error, 'reason', error)}", 0
        if pause is not None:
            time.sleep(max(pause, wait))
    raise UserError(f"could not fetch {what}: {' '.join(why.split())}".replace(secret or "\0", "***")[:900])

def _transfer(url, part):
    """The file at url into part, where a broken transfer is taken up again."""
    from tqdm import tqdm
    have = max(0, part.stat().st_size - 1) if part.exists() else 0  # a byte again: none would be an error 416
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=20) as answer, open(part, "ab") as file:
        file.truncate(have if answer.status == 206 else 0)
        size = file.seek(0, os.SEEK_END) + int(answer.headers["Content-Length"] or 0)
        with tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar:
            while block := answer.read(1 << 16):
                bar.update(file.write(block))
        if file.tell() < size:
            raise OSError(f"{file.tell()} of {size} bytes came")

def download(task, cache_dir):
    """The folder that holds task.folder, fetched and unpacked once; a second process waits for the first."""
    from filelock import FileLock
    data_dir = Path(cache_dir) / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f"{task.folder}.lock"), tempfile.TemporaryDirectory(dir=data_dir) as scratch:
        if (data_dir / task.folder).is_dir():
            return data_dir
        hint = f"put {task.folder}/ with the official files into FOLDER and give --data-dir FOLDER"
        if task.name not in ARCHIVES:
            raise UserError(f"task {task.name} has no official archive: {hint}")
        url = (os.environ.get("ARMADA_MIRROR") or SITE).rstrip("/") + ARCHIVES[task.name]
        print(f"downloading {url}", flush=True)
        part = data_dir / f"{task.folder}.zip.part"
        retry(lambda: _transfer(url, part), f"{url} (or {hint})", pauses=(1, 2, 4))
        part.rename(f"{scratch}/zip")
        try:
            with zipfile.ZipFile(f"{scratch}/zip") as archive:  # which checks a sum of every member
                for name in archive.namelist():
                    if name.startswith(("/", "\\")) or ".." in Path(name).parts:
                        raise ValueError(f"its member {name} would leave the folder")
                archive.extractall(scratch)
            os.rename(f"{scratch}/{task.folder}", data_dir / task.folder)  # atomic: one file system
        except Exception as error:  # of many kinds, from zipfile, zlib and the file system
            raise UserError(f"{url} sent damaged files ({error}): try again, or {hint}") from None
    return data_dir

# ---- from examples to batches ------------------------------------------------------------------------------
def encode(task, examples, tokenizer, max_length, decoder, max_new_tokens=0):
    """Tokenise once, before training: ([{"input_ids": [...], ...} per example], how many were shortened).
    A text over max_length tokens has its longest FIELD shortened before the template is filled. Cutting the
    filled text instead would drop the hypothesis behind a long premise, or the question. To generate,
    input_ids is prompt, output and end-of-text; labels is the same with -100, "no loss", for the prompt. Of
    the length max_new_tokens are the output's: what is read of a prompt must not depend on its answer."""
    # A decoder that is handed token_type_ids (GPT-2) adds them as if they were words.
    wanted = ("input_ids",) if decoder else ("input_ids", "token_type_ids")
    def tokens(chunk):
        a, b = zip(*((task.prompt(each), None) if decoder else task.pair(each) for each in chunk))
        found = tokenizer(list(a), list(b) if any(b) else None, verbose=False)
        return [{key: found[key][i] for key in wanted if key in found} for i in range(len(chunk))]

    generates = task.kind == "generate"
    room = max_length - (max_new_tokens if generates else 0)
    rows = [row for i in range(0, len(examples), 1000) for row in tokens(examples[i:i + 1000])]
    shortened = {i for i, row in enumerate(rows) if len(row["input_ids"]) > room}
    for i, example in enumerate(examples):
        while (over := len(rows[i]["input_ids"]) - room) > 0:
            example = _shorten(example, tokenizer, max_length, over)
            rows[i] = tokens([example])[0]
        if generates:  # tokenised apart: generation then starts from exactly the tokens that training saw
            output = tokenizer(example.output, add_special_tokens=False, verbose=False)["input_ids"]
            shortened |= {i} if len(output) >= max_new_tokens else set()
            output, prompt = [*output, tokenizer.eos_token_id][:max_new_tokens], rows[i]["input_ids"]
            rows[i] = {"input_ids": prompt + output, "labels": [-100] * len(prompt) + output}
    return rows, len(shortened)

def answer_bags(task, examples, tokenizer):
    """The token ids of each example's label, [[...], ...]: of its answer, where the task has one, else of the
    whole output. The answer is looked up IN the output, since " answer2" and "answer2" are other tokens; if
    it is not there, the bag is empty and asks for nothing."""
    bags = []
    for example in examples:
        text = example.output
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = [(0, len(text))]
        if task.label_column == "answer":
            answer = re.escape(re.sub(r"\.0+$", "", example.label[0]))  # 72.0 is written 72
            pattern = rf"(?<![\w.,-]){answer}(?!\w|[.,]\d)"  # and not within 1,72 or 172
            spans = [(0, 0), *(found.span() for found in re.finditer(pattern, text))]
        first, last = spans[-1]
        bags.append([token for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"])
                     if start < last and end > first])
    return bags

def answer_vocabulary(bags, size=1000):
    """V_a: the `size` most frequent tokens of the training set's bags, the most frequent first."""
    return [token for token, _ in Counter(itertools.chain.from_iterable(bags)).most_common(size)]

def bag_labels(bags, vocabulary):
    """y_v = count_v / sum over V_a of count_v: float32 (N, |V_a|). A row is a distribution; where no token of
    the answer is in V_a it is zero, which soft cross entropy ignores."""
    import torch
    column, y = {token: i for i, token in enumerate(vocabulary)}, torch.zeros(len(bags), len(vocabulary))
    for row, bag in zip(y.numpy(), bags):
        for token in filter(column.__contains__, bag):
            row[column[token]] += 1
    return y / y.sum(1, keepdim=True).clamp(min=1)

def _shorten(example, tokenizer, max_length, over):
    """The example with its longest field cut between two tokens, by at most the `over` tokens too many."""
    spans = {name: tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
             ["offset_mapping"] for name, text in example.fields.items() if name not in KEEP}
    second, longest = sorted([0, *map(len, spans.values())])[-2:]
    if longest == 0:
        raise UserError(f"--max-length {max_length} is too small for {example.where}: with nothing left "
                        f"to shorten it takes {max_length + over} tokens")
    # Down to the second longest, or, where the two are about equal, half of the excess from this one.
    keep = max(0, longest - over, min(second, longest - (over + 1) // 2))
    name = max(spans, key=lambda name: len(spans[name]))
    # Cut where a token STARTS: several may share one character (an emoji's bytes), and cutting before the
    # first of them always removes something, while cutting at an end may not.
    shorter = example.fields[name][:spans[name][keep][0]].rstrip()
    return example._replace(fields={**example.fields, name: shorter})

def seed_of(*parts):
    """A 64-bit seed from (seed, role, epoch, step, ...). Every step starts from its own: no generator state
    has to be saved, a resumed run repeats the draws exactly, and the arms share them."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")

def length_grouped_batches(lengths, batch_size, seed):
    """[[row, ...], ...], every row once: similar lengths together, yet random, and no two epochs alike."""
    rng, order, step = random.Random(seed), list(range(len(lengths))), 16 * batch_size
    rng.shuffle(order)
    pools = [sorted(order[i:i + step], key=lengths.__getitem__) for i in range(0, len(order), step)]
    batches = [pool[i:i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches

def collate(rows, pad_id, side="right"):
    """Rows -> {"input_ids", "attention_mask"[, "token_type_ids"][, "labels"]}, int64 (B, L), L the longest
    row HERE, padded on one side."""
    import torch
    width = max(len(row["input_ids"]) for row in rows)
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    def padded(values, filler):
        padding = [filler] * (width - len(values))
        return padding + values if side == "left" else values + padding

    fillers = {"input_ids": pad_id, "labels": -100}
    return {key: torch.tensor([padded(row[key], fillers.get(key, 0)) for row in rows]) for key in rows[0]}

# ---- a hub id or a folder, checked before anything is loaded ----
# DEVIATION: the authors' `nlayers 6` cuts every student to six layers; here only bert-6l is cut.
SHORT_NAMES = {"bert-base": "google-bert/bert-base-uncased", "bert-6l": "google-bert/bert-base-uncased",
               "deberta-v2-xxlarge": "microsoft/deberta-v2-xxlarge", "opt-125m": "facebook/opt-125m",
               "opt-1.3b": "facebook/opt-1.3b", "llama-3b": "meta-llama/Llama-3.2-3B",
               "llama-7b": "huggyllama/llama-7b", "llama-8b": "meta-llama/Llama-3.1-8B"}

@functools.cache
def check_available(name, file="config.json"):
    """from_pretrained arguments for a short name, hub id or folder; UserError in seconds, before any weight.
    Left alone, transformers retries an unreachable hub for half a minute; we ask once, for the config."""
    import huggingface_hub as hub
    repo = str(Path(name).resolve()) if Path(name).is_dir() else SHORT_NAMES.get(name, name)
    how = {"pretrained_model_name_or_path": repo}
    if Path(repo, file).is_file():
        return how
    if Path(repo).is_dir():
        raise UserError(f"{name} holds no {file}: give a folder that save_pretrained wrote (a LoRA's: "
                        "load_student(...).merge().save(...) first)")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=5)
        return how
    except hub.errors.GatedRepoError:
        why = f"gated: accept its licence at {hub.constants.ENDPOINT}/{repo} and set HF_TOKEN"
    except (hub.errors.HFValidationError, hub.errors.RepositoryNotFoundError, hub.errors.EntryNotFoundError):
        why = f"no folder here, no public model (private: HF_TOKEN); known: tiny, {', '.join(SHORT_NAMES)}"
    except Exception as error:  # no network, a proxy, a time-out, HF_HUB_OFFLINE; the hub's cache may have it
        if isinstance(hub.try_to_load_from_cache(repo, file), str):
            return how | {"local_files_only": True}
        why = f"{' '.join(str(error).split())[:100]}; connect, or give the folder of an `hf download {repo}`"
    near = difflib.get_close_matches(name, [*SHORT_NAMES, "tiny"], 1) if repo == name else []
    raise UserError(f"could not fetch {repo}: {why}" + "".join(f"; did you mean {short}?" for short in near))

@contextlib.contextmanager
def explain_loading(name):
    """Whatever transformers raises while it loads `name` becomes a UserError of one line."""
    from safetensors import SafetensorError
    try:
        yield
    except UserError:
        raise
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        missing = re.search("entencepiece|tiktoken", str(error))  # transformers names the wrong package
        more = "; pip install sentencepiece protobuf" if missing else ""
        raise UserError(f"could not load {name}: {' '.join(str(error).split())[:300]}{more}") from None

def load_tokenizer(name, how):
    """The tokenizer of a model, with a pad token; `how` is what check_available(name) returned."""
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(**how, padding_side="right")
    # Without its files transformers invents an empty tokenizer, to which every text is the same.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{name} has no tokenizer files: copy tokenizer.json (or the vocabulary) into it")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token  # LLaMA: none
    return tokenizer
