"""Train students: the configuration, the loop, checkpoints, the command line.

    python train.py                                  # the built-in demonstration, nothing to download
    python train.py --task rte --student opt-1.3b    # a GLUE/SuperGLUE task, a pretrained student (on CUDA)
    python train.py --task reason/arc_e --student llama-7b --data-dir DATA    # answers to generate, with LoRA
    torchrun --nproc-per-node 8 train.py --task rte --student opt-1.3b        # the same batches on 8 GPUs

Each epoch trains the TS Aligner once over the data, then the student, pulled towards the aligner. A run is a
grid of cells OUT/ARM/SEED/; a seed's arms share initial weights, data order and dropout, so that differences
are paired. The method is ARMS, update() and run(); the rest can wait.
"""
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
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from data import (CACHE, Parser, UserError, answer_bags, answer_vocabulary, bag_labels, collate, encode,
                  check_available, find_task, known, length_grouped_batches, load_task, seed_of)
from teacher import ENCODERS, TEACHERS, build_teacher, open_vectors, split_spec

# ---- configuration: every field is a flag ------------------------------------------------------------------
def option(default, help, choices=(), low=-math.inf, high=math.inf, above=-math.inf):
    """A Config field: default, --help sentence, choices, limits: low, high inclusive, above exclusive."""
    help += f" One of {', '.join(choices)}." if choices else ""
    return field(default=default, metadata={"help": help, "choices": choices, "limits": (low, high, above)})

# An arm is one line of overrides. A claim is "armada beats every control, the best one included".
# DEVIATION: the authors compare with one baseline, without the auxiliary head; here are four controls.
ARMS = {
    # Controls: no teacher, or the wrong one (finish() tells them by their weights and pairing).
    "undistilled": {"alpha": 0.0, "beta": 0.0, "gamma": 0.0},  # the student alone
    "undistilled-aux": {"alpha": 0.0, "beta": 0.0},            # with its auxiliary head, as in the method
    "shuffled": {"pairing": "shuffled"},                       # the method with other texts' pictures
    "noise": {"pairing": "noise"},                             # with noise of the pictures' mean and variance
    "armada": {},                                              # the method
    # Ablations: the teacher's own vectors, and one part of the method less or otherwise.
    "random-aligner": {"aligner_lr": 0.0},                     # never trained
    "no-output": {"output_factor": 0.0},                       # no soft labels; the rest of L_S as it was
    "alpha-0": {"alpha": 0.0},                                 # the paper's: no soft labels, full true labels
    "no-manifold": {"beta": 0.0},
    "no-aux": {"gamma": 0.0},
    **{kind: {"loss": kind} for kind in ("euclidean", "cosine")},
    **{f"dose-{rho}": {"teacher": f"painter:{rho}"} for rho in ("0", "0.25", "0.5", "0.75")},  # armada: 1
}

@dataclass
class Config:
    """One run; argparse is built from these fields. None means "it depends" and is filled in by resolve()."""
    task: str = option(None, "Task to learn: objects (built in), rte ..., reason/arc_e ..., instruct/dolly.")
    student: str = option(None, "Short name such as opt-1.3b, hub id, local folder, or tiny.")
    teacher: str = option(None, f"NAME[:ARGUMENT], with a NAME of {', '.join(TEACHERS)}.")
    picture_encoder: str = option(None, "What looks at its pictures: pixels, clip[:MODEL] or vae[:MODEL].")
    max_pictures: int = option(None, "Let a teacher make at most so many vectors, then stop.", low=0)
    arms: tuple = option(None, f"Arms, with commas, of {', '.join(ARMS)}.")
    seeds: tuple = option(None, "Seeds to repeat them with, with commas.")
    data_dir: str = option(None, "Folder with RTE/, reasoning/ ...; without it (Super)GLUE is fetched.")
    cache_dir: str = option(CACHE, "Folder for downloads and teacher vectors.")
    offline: bool = option(False, "Use no network: only what is here or in the caches.")
    out: str = option(None, "Folder to write; runs/TASK by default, or runs/TASK-2 ... when that is taken.")
    resume: str = option(None, "Run, or one ARM/SEED of it, to go on with; it remembers its other flags.")
    # DEVIATION: the paper reports three kinds; our default compares each text with its own picture.
    loss: str = option("manifold", "Loss between the spaces.", ("euclidean", "cosine", "manifold"))
    alpha: float = option(0.5, "Weight of the soft labels against the true ones.", low=0, high=1)
    beta: float = option(None, "Weight of the manifold loss.", low=0)
    gamma: float = option(1.0, "Weight of the auxiliary heads in the task and output losses.", low=0)
    temperature: float = option(5.0, "Temperature T of the soft labels.", above=0)
    output_factor: float = option(1.0, "Factor of alpha's soft-label term alone; 0 drops it.", low=0)
    pairing: str = option("own", "Whose vector a training text gets.", ("own", "shuffled", "noise"))
    proj_dim: int = option(None, "Width of the shared projection space; the teacher's own by default.", low=1)
    orthogonal_student: bool = option(False, "Make the student's projection orthogonal too.")
    epochs: int = option(None, "Passes over the training data.", low=1)
    batch_size: int = option(32, "Examples per optimizer step.", low=1)
    micro_batch: int = option(None, "Of them in memory at once, in all processes; a divisor; or all.", low=1)
    max_length: int = option(None, "Tokens per text; a longer one has its longest field shortened.", low=4)
    max_new_tokens: int = option(None, "Of these, a generated answer has the last N.", low=1)
    sampling_temperature: float = option(0.0, "Temperature to sample answers with; 0: the likeliest.", low=0)
    lora: int = option(None, "Rank of LoRA adapters on a frozen language model; 0: train all weights.", low=0)
    lr: float = option(None, "The student's peak learning rate.", above=0)
    aligner_lr: float = option(1e-3, "The aligner's peak learning rate; 0 leaves it untrained.", low=0)
    device: str = option("auto", "Where to train: auto, cpu, cuda, cuda:N or mps.")
    amp: str = option("auto", "Mixed precision; auto: bf16 or fp16 on CUDA.", ("auto", "off", "bf16", "fp16"))
    grad_checkpoint: str = option("auto", "Recompute activations; auto: if large.", ("auto", "on", "off"))
    fsdp: bool = option(False, "Under torchrun: split the student over the processes, not only its batches.")
    limit: int = option(None, "Keep only the first N training examples.", low=2)
    eval_limit: int = option(None, "Score only the first N dev and test examples.", low=1)
    eval_every: int = option(None, "Epochs between evaluations, each with a checkpoint.", low=1)
    plan: bool = option(False, "Tell memory, steps and teacher vectors in advance; load and write nothing.")
    memory: float = option(None, "With --plan: GiB of the card that it should fit.", above=0)

    def __post_init__(self):
        """UserError names the first field whose value is out of its limits and says what they are."""
        for each in [each for each in fields(self) if getattr(self, each.name) is not None]:
            value, flag = getattr(self, each.name), "--" + each.name.replace("_", "-")
            if each.type is tuple:  # "0,1" and (0, 1) are the same thing
                items = str(value).split(",") if isinstance(value, (str, int)) else map(str, value)
                items = tuple(item.strip() for item in items)
                if each.name == "seeds" and not all(map(str.isdecimal, items)):
                    raise UserError(f"--seeds {','.join(items)}: give whole numbers: 0,1,2 (seeds from 0)")
                if len(set(items)) < max(1, len(items)):
                    raise UserError(f"{flag} {','.join(items)}: name each once")
                setattr(self, each.name, tuple(map(int, items)) if each.name == "seeds" else items)
            elif each.metadata["choices"]:
                known(value, each.metadata["choices"], flag)
            elif each.type in (int, float):
                low, high, above = each.metadata["limits"]
                if not (math.isfinite(value) and low <= value <= high and value > above):
                    most = f" and at most {high}" if high < math.inf else ""
                    least = f"above {above}" if above > low else f"at least {low}"
                    raise UserError(f"{flag} {value} must be a number {least}{most}")
        self.task = None if self.task is None else find_task(self.task).name
        split_spec(self.teacher or "painter")  # these two know the names, and build nothing yet
        split_spec(self.picture_encoder or "pixels", ENCODERS, "--picture-encoder")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(f"--device {self.device}: choose auto, cpu, cuda, cuda:N or mps")

# What None becomes, by --help's name for the case; a later line has precedence.
DEFAULTS = {
    "Default": {each.name: each.default for each in fields(Config) if each.default} | {
        "student": "bert-base", "teacher": "clip", "arms": "armada", "seeds": "0", "beta": 1.0, "epochs": 10,
        "lr": 2e-5, "eval_every": 1, "max_length": 128, "max_new_tokens": 256, "lora": 0},
    "For objects": find_task("objects").defaults,
    "For llama-...": {"lora": 8, "epochs": 3},
    "For reason/... and instruct/...": find_task("instruct/dolly").defaults,
    "For commonsense": {"max_new_tokens": find_task("reason/boolq").defaults["max_new_tokens"]},
    "Without --task": {"arms": "undistilled,armada,shuffled", "seeds": "0,1,2,3,4,5,6"}}

def resolve(config):
    """A copy with every default filled in and every value checked; UserError before any load or fetch."""
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # which the hub's own library and data.retry ask
    task = find_task(config.task or "objects")
    out, n = f"runs/{task.name}", 2
    while Path(out).exists():  # a second run never touches the first
        out, n = f"runs/{task.name}-{n}", n + 1
    given = {name: value for name, value in vars(config).items() if value is not None}
    llama = DEFAULTS["For llama-..."] if str(config.student).startswith("llama-") else {}
    # A generation task's learning rate is LoRA's, too high for all weights.
    rate = {"lr": DEFAULTS["Default"]["lr"]} if task.kind == "generate" and config.lora == 0 else {}
    demonstration = {} if config.task else DEFAULTS["Without --task"]
    config = Config(**{**DEFAULTS["Default"], **task.defaults, **llama, **rate, **demonstration, "out": out,
                       "micro_batch": config.batch_size, "task": task.name, **given})
    if config.student == "tiny" and (config.lora or task.kind == "generate"):
        raise UserError("--student tiny is random: for --lora and to generate give opt-125m, llama-7b ...")
    if task.kind == "generate" and config.max_new_tokens >= config.max_length:
        raise UserError(f"--max-new-tokens {config.max_new_tokens} leaves a prompt no room: --max-length "
                        f"{config.max_length} is for both")
    for arm in config.arms:
        replace(config, **ARMS[known(arm, ARMS, "arm")])  # its overrides are checked like flags
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.plan and (config.fsdp or processes > 1):
        raise UserError("--plan tells the memory of one process: without --fsdp and torchrun")
    if config.memory and not config.plan:
        raise UserError("--memory goes with --plan")
    if config.fsdp and "WORLD_SIZE" not in os.environ:
        raise UserError("--fsdp splits over processes: torchrun --nproc-per-node N train.py --fsdp ...")
    if config.micro_batch < processes:
        raise UserError(f"--micro-batch {config.micro_batch} is too small for {processes} processes")
    if config.batch_size % config.micro_batch:
        fits = max(m for m in range(1, config.micro_batch) if config.batch_size % m == 0)
        raise UserError(f"--micro-batch {config.micro_batch} must divide --batch-size {config.batch_size}: "
                        f"try {fits}")
    return config

def resume_config(folder, typed):
    """The Config that a run (a grid or one cell) was started with; UserError where a typed flag differs."""
    folder, now = Path(folder), {"fsdp": False, "plan": False, "memory": None}  # of this start alone
    now |= {name: typed[name] for name in ("offline", "max_pictures", *now) if name in typed}
    try:
        saved, wanted = Config(**json.loads((folder / "config.json").read_text())), Config(**typed)
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"--resume {folder}: no run there, or not one of this version ({error})") from None
    differ = [f"--{name.replace('_', '-')} is {getattr(saved, name)}, not {getattr(wanted, name)}" for name in
              typed if name not in ("resume", "out", *now) and getattr(saved, name) != getattr(wanted, name)]
    if differ:
        raise UserError(f"--resume {folder}: this run's {'; '.join(differ)}: leave it out, or start another")
    is_cell = folder.resolve().parts[-2:] == (saved.arms[0], str(saved.seeds[0]))
    out = folder.resolve().parent.parent if is_cell else folder
    return replace(saved, **now, resume=str(folder), out=str(out))

def configure(argv=None):
    """Command line -> a resolved Config, or one line on stderr and exit status 2."""
    parser = Parser(prog="train.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    description="ARMADA: distil a picture-making teacher into a text-only language model.")
    for each in fields(Config):
        told = [f"{case}: {values[each.name]}." for case, values in DEFAULTS.items() if each.name in values]
        kind = {bool: {"action": "store_true"}, tuple: {"type": str}}.get(each.type, {"type": each.type})
        parser.add_argument("--" + each.name.replace("_", "-"), **kind,
                            help=" ".join([each.metadata["help"], *told]).replace("%", "%%"))
    try:
        typed = vars(parser.parse_args(argv))  # without defaults: a resumed run is compared with these alone
        return resolve(resume_config(typed["resume"], typed) if "resume" in typed else Config(**typed))
    except UserError as error:
        fail(error)

def fail(message):
    Parser().exit(2, f"train.py: error: {message}\n")

if __name__ == "__main__":
    configure()  # --help and bad flags are answered here: importing torch takes seconds

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import eval as evaluation
from align import Outputs, TSAligner
from losses import aligner_loss, predictions, student_loss, task_loss
from student import build_student, load_pretrained, load_student, precision, rank, world

# ---- small pieces of the loop ------------------------------------------------------------------------------
def seed_all(seed, device):
    """torch.manual_seed, which on a CPU writes a stack trace for each absent kind of device: 3 % of tiny's
    step."""
    (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)

def lr_factor(step, steps):
    """Linear warm-up over min(100, 10 %) of the steps, then linear decay to 0; step counts from 0."""
    # DEVIATION: the authors never apply scheduler, warm-up (100 steps: CB has fewer in all) and weight decay.
    warm = min(100, steps // 10)
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)

# ---- several processes (torchrun) --------------------------------------------------------------------------
# All of this does nothing in one process. Of several, each goes through the whole run and takes every N-th
# row of each batch: as many tokens as the others, since a batch is sorted by length.
def join(config):
    """Meet the other processes that torchrun started, if it did; only rank 0 speaks."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available() and config.device in ("auto", "cuda"):
            if (n := int(os.environ["LOCAL_WORLD_SIZE"])) > (gpus := torch.cuda.device_count()):
                raise UserError(f"--nproc-per-node {n}: each process takes a GPU, here are {gpus}")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(days=7))  # rank 0's teacher may draw for as long
        if rank():
            sys.stdout = open(os.devnull, "w")

def from_first(make):
    """On every rank what make() returns, or raises, on rank 0: one looks at files, while none writes any."""
    found = [None]
    if not rank():
        try:
            found = [make()]
        except (UserError, OSError) as error:
            found = [error]
    if world() > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]

def deal(rows):
    """A batch -> (this process's rows, all rows process after process, how many each has)."""
    hands = [rows[i::world()] for i in range(world())]
    # With fewer rows than processes some have none: they go along with the first one, which is not counted.
    return hands[rank()] or rows[:1], sum(hands, []), [len(hand) for hand in hands]

def everyones(outputs, counts):
    """Tensors (b, .) of this process -> (B, .) of all, process after process; counts [N]: how many of each.
    Only the own rows have a graph, the others' is in their process. So each takes the loss of the WHOLE
    batch, means over it included, and the processes' gradients add up to one process's, however it is cut."""
    if world() == 1:
        return outputs
    own = torch.cat([each.float() for each in outputs], 1)
    own.register_hook(lambda gradient: gradient * world())  # since DDP and FSDP take the processes' mean
    padded = F.pad(own.detach(), (0, 0, 0, max(counts) - len(own)))  # one shape for all
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    found[rank()] = own
    rows = torch.cat([each[:count] for each, count in zip(found, counts)])
    return rows.split([each.size(1) for each in outputs], 1)

def whole(value):
    """A tensor that may be split over processes in one piece, which rank 0, who writes, keeps on the CPU."""
    if not isinstance(value, DTensor):
        return value
    value = value.full_tensor()
    return None if rank() else value.cpu()

# ---- files -------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path):
    """Yields a path beside, to write a file or a folder at; when that is whole it takes PATH's place."""
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    yield part
    part.rename(f"{path}.new")
    settle(path)

def settle(path):
    """PATH.new, which is whole, becomes PATH. A kill at any instant leaves one of the two; again ends it."""
    if os.path.exists(f"{path}.new"):
        shutil.rmtree(path, ignore_errors=True)
        os.replace(f"{path}.new", path)

def write_json(path, content):
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=1))

@contextmanager
def interruptible():
    """Yields a list that Ctrl-C fills instead of raising: no step is cut in half; a second stops at once. So
    does the first in several processes, which are not at the same step: go on from the last checkpoint."""
    pressed, before = [], signal.getsignal(signal.SIGINT)
    if world() > 1:
        yield pressed
        return
    signal.signal(signal.SIGINT, lambda *_: pressed.append(signal.signal(signal.SIGINT, before)))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)

def means(waiting, facts, scaler):
    """{name: mean} of waiting = [{name: value on the device}], the steps since the last line of log.jsonl.
    UserError names the first bad step. fp16's scaler finds its scale by overflowing, so there an infinite
    gradient is a skipped step and no fault, unless no scale is small enough."""
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise UserError("fp16 gradients overflow at every loss scale: try --amp bf16 or off")
    found, first = {}, facts["step"] - len(waiting) + 1
    for name in waiting[0]:
        column = torch.stack([values[name].float() for values in waiting]).tolist()
        bad = [step for step, value in enumerate(column, first) if not math.isfinite(value)]
        if bad and not (name == "grad_norm" and scaler.is_enabled()):
            raise UserError(f"the {facts['role']}'s {name} is not finite at step {bad[0]} (epoch "
                            f"{facts['epoch']}); nothing saved since. Lower --lr, --beta, or try --amp off")
        found[name] = sum(filter(math.isfinite, column)) / max(1, len(column) - len(bad))
    return found

# ---- a run: its data, and the cells of its grid ------------------------------------------------------------
class Data:
    """Examples, teacher vectors (of each teacher an arm looks at) and token ids, once for all cells."""
    def __init__(self, config):
        self.task, tokenizer = find_task(config.task), None
        if self.task.kind == "generate":  # first of all, for the student may be unable to
            _, tokenizer = load_pretrained(config.student, AutoModelForCausalLM, weights=False)
        self.splits = load_task(config.task, config.data_dir, config.cache_dir)
        self.rows, self.vectors = {}, {}  # token ids by split; readers of vectors by teacher and split
        self.dim = config.proj_dim        # of the shared projection space; the width of --teacher by default,
        arms = [replace(config, **ARMS[arm]) for arm in config.arms]
        wanted = [arm.teacher for arm in arms if is_distilled(arm)]
        for spec in dict.fromkeys([config.teacher, *wanted]):  # hence first, even if no arm looks at it
            teacher = build_teacher(spec, config.picture_encoder)
            self.dim = self.dim or teacher.dim
            if self.dim > teacher.dim:
                raise UserError(f"--proj-dim {self.dim} is over {spec}'s {teacher.dim}: give that or less")
            if spec in wanted:
                self.vectors[spec], _ = open_vectors(teacher, self.task, self.splits, config.cache_dir,
                                                     config.limit, config.max_pictures, config.eval_limit)
        self.splits["train"] = self.splits["train"][:config.limit]
        for split in self.splits.keys() - {"train"}:
            self.splits[split] = self.splits[split][:config.eval_limit]
        self.num_labels, self.vocabulary = max(1, len(self.task.labels)), ()
        if tokenizer:  # to generate: the label is a bag of the answer's tokens
            train, dev = (answer_bags(self.task, self.splits[split], tokenizer) for split in ("train", "dev"))
            self.vocabulary = answer_vocabulary(train)  # V_a; labels are (N, |V_a|) distributions over it
            if len(self.vocabulary) < 2:
                raise UserError(f"{config.task}: the training answers hold no two tokens to tell apart")
            self.num_labels = len(self.vocabulary)
            self.labels, self.dev_labels = (bag_labels(bags, self.vocabulary) for bags in (train, dev))
        else:
            self.labels = torch.tensor([each.label for each in self.splits["train"]])  # (N,) int64/float32

    def encode(self, student, config):
        """Token ids of every split, by the first cell's tokenizer (all cells have the same)."""
        longest, most = config.max_length, student.max_tokens
        if longest > most:
            raise UserError(f"--max-length {longest}: {config.student} reads at most {most} tokens")
        for split, examples in self.splits.items():
            self.rows[split], short = encode(self.task, examples, student.tokenizer, longest, student.decoder,
                                             config.max_new_tokens)
            if short:
                part = f" ({config.max_new_tokens} of them an answer's)" if student.generates else ""
                print(f"{split}: {short} of {len(examples)} texts had over {longest} tokens{part}: cut",
                      flush=True)

    def lookup(self, config, seed):
        """The function rows -> their teacher vectors (n, d_e): here the controls part from the method."""
        read, source = self.vectors[config.teacher]["train"], np.arange(len(self.labels))
        if config.pairing == "noise":  # fixed per example, as a picture is
            some, draw = torch.from_numpy(read(source[::1 + len(source) // 6000])), torch.Generator()
            mean, deviation = some.mean(0), some.std(0, correction=0)
            return lambda rows: torch.stack([mean + deviation * torch.randn(
                len(mean), generator=draw.manual_seed(seed_of(seed, "noise", row))) for row in rows])
        if config.pairing == "shuffled":  # one fixed derangement a seed, a single cycle; dev stays as it is
            order = np.random.default_rng(seed_of(seed, "shuffled")).permutation(source)
            source[order] = np.roll(order, 1)
        return lambda rows: torch.from_numpy(read(source[rows]))

def is_distilled(config):
    """Whether a configuration looks at the teacher at all."""
    return bool(config.beta or config.alpha * config.output_factor)

class Cell:
    """The models and optimizers of one arm and seed, and where they stand: all that a checkpoint holds."""
    def __init__(self, config, data, folder):
        self.config, self.data, self.folder, self.seed = config, data, folder, config.seeds[0]
        self.done, self.best, self.seconds, self.lines = 0, None, 0.0, []  # lines: of log.jsonl
        self.answers = None  # to the dev split, when last evaluated
        self.device, self.autocast, self.scalers, _ = precision(config)
        last = folder / "last"
        if not rank():
            settle(folder / "best")
            settle(last)
        saved = from_first((last / "training.json").exists)
        torch.manual_seed(seed_of(self.seed, "student"))
        texts = [text for example in data.splits["train"] for text in data.task.pair(example) if text]
        self.student = load_student(last) if saved else build_student(
            config.student, data.num_labels, data.dim, texts, orthogonal=config.orthogonal_student,
            labels=data.task.labels, max_length=config.max_length, vocabulary=data.vocabulary,
            max_new_tokens=config.max_new_tokens, lora=config.lora)
        large = sum(p.numel() for p in self.student.lm.parameters()) > 300e6 and self.device.type == "cuda"
        if config.grad_checkpoint == "on" or (config.grad_checkpoint == "auto" and large):
            self.student.checkpoint_gradients()
        if torch.bfloat16 in self.autocast.args:
            self.student.round_base()
        torch.manual_seed(seed_of(self.seed, "aligner"))
        self.aligner = self.vectors = None
        if is_distilled(config):
            self.vectors, self.lookup = data.vectors[config.teacher], data.lookup(config, self.seed)
            self.aligner = TSAligner(self.vectors["dev"]([0]).shape[1], data.num_labels, proj_dim=data.dim)
        self.parallel = self.student  # what a training step calls
        if config.fsdp:
            self.student.shard(torch.distributed.init_device_mesh(self.device.type, (world(),)))
        models = [("aligner", self.aligner), ("student", self.student)]  # in the order of an epoch
        self.models = torch.nn.ModuleDict([pair for pair in models if pair[1]]).to(self.device)
        if data.task.kind == "regress" and not saved:  # a relu starting below 0 stays there: one seed in ten
            for name, value in self.models.named_parameters():
                if name.endswith("classifier.bias"):
                    torch.nn.init.constant_(value, data.labels.mean().item())
        if world() > 1 and not config.fsdp:  # the aligner is so small that each process trains it all
            self.parallel = DistributedDataParallel(self.student, forward_sync_buffers=False,
                                                    gradient_as_bucket_view=True)
        self.optimizers = {role: torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
                           for role, model in self.models.items()}  # which leaves out what has no gradient
        if not data.rows:
            data.encode(self.student, config)
        if saved:
            self.load(last)
        if not rank():  # lines after the checkpoint, or without one, are dropped: they will come again
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def schedule(self):
        """Every step of the run in order: (epoch, role, step, rows of the batch)."""
        lengths = [len(row["input_ids"]) for row in self.data.rows["train"]]
        for epoch in range(self.config.epochs):
            order = seed_of(self.seed, "order", epoch)
            batches = length_grouped_batches(lengths, self.config.batch_size, order)
            for role in self.models:
                for step, rows in enumerate(batches):
                    yield epoch, role, step, rows

    def save(self, name="last"):
        """best/, last/: the student as load_student and AutoModel open it; in last/ also all to go on."""
        state = {key: whole(value) for key, value in self.student.state().items()}
        going_on = self.optimizers if name == "last" else {}
        moments = {f"{role} {i} {key}": whole(value) for role, optimizer in going_on.items()
                   for i, each in optimizer.state_dict()["state"].items() for key, value in each.items()}
        if rank():
            return
        with replacing(self.folder / name) as new:
            self.student.save(new, state)
            if going_on:
                if self.aligner:
                    save_file(self.aligner.state_dict(), new / "aligner.safetensors")
                save_file(moments, new / "optimizers.safetensors")
                write_json(new / "training.json", {
                    **{name: getattr(self, name) for name in ("done", "best", "seconds", "lines")},
                    "scaler": self.scalers["student"].state_dict()})

    def load(self, last):
        state = json.loads((last / "training.json").read_text())
        self.scalers["student"].load_state_dict(state.pop("scaler"))  # ignored unless fp16 enables it
        vars(self).update(state)
        if self.aligner:
            self.aligner.load_state_dict(load_file(last / "aligner.safetensors"))
        for name, value in load_file(last / "optimizers.safetensors").items():
            role, i, key = name.split()
            weight, value = self.optimizers[role].param_groups[0]["params"][int(i)], value.to(self.device)
            if isinstance(weight, DTensor) and value.shape == weight.shape:  # all but the number of steps
                value = distribute_tensor(value, weight.device_mesh, weight.placements)
            self.optimizers[role].state[weight][key] = value

    def evaluate(self, split="dev"):
        """(metrics, answers, p_s of the first 1,000 texts) of the student as it is, on one split."""
        return evaluation.score_student(
            self.student, self.data.task, self.data.splits[split], self.data.rows[split], split=split,
            seed=self.seed, batch_size=self.config.micro_batch, autocast=self.autocast,
            temperature=self.config.sampling_temperature, keep=1000)

    @torch.inference_mode()
    def evaluate_aligner(self, p_s):
        """The aligner's own scores on the dev split's true vectors, and how well p_s meets its p_t."""
        if self.aligner is None:
            return {"aligner": None, "spaces": None}
        dev, logits = self.data.splits["dev"], []
        for i in reversed(range(0, len(dev), 1000)):  # the first rows last: their p_t stays, as their p_s did
            e = torch.from_numpy(self.vectors["dev"](range(i, min(i + 1000, len(dev))))).to(self.device)
            o_t, _, p_t = self.aligner.eval()(e)
            logits.insert(0, o_t)
        logits = torch.cat(logits)
        p_t, p_s = p_t.cpu().numpy(), torch.stack(p_s).numpy()
        spaces = {"retrieval@1": evaluation.retrieval_at_1(p_t, p_s), "cka": evaluation.linear_cka(p_t, p_s)}
        scores = ({"loss": task_loss(logits, self.data.dev_labels.to(logits)).item()}
                  if self.student.generates else
                  evaluation.score(self.data.task, dev, predictions(logits).tolist()))
        return {"aligner": scores, "spaces": spaces}

    def log(self, line):
        self.lines.append(line)
        if not rank():
            with open(self.folder / "log.jsonl", "a") as file:
                print(json.dumps(line), file=file)

def update(cell, epoch, role, step, rows):
    """One optimizer step of the aligner or the student on a batch; {name: 0-dim tensor} for the log."""
    config, data, device, aligner = cell.config, cell.data, cell.device, cell.aligner
    model, optimizer, scaler = cell.models[role].train(), cell.optimizers[role], cell.scalers[role]
    values = {}
    for micro in range(0, len(rows), config.micro_batch):
        own, part, counts = deal(rows[micro:micro + config.micro_batch])
        first = micro + rank() * (role == "student")           # each process its dropout; aligners are alike
        seed_all(seed_of(cell.seed, role, epoch, step, first), device)
        y = data.labels[part].to(device)                       # (B,), or (B, |V_a|) bags of tokens
        e = cell.lookup(part).to(device) if aligner else None  # (B, d_e)
        if role == "aligner":
            loss, parts = aligner_loss(model(e), y, config.gamma), {}
        else:
            x = collate([data.rows["train"][i] for i in own], model.tokenizer.pad_token_id)
            with torch.no_grad():  # the aligner is frozen here: eval mode, no graph, float32
                target = aligner.eval()(e) if aligner else None
            # DDP adds the processes' gradients up once, after the last micro-batch.
            cell.parallel.require_backward_grad_sync = micro + config.micro_batch >= len(rows)
            with cell.autocast():
                out = cell.parallel(**{key: value.to(device) for key, value in x.items()})
            out, losses = (out[0], [out[1][:, None]]) if model.generates else (out, [])
            o_s, a_s, p_s, *losses = everyones([*out, *losses], counts)
            loss, parts = student_loss(
                Outputs(o_s, a_s, p_s), target, y, alpha=config.alpha, beta=config.beta, gamma=config.gamma,
                kind=config.loss, temperature=config.temperature, output_factor=config.output_factor,
                answer_loss=losses[0].mean() if losses else None)
        weight = len(part) / len(rows)  # of the batch: exact for a short last micro-batch too
        scaler.scale(loss * weight).backward()
        for name, value in {**parts, "loss": loss}.items():
            values[name] = values.get(name, 0) + weight * value.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return {**values, "grad_norm": norm}

def run(cell):
    """Train one cell from where it stands to the end: the aligner's epoch, the student's epoch, and again."""
    config, data, began = cell.config, cell.data, time.perf_counter() - cell.seconds
    rates = {"aligner": config.aligner_lr, "student": config.lr}
    steps = math.ceil(len(data.labels) / config.batch_size)  # an epoch's, for each role
    if cell.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(cell.device)
    bar = tqdm(cell.schedule(), total=steps * config.epochs * len(cell.models), leave=False,
               disable=bool(rank()) or None, desc=f"{config.arms[0]} seed {cell.seed}")
    if cell.student.generates and not cell.done:  # what a pretrained student answers before it is trained
        cell.log({"epoch": 0, "dev": cell.evaluate()[0]})
    with interruptible() as pressed, bar:
        waiting, tokens, read_at = [], 0, time.perf_counter()  # since the last line of the log
        for count, (epoch, role, step, rows) in enumerate(bar, 1):
            if count <= cell.done:
                continue  # resumed: walk past what is done. Each step seeds itself: skipping changes nothing.
            lr = rates[role] * lr_factor(epoch * steps + step, config.epochs * steps)
            cell.optimizers[role].param_groups[0]["lr"] = lr
            waiting.append(update(cell, epoch, role, step, rows))
            tokens += sum(len(data.rows["train"][i]["input_ids"]) for i in rows)
            cell.done, cell.seconds = count, time.perf_counter() - began
            end = step + 1 == steps
            if not (end or pressed or (step + 1) % 50 == 0):
                continue  # reading a value each step would stall the CPU until the GPU is done
            facts = {"step": epoch * steps + step + 1, "epoch": epoch + 1, "role": role, "lr": lr,
                     "steps": len(waiting), "tokens": tokens}
            values = means(waiting, facts, cell.scalers[role])
            cell.log(facts | values | {"tokens_per_second": round(tokens / (time.perf_counter() - read_at))})
            bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
            due = end and role == "student" and (
                epoch + 1 == config.epochs or (epoch + 1) % config.eval_every == 0)
            if due:
                scores, cell.answers, p_s = cell.evaluate()
                cell.log({"epoch": epoch + 1, "dev": scores, **cell.evaluate_aligner(p_s)})
                headline = next(name for name in scores if cell.best is None or name in cell.best["dev"])
                if cell.best is None or scores[headline] > cell.best["dev"][headline]:
                    cell.best = {"epoch": epoch + 1, "dev": scores}
                    cell.save("best")
            if due or pressed:
                cell.save()
            if pressed:
                raise KeyboardInterrupt
            waiting, tokens, read_at = [], 0, time.perf_counter()
    finish(cell)

def finish(cell):
    """Finish the cell: score the last epoch's student on all splits, write predictions_* and metrics.json."""
    config, data, gpu = cell.config, cell.data, cell.device.type == "cuda"
    norms = [(line["grad_norm"], line["steps"]) for line in cell.lines if line.get("role") == "student"]
    metrics = {
        "task": data.task.name, "student": config.student, "teacher": config.teacher, "arm": config.arms[0],
        "seed": cell.seed, "control": not is_distilled(config) or config.pairing != "own",
        **({"untrained": cell.lines[0]["dev"]} if cell.student.generates else {}),
        "best": cell.best, "aligner": cell.lines[-1]["aligner"], "spaces": cell.lines[-1]["spaces"],
        "grad_norm": round(sum(norm * n for norm, n in norms) / sum(n for _, n in norms), 4),
        "parameters": sum(p.numel() for p in cell.student.parameters()),
        "trained": sum(p.numel() for p in cell.student.parameters() if p.requires_grad),
        "seconds": round(cell.seconds, 1),
        "peak_memory_mib": torch.cuda.max_memory_allocated(cell.device) >> 20 if gpu else 0}
    found = {"dev": cell.answers} if cell.answers else {}  # as they were after the last step
    metrics.update({"dev": cell.lines[-1]["dev"]} if found else {})
    for split in [split for split in data.splits if split not in ("train", *found)]:
        metrics[split], found[split], _ = cell.evaluate(split)
    if rank():
        return
    for split, answers in found.items():
        evaluation.write_predictions(cell.folder, split, data.task, data.splits[split], answers)
    write_json(cell.folder / "metrics.json", metrics)
    for name in ("optimizers.safetensors", "training.json"):
        (cell.folder / "last" / name).unlink()  # twice the student's size, and never needed again
    metric, score = next(iter(metrics["dev"].items()))  # the headline
    print(f"seed {cell.seed} {config.arms[0]}: dev {metric} {score:.1%} ({cell.seconds:.1f} s)", flush=True)

# ---- the grid and the command line -------------------------------------------------------------------------
def train(config):
    """Train every arm with every seed -> {arm: {seed: metrics}}. A finished cell is read, not trained again.
    Raises UserError for whatever the caller can mend, before a model is loaded wherever that is possible."""
    join(config)
    # Of rank 0 alone: the others might already see what it is about to write.
    config, fresh, todo = from_first(partial(begin, config))
    out = Path(config.out)
    try:
        if todo:  # rank 0 fetches, draws and buys, then the others find it all
            built = []
            from_first(lambda: built.append(Data(config)))
            data = built[0] if built else Data(config)
        for seed, arm in todo:
            cell = replace(config, arms=(arm,), seeds=(seed,), resume=None, **ARMS[arm])
            if not rank():
                write_json(out / arm / str(seed) / "config.json", vars(cell))
            run(Cell(cell, data, out / arm / str(seed)))
            gc.collect()  # DDP and FSDP hold a student in cycles: it would be there beside the next one
    except (UserError, OSError):
        written = {each.name for each in out.rglob("*") if each.is_file()}
        if fresh and written <= {"config.json"} and not rank():  # not begun
            shutil.rmtree(out, ignore_errors=True)
        raise
    return from_first(lambda: {arm: {seed: json.loads((out / arm / str(seed) / "metrics.json").read_text())
                                     for seed in config.seeds} for arm in config.arms})

def begin(config):
    """(resolved Config, is its folder new, [(seed, arm)] still to train); writes OUT/config.json."""
    if config.resume and not config.out:
        config = resume_config(config.resume, {"fsdp": config.fsdp})
    config = resolve(config)
    out, fresh = Path(config.out), not Path(config.out).exists()
    if not config.resume and (out / "config.json").exists():
        raise UserError(f"--out {out} holds a run already: go on with --resume {out}, or give another --out")
    todo = [(seed, arm) for seed in config.seeds for arm in config.arms
            if not (out / arm / str(seed) / "metrics.json").exists()]
    if todo:
        if config.student != "tiny":
            check_available(config.student)
        print(f"{config.task}: student {config.student}, teacher {config.teacher}, {precision(config)[-1]}, "
              f"arms {','.join(config.arms)}, seeds {config.seeds}, writing {out}", flush=True)
        if not config.resume:  # first, so that --resume can start what never began
            write_json(out / "config.json", vars(config))
    return config, fresh, todo

def main(argv=None):
    """The command line: status 0; 2 and one line on stderr for what the user can mend; 130 after Ctrl-C."""
    config = configure(argv)
    if config.student == "tiny":
        torch.set_num_threads(1)  # matrices this small are done before a second thread wakes up
    try:
        if config.plan:
            from tests.plan import plan
            return print(plan(config, [replace(config, **ARMS[arm]) for arm in config.arms]))
        train(config)
        if not rank():
            print(evaluation.report(evaluation.find_cells([config.out])))
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("out of memory: try a smaller --micro-batch or --max-length, --grad-checkpoint on or --amp bf16")
    except (OSError, SafetensorError) as error:  # a full disk; a folder that cannot be written
        fail(f"{error}; if {config.out} was begun, it is whole: mend this and --resume {config.out}")
    except KeyboardInterrupt:
        message = f"\nstopped; go on with: python train.py --resume {config.out}\n"
        Parser().exit(130, "" if rank() else message)

if __name__ == "__main__":
    main()
