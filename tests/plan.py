"""What a run will take, told in advance: memory, steps, teacher vectors. No weights, no card, nothing kept.

    python train.py --plan --task rte --student opt-1.3b --memory 24    # calls plan()

There is no formula for a family. The real Student takes a real training step, loss and backward pass
included, on PyTorch's meta device, whose tensors have shapes and no numbers; Ledger counts what lives.
"""
import math
import sqlite3
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from align import Outputs, TSAligner
from data import UserError, find_task, load_task
from losses import student_loss
from student import SHORT_NAMES, Student, _tiny, check_available, is_decoder
from teacher import Cache, VectorFolder, split_spec

PARTS = {"weights": "weights, aligner included", "moments": "AdamW moments", "gradients": "gradients",
         "copies": "copies of weights in half precision", "logits": "vocabulary logits",
         "activations": "activations, temporaries"}
CONTEXT = 0.6  # GiB: CUDA's context and kernels, which PyTorch does not count, and what fragments. Assumed.
HALF = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- a training step without numbers -----------------------------------------------------------------------
class Ledger(TorchDispatchMode):
    """Bytes of all storages that live, by part, and what they were at the peak. Each op reports its results;
    a storage that several tensors share counts once, and leaves when the last of them dies."""
    def __init__(self, vocabulary=None):
        super().__init__()
        self.live, self.part, self.peak, self.at_peak = dict.fromkeys(PARTS, 0), {}, 0, {}
        self.vocabulary = vocabulary  # V, by whose width logits (N, V) are known; None: there are none

    def add(self, tensor, part="activations", anew=False):
        storage = tensor.untyped_storage()
        known = self.part.get(key := storage._cdata)
        if known is None:
            weakref.finalize(storage, self.drop, key, storage.nbytes())
        elif anew:
            self.live[known] -= storage.nbytes()
        else:
            return
        self.part[key] = part
        self.live[part] += storage.nbytes()
        self.look()

    def drop(self, key, size):
        self.live[self.part.pop(key)] -= size

    def look(self, hidden=0):
        """Is this the peak? hidden: bytes of temporaries within a kernel, which no op reports."""
        if (now := sum(self.live.values()) + hidden) > self.peak:
            self.peak, self.at_peak = now, {**self.live, "activations": self.live["activations"] + hidden}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mixed = {each.is_meta for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)}
        if len(mixed) == 2 and func.overloadpacket is not torch.ops.aten.index:
            # Token ids and masks are real (which positions are answers?); next to a shape they are shapes.
            args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) and not x.is_meta
                                    else x, (args, kwargs))
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            kwargs = {**kwargs, "device": "meta"}  # to the device of the token ids, wherever those are
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype != torch.bool  # "is there no padding?" No.
        if func is torch.ops.aten.logsumexp.default:  # exp(x - max x) is written out
            self.look(hidden=args[0].nbytes)
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, torch.Tensor):
                of_logits = each.dim() == 2 and each.size(1) == self.vocabulary
                self.add(each, "logits" if of_logits else "activations")
        return out

# What CUDA's autocast does: these in half precision, those in float32, all else as it comes.
LOW = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
       torch.baddbmm, torch.addmm, F.conv1d, torch.einsum, F.scaled_dot_product_attention}
FULL = {F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.exp,
        torch.log, torch.rsqrt, torch.logsumexp, torch.Tensor.logsumexp, torch.cumsum, torch.Tensor.cumsum,
        torch.pow, torch.Tensor.pow, torch.Tensor.sum, torch.sum}

class Kernels(TorchFunctionMode):
    """The meta device has neither autocast nor a choice of kernels; this adds those of CUDA or the CPU."""
    def __init__(self, ledger, half, cuda):
        super().__init__()
        self.ledger, self.half, self.cuda, self.copies = ledger, half, cuda, {}
        self.autocast = self.keep = half is not None

    def to(self, x, dtype):
        """Autocast keeps a trained weight's copy to the end of the forward pass."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if not (isinstance(x, torch.nn.Parameter) and self.half == dtype):
            return x.to(dtype)
        copy = self.copies.get(id(x))
        if copy is None:
            copy = x.to(dtype)
            self.ledger.add(copy, "copies", anew=True)
            if self.keep and x.requires_grad:
                self.copies[id(x)] = copy
        return copy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtype = self.half if func in LOW else torch.float32 if func in FULL else None
        if self.autocast and dtype and any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
            args, kwargs = tree_map(lambda x: self.to(x, dtype), (args, kwargs))
        if func is F.dropout and self.cuda:  # its mask has a byte an element, the CPU's is of x's own type
            x, p, training = self.dropout(*args, **kwargs)
            return torch.native_dropout(x, p, True)[0] if training and p else x
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def block(self, device_type, dtype=None, enabled=True, cache_enabled=True):
        """In place of torch.autocast, which does not know the meta device: a block may switch it off."""
        before, self.autocast = self.autocast, self.autocast and enabled
        yield
        self.autocast = before

    @staticmethod
    def dropout(x, p=0.5, training=True, inplace=False):
        return x, p, training

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                  enable_gqa=False):
        """(B, h, L, d_k) each. Fused: no (L, L) matrix of probabilities is kept. On CUDA the one that takes
        any mask; the CPU's knows no dropout, and with it all steps are written out."""
        if enable_gqa:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        if attn_mask is not None:
            attn_mask = attn_mask.to("meta")
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        grad = torch.is_grad_enabled()
        if self.cuda:
            bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.size(2))
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, grad, dropout_p, is_causal, scale=scale)[0]
        if not dropout_p:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]

def imagine(config, lm_config, dim, texts=None):
    """The Student of a run as build_student makes it, without numbers. lm_config None: "tiny" of texts."""
    task = find_task(config.task)
    generates = task.kind == "generate"
    kind = transformers.AutoModelForCausalLM if generates else transformers.AutoModel
    with torch.device("meta"):
        lm = kind.from_config(lm_config, dtype=torch.float32) if lm_config else _tiny(texts)[0]
        size = min(1000, lm.config.vocab_size) if generates else 0
        tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, model_max_length=10**9)
        student = Student(lm, tokenizer, size or max(1, len(task.labels)), dim, lora=config.lora,
                          orthogonal=config.orthogonal_student, labels=task.labels,
                          max_length=config.max_length, vocabulary=range(size),
                          max_new_tokens=config.max_new_tokens)
    if config.max_length > student.max_tokens:
        raise UserError(f"--max-length {config.max_length}: {config.student} reads at most "
                        f"{student.max_tokens} tokens")
    return student

def batch(config, student, rows):
    """The worst batch: every row but one of max_length tokens, of which max_new_tokens are to be learnt. One
    is a token shorter, for transformers leaves a mask without padding out. (x, labels)"""
    shape = (rows, config.max_length)
    x = {"input_ids": torch.ones(shape, dtype=torch.long), "attention_mask": torch.ones(shape).long()}
    x["attention_mask"][0, -1] = 0
    y = torch.zeros(rows) if find_task(config.task).kind == "regress" else torch.zeros(rows).long()
    if student.generates:
        x["labels"] = torch.full(shape, -100)
        x["labels"][:, -config.max_new_tokens:] = 1
        y = torch.zeros(rows, len(student.vocabulary))
    elif student.lm.config.model_type in ("bert", "deberta", "deberta-v2"):
        x["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
    return x, y

def open_ledger(student, amp, cuda, aligner):
    """(Ledger, Kernels) with what lives all through a training: weights and moments, the aligner's too."""
    ledger = Ledger(student.lm.config.vocab_size if student.generates else None)
    for weight in [*student.parameters(), *student.buffers()]:
        ledger.add(weight.data, "weights")
    # AdamW has two moments a weight from the first step on; fused, it makes no temporaries.
    ledger.live["weights"] += 4 * aligner
    ledger.live["moments"] += 8 * aligner + sum(2 * w.nbytes for w in student.parameters() if w.requires_grad)
    return ledger, Kernels(ledger, HALF[amp], cuda)

def estimate(config, student, amp, checkpointing, rows, cuda=True, aligner=0):
    """{part: bytes} at the peak of train.update with `rows` rows at once; aligner: its parameters, or 0."""
    if checkpointing:
        student.checkpoint_gradients()
    else:
        student.lm.activation_checkpointing_disable()
    if amp == "bf16" and config.lora:
        student.round_base()
    ledger, kernels = open_ledger(student, amp, cuda, aligner)
    trained, hooks = [weight for weight in student.parameters() if weight.requires_grad], []
    for weight in trained:
        hooks.append(weight.register_post_accumulate_grad_hook(
            lambda weight: ledger.add(weight.grad, "gradients", anew=True)))
    x, y = batch(config, student.train(), rows)
    with patch("torch.autocast", kernels.block), ledger, kernels:
        for weight in trained if rows < config.batch_size else ():  # gradients of earlier micro-batches wait
            weight.grad = torch.empty_like(weight)
            ledger.add(weight.grad, "gradients", anew=True)
        o, p = (torch.empty(rows, student.settings[name], device="meta")
                for name in ("num_labels", "proj_dim"))
        out = student(**x)
        kernels.copies.clear()
        kernels.autocast, autocast = False, kernels.autocast
        out, answer_loss = (out[0], out[1].mean()) if student.generates else (out, None)
        loss, _ = student_loss(
            out, Outputs(o, o, p) if aligner else None, y.to("meta"), alpha=config.alpha, beta=config.beta,
            gamma=config.gamma, kind=config.loss, temperature=config.temperature,
            output_factor=config.output_factor, answer_loss=answer_loss)
        kernels.autocast, kernels.keep = autocast, False  # from here on only recomputed layers pass by
        # loss.backward() itself, without its Python layer, within which Kernels would be suspended.
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    for hook in hooks:
        hook.remove()
    student.zero_grad()
    return ledger.at_peak

@torch.no_grad()
def estimate_answers(config, student, amp, rows, cuda=True, aligner=0):
    """{part: bytes} at the peak of generating: keys and values of all tokens, and the next token."""
    student.eval()
    ledger, kernels = open_ledger(student, amp, cuda, aligner)
    x, _ = batch(config, student, rows)
    ids, mask = x["input_ids"], x["attention_mask"]
    with patch("torch.autocast", kernels.block), ledger, kernels:
        out = student.lm(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, logits_to_keep=1)
        student.lm(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=out.past_key_values,
                   use_cache=True)
    return ledger.at_peak

# ---- what can be known of a run before it begins -----------------------------------------------------------
def look_up(name, generates):
    """A student's transformers config, of config.json alone; UserError as build_student would raise."""
    try:
        config = transformers.AutoConfig.from_pretrained(**check_available(name))
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"could not read the config.json of {name}: {why}") from None
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise UserError(f"{name} is a {config.model_type} model: give one like BERT or OPT")
    if generates and not is_decoder(config):
        raise UserError(f"{name} reads both ways, it cannot generate: give one like opt-125m or llama-7b")
    if name == "bert-6l":
        config.num_hidden_layers = 6
    return config

def smaller(student, size):
    """[(short name, its config)] of students below `size` parameters, the largest first: known by heart."""
    opt = dict(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32,
               word_embed_proj_dim=2048)
    known = [("opt-1.3b", 1316e6, transformers.OPTConfig(**opt)),
             ("opt-125m", 125e6, transformers.OPTConfig())]
    if not is_decoder(student.lm.config):
        known = [("bert-base", 109e6, transformers.BertConfig()),
                 ("bert-6l", 67e6, transformers.BertConfig(num_hidden_layers=6))]
    return [(name, config) for name, parameters, config in known if parameters < 0.9 * size]

def examples_at_hand(config):
    """{"train": [...], "dev": [...]} where a run would use no network; else None."""
    task = find_task(config.task)
    folder = config.data_dir or Path(config.cache_dir, "data")
    if task.name == "objects" or config.data_dir or (Path(folder) / task.folder).is_dir():
        splits = load_task(task.name, str(folder))
        return {"train": splits["train"][:config.limit], "dev": splits["dev"][:config.eval_limit]}

def teacher_width(config):
    """(d_e, what of it is assumed)."""
    name, _, argument = config.teacher.partition(":")
    if name == "vectors":
        return VectorFolder(argument).dim, ""
    if name == "painter":
        return 1024, ""
    encoder = (config.picture_encoder or ("" if name == "stable-diffusion" else "pixels")).partition(":")[0]
    width = {"clip": 768, "pixels": 768, "vae": 1024, "": 1024}["clip" if name == "clip" else encoder]
    return width, "" if name != "clip" and encoder == "pixels" else f"; {name}'s usual width is assumed"

def vectors_to_make(config, rows, examples):
    """How many vectors a costly teacher is asked for, in words; rows: (train, dev) or None."""
    (kind, argument), name = split_spec(config.teacher), config.teacher.partition(":")[0]
    if not kind.costly:
        return "0 (this teacher costs nothing)"
    if not rows:
        return "unknown: give --data-dir"
    most, path = sum(rows), Path(config.cache_dir, "teachers.sqlite")
    model = argument or "openai/clip-vit-large-patch14"
    key = {"clip": f"clip:{Path(model).resolve() if Path(model).is_dir() else SHORT_NAMES.get(model, model)}",
           "api": f"{config.teacher} pixels:"}.get(name)
    if not examples or not key or config.picture_encoder:
        return f"at most {most:,} (the cache was not asked)"
    task, have = find_task(config.task), set()
    if path.exists():
        try:
            have = {row[0] for row in sqlite3.connect(f"file:{path}?mode=ro", uri=True).execute(
                "SELECT key FROM made")}
        except sqlite3.Error as error:
            raise UserError(f"{path}: {error}; if damaged, delete it: all is made anew") from None
    keys = {Cache.key(key, task.prompt(each)) for each in examples["train"] + examples["dev"]}
    return f"{len(keys - have):,} of {len(keys):,} different texts"

class Estimates:
    """Peaks of a run's variants, each found once. A variant is (short name or None, lora, amp, checkpointing,
    rows at once); None is the student that was asked for."""
    def __init__(self, config, lm_config, dim, width, texts):
        self.config, self.configs, self.dim, self.texts = config, {None: lm_config}, dim, texts
        self.cuda, self.found, self.students, self.aligner = config.device not in ("cpu", "mps"), {}, {}, 0
        if config.beta or config.alpha * config.output_factor:
            with torch.device("meta"):
                labels = self.student(None, config.lora).settings["num_labels"]
                aligner = TSAligner(width, labels, proj_dim=dim)
            self.aligner = sum(p.numel() for p in aligner.parameters())

    def student(self, name, lora, rounded=False):
        """A Student without numbers; one whose base is going to be rounded is another."""
        key = name, lora, rounded
        if key not in self.students:
            config = replace(self.config, lora=lora, student=name or self.config.student)
            self.students[key] = imagine(config, self.configs[name], self.dim, self.texts)
        return self.students[key]

    def __call__(self, name, lora, amp, checkpointing, rows):
        """{part: bytes}, of training or, where that takes more, of generating the dev split's answers."""
        if amp == "fp16" and not lora:  # the same bytes
            amp = "bf16"
        variant = name, lora, amp, checkpointing, rows
        if variant not in self.found:
            student = self.student(name, lora, bool(lora) and amp == "bf16")
            config = replace(self.config, lora=lora)
            more = dict(cuda=self.cuda, aligner=self.aligner)
            peaks = [estimate(config, student, amp, checkpointing, rows, **more)]
            if student.generates:
                peaks.append(estimate_answers(config, student, amp, rows, **more))
            self.found[variant] = max(peaks, key=lambda parts: sum(parts.values()))
        return self.found[variant]

    def fits(self, *variant):
        """Whether --memory is enough, CUDA's own share included; no where there is no such student."""
        try:
            return sum(self(*variant).values()) / 2**30 + CONTEXT * self.cuda <= self.config.memory
        except UserError:  # it has no map for a LoRA, or reads no text as long
            return False

    def flags(self, amp, checkpointing):
        """The first flags that fit, "" for none needed; None where nothing does."""
        config, student = self.config, self.student(None, self.config.lora)
        size = sum(p.numel() for p in student.parameters())
        names = [None] if config.student == "tiny" else [None, *(name for name, _ in smaller(student, size))]
        self.configs |= dict(smaller(student, size))
        rows = [config.micro_batch]
        while rows[-1] > 1:
            rows.append(max(n for n in range(1, rows[-1] // 2 + 1) if config.batch_size % n == 0))
        for name in names:
            for lora in dict.fromkeys([config.lora, config.lora or 8] if config.student != "tiny" else [0]):
                variants = [(name, lora, amp, checkpointing, rows[0])] + [
                    (name, lora, amp, True, n) for n in rows]
                if not self.fits(*variants[-1]):  # one row at a time takes the least
                    continue
                _, _, _, on, n = next(variant for variant in variants if self.fits(*variant))
                return " ".join([*([f"--student {name}"] if name else []),
                                 *([f"--lora {lora}"] if lora != config.lora else []),
                                 *(["--grad-checkpoint on"] if on and not checkpointing else []),
                                 *([f"--micro-batch {n}"] if n != config.micro_batch else [])])

def table(estimates):
    """Lines of GiB by part, a column for each precision without and with checkpointing."""
    config = estimates.config
    columns = [(amp, on) for amp in HALF for on in (False, True)]
    found = [estimates(None, config.lora, *column, config.micro_batch) for column in columns]
    lines = [" " * 38 + "".join(f"{amp + (' ckpt' if on else ''):>11}" for amp, on in columns)]
    for part, words in PARTS.items():
        if any(parts[part] for parts in found):
            lines.append(f"  {words:36}" + "".join(f"{parts[part] / 2**30:11.3f}" for parts in found))
    if estimates.cuda:
        lines.append(f"  {'CUDA context and fragments (assumed)':36}" + f"{CONTEXT:11.3f}" * len(columns))
    more = CONTEXT * estimates.cuda
    return lines + [f"  {'total':36}" + "".join(f"{sum(parts.values()) / 2**30 + more:11.3f}"
                                                for parts in found)]

def plan(config, arms):
    """The text that --plan prints, of a resolved Config and that of each arm. UserError where the run itself
    would raise one."""
    distilled = [arm for arm in arms if arm.beta or arm.alpha * arm.output_factor]
    config, task = (distilled or arms)[0], find_task(config.task)  # an arm with an aligner takes the most
    generates, examples = task.kind == "generate", examples_at_hand(config)
    rows, source = None, "its data"
    if examples:
        rows = len(examples["train"]), len(examples["dev"])
    elif task.rows:
        limits, source = (config.limit, config.eval_limit), "the official counts"
        rows = [min(n, most or n) for n, most in zip(task.rows, limits)]
    width, assumed = teacher_width(config)
    dim = config.proj_dim or width
    if dim > width:
        raise UserError(f"--proj-dim {dim} is over {config.teacher}'s {width}: give that or less")
    texts = [" ".join(f"w{i}" for i in range(10_000))]  # 10,000 words are assumed
    if examples:
        texts = [text for each in examples["train"] for text in task.pair(each) if text]
    lm_config = None if config.student == "tiny" else look_up(config.student, generates)
    estimates = Estimates(config, lm_config, dim, width, texts)
    student = estimates.student(None, config.lora)
    large = sum(p.numel() for p in student.lm.parameters()) > 300e6 and estimates.cuda
    on = config.grad_checkpoint == "on" or (config.grad_checkpoint == "auto" and large)
    amp = {"auto": "bf16" if estimates.cuda else "off"}.get(config.amp, config.amp)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    lines = [
        f"plan: {config.task}, student {config.student}, teacher {config.teacher}; nothing loaded or written",
        f"parameters: {sum(p.numel() for p in student.parameters()):,}, {trained:,} of them trained; aligner "
        f"{estimates.aligner:,} (projection to {dim} dimensions{assumed if not config.proj_dim else ''})",
        f"batch: {config.micro_batch} rows at once, {config.max_length} tokens each"
        + (f", {config.max_new_tokens} of them an answer's; |V_a| = 1000 is assumed" if generates else ""),
        f"peak memory in GiB, on {'CUDA' if estimates.cuda else 'the CPU'}:", *table(estimates)]
    if rows:
        steps = config.epochs * math.ceil(rows[0] / config.batch_size)
        roles = " and as many of the aligner" * bool(distilled)
        lines.append(f"steps: {steps:,} of the student{roles}, for each arm and seed ({len(arms)} x "
                     f"{len(config.seeds)} cells); {rows[0]:,} examples by {source}")
    else:
        lines.append("steps: unknown without the data: give --data-dir")
    specs = dict.fromkeys(arm.teacher for arm in distilled)
    lines += [f"vectors to make of {spec}: {vectors_to_make(replace(config, teacher=spec), rows, examples)}"
              for spec in specs] or ["vectors to make: 0 (no arm looks at a teacher)"]
    if config.memory:
        flags, now = estimates.flags(amp, on), f"amp {amp}, checkpointing {'on' if on else 'off'}"
        lines.append(f"a card of {config.memory:g} GiB ({now}): " + (
            "no flags make it fit" if flags is None else f"add {flags}" if flags else "fits as it is"))
    return "\n".join(lines)
