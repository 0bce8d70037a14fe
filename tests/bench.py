"""Ratios, each measured in one run with interleaved steps and medians.

Not a test: timings on a busy machine are noisy.

    python -m tests.bench                                    # a small random BERT, made-up texts
    python -m tests.bench ENCODER --data-dir FOLDER          # a local encoder on the real RTE
    python -m tests.bench ENCODER --data-dir FOLDER --device cuda   # what a card shows: CARD_PARTS
    python -m tests.bench --only generating                  # one part (repeat --only for more)
    python -m tests.bench --lora DECODER --data-dir FOLDER   # LoRA / all weights, on ARC-Easy

Lines: what is compared, the ratio, and the two medians (in padding and published: sums) in ms. In
published, share, trainer, busy, command and processes "ours" is train.py's own update() or run();
the others compare two like steps.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import transformers

import train as training
from align import TSAligner
from data import (TASKS, Example, answer_bags, answer_vocabulary, bag_labels, collate, encode,
                  length_grouped_batches, load_task)
from losses import aligner_loss, student_loss
from student import Student, _tiny, build_student, load_pretrained, precision

ROOT = Path(__file__).resolve().parent.parent
KW = dict(temperature=5.0, kind="manifold")
PLAIN = dict(alpha=0, beta=0, gamma=0, **KW)  # the task's loss alone


# ---- timing ----
def wait():
    """Wait until a card has done what it was given, without which only the giving is timed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(rounds, **steps):
    """Return {name: [milliseconds of each round]}.

    The steps take turns, and the turns swap, so that a slow second of the machine and a warm cache
    hit all of them. A first round warms up and is not counted.
    """
    times = {name: [] for name in steps}
    for i in range(rounds + 1):
        names = list(steps)
        if i % 2 == 0:
            names.reverse()
        for name in names:
            wait()
            start = time.perf_counter()
            steps[name](i)
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def line(what, ratio, more):
    print(f"{what:<66} {ratio:6.3f}   ({more})", flush=True)


def report(what, times, top, bottom):
    """Print the median over the rounds of top / bottom, and both medians."""
    ratio = statistics.median(a / b for a, b in zip(times[top], times[bottom]))
    above = statistics.median(times[top])
    below = statistics.median(times[bottom])
    line(what, ratio, f"{above:.1f} ms / {below:.1f} ms")


def report_sums(what, times, top, bottom):
    """The same of sums over the rounds, where a round's batch is short or long."""
    sums = {name: [sum(times[name])] for name in (top, bottom)}
    report(what, sums, top, bottom)


def peak_kib():
    """The process's high-water mark. Not getrusage's, which a child inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# ---- what the parts share ----
def optimizer_step(model, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.optimizer.step()
    model.optimizer.zero_grad()


def with_optimizer(model):
    model.optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-5, weight_decay=0.01, fused=True)
    return model


class ExponentialProjection(torch.nn.Module):
    """P = expm(A - A^T): the parametrisation of the authors' scripts (torch's orthogonal,
    matrix_exp)."""

    def __init__(self, dim):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(dim, dim) / dim)

    def forward(self, x):
        return x @ torch.linalg.matrix_exp(self.a - self.a.T).T


def exponential_aligner():
    aligner = TSAligner(1024, 2)
    aligner.projection = ExponentialProjection(1024)
    return with_optimizer(aligner)


def made_up_examples(words):
    """1,600 examples as long as RTE's, whose words mean nothing."""
    rng = random.Random(0)
    examples = []
    for i in range(1600):
        length = min(100, int(rng.lognormvariate(3.5, 0.7)))
        premise = " ".join(rng.choice(words) for _ in range(length))
        hypothesis = " ".join(rng.choice(words) for _ in range(10))
        fields = {"premise": premise, "hypothesis": hypothesis}
        examples.append(Example(fields, rng.randint(0, 1), i, f"made:{i}"))
    return examples


class Bench:
    """What all parts share: texts, their token ids and labels, made-up teacher vectors, batches."""
    def __init__(self, args):
        self.args = args
        self.rounds = args.rounds
        self.real = bool(args.encoder)
        wanted = SimpleNamespace(
            device=args.device, student=args.encoder, amp="auto", fsdp=False)
        self.device, self.autocast, _, _ = precision(wanted)
        words = [f"word{i}" for i in range(500)]
        if self.real:
            examples = load_task("rte", args.data_dir)["train"][:1600]
        else:
            examples = made_up_examples(words)
        _, self.tokenizer = _tiny([" ".join(words)])
        self.tokenizer = self.build().tokenizer
        self.pad = self.tokenizer.pad_token_id
        self.rows, _ = encode(TASKS["rte"], examples, self.tokenizer, 128, False)
        self.labels = torch.tensor([example.label for example in examples])
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(len(self.rows), 1024, generator=generator)
        lengths = [len(row["input_ids"]) for row in self.rows]
        self.batches = length_grouped_batches(lengths, 32, 0)
        self.command = [sys.executable, "-m", "tests.bench", "--device", "cpu"]
        if args.encoder:
            self.command.append(args.encoder)
        if args.data_dir:
            self.command += ["--data-dir", args.data_dir]

    def build(self, *_, **__):
        """A new student: the given encoder, or a small random BERT."""
        if self.real:
            return build_student(self.args.encoder, 2, 1024)
        config = transformers.BertConfig(
            vocab_size=len(self.tokenizer), hidden_size=256, num_hidden_layers=4,
            num_attention_heads=4, intermediate_size=1024)
        return Student(transformers.BertModel(config), self.tokenizer, 2, 1024)

    def batch(self, i):
        """(x, y) of batch i, as often as they come round."""
        chosen = self.batches[i % len(self.batches)]
        x = collate([self.rows[j] for j in chosen], self.pad)
        return x, self.labels[chosen]

    def step(self, model, aligner=None, **weights):
        """A student's step on batch i, as update() makes it but without the loop's own work around
        it. weights: alpha, beta and gamma, where they are not 0."""
        def step(i):
            x, y = self.batch(i)
            e = self.vectors[self.batches[i % len(self.batches)]]
            target = None
            if aligner:
                with torch.no_grad():
                    target = aligner.eval()(e)
            loss, _ = student_loss(model(**x), target, y, **(PLAIN | weights))
            optimizer_step(model, loss)
        return step

    def cell(self, arm, count, folder, **flags):
        """train.py's Cell on the first `count` rows, one epoch, without evaluation and without its
        files."""
        folder = Path(folder)
        folder.mkdir(exist_ok=True)
        config = training.resolve(training.Config(
            task="rte", student="tiny", teacher="painter", arms=arm, epochs=1, out=str(folder),
            device=str(self.device), **flags))
        # Data() would read the task and look for a teacher's vectors.
        data = object.__new__(training.Data)
        example = Example({"premise": "", "hypothesis": ""}, 0, 0, "")
        read = self.vectors.numpy().__getitem__
        vars(data).update(
            task=TASKS["rte"], splits={"train": [example]}, encoded={"train": self.rows[:count]},
            labels=self.labels[:count], dim=1024, num_labels=2, vocabulary=(),
            vectors={"painter": {"train": read, "dev": read}})
        config = dataclasses.replace(config, **training.ARMS[arm])
        with patch.object(training, "build_student", self.build):
            cell = training.Cell(config, data, folder)
        cell.evaluate = lambda split: ({"accuracy": 0}, None, None)
        cell.evaluate_aligner = lambda p_s: {}
        cell.keep_if_best = lambda epoch, scores: None
        cell.save = lambda name: None
        return cell

    def ways(self):
        """{what train.py is told: its flags}: as it is, and with --compile where a card is."""
        ways = {"ours": {}}
        names = {field.name for field in dataclasses.fields(training.Config)}
        if self.device.type == "cuda" and "compile" in names:
            ways["ours --compile"] = {"compile": True}
        return ways

    def command_flags(self, folder):
        """The flags of a real command of train.py on this encoder, which needs files in `folder`.
        The vectors are random: their content takes no time."""
        flags = ["--cache-dir", folder, "--device", str(self.device), "--arms", "armada",
                 "--seeds", "0"]
        if not self.real:
            encoder = f"{folder}/encoder"
            student = self.build()
            student.lm.save_pretrained(encoder)
            student.tokenizer.save_pretrained(encoder)
            return ["--task", "objects", "--student", encoder, *flags]
        rng = np.random.default_rng(0)
        for split, rows in zip(("train", "dev"), TASKS["rte"].rows):
            vectors = rng.standard_normal((rows, 1024), dtype=np.float32)
            np.save(f"{folder}/{split}.npy", vectors)
        return ["--task", "rte", "--student", self.args.encoder, "--data-dir", self.args.data_dir,
                "--teacher", f"vectors:{folder}", *flags]


def run_command(flags, processes=1):
    """Run train.py with some flags; return its error in a few words, or None."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={processes}"]
    environment = dict(os.environ)
    if processes > 1 or "cpu" in flags:
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *launcher, "train.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode == 0:
        return None
    errors = [text for text in done.stderr.splitlines() if "rror" in text]
    return errors[0][:200] if errors else "no word of why"


def read_log(out):
    """The lines of the log.jsonl of a run's only cell."""
    text = Path(out, "armada/0/log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def epoch_seconds(lines, epochs):
    """How long the student's steps of some epochs took, by log.jsonl."""
    seconds = 0
    for entry in lines:
        if entry.get("role") == "student" and entry["epoch"] in epochs:
            seconds += entry["tokens"] / entry["tokens_per_second"]
    return seconds


# ---- one part a function ----
def aligner(bench):
    """The aligner: reflections against the matrix exponential, a whole training step each."""
    e = bench.vectors[:32]
    y = bench.labels[:32]

    def step(model):
        return lambda i: optimizer_step(model, aligner_loss(model(e), y, 1.0))

    ours = with_optimizer(TSAligner(1024, 2))
    times = interleave(
        max(3, bench.rounds // 3), exponential=step(exponential_aligner()), reflections=step(ours))
    report("aligner step: matrix exponential / Householder", times, "exponential", "reflections")


def overhead(bench):
    """What distillation adds to a student's step: the frozen aligner's forward pass and two
    losses."""
    student = with_optimizer(bench.build().train())
    armada = bench.step(student, TSAligner(1024, 2), alpha=0.5, beta=1.0, gamma=1.0)
    times = interleave(2 * bench.rounds, armada=armada, undistilled=bench.step(student))
    report("student step: armada / undistilled", times, "armada", "undistilled")


def to_128(x, pad):
    """The same batch, every text padded to 128 tokens."""
    padded = {}
    for name, tensor in x.items():
        fill = pad if name == "input_ids" else 0
        columns = 128 - tensor.size(1)
        padded[name] = torch.nn.functional.pad(tensor, (0, columns), value=fill)  # (B, 128)
    return padded


def padding(bench):
    """Batches padded to their longest text / all to 128 tokens: sums, since batches differ in
    length."""
    student = with_optimizer(bench.build().train())

    def padded(i):
        x, y = bench.batch(i)
        out = student(**to_128(x, bench.pad))
        loss, _ = student_loss(out, None, y, **PLAIN)
        optimizer_step(student, loss)

    times = interleave(bench.rounds, grouped=bench.step(student), padded=padded)
    report_sums("sum over different batches: length-grouped / padded to 128", times, "grouped",
                "padded")


def published_way(bench):
    """Return the function i -> one batch of the published way, which published() describes."""
    student = with_optimizer(bench.build().train())
    frozen = exponential_aligner()
    order = list(range(len(bench.rows)))
    random.Random(1).shuffle(order)

    def step(i):
        chosen = [order[j % len(order)] for j in range(32 * i, 32 * i + 32)]
        e = bench.vectors[chosen]
        y = bench.labels[chosen]
        optimizer_step(frozen, aligner_loss(frozen.train()(e), y, 1.0))
        x = to_128(collate([bench.rows[j] for j in chosen], bench.pad), bench.pad)
        task, _ = student_loss(student(**x), None, y, alpha=0.5, beta=0, gamma=1, **KW)
        task.backward()
        with torch.no_grad():
            target = frozen.eval()(e)
        _, parts = student_loss(student(**x), target, y, alpha=0.5, beta=1, gamma=1, **KW)
        optimizer_step(student, 0.5 * parts["output"] + parts["manifold"])

    return step


def published(bench):
    """Examples a second of the method, both its halves: ours / the published way, rebuilt.

    The published way, a batch of 32 random texts at a time, every text padded to 128 tokens:
      - a step of the aligner, whose projection is expm(A - A^T): loss, backward, clipping, AdamW;
      - a step of the student in two passes over the same padded batch: forward and backward of the
        task loss, gamma's head included; then the aligner's forward pass without gradient (its
        exponential again), the student's forward again, and backward of
        alpha L_output + beta L_manifold; one clipping, one AdamW.
    Ours, on the same number of texts: train.update() for the aligner and for the student, arm
    armada. Both ways have this file's and torch's best otherwise: fused AdamW, SDPA attention, the
    same losses.
    """
    with tempfile.TemporaryDirectory() as folder:
        cell = bench.cell("armada", len(bench.rows), folder)
        batches = [rows for _, rows in student_steps(cell) if len(rows) == 32]

        def ours(i):
            for role in ("aligner", "student"):
                training.update(cell, 0, role, i, batches[i % len(batches)])

        times = interleave(
            max(3, bench.rounds // 2), reference=published_way(bench), ours=ours)
    # Our batches differ in length, and a short one is as much a batch of 32 examples: sums.
    report_sums("examples a second: ours / the published way", times, "reference", "ours")


def student_steps(cell):
    """[(step, rows)] of the student's epoch."""
    return [(step, rows) for _, role, step, rows in training.schedule(cell) if role == "student"]


class ForTrainer(torch.nn.Module):
    """A student with the loss that Trainer asks a model for."""
    accepts_loss_kwargs = False

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, labels, **x):
        loss, _ = student_loss(self.student(**x), None, labels, **PLAIN)
        return {"loss": loss}


class Collator:
    """What makes Trainer's batches; counts the real tokens of them and those with padding."""
    def __init__(self, pad):
        self.pad = pad
        self.real = 0
        self.padded = 0

    def __call__(self, items):
        rows = []
        for item in items:
            rows.append({name: item[name] for name in item if name != "label"})
        x = collate(rows, self.pad)
        self.real += x["attention_mask"].sum().item()
        self.padded += x["input_ids"].numel()
        return {**x, "labels": torch.tensor([item["label"] for item in items])}


def trainer_for(bench, count, folder, collator, strategy, workers):
    """Return transformers' Trainer on the first `count` rows, for one epoch a call of train()."""
    on_card = bench.device.type == "cuda"
    settings = transformers.TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=32, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", learning_rate=2e-5,
        weight_decay=0.01, max_grad_norm=1.0, use_cpu=not on_card, bf16=on_card,
        remove_unused_columns=False, dataloader_pin_memory=on_card,
        dataloader_num_workers=workers, optim="adamw_torch_fused",
        train_sampling_strategy=strategy)
    # Items are dictionaries with "input_ids", of which LengthGroupedSampler takes the lengths.
    dataset = [{**bench.rows[i], "label": int(bench.labels[i])} for i in range(count)]
    made = transformers.Trainer(model=ForTrainer(bench.build()), args=settings,
                                train_dataset=dataset, data_collator=collator)
    made.remove_callback(transformers.PrinterCallback)
    return made


def epoch_of(cell):
    """Return the function that runs the very loop of train.py over a cell's epoch."""
    def epoch(_):
        cell.done = 0
        with patch.object(training, "finish", lambda cell: None), \
                patch.object(training, "print_scores", lambda *_: None):
            training.run(cell)
    return epoch


def trainer(bench):
    """Time of an epoch after a first one: train.py's own loop / Trainer, on the same student and
    texts. On the CPU Trainer has its default random batches, or groups by length as we do; on a
    card it groups in bf16, with 0 and with 4 processes that collate."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        print("ours / transformers' Trainer: skipped, it needs accelerate "
              "(pip install accelerate)")
        return
    rivals = {"random batches": ("random", 0), "grouped by length": ("group_by_length", 0)}
    if bench.device.type == "cuda":
        rivals = {f"grouped, {workers} workers": ("group_by_length", workers)
                  for workers in (0, 4)}
    # 20 batches by default. Trainer sorts within a quarter of them (at most 50): few would be
    # random.
    count = min(len(bench.rows), 64 * bench.rounds)
    epochs = {}
    collators = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in bench.ways().items():
            cell = bench.cell("undistilled", count, Path(folder, name), **flags)
            epochs[name] = epoch_of(cell)
        for name, (strategy, workers) in rivals.items():
            collators[name] = Collator(bench.pad)
            made = trainer_for(bench, count, folder, collators[name], strategy, workers)
            epochs[name] = lambda _, made=made: made.train()
        times = interleave(2, **epochs)
    for name in bench.ways():
        for rival in rivals:
            report(f"an epoch: {name} / transformers' Trainer, {rival}", times, name, rival)
    tell_padding(cell, collators)


def tell_padding(cell, collators):
    """Print how many tokens, padding included, there are for each real one."""
    lengths = cell.data.lengths
    real = padded = 0
    for _, rows in student_steps(cell):
        sizes = [lengths[row] for row in rows]
        real += sum(sizes)
        padded += max(sizes) * len(sizes)
    told = [f"ours {padded / real:.3f}"]
    for name, collator in collators.items():
        if collator.real:  # with workers, which collate in their own memory, none are counted
            told.append(f"{name} {collator.padded / collator.real:.3f}")
    print(f"  tokens with padding per real token: {', '.join(told)}")


def inside(cell, steps):
    """Return {part of update(): seconds}, "all" included, of the student's update() on these
    (step, rows).

    The first three steps warm up and are not counted. CPU only: a card's work would have to be
    waited for.
    """
    parts = {"forward": (cell.student, "forward"), "backward": (torch.Tensor, "backward"),
             "AdamW": (cell.optimizers["student"], "step"),
             "clipping": (torch.nn.utils, "clip_grad_norm_"), "aligner": (cell.aligner, "forward")}
    spent = dict.fromkeys([*parts, "all"], 0.0)

    def timed(part, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] += time.perf_counter() - start
            return result
        return call

    with contextlib.ExitStack() as stack:
        for part, (owner, name) in parts.items():
            replacement = timed(part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, replacement))
        for i, (step, rows) in enumerate(steps):
            if i == 3:
                spent.update(dict.fromkeys(spent, 0.0))
            timed("all", training.update)(cell, 0, "student", step, rows)
    return spent


def tell_share(name, cell, count):
    """Print what part of `count` steps is spent where."""
    spent = inside(cell, student_steps(cell)[:count])
    every = spent.pop("all")
    own = (spent["forward"] + spent["backward"]) / every
    rest = 1 - sum(spent.values()) / every
    told = [f"{part} {seconds / every:.1%}" for part, seconds in spent.items()]
    line(f"share of a step inside forward and backward: {name}", own,
         f"{', '.join(told)}, the rest {rest:.1%}")


def share(bench):
    """What part of update()'s wall time a student spends in its own forward and backward passes,
    arm armada: this encoder in batches of 32, and tiny on objects, where a step is so short that
    all the rest weighs."""
    with tempfile.TemporaryDirectory() as folder:
        cell = bench.cell("armada", len(bench.rows), folder)
        tell_share("batches of 32", cell, 3 + bench.rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command line does for tiny
    with tempfile.TemporaryDirectory() as folder:
        config = training.resolve(training.Config(
            task="objects", arms="armada", epochs=10, cache_dir=folder, device="cpu"))
        cell = training.Cell(config, training.Data(config), Path(folder))
        tell_share("tiny on objects", cell, 153)
    torch.set_num_threads(threads)


def no_attention():
    """Within: a model's attention, softmax(q k^T) v, is v alone. 0 (q + k) keeps q's and k's
    gradients."""
    return patch.object(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, *_, **__: v + 0 * (q + k))


LENGTHS = (64, 128, 256, 512)
TOKENS = 4096


def long_batch(bench, length):
    """TOKENS made-up tokens in texts of this length. The first ends early: there is a mask to
    read."""
    ids = torch.randint(5, len(bench.tokenizer), (TOKENS // length, length))  # (B, L)
    mask = torch.ones_like(ids)                                               # (B, L)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.arange(len(ids)) % 2


def lengths(bench):
    """Time and memory per token, of steps with the same number of tokens in texts of 64, 128, 256,
    512. With attention taken out the time per token should stay as it is; what attention adds
    should double with L."""
    student = with_optimizer(bench.build().train())

    def step(length, around):
        x, y = long_batch(bench, length)

        def run(_):
            with around():
                out = student(**x)
            loss, _ = student_loss(out, None, y, **PLAIN)
            optimizer_step(student, loss)
        return run

    without = {str(length): step(length, no_attention) for length in LENGTHS}
    whole = {str(length): step(length, contextlib.nullcontext) for length in LENGTHS}
    rest = interleave(bench.rounds, **without)
    every = interleave(2, **whole)  # each takes ten times as long
    width = student.lm.config.hidden_size
    first = statistics.median(rest["64"])
    print(f"steps of {TOKENS} tokens in texts of L: time without attention / that at 64 (want "
          "1 +- .15), with\n  it / that at 64, attention's part of the latter, and of its "
          "products: L / (L + 6 d)")
    for length in LENGTHS:
        name = str(length)
        ratio = statistics.median(a / b for a, b in zip(rest[name], rest["64"]))
        alone = statistics.median(rest[name])
        both = statistics.median(every[name])
        kib = memory_of(bench, "--memory", "off", "--length", name) / TOKENS
        print(f"  {length:>4}: {ratio:6.3f}  {both / first:6.3f}  {1 - alone / both:6.1%}  "
              f"{length / (length + 6 * width):6.1%}   ({1e3 * alone / TOKENS:.0f} + "
              f"{1e3 * (both - alone) / TOKENS:.0f} us, {kib:.0f} KiB a token)", flush=True)


def memory_of(bench, *flags):
    """KiB that memory() prints in a process of its own."""
    done = subprocess.run([*bench.command, *flags], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    return int(done.stdout.split()[-1])


def checkpointing(bench):
    """Gradient checkpointing: time of identical steps, and the memory of a step's activations, by
    the peak of a process of its own for each setting (weights and gradients are there before it
    counts)."""
    plain = with_optimizer(bench.build().train())
    recomputed = with_optimizer(bench.build().train())
    recomputed.checkpoint_gradients()
    times = interleave(
        bench.rounds * 3 // 2, on=bench.step(recomputed), off=bench.step(plain))
    report("student step: checkpointing on / off", times, "on", "off")
    on = memory_of(bench, "--memory", "on")
    off = memory_of(bench, "--memory", "off")
    line("memory added by a step of 64 long texts: checkpointing on / off", on / off,
         f"{on >> 10} MiB / {off >> 10} MiB")


def memory(bench):
    """Print the KiB that a step adds to this process's peak: of the longest 64 texts, or of TOKENS
    in texts of --length."""
    student = bench.build().train()
    if bench.args.memory == "on":
        student.checkpoint_gradients()
    if bench.args.length:
        x, y = long_batch(bench, bench.args.length)
    else:
        by_length = sorted(range(len(bench.rows)), key=lambda j: -len(bench.rows[j]["input_ids"]))
        longest = by_length[:64]
        x = collate([bench.rows[j] for j in longest], bench.pad)
        y = bench.labels[longest]

    def step(x, y):
        loss, _ = student_loss(student(**x), None, y, alpha=0, beta=0, gamma=1, **KW)
        loss.backward()

    # The gradients are there from now on.
    step({name: tensor[:2, :8] for name, tensor in x.items()}, y[:2])
    before = peak_kib()
    step(x, y)
    print(peak_kib() - before)


def processes(bench):
    """Steps a second of the student: train.py in two processes / in one, each with one thread,
    --batch-size the same for both (it is the whole batch's, a process takes its share). From
    log.jsonl; one process needs no torchrun."""
    count = 32 * max(3, bench.rounds // 2)
    seconds = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        flags = [*bench.command_flags(folder), "--limit", count, "--eval-limit", 8,
                 "--epochs", 4, "--eval-every", 4]
        for turn, order in enumerate(((2, 1), (1, 2))):
            for n in order:
                out = f"{folder}/{turn}-{n}"
                error = run_command([*flags, "--out", out], processes=n)
                if error:
                    print(f"train.py in {n} process(es) failed: {error}")
                    return
                # Not the first epoch: there every batch longer than all before it takes fresh
                # memory.
                seconds[n].append(1e3 * epoch_seconds(read_log(out), (2, 3, 4)))
    report("the student's epochs 2 to 4: 1 process / 2, a thread each", seconds, 1, 2)


def generating(bench):
    """Tokens a second of a student with LoRA of rank 8: merged for as long as it writes, as
    generate() does / through the adapters. LLaMA's shapes, made small; end-of-text never comes."""
    prompts = 16
    new_tokens = 32
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=16,
        num_attention_heads=8)
    torch.manual_seed(0)
    student = Student(transformers.LlamaForCausalLM(config), bench.tokenizer, 2, 16, lora=8,
                      vocabulary=(5, 6), max_new_tokens=new_tokens).to(bench.device)
    if torch.bfloat16 in bench.autocast.args:
        student.round_frozen_weights()
    ids = torch.randint(5, 500, (prompts, 64)).tolist()
    rows = [{"input_ids": row} for row in ids]

    def merged(_):
        student.generate(rows, autocast=bench.autocast)

    def adapters(_):
        with patch.object(student, "merged_for_now", contextlib.nullcontext):
            student.generate(rows, autocast=bench.autocast)

    times = interleave(max(3, bench.rounds // 3), merged=merged, adapters=adapters)
    report("generating with LoRA: merged / through the adapters", times, "merged", "adapters")
    told = []
    for name, values in times.items():
        rate = 1e3 * prompts * new_tokens / statistics.median(values)
        told.append(f"{name} {rate:.0f}")
    print(f"  tokens a second: {', '.join(told)}")


# ---- what a card shows ----
def busy_milliseconds(profile):
    """How long a card computed within a profile: the sum of its kernels and copies, which train.py
    gives it one after the other."""
    on_card = torch.autograd.DeviceType.CUDA
    microseconds = 0
    for event in profile.key_averages():
        if event.device_type == on_card and not event.is_user_annotation:
            microseconds += event.self_device_time_total
    return microseconds / 1e3


def busy(bench):
    """How much of update()'s time a card computes, after a first pass over the same batches; the
    rest of it waits for Python. Arm armada."""
    if bench.device.type != "cuda":
        print("busy: skipped, it profiles a card: give --device cuda")
        return
    for name, flags in bench.ways().items():
        with tempfile.TemporaryDirectory() as folder:
            cell = bench.cell("armada", len(bench.rows), folder, **flags)
            steps = student_steps(cell)

            def epoch(_):
                for step, rows in steps:
                    training.update(cell, 0, "student", step, rows)

            times = interleave(2, epoch=epoch)
            with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                epoch(0)
                wait()
        wall = statistics.median(times["epoch"]) / len(steps)
        computing = busy_milliseconds(profile) / len(steps)
        line(f"share of a step in which the card computes: {name}", computing / wall,
             f"{computing:.1f} ms / {wall:.1f} ms")


def command(bench):
    """A whole command, train.py on this encoder: the first epoch / the second, and where its wall
    time went, of which log.jsonl tells the steps, the evaluations and the files."""
    epochs = 10 if bench.device.type == "cuda" else 2
    for name, way in bench.ways().items():
        with tempfile.TemporaryDirectory() as folder:
            flags = [*bench.command_flags(folder), "--epochs", epochs, "--out", f"{folder}/run"]
            if bench.device.type == "cpu":
                flags += ["--limit", 32 * bench.rounds, "--eval-limit", 64]
            if way:
                flags.append("--compile")
            start = time.perf_counter()
            error = run_command(flags)
            wall = time.perf_counter() - start
            if error:
                print(f"{name}: train.py failed: {error}")
                continue
            lines = read_log(f"{folder}/run")
        first = epoch_seconds(lines, [1])
        second = epoch_seconds(lines, [2])
        line(f"the student's steps: epoch 1 / epoch 2, {name}", first / second,
             f"{first:.1f} s / {second:.1f} s")
        parts = lines[-1].get("seconds")
        if not parts:
            print("  log.jsonl has no line of the seconds by part")
            continue
        parts["starting, loading, the rest"] = wall - sum(parts.values())
        told = [f"{part} {spent:.1f} s ({spent / wall:.1%})" for part, spent in parts.items()]
        print(f"  wall time of {epochs} epochs {wall:.1f} s: {', '.join(told)}")


# ---- LoRA against all weights ----
def lora_ratio(args):
    """A training step with LoRA of rank 8 / one of all weights, and the adapters' share of the
    parameters."""
    task = TASKS["reason/arc_e"]
    examples = load_task("reason/arc_e", args.data_dir)["train"][:160]
    _, tokenizer = load_pretrained(args.lora, transformers.AutoModelForCausalLM, weights=False)
    rows, _ = encode(task, examples, tokenizer, 512, True, 32)
    bags = answer_bags(task, examples, tokenizer)
    vocabulary = answer_vocabulary(bags)
    labels = bag_labels(bags, vocabulary)  # (N, V_a)

    def step_of(name, rank):
        student = build_student(args.lora, len(vocabulary), 1024, vocabulary=vocabulary, lora=rank)
        student.train()
        every = training.count_parameters(student.lm)
        trained = training.count_trained(student.lm)
        print(f"{name}: {trained / every:.3%} of the language model's parameters train")
        with_optimizer(student)

        def step(i):
            start = 8 * i % 160
            part = range(start, start + 8)
            out = student(**collate([rows[j] for j in part], tokenizer.pad_token_id))
            loss, _ = student_loss(out, None, labels[part], answer_loss=out.answer_loss.mean(),
                                   **PLAIN)
            optimizer_step(student, loss)
        return step

    times = interleave(args.rounds, full=step_of("full", 0), lora=step_of("lora", 8))
    report("student step: LoRA rank 8 / all weights", times, "lora", "full")


# ---- the command line ----
CPU_PARTS = (aligner, overhead, padding, published, trainer, share, lengths, checkpointing,
             processes, generating)
CARD_PARTS = (trainer, busy, command, generating)
PARTS = {part.__name__: part for part in (*CPU_PARTS, *CARD_PARTS)}


def main():
    parser = argparse.ArgumentParser(description="Ratios of step times, interleaved, medians.")
    parser.add_argument("encoder", nargs="?", help="Local folder of a pretrained encoder.")
    parser.add_argument("--data-dir", help="Folder that holds RTE/.")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for what a card shows.")
    parser.add_argument("--rounds", type=int, default=10, help="Steps of each kind.")
    parser.add_argument("--only", action="append", choices=PARTS,
                        help="This part alone; may be repeated.")
    parser.add_argument("--lora", metavar="FOLDER", help="Folder of a decoder: LoRA alone.")
    parser.add_argument("--memory", choices=("on", "off"), help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)  # both: memory_of()
    args = parser.parse_args()
    if args.lora:
        lora_ratio(args)
        return
    bench = Bench(args)
    if args.memory:
        memory(bench)
        return
    usual = CARD_PARTS if bench.device.type == "cuda" else CPU_PARTS
    parts = [PARTS[name] for name in args.only or []] or usual
    for part in parts:
        if bench.device.type == "cuda" and part not in CARD_PARTS:
            parser.error(f"{part.__name__} is measured on the CPU: give --device cpu")
        part(bench)


if __name__ == "__main__":
    main()
