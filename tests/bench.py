"""Ratios, each measured in one run with interleaved steps and medians.
Not a test: timings on a busy machine are noisy.

    python -m tests.bench                                           # a small random BERT and made-up texts
    python -m tests.bench ENCODER_FOLDER --data-dir FOLDER          # a local encoder on the real RTE
    python -m tests.bench --only lengths ...                        # one part (repeat --only for more)
    python -m tests.bench --lora DECODER_FOLDER --data-dir FOLDER   # LoRA against all weights, on ARC-Easy

Lines: what is compared, the ratio, and the two medians (in padding and published: sums) in ms. In published,
share, trainer and processes "ours" is train.py's own update() or run(); the others compare two like steps.
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
from unittest.mock import patch

import numpy as np
import torch
import transformers

import train as training
from align import TSAligner
from data import (TASKS, Example, answer_bags, answer_vocabulary, bag_labels, collate, encode,
                  length_grouped_batches, load_task)
from losses import aligner_loss, student_loss
from student import Student, _tiny, build_student, load_pretrained

KW = dict(temperature=5.0, kind="manifold")

def interleave(rounds, **steps):
    """{name: [milliseconds of each round]}. The steps take turns, and the turns swap, so that a slow second
    of the machine and a warm cache hit all of them."""
    times = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name in list(steps)[::1 if i % 2 else -1]:
            start = time.perf_counter()
            steps[name](i)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}  # the first round warms up

def report(what, times, top, bottom):
    """The median over the rounds of top / bottom, and both medians."""
    ratio = statistics.median(a / b for a, b in zip(times[top], times[bottom]))
    print(f"{what:<66} {ratio:6.3f}   ({statistics.median(times[top]):.1f} ms / "
          f"{statistics.median(times[bottom]):.1f} ms)", flush=True)

def peak_kib():
    """The process's high-water mark. Not getrusage's, which a child inherits from its parent."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def optimizer_step(model, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.optimizer.step()
    model.optimizer.zero_grad()

def with_optimizer(model, lr=2e-5):
    model.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    return model

class ExponentialProjection(torch.nn.Module):
    """P = expm(A - A^T): the parametrisation of the authors' scripts (torch's orthogonal, matrix_exp)."""

    def __init__(self, dim):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(dim, dim) / dim)

    def forward(self, x):
        return x @ torch.linalg.matrix_exp(self.a - self.a.T).T

class Bench:
    """What all parts share: the texts, their token ids and labels, made-up teacher vectors, batches."""
    def __init__(self, args):
        self.args, self.rounds, self.real = args, args.rounds, bool(args.encoder)
        rng = random.Random(0)
        words = [f"word{i}" for i in range(500)]

        def sentence(n):
            return " ".join(rng.choice(words) for _ in range(n))

        if self.real:
            examples = load_task("rte", args.data_dir)["train"][:1600]
        else:
            examples = [Example({"premise": sentence(min(100, int(rng.lognormvariate(3.5, 0.7)))),
                                 "hypothesis": sentence(10)}, rng.randint(0, 1), i, f"made:{i}")
                        for i in range(1600)]
        _, self.tokenizer = _tiny([" ".join(words)])
        self.tokenizer = self.build().tokenizer
        self.pad = self.tokenizer.pad_token_id
        self.rows, _ = encode(TASKS["rte"], examples, self.tokenizer, 128, False)
        self.labels = torch.tensor([example.label for example in examples])
        self.vectors = torch.randn(len(self.rows), 1024, generator=torch.Generator().manual_seed(0))
        self.batches = length_grouped_batches([len(row["input_ids"]) for row in self.rows], 32, 0)
        self.command = [sys.executable, "-m", "tests.bench", *([args.encoder] if args.encoder else []),
                        *(["--data-dir", args.data_dir] if args.data_dir else [])]

    def build(self, *_, **__):
        """A new student: the given encoder, or a small random BERT."""
        if self.real:
            return build_student(self.args.encoder, 2, 1024)
        return Student(transformers.BertModel(transformers.BertConfig(
            vocab_size=len(self.tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=1024)), self.tokenizer, 2, 1024)

    def batch(self, i):
        chosen = self.batches[i % len(self.batches)]
        return collate([self.rows[j] for j in chosen], self.pad), self.labels[chosen]

    def step(self, model, alpha=0, beta=0, gamma=0, aligner=None):
        """A student's step on batch i, as update() makes it but without the loop's own work around it."""
        def step(i):
            x, y = self.batch(i)
            e = self.vectors[self.batches[i % len(self.batches)]]
            with torch.no_grad():
                target = aligner.eval()(e) if aligner else None
            optimizer_step(model, student_loss(
                model(**x), target, y, alpha=alpha, beta=beta, gamma=gamma, **KW)[0])
        return step

    def cell(self, arm, count, folder):
        """train.py's Cell on the first `count` rows, one epoch, without evaluation and without its files."""
        config = training.resolve(training.Config(task="rte", student="tiny", teacher="painter", arms=arm,
                                                  epochs=1, out=folder))
        data = object.__new__(training.Data)  # Data() would read the task and look for a teacher's vectors
        example = Example({"premise": "", "hypothesis": ""}, 0, 0, "")
        read = self.vectors.numpy().__getitem__
        vars(data).update(task=TASKS["rte"], splits={"train": [example]}, encoded={"train": self.rows[:count]},
                          labels=self.labels[:count], dim=1024, num_labels=2, vocabulary=(),
                          vectors={"painter": {"train": read, "dev": read}})
        training.build_student, training.finish = self.build, lambda cell: None
        cell = training.Cell(dataclasses.replace(config, **training.ARMS[arm]), data, Path(folder))
        training.print_scores = lambda *_: None
        cell.evaluate = lambda split: ({"accuracy": 0}, None, None)
        cell.evaluate_aligner = lambda p_s: {}
        cell.keep_if_best = lambda epoch, scores: None
        cell.save = lambda name: None
        return cell

def aligner(bench):
    """The aligner: reflections against the matrix exponential, a whole training step each."""
    ours, theirs = with_optimizer(TSAligner(1024, 2)), TSAligner(1024, 2)
    theirs.projection = ExponentialProjection(1024)
    with_optimizer(theirs)

    def step(model):
        e, y = bench.vectors[:32], bench.labels[:32]
        return lambda i: optimizer_step(model, aligner_loss(model(e), y, 1.0))

    times = interleave(max(3, bench.rounds // 3), exponential=step(theirs), reflections=step(ours))
    report("aligner step: matrix exponential / Householder", times, "exponential", "reflections")

def overhead(bench):
    """What distillation adds to a student's step: the frozen aligner's forward pass and two losses."""
    student, frozen = with_optimizer(bench.build().train()), TSAligner(1024, 2)
    times = interleave(2 * bench.rounds, armada=bench.step(student, 0.5, 1.0, 1.0, frozen),
                       undistilled=bench.step(student))
    report("student step: armada / undistilled", times, "armada", "undistilled")

def to_128(x, pad):
    return {key: torch.nn.functional.pad(value, (0, 128 - value.size(1)),
                                         value=pad if key == "input_ids" else 0) for key, value in x.items()}

def padding(bench):
    """Batches padded to their longest text / all to 128 tokens: sums, since batches differ in length."""
    student = with_optimizer(bench.build().train())

    def padded(i):
        x, y = bench.batch(i)
        out = student(**to_128(x, bench.pad))
        optimizer_step(student, student_loss(out, None, y, alpha=0, beta=0, gamma=0, **KW)[0])

    times = interleave(bench.rounds, grouped=bench.step(student), padded=padded)
    sums = {name: [sum(values)] for name, values in times.items()}
    report("sum over different batches: length-grouped / padded to 128", sums, "grouped", "padded")

def published(bench):
    """Examples a second of the method, both its halves: ours / the published way, rebuilt.
    The published way, a batch of 32 random texts at a time, every text padded to 128 tokens:
      - a step of the aligner, whose projection is expm(A - A^T): loss, backward, clipping, AdamW;
      - a step of the student in two passes over the same padded batch: forward and backward of the task loss,
        gamma's head included; then the aligner's forward pass without gradient (its exponential again), the
        student's forward again, and backward of alpha L_output + beta L_manifold; one clipping, one AdamW.
    Ours, on the same number of texts: train.update() for the aligner and for the student, arm armada.
    Both ways have this file's and torch's best otherwise: fused AdamW, SDPA attention, the same losses."""
    student = with_optimizer(bench.build().train())
    theirs = TSAligner(1024, 2)
    theirs.projection = ExponentialProjection(1024)
    with_optimizer(theirs)
    order = list(range(len(bench.rows)))
    random.Random(1).shuffle(order)

    def reference(i):
        chosen = [order[j % len(order)] for j in range(32 * i, 32 * i + 32)]
        e, y = bench.vectors[chosen], bench.labels[chosen]
        optimizer_step(theirs, aligner_loss(theirs.train()(e), y, 1.0))
        x = to_128(collate([bench.rows[j] for j in chosen], bench.pad), bench.pad)
        task, _ = student_loss(student(**x), None, y, alpha=0.5, beta=0, gamma=1, **KW)
        task.backward()
        with torch.no_grad():
            target = theirs.eval()(e)
        _, parts = student_loss(student(**x), target, y, alpha=0.5, beta=1, gamma=1, **KW)
        optimizer_step(student, 0.5 * parts["output"] + parts["manifold"])

    with tempfile.TemporaryDirectory() as folder:
        cell = bench.cell("armada", len(bench.rows), folder)
        batches = [rows for _, role, _, rows in training.schedule(cell) if role == "student" and len(rows) == 32]

        def ours(i):
            for role in ("aligner", "student"):
                training.update(cell, 0, role, i, batches[i % len(batches)])

        times = interleave(max(3, bench.rounds // 2), reference=reference, ours=ours)
    # Our batches differ in length, and a short one is as much a batch of 32 examples: sums, not medians.
    sums = {name: [sum(values)] for name, values in times.items()}
    report("examples a second: ours / the published way", sums, "reference", "ours")

def trainer(bench):
    """Time of an epoch: train.py's own loop / Trainer, on the same student and texts; Trainer with its
    default random batches, and grouped by length like ours."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        print("ours / transformers' Trainer: skipped, Trainer needs accelerate (pip install accelerate)")
        return

    class ForTrainer(torch.nn.Module):
        accepts_loss_kwargs = False

        def __init__(self):
            super().__init__()
            self.student = bench.build()

        def forward(self, labels, **x):
            return {"loss": student_loss(self.student(**x), None, labels, alpha=0, beta=0, gamma=0, **KW)[0]}

    # 20 batches by default. Trainer sorts within a quarter of them (at most 50): few batches would be random.
    count, filled = min(len(bench.rows), 64 * bench.rounds), {}  # strategy: (real tokens, with padding)

    def trainer_for(strategy, folder):
        def collator(items):
            x = collate([{key: value for key, value in item.items() if key != "label"} for item in items],
                        bench.pad)
            real, all_tokens = filled.get(strategy, (0, 0))
            filled[strategy] = real + x["attention_mask"].sum().item(), all_tokens + x["input_ids"].numel()
            return {**x, "labels": torch.tensor([item["label"] for item in items])}

        settings = transformers.TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=32, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_strategy="no", learning_rate=2e-5, weight_decay=0.01,
            max_grad_norm=1.0, use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
            optim="adamw_torch_fused", train_sampling_strategy=strategy)
        # Items are dictionaries with "input_ids", of which Trainer's LengthGroupedSampler takes the lengths.
        dataset = [{**bench.rows[i], "label": int(bench.labels[i])} for i in range(count)]
        made = transformers.Trainer(model=ForTrainer(), args=settings, train_dataset=dataset,
                                    data_collator=collator)
        made.remove_callback(transformers.PrinterCallback)
        return lambda _: made.train()

    with tempfile.TemporaryDirectory() as folder:
        cell = bench.cell("undistilled", count, folder)
        sizes = [[len(bench.rows[j]["input_ids"]) for j in rows] for *_, rows in training.schedule(cell)]
        filled["ours"] = sum(map(sum, sizes)), sum(max(each) * len(each) for each in sizes)

        def ours(_):  # the very loop of train.py, without its evaluation and its files
            cell.done = 0
            training.run(cell)

        times = interleave(2, ours=ours, random=trainer_for("random", folder),
                           grouped=trainer_for("group_by_length", folder))
    report("an epoch: ours / transformers' Trainer", times, "ours", "random")
    report("an epoch: ours / transformers' Trainer, grouped by length", times, "ours", "grouped")
    print("  tokens with padding per real token: " + ", ".join(
        f"{name} {every / real:.3f}" for name, (real, every) in filled.items()))

def inside(cell, steps):
    """Run the student's update() on these (step, rows) -> {part of it: seconds}, "all" included, without the
    first three steps, which warm up. CPU only: a GPU's work would have to be waited for."""
    spent = dict.fromkeys(("forward", "backward", "AdamW", "clipping", "aligner", "all"), 0.0)

    def timed(part, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] += time.perf_counter() - start
            return result
        return call

    with contextlib.ExitStack() as stack:
        for part, owner, name in (("forward", cell.student, "forward"),
                                  ("backward", torch.Tensor, "backward"),
                                  ("AdamW", cell.optimizers["student"], "step"),
                                  ("clipping", torch.nn.utils, "clip_grad_norm_"),
                                  ("aligner", cell.aligner, "forward")):
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        for i, (step, rows) in enumerate(steps):
            if i == 3:
                spent.update(dict.fromkeys(spent, 0.0))
            timed("all", training.update)(cell, 0, "student", step, rows)
    return spent

def share(bench):
    """What part of update()'s wall time a student spends in its own forward and backward passes, arm armada:
    this encoder in batches of 32, and tiny on objects, where a step is so short that all the rest weighs."""
    def line(name, cell, count):
        steps = [(step, rows) for _, role, step, rows in training.schedule(cell) if role == "student"]
        spent = inside(cell, steps[:count])
        every = spent.pop("all")
        own = (spent["forward"] + spent["backward"]) / every
        print(f"{f'share of a step inside forward and backward: {name}':<66} {own:6.3f}\n  " + ", ".join(
            f"{part} {part_of / every:.1%}" for part, part_of in spent.items())
            + f", the rest {1 - sum(spent.values()) / every:.1%}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        line("batches of 32", bench.cell("armada", len(bench.rows), folder), 3 + bench.rounds)
    threads, build = torch.get_num_threads(), training.build_student
    torch.set_num_threads(1)  # as the command line does for tiny
    training.build_student = build_student
    with tempfile.TemporaryDirectory() as folder:
        config = training.resolve(training.Config(task="objects", arms="armada", epochs=10, cache_dir=folder))
        line("tiny on objects", training.Cell(config, training.Data(config), Path(folder)), 153)
    training.build_student = build
    torch.set_num_threads(threads)

class no_attention:
    """Within: a model's attention, softmax(q k^T) v, is v alone. 0 (q + k) keeps q's and k's gradients."""
    def __enter__(self):
        self.own = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: v + 0 * (q + k)

    def __exit__(self, *_):
        torch.nn.functional.scaled_dot_product_attention = self.own

LENGTHS, TOKENS = (64, 128, 256, 512), 4096

def long_batch(bench, length, tokens=TOKENS):
    """TOKENS made-up tokens in texts of this length. The first ends early: there is a mask to read."""
    ids = torch.randint(5, len(bench.tokenizer), (tokens // length, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.arange(len(ids)) % 2

def lengths(bench):
    """Time and memory per token, of steps with the same number of tokens in texts of 64, 128, 256, 512. With
    attention taken out the time per token should stay as it is; what attention adds should double with L."""
    student = with_optimizer(bench.build().train())

    def step(length, without):
        x, y = long_batch(bench, length)

        def run(_):
            with no_attention() if without else contextlib.nullcontext():
                out = student(**x)
            optimizer_step(student, student_loss(out, None, y, alpha=0, beta=0, gamma=0, **KW)[0])
        return run

    times = interleave(bench.rounds, **{f"rest{length}": step(length, True) for length in LENGTHS})
    times |= interleave(2, **{f"all{length}": step(length, False) for length in LENGTHS})  # 10 times as long
    d = student.lm.config.hidden_size
    base = statistics.median(times["rest64"])
    print(f"steps of {TOKENS} tokens in texts of L: time without attention / that at 64 (want 1 +- .15), "
          "with\n  it / that at 64, attention's part of the latter, and of its products: L / (L + 6 d)")
    for length in LENGTHS:
        rest, every = (statistics.median(times[f"{kind}{length}"]) for kind in ("rest", "all"))
        ratio = statistics.median(a / b for a, b in zip(times[f"rest{length}"], times["rest64"]))
        memory = subprocess.run([*bench.command, "--memory", "off", "--length", str(length)],
                                capture_output=True, text=True, check=True).stdout.split()[-1]
        print(f"  {length:>4}: {ratio:6.3f}  {every / base:6.3f}  {1 - rest / every:6.1%}  "
              f"{length / (length + 6 * d):6.1%}   ({1e3 * rest / TOKENS:.0f} + "
              f"{1e3 * (every - rest) / TOKENS:.0f} us, {int(memory) / TOKENS:.0f} KiB a token)", flush=True)

def checkpointing(bench):
    """Gradient checkpointing: time of identical steps, and the memory of a step's activations, by the peak of
    a process of its own for each setting (weights and gradients are there before it counts)."""
    plain, recomputed = with_optimizer(bench.build().train()), with_optimizer(bench.build().train())
    recomputed.checkpoint_gradients()
    times = interleave(bench.rounds * 3 // 2, on=bench.step(recomputed), off=bench.step(plain))
    report("student step: checkpointing on / off", times, "on", "off")
    on, off = (int(subprocess.run([*bench.command, "--memory", setting], capture_output=True, text=True,
                                  check=True).stdout.split()[-1]) for setting in ("on", "off"))
    print(f"{'memory added by a step of 64 long texts: checkpointing on / off':<66} {on / off:6.3f}   "
          f"({on >> 10} MiB / {off >> 10} MiB)", flush=True)

def memory(bench):
    """KiB that a step adds to this process's peak: the longest 64 texts, or TOKENS in texts of --length."""
    student, args = bench.build().train(), bench.args
    if args.memory == "on":
        student.checkpoint_gradients()
    longest = sorted(range(len(bench.rows)), key=lambda j: -len(bench.rows[j]["input_ids"]))[:64]
    x, y = collate([bench.rows[j] for j in longest], bench.pad), bench.labels[longest]
    if args.length:
        x, y = long_batch(bench, args.length)

    def step(x, y):
        student_loss(student(**x), None, y, alpha=0, beta=0, gamma=1, **KW)[0].backward()

    step({key: value[:2, :8] for key, value in x.items()}, y[:2])  # the gradients are there from now on
    before = peak_kib()
    step(x, y)
    print(peak_kib() - before)

def processes(bench):
    """Steps a second of the student: train.py in two processes / in one, each with one thread, --batch-size
    the same for both (it is the whole batch's, a process takes its share). From log.jsonl; one process needs
    no torchrun. The vectors are random: their content takes no time."""
    count, seconds = 32 * max(3, bench.rounds // 2), {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        if bench.real:
            encoder, task = bench.args.encoder, ["--task", "rte", "--data-dir", bench.args.data_dir]
            sizes = {split: TASKS["rte"].rows[i] for i, split in enumerate(("train", "dev"))}
            rng = np.random.default_rng(0)
            for split, rows in sizes.items():
                np.save(f"{folder}/{split}.npy", rng.standard_normal((rows, 1024), dtype=np.float32))
            task += ["--teacher", f"vectors:{folder}"]
        else:
            student, encoder = bench.build(), f"{folder}/encoder"
            student.lm.save_pretrained(encoder)
            student.tokenizer.save_pretrained(encoder)
            task = ["--task", "objects", "--cache-dir", folder]
        for turn in range(2):
            for n in (1, 2)[::1 if turn else -1]:
                out = Path(folder, f"{turn}-{n}")
                start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"][:4 * (n > 1)]
                done = subprocess.run(
                    [sys.executable, *start, "train.py", *task, "--student", encoder, "--device", "cpu",
                     "--limit", str(count), "--eval-limit", "8", "--epochs", "4", "--eval-every", "4",
                     "--out", out],
                    capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                if done.returncode:
                    why = [line for line in done.stderr.splitlines() if "rror" in line] or ["no word of why"]
                    return print(f"train.py in {n} process(es) failed: {why[0][:200]}")
                lines = map(json.loads, Path(out, "armada/0/log.jsonl").read_text().splitlines())
                # Not the first epoch: there every batch longer than all before it takes fresh memory.
                seconds[n].append(1e3 * sum(line["tokens"] / line["tokens_per_second"] for line in lines
                                            if line.get("role") == "student" and line["epoch"] > 1))
    report("the student's epochs 2 to 4: 1 process / 2, a thread each", seconds, 1, 2)

def lora_ratio(args):
    """A training step with LoRA of rank 8 / one of all weights, and the adapters' share of the parameters."""
    task, examples = TASKS["reason/arc_e"], load_task("reason/arc_e", args.data_dir)["train"][:160]
    _, tokenizer = load_pretrained(args.lora, transformers.AutoModelForCausalLM, weights=False)
    rows, _ = encode(task, examples, tokenizer, 512, True, 32)
    bags = answer_bags(task, examples, tokenizer)
    vocabulary = answer_vocabulary(bags)
    labels, steps = bag_labels(bags, vocabulary), {}
    for name, rank in (("full", 0), ("lora", 8)):
        student = build_student(args.lora, len(vocabulary), 1024, vocabulary=vocabulary, lora=rank).train()
        share = sum(p.numel() for p in student.lm.parameters() if p.requires_grad) / sum(
            p.numel() for p in student.lm.parameters())
        print(f"{name}: {share:.3%} of the language model's parameters train")
        student.optimizer = torch.optim.AdamW(
            [p for p in student.parameters() if p.requires_grad], weight_decay=0.01, fused=True)

        def step(i, student=student):
            part = range(8 * i % 160, 8 * i % 160 + 8)
            out = student(**collate([rows[j] for j in part], tokenizer.pad_token_id))
            optimizer_step(student, student_loss(out, None, labels[part], alpha=0, beta=0, gamma=0,
                                                 answer_loss=out.answer_loss.mean(), **KW)[0])
        steps[name] = step
    report("student step: LoRA rank 8 / all weights", interleave(args.rounds, **steps), "lora", "full")

PARTS = {part.__name__: part for part in (aligner, overhead, padding, published, trainer, share, lengths,
                                          checkpointing, processes)}

def main():
    parser = argparse.ArgumentParser(description="Ratios of step times, interleaved, medians.")
    parser.add_argument("encoder", nargs="?", help="Local folder of a pretrained encoder.")
    parser.add_argument("--data-dir", help="Folder that holds RTE/.")
    parser.add_argument("--rounds", type=int, default=10, help="Steps of each kind.")
    parser.add_argument("--only", action="append", choices=PARTS, help="This part alone; may be repeated.")
    parser.add_argument("--lora", metavar="FOLDER", help="Folder of a decoder: LoRA alone.")
    parser.add_argument("--memory", choices=("on", "off"), help=argparse.SUPPRESS)  # one process a setting
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.lora:
        return lora_ratio(args)
    bench = Bench(args)
    if args.memory:
        return memory(bench)
    for part in args.only or PARTS:
        PARTS[part](bench)

if __name__ == "__main__":
    main()
