"""Ratios, each measured in one run with interleaved steps and medians.
Not a test: timings on a busy machine are noisy.

    python -m tests.bench                                           # a small random BERT and made-up texts
    python -m tests.bench ENCODER_FOLDER --data-dir FOLDER          # a local encoder on the real RTE
    python -m tests.bench --lora DECODER_FOLDER --data-dir FOLDER   # LoRA against all weights, on ARC-Easy

Lines: what is compared, the ratio, and the two medians in ms.
"""
import argparse
import dataclasses
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

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

def texts_of(args):
    """(student factory, training rows): RTE and a real encoder where given, else made-up sentences."""
    if args.encoder:
        def student():
            return build_student(args.encoder, 2, 1024)

        examples = load_task("rte", args.data_dir)["train"][:1600]
    else:
        rng = random.Random(0)
        words = [f"word{i}" for i in range(500)]

        def sentence(n):
            return " ".join(rng.choice(words) for _ in range(n))

        examples = [Example({"premise": sentence(min(100, int(rng.lognormvariate(3.5, 0.7)))),
                             "hypothesis": sentence(10)}, rng.randint(0, 1), i, f"made:{i}")
                    for i in range(1600)]
        _, tokenizer = _tiny([" ".join(words)])
        config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4,
                                         num_attention_heads=4, intermediate_size=1024)

        def student():
            return Student(transformers.BertModel(config), tokenizer, 2, 1024)

    rows, _ = encode(TASKS["rte"], examples, student().tokenizer, 128, False)
    return student, rows, torch.tensor([example.label for example in examples])

def main():
    parser = argparse.ArgumentParser(description="Ratios of step times, interleaved, medians.")
    parser.add_argument("encoder", nargs="?", help="Local folder of a pretrained encoder.")
    parser.add_argument("--data-dir", help="Folder that holds RTE/.")
    parser.add_argument("--rounds", type=int, default=10, help="Steps of each kind.")
    parser.add_argument("--lora", metavar="FOLDER", help="Folder of a decoder: LoRA alone.")
    parser.add_argument("--memory", choices=("on", "off"), help=argparse.SUPPRESS)  # one process a setting
    args = parser.parse_args()
    if args.lora:
        return lora_ratio(args)
    build, rows, labels = texts_of(args)
    pad, batches = build().tokenizer.pad_token_id, length_grouped_batches(
        [len(r["input_ids"]) for r in rows], 32, 0)

    def batch(i):
        return collate([rows[j] for j in batches[i % len(batches)]], pad), labels[batches[i % len(batches)]]

    vectors = torch.randn(len(rows), 1024)

    if args.memory:
        # Peak memory of this process, with gradient checkpointing on or off, on the longest texts.
        student = build().train()
        if args.memory == "on":
            student.checkpoint_gradients()
        longest = sorted(range(len(rows)), key=lambda j: -len(rows[j]["input_ids"]))[:64]
        x, y = collate([rows[j] for j in longest], pad), labels[longest]
        student_loss(student(**collate([rows[0]] * 2, pad)), None, labels[:2], alpha=0, beta=0, gamma=1,
                     **KW)[0].backward()
        before = peak_kib()
        student_loss(student(**x), None, y, alpha=0, beta=0, gamma=1, **KW)[0].backward()
        print(peak_kib() - before)
        return

    # 1. The aligner: reflections against the matrix exponential, a whole training step each.
    ours, theirs = with_optimizer(TSAligner(1024, 2)), TSAligner(1024, 2)
    theirs.projection = ExponentialProjection(1024)
    with_optimizer(theirs)

    def aligner_step(aligner):
        return lambda i: optimizer_step(aligner, aligner_loss(aligner(vectors[:32]), labels[:32], 1.0))

    times = interleave(max(3, args.rounds // 3), exponential=aligner_step(theirs),
                         reflections=aligner_step(ours))
    report("aligner step: matrix exponential / Householder", times, "exponential", "reflections")

    # 2. What distillation adds to a student's step: the frozen aligner's forward pass and two losses.
    student = with_optimizer(build().train())

    def student_step(alpha, beta, gamma, teacher, model=student):
        def step(i):
            x, y = batch(i)
            with torch.no_grad():
                target = ours.eval()(vectors[batches[i % len(batches)]]) if teacher else None
            optimizer_step(model, student_loss(
                model(**x), target, y, alpha=alpha, beta=beta, gamma=gamma, **KW)[0])
        return step

    plain, armada = student_step(0, 0, 0, False), student_step(0.5, 1.0, 1.0, True)
    times = interleave(2 * args.rounds, armada=armada, undistilled=plain)
    report("student step: armada / undistilled", times, "armada", "undistilled")

    # 3. Batches padded to their longest text, against all padded to 128 tokens.
    # Sums, since batches differ in length.
    def padded(i):
        x, y = batch(i)
        x = {k: torch.nn.functional.pad(v, (0, 128 - v.size(1)), value=pad if k == "input_ids" else 0)
             for k, v in x.items()}
        optimizer_step(student, student_loss(student(**x), None, y, alpha=0, beta=0, gamma=0, **KW)[0])

    times = interleave(2 * args.rounds, grouped=plain, padded=padded)
    sums = {name: [sum(values)] for name, values in times.items()}
    report("sum over different batches: length-grouped / padded to 128", sums, "grouped", "padded")

    trainer_ratio(args, build, rows, labels, pad)

    # 5. Gradient checkpointing: time, and peak memory in a process of its own for each setting.
    recomputed = with_optimizer(build().train())
    recomputed.checkpoint_gradients()
    times = interleave(args.rounds, on=student_step(0, 0, 0, False, recomputed), off=plain)
    report("student step: checkpointing on / off", times, "on", "off")
    command = [sys.executable, "-m", "tests.bench", *([args.encoder] if args.encoder else []),
               *(["--data-dir", args.data_dir] if args.data_dir else [])]
    on, off = (int(subprocess.run([*command, "--memory", setting], capture_output=True, text=True, check=True)
                   .stdout.split()[-1]) for setting in ("on", "off"))
    print(f"{'memory added by a step of 64 long texts: checkpointing on / off':<66} {on / off:6.3f}   "
          f"({on >> 10} MiB / {off >> 10} MiB)")

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
            out, losses = student(**collate([rows[j] for j in part], tokenizer.pad_token_id))
            optimizer_step(student, student_loss(out, None, labels[part], alpha=0, beta=0, gamma=0,
                                                 answer_loss=losses.mean(), **KW)[0])
        steps[name] = step
    report("student step: LoRA rank 8 / all weights", interleave(args.rounds, **steps), "lora", "full")

def trainer_ratio(args, build, rows, labels, pad):
    """Time of an epoch: train.py's own loop / Trainer with its defaults, on the same student and texts."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        print("ours / transformers' Trainer: skipped, Trainer needs accelerate (pip install accelerate)")
        return

    class ForTrainer(torch.nn.Module):
        accepts_loss_kwargs = False

        def __init__(self):
            super().__init__()
            self.student = build()

        def forward(self, labels, **x):
            return {"loss": student_loss(self.student(**x), None, labels, alpha=0, beta=0, gamma=0, **KW)[0]}

    def collator(items):
        return {**collate([row for row, _ in items], pad), "labels": torch.stack([y for _, y in items])}

    count = min(len(rows), 32 * args.rounds)
    config = training.resolve(training.Config(task="rte", student="tiny", teacher="painter",
                                              arms="undistilled", epochs=1))
    config = dataclasses.replace(config, **training.ARMS["undistilled"])
    example = Example({"premise": "", "hypothesis": ""}, 0, 0, "")
    data = SimpleNamespace(task=TASKS["rte"], splits={"train": [example]}, rows={"train": rows[:count]},
                           labels=labels[:count], dim=1024, encode=lambda *_: None, num_labels=2,
                           vocabulary=())
    training.build_student, training.finish = lambda *a, **k: build(), lambda cell: None
    with tempfile.TemporaryDirectory() as folder:
        cell = training.Cell(config, data, Path(folder))
        cell.evaluate, cell.best, cell.save = (
            lambda: ({"accuracy": 0}, None, None), {"dev": {"accuracy": 1}}, lambda: None)

        def ours(_):  # the very loop of train.py, without its evaluation and its files
            cell.done = 0
            training.run(cell)

        settings = transformers.TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=32, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_strategy="no", learning_rate=2e-5, weight_decay=0.01,
            max_grad_norm=1.0, use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
            optim="adamw_torch_fused")
        dataset = [(rows[i], labels[i]) for i in range(count)]
        trainer = transformers.Trainer(model=ForTrainer(), args=settings, train_dataset=dataset,
                                       data_collator=collator)
        trainer.remove_callback(transformers.PrinterCallback)
        times = interleave(3, ours=ours, trainer=lambda _: trainer.train())
    report("an epoch: ours / transformers' Trainer", times, "ours", "trainer")

if __name__ == "__main__":
    main()
