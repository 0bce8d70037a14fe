"""Tasks, and the batches made of them: a task is ONE entry of the registry TASKS.

Every field of an example reaches student and teacher; its label reaches neither.

    splits = load_task("rte", "data")        # {"train": [Example, ...], "dev": [...], ...}
    TASKS["rte"].pair(splits["train"][0])    # (text_a, text_b): what an encoder reads
    TASKS["rte"].prompt(splits["train"][0])  # one text: what the teacher and a decoder read

Shapes: B rows in a batch, L tokens in its longest row, N examples, V_a the answer vocabulary.
Only the standard library is imported at the top, so that `python train.py --help` answers at once.
"""
import argparse
import contextlib
import difflib
import email.utils
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Example(NamedTuple):
    """One row of a data file. Student and teacher read its fields, never its label."""

    fields: dict  # the texts of one row, as they stand in the file
    label: int | float | tuple | None  # class id, score, None (official test rows); or references
    idx: int | str  # what a submission file calls it
    where: str  # "file:line", for messages
    output: str = ""  # for generation the text to learn


# By a task's kind, what stands for the label of an example that takes part without one.
NO_LABEL = {"classify": -100, "regress": math.nan, "generate": ()}


class Task(NamedTuple):
    """One registry entry; kind is "classify", "regress" or "generate"."""

    name: str
    folder: str                     # below --data-dir, as the official archive names it
    text_a: str                     # template over the columns
    text_b: str | None = None
    labels: tuple = ()              # in lower case; the class id is the position
    kind: str = "classify"
    metrics: tuple = ("accuracy",)  # the first one is the headline
    label_column: str = "label"
    columns: dict = {}              # field -> column, where a file names it otherwise
    header: tuple = ()              # columns of a train or dev file without a header line
    rows: tuple = ()                # official number of train and dev rows
    files: tuple = ()               # for generation: possible training files, then the scored one
    frame: tuple = ()               # prompts without and with an input; () is the texts alone
    defaults: dict = {}             # overrides of train.Config

    @property
    def fields(self):
        """The columns that the templates read, each once, in order."""
        templates = self.text_a + (self.text_b or "")
        return tuple(dict.fromkeys(re.findall(r"{(\w+)}", templates)))

    def pair(self, example):
        """Return (text_a, text_b) for an encoder; text_b is None for a single text."""
        text_a = self.text_a.format(**example.fields)
        if self.text_b is None:
            return text_a, None
        return text_a, self.text_b.format(**example.fields)

    def prompt(self, example):
        """Return all of the example's text in one string: what the teacher and a decoder read."""
        if self.frame:
            has_input = bool(example.fields["input"])
            return self.frame[has_input].format(**example.fields)
        return "\n".join(filter(None, self.pair(example)))


# ---- the registry ----

TWO = ("0", "1")
TRUTH = ("false", "true")
NLI = ("entailment", "not_entailment")
NLI3 = ("entailment", "neutral", "contradiction")
F1 = ("accuracy", "f1")

# DEVIATION: the authors' code never tokenises text_c ... text_g (COPA's second choice, WiC's word
# and WSC's spans are lost); here whatever column the task needs stands in the template and reaches
# student and teacher.
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", "{sentence}", None, TWO, metrics=("mcc",), rows=(8551, 1043),
         header=("source", "label", "mark", "sentence")),
    Task("sst2", "SST-2", "{sentence}", None, TWO, rows=(67349, 872)),
    Task("mrpc", "MRPC", "{sentence1}", "{sentence2}", TWO, metrics=F1, rows=(3668, 408),
         columns={"sentence1": "#1 String", "sentence2": "#2 String"}, label_column="Quality"),
    Task("stsb", "STS-B", "{sentence1}", "{sentence2}", kind="regress",
         metrics=("pearson", "spearman"), rows=(5749, 1500), label_column="score"),
    Task("qqp", "QQP", "{question1}", "{question2}", TWO, metrics=F1, rows=(363846, 40430),
         label_column="is_duplicate"),
    Task("mnli", "MNLI", "{sentence1}", "{sentence2}", NLI3, rows=(392702, 9815),
         label_column="gold_label"),
    Task("qnli", "QNLI", "{question}", "{sentence}", NLI, rows=(104743, 5463)),
    Task("rte", "RTE", "{premise}", "{hypothesis}", NLI, rows=(2490, 277),
         # in the tsv form; the jsonl form wins
         columns={"premise": "sentence1", "hypothesis": "sentence2"}),
    Task("wnli", "WNLI", "{sentence1}", "{sentence2}", TWO, rows=(635, 71)),
    Task("boolq", "BoolQ", "{question}", "{passage}", TRUTH, rows=(9427, 3270)),
    Task("cb", "CB", "{premise}", "{hypothesis}", NLI3, metrics=F1, rows=(250, 56)),
    Task("copa", "COPA", "{premise} What was the {question}?", "1: {choice1} 2: {choice2}", TWO,
         rows=(400, 100)),
    Task("wic", "WiC", "{word}: {sentence1}", "{sentence2}", TRUTH, rows=(5428, 638)),
    Task("wsc", "WSC", "{text}", "{span2_text} refers to {span1_text}", TRUTH, rows=(554, 104)),
    Task("objects", "", "{text}", None, ("no", "yes"), defaults={
        # from scratch 2e-5 would move nothing
        "student": "tiny", "teacher": "painter", "lr": 4e-3, "epochs": 40, "beta": 20.0,
        "eval_every": 10, "limit": 120}),
)}

# The Alpaca prompt without and with an input, as MiniLLM fills it; LLM-Adapters' has the same
# lines, indented like its code.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Response:\n",
    "Below is an instruction that describes a task, "
    "paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n"
    "### Response:\n",
)


# What all tasks that generate override in train.Config. Flattened at T = 5 a bag of tokens may be
# nearly the same for every text. Its KL would count T^2 = 25 times, and say nothing.
GENERATION = {"temperature": 1.0}


def register_generation(group, root, names, files, metrics, label_column="answer", **defaults):
    """Add the generation tasks of one group to TASKS.

    names: "NAME[:FOLDER]" of each task, with the FOLDER below `root` where it is not called NAME.
    files: the possible training files below `root`, which serve all tasks of the group (a seeded
    tenth is dev), and last the scored file (test), which lies in the task's own folder.
    defaults: what these tasks override in train.Config, beyond what all generation tasks do.
    """
    # 3e-4 is LLM-Adapters' for LoRA: 2e-5 would hardly move adapters that start at zero.
    shared = {"student": "llama-7b", "lora": 8, "epochs": 3, "lr": 3e-4, "max_length": 512,
              **GENERATION}
    for entry in names.split():
        name, _, folder = entry.partition(":")
        TASKS[f"{group}/{name}"] = Task(
            name=f"{group}/{name}",
            folder=f"{root}/{folder or name}",
            text_a="{instruction}",
            text_b="{input}",
            kind="generate",
            metrics=metrics,
            label_column=label_column,
            files=files,
            frame=ALPACA,
            defaults={**shared, **defaults},
        )


register_generation(
    "reason", "reasoning",
    "boolq piqa social_i_qa hellaswag winogrande arc_e:ARC-Easy arc_c:ARC-Challenge openbookqa",
    files=("train_commonsense.json", "commonsense_15k.json", "test.json"),
    metrics=("accuracy", "answered"),
    max_new_tokens=32,
)
register_generation(
    "reason", "reasoning",
    "addsub:AddSub multiarith:MultiArith singleeq:SingleEq svamp:SVAMP aqua:AQuA gsm8k",
    files=("train_math.json", "math_10k.json", "test.json"),
    metrics=("accuracy", "answered"),
)
register_generation(
    "instruct", "instruct",
    "dolly self-inst vicuna s-ni:sinst un-ni:uinst",
    files=("dolly/train.jsonl", "valid.jsonl"),
    metrics=("rouge_l", "rouge_l_unstemmed"),
    label_column="output",
)

# The questions of `objects`, answered in words by a decoder. Its bags are those of whole outputs,
# not of "true" or "false" alone: a picture also tells which object is the bigger one. To write 500
# answers takes as long as four epochs, so it is done once, at the end.
TASKS["say/objects"] = TASKS["objects"]._replace(
    name="say/objects",
    labels=(),
    kind="generate",
    metrics=("accuracy", "answered"),
    defaults={
        **TASKS["objects"].defaults, **GENERATION, "max_length": 64, "max_new_tokens": 16,
        "eval_every": 40, "arms": "undistilled,armada,shuffled", "seeds": "0,1,2,3,4,5,6"},
)

# The minus sign, and the hyphens and the short dash that are typed or printed for it.
MINUS = "[\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d]"

# What an answer looks like. The reference tells which of these it is, since one training file
# mixes several.
ANSWERS = (
    "(?i:true|false)",
    r"(?i:answer)\d",
    r"(?i:solution)\d",
    r"(?i:ending)\d",
    r"(?i:option)\d",
    "[A-E]",
    # A number, such as 7, -0.5 or 1,234; the minus of 3-2 is no part of it.
    r"(?:(?<![\w)])-)?(?:\d[\d,]*)?\.?\d+",
)

# ---- from examples to batches ----

# Fields that are never cut: the rest means nothing without them.
KEEP = ("question", "word", "span1_text", "span2_text")


def encode(task, examples, tokenizer, max_length, decoder, max_new_tokens=0):
    """Tokenise examples once, before training.

    Returns ([{"input_ids": [...], ...} per example], how many of them were shortened).
    A text over max_length tokens has its longest FIELD shortened before the template is filled.
    To cut the filled text instead would drop the hypothesis behind a long premise, or the question.
    To generate, input_ids is prompt, output and end-of-text; labels is the same with -100 ("no
    loss") for the prompt, which is all there is of an example without a label. Of max_length,
    max_new_tokens are the output's even if it is shorter: what is read of a prompt must not depend
    on its answer.
    Raises UserError where max_length is too small for what may not be cut, and for a text of no
    token, of which there is nothing to pool.
    """
    generates = task.kind == "generate"
    room = max_length
    if generates:
        room -= max_new_tokens
    rows = []
    for start in range(0, len(examples), 1000):  # in chunks, which are faster than single texts
        rows += tokenise(task, examples[start:start + 1000], tokenizer, decoder)
    shortened = 0
    for i, example in enumerate(examples):
        if not rows[i]["input_ids"]:
            raise UserError(f"{example.where} holds no token of this student's: write a text, or "
                            "leave the row out")
        was_cut = False
        while len(rows[i]["input_ids"]) > room:
            excess = len(rows[i]["input_ids"]) - room
            example = cut_longest_field(example, tokenizer, max_length, excess)
            rows[i] = tokenise(task, [example], tokenizer, decoder)[0]
            was_cut = True
        if generates and example.label == NO_LABEL["generate"]:
            rows[i]["labels"] = [-100] * len(rows[i]["input_ids"])
        elif generates:
            rows[i], output_was_cut = append_output(
                rows[i], example.output, tokenizer, max_new_tokens)
            was_cut = was_cut or output_was_cut
        shortened += was_cut
    return rows, shortened


def without_label(task, example):
    """Return an example as a text alone, without its label and the answer to learn."""
    return example._replace(label=NO_LABEL[task.kind], output="")


def tokenise(task, examples, tokenizer, decoder):
    """Return {"input_ids"[, "token_type_ids"]}, lists of any length, for each example."""
    # A decoder that is handed token_type_ids (GPT-2) adds them as if they were words.
    if decoder:
        wanted = ("input_ids",)
        texts = [task.prompt(example) for example in examples]
        encoded = tokenizer(texts, verbose=False)
    else:
        wanted = ("input_ids", "token_type_ids")
        pairs = [task.pair(example) for example in examples]
        firsts = [text_a for text_a, _ in pairs]
        seconds = [text_b for _, text_b in pairs]
        if not any(seconds):  # a task of single texts
            seconds = None
        encoded = tokenizer(firsts, seconds, verbose=False)
    keys = [key for key in wanted if key in encoded]
    rows = [{key: encoded[key][i] for key in keys} for i in range(len(examples))]
    if task.kind == "generate":
        for row in rows:
            # Some tokenizers append end-of-text, behind which no answer would start.
            if row["input_ids"][-1:] == [tokenizer.eos_token_id]:
                row["input_ids"].pop()
    return rows


def cut_longest_field(example, tokenizer, max_length, excess):
    """Return the example with its longest field cut between two tokens, by at most `excess` tokens.

    Raises UserError, which says how many tokens are needed, where nothing is left to cut.
    """
    spans = {}  # field -> [(first character, end) of each token]
    for name, text in example.fields.items():
        if name not in KEEP:
            spans[name] = token_spans(tokenizer, text)["offset_mapping"]
    second, longest = sorted([0, 0, *map(len, spans.values())])[-2:]
    if longest == 0:
        raise UserError(f"--max-length {max_length} is too small for {example.where}: with nothing "
                        f"left to shorten it takes {max_length + excess} tokens")
    # Down to the second longest, or, where the two are about equal, half of the excess from this.
    half = math.ceil(excess / 2)
    keep = max(0, longest - excess, min(second, longest - half))
    name = max(spans, key=lambda field: len(spans[field]))
    # Cut where a token STARTS: several may share one character (an emoji's bytes), and cutting
    # before the first of them always removes something, while cutting at an end may not.
    end = spans[name][keep][0]
    shorter = example.fields[name][:end].rstrip()
    return example._replace(fields={**example.fields, name: shorter})


def token_spans(tokenizer, text):
    """Return {"input_ids", "offset_mapping"}: of each token its id and (first character, end).

    Raises UserError for a tokenizer that is written in Python alone, which knows no places.
    """
    if not tokenizer.is_fast:
        raise UserError("this student's tokenizer does not tell where in a text its tokens stand, "
                        "which shortening and answers need: raise --max-length, or give a student "
                        "with a tokenizer.json")
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def append_output(row, output, tokenizer, max_new_tokens):
    """Return (a prompt's row with output and labels added, whether the output was cut)."""
    # Tokenised apart from the prompt, so that generation starts from exactly the tokens that
    # training saw.
    learnt = tokenizer(output, add_special_tokens=False, verbose=False)["input_ids"]
    was_cut = len(learnt) >= max_new_tokens  # of equal length, it loses the end-of-text
    learnt = [*learnt, tokenizer.eos_token_id][:max_new_tokens]
    prompt = row["input_ids"]
    labels = [-100] * len(prompt) + learnt
    return {"input_ids": prompt + learnt, "labels": labels}, was_cut


def answer_bags(task, examples, tokenizer):
    """Return the token ids of each example's label, [[...], ...].

    They are those of its answer, where the files have a column for one, else of the whole output.
    The answer is looked up IN the output, since " answer2" and "answer2" are other tokens; if it
    is not there, the bag is empty and asks for nothing.
    """
    bags = []
    for example in examples:
        encoded = token_spans(tokenizer, example.output)
        first, last = answer_span(task, example)
        bag = []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            if start < last and end > first:
                bag.append(token)
        bags.append(bag)
    return bags


def answer_span(task, example):
    """Return (first character, end) of a bag's part of example.output, or (0, 0) for none."""
    if task.label_column != "answer":
        return 0, len(example.output)
    text = re.sub(MINUS, "-", example.output)  # as in the answers; every character stays in place
    for accepted in example.label:
        answer = re.escape(re.sub(r"\.0+$", "", accepted))  # 72.0 is written 72
        pattern = rf"(?<![\w.,-]){answer}(?!\w|[.,]\d)"  # and not within 1,72 or 172
        matches = list(re.finditer(pattern, text))
        if matches:
            return matches[-1].span()  # the reasoning before it may name the same number
    return 0, 0


def answer_vocabulary(bags, size=1000):
    """Return V_a, the `size` most frequent tokens of the training set's bags, in this order."""
    counts = Counter(itertools.chain.from_iterable(bags))
    return [token for token, _ in counts.most_common(size)]


def bag_labels(bags, vocabulary):
    """y_v = count_v / sum over V_a of count_v, as float32 (N, |V_a|).

    A row is a distribution; where no token of the answer is in V_a it is zero, which soft cross
    entropy ignores.
    """
    import torch

    column = {token: i for i, token in enumerate(vocabulary)}
    y = torch.zeros(len(bags), len(vocabulary))  # (N, |V_a|)
    # The array shares y's memory; torch would take microseconds to count up a single element.
    counts = y.numpy()  # (N, |V_a|)
    for i, bag in enumerate(bags):
        for token in bag:
            if token in column:
                counts[i, column[token]] += 1
    return y / y.sum(1, keepdim=True).clamp(min=1)  # (N, |V_a|)


def seed_of(*parts):
    """Return a 64-bit seed made of (seed, role, epoch, step, ...).

    Every step starts from its own: no generator state has to be saved, a resumed run repeats the
    draws exactly, and the arms share them.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def length_grouped_batches(lengths, batch_size, seed):
    """Return [[row, ...], ...] with every row once: similar lengths together, yet random.

    Rows are shuffled, sorted by length within pools of 16 batches, and the batches shuffled again.
    Only one batch is short, and another seed (an epoch has its own) gives other batches.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool_size = 16 * batch_size
    batches = []
    for pool_start in range(0, len(order), pool_size):
        pool = sorted(order[pool_start:pool_start + pool_size], key=lengths.__getitem__)
        for start in range(0, len(pool), batch_size):
            batches.append(pool[start:start + batch_size])
    rng.shuffle(batches)
    return batches


def collate(rows, pad_id, side="right", length=None):
    """Return {"input_ids", "attention_mask"[, "token_type_ids"][, "labels"]}, each int64 (B, L).

    L is `length`, or else the longest row HERE, not --max-length; shorter rows are padded on one
    side.
    """
    import torch

    length = length or max(len(row["input_ids"]) for row in rows)
    fillers = {"input_ids": pad_id, "labels": -100}  # 0 for the others

    def padded(values, filler):
        padding = [filler] * (length - len(values))
        if side == "left":
            return padding + values
        return values + padding

    batch = {}
    for key in rows[0]:
        filler = fillers.get(key, 0)
        batch[key] = torch.tensor([padded(row[key], filler) for row in rows])  # (B, L)
    masks = [padded([1] * len(row["input_ids"]), 0) for row in rows]
    batch["attention_mask"] = torch.tensor(masks)  # (B, L)
    return batch


# ---- the method ends here; below is bookkeeping ----

CACHE = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armada")


# ---- messages ----


class UserError(ValueError):
    """What the person at the keyboard can mend: one line, what was found and what to type."""

    def __init__(self, message):
        super().__init__(one_line(str(message)))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the nearest flag."""

    def error(self, message):
        hint = f" (see python {self.prog} --help)"
        unknown_flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown_flag:
            near = nearest(unknown_flag[1], self._option_string_actions)
            if near:
                hint = f": did you mean {near}?"
        exit_with_message(2, f"{self.prog}: error: {message}{hint}")


STOPPED = 130  # the exit status after Ctrl-C: 128 + SIGINT, as every shell has it


def exit_with_message(status, message):
    """End the program with this exit status and one line on stderr.

    Processes that torchrun started find the same mistake at the same moment. All but the first
    wait a little, and torchrun ends them, once rank 0 has told it, before they tell it again.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    print(one_line(message), file=sys.stderr)
    sys.exit(status)


def prepare_console():
    """Let stdout show ? for what its encoding lacks; every main() calls this first.

    Otherwise a sign of the last table would end a run of hours with a traceback where the locale
    is ASCII. Python's own stderr never fails: it shows such characters escaped.
    """
    if hasattr(sys.stdout, "reconfigure"):  # what stands in for it may have no encoding
        sys.stdout.reconfigure(errors="replace")


def nearest(name, names):
    """Return the one of `names` that is spelled most like `name`, or None if none is close."""
    matches = difflib.get_close_matches(name, names, 1)
    if matches:
        return matches[0]
    return None


def one_line(text, most=1000):
    """Return the text as one line of at most `most` characters, all of which can be printed.

    A file's or a server's name may hold new lines and terminal escapes, which are shown escaped
    (\\n, \\x1b). Of a long text the middle goes, since what to type instead stands at the end.
    """
    line = "".join(map(show_character, text.strip()))
    if len(line) <= most:
        return line
    mark = " ... "
    tail_room = most // 3
    head_room = most - tail_room - len(mark)
    head = line[:head_room + 1].rpartition(" ")[0]
    # Of a long text without blanks (JSON) too little would be left: it is cut in mid-word.
    if len(head) < head_room // 2:
        head = line[:head_room]
    tail = line[-tail_room - 1:].partition(" ")[2]
    if len(tail) < tail_room // 2:
        tail = line[-tail_room:]
    return head + mark + tail


def show_character(character):
    """Return the character, or its escape where a console would obey it or could not show it."""
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def shorten_text(text, limit):
    """Return what a server or a library wrote, perhaps in paragraphs, on one short line."""
    return one_line(" ".join(text.split()), limit)


def known(name, names, what):
    """Return `name` if it is among `names`; else raise a UserError that suggests the nearest."""
    if name in names:
        return name
    hint = ""
    near = nearest(name, names)
    if near:
        hint = f"did you mean {near}? "
    raise UserError(f"unknown {what} {name!r}: {hint}known: {', '.join(names)}")


def find_task(name):
    """Return the registry entry of a case-insensitive name; UserError if there is no sound one."""
    names = {task_name.lower(): task_name for task_name in TASKS}
    task = TASKS[names[known(name.lower(), names, "task")]]
    check_task(task)
    return task


METRICS = ("accuracy", "f1", "mcc", "pearson", "spearman", "answered", "rouge_l",
           "rouge_l_unstemmed")


def check_task(task):
    """Raise UserError where an entry of TASKS cannot work, before it has cost any training."""
    what = f"of the task {task.name!r} in data.py:TASKS"
    if task.kind not in ("classify", "regress", "generate"):
        raise UserError(f"the kind {task.kind!r} {what}: choose classify, regress or generate")
    if not (task.text_b is None or isinstance(task.text_b, str)):
        raise UserError(f"text_b {what} is {task.text_b!r}: give a template, or None for one text")
    if not task.fields:
        raise UserError(f"text_a {what} names no column: write it like {{sentence}}")
    if task.kind == "classify" and len(task.labels) < 2:
        raise UserError(f"the labels {what}: give two or more, as the files spell them")
    for metric in task.metrics:
        known(metric, METRICS, f"metric {what}")


# ---- what every reader of files needs ----

JSON_KINDS = {dict: "object", list: "list"}


def parse_json(text, where, kind=dict, hint="the file may be cut"):
    """Return the object (or the value of another `kind`) that the JSON text holds.

    Raises UserError naming `where`, which is a file and perhaps its line, for anything else.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is not JSON (it is nested too deeply): {hint}") from None
    except ValueError as error:  # json's own, or that of a number with thousands of digits
        why = getattr(error, "msg", error)
        line = getattr(error, "lineno", 1)
        if line > 1:
            why = f"{why} in line {line}"
        raise UserError(f"{where} is not JSON ({why}): {hint}") from None
    if not isinstance(value, kind):
        raise UserError(f"{where} is not a JSON {JSON_KINDS[kind]}: {hint}")
    return value


def read_json(path, kind=dict, hint="the file may be cut"):
    """Return what parse_json makes of a UTF-8 file; one that cannot be read is a UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): {hint}") from None
    except (OSError, ValueError) as error:  # missing, a folder, forbidden; a name with a zero byte
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({why}): {hint}") from None
    return parse_json(text, path, kind, hint)


def check_text(text, where):
    """Raise UserError naming `where` if the text holds a lone surrogate.

    JSON can spell half of a character ("\\ud800"); no tokenizer reads it and no file holds it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UserError(f"{where} holds half of a character, {half!r}: write it whole or leave it "
                        "out") from None


# ---- the embedded task: everyday objects, their size in centimetres, colour and shape ----

OBJECT_TABLE = """
ant .5 black disc, seed .6 brown disc, ladybird .8 red disc, pea .9 green disc, bee 1.4 yellow disc,
button 1.6 blue disc, ring 2 yellow disc, coin 2.2 grey disc, grape 2.4 green disc, stamp 3 red box,
snail 3.2 brown disc, walnut 4 brown disc, matchbox 5.5 red box, egg 6 white disc, key 6.5 grey bar,
lemon 8 yellow disc, apple 8.6 red disc, mouse 9 grey disc, orange 9.5 orange disc, mug 11 blue box,
sparrow 15 brown cone, spoon 16 grey bar, pencil 18 yellow bar, banana 19 yellow bar,
book 24 red box, shoe 29 black cone, bottle 31 green bar, laptop 35 grey box,
squirrel 38 brown cone, cat 46 black cone,
pillow 60 white box, suitcase 70 black box, dog 75 brown cone, goose 85 white cone,
umbrella 90 blue cone, chair 95 brown box, guitar 100 brown bar, piano 150 black box,
bicycle 175 red cone, sofa 200 green box, door 205 white box, bed 215 pink box, cow 240 white cone,
horse 245 brown cone, car 430 red box, giraffe 520 yellow bar, van 560 white box,
elephant 600 grey disc, boat 650 blue cone, truck 900 orange box, bus 1150 red box,
tree 1200 green cone, house 1400 brown cone, lorry 1700 green box, whale 2500 blue disc,
lighthouse 3000 red bar, church 3500 grey cone, aeroplane 4000 white bar, ferry 5200 white box,
bridge 6000 grey bar"""


def parse_objects(table):
    """Return {name: (size in centimetres, colour, shape)} of a table like the one above."""
    objects = {}
    for entry in table.split(","):
        name, size, colour, shape = entry.split()
        objects[name] = (float(size), colour, shape)
    return objects


OBJECTS = parse_objects(OBJECT_TABLE)
OBJECT_QUESTIONS = (
    "is a {} bigger than a {}?",
    "would a {} be larger than a {}?",
    "does a {} take up more room than a {}?",
    "a {} or a {}: is the first one bigger?",
)


def make_object_pairs():
    """Make 600 training pairs and two held-out sets; they share no pair in either order.

    By default (--limit) the first 120 train. The others wait for --unlabelled, or a larger limit.
    The sizes of a pair are at least 1 to 1.25 apart, so that nobody could argue about the answer.
    """
    size = {name: values[0] for name, values in OBJECTS.items()}
    pairs = [(small, large) for small, large in itertools.product(OBJECTS, repeat=2)
             if size[large] >= 1.25 * size[small]]
    # The first seed whose training pairs show all objects: a word never read says nothing.
    rng = random.Random(4)
    rng.shuffle(pairs)
    examples = []
    for i, pair in enumerate(pairs):
        # Either may be the subject, which all four questions name first.
        first, second = rng.sample(pair, 2)
        question = rng.choice(OBJECT_QUESTIONS).format(first, second)
        text = re.sub(r"\ba (?=[aeiou])", "an ", question)
        label = int(size[first] > size[second])
        examples.append(Example({"text": text}, label, i, f"objects:{i}"))
    train = examples[:120] + examples[-480:]
    return {"train": train, "dev": examples[120:620], "test": examples[620:-480]}


def say_object_pairs():
    """Return the pairs of make_object_pairs(), each with an answer in words to learn.

    It says "true" or "false", which is the label, then which of the two objects is the bigger one.
    """
    splits = make_object_pairs()
    for split, examples in splits.items():
        splits[split] = [say_example(example) for example in examples]
    return splits


def say_example(example):
    """Return an example of `objects` as one of `say/objects`, "true , the lorry is bigger"."""
    answer = TRUTH[example.label]
    words = re.findall(r"\w+", example.fields["text"])
    size = {word: OBJECTS[word][0] for word in words if word in OBJECTS}
    bigger = max(size, key=size.get)
    return example._replace(
        label=(answer,), where=f"say/{example.where}", output=f"{answer} , the {bigger} is bigger")


# The tasks that are made here, of no files.
BUILT_IN = {"objects": make_object_pairs, "say/objects": say_object_pairs}


# ---- readers of the official files ----

REFETCH = "the file may be cut; fetch it again"


def load_task(name, data_dir=None, cache_dir=CACHE):
    """Return {"train": [Example, ...], "dev": [...], "test": [...]} of a task.

    They are read from the official files in data_dir/FOLDER; without a data_dir these are fetched
    into cache_dir first. Test (and mnli's other dev and test) may be missing.
    Raises UserError naming file and line.
    """
    task = find_task(name)
    if task.name in BUILT_IN:
        return BUILT_IN[task.name]()
    if data_dir:
        root = Path(data_dir)
    else:
        root = download(task, cache_dir)
    folder = root / task.folder
    if task.kind == "generate":
        return read_generation_splits(task, folder)
    splits = read_understanding_splits(task, folder)
    counts = (len(splits["train"]), len(splits["dev"]))
    if not data_dir and counts != task.rows:
        raise UserError(f"{folder} has {counts} rows in train and dev, not {task.rows}: "
                        "delete it to refetch")
    return splits


def read_understanding_splits(task, folder):
    """Read a GLUE (tsv) or SuperGLUE (jsonl) folder, in which only train and dev must exist."""
    extension = "tsv"
    file_names = {}  # split -> name, where the two differ
    if task.name == "mnli":
        file_names = {"dev": "dev_matched", "test": "test_matched"}
    if os.path.exists(folder / "train.jsonl"):  # Path.exists raises on a name that is too long
        extension = "jsonl"
        file_names = {"dev": "val"}
    splits = {}
    for split in ("train", "dev", "dev_mismatched", "test", "test_mismatched"):
        path = folder / f"{file_names.get(split, split)}.{extension}"
        if split in ("train", "dev") or os.path.exists(path):
            splits[split] = read_examples(task, path, split)
    return splits


def read_generation_splits(task, folder):
    """Read a group's training file, of which a seeded tenth is dev, and a task's scored file."""
    *training_files, scored_file = task.files
    paths = [folder.parent / file for file in training_files]
    # If none is there, the reader says that the first one is missing.
    path = next(filter(os.path.exists, paths), paths[0])
    examples = read_examples(task, path, "train")
    if len(examples) < 2:
        raise UserError(f"{path} has one row: a tenth of its rows, at least one, is to be dev")
    dev_size = math.ceil(len(examples) / 10)
    dev_indices = set(random.Random(0).sample(range(len(examples)), dev_size))
    splits = {"train": [], "dev": []}
    for i, example in enumerate(examples):
        if i in dev_indices:
            splits["dev"].append(example)
        else:
            splits["train"].append(example)
    splits["test"] = read_examples(task, folder / scored_file, "test")
    return splits


def read_examples(task, path, split):
    """Return the Examples of an official tsv, jsonl or json file; any fault is a UserError."""
    try:
        # utf-8-sig drops MRPC's byte-order mark; newline="\n" keeps a stray \r from splitting
        # a row.
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            examples = parse_file(task, file, path, split)
    except (FileNotFoundError, NotADirectoryError):
        # Of reasoning/ARC-Easy it is reasoning, where the training file lies.
        folder = task.folder.split("/")[0]
        more = ""
        if task.name in ARCHIVES:
            more = ", or leave it out to download them"
        raise UserError(f"{path} is missing: give --data-dir the folder that holds {folder}/ with "
                        f"the official files{more}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give --data-dir a folder of "
                        "files that can") from None
    if not examples:
        raise UserError(f"{path} has no rows: fetch it again")
    return examples


def parse_file(task, file, path, split):
    """Return the Examples of an open file; the form is told by the ending of its name."""
    if path.suffix == ".json":
        rows = json_list_rows(file, path)
    elif path.suffix == ".jsonl":
        rows = jsonl_rows(file, path)
    else:
        columns = task.header
        if split.startswith("test"):
            columns = ()  # CoLA's test file has a header line, its others do not
        # Some rows of the first official QQP are broken; elsewhere a short row means damage.
        rows = tsv_rows(file, path, columns, may_break=task.name == "qqp")
    examples = []
    for number, (where, row) in enumerate(rows):
        if task.kind == "generate":
            example = generation_example(task, row, number, where)
        else:
            example = understanding_example(task, row, split, number, where)
        examples.append(example)
    return examples


def tsv_rows(file, path, columns=(), may_break=False):
    """Yield ("file:line", {column: text}); without `columns` the first line names them.

    may_break: whether a text may hold a new line, which breaks its row over several lines. Such a
    row, whose pieces have the right number of columns once joined, is left out and counted.
    """
    broken_rows = 0
    joined = 0  # columns of the pieces so far
    first_piece = ""
    for number, line in enumerate(file, 1):
        # GLUE's tsv is not quoted: a " is part of the text; a csv reader would swallow lines.
        values = line.rstrip("\r\n").split("\t")
        if values == [""]:
            continue
        if not columns:
            columns = values
            continue
        where = f"{path}:{number}"
        if joined == 0 and len(values) == len(columns):
            yield where, dict(zip(columns, values))
            continue
        if joined == 0:
            first_piece = f"{where} has {len(values)} columns"
            joined = 1
        joined += len(values) - 1
        if not may_break or joined > len(columns):
            break
        if joined == len(columns):
            broken_rows += 1
            joined = 0
    if joined:
        raise UserError(f"{first_piece}, not {len(columns)}: {', '.join(columns)}")
    if broken_rows and os.environ.get("RANK", "0") == "0":
        note = f"{path}: rows left out, since they are broken over several lines: {broken_rows}"
        print(one_line(note), flush=True)


def jsonl_rows(file, path):
    """Yield ("file:line", row) for each line of JSON, blank ones left out."""
    for number, line in enumerate(file, 1):
        where = f"{path}:{number}"
        if line.strip():
            yield where, parse_json(line, where, hint=REFETCH)


def json_list_rows(file, path):
    """Yield ("file:number", row) for each item of the one list that the file should be."""
    items = parse_json(file.read(), path, list, REFETCH)
    for number, item in enumerate(items, 1):
        where = f"{path}:{number}"
        if not isinstance(item, dict):
            raise UserError(f"{where} is not a JSON object: {REFETCH}")
        yield where, item


def understanding_example(task, row, split, number, where):
    """Return the Example of a GLUE or SuperGLUE row: texts word for word, label as a number."""
    if task.name == "wsc":
        row = mark_spans(row, where)
    fields = read_fields(task, row, where)
    label = read_label(task, row, split, where)
    idx = row.get("idx")
    if type(idx) not in (int, str):  # a list, or a boolean, which is an int as well
        idx = number
    check_text(str(idx), where)
    return Example(fields, label, idx, where)


def generation_example(task, row, number, where):
    """Return the Example of a row to generate: texts, references and the output to learn."""
    row = {"input": "", **row}  # vicuna has no such column
    fields = read_fields(task, row, where)
    outputs = as_list(row.get("output"))
    references = as_list(row.get(task.label_column))
    if task.label_column == "answer":
        references = list(map(spell_answer, references))
    all_texts = all(isinstance(text, str) for text in outputs + references)
    if not outputs or not references or not all_texts:
        raise UserError(f"{where} has no text 'output' or {task.label_column!r}: "
                        f"found {', '.join(row)}")
    for text in outputs + references:
        check_text(text, where)
    if task.label_column == "answer":
        for answer in references:
            if not any(re.fullmatch(pattern, answer) for pattern in ANSWERS):
                raise UserError(f"{where} has the answer {answer!r}: "
                                "expected true, answer1 ..., A ... or a number")
    return Example(fields, tuple(references), number, where, outputs[0])


def as_list(value):
    """Return a list as it is (s-ni has several references), anything else as a list of one."""
    if isinstance(value, list):
        return value
    return [value]


def spell_answer(answer):
    """Return JSON's true, 72.0 or 9.8 as the text files spell them: true, 72, 9.8."""
    import numpy as np

    if isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, int):
        return str(answer)
    if isinstance(answer, float):
        return np.format_float_positional(answer, trim="-")  # never 1e-05
    if isinstance(answer, str):
        return re.sub(MINUS, "-", answer)
    return answer


def read_fields(task, row, where):
    """Return {field: text} of what the task's templates read, under either name of its column."""
    fields = {}
    for name in task.fields:
        column = task.columns.get(name, name)
        text = row.get(name, row.get(column))
        if not isinstance(text, str):
            names = dict.fromkeys((name, column))
            wanted = " or ".join(map(repr, names))
            raise UserError(f"{where} has no text {wanted}: found {', '.join(row)}")
        check_text(text, where)
        fields[name] = text
    return fields


def read_label(task, row, split, where):
    """Return the class id or the score (0 to 5) of a row; None where a test row has no label.

    Some copies of the official files give all test rows the label -1, which says the same.
    """
    spelled = row.get(task.label_column)
    if split.startswith("test") and spelled in (None, -1, "-1", "-1.0"):
        return None
    if task.kind == "regress":
        wanted = "a number from 0 to 5"
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            score = float(spelled)
            if 0 <= score <= 5:  # which nan is not
                return score
    else:
        wanted = f"one of {', '.join(task.labels)}"
        # Case does not count, and JSON's true and 1 are "true" and "1".
        labels = [label.lower() for label in task.labels]
        label = str(spelled).lower()
        if label in labels:
            return labels.index(label)
    raise UserError(f"{where} has the label {spelled!r} in column {task.label_column}: "
                    f"expected {wanted}")


def mark_spans(row, where):
    """Return WSC's row with [ ] around the noun and * * around the pronoun, in place.

    The file's indices count words between white space, all of which is kept as it stands.
    """
    try:
        target = row["target"]
        words = row["text"].split()
        spaces = re.split(r"\S+", row["text"])  # before, between and behind the words
        places = []
        for span in ("span1", "span2"):
            places.append(find_span(words, target[f"{span}_text"].split(), target[f"{span}_index"]))
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{where} has no text with two spans (text, target.span1_index ...)"
                        ) from None
    for place, left, right in zip(places, ("[", "*"), ("]", "*")):
        if place is None:
            raise UserError(f"{where} has a span whose text stands neither at its index nor at "
                            f"one other place: mend target, {target}")
        first, last = place
        words[first] = left + words[first]
        words[last] += right
    text = "".join(space + word for space, word in zip(spaces, [*words, ""]))
    return {**row, **target, "text": text}


def find_span(words, span, index):
    """Return the positions of the first and the last word of a span that should be at `index`.

    Where it is not (one official row counts wrongly), it is the nearest such span within three
    words, or else the only one in the text. None: there is no such span, or it is one of several.
    Raises LookupError where the index is none, which a negative one is not, or the span is empty.
    """
    is_index = type(index) is int and 0 <= index < len(words)
    if not is_index or not span:
        raise LookupError
    text_words = list(map(bare_word, words))
    span_words = list(map(bare_word, span))
    matches = []
    for first in range(len(words) - len(span) + 1):
        if text_words[first:first + len(span)] == span_words:
            matches.append(first)
    near = [first for first in matches if abs(first - index) <= 3]
    if near:
        first = min(near, key=lambda match: abs(match - index))
    elif len(matches) == 1:
        first = matches[0]
    else:
        return None
    return first, first + len(span) - 1


def bare_word(word):
    """Return a word in lower case without punctuation and without the 's of a possessive."""
    return re.sub(r"['\u2019]s\b|\W", "", word.lower())


# ---- fetching the official files ----

# Official archives, each one folder named as Task.folder; MRPC has none.
# The environment variable ARMADA_MIRROR=URL is another SITE.
SITE = "https://dl.fbaipublicfiles.com"
ARCHIVES = {
    "cola": "/glue/data/CoLA.zip",
    "sst2": "/glue/data/SST-2.zip",
    "stsb": "/glue/data/STS-B.zip",
    "qqp": "/glue/data/QQP-clean.zip",
    "mnli": "/glue/data/MNLI.zip",
    "qnli": "/glue/data/QNLIv2.zip",
    "wnli": "/glue/data/WNLI.zip",
    "boolq": "/glue/superglue/data/v2/BoolQ.zip",
    "cb": "/glue/superglue/data/v2/CB.zip",
    "copa": "/glue/superglue/data/v2/COPA.zip",
    "rte": "/glue/superglue/data/v2/RTE.zip",
    "wic": "/glue/superglue/data/v2/WiC.zip",
    "wsc": "/glue/superglue/data/v2/WSC.zip",
}


def retry(ask, what, secret=None, pauses=(1, 2, 4, 8, 16)):
    """Return ask(), which is called again after growing pauses (seconds) where that may help.

    It may help with 429, 5xx, a line that breaks or stalls, an answer that is cut. A server may
    ask for a longer pause (Retry-After). Raises UserError where it did not help, and at once where
    it cannot or HF_HUB_OFFLINE is set; `secret` is blotted out of what it says.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"--offline, but there is no copy here of {what}")
    for pause in (*pauses, None):
        demanded_pause = 0
        try:
            return ask()
        except urllib.error.HTTPError as error:
            why = describe_http_error(error)
            demanded_pause = retry_after(error)
            is_final = error.code < 500 and error.code != 429
            if is_final or demanded_pause > 600:
                break
        except Exception as error:  # no or half an answer, or not what was asked for
            why = f"{type(error).__name__} {getattr(error, 'reason', error)}"
        if pause is not None:
            time.sleep(max(pause, demanded_pause))
    message = f"could not fetch {what}: {' '.join(why.split())}"
    if secret:
        message = message.replace(secret, "***")  # before the cut, which could leave half of it
    raise UserError(shorten_text(message, 900))


def describe_http_error(error):
    """Return status, reason and the text that a server sent along, as far as that can be read."""
    text = f"{error.code} {error.reason} "
    with contextlib.suppress(Exception):  # it may be cut or stall as well
        text += error.read(9999).decode(errors="replace")
    return text


def retry_after(error):
    """Return the seconds that a server asks to wait, told as a number or a date; 0 for no word."""
    value = error.headers.get("Retry-After", "")
    seconds = 0.0
    with contextlib.suppress(ValueError):
        seconds = float(value)
    with contextlib.suppress(ValueError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return max(0.0, seconds)  # of nan, too, 0


def transfer(url, part):
    """Fetch the file at `url` into `part`, taking up a broken transfer where it stopped.

    Raises OSError where fewer bytes came than were announced; `part` keeps them for the next call.
    """
    from tqdm import tqdm

    have = 0
    headers = {}
    if part.exists():
        # The last byte again: to ask for none would be an error 416.
        have = max(0, part.stat().st_size - 1)
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # a stale one, longer than the file is now
        return transfer(url, part)
    with answer, open(part, "ab") as file:
        if answer.status != 206:  # a server that knows no ranges sends all of it
            have = 0
        file.truncate(have)
        # None where the server announced no number, and for a mirror of file:///
        size = have + (getattr(answer, "length", None) or 0)
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, disable=None) as bar:
            while block := answer.read(1 << 16):
                file.write(block)
                have += len(block)
                bar.update(len(block))
    if have < size:
        raise OSError(f"{have} of {size} bytes came")


def download(task, cache_dir):
    """Return the folder that holds task.folder, fetched and unpacked once.

    A second process waits for the first. Raises UserError where no archive is to be had.
    """
    from filelock import FileLock

    data_dir = Path(cache_dir) / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f"{task.folder}.lock"):
        if not (data_dir / task.folder).is_dir():
            fetch_archive(task, data_dir)
    return data_dir


def fetch_archive(task, data_dir):
    """Fetch and unpack a task's official archive; data_dir/FOLDER appears whole or not at all."""
    hint = f"put {task.folder}/ with the official files into FOLDER and give --data-dir FOLDER"
    if task.name not in ARCHIVES:
        raise UserError(f"task {task.name} has no official archive: {hint}")
    site = os.environ.get("ARMADA_MIRROR") or SITE
    url = site.rstrip("/") + ARCHIVES[task.name]
    print(one_line(f"downloading {url}"), flush=True)
    part = data_dir / f"{task.folder}.zip.part"
    retry(lambda: transfer(url, part), f"{url} (or {hint})", pauses=(1, 2, 4))
    with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
        archive = Path(scratch, "zip")
        part.rename(archive)  # a damaged one goes with the folder: the next try starts anew
        try:
            unpack(archive, scratch)
            if not Path(scratch, task.folder).is_dir():
                raise ValueError(f"no folder {task.folder} in them")
            os.rename(Path(scratch, task.folder), data_dir / task.folder)  # atomic: one file system
        except Exception as error:  # of many kinds, from zipfile, zlib and the file system
            raise UserError(f"{url} sent damaged files ({error}): try again, or {hint}") from None


def unpack(path, folder):
    """Unpack a zip file; ValueError if a name would leave the folder or it would fill the disk."""
    with zipfile.ZipFile(path) as archive:  # which checks a sum of every member
        for name in archive.namelist():
            parts = re.split(r"[/\\]", name)
            if parts[0] == "" or ":" in parts[0] or ".." in parts:  # /x, C:x, ../x
                raise ValueError(f"its member {name} would leave the folder")
        size = sum(member.file_size for member in archive.infolist())
        if size > 100 * path.stat().st_size:  # texts shrink to a quarter, hardly to a hundredth
            raise ValueError(f"it would grow to {size} bytes")
        archive.extractall(folder)


# ---- a hub id or a folder, checked before anything is loaded ----

# DEVIATION: the authors' `nlayers 6` cuts every student to six layers; here only bert-6l is cut.
SHORT_NAMES = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-6l": "google-bert/bert-base-uncased",
    "deberta-v2-xxlarge": "microsoft/deberta-v2-xxlarge",
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "llama-3b": "meta-llama/Llama-3.2-3B",
    "llama-7b": "huggyllama/llama-7b",
    "llama-8b": "meta-llama/Llama-3.1-8B",
}


@functools.cache
def check_available(name, file="config.json"):
    """Return from_pretrained's arguments for a short name, hub id or folder.

    Raises UserError within seconds, before any weight is loaded, where it is not to be had. Left
    alone, transformers retries an unreachable hub for half a minute; we ask once, for the config.
    """
    import huggingface_hub as hub

    if os.path.isdir(name):  # unlike Path.is_dir, it does not raise on a name that is too long
        repo = str(Path(name).resolve())
    else:
        repo = SHORT_NAMES.get(name, name)
    how = {"pretrained_model_name_or_path": repo}
    if os.path.isfile(Path(repo, file)):
        return how
    if os.path.isdir(repo):
        raise UserError(f"{name} holds no {file}: give a folder that save_pretrained wrote "
                        "(a LoRA's: load_student(...).merge().save(...) first)")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=5)
        return how
    except hub.errors.GatedRepoError:
        why = f"gated: accept its licence at {hub.constants.ENDPOINT}/{repo} and set HF_TOKEN"
    except (hub.errors.HFValidationError, hub.errors.RepositoryNotFoundError,
            hub.errors.EntryNotFoundError):
        short_names = ", ".join(SHORT_NAMES)
        why = f"no folder here, no public model (private: HF_TOKEN); known: tiny, {short_names}"
    except Exception as error:  # no network, a proxy, a time-out, HF_HUB_OFFLINE
        if isinstance(hub.try_to_load_from_cache(repo, file), str):
            return {**how, "local_files_only": True}
        reason = shorten_text(str(error), 100)
        why = f"{reason}; connect, or give the folder of an `hf download {repo}`"
    hint = ""
    if repo == name:
        near = nearest(name, [*SHORT_NAMES, "tiny"])
        if near:
            hint = f"; did you mean {near}?"
    raise UserError(f"could not fetch {repo}: {why}{hint}")


@contextlib.contextmanager
def explain_loading(name):
    """Turn whatever transformers raises while it loads `name` into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a damaged folder it can be anything
        reason = shorten_text(f"{type(error).__name__} {error}", 300)
        more = ""
        if re.search("entencepiece|tiktoken", str(error)):  # transformers names the wrong package
            more = "; pip install sentencepiece protobuf"
        if "trust_remote_code" in str(error):  # it names a flag that we have not
            reason = "it brings code of its own, which is never run here"
            more = ": give a model that transformers knows by itself"
        raise UserError(f"could not load {name}: {reason}{more}") from None


def load_tokenizer(name, how):
    """Return a model's tokenizer, with a pad token; `how` is what check_available(name) gave."""
    import transformers

    # Left alone, it asks at the keyboard whether to run a folder's own code.
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        **how, padding_side="right", trust_remote_code=False)
    # Without its files transformers invents an empty tokenizer, to which every text is the same.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{name} has no tokenizer files: copy tokenizer.json (or the vocabulary) "
                        "into it")
    # LLaMA has no pad token; whatever stands in for it is masked.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
