"""Train students: the arms, the two losses of a batch, one optimizer step, the loop.

    python train.py                                  # the built-in demonstration, no downloads
    python train.py --task rte --student opt-1.3b    # a pretrained student on a GLUE task (on CUDA)
    python train.py --task reason/arc_e --student llama-7b --data-dir DATA    # generated answers
    torchrun --nproc-per-node 8 train.py --task rte --student opt-1.3b        # on 8 GPUs

Shapes: B batch, L tokens, C labels, d_e teacher vector, d shared projection space.
Each epoch trains the TS Aligner once over the data, then the student, which is pulled towards the
aligner. A run is a grid of cells OUT/ARM/SEED/. The arms of one seed share initial weights, data
order and dropout, so that their differences are paired. The method ends at the fence.
"""
# Torch and what needs it are imported below the fence, after the command line has been read: that
# takes seconds, and --help or a mistyped flag should not wait for them. It works because a
# function's body looks its names up when the function is called, and by then the whole file has
# been read.
import argparse
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

from data import (BUILT_IN, CACHE, Parser, UserError, answer_bags, answer_vocabulary, bag_labels,
                  check_available, encode, exit_with_message, find_task, known,
                  length_grouped_batches, load_task, prepare_console, read_json, seed_of,
                  without_label)
from teacher import ENCODERS, TEACHERS, build_teacher, open_vectors, split_spec

# An arm is one line of overrides. To claim a gain is to say: armada beats every control, the best
# one included.
# DEVIATION: the authors compare with one baseline, without the auxiliary head; here are five
# controls.
ARMS = {
    # Controls: no teacher, or the wrong one (is_control() tells them by their weights and pairing).
    "undistilled": {"alpha": 0.0, "beta": 0.0, "gamma": 0.0},  # the student alone
    "undistilled-aux": {"alpha": 0.0, "beta": 0.0},  # with its auxiliary head, as in the method
    "shuffled": {"pairing": "shuffled"},             # the method with other texts' pictures
    "noise": {"pairing": "noise"},                   # with noise of the pictures' mean and variance
    # No pictures, but all the texts, with soft labels by the undistilled student of the same seed.
    "self-training": {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "self_training": True},
    "armada": {},                                    # the method
    # Ablations: the teacher's own vectors, and one part of the method less or otherwise.
    "random-aligner": {"aligner_lr": 0.0},           # never trained
    "no-output": {"output_factor": 0.0},             # no soft labels; the rest of L_S as it was
    "alpha-0": {"alpha": 0.0},                       # the paper's: no soft labels, full true labels
    "no-manifold": {"beta": 0.0},
    "no-aux": {"gamma": 0.0},
    "euclidean": {"loss": "euclidean"},
    "cosine": {"loss": "cosine"},
    # Less of the teacher: painter:RHO draws RHO picture + sqrt(1 - RHO^2) noise. armada is dose 1.
    "dose-0": {"teacher": "painter:0"},
    "dose-0.25": {"teacher": "painter:0.25"},
    "dose-0.5": {"teacher": "painter:0.5"},
    "dose-0.75": {"teacher": "painter:0.75"},
}


# A cell (class Cell, below the fence) is one arm with one seed. Used here are its config and its
# device; its aligner and student, which are also models[role], with optimizers and scalers by role;
# labels, in which -100, nan or a row of zeros stands for none (--unlabelled); and two ways from the
# indices of training examples to inputs: teacher_vectors(rows) gives e, which in the arm `shuffled`
# are other texts', and token_batch(rows) gives the tokens x.
def aligner_batch_loss(cell, rows):
    """Return (L_A, {}) of a batch: the TS Aligner learns the task from the teacher's vectors alone.

    rows: the indices of B training examples. The second result holds parts to log: here are none.
    """
    e = send(cell.teacher_vectors(rows), cell.device)  # (B, d_e)
    y = send(cell.labels[rows], cell.device)          # (B,), or (B, |V_a|) bags of answer tokens
    aligner_out = cell.aligner(e)                     # o_t, a_t (B, C), p_t (B, d)
    return aligner_loss(aligner_out, y, cell.config.gamma), {}


def student_batch_loss(cell, rows):
    """Return (L_S, its parts) of a batch: the student learns from labels, and from the aligner.

    rows: the indices of B training examples. Of several processes each reads the texts of some
    rows, and all compute the loss of the whole batch (gather_outputs says why).
    """
    config = cell.config
    own_rows, rows, counts = shard_rows(rows)         # in one process: rows, rows, [B]
    x = cell.token_batch(own_rows)                    # (B, L) ids, mask ..., also answers to learn
    y = send(cell.labels[rows], cell.device)          # (B,), or (B, |V_a|) bags of answer tokens
    aligner_out = None                                # an arm without a teacher has no aligner
    if cell.aligner:
        # Here it only answers: eval mode, no graph. It costs milliseconds: float32.
        with torch.no_grad():
            e = send(cell.teacher_vectors(rows), cell.device)  # (B, d_e)
            aligner_out = cell.aligner.eval()(e)      # o_t, a_t (B, C), p_t (B, d)
    with cell.autocast():
        student_out = cell.parallel_student(**x)      # o_s, a_s (B, C), p_s (B, d)
    student_out = gather_outputs(student_out, counts)
    return student_loss(
        student_out, aligner_out, y, alpha=config.alpha, beta=config.beta, gamma=config.gamma,
        kind=config.loss, temperature=config.temperature, output_factor=config.output_factor,
        answer_loss=mean_answer_loss(student_out))    # None unless the student generates


BATCH_LOSSES = {"aligner": aligner_batch_loss, "student": student_batch_loss}


def update(cell, epoch, role, step, rows):
    """Take one optimizer step of a role on a batch; return {name: 0-dim tensor} for the log.

    The batch passes in micro-batches, which hold less in memory at once. Each is weighted by its
    share of the batch, so that the sum of their gradients is the batch's, whatever the last one's
    size. (The losses of batch means are another matter: they see the micro-batch's mean.)
    """
    config = cell.config
    model = cell.models[role].train()
    optimizer = cell.optimizers[role]
    scaler = cell.scalers[role]                       # does something for float16 only
    logged = {}
    for start in range(0, len(rows), config.micro_batch):
        micro_rows = rows[start:start + config.micro_batch]
        share = len(micro_rows) / len(rows)
        seed_step(cell, epoch, role, step, start)     # all arms of a seed draw the same dropout
        sync_after(cell, start + config.micro_batch >= len(rows))  # of several processes
        loss, parts = BATCH_LOSSES[role](cell, micro_rows)
        scaler.scale(loss * share).backward()
        for name, value in {**parts, "loss": loss}.items():
            logged[name] = logged.get(name, 0) + share * value.detach()
    scaler.unscale_(optimizer)                        # the norm below is that of the true gradient
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)                            # skipped where a float16 gradient overflowed
    scaler.update()
    optimizer.zero_grad()
    return {**logged, "grad_norm": in_one_piece(norm)}


def lr_factor(step, total):
    """Return the share of the peak learning rate at a role's step 0 ... total - 1 of the whole run.

    It rises linearly over min(100, 10 %) of the steps, then falls linearly: 0 would come one step
    after the last.
    """
    # DEVIATION: the authors build scheduler, warm-up and weight decay and never apply them; we do,
    # and cap their 100 steps of warm-up at a tenth of all, since CB has fewer than 100.
    warm = min(100, total // 10)
    if step < warm:
        return (step + 1) / warm
    return (total - step) / (total - warm)


def schedule(cell):
    """Yield every step of the run in order: (epoch, role, step of the epoch, rows of the batch).

    Of each epoch all batches go to the aligner, then the same batches to the student.
    """
    for epoch in range(cell.config.epochs):
        seed = seed_of(cell.seed, "order", epoch)
        batches = length_grouped_batches(cell.data.lengths, cell.config.batch_size, seed)
        for role in cell.models:                      # "aligner", if the arm has one, and "student"
            for step, rows in enumerate(batches):
                yield epoch, role, step, rows


def run(cell):
    """Train one cell to its end: the aligner's epoch, the student's epoch, and again."""
    config = cell.config
    steps = cell.steps_per_epoch                      # of each role
    peak_rates = {"aligner": config.aligner_lr, "student": config.lr}
    if cell.device.type == "cuda":
        rehearse(cell)
    log_untrained(cell)
    with interruptible() as interrupt, progress_bar(cell, schedule(cell)) as bar:
        pending_logs = PendingLogs(cell)
        for count, (epoch, role, step, rows) in enumerate(bar, 1):
            if count <= cell.done:
                continue  # A resumed run walks past what is done: each step seeds itself anyway.

            # Rate.
            lr = peak_rates[role] * lr_factor(epoch * steps + step, config.epochs * steps)
            cell.optimizers[role].param_groups[0]["lr"] = lr

            # Step.
            values = update(cell, epoch, role, step, rows)
            pending_logs.add(values, rows)
            cell.done = count

            # Log. Nothing above waits for the GPU: while it works, the CPU prepares the next batch.
            # To read a value means to wait, so it is done rarely.
            ends_epoch = step + 1 == steps
            if not (ends_epoch or interrupt.pressed or (step + 1) % 50 == 0):
                continue
            means = pending_logs.write(epoch, role, step, lr)
            cell.lap("steps")
            bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})

            # Evaluate. The last epoch counts; the best one is chosen on dev and so too good.
            is_due = ends_epoch and role == "student" and is_evaluated(config, epoch + 1)
            if is_due:
                scores, cell.answers, p_s = cell.evaluate("dev")
                aligner_scores = cell.evaluate_aligner(p_s)
                cell.lap("evaluation")
                cell.log({"epoch": epoch + 1, "dev": scores, **aligner_scores,
                          "seconds": cell.rounded_seconds()})
                cell.keep_if_best(epoch + 1, scores)
                print_scores(cell, epoch + 1, means, scores)

            # Save. The last step's student is saved by finish().
            stops = interrupt.pressed  # asked once: a signal may come between save and raise
            if stops or (is_due and cell.checkpoint_is_due()):
                cell.save("last")
            cell.lap("files")
            if stops:
                raise Stopped(interrupt.number)
            pending_logs = PendingLogs(cell)
    finish(cell)


# ---- the method ends here; below is bookkeeping ----


# ---- configuration: every field is a flag ----
def option(default, help, choices=(), low=-math.inf, high=math.inf, above=-math.inf):
    """Return a Config field with its --help sentence, choices and limits.

    low and high are values that are allowed, above is one that is not.
    """
    if choices:
        help += f" One of {', '.join(choices)}."
    return field(default=default, metadata={
        "help": help, "choices": choices, "low": low, "high": high, "above": above})


@dataclass
class Config:
    """The flags of one run, of which argparse is built.

    None means "it depends" and is filled in by resolve().
    """
    task: str = option(
        None, "Task to learn: objects or say/objects (built in), rte ..., reason/arc_e ..., "
        "instruct/dolly ...")
    student: str = option(
        None, "Student to train: a short name such as opt-1.3b, a hub id, a local folder, or tiny.")
    teacher: str = option(
        None, f"Teacher to ask, as NAME or NAME:ARGUMENT, with a NAME of {', '.join(TEACHERS)}.")
    picture_encoder: str = option(
        None, "What turns pictures into vectors: pixels, clip[:MODEL] or vae[:MODEL].")
    max_pictures: int = option(
        None, "Let the teacher make at most so many vectors, then stop.", low=0)
    arms: tuple = option(
        None, f"Arms to train, separated by commas, of {', '.join(ARMS)}.")
    seeds: tuple = option(
        None, "Seeds to train every arm with, separated by commas.")
    data_dir: str = option(
        None, "Folder that holds RTE/, reasoning/ ...; without it (Super)GLUE is downloaded.")
    cache_dir: str = option(
        CACHE, "Folder for downloads and teacher vectors.")
    offline: bool = option(
        False, "Use no network, only what is here or in the caches.")
    out: str = option(
        None, "Folder to write; by default runs/TASK, or runs/TASK-2 ... when that is taken.")
    resume: str = option(
        None, "Run, or one ARM/SEED of it, to go on with; it remembers its other flags.")
    # DEVIATION: the paper reports three kinds; our default compares each text with its own picture.
    # Its choices are losses.KINDS, whose import would take seconds; a test compares the two.
    loss: str = option(
        "manifold", "Loss between the two projections.",
        ("euclidean", "cosine", "manifold"))
    alpha: float = option(
        0.5, "Weight of the soft labels against the true ones.", low=0, high=1)
    beta: float = option(
        None, "Weight of the manifold loss.", low=0)
    gamma: float = option(
        1.0, "Weight of the auxiliary heads in the task and output losses.", low=0)
    temperature: float = option(
        None, "Temperature T that flattens the soft labels.", above=0)
    output_factor: float = option(
        1.0, "Factor of the soft-label term alone; 0 drops the term.", low=0)
    pairing: str = option(
        "own", "Whose vector a training text gets.", ("own", "shuffled", "noise"))
    proj_dim: int = option(
        None, "Width of the shared projection space; by default the teacher's own.", low=1)
    orthogonal_student: bool = option(
        False, "Make the student's projection orthogonal too.")
    epochs: int = option(
        None, "Passes over the training data.", low=1)
    batch_size: int = option(
        32, "Examples per optimizer step, over all processes.", low=1)
    micro_batch: int = option(
        None, "Examples per forward pass (a divisor of --batch-size), over all processes; "
        "default: all of them.", low=1)
    max_length: int = option(
        None, "Tokens per text; a longer text has its longest field shortened.", low=4)
    max_new_tokens: int = option(
        None, "Tokens of a generated answer at most, out of --max-length.", low=1)
    sampling_temperature: float = option(
        0.0, "Temperature to sample answers with; 0 takes the likeliest token each time.", low=0)
    lora: int = option(
        None, "Rank of the LoRA adapters on a frozen language model; 0 trains all weights.", low=0)
    lr: float = option(
        None, "Peak learning rate of the student.", above=0)
    aligner_lr: float = option(
        1e-3, "Peak learning rate of the aligner; 0 leaves it untrained.", low=0)
    device: str = option(
        "auto", "Device to train on: auto, cpu, cuda, cuda:N or mps.")
    amp: str = option(
        "auto", "Mixed precision; auto is bf16 or fp16 on CUDA, off elsewhere.",
        ("auto", "off", "bf16", "fp16"))
    grad_checkpoint: str = option(
        "auto", "Recompute activations to save memory; auto does so for large students on CUDA.",
        ("auto", "on", "off"))
    compile: bool = option(
        False, "Compile each block of the student (torch.compile): minutes at first, then faster.")
    fsdp: bool = option(
        False, "Split the student itself over torchrun's processes, not only the batches.")
    limit: int = option(
        None, "Keep only the first N training examples.", low=2)
    unlabelled: int = option(
        0, "Train on the N examples behind --limit as well, without reading their labels.", low=0)
    eval_limit: int = option(
        None, "Score only the first N dev and test examples.", low=1)
    eval_every: int = option(
        None, "Epochs from one evaluation, after which a checkpoint may be due, to the next.",
        low=1)
    keep_best: bool = option(
        False, "Keep the student of the epoch that was best on dev in a folder best/.")
    self_training: bool = option(
        False, "Let the seed's undistilled student label what --unlabelled adds.")
    plan: bool = option(
        False, "Tell memory, steps and teacher vectors in advance; load and write nothing.")
    memory: float = option(
        None, "Memory of the card in GiB that --plan should make the run fit.", above=0)

    def __post_init__(self):
        """Check every field that is given; UserError says what the first bad one may be."""
        for option_field in fields(self):
            value = getattr(self, option_field.name)
            if value is None:
                continue
            flag = flag_of(option_field.name)
            if option_field.type is tuple:
                setattr(self, option_field.name, parse_list(flag, value))
            elif option_field.metadata["choices"]:
                known(value, option_field.metadata["choices"], flag)
            elif option_field.type in (int, float):
                check_limits(flag, value, option_field.metadata)
        if self.task is not None:
            self.task = find_task(self.task).name
        split_spec(self.teacher or "painter")  # these two know the names, and build nothing yet
        split_spec(self.picture_encoder or "pixels", ENCODERS, "--picture-encoder")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", self.device):
            raise UserError(f"--device {self.device}: choose auto, cpu, cuda, cuda:N or mps")


def flag_of(name):
    """Return the flag of a Config field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def parse_list(flag, value):
    """Return the tuple that "0,1", 0 or (0, 1) stands for: integers of --seeds, else names."""
    if isinstance(value, (str, int)):
        value = str(value).split(",")
    items = tuple(str(item).strip() for item in value)
    typed = ",".join(items)
    if flag == "--seeds" and not all(re.fullmatch("[0-9]{1,18}", item) for item in items):
        raise UserError(f"--seeds {typed}: give whole numbers: 0,1,2 (seeds from 0)")
    if not items or len(set(items)) < len(items):
        raise UserError(f"{flag} {typed}: name each once")
    if flag == "--seeds":
        return tuple(int(item) for item in items)
    return items


LARGEST = 10**12  # of any number on the command line; the square of a larger one might overflow


def check_limits(flag, value, limits):
    """Raise UserError unless a number is finite and within its option's limits."""
    low = limits["low"]
    high = limits["high"]
    above = limits["above"]
    if LARGEST < value < math.inf:
        raise UserError(f"{flag} is too large: give {LARGEST:.0e} at most")
    if low <= value <= high and above < value < math.inf:  # nan is neither
        return
    wanted = f"above {above}" if above > low else f"at least {low}"
    if high < math.inf:
        wanted += f" and at most {high}"
    raise UserError(f"{flag} {value} must be a number {wanted}")


# What None becomes. The key is --help's name for the case; a later line has precedence.
DEFAULTS = {
    "Default": {
        **{option_field.name: option_field.default for option_field in fields(Config)
           if option_field.default},
        "student": "bert-base", "teacher": "clip", "arms": "armada", "seeds": "0", "beta": 1.0,
        "temperature": 5.0, "epochs": 10, "lr": 2e-5, "eval_every": 1, "max_length": 128,
        "max_new_tokens": 256, "lora": 0},
    "For objects": find_task("objects").defaults,
    "For say/objects": find_task("say/objects").defaults,
    "For llama-...": {"lora": 8, "epochs": 3},
    "For reason/... and instruct/...": find_task("instruct/dolly").defaults,
    "For commonsense": {"max_new_tokens": find_task("reason/boolq").defaults["max_new_tokens"]},
    "Without --task": {"arms": "undistilled,armada,shuffled", "seeds": "0,1,2,3,4,5,6"},
}


def resolve(config):
    """Return a copy with every default filled in and every value checked.

    Raises UserError, before anything is loaded or fetched.
    """
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # which the hub's own library and data.retry ask
    config = fill_defaults(config)
    for arm in config.arms:
        overrides = ARMS[known(arm, ARMS, "arm")]
        check_names(overrides, f"of the arm {arm!r} in train.py:ARMS")
        replace(config, **overrides)  # which are checked like flags
    check_generation(config)
    check_self_training(config)
    check_processes(config)
    if config.unlabelled and not config.limit:
        raise UserError(f"--unlabelled {config.unlabelled} takes the examples behind the first "
                        "--limit, which keep their labels: give --limit too")
    if config.memory and not config.plan:
        raise UserError("--memory goes with --plan")
    if config.batch_size % config.micro_batch:
        fits = max(m for m in range(1, config.micro_batch) if config.batch_size % m == 0)
        raise UserError(f"--micro-batch {config.micro_batch} must divide "
                        f"--batch-size {config.batch_size}: try {fits}")
    return config


def check_names(overrides, what):
    """Raise UserError where a default or an override names no field of Config."""
    for name in overrides:
        known(name, [option_field.name for option_field in fields(Config)], f"flag {what}")


def fill_defaults(config):
    """Return a copy in which nothing that depends is None: typed values win over every default."""
    task = find_task(config.task or "objects")
    check_names(task.defaults, f"of the task {task.name!r} in data.py:TASKS")
    defaults = {**DEFAULTS["Default"], **task.defaults}
    if str(config.student).startswith("llama-"):
        defaults |= DEFAULTS["For llama-..."]
    if task.defaults.get("lora") and config.lora == 0:
        # The task's learning rate is LoRA's, too high for all weights.
        defaults["lr"] = DEFAULTS["Default"]["lr"]
    if config.task is None:
        defaults |= DEFAULTS["Without --task"]
    typed = {name: value for name, value in vars(config).items() if value is not None}
    return Config(**{**defaults, "out": free_folder(f"runs/{task.name}"),
                     "micro_batch": config.batch_size, "task": task.name, **typed})


def free_folder(out):
    """Return OUT, or OUT-2, OUT-3 ... when that is taken: a second run never touches the first."""
    folder = out
    n = 2
    while Path(folder).exists():
        folder = f"{out}-{n}"
        n += 1
    return folder


def check_generation(config):
    """Raise UserError where student, LoRA or lengths do not suit a task to generate."""
    generates = find_task(config.task).kind == "generate"
    must_know_words = generates and config.task not in BUILT_IN  # tiny makes its own from texts
    if config.student == "tiny" and (config.lora or must_know_words):
        raise UserError("--student tiny is random: for --lora and to generate give opt-125m, "
                        "llama-7b ...")
    if generates and config.max_new_tokens >= config.max_length:
        raise UserError(f"--max-new-tokens {config.max_new_tokens} leaves a prompt no room: "
                        f"--max-length {config.max_length} is for both")


def check_self_training(config):
    """Raise UserError where an arm would ask an undistilled student that is not there by then."""
    for i, arm in enumerate(config.arms):
        if not replace(config, **ARMS[arm]).self_training:
            continue
        if find_task(config.task).kind == "generate":
            raise UserError(f"{arm} gives classes or scores, not texts: leave it out of --arms")
        if "undistilled" not in config.arms[:i] and not config.resume:
            raise UserError(f"{arm} learns from its seed's undistilled student: name undistilled "
                            "before it in --arms")


def check_processes(config):
    """Raise UserError where the flags do not suit how many processes torchrun started."""
    processes = number_from_torchrun("WORLD_SIZE", 1)
    if config.plan and (config.fsdp or processes > 1):
        raise UserError("--plan tells the memory of one process: without --fsdp and torchrun")
    if config.fsdp and "WORLD_SIZE" not in os.environ:
        raise UserError("--fsdp splits over processes: "
                        "torchrun --nproc-per-node N train.py --fsdp ...")
    if config.fsdp and config.compile:
        raise UserError("--compile was not tried with --fsdp: leave one of them out")
    if config.micro_batch < processes:
        raise UserError(f"--micro-batch {config.micro_batch} is too small for {processes} "
                        "processes")


def number_from_torchrun(name, otherwise=None):
    """Return an environment variable that torchrun sets, as a number; UserError where it is
    none."""
    text = os.environ.get(name, otherwise)
    if not re.fullmatch("[0-9]{1,9}", str(text)):
        raise UserError(f"the environment has {name}={text}: unset WORLD_SIZE, or start several "
                        "processes with torchrun")
    return int(text)


def resume_config(folder, typed):
    """Return the Config that a run (a grid or one cell) was started with; typed: {name: value} of
    the line.

    UserError where no run is, and where a typed flag differs from the saved one. What a start may
    spend, or how it is run, may differ: these flags are taken as typed.
    """
    folder = Path(folder)
    wanted = Config(**typed)
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: no run there: give the --out of a training")
    try:
        saved = Config(**read_json(folder / "config.json"))
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {folder}: its config.json is damaged, or not one of this "
                        f"version ({error})") from None
    this_start = {"fsdp": False, "plan": False, "memory": None}
    for name in ("offline", "max_pictures", *this_start):
        if name in typed:
            this_start[name] = typed[name]
    differ = []
    for name in typed:
        before, now = getattr(saved, name), getattr(wanted, name)
        if name not in ("resume", "out", *this_start) and before != now:
            differ.append(f"{flag_of(name)} is {as_typed(before)}, not {as_typed(now)}")
    if differ:
        raise UserError(f"--resume {folder}: this run's {'; '.join(differ)}: leave it out, or "
                        "start another")
    out = folder
    if folder.resolve().parts[-2:] == (saved.arms[0], str(saved.seeds[0])):  # one cell of a grid
        out = folder.resolve().parent.parent
    return replace(saved, **this_start, resume=str(folder), out=str(out))


def as_typed(value):
    """Return a value as the command line spells it: (0, 1) is 0,1."""
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return value


def configure(argv=None):
    """Return the resolved Config of a command line, or end with one line and status 2."""
    parser = Parser(
        prog="train.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="ARMADA: distil a picture-making teacher into a text-only language model.")
    for option_field in fields(Config):
        sentences = [option_field.metadata["help"]]
        for case, values in DEFAULTS.items():
            if option_field.name in values:
                sentences.append(f"{case}: {values[option_field.name]}.")
        how = {"type": option_field.type}
        if option_field.type is bool:
            how = {"action": "store_true"}
        elif option_field.type is tuple:
            how = {"type": str}
        help = " ".join(sentences).replace("%", "%%")
        parser.add_argument(flag_of(option_field.name), **how, help=help)
    # Without defaults: a resumed run is compared with what was typed alone.
    typed = vars(parser.parse_args(argv))
    try:
        if "resume" in typed:
            return resolve(resume_config(typed["resume"], typed))
        return resolve(Config(**typed))
    except UserError as error:
        fail(error)


def fail(message):
    """End with one line on stderr and exit status 2."""
    exit_with_message(2, f"train.py: error: {message}")


if __name__ == "__main__":
    COMMAND_LINE = configure()  # --help and bad flags are answered here, before torch is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, OPTConfig

import eval as evaluation
from align import TSAligner
from losses import PER_EXAMPLE, aligner_loss, predictions, student_loss, task_loss
from student import (Student, _tiny, build_student, is_decoder, load_config, load_pretrained,
                     load_student, precision, rank, send, tiny_tokenizer, wants_cuda, world)


# ---- small pieces of the loop ----
def seed_step(cell, epoch, role, step, start):
    """Seed the dropout of one micro-batch, which begins at row `start` of its batch."""
    first = start
    if role == "student":
        first += rank()  # Each process draws its own dropout; all processes' aligners stay alike.
    seed_all(seed_of(cell.seed, role, epoch, step, first), cell.device)


def seed_all(seed, device):
    """Seed torch's generators, as torch.manual_seed does.

    On a CPU that writes a stack trace for each absent kind of device, which is 3 % of tiny's step.
    """
    generator = torch.default_generator if device.type == "cpu" else torch
    generator.manual_seed(seed)


def mean_answer_loss(student_out):
    """Return the answers' mean cross entropy, or None of a student that does not generate."""
    answer_loss = getattr(student_out, "answer_loss", None)  # (B,), a field of AnswerOutputs alone
    return None if answer_loss is None else answer_loss.mean()


def progress_bar(cell, steps):
    """Return tqdm's bar over all steps of a cell; it draws nothing where stderr is no terminal."""
    return tqdm(steps, total=cell.total_steps, leave=False, disable=None if is_first() else True,
                desc=f"{cell.config.arms[0]} seed {cell.seed}")


def log_untrained(cell):
    """Log what a pretrained student that generates answers before its first step."""
    if cell.student.generates and not cell.done:
        scores, _, _ = cell.evaluate("dev")
        cell.lap("evaluation")
        cell.log({"epoch": 0, "dev": scores})


def rehearse(cell):
    """Run the longest batch forward and backward, on a GPU before the first step.

    Memory that does not suffice is known in the first seconds then, and the allocator, which is
    slow to grow, grows once. No result changes: each step seeds itself. AdamW's moments, which the
    first step makes, are stood in for by empty tensors.
    """
    longest = sorted(range(len(cell.data.lengths)), key=cell.data.lengths.__getitem__)
    stand_ins = []
    for role, model in cell.models.items():
        for weight in model.parameters():
            if weight.requires_grad and not cell.optimizers[role].state:
                stand_ins += [torch.empty_like(weight), torch.empty_like(weight)]
    for role, model in cell.models.items():
        model.train()
        sync_after(cell, True)
        loss, _ = BATCH_LOSSES[role](cell, longest[-cell.config.micro_batch:])
        cell.scalers[role].scale(loss).backward()
        model.zero_grad()
    del stand_ins
    cell.lap("steps")


def is_evaluated(config, epoch):
    """Whether a student is scored after this epoch (counted from 1)."""
    return epoch == config.epochs or epoch % config.eval_every == 0


def print_scores(cell, epoch, means, scores):
    """Print one evaluation: the parts of the loss before their weights, and the headline on dev."""
    names = [name for name in ("answer", "task", "output", "manifold") if name in means]
    parts = " ".join(f"{name} {means[name]:.3f}" for name in names)
    metric, score = next(iter(scores.items()))
    print(f"seed {cell.seed} {cell.config.arms[0]}, epoch {epoch}: {parts}; "
          f"dev {metric} {score:.1%} ({sum(cell.seconds.values()):.1f} s)", flush=True)


class PendingLogs:
    """What the steps since the last line of log.jsonl have returned, still on the device.

    To read a value there makes the CPU wait until the GPU has computed it: so many are read
    together.
    """
    def __init__(self, cell):
        self.cell = cell
        self.steps = []  # {name: 0-dim tensor} of each
        self.tokens = 0
        self.began = time.perf_counter()

    def add(self, values, rows):
        """Remember a step: what update() returned, and the training rows that it saw."""
        self.steps.append(values)
        lengths = self.cell.data.lengths
        self.tokens += sum(lengths[row] for row in rows)

    def write(self, epoch, role, step, lr):
        """Write a line of log.jsonl; return {name: mean over its steps}."""
        steps_so_far = epoch * self.cell.steps_per_epoch + step + 1
        facts = {"step": steps_so_far, "epoch": epoch + 1, "role": role, "lr": lr,
                 "steps": len(self.steps), "tokens": self.tokens}
        values = average_logs(self.steps, facts, self.cell.scalers[role])
        speed = self.tokens / (time.perf_counter() - self.began)
        self.cell.log(facts | values | {"tokens_per_second": round(speed)})
        return values


def average_logs(pending_logs, facts, scaler):
    """Return {name: mean} of pending_logs = [{name: 0-dim tensor}], the steps that end with
    facts["step"].

    UserError names the first step whose value is not finite. The scaler of float16 finds its scale
    by overflowing, so there an infinite gradient is a skipped step and no fault, unless no scale is
    small enough.
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise UserError("fp16 gradients overflow at every loss scale: try --amp bf16 or off")
    means = {}
    first_step = facts["step"] - len(pending_logs) + 1
    for name in pending_logs[0]:
        column = torch.stack([values[name].float() for values in pending_logs]).tolist()
        finite = [value for value in column if math.isfinite(value)]
        may_overflow = name == "grad_norm" and scaler.is_enabled()
        if len(finite) < len(column) and not may_overflow:
            bad = next(i for i, value in enumerate(column) if not math.isfinite(value))
            raise UserError(
                f"the {facts['role']}'s {name} is not finite at step {first_step + bad} (epoch "
                f"{facts['epoch']}); nothing saved since. Lower --lr, --beta, or try --amp off")
        means[name] = sum(finite) / max(1, len(finite))
    return means


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, by a signal whose number is args[0]."""


# Ctrl-C; the time limit of a cluster or `docker stop`; a closed terminal; SLURM's early warning.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]  # Windows has the first two


@contextmanager
def handle_stop_signals(handler):
    """Let handler(number, frame) answer STOP_SIGNALS, but for those that are ignored (nohup's)."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, before[number] or signal.SIG_DFL)


def stop_at_once(number, frame):
    """Answer a signal while there is nothing to save."""
    silence_a_closed_terminal(number)
    raise Stopped(number)


class Interrupt:
    """Whether the run was asked to stop: what interruptible() yields."""
    def __init__(self):
        self.number = None  # of the signal

    @property
    def pressed(self):
        return self.number is not None

    def press(self, number, frame):
        """Answer a signal in the middle of a step, which is not cut in half; a second Ctrl-C is."""
        if number == signal.SIGINT and self.pressed:
            raise Stopped(number)
        self.number = number
        silence_a_closed_terminal(number)


def silence_a_closed_terminal(number):
    """After SIGHUP send what is printed nowhere: to write to a closed terminal is an error."""
    if number != getattr(signal, "SIGHUP", None):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def interruptible():
    """Yield an Interrupt that the first signal marks, so that the step is finished and saved.

    In several processes, which are not at the same step, the first one stops at once: go on from
    the last checkpoint.
    """
    interrupt = Interrupt()
    if world() > 1:
        yield interrupt
        return
    with handle_stop_signals(interrupt.press):
        yield interrupt


# ---- several processes (torchrun) ----
# All of this does nothing in one process. Of several, each goes through the whole run and takes
# every N-th row of each batch: as many tokens as the others, since a batch is sorted by length.
def is_first():
    """Whether this process is the one that writes and speaks; in one process it is."""
    return rank() == 0


def init_processes(config):
    """Meet the other processes, if torchrun started any. From then on only the first one prints."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if wants_cuda(config) and config.device in ("auto", "cuda"):
        wanted = number_from_torchrun("LOCAL_WORLD_SIZE")
        gpus = torch.cuda.device_count()
        if wanted > gpus:
            raise UserError(f"--nproc-per-node {wanted}: each process takes a GPU, here are {gpus}")
        torch.cuda.set_device(number_from_torchrun("LOCAL_RANK"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        number_from_torchrun(name)
    # Without a name torch takes NCCL wherever there is a GPU, and NCCL sends nothing from a CPU.
    backend = None if wants_cuda(config) else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))  # the teacher may draw for as long
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def from_rank0(make):
    """Return or raise in every process what make() does in the first one.

    One process looks at the files, at a time when none writes.
    """
    answer = [None]
    if is_first():
        try:
            answer = [make()]
        except (UserError, OSError) as error:
            answer = [error]
    if world() > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def shard_rows(rows):
    """Deal out a batch: (own rows, all rows process after process, counts [N] of rows of each)."""
    shards = [rows[i::world()] for i in range(world())]
    # With fewer rows than processes some have none: they go along with the first one, which is not
    # counted.
    own = shards[rank()] or rows[:1]
    return own, sum(shards, []), [len(shard) for shard in shards]


def gather_outputs(outputs, counts):
    """Outputs of this process's rows -> Outputs of all rows, process after process; counts [N] says
    how many.

    Only the own rows have a graph, the others' is in their process. So each process takes the loss
    of the WHOLE batch, means over it included, and the processes' gradients add up to one
    process's, however the batch is cut.
    """
    if world() == 1:
        return outputs
    columns = [tensor.float().reshape(len(tensor), -1) for tensor in outputs]  # answer_loss is (b,)
    own = torch.cat(columns, 1)                                                 # (b, all widths)
    own.register_hook(lambda gradient: gradient * world())  # DDP and FSDP will divide by it
    padded = F.pad(own.detach(), (0, 0, 0, max(counts) - len(own)))             # one shape for all
    shards = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shards, padded)
    shards[rank()] = own
    rows = torch.cat([shard[:count] for shard, count in zip(shards, counts)])   # (B, all widths)
    gathered = rows.split([column.size(1) for column in columns], 1)
    shapes = [(len(rows), *tensor.shape[1:]) for tensor in outputs]
    return type(outputs)(*(tensor.reshape(shape) for tensor, shape in zip(gathered, shapes)))


def sync_after(cell, is_last):
    """Let DistributedDataParallel add gradients up once, after the last micro-batch."""
    cell.parallel_student.require_backward_grad_sync = is_last


def in_one_piece(tensor):
    """Return a tensor that FSDP may have split in one piece, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_rank0(tensor):
    """Return a tensor that FSDP may have split in one piece, in the first process; else None."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if is_first() else None


# ---- files ----
@contextmanager
def atomic_write(path):
    """Yield a path to write a file or folder at, which takes PATH's place once it is whole."""
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    yield part
    part.rename(f"{path}.new")
    finish_write(path)


def finish_write(path):
    """Let PATH.new, which is whole, become PATH.

    A kill at any instant leaves one of the two; the next call ends what was begun.
    """
    if os.path.exists(f"{path}.new"):
        shutil.rmtree(path, ignore_errors=True)
        os.replace(f"{path}.new", path)


def write_json(path, content):
    """Write a JSON file that is never seen half written."""
    with atomic_write(path) as new:
        new.write_text(json.dumps(content, indent=1))


def checksum(folder):
    """Return one number for the names and contents of all files of a folder but `checksum` itself.

    A CRC finds every damage that chance makes, and costs less than reading the files from a disk.
    """
    total = 0
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name != "checksum":
            total = zlib.crc32(path.relative_to(folder).as_posix().encode(), total)
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    total = zlib.crc32(block, total)
    return total


def forget_training_state(last):
    """Delete from a finished cell's last/ what only a resumed training needs: twice the student's
    size.

    A kill in between leaves the cell finished; the next start deletes the rest.
    """
    for name in ("training.json", "optimizers.safetensors", "checksum"):
        (last / name).unlink(missing_ok=True)


# ---- a run: its data, and the cells of its grid ----
def is_distilled(config):
    """Whether a configuration looks at the teacher at all."""
    return bool(config.beta or config.alpha * config.output_factor)


def is_control(config):
    """Whether an arm has no teacher or the wrong one: what a claim is measured against."""
    return not is_distilled(config) or config.pairing != "own"


def wants_checkpointing(config, lm, has_cuda):
    """Whether a language model recomputes activations: auto, if it is large and on CUDA."""
    if config.grad_checkpoint == "auto":
        is_large = count_parameters(lm) > 300e6
        return is_large and has_cuda and lm.supports_gradient_checkpointing
    return config.grad_checkpoint == "on"


def training_rows(config):
    """Return how many training examples take part, with and without a label; None for all."""
    return config.limit and config.limit + config.unlabelled


def splits_in_use(config, splits):
    """Return the splits of a task, {split: [Example]}, as far as a run looks at them.

    Here the examples behind the first --limit lose label and answer, so that nothing reads them.
    UserError where there are fewer than the flags count on.
    """
    task = find_task(config.task)
    there = len(splits["train"])
    wanted = training_rows(config)
    if config.unlabelled and there < wanted:
        raise UserError(f"{task.name} has {there} training examples, --limit {config.limit} and "
                        f"--unlabelled {config.unlabelled} want {wanted}: lower one of them")
    train = splits["train"][:config.limit]
    for example in splits["train"][len(train):wanted]:
        train.append(without_label(task, example))
    in_use = {"train": train}
    for split in splits:
        if split != "train":
            in_use[split] = splits[split][:config.eval_limit]
    return in_use


def tiny_texts(task, examples):
    """Return all texts that a student reads or writes: their words are tiny's vocabulary."""
    texts = []
    for example in examples:
        texts += [text for text in (*task.pair(example), example.output) if text]
    return texts


class Data:
    """Examples, labels, teacher vectors and token ids of a run, once for all its cells.

    splits {split: [Example]}, encoded {split: [token ids ...]} (after the first encode()), labels
    (N,) or (N, |V_a|), vectors {teacher: {split: rows -> float32 (n, d_e)}}, dim the shared
    projection space's d.
    """
    def __init__(self, config):
        self.task = find_task(config.task)
        generates = self.task.kind == "generate"
        if config.student != "tiny":  # first of all, for the student may be unable to
            model_class = AutoModelForCausalLM if generates else AutoModel
            _, tokenizer = load_pretrained(config.student, model_class, weights=False)
        examples = load_task(config.task, config.data_dir, config.cache_dir)
        self.splits = splits_in_use(config, examples)
        self.encoded = {}
        self.open_teachers(config, examples)
        self.num_labels = max(1, len(self.task.labels))  # 1 for a regression
        self.vocabulary = ()                             # V_a, of a task to generate
        if generates:
            if config.student == "tiny":
                tokenizer = tiny_tokenizer(self.training_texts(), generates)
            self.make_bags(tokenizer)
        else:
            self.labels = torch.tensor([example.label for example in self.splits["train"]])  # (N,)

    def open_teachers(self, config, examples):
        """Make or find the vectors of every teacher that an arm looks at.

        examples: the whole splits, for a folder of vectors has a row for each line of a file.
        """
        arms = [replace(config, **ARMS[arm]) for arm in config.arms]
        wanted = [arm.teacher for arm in arms if is_distilled(arm)]
        self.vectors = {}
        self.dim = config.proj_dim
        # --teacher comes first, even if no arm looks at it: its width is the projection space's by
        # default.
        for spec in dict.fromkeys([config.teacher, *wanted]):
            teacher = build_teacher(spec, config.picture_encoder)
            self.dim = self.dim or teacher.dim
            if self.dim > teacher.dim:
                raise UserError(f"--proj-dim {self.dim} is over {spec}'s {teacher.dim}: give that "
                                "or less")
            if spec in wanted:
                self.vectors[spec], _ = open_vectors(
                    teacher, self.task, examples, config.cache_dir, training_rows(config),
                    config.max_pictures, config.eval_limit)

    def make_bags(self, tokenizer):
        """Make the labels of a task to generate: bags of the answers' tokens, (N, |V_a|)."""
        train_bags = answer_bags(self.task, self.splits["train"], tokenizer)
        dev_bags = answer_bags(self.task, self.splits["dev"], tokenizer)
        self.vocabulary = answer_vocabulary(train_bags)
        if len(self.vocabulary) < 2:
            raise UserError(f"{self.task.name}: the training answers hold no two tokens to tell "
                            "apart")
        self.num_labels = len(self.vocabulary)
        self.labels = bag_labels(train_bags, self.vocabulary)
        self.dev_labels = bag_labels(dev_bags, self.vocabulary)

    def encode(self, student, config):
        """Make the token ids of every split. All cells have the same tokenizer."""
        longest = config.max_length
        if longest > student.max_tokens:
            raise UserError(f"--max-length {longest}: {config.student} reads at most "
                            f"{student.max_tokens} tokens")
        for split, examples in self.splits.items():
            self.encoded[split], shortened = encode(
                self.task, examples, student.tokenizer, longest, student.decoder,
                config.max_new_tokens)
            if shortened:
                limit = f"{longest} tokens"
                if student.generates:
                    limit += f" ({config.max_new_tokens} of them an answer's)"
                print(f"{split}: {shortened} of {len(examples)} texts had over {limit}: cut",
                      flush=True)

    def fingerprint(self):
        """Return {split: [number of examples, hash of their texts and labels]}."""
        prints = {}
        for split, examples in self.splits.items():
            digest = hashlib.sha256()
            for example in examples:
                facts = (sorted(example.fields.items()), example.label, example.output)
                digest.update(repr(facts).encode())
            prints[split] = [len(examples), digest.hexdigest()]
        return prints

    @cached_property
    def lengths(self):
        """How many tokens each training text has."""
        return [len(row["input_ids"]) for row in self.encoded["train"]]

    def training_texts(self):
        """Return all texts of the training split, of which tiny makes its vocabulary."""
        return tiny_texts(self.task, self.splits["train"])

    def lookup(self, config, seed):
        """Return the function rows -> their teacher vectors (n, d_e).

        Here the controls part from the method: --pairing says whose vector a row gets.
        """
        read = self.vectors[config.teacher]["train"]
        source = np.arange(len(self.labels))  # whose vector each training row gets
        if config.pairing == "noise":
            return self.noise(read, seed)
        if config.pairing == "shuffled":
            # One fixed derangement a seed, a single cycle; dev stays as it is.
            order = np.random.default_rng(seed_of(seed, "shuffled")).permutation(source)
            source[order] = np.roll(order, 1)
        elif config.pairing != "own":
            raise ValueError(f"Data.lookup has no branch for the pairing {config.pairing!r}")
        return lambda rows: torch.from_numpy(read(source[rows]))

    def noise(self, read, seed):
        """Return the function rows -> Gaussian noise (n, d_e) with the vectors' mean and variance.

        Both are those of each dimension. An example's noise is fixed, as its picture is.
        """
        stride = 1 + len(self.labels) // 6000  # of MNLI's 400,000 vectors a part will do
        sample = torch.from_numpy(read(np.arange(0, len(self.labels), stride)))  # (n, d_e)
        mean = sample.mean(0)                                                    # (d_e,)
        deviation = sample.std(0, correction=0)                                  # (d_e,)
        generator = torch.Generator()

        def draw(row):
            generator.manual_seed(seed_of(seed, "noise", row))
            return mean + deviation * torch.randn(len(mean), generator=generator)

        return lambda rows: torch.stack([draw(row) for row in rows])


def whole_checkpoint(last):
    """Return last/ where it holds all to go on, else None; UserError if it is damaged."""
    if not (last / "training.json").exists():
        return None
    written = last / "checksum"
    if not written.exists() or written.read_text() != str(checksum(last)):
        raise UserError(f"{last} is damaged: delete it, and --resume begins this cell anew")
    return last


class Cell:
    """One arm with one seed: its models and optimizers, and where they stand in the run."""
    def __init__(self, config, data, folder):
        self.config = config
        self.data = data
        self.folder = folder
        self.seed = config.seeds[0]
        self.device, self.autocast, self.scalers, _ = precision(config)
        # Where it stands; load() sets these four from a checkpoint.
        self.done = 0        # optimizer steps, of both roles
        self.seconds = dict.fromkeys(("steps", "evaluation", "files"), 0.0)
        self.best = None     # the best epoch's number and dev scores
        self.lines = []      # of log.jsonl
        self.answers = None  # to the dev split, when last evaluated
        self.last_saved = time.perf_counter()
        checkpoint = self.find_checkpoint()
        self.build_student(checkpoint)
        self.build_aligner()
        self.place_models(is_new=checkpoint is None)
        _, _, half_precision = self.autocast.args
        if half_precision:
            self.student.try_autocast(self.autocast)
        if config.compile:
            self.student.compile_blocks(self.autocast)
        self.optimizers = {  # AdamW leaves out what has no gradient
            role: torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
            for role, model in self.models.items()}
        if not data.encoded:
            data.encode(self.student, config)
        self.labels = data.labels
        if config.self_training:
            self.labels = self.ask_twin()
        if checkpoint:
            self.load(checkpoint)
        # Of the last checkpoint. Before the first: 12 bytes for each weight and its two moments, at
        # half a gigabyte a second, which is a slow disk.
        self.seconds_of_save = 12 * count_trained(self.student) / 0.5e9
        self.start_log()
        self.lap_began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def find_checkpoint(self):
        """Return the folder last/ where it holds all to go on, else None."""
        last = self.folder / "last"
        if is_first():
            finish_write(self.folder / "best")
            finish_write(last)
        return from_rank0(partial(whole_checkpoint, last))

    def build_student(self, checkpoint):
        """Make the student, whose first weights depend on the seed alone, or open a saved one."""
        config = self.config
        data = self.data
        torch.manual_seed(seed_of(self.seed, "student"))
        if checkpoint:
            self.student = load_student(checkpoint)
        else:
            self.student = build_student(
                config.student, data.num_labels, data.dim, data.training_texts(),
                orthogonal=config.orthogonal_student, labels=data.task.labels,
                max_length=config.max_length, vocabulary=data.vocabulary,
                max_new_tokens=config.max_new_tokens, lora=config.lora)
        if wants_checkpointing(config, self.student.lm, self.device.type == "cuda"):
            self.student.checkpoint_gradients()
        if self.device.type == "cuda":
            self.student.never_wait()
        if torch.bfloat16 in self.autocast.args:
            self.student.round_frozen_weights()

    def build_aligner(self):
        """Make the aligner and the lookup of its vectors; an arm without a teacher has neither."""
        config = self.config
        data = self.data
        torch.manual_seed(seed_of(self.seed, "aligner"))
        self.aligner = None
        self.vectors = None          # {split: the function rows -> their own vectors (n, d_e)}
        self.teacher_vectors = None  # the function training rows -> the vectors that they get
        if is_distilled(config):
            self.vectors = data.vectors[config.teacher]
            self.teacher_vectors = data.lookup(config, self.seed)
            latent_dim = self.vectors["dev"]([0]).shape[1]
            self.aligner = TSAligner(latent_dim, data.num_labels, proj_dim=data.dim)

    @torch.no_grad()
    def ask_twin(self):
        """Return the labels, those that are missing as this seed's undistilled student gives them.

        They are distributions, float32 (N, C), or the scores of a regression (N,).
        """
        twin = load_student(self.folder.parents[1] / "undistilled" / str(self.seed) / "last")
        twin.to(self.device).eval()
        labels = self.data.labels.clone()                                     # (N,)
        read = predictions
        if self.data.task.kind == "classify":
            labels = F.one_hot(labels.clamp(min=0), self.data.num_labels).float()  # (N, C)
            read = partial(torch.softmax, dim=-1)
        rows = range(len(labels) - self.config.unlabelled, len(labels))
        for start in range(0, len(rows), self.config.micro_batch):
            some = rows[start:start + self.config.micro_batch]
            with self.autocast():
                out = twin(**self.token_batch(some))
            labels[some] = read(out.logits.float()).cpu()                     # (n, C) or (n,)
        return labels

    def place_models(self, is_new):
        """Move the models to the device; spread the student over the processes, if several."""
        self.parallel_student = self.student  # what a training step calls
        if self.config.fsdp:
            self.student.shard(torch.distributed.init_device_mesh(self.device.type, (world(),)))
        roles = {"student": self.student}
        if self.aligner:
            roles = {"aligner": self.aligner, "student": self.student}  # in the order of an epoch
        self.models = torch.nn.ModuleDict(roles).to(self.device)
        if is_new and self.data.task.kind == "regress":
            scores = self.data.labels
            self.start_biases_at(scores[~scores.isnan()].mean().item())
        if world() > 1 and not self.config.fsdp:
            # The aligner is so small that each process trains all of it.
            self.parallel_student = DistributedDataParallel(
                self.student, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def start_biases_at(self, mean_label):
        """Start the biases of a regression's four heads at the mean label.

        A relu that starts below 0 has no gradient and stays there: it kills about one seed in ten.
        """
        for name, weight in self.models.named_parameters():
            if name.endswith("classifier.bias"):
                torch.nn.init.constant_(weight, mean_label)

    def start_log(self):
        """Write log.jsonl as the checkpoint knows it; later lines are dropped, they come again."""
        if is_first():
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            (self.folder / "log.jsonl").write_text(text)

    @property
    def steps_per_epoch(self):
        """How many batches each role sees in an epoch; the last one may be short."""
        return math.ceil(len(self.data.labels) / self.config.batch_size)

    @property
    def total_steps(self):
        """How many optimizer steps the whole run has, of both roles."""
        return self.steps_per_epoch * self.config.epochs * len(self.models)

    def token_batch(self, rows):
        """Return the student's input: {"input_ids", "attention_mask" ...: (B, L)}."""
        return self.student.batch([self.data.encoded["train"][row] for row in rows])

    def lap(self, part):
        """Count the seconds since the last call as spent on a part: steps, evaluation or files."""
        now = time.perf_counter()
        self.seconds[part] += now - self.lap_began
        self.lap_began = now

    def rounded_seconds(self):
        """Return {part: seconds} as the log shows them."""
        return {part: round(seconds, 1) for part, seconds in self.seconds.items()}

    def evaluate(self, split):
        """Return the student's (metrics, answers, p_s of the first 1,000 texts) on a split."""
        return evaluation.score_student(
            self.student, self.data.task, self.data.splits[split], self.data.encoded[split],
            split=split, seed=self.seed, batch_size=self.config.micro_batch,
            autocast=self.autocast, temperature=self.config.sampling_temperature, keep=1000)

    @torch.inference_mode()
    def evaluate_aligner(self, p_s):
        """Return the aligner's own scores on dev's true vectors, and how well the student's p_s
        meet its p_t.

        p_s: a list of (d,), of the first texts.
        """
        if self.aligner is None:
            return {"aligner": None, "spaces": None}
        dev = self.data.splits["dev"]
        outputs = []
        for start in range(0, len(dev), 1000):
            rows = range(start, min(start + 1000, len(dev)))
            e = torch.from_numpy(self.vectors["dev"](rows)).to(self.device)  # (n, d_e)
            outputs.append(self.aligner.eval()(e))
        logits = torch.cat([out.logits for out in outputs])                  # (N, C)
        if not logits.isfinite().all():
            raise UserError("the aligner's logits are not finite; nothing saved since the last "
                            "evaluation. Lower --aligner-lr")
        if self.student.generates:
            scores = {"loss": task_loss(logits, self.data.dev_labels.to(logits)).item()}
        else:
            scores = evaluation.score(self.data.task, dev, predictions(logits).tolist())
        p_t = outputs[0].proj.cpu().numpy()  # (n, d), of the same first texts
        p_s = torch.stack(p_s).numpy()       # (n, d)
        spaces = {"retrieval@1": evaluation.retrieval_at_1(p_t, p_s),
                  "cka": evaluation.linear_cka(p_t, p_s)}
        return {"aligner": scores, "spaces": spaces}

    def keep_if_best(self, epoch, scores):
        """Remember an epoch whose headline on dev is the highest so far; --keep-best saves its
        student."""
        # The first metric that the best epoch has too: a resumed run may have gained one (rouge_l's
        # package).
        headline = next(name for name in scores if self.best is None or name in self.best["dev"])
        if self.best is None or scores[headline] > self.best["dev"][headline]:
            self.best = {"epoch": epoch, "dev": scores}
            if self.config.keep_best:
                self.save("best")

    def checkpoint_is_due(self):
        """Whether an evaluation should be followed by a checkpoint.

        Files of a large student take longer to write than its epochs to train. So that they take
        about 5 % of a run's time, the next one waits 20 times as long as the last one took. After
        the last step finish() saves the student.
        """
        if self.done == self.total_steps:
            return False
        is_due = time.perf_counter() - self.last_saved > 20 * self.seconds_of_save
        return from_rank0(lambda: is_due)  # clocks differ, and all must take part

    def log(self, line):
        """Add a line to log.jsonl."""
        self.lines.append(line)
        if is_first():
            with open(self.folder / "log.jsonl", "a") as file:
                print(json.dumps(line), file=file)

    def save(self, name):
        """Write best/ or last/, a student as load_student and AutoModel open it.

        last/ also holds all that a resumed run needs to go on: after the last step no moments.
        """
        began = time.perf_counter()
        state = {key: gather_to_rank0(value) for key, value in self.student.state().items()}
        moments = {}
        if name == "last" and self.done < self.total_steps:
            moments = self.optimizer_moments()
        if not is_first():
            return
        with atomic_write(self.folder / name) as new:
            self.student.save(new, state)
            if name == "last":
                if self.aligner:
                    save_file(self.aligner.state_dict(), new / "aligner.safetensors")
                save_file(moments, new / "optimizers.safetensors")
                write_json(new / "training.json", {
                    "done": self.done, "best": self.best, "seconds": self.seconds,
                    "lines": self.lines, "scaler": self.scalers["student"].state_dict()})
                (new / "checksum").write_text(str(checksum(new)))
        if name == "last":
            self.last_saved = time.perf_counter()
            self.seconds_of_save = self.last_saved - began

    def optimizer_moments(self):
        """Return {"ROLE NUMBER NAME": tensor}: the state of AdamW for each numbered parameter."""
        moments = {}
        for role, optimizer in self.optimizers.items():
            for number, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    moments[f"{role} {number} {name}"] = gather_to_rank0(value)
        return moments

    def load(self, last):
        """Stand where the checkpoint in folder `last` stands, whose student is open already."""
        saved = read_json(last / "training.json")
        self.done = saved["done"]
        self.best = saved["best"]
        self.seconds = saved["seconds"]
        self.lines = saved["lines"]
        self.scalers["student"].load_state_dict(saved["scaler"])  # ignored unless fp16 enables it
        if self.aligner:
            self.aligner.load_state_dict(load_file(last / "aligner.safetensors"))
        for key, value in load_file(last / "optimizers.safetensors").items():
            role, number, name = key.split()
            weight = self.optimizers[role].param_groups[0]["params"][int(number)]
            value = value.to(self.device)
            if isinstance(weight, DTensor) and value.shape == weight.shape:
                # A moment is split as its weight is; the number of steps is not.
                value = distribute_tensor(value, weight.device_mesh, weight.placements)
            self.optimizers[role].state[weight][name] = value


def finish(cell):
    """Save the last epoch's student, score it on all splits; write predictions_* and metrics.json.

    It is saved first, since to score a large test split may take longer than the training did.
    """
    cell.save("last")
    cell.lap("files")
    answers = {}  # of each split
    metrics = describe(cell)
    if cell.answers:  # as they were after the last step
        answers["dev"] = cell.answers
        metrics["dev"] = cell.lines[-1]["dev"]
    for split in cell.data.splits:
        if split != "train" and split not in answers:
            metrics[split], answers[split], _ = cell.evaluate(split)
    cell.lap("evaluation")
    metrics["seconds"] = cell.rounded_seconds()
    if not is_first():
        return
    for split in answers:
        evaluation.write_predictions(
            cell.folder, split, cell.data.task, cell.data.splits[split], answers[split])
    write_json(cell.folder / "metrics.json", metrics)
    forget_training_state(cell.folder / "last")


def describe(cell):
    """Return what metrics.json says of a finished cell beside the scores of its splits."""
    config = cell.config
    metrics = {"task": cell.data.task.name, "student": config.student, "teacher": config.teacher,
               "arm": config.arms[0], "seed": cell.seed, "control": is_control(config),
               "labelled": len(cell.labels) - config.unlabelled, "unlabelled": config.unlabelled}
    if cell.student.generates:
        metrics["untrained"] = cell.lines[0]["dev"]
    parameters = list(cell.student.parameters())
    peak_memory = 0
    if cell.device.type == "cuda":
        peak_memory = torch.cuda.max_memory_allocated(cell.device) >> 20
    return metrics | {
        "best": cell.best, "aligner": cell.lines[-1]["aligner"], "spaces": cell.lines[-1]["spaces"],
        "grad_norm": round(mean_gradient_norm(cell.lines), 4),
        "parameters": sum(weight.numel() for weight in parameters),
        "trained": sum(weight.numel() for weight in parameters if weight.requires_grad),
        "peak_memory_mib": peak_memory}


def mean_gradient_norm(lines):
    """Return the mean over a log's steps of the student's gradient norm before clipping."""
    of_student = [line for line in lines if line.get("role") == "student"]
    steps = sum(line["steps"] for line in of_student)
    return sum(line["grad_norm"] * line["steps"] for line in of_student) / steps


# ---- --plan: what a run will take, told in advance ----
GIB = 2**30
CUDA_CONTEXT = 0.6 * GIB  # CUDA's context and kernels, which PyTorch does not count. Assumed.
MEMORY_PARTS = {
    "weights": "weights, aligner included",
    "moments": "AdamW moments",
    "gradients": "gradients",
    "copies": "copies of weights in half precision",
    "logits": "vocabulary logits",
    "activations": "activations, keys and values",
}


def training_memory(config, student, aligner_size=0):
    """Return {part: bytes} at the peak of a training step, every text being max_length tokens long.

        peak = weights + moments + max(copies + logits + activations,
                                       gradients + activations of one layer)

    weights      4 bytes each; frozen ones 2 under bf16 (a LoRA's base is rounded).
    moments      8 bytes for each trained weight: AdamW keeps two running means.
    gradients    4 bytes for each trained weight.
    copies       2 bytes for each float32 weight in half precision: autocast multiplies by these.
    activations  Those of n + 1 layers, n being the model's: one more stands for the embeddings
                 and for what the backward pass holds in hand. With checkpointing the inputs of
                 n layers and the activations of one.
    logits       16 bytes for each of N x V, where a student generates: N tokens of answers, V of
                 the vocabulary. At once live the float32 logits, their exp and two gradients.

    Why a maximum: the backward pass descends through the layers and turns the activations of each
    into gradients, so memory changes along a straight line and peaks at one of its two ends. Only
    the gradients of earlier micro-batches are there from the beginning.

    config says micro_batch, max_length, amp and grad_checkpoint, none of them "auto"; student has
    real shapes and no numbers (imagine_student); aligner_size counts the aligner's parameters. The
    CUDA context comes on top. tests/test_plan.py compares all this with measurements.
    """
    rows = config.micro_batch
    half = config.amp != "off"
    trained = count_trained(student)
    frozen = count_parameters(student) - trained
    frozen_size = 2 if config.amp == "bf16" else 4
    base_is_rounded = config.lora and config.amp == "bf16"
    layers = student.lm.config.num_hidden_layers
    one_layer = layer_activations(student.lm, rows, config.max_length, half, on_cuda(config))
    kept = (layers + 1) * one_layer
    if config.grad_checkpoint == "on":
        # What passes from layer to layer is float32 even under autocast, unless the base is not.
        input_size = 2 if base_is_rounded else 4
        one_input = input_size * rows * config.max_length * student.lm.config.hidden_size
        kept = layers * one_input + one_layer

    always = {
        "weights": 4 * (trained + aligner_size) + frozen_size * frozen,
        "moments": 8 * (trained + aligner_size),
    }
    start = {"gradients": 0, "copies": 0, "logits": 0, "activations": kept}
    if rows < config.batch_size:
        start["gradients"] = 4 * trained
    if half:
        start["copies"] = 2 * trained
        if frozen_size == 4:
            start["copies"] += 2 * frozen
    if student.generates:
        answer_tokens = rows * config.max_new_tokens
        start["logits"] = 16 * answer_tokens * student.lm.config.vocab_size
    end = {"gradients": 4 * trained, "copies": 0, "logits": 0, "activations": one_layer}
    return always | max(start, end, key=total_bytes)


def layer_activations(lm, rows, length, half, cuda):
    """Return the bytes of what one layer keeps of `rows` texts of `length` tokens to go backward.

        rows * length * (26 h + 2 m f)    in half precision (half) on a GPU (cuda)
        rows * length * (34 h + 4 m f)    in float32

    h is the model's width, f the width inside its MLP. Half precision (float32 in brackets) keeps
         6 h  the input, one copy each for queries, keys and values    [4 h, one for all three]
         6 h  queries, keys and values                                 [12 h]
         4 h  what the maps after the attention and into the MLP read  [8 h]
         8 h  what two layer norms read, in float32 always             [8 h]
         2 h  two dropout masks, a byte for each number; 4 on a CPU    [2 h; on a CPU 8 h]
       2 m f  m numbers in the MLP: 1 with a ReLU, whose output tells its slope; 2 with a GELU,
              input and output; 5 with a GELU that transformers writes out in Python; 4 with a
              gate: its input and output, the other factor, the product  [4 m f]

    So OPT with f = 4 h keeps 34 h, BERT 42 h. Korthikanti et al. 2022, "Reducing Activation
    Recomputation in Large Transformer Models", count 34 h for a GELU and layer norms in half
    precision, and the terms in L x L below. A fused attention has none: it makes its L x L weights
    anew when it goes backward. A LoRA keeps about a fifth less: frozen maps need no inputs.
    """
    width = lm.config.hidden_size
    mlp_width = first_setting(lm.config, ("intermediate_size", "ffn_dim"), 4 * width)
    activation = first_setting(lm.config, ("hidden_act", "activation_function"), "gelu")
    kept_in_mlp = {"relu": 1, "gelu_new": 5}.get(activation, 2)
    if any("gate" in name.split(".")[-1] for name, _ in lm.named_modules()):
        kept_in_mlp = 4
    number = 2 if half else 4  # bytes
    per_width = 26 if half else 34
    if not cuda:
        per_width += 6
    tokens = rows * length
    kept = tokens * (per_width * width + number * kept_in_mlp * mlp_width)

    # Attention that is not fused keeps float32 weights, dropped-out weights and a mask. The CPU's
    # fused kernel knows no dropout.
    heads = first_setting(lm.config, ("num_attention_heads",), 1)
    dropout = first_setting(
        lm.config, ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"), 0)
    if lm.config._attn_implementation == "eager" or (dropout and not cuda):
        kept += tokens * heads * length * (4 + 2 * number)
    # DeBERTa's attention weighs, in two ways, each token against every relative position from -k to
    # k, and keeps these scores and a copy of the positions' keys for each text.
    if getattr(lm.config, "relative_attention", False):
        buckets = getattr(lm.config, "position_buckets", 0)
        positions = 2 * (buckets if buckets > 0 else length)
        ways = len(lm.config.pos_att_type or ())
        kept += rows * ways * positions * number * (heads * length + width)
    return kept


def first_setting(lm_config, names, otherwise):
    """Return the first of several spellings that a transformers config has."""
    for name in names:
        value = getattr(lm_config, name, None)
        if value is not None:
            return value
    return otherwise


def generating_memory(config, student, aligner_size=0):
    """Return {part: bytes} at the peak of generating micro_batch answers, between two epochs.

        peak = weights + moments + keys and values, 2 n d_kv numbers for each token of n layers
               + a copy of the maps that a LoRA is merged into
    """
    lm_config = student.lm.config
    heads = first_setting(lm_config, ("num_attention_heads",), 1)
    key_heads = first_setting(lm_config, ("num_key_value_heads",), heads)
    key_width = lm_config.hidden_size // heads * key_heads
    number = 4 if config.amp == "off" else 2  # bytes
    tokens = config.micro_batch * config.max_length
    kept = 2 * lm_config.num_hidden_layers * key_width * number * tokens
    merged = sum(lora.base.weight.numel() for lora in student.loras().values())
    parts = training_memory(config, student, aligner_size)
    return parts | {
        "gradients": 0, "copies": number * merged, "logits": 0, "activations": kept}


def peak_memory(config, student, aligner_size=0):
    """Return {part: bytes} of what takes the most: training or, if the student generates, that."""
    try:
        peaks = [training_memory(config, student, aligner_size)]
        if student.generates:
            peaks.append(generating_memory(config, student, aligner_size))
    except Exception as error:  # of many kinds: a few families have a width for each layer, or none
        raise UserError(f"{config.student}: --plan has no formula for the model type "
                        f"{student.lm.config.model_type}: {error}") from None
    return max(peaks, key=total_bytes)


def total_bytes(parts):
    return sum(parts.values())


def on_cuda(config):
    """Whether the run that is planned, perhaps for another machine, has a GPU."""
    return wants_cuda(config, has_cuda=True)


def imagine_student(config, lm_config, proj_dim):
    """Return the Student of a run with real shapes and no numbers, on PyTorch's meta device."""
    task = find_task(config.task)
    generates = task.kind == "generate"
    model_class = AutoModelForCausalLM if generates else AutoModel
    vocabulary = ()
    if generates:
        vocabulary = range(min(1000, lm_config.vocab_size))  # V_a, which only the data could tell
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, model_max_length=10**9)
    with torch.device("meta"):
        try:
            lm = model_class.from_config(lm_config, dtype=torch.float32)
        except Exception as error:  # of many kinds, as many as there are families
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{config.student}: transformers makes no {model_class.__name__} of "
                            f"its config.json: {reason}") from None
        student = Student(
            lm, tokenizer, len(vocabulary) or max(1, len(task.labels)), proj_dim, lora=config.lora,
            orthogonal=config.orthogonal_student, labels=task.labels, max_length=config.max_length,
            vocabulary=vocabulary, max_new_tokens=config.max_new_tokens)
    if config.max_length > student.max_tokens:
        raise UserError(f"--max-length {config.max_length}: {config.student} reads at most "
                        f"{student.max_tokens} tokens")
    return student


def resolve_auto(config, student):
    """Return a copy of a Config with what `auto` becomes for a student: amp and grad_checkpoint."""
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if on_cuda(config) else "off"
    is_checkpointed = wants_checkpointing(config, student.lm, on_cuda(config))
    return replace(config, amp=amp, grad_checkpoint="on" if is_checkpointed else "off")


# Students to fall back on, by their short names, the largest first.
KNOWN_DECODERS = {
    "opt-1.3b": OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192,
                          num_attention_heads=32, word_embed_proj_dim=2048),
    "opt-125m": OPTConfig(),
}
KNOWN_ENCODERS = {"bert-base": BertConfig(), "bert-6l": BertConfig(num_hidden_layers=6)}


def variants_to_try(config, lm_config, proj_dim):
    """Yield (Config, its Student) of ever thriftier runs, the one that was asked for first.

    They have checkpointing, then smaller micro-batches; the same with a LoRA; and all of this again
    with each smaller student whose shapes are known.
    """
    students = [(config.student, lm_config)]
    ranks = [config.lora]
    if config.student != "tiny":  # it is the smallest, and takes no LoRA
        known_students = KNOWN_DECODERS if is_decoder(lm_config) else KNOWN_ENCODERS
        students += known_students.items()
        ranks = [config.lora] if config.lora else [0, 8]
    divisors = [n for n in range(config.micro_batch, 0, -1) if config.batch_size % n == 0]
    asked = count_parameters(imagine_student(config, lm_config, proj_dim))
    for name, shapes in students:
        for lora in ranks:
            variant = replace(config, student=name, lora=lora)
            try:
                student = imagine_student(variant, shapes, proj_dim)
            except UserError:
                continue  # it has no maps for a LoRA, or reads no texts as long
            if shapes is not lm_config and count_parameters(student) > 0.9 * asked:
                continue  # it is not smaller
            yield variant, student
            for rows in divisors:
                yield replace(variant, grad_checkpoint="on", micro_batch=rows), student


def flags_that_fit(config, lm_config, proj_dim, aligner_size):
    """Return the first flags that make the run fit into --memory; "" for none, None for no way."""
    context = CUDA_CONTEXT if on_cuda(config) else 0
    for variant, student in variants_to_try(config, lm_config, proj_dim):
        needed = total_bytes(peak_memory(variant, student, aligner_size)) + context
        if needed <= config.memory * GIB:
            changed = [name for name in ("student", "lora", "grad_checkpoint", "micro_batch")
                       if getattr(variant, name) != getattr(config, name)]
            return " ".join(f"--{name.replace('_', '-')} {getattr(variant, name)}"
                            for name in changed)
    return None


def count_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def count_trained(model):
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def memory_table(config, student, aligner_size):
    """Return lines of GiB by part, a column for each precision without and with checkpointing."""
    columns = [("off", "off"), ("off", "on"), ("bf16", "off"), ("bf16", "on")]
    peaks = []
    for amp, checkpoint in columns:
        variant = replace(config, amp=amp, grad_checkpoint=checkpoint)
        peaks.append(peak_memory(variant, student, aligner_size))
    titles = [amp + " ckpt" * (checkpoint == "on") for amp, checkpoint in columns]
    lines = [" " * 38 + "".join(f"{title:>11}" for title in titles)]
    for part, words in MEMORY_PARTS.items():
        values = [parts[part] / GIB for parts in peaks]
        if any(values):
            lines.append(f"  {words:36}" + "".join(f"{value:11.3f}" for value in values))
    context = 0
    if on_cuda(config):
        context = CUDA_CONTEXT
        lines.append(f"  {'CUDA context (assumed)':36}" + f"{context / GIB:11.3f}" * len(columns))
    sums = [(total_bytes(parts) + context) / GIB for parts in peaks]
    lines.append(f"  {'total':36}" + "".join(f"{value:11.3f}" for value in sums))
    return lines


def examples_at_hand(config):
    """Return {"train": [...], "dev": [...]} where a run would use no network; else None."""
    task = find_task(config.task)
    folder = Path(config.data_dir or Path(config.cache_dir, "data"))
    if task.name not in BUILT_IN and not config.data_dir and not (folder / task.folder).is_dir():
        return None
    return splits_in_use(config, load_task(task.name, str(folder)))


def planned_rows(config, examples):
    """Return ((train, dev) rows, whose numbers they are); None for rows that nobody knows."""
    if examples:
        return (len(examples["train"]), len(examples["dev"])), "its data"
    official = find_task(config.task).rows
    if not official:
        return None, ""
    train, dev = official
    rows = min(train, training_rows(config) or train), min(dev, config.eval_limit or dev)
    return rows, "the official counts"


def vectors_to_make(spec, rows):
    """Return in words how many vectors a teacher is asked for; rows as in planned_rows."""
    kind, _ = split_spec(spec)
    if not kind.costly:
        return "0 (this teacher costs nothing)"
    if rows is None:
        return "unknown: give --data-dir"
    return f"at most {sum(rows):,}"


def planned_width(config):
    """Return (width of the teacher's vectors, what to say of it); --proj-dim may not exceed it."""
    kind, argument = split_spec(config.teacher)
    try:
        width = kind.planned_dim(argument, config.picture_encoder)
    except UserError:
        raise
    except Exception as error:  # of a teacher that was added
        raise UserError(f"{config.teacher}: its planned_dim failed: {error!r}") from None
    if width is None:
        return max(1024, config.proj_dim or 0), ", width assumed"
    if config.proj_dim and config.proj_dim > width:
        raise UserError(f"--proj-dim {config.proj_dim} is over {config.teacher}'s {width}: "
                        "give that or less")
    return width, ""


def student_shapes(config, examples):
    """Return the transformers config of the student; that of "tiny" depends on the examples."""
    task = find_task(config.task)
    if config.student != "tiny":
        return load_config(config.student, task.kind == "generate")
    texts = [" ".join(f"word{i}" for i in range(10_000))]  # so many different words are assumed
    if examples:
        texts = tiny_texts(task, examples["train"])
    with torch.device("meta"):
        lm, _ = _tiny(texts, task.kind == "generate")
    return lm.config


def imagine_models(config, examples):
    """Return (student, its language model's config, d, aligner's parameters, what to say of d)."""
    teacher_width, assumed = planned_width(config)
    proj_dim = config.proj_dim or teacher_width
    lm_config = student_shapes(config, examples)
    student = imagine_student(config, lm_config, proj_dim)
    aligner_size = 0
    if is_distilled(config):
        with torch.device("meta"):
            num_labels = student.settings["num_labels"]
            aligner_size = count_parameters(TSAligner(teacher_width, num_labels, proj_dim=proj_dim))
    return student, lm_config, proj_dim, aligner_size, assumed


def after_out_of_memory(config):
    """Return the line to end with after torch.OutOfMemoryError: which flags would fit the card.

    They are --plan's. Where it cannot tell, or finds that the run should fit, something else may be
    on the card, and the line names what takes less.
    """
    try:
        gigabytes = card_memory(config)
        arms = [replace(config, memory=gigabytes, **ARMS[arm]) for arm in config.arms]
        config = next((arm for arm in arms if is_distilled(arm)), arms[0])
        student, lm_config, proj_dim, aligner_size, _ = imagine_models(
            config, examples_at_hand(config))
        flags = flags_that_fit(resolve_auto(config, student), lm_config, proj_dim, aligner_size)
    except UserError:
        flags = None
    if flags:
        return f"out of memory: a card of {gigabytes:.3g} GiB should do with {flags}"
    return ("out of memory: try a smaller --micro-batch or --max-length, --grad-checkpoint on or "
            "--amp bf16")


def card_memory(config):
    """Return the memory in GiB of the GPU that a run is on; UserError if it is on none."""
    device = precision(config)[0]
    if device.type != "cuda":
        raise UserError(f"{device} has no memory of its own")
    return torch.cuda.get_device_properties(device).total_memory / GIB


def plan(config, arms):
    """Return the text that --plan prints, of a resolved Config and that of each of its arms.

    No weights are loaded, no card is needed, nothing is written. UserError where the run itself
    would raise one.
    """
    distilled = [arm for arm in arms if is_distilled(arm)]
    config = (distilled or arms)[0]  # an arm with an aligner takes the most
    examples = examples_at_hand(config)
    shapes = imagine_models(config, examples)
    student, lm_config, proj_dim, aligner_size, assumed = shapes
    lines = [
        f"plan: {config.task}, student {config.student}, teacher {config.teacher}; "
        "nothing loaded or written",
        f"parameters: {count_parameters(student):,}, {count_trained(student):,} of them trained; "
        f"aligner {aligner_size:,} (projection to {proj_dim} dimensions{assumed})",
        f"batch: {config.micro_batch} rows at once, {config.max_length} tokens each"]
    if student.generates:
        lines[-1] += f", {config.max_new_tokens} of them an answer's; |V_a| = 1000 is assumed"
    where = "the CPU"
    if on_cuda(config):
        where = "CUDA (fp16 takes what bf16 does, but does not round what a LoRA freezes)"
    lines.append(f"peak memory in GiB, on {where}:")
    lines += memory_table(config, student, aligner_size)
    lines += plan_work(config, arms, distilled, examples)
    if config.memory:
        lines.append(plan_card(config, student, lm_config, proj_dim, aligner_size))
    return "\n".join(lines)


def plan_work(config, arms, distilled, examples):
    """Return the plan's lines about steps and teacher vectors."""
    rows, source = planned_rows(config, examples)
    lines = ["steps: unknown without the data: give --data-dir"]
    if rows:
        steps = config.epochs * math.ceil(rows[0] / config.batch_size)
        roles = "of the student and as many of the aligner" if distilled else "of the student"
        lines = [f"steps: {steps:,} {roles}, for each arm and seed ({len(arms)} x "
                 f"{len(config.seeds)} cells); {rows[0]:,} examples by {source}"]
    for spec in dict.fromkeys(arm.teacher for arm in distilled):
        lines.append(f"vectors to make of {spec}: {vectors_to_make(spec, rows)}")
    if not distilled:
        lines.append("vectors to make: 0 (no arm looks at a teacher)")
    return lines


def plan_card(config, student, lm_config, proj_dim, aligner_size):
    """Return the plan's line about a card of --memory GiB: which flags to add, if any help."""
    config = resolve_auto(config, student)
    flags = flags_that_fit(config, lm_config, proj_dim, aligner_size)
    advice = f"add {flags}"
    if flags is None:
        advice = "no flags make it fit"
    elif not flags:
        advice = "fits as it is"
    return (f"a card of {config.memory:g} GiB (amp {config.amp}, checkpointing "
            f"{config.grad_checkpoint}): {advice}")


# ---- the grid and the command line ----
def train(config):
    """Train every arm with every seed; return {arm: {seed: metrics}}. A finished cell is read, not
    trained again.

    config may leave out whatever has a default. Raises UserError for what the caller can mend,
    before a model is loaded wherever that is possible.
    """
    init_processes(config)
    return train_grid(from_rank0(partial(complete, config)))


def complete(config):
    """Return a Config with nothing left open: a resumed run's own, or one with its defaults."""
    if config.resume and not config.out:
        config = resume_config(config.resume, {"fsdp": config.fsdp})
    return resolve(config)


def train_grid(config):
    """train() of a resolved Config, in processes that have met."""
    config = from_rank0(partial(look, config))
    out = Path(config.out)
    is_new = from_rank0(lambda: not out.exists())
    lock = FileLock(out / "lock")  # one run, one writer
    spent = {}  # {part: seconds} of all cells
    try:
        if from_rank0(partial(unfinished, config)):
            from_rank0(partial(begin, config, lock))
            data = load_data(config)
        for seed, arm in from_rank0(partial(unfinished, config)):
            folder = out / arm / str(seed)
            cell_config = replace(config, arms=(arm,), seeds=(seed,), resume=None, **ARMS[arm])
            if is_first():
                write_json(folder / "config.json", vars(cell_config))
            cell = Cell(cell_config, data, folder)
            run(cell)
            for part, seconds in cell.seconds.items():
                spent[part] = spent.get(part, 0) + seconds
            del cell
            gc.collect()  # DDP and FSDP hold a student in cycles: it would stay beside the next one
    except (UserError, OSError):
        if is_new and is_first() and lock.is_locked:
            remove_if_not_begun(out)
        raise
    finally:
        lock.release()
    if spent:
        print("seconds: " + ", ".join(f"{part} {spent[part]:.1f}" for part in spent), flush=True)
    return from_rank0(partial(collect, config))


def look(config):
    """Return the Config to train; UserError for what can be told before anything is written.

    Of the first process alone: the others might already see what it is about to write.
    """
    out = Path(config.out)
    if not config.resume and (out / "config.json").exists():
        raise UserError(f"--out {out} holds a run already: go on with --resume {out}, or give "
                        "another --out")
    if config.student != "tiny" and unfinished(config):
        check_available(config.student)
    return config


def cell_folders(config):
    """Return {(seed, arm): folder} of all cells of a run, in the order of training."""
    folders = {}
    for seed in config.seeds:
        for arm in config.arms:
            folders[seed, arm] = Path(config.out) / arm / str(seed)
    return folders


def unfinished(config):
    """Return [(seed, arm)] of the cells still to train: those without a metrics.json."""
    return [cell for cell, folder in cell_folders(config).items()
            if not (folder / "metrics.json").exists()]


def begin(config, lock):
    """Lock the run's folder, say what is trained, and write OUT/config.json."""
    out = Path(config.out)
    where = precision(config)[-1]
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{out} is being written by another process: wait for its end, or give "
                        "another --out") from None
    look(config)  # again: another process may have been here since
    print(f"{config.task}: student {config.student}, teacher {config.teacher}, {where}, "
          f"arms {','.join(config.arms)}, seeds {config.seeds}, writing {out}", flush=True)
    warn_of_micro_batches(config)
    if not config.resume:  # first, so that --resume can start what never began
        write_json(out / "config.json", vars(config))


def warn_of_micro_batches(config):
    """Say so where a batch-mean loss sees a micro-batch's mean instead of the batch's."""
    kinds = {ARMS[arm].get("loss", config.loss) for arm in config.arms}
    changed = sorted(kinds - set(PER_EXAMPLE))
    if changed and config.micro_batch < config.batch_size:
        print(f"note: --micro-batch {config.micro_batch} changes the loss {' and '.join(changed)}: "
              f"it sees {config.micro_batch} examples at once, not {config.batch_size}", flush=True)


def load_data(config):
    """Return a run's Data: the first process fetches, draws and buys, the others find it all."""
    data = None

    def build():
        nonlocal data
        data = Data(config)  # It stays here: the other processes hear only that it is done.
        check_unchanged(config, data)

    from_rank0(build)
    return data or Data(config)


def check_unchanged(config, data):
    """Raise UserError where a resumed run would go on with other data than it began with.

    OUT/data.json keeps how many examples each split had, and a hash of their texts and labels.
    """
    path = Path(config.out) / "data.json"
    now = data.fingerprint()
    if not path.exists():
        write_json(path, now)
        return
    before = read_json(path)
    for split in before:
        if now.get(split) == before[split]:
            continue
        rows_before = before[split][0]
        rows_now = now[split][0] if split in now else 0
        change = f"had {rows_before} rows, has {rows_now} now"
        if rows_before == rows_now:
            change = "has other texts or labels now"
        raise UserError(f"--resume {config.out}: the data changed since the run began: {split} "
                        f"{change}: bring the files back, or start another run")


def remove_if_not_begun(out):
    """Delete the new folder of a run that stopped before its first cell began."""
    written = {path.name for path in out.rglob("*") if path.is_file()}
    if written <= {"config.json", "data.json", "lock"}:
        shutil.rmtree(out, ignore_errors=True)


def collect(config):
    """Return {arm: {seed: metrics}} of a finished run."""
    metrics = {arm: {} for arm in config.arms}
    for (seed, arm), folder in cell_folders(config).items():
        forget_training_state(folder / "last")  # what a kill may have left
        metrics[arm][seed] = read_json(folder / "metrics.json")
    return metrics


def main(argv=None, config=None):
    """The command line: status 0; 2 and one line on stderr for what the user can mend; 130 after
    Ctrl-C.

    config: what configure() has made of the command line already, where it has. After another stop
    signal the status is 128 and its number.
    """
    prepare_console()
    if config is None:
        config = configure(argv)
    if config.student == "tiny":
        torch.set_num_threads(1)  # matrices this small are done before a second thread wakes up
    try:
        with handle_stop_signals(stop_at_once):
            execute(config)
    except UserError as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail(after_out_of_memory(config))
    except (OSError, SafetensorError) as error:  # a full disk; a folder that cannot be written
        begun = Path(config.out, "config.json").exists()
        fail(f"{error}; mend this and --resume {config.out}" if begun else str(error))
    except KeyboardInterrupt as stop:
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        if is_first():
            print(file=sys.stderr)  # after the ^C that the terminal shows
            exit_with_message(status, f"stopped; go on with: python train.py --resume {config.out}")
        sys.exit(status)


def execute(config):
    """Do what a resolved Config asks for: plan a run, or train it and print its table."""
    if config.plan:
        arms = [replace(config, **ARMS[arm]) for arm in config.arms]
        print(plan(config, arms))
        return
    init_processes(config)
    train_grid(config)
    if is_first():
        print(evaluation.report(evaluation.find_cells([config.out])))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(config=COMMAND_LINE)
