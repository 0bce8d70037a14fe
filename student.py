"""Students: a text-only language model, one pooled vector a text, three heads.

Shapes: B batch, L tokens, d_s width of the language model, C labels, d shared projection space.
    h_s = pool(LM(x))         (B, d_s)
    o_s = C_s drop(h_s)       (B, C)    main logits
    p_s = P_s h_s             (B, d)    linear, no bias; orthogonal on request
    a_s = C'_s drop(p_s)      (B, C)    auxiliary logits
A student that generates keeps its vocabulary head: h_s is the last prompt token's, o_s the log of
the answer's bag of tokens over an answer vocabulary V_a (losses.answer_losses), C = |V_a|.

    load_student("runs/rte/armada/0/last").predict([("A man sleeps.", "A man is awake.")])
"""
import inspect
import json
import math
import os
import re
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from align import Householder, Outputs
from data import (SHORT_NAMES, UserError, check_available, check_text, collate, explain_loading,
                  load_tokenizer, read_json)
from losses import answer_losses, predictions

POOLED = ("bert", "roberta", "xlm-roberta")  # whose pooler_output is read


class AnswerOutputs(NamedTuple):
    """What a student that generates returns when it is given answers: Outputs and their losses."""
    logits: torch.Tensor       # o_s (B, V_a)
    aux_logits: torch.Tensor   # a_s (B, V_a)
    proj: torch.Tensor         # p_s (B, d)
    answer_loss: torch.Tensor  # the cross entropy of each answer (B,), a mean over its tokens


class StudentModel(nn.Module):
    """A language model with heads: student(input_ids, attention_mask, token_type_ids) -> Outputs.
    With `vocabulary`, V_a's token ids, it generates: given labels (B, L), -100 outside of the
    answers, it returns AnswerOutputs; of a text without an answer the bag is the next token's.
    Student, below the fence, is this model and what is done around training: ask, save, split."""

    def __init__(self, lm, tokenizer, num_labels, proj_dim, dropout=0.1, orthogonal=False,
                 labels=(), max_length=128, vocabulary=(), max_new_tokens=256, lora=0, base=None):
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.generates = bool(vocabulary)
        self.decoder = is_decoder(lm.config)
        # The longest text that tokenizer and position table allow; OPT's tokenizer alone says 1e30.
        self.max_tokens = min(tokenizer.model_max_length, count_positions(lm))

        # All that load_student() needs to build the same student again; save() writes it.
        if not lora:
            base = None  # a whole model is saved, which needs no base
        self.settings = dict(
            num_labels=num_labels, proj_dim=proj_dim, dropout=dropout, orthogonal=orthogonal,
            labels=list(labels), max_length=max_length, vocabulary=list(vocabulary),
            max_new_tokens=max_new_tokens, lora=lora, base=base)

        self.heads = self.make_heads(num_labels, proj_dim, orthogonal)
        self.drop = nn.Dropout(dropout)
        if lm.config.model_type not in POOLED and getattr(lm, "pooler", None):
            # ALBERT's is not read, and DDP would wait for its gradient.
            lm.pooler.requires_grad_(False)
        if self.generates:
            self.prepare_to_generate(vocabulary)
        if lora:
            add_lora(lm, lora)

    def make_heads(self, num_labels, proj_dim, orthogonal):
        """The maps C_s, P_s and C'_s, with random weights."""
        config = self.lm.config
        # The two differ in OPT-350m.
        d_s = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        if orthogonal:
            # The aligner's gauge argument does not hold here, since p_s must meet p_t coordinate by
            # coordinate: an orthogonal P_s gets d_s reflections, enough for every rotation of h_s.
            projection = Householder(d_s, proj_dim, d_s)
        else:
            projection = nn.Linear(d_s, proj_dim, bias=False)
        return nn.ModuleDict({
            "classifier": nn.Linear(d_s, num_labels),             # C_s
            "projection": projection,                             # P_s
            "aux_classifier": nn.Linear(proj_dim, num_labels)})   # C'_s

    def prepare_to_generate(self, vocabulary):
        """Change what is different in a student that answers with texts."""
        del self.heads["classifier"]  # the vocabulary head stands in for C_s
        # In place of the checkpoint's own, which may sample or forbid repetition.
        self.lm.generation_config = transformers.GenerationConfig(
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id)
        self.register_buffer("vocabulary", torch.tensor(vocabulary), persistent=False)  # (V_a,)

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        """All four are (B, L). Labels are for a student that generates alone; they stay on the CPU,
        where to count an answer's tokens does not make anyone wait for the GPU."""
        extra = {}
        if self.decoder:
            # Else keys and values are kept for a next token that never comes: gigabytes.
            extra["use_cache"] = False
        elif token_type_ids is not None:
            extra["token_type_ids"] = token_type_ids
        out = self.lm.base_model(input_ids=input_ids, attention_mask=attention_mask, **extra)

        prompt = attention_mask                               # (B, L)
        if labels is not None:
            before_answer = (labels != -100).cumsum(-1) == 0  # (B, L)
            # h_s must not have read the answer.
            prompt = attention_mask * send(before_answer, attention_mask.device)
        h = self.pool(out, prompt)                            # (B, d_s)
        h = h.to(self.heads["aux_classifier"].weight.dtype)   # a LoRA's base may sit in bf16

        if self.generates:
            o, answer_loss = self.answer_logits(out.last_hidden_state, prompt, labels)  # (B, V_a)
        else:
            o = self.heads["classifier"](self.drop(h))        # (B, C)
        p = self.heads["projection"](h)                       # (B, d)
        a = self.heads["aux_classifier"](self.drop(p))        # (B, C)
        if self.generates and labels is not None:
            return AnswerOutputs(o, a, p, answer_loss)
        return Outputs(o, a, p)

    def answer_logits(self, states, prompt, labels):
        """Compute o_s (B, V_a) and the cross entropy of each answer (B,) with the vocabulary head.
        states (B, L, d_s) are the last layer's, prompt (B, L) marks the prompts' tokens, labels
        (B, L) or None. A text without an answer has the bag of the one token that comes next, and
        the cross entropy 0."""
        if labels is None:
            labels = torch.full(prompt.shape, -100)           # (B, L)
        # The state at l predicts token l + 1. No logits of prompts are ever made, or (B, L, V)
        # of them would be gigabytes.
        text, position, tokens, counts, has_answer = find_answers(labels, prompt)
        answer_states = states[text, position]                # (N, d_s), N tokens in all answers
        vocabulary_head = self.lm.get_output_embeddings()
        logits = vocabulary_head(answer_states.to(self.lm.dtype))                # (N, V)
        answer_loss, o = answer_losses(logits, tokens, counts, self.vocabulary)  # (B,), (B, V_a)
        return o, torch.where(has_answer, answer_loss, 0)

    def pool(self, out, attention_mask):
        """One vector a text, the same whatever the padding: (B, L, d_s) -> (B, d_s)."""
        if self.lm.config.model_type in POOLED:
            return out.pooler_output  # tanh on the first token
        # DEVIATION: the authors take OPT's last position, padding or not, and LLaMA's position 0,
        # which under a causal mask has read one token: the same vector for every text. Here it is
        # the last real token, found by the mask, never by its id (pad may equal end-of-text). Other
        # encoders: the first token.
        if not self.decoder:
            return out.last_hidden_state[:, 0]
        last = last_token(attention_mask)  # (B,)
        return out.last_hidden_state[torch.arange(len(last), device=last.device), last]

    def layers(self):
        """The language model's blocks, as transformers marks them."""
        modules = self.lm.modules()
        return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]

    def checkpoint_gradients(self):
        """Recompute layers in the backward pass: up to 1.4 times the time, one layer's activations
        only. UserError if the family cannot."""
        if not self.lm.supports_gradient_checkpointing:
            raise UserError(f"--grad-checkpoint on: {self.lm.config.model_type} cannot: give off")
        self.lm.activation_checkpointing_enable()
        # The last layer's backward pass comes first: what recomputing would give is still there.
        # (ALBERT's one layer is all of them.)
        if len(layers := self.layers()) == self.lm.config.num_hidden_layers > 1:
            layers[-1].gradient_checkpointing = False


def last_token(mask):
    """Return where the last token of each text stands (B,), wherever the padding; mask (B, L)."""
    return mask.cumsum(-1).argmax(-1)  # where the count of tokens peaks first


def is_decoder(config):
    """Whether a model reads left to right: it has a causal and no masked language-model class."""
    return (type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING)


class LoRA(nn.Module):
    """base(x) + (alpha / r) B A drop(x): a frozen linear map and a learnt one of rank r (Hu et al.
    2021). A (r, in) starts at random, B (out, r) at zero: nothing changes at first, yet B has a
    gradient (were both zero, neither would ever get one). alpha / r keeps the size of an update
    when r is changed. Saved are the base's gradients and moments, r (in + out) numbers in place of
    in x out, not the way back through it."""
    alpha = 16
    dropout = 0.05

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.scale = self.alpha / rank
        self.drop = nn.Dropout(self.dropout)
        out_width, in_width = as_held(base, base.weight).shape
        self.lora_A = nn.Linear(in_width, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_width, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        out = self.base(x)                                              # (..., out)
        x = x.to(self.lora_A.weight.dtype)  # the base may sit in bf16, A and B never do
        update = self.scale * self.lora_B(self.lora_A(self.drop(x)))    # (..., out)
        return out + update.to(out.dtype)

    @torch.no_grad()
    def merged(self):
        """One linear map, W + (alpha / r) B A, that does the same at no extra cost (and without
        dropout). The base gets a new tensor; that of W is left as it is."""
        weight = self.base.weight
        update = self.scale * self.lora_B.weight @ self.lora_A.weight   # (out, in)
        # Summed in float32 and rounded once. W in bf16 lies on a grid whose step is a 128th to a
        # 256th of W, and an update of less than half a step is lost: much of what a LoRA changes
        # while its B is still about .0001, little once B is ten times as large.
        weight.data = (weight + as_held(self.base, update)).to(weight.dtype)
        return self.base


def add_lora(lm, rank):
    """Freeze a language model and put a LoRA around each of its query and value maps.
    UserError if it has none that LORA_TARGETS names, or if they are narrower than the rank."""
    lm.requires_grad_(False)
    maps = linear_maps(lm)
    targets = {name: maps[name] for name in maps if name.split(".")[-1] in LORA_TARGETS}
    if not targets:
        there = sorted({name.split(".")[-1] for name in maps})
        raise UserError(f"--lora: {lm.config.model_type} has no linear map named "
                        f"{', '.join(LORA_TARGETS)}, but {', '.join(there)}: try --lora 0")
    largest_rank = min(min(module.weight.shape) for module in targets.values())
    if rank > largest_rank:
        raise UserError(f"--lora {rank}: the model's maps are of rank {largest_rank} themselves; "
                        "8 is usual")
    for name, module in targets.items():
        lm.set_submodule(name, LoRA(module, rank))


# ---- the method ends here; below is bookkeeping ----

LORA_TARGETS = (  # what families call their maps to queries and to values, or one map to both
    "q_proj", "v_proj", "query", "value", "query_proj", "value_proj", "q_lin", "v_lin", "q", "v",
    "q_head", "v_head", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")

PEFT_PREFIX = "base_model.model."  # what peft puts before the names of a model's tensors

transformers.logging.set_verbosity_error()  # its load report lists heads, left out on purpose
transformers.logging.disable_progress_bar()


class Student(StudentModel):
    """A StudentModel and all that is done with one beside a training step.
    It answers (answers, generate, predict), holds its weights another way (round_frozen_weights,
    merge, shard), and is written (state, save)."""

    compiled = False  # until compile_blocks()

    # ---- what it answers ----
    def answers(self, rows, batch_size=64, autocast=nullcontext, keep=0):
        """Return (answers, projections), lists in the order of the encoded rows.
        An answer is a class id, or the score of a regression; of a student that generates it is the
        cross entropy of the answer given with the row. Projections are p_s (d,) of the first `keep`
        rows, on the CPU."""
        answers = [None] * len(rows)
        projections = [None] * min(keep, len(rows))
        with self.evaluation_mode():
            for indices, batch in self._batches_by_length(rows, batch_size):
                with autocast():
                    out = self(**batch)
                if self.generates:
                    values = out.answer_loss           # (B,)
                else:
                    values = predictions(out.logits)   # (B,)
                if not (values.isfinite().all() and out.logits.isfinite().all()):
                    raise UserError("the student's outputs are not finite: lower --lr, or try "
                                    "--amp off; what was saved before stands")
                p_s = out.proj.float().cpu()           # (B, d)
                for i, value, p in zip(indices, values.tolist(), p_s):
                    answers[i] = value
                    if i < keep:
                        projections[i] = p.clone()  # a view would keep the whole batch in memory
        return answers, projections

    def generate(self, rows, batch_size=64, autocast=nullcontext, temperature=0):
        """Return the texts that follow the prompts of encoded rows, in their order.
        At temperature 0 they are the likeliest tokens, else sampled by torch's generator. They end
        with end-of-text or after settings["max_new_tokens"]."""
        prompts = [_prompt_of(row) for row in rows]
        sampling = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        texts = [None] * len(rows)
        bar = tqdm(total=len(rows), desc="generating", leave=False, disable=None)
        as_written = nullcontext()
        if self.compiled:
            # Keys and values that grow, and merged maps, would be compiled again and again.
            as_written = torch.compiler.set_stance("force_eager")
        with self.merged_for_now(), self.evaluation_mode(), as_written, bar:
            # Padded on the left: what follows must stand next to its prompt. Positions follow
            # the mask.
            for indices, batch in self._batches_by_length(prompts, batch_size, "left"):
                with autocast():
                    ids = self.lm.generate(
                        **batch, **sampling, max_new_tokens=self.settings["max_new_tokens"])
                width = batch["input_ids"].size(1)
                new_ids = ids[:, width:]  # (B, at most max_new_tokens)
                new_texts = self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
                for i, text in zip(indices, new_texts):
                    texts[i] = text.strip()
                bar.update(len(indices))
        return texts

    def predict(self, texts):
        """Return the label names (scores for a regression) of texts, in their order.
        A text is a string or, for a two-text task, a pair (text_a, text_b). A student that
        generates wants the prompt that it was trained on, TASKS[...].prompt(example), and answers
        with texts. UserError for what is no text, or too long: training shortens the longest field
        of such a row, and a finished text no longer tells its fields."""
        if isinstance(texts, str):
            raise UserError("predict wants a list of texts: predict([text])")
        rows = [self._encode_text(text, f"text {i}") for i, text in enumerate(texts, 1)]
        if self.generates:
            return self.generate(rows)
        answers, _ = self.answers(rows)
        labels = self.settings["labels"]
        if not labels:
            return answers
        return [labels[answer] for answer in answers]

    def _encode_text(self, text, where):
        """Return the row that data.encode would make of an example with this text."""
        parts = [text] if isinstance(text, str) else text
        # A task of single texts has pairs (text, None).
        if isinstance(parts, (list, tuple)):
            parts = [part for part in parts if part is not None]
        most = 1 if self.generates else 2
        are_texts = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
        if not are_texts or not 1 <= len(parts) <= most:
            wanted = "one prompt, a string" if self.generates else "a string or two"
            raise UserError(f"{where} must be {wanted}, not {text!r}")
        for part in parts:
            check_text(part, where)
        if self.decoder:
            parts = ["\n".join(filter(None, parts))]  # as Task.prompt does
        encoded = self.tokenizer(*([part] for part in parts), verbose=False)
        row = {"input_ids": encoded["input_ids"][0]}
        if "token_type_ids" in encoded and not self.decoder:
            row["token_type_ids"] = encoded["token_type_ids"][0]

        length = len(row["input_ids"])
        room = min(self.settings["max_length"], self.max_tokens)
        left = ""
        if self.generates:
            room -= self.settings["max_new_tokens"]
            left = " leave room for an answer"
        if length > room:
            raise UserError(f"{where} has {length} tokens, {room}{left or ' fit'}: shorten it, or "
                            "train with a larger --max-length")
        if length == 0:
            raise UserError(f"{where} has no token: {text!r} is empty to this tokenizer")
        return row

    @contextmanager
    def evaluation_mode(self):
        """Within, the student is in eval mode and keeps nothing for a backward pass; afterwards it
        is in the mode that it was in."""
        was_training = self.training
        # FSDP trains in the buffers that it evaluates in, which inference mode would forbid.
        if isinstance(self, FSDPModule):
            no_gradients = torch.no_grad()
        else:
            no_gradients = torch.inference_mode()
        try:
            with no_gradients:
                self.eval()
                yield
        finally:
            self.train(was_training)

    def _batches_by_length(self, rows, batch_size, side="right"):
        """Yield (indices, their batch on the student's device). Rows of similar length stand
        together, which means little padding."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        for start in range(0, len(order), batch_size):
            indices = order[start:start + batch_size]
            yield indices, self.batch([rows[i] for i in indices], side)

    def batch(self, rows, side="right"):
        """Return forward()'s arguments for encoded rows, {name: (B, L)}, on the student's device;
        labels stay on the CPU."""
        length = max(len(row["input_ids"]) for row in rows)
        if self.compiled:  # kernels like multiples of 8
            length = max(length, min(8 * math.ceil(length / 8), self.max_tokens))
        batch = collate(rows, self.tokenizer.pad_token_id, side, length)
        device = next(self.parameters()).device
        return {name: tensor if name == "labels" else send(tensor, device)
                for name, tensor in batch.items()}

    def try_autocast(self, autocast):
        """UserError if the model cannot run within autocast(), as DeBERTa-v1 cannot: its mask is
        float32's smallest number, which bf16 has not."""
        try:
            with self.evaluation_mode(), autocast():
                for _, batch in self._batches_by_length(_trial_rows(self), 3):
                    self(**batch)
        except Exception as error:  # of many kinds, as many as there are families
            reason = " ".join(str(error).split())
            raise UserError(f"{self.lm.config.model_type} does not run in half precision "
                            f"({reason}): give --amp off") from None

    # ---- how its weights are held ----
    def round_frozen_weights(self):
        """Put a LoRA's frozen weights into bf16: half the memory, for hidden states of 8 bits'
        precision."""
        for weight in self.lm.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.bfloat16()

    def loras(self):
        """{name: LoRA} of the language model."""
        modules = self.lm.named_modules()
        return {name: module for name, module in modules if isinstance(module, LoRA)}

    def merge(self):
        """Make every LoRA part of its linear map: save() then writes an ordinary model."""
        for name, lora in self.loras().items():
            self.lm.set_submodule(name, lora.merged())
        self.settings.update(lora=0, base=None)
        return self

    @contextmanager
    def merged_for_now(self):
        """Within, every LoRA is part of its linear map, which saves a token's way through the model
        most of its calls: of a token or two each call costs more than what it computes. Afterwards
        all is as before, bit for bit: W is kept aside, for to subtract the update again would
        round. That takes as much memory as the maps, 2 GiB of LLaMA-7B's 13 in bf16."""
        loras = self.loras()
        if isinstance(self, FSDPModule):
            loras = {}  # no process has a whole weight, and the calls stay as they are
        weights = {name: lora.base.weight.data for name, lora in loras.items()}
        try:
            for name, lora in loras.items():
                self.lm.set_submodule(name, lora.merged())
            yield
        finally:
            for name, lora in loras.items():
                lora.base.weight.data = weights[name]
                self.lm.set_submodule(name, lora)

    def compile_blocks(self, autocast=nullcontext):
        """Compile each block of the language model (torch.compile): small operations are joined
        into few kernels, which take less time to start than to run.
        All blocks share one piece of code, which is compiled for whatever length comes. Generating
        goes on without it. UserError where there is no compiler, or none that knows the model."""
        for block in self.layers():
            block.compile(dynamic=True)
        self.compiled = True
        try:
            with torch.random.fork_rng(devices=[]), autocast():
                out = self(**self.batch(_trial_rows(self)))
                sum(tensor.float().sum() for tensor in out).backward()
        except Exception as error:  # of many kinds: of the compiler's, and of the C++ compiler's
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--compile: {self.lm.config.model_type} cannot be compiled here "
                            f"({type(error).__name__}: {reason}): leave it out") from None
        self.zero_grad()

    def never_wait(self):
        """Keep the attention from looking into the mask, for which the CPU waits for the GPU.
        Where no text is padded, transformers leaves the mask out: faster, but each forward pass
        asks. Only models whose attention is torch's (sdpa) ask."""
        if self.lm.config._attn_implementation == "sdpa":
            self.lm.set_attn_implementation(ATTENTION_THAT_NEVER_WAITS)

    def shard(self, mesh):
        """Split the weights over the N processes of a mesh (FSDP2), for what fits no one card.
        Each keeps 1/N of every weight, gradient and moment and borrows the rest of a layer when its
        turn comes, at the price of sending weights twice a step."""
        for layer in self.layers():
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self, "generate")
        self.lm._is_fsdp_managed_module = True  # generate() then goes on until the last is done

    # ---- how it is written ----
    def state(self):
        """Return what save() writes, {name: tensor}; of LoRA only adapters and heads."""
        state = {}
        written = set()
        # keep_vars: the parameters themselves, whose ids tell them apart.
        for name, value in self.state_dict(keep_vars=True).items():
            is_trained = ".lora_" in name or name.startswith("heads.")
            if self.settings["lora"] and not is_trained:
                continue
            if id(value) not in written:  # a tied weight is one tensor with two names
                written.add(id(value))
                state[name] = value.detach()
        return state

    def save(self, folder, state=None):
        """Write a folder that AutoTokenizer and AutoModel open (AutoModelForCausalLM, where the
        student generates), plus heads.safetensors and student.json. Of LoRA only the adapters are
        written, in the format of peft's PeftModel.
        `state` is state(), gathered into one piece where the weights are split over processes."""
        folder = Path(folder)
        if state is None:
            state = self.state()
        lm_state = _strip_prefix(state, "lm.")
        if self.settings["lora"]:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_adapters(folder, lm_state)
        else:
            self.lm.save_pretrained(folder, state_dict=lm_state)
        self.tokenizer.save_pretrained(folder)
        save_file(_strip_prefix(state, "heads."), folder / "heads.safetensors")
        (folder / "student.json").write_text(json.dumps(self.settings))

    def _save_adapters(self, folder, adapters):
        """Write the two files of a PeftModel, which name the base; the base stays where it is."""
        base = self.settings["base"]
        targets = set()
        is_transposed = False
        for name, module in self.lm.named_modules():
            if isinstance(module, LoRA):
                targets.add(name.split(".")[-1])
                is_transposed = isinstance(module.base, Conv1D)  # all are, or none
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if self.generates else "FEATURE_EXTRACTION",
            "base_model_name_or_path": SHORT_NAMES.get(base, base),
            "bias": "none",
            "inference_mode": True,
            "r": self.settings["lora"],
            "lora_alpha": LoRA.alpha,
            "lora_dropout": LoRA.dropout,
            "target_modules": sorted(targets),
            "fan_in_fan_out": is_transposed}
        prefixed = {PEFT_PREFIX + name: value for name, value in adapters.items()}
        save_file(prefixed, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))


    def load_adapters(self, tensors):
        """Take the adapters that _save_adapters() wrote, all of them and nothing else."""
        adapters = {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
        own = {name for name in self.lm.state_dict() if ".lora_" in name}
        if own != set(adapters):
            example = min(own ^ set(adapters))
            raise UserError(f"its adapters are other maps' than the base's: {example}")
        self.lm.load_state_dict(adapters, strict=False)  # the base's weights are there


def _prompt_of(row):
    """Return an encoded row without its answer, if it has one."""
    ids = row["input_ids"]
    if "labels" in row:
        prompt_length = row["labels"].count(-100)
        ids = ids[:prompt_length]
    return {"input_ids": ids}


def _strip_prefix(state, prefix):
    """Keep of {name: tensor} the names that start with a prefix, and take it off."""
    part = {}
    for name, value in state.items():
        if name.startswith(prefix):
            part[name.removeprefix(prefix)] = value
    return part


# ---- from nothing, from a folder, from the hub ----
def build_student(name_or_path, num_labels, proj_dim, texts=None, **settings):
    """Make a Student from a short name (SHORT_NAMES), hub id or folder; "tiny" makes its vocabulary
    from `texts`. settings: dropout, orthogonal, labels (names for predict), max_length, vocabulary
    (for generation), max_new_tokens and lora (rank), as in StudentModel."""
    if name_or_path == "tiny":
        lm, tokenizer = _tiny(texts, generates=bool(settings.get("vocabulary")))
    else:
        lm, tokenizer = load_pretrained(name_or_path, _model_class(settings.get("vocabulary")))
    base = name_or_path
    if Path(name_or_path).is_dir():
        base = str(Path(name_or_path).resolve())
    student = Student(lm, tokenizer, num_labels, proj_dim, base=base, **settings)
    try_out(student, name_or_path)
    return student


# The types of student.json's values, which stand in Student.settings.
SETTINGS = {
    "num_labels": int, "proj_dim": int, "dropout": (int, float), "orthogonal": bool, "labels": list,
    "max_length": int, "vocabulary": list, "max_new_tokens": int, "lora": int,
    "base": (str, type(None))}


def load_student(folder):
    """Load the Student that save() wrote, on the CPU in eval mode; it needs no teacher, no aligner.
    UserError of one line if the folder is damaged, no student's, or a LoRA's whose base is gone."""
    base = None
    try:
        # Read before the model is loaded, so that a wrong folder is refused at once.
        settings = read_json(Path(folder, "student.json"))
        for name, kind in SETTINGS.items():
            value = settings.get(name)
            may_be_zero = kind is not int or name == "lora"
            if not isinstance(value, kind) or not (may_be_zero or value > 0):
                raise UserError(f"its student.json has {name} {value!r}")
        if settings["labels"] and len(settings["labels"]) != settings["num_labels"]:
            raise UserError("its student.json has not num_labels labels")
        base = settings["base"]
        model_class = _model_class(settings["vocabulary"])
        # What a saved student lacks must not start at random, as a pretrained model's pooler may.
        lm, tokenizer = load_pretrained(base or str(folder), model_class, is_whole=base is None)
        student = Student(lm, tokenizer, **settings)
        if base:
            student.load_adapters(load_file(Path(folder, "adapter_model.safetensors")))
        student.heads.load_state_dict(load_file(Path(folder, "heads.safetensors")))
        try_out(student, str(folder))
    except Exception as error:  # of many kinds, as many as there are ways to damage a file
        why = f"needs the base of its LoRA, {base}" if base else "is damaged or no last/ or best/"
        raise UserError(f"{folder} {why}: {' '.join(str(error).split())}") from None
    return student.eval()


def _model_class(vocabulary):
    """A student that generates is loaded with its vocabulary head, any other without it."""
    return transformers.AutoModelForCausalLM if vocabulary else transformers.AutoModel


def _tiny(texts, generates=False):
    """Make (model, tokenizer) without files: a two-layer BERT with random weights, or, to generate,
    a LLaMA, and a word-level tokenizer over the words of `texts`."""
    tokenizer = tiny_tokenizer(texts, generates)
    # initializer_range: BERT's own .02 suits 768 columns; at 64 it starts so flat that some seeds
    # never leave the plateau.
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
                 num_attention_heads=4, intermediate_size=128, initializer_range=0.05)
    if not generates:
        return transformers.BertModel(transformers.BertConfig(**sizes)), tokenizer
    config = transformers.LlamaConfig(
        **sizes, max_position_embeddings=tokenizer.model_max_length, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return transformers.LlamaForCausalLM(config), tokenizer


def tiny_tokenizer(texts, generates):
    """Make tiny's tokenizer: a token for each word or group of signs in `texts`, in lower case."""
    if not texts:
        raise UserError("student tiny makes its vocabulary from texts: "
                        "build_student(..., texts=[...])")
    words = set()
    for text in texts:
        words.update(re.findall(r"\w+|[^\w\s]+", text.lower()))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    if generates:
        special = ["[PAD]", "[UNK]", "[END]"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # the same \w+|[^\w\s]+
    common = dict(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]",
                  model_max_length=512)
    if generates:
        return transformers.PreTrainedTokenizerFast(
            **common, eos_token="[END]", model_input_names=["input_ids", "attention_mask"])
    # Without it there is no [CLS] to pool.
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        **common, cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def load_pretrained(name, model_class=transformers.AutoModel, weights=True, is_whole=False):
    """Load (model, tokenizer) from a short name, hub id or folder; without weights, after the same
    checks, (None, tokenizer). UserError of one line if a student cannot be made of it.
    The model is float32 whatever the checkpoint's dtype. OPT's is float16, in which lr times
    gradient rounds to nothing, and which GradScaler refuses. Code that comes with a model is never
    run. is_whole: whether weights that the files lack are an error."""
    source = check_available(name)
    generates = model_class is transformers.AutoModelForCausalLM
    config = load_config(name, generates)
    with explain_loading(name):
        tokenizer = load_tokenizer(name, source)
        _check_tokenizer(name, config, tokenizer)
        if is_decoder(config):
            leave_open(tokenizer)
        if generates and tokenizer.eos_token is None:
            raise UserError(f"{name}'s tokenizer has no eos_token, with which an answer ends")
        _check_shards(name)
        if not weights:
            return None, tokenizer
        # weights_only: a .bin file is a pickle, which could run code.
        model, info = model_class.from_pretrained(
            **source, config=config, dtype=torch.float32, weights_only=True,
            trust_remote_code=False, output_loading_info=True)
    missing = ", ".join(sorted(info["missing_keys"])[:3])
    if missing and (generates or is_whole):
        raise UserError(f"{name} is no {model_class.__name__}: it lacks {missing}")
    if missing:
        print(f"note: {name} lacks {missing}, which start at random")
    # What the tokenizer tells of segments is for a model that has at least two.
    takes = inspect.signature(model.base_model.forward).parameters
    if "token_type_ids" not in takes or getattr(config, "type_vocab_size", 2) < 2:
        names = tokenizer.model_input_names
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
    return model, tokenizer


def load_config(name, generates):
    """Load the transformers config of a short name, hub id or folder; its config.json is enough.
    UserError if no student, or none that generates, can be made of such a model."""
    source = check_available(name)
    with explain_loading(name):
        config = transformers.AutoConfig.from_pretrained(**source, trust_remote_code=False)
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise UserError(f"{name} is a {config.model_type} model: give one like BERT or OPT")
    if generates and not is_decoder(config):
        raise UserError(f"{name} reads both ways, it cannot generate: "
                        "give one like opt-125m or llama-7b")
    if name == "bert-6l":
        config.num_hidden_layers = 6
    return config


def _check_tokenizer(name, config, tokenizer):
    """UserError if texts cannot be made into rows for a model by its tokenizer."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__  # one that is written in Python alone
        raise UserError(f"{name}'s {kind} does not tell where in a text a token stands, which "
                        "shortening needs: give a model with a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{name}'s tokenizer has no token to fill rows with: set pad_token in its "
                        "tokenizer_config.json")
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise UserError(f"{name}'s tokenizer_config.json has model_max_length "
                        f"{tokenizer.model_max_length!r}: give a number")
    tokens = max(tokenizer.get_vocab().values()) + 1
    rows = getattr(config, "vocab_size", None) or tokens
    if tokens > rows:
        raise UserError(f"{name}'s tokenizer has {tokens} tokens, its model only {rows}: "
                        f"save it after model.resize_token_embeddings({tokens})")


def _check_shards(name):
    """UserError if a folder's list of weight files names one outside of the folder."""
    for path in sorted(Path(name).glob("*.index.json")):  # none where the name is a hub id
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{path} has no weight_map: save the model again")
        for file in map(str, weight_map.values()):
            # By its name alone: the files of the hub's cache are links that lead outside.
            inside = os.path.normpath(file)
            if os.path.isabs(inside) or inside.startswith(".."):
                raise UserError(f"{path} names {file}, outside of the folder: copy that into it")


def leave_open(tokenizer):
    """Keep a decoder's tokenizer from ending each text with end-of-text, as some do: an answer
    follows, and a state that is pooled would be read behind the end."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    if ids == plain or ids[-1] != tokenizer.eos_token_id:
        return
    while ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    front = tokenizer.convert_ids_to_tokens(ids[:len(ids) - len(plain)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*front, "$A"], special_tokens=list(zip(front, ids)))


def find_answers(labels, prompt):
    """Return where the states stand that predict the tokens of answers, N in all, text after text:
        text, position    row and column (N,) of each state      tokens    what it predicts (N,)
        counts            [B], how many are of each text         has_answer    (B,), of each text
    labels (B, L), on the CPU, are -100 outside of the answers. prompt (B, L) marks the prompts'
    tokens; what is returned is on its device, but for counts. A text without an answer has one
    state, its last prompt token's, of which nobody knows what comes next: token 0 stands for it."""
    device = prompt.device
    next_tokens = F.pad(labels[:, 1:], (0, 1), value=-100)    # (B, L)
    is_read = next_tokens != -100                             # (B, L)
    has_answer = is_read.any(1)                               # (B,)
    is_read[~has_answer, 0] = True                            # one place, which is set below
    text, position = is_read.nonzero(as_tuple=True)           # (N,)
    tokens = next_tokens[text, position].clamp(min=0)         # (N,)
    counts = is_read.sum(1).tolist()
    # So far on the CPU: on a GPU each of these lines would wait for it.
    has_answer = send(has_answer, device)                     # (B,)
    text = send(text, device)                                 # (N,)
    last_of_prompt = last_token(prompt)[text]                 # (N,)
    position = torch.where(has_answer[text], send(position, device), last_of_prompt)  # (N,)
    return text, position, send(tokens, device), counts, has_answer


def linear_maps(lm):
    """Return {name: module} of all linear maps of a language model."""
    return {name: module for name, module in lm.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))}


def as_held(linear, weight):
    """Turn a weight from (out, in) into the form that a linear map holds it in, or back again: that
    of GPT-2's Conv1D is (in, out)."""
    return weight.T if isinstance(linear, Conv1D) else weight


def count_positions(lm):
    """Return how many tokens the position table of a language model holds, 10**9 without one."""
    for name, module in lm.named_modules():
        # RoBERTa and its relatives count from padding_idx + 1: 514 positions hold 512 tokens.
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:
            return module.num_embeddings - first - 1
    for name in ("max_position_embeddings", "max_seq_len"):
        positions = getattr(lm.config, name, None) or 0
        if positions > 0:  # XLNet, which has no table, says -1
            return positions
    return 10**9


# ---- a new student is tried out on a few tokens ----
def try_out(student, name):
    """Run a new student on a few tokens; UserError where it would not answer as it is trained to.
    Padding may change no vector and the last word must reach it. Of a student that generates no
    state may have read a later token, and generate() must take training's states and logits.
    Weights that no output depends on are frozen, for DistributedDataParallel would wait for their
    gradients. Costs three passes over at most 18 tokens; draws no number and changes no weight."""
    if student.lm.device.type == "meta":
        return  # it has no numbers
    modes = {module: module.training for module in student.modules()}
    student.eval()
    try:
        with torch.random.fork_rng(devices=[]), _tapped_head(student) as tapped:
            fault = _find_fault(student, tapped)
    except Exception as error:  # of many kinds, as many as there are families
        reason = " ".join(str(error).split())
        fault = f"does not run as a student here: {type(error).__name__}: {reason}"
    if fault:
        raise UserError(f"{name} ({student.lm.config.model_type}) {fault}: "
                        "give one like BERT, OPT or LLaMA")
    for module, mode in modes.items():
        module.training = mode


def _find_fault(student, tapped):
    """Return what is wrong with a student, in words, or None; see try_out."""
    rows = _trial_rows(student)
    with torch.enable_grad():
        out = student(**collate(rows, student.tokenizer.pad_token_id))
    _freeze_unread(student, out)
    with torch.no_grad():
        alone = student(**collate(rows[2:], student.tokenizer.pad_token_id))
        if not _equal(out.proj[2:], alone.proj):
            return "gives a text another vector when longer texts stand beside it"
        if not student.generates:
            differ = rows[0] != rows[1]  # they cannot where the vocabulary has hardly a word
            if differ and _equal(out.proj[:1], out.proj[1:2], 1e-5):
                return "pools a state that has not read the last word of a text"
            return None
        read = tapped[0][0]  # the states behind which an answer's token stands (7, d_s): 3, 3, 1
        if not _equal(read[:3], read[3:6]):
            return "has read the later tokens that it should write"
        tapped.clear()
        prompts = [_prompt_of(row) for row in rows]
        batch = collate(prompts, student.tokenizer.pad_token_id, "left")
        written = student.lm.generate(
            **batch, do_sample=False, max_new_tokens=1, output_logits=True,
            return_dict_in_generate=True)
        if len(tapped) != 1:
            return "writes without its vocabulary head"
        states, logits = tapped[0]                                # (3, l, d_s), (3, l, V)
        if not _equal(states[:, -1], read[[0, 3, 6]]):            # the last prompt tokens'
            return "writes from other states than those that are trained"
        if not _equal(written.logits[0], logits[:, -1]):
            return "changes its logits after the vocabulary head, which is not built here"
    return None


def _trial_rows(student):
    """Return three rows: six tokens, the same with another one at the end, and three tokens."""
    special = set(student.tokenizer.all_special_ids)
    ids = sorted(set(student.tokenizer.get_vocab().values()) - special)
    ids = [ids[i * len(ids) // 6] for i in range(6)]  # from all over the vocabulary
    rows = []
    for tokens in (ids, [*ids[:5], ids[0]], ids[:3]):
        row = {"input_ids": tokens}
        if student.generates:
            prompt_length = (len(tokens) + 1) // 2  # 3, 3 and 2
            row["labels"] = [-100] * prompt_length + tokens[prompt_length:]
        elif not student.decoder and "token_type_ids" in student.tokenizer.model_input_names:
            row["token_type_ids"] = [0] * len(tokens)
        rows.append(row)
    return rows


@contextmanager
def _tapped_head(student):
    """Yield a list that gets (input, output) of every call of a vocabulary head. Its logits are
    made as large as a trained model's, or a cap of 30 would not show in those of a random one."""
    tapped = []

    def tap(head, inputs, logits):
        logits = logits * (50 / logits.detach().abs().max())
        tapped.append((inputs[0].detach(), logits.detach()))
        return logits

    if not student.generates:
        yield tapped
        return
    handle = student.lm.get_output_embeddings().register_forward_hook(tap)
    try:
        yield tapped
    finally:
        handle.remove()


def _equal(a, b, tolerance=3e-4):
    """Whether two tensors are the same but for rounding, as a share of the largest number. Of large
    random models that is 1e-5; ConvBERT's convolution over padding changes 1e-3."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())  # False of nan


def _freeze_unread(student, outputs):
    """Freeze the weights that no output was computed from, as its graph tells."""
    nodes = [tensor.grad_fn for tensor in outputs if tensor.grad_fn]
    if not nodes:
        return  # loaded in inference mode: it will not train
    seen = set(nodes)
    read = set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):  # a leaf, which gathers the gradient of a weight
            read.add(node.variable)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    for weight_name, weight in student.named_parameters():
        # Which experts are asked depends on the tokens.
        if weight not in read and ".experts." not in weight_name:
            weight.requires_grad_(False)


# ---- where it runs: device, precision, processes ----
def send(tensor, device):
    """Copy a tensor from the CPU to a device. No GPU is waited for: from pinned memory it fetches
    the numbers itself, when it comes to them, while the CPU goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _mask_unseen(*args, allow_is_causal_skip=None, allow_is_bidirectional_skip=None, **kwargs):
    """Make the mask of torch's attention as transformers does, in whatever case."""
    return sdpa_mask(*args, **kwargs, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)


ATTENTION_THAT_NEVER_WAITS = "sdpa_unseen_mask"
transformers.AttentionInterface.register(ATTENTION_THAT_NEVER_WAITS, sdpa_attention_forward)
transformers.AttentionMaskInterface.register(ATTENTION_THAT_NEVER_WAITS, _mask_unseen)


def rank():
    """This process's number, 0 to N - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """N, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wants_cuda(config, has_cuda=None):
    """Whether a run with these flags trains on a GPU; has_cuda: of a machine that has one, or by
    default of this one."""
    if config.device != "auto":
        return config.device.startswith("cuda")
    if has_cuda is None:
        has_cuda = torch.cuda.is_available()
    # The matrices of tiny are done before a GPU has started a kernel: 27 s on a CPU, 37 s on an
    # H200 (tests/RESULTS.md).
    return has_cuda and config.student != "tiny"


def precision(config):
    """(device, autocast context, {role: GradScaler}, the reason in words): the loop has no branch
    for it."""
    auto = "cuda" if wants_cuda(config) else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    if device == torch.device("cuda") and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # a GPU for each process
    if (device.index or 0) >= torch.get_device_module(device).device_count():
        raise UserError(f"--device {config.device}: torch sees no such device here; "
                        f"try --device {auto}")
    best, why = "off", f"float32 on {device.type}"
    if device.type == "cuda":
        # TF32: 10-bit mantissas in products, several times faster
        torch.set_float32_matmul_precision("high")
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        best, why = ("bf16", "the GPU has it") if has else ("fp16", "the GPU has no bf16")
    elif config.amp == "fp16":
        raise UserError("--amp fp16 needs a CUDA device: try --amp bf16 or off")
    amp, why = (best, why) if config.amp == "auto" else (config.amp, "as asked")
    if config.fsdp and amp == "fp16":
        raise UserError("--fsdp: fp16's loss scaling does not see other processes: "
                        "--amp bf16 or off")
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    # fp16 alone needs loss scaling: below 6e-8 its gradients are zero, while bf16 has float32's
    # range.
    scalers = {role: torch.amp.GradScaler(device.type, enabled=role == "student" and amp == "fp16")
               for role in ("aligner", "student")}  # the aligner is float32 whatever the student is
    why = f"{device}, amp {amp} ({why})"
    return device, partial(torch.autocast, device.type, dtype, amp != "off"), scalers, why
