"""Students: a text-only language model, one pooled vector a text, three heads.

Shapes: B batch, L tokens, d_s width of the language model, C labels, d shared projection space.
    h_s = pool(LM(x))         (B, d_s)
    o_s = C_s drop(h_s)       (B, C)    main logits
    p_s = P_s h_s             (B, d)    linear, no bias; orthogonal on request
    a_s = C'_s drop(p_s)      (B, C)    auxiliary logits
A student that generates keeps its vocabulary head: h_s is the last prompt token's, o_s the log of the
answer's bag of tokens over an answer vocabulary V_a (losses.answer_losses), C = |V_a|.

    load_student("runs/rte/armada/0/last").predict([("A man sleeps.", "A man is awake.")])
"""
import json
import os
import re
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from align import Householder, Outputs
from data import SHORT_NAMES, UserError, check_available, collate, explain_loading, load_tokenizer
from losses import answer_losses, predictions

transformers.logging.set_verbosity_error()  # its load report lists the vocabulary heads, left out on purpose
transformers.logging.disable_progress_bar()

POOLED = ("bert", "roberta", "xlm-roberta")  # whose pooler_output is read
LORA_TARGETS = ("q_proj", "v_proj", "query", "value", "query_proj", "value_proj")  # LLaMA, OPT; BERT; DeBERTa

class LoRA(nn.Module):
    """base(x) + (alpha / r) B A drop(x): a frozen linear map and a learnt one of rank r (Hu et al. 2021).
    A (r, in) starts at random, B (out, r) at zero: nothing changes at first, yet B has a gradient (were both
    zero, neither would ever get one). alpha / r keeps the size of an update when r is changed. Saved are the
    base's gradients and moments, r (in + out) numbers in place of in x out, not the way back through it."""
    alpha, dropout = 16, 0.05

    def __init__(self, base, rank):
        super().__init__()
        self.base, self.scale, self.drop = base, self.alpha / rank, nn.Dropout(self.dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        out, x = self.base(x), x.to(self.lora_A.weight.dtype)  # the base may sit in bf16, A and B never do
        return out + (self.scale * self.lora_B(self.lora_A(self.drop(x)))).to(out.dtype)

    def merged(self):
        """One linear map, W + (alpha / r) B A, that does the same at no extra cost (and without dropout)."""
        update = self.scale * self.lora_B.weight @ self.lora_A.weight  # (out, in)
        self.base.weight.data += update.to(self.base.weight.dtype)
        return self.base

def add_lora(lm, rank):
    """Freeze a language model and put a LoRA around each of its query and value maps."""
    lm.requires_grad_(False)
    targets = [(name, module) for name, module in lm.named_modules()
               if name.split(".")[-1] in LORA_TARGETS and isinstance(module, nn.Linear)]
    if not targets:
        raise UserError(f"--lora: {lm.config.model_type} has no linear map named {', '.join(LORA_TARGETS)}: "
                        "try --lora 0")
    if rank > (most := min(min(module.weight.shape) for _, module in targets)):
        raise UserError(f"--lora {rank}: the model's maps are of rank {most} themselves; 8 is usual")
    for name, module in targets:
        lm.set_submodule(name, LoRA(module, rank))

def is_decoder(config):
    """Reads left to right: has a causal and no masked language-model class."""
    return (type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING)

class Student(nn.Module):
    """A language model with heads: student(input_ids, attention_mask, token_type_ids=None) -> Outputs.
    With `vocabulary`, V_a's token ids, it generates: given labels (B, L), -100 outside of the answers, it
    returns (Outputs, each answer's cross entropy (B,)); without labels the bag is that of the next token."""
    def __init__(self, lm, tokenizer, num_labels, proj_dim, dropout=0.1, orthogonal=False, labels=(),
                 max_length=128, vocabulary=(), max_new_tokens=256, lora=0, base=None):
        super().__init__()
        self.lm, self.tokenizer, config = lm, tokenizer, lm.config
        self.settings = dict(num_labels=num_labels, proj_dim=proj_dim, dropout=dropout, orthogonal=orthogonal,
                             labels=list(labels), max_length=max_length, vocabulary=list(vocabulary),
                             max_new_tokens=max_new_tokens, lora=lora, base=base if lora else None)
        self.generates = bool(vocabulary)
        # The longest text that tokenizer and position table allow; OPT's tokenizer alone would say 1e30.
        self.max_tokens = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
        self.decoder = is_decoder(config)
        d_s = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # they differ in OPT-350m
        # The aligner's gauge argument does not hold here, since p_s must meet p_t coordinate by coordinate:
        # an orthogonal P_s gets d_s reflections, enough for every rotation of h_s.
        projection = Householder(d_s, proj_dim, d_s) if orthogonal else nn.Linear(d_s, proj_dim, bias=False)
        self.heads = nn.ModuleDict({"classifier": nn.Linear(d_s, num_labels), "projection": projection,
                                    "aux_classifier": nn.Linear(proj_dim, num_labels)})  # C_s, P_s, C'_s
        self.drop = nn.Dropout(dropout)
        if config.model_type not in POOLED and getattr(lm, "pooler", None):
            lm.pooler.requires_grad_(False)  # ALBERT's is not read, and DDP would wait for its gradient
        if self.generates:
            del self.heads["classifier"]  # the vocabulary head stands in for C_s
            # In place of the checkpoint's own, which may sample or forbid repetition.
            lm.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                                                 pad_token_id=tokenizer.pad_token_id)
            self.register_buffer("vocabulary", torch.tensor(vocabulary), persistent=False)  # (V_a,)
        if lora:
            add_lora(lm, lora)

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self.decoder:
            extra = {"use_cache": False}  # keys and values for a next token that never comes: gigabytes
        out = self.lm.base_model(input_ids=input_ids, attention_mask=attention_mask, **extra)
        prompt = attention_mask if labels is None else attention_mask * (labels != -100).cumsum(-1).eq(0)
        h = self.pool(out, prompt)                            # (B, d_s)
        h = h.to(self.heads["aux_classifier"].weight.dtype)   # a LoRA's base may sit in bf16
        if not self.generates:
            o = self.heads["classifier"](self.drop(h))        # (B, C)
        else:
            states, tokens, counts = h, input_ids[:, 0], [1] * len(h)  # the next token's bag needs no token
            if labels is not None:  # the state at l predicts token l + 1; no logits of prompts are ever made
                is_answer = labels[:, 1:] != -100                           # (B, L - 1)
                states, tokens = out.last_hidden_state[:, :-1][is_answer], labels[:, 1:][is_answer]  # (N, .)
                counts = is_answer.sum(1).tolist()
            logits = self.lm.get_output_embeddings()(states.to(self.lm.dtype))  # (N, V)
            losses, o = answer_losses(logits, tokens, counts, self.vocabulary)  # (B,), (B, V_a)
        p = self.heads["projection"](h)                       # (B, d)
        a = self.heads["aux_classifier"](self.drop(p))        # (B, C)
        return Outputs(o, a, p) if labels is None else (Outputs(o, a, p), losses)

    def pool(self, out, attention_mask):
        """One vector a text, the same whatever the padding: (B, L, d_s) -> (B, d_s)."""
        if self.lm.config.model_type in POOLED:
            return out.pooler_output  # tanh on the first token
        # DEVIATION: the authors take OPT's last position, padding or not, and LLaMA's position 0, which under
        # a causal mask has read one token: the same vector for every text. Here it is the last real token,
        # found by the mask, never by its id (pad may equal end-of-text). Other encoders: the first token.
        if not self.decoder:
            return out.last_hidden_state[:, 0]
        last = attention_mask.cumsum(-1).argmax(-1)  # (B,), where the count of real tokens peaks first
        return out.last_hidden_state[torch.arange(len(last), device=last.device), last]

    def layers(self):
        """The language model's blocks, as transformers marks them."""
        return [each for each in self.lm.modules() if isinstance(each, GradientCheckpointingLayer)]

    def checkpoint_gradients(self):
        """Recompute layers in the backward pass: up to 1.4 times the time, one layer's activations only."""
        # Re-entrant checkpointing drops all gradients, silently, if the inputs need none (frozen embeddings).
        self.lm.activation_checkpointing_enable({"use_reentrant": False})
        # The last layer's backward pass comes first: what recomputing would give is still there. (ALBERT's
        # one layer is all of them.)
        if len(layers := self.layers()) == self.lm.config.num_hidden_layers > 1:
            layers[-1].gradient_checkpointing = False

    def shard(self, mesh):
        """FSDP2: each process keeps 1/N of every weight, gradient and moment and borrows the rest of a layer
        when its turn comes: for a student that fits no card, at the price of sending weights twice a step."""
        for layer in self.layers():
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self, "generate")
        self.lm._is_fsdp_managed_module = True  # generate() then goes on until the last process is done

    def _batches(self, rows, size, side="right"):
        """(indices, their batch on the student's device), rows of similar length together: little padding."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        device = next(self.parameters()).device
        for start in range(0, len(order), size):
            chosen = order[start:start + size]
            batch = collate([rows[i] for i in chosen], self.tokenizer.pad_token_id, side)
            yield chosen, {key: value.to(device) for key, value in batch.items()}

    @contextmanager
    def reading(self):
        """Eval mode, nothing kept for a backward pass. FSDP trains in the buffers that it evaluates in, which
        inference mode would forbid."""
        training = self.training
        with torch.no_grad() if isinstance(self, FSDPModule) else torch.inference_mode():
            yield self.eval()
        self.train(training)

    def answers(self, rows, batch_size=64, autocast=nullcontext, keep=0):
        """Lists, in the order of encoded rows: class ids (scores; where it generates, the losses of the
        answers given with the rows), and p_s (d,) of the first `keep`."""
        found, p_s = {}, {}
        with self.reading():
            for chosen, batch in self._batches(rows, batch_size):
                with autocast():
                    out = self(**batch)
                out, values = out if self.generates else (out, predictions(out.logits))
                found.update(zip(chosen, values.tolist()))
                p_s.update((i, p.clone()) for i, p in zip(chosen, out.proj.float().cpu()) if i < keep)
        return [found[i] for i in range(len(rows))], [p_s[i] for i in range(len(p_s))]

    def generate(self, rows, batch_size=64, autocast=nullcontext, temperature=0):
        """The texts that follow the prompts of encoded rows, in order: the likeliest tokens at temperature 0,
        else sampled with torch's generator; up to end-of-text or settings["max_new_tokens"]."""
        found = {}
        prompts = [{"input_ids": row["input_ids"][:row["labels"].count(-100) if "labels" in row else None]}
                   for row in rows]
        how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
        with self.reading(), tqdm(total=len(rows), desc="generating", leave=False, disable=None) as bar:
            # Padded on the left: what follows must stand next to its prompt. Positions follow the mask.
            for chosen, batch in self._batches(prompts, batch_size, "left"):
                with autocast():
                    ids = self.lm.generate(**batch, **how, max_new_tokens=self.settings["max_new_tokens"])
                new = ids[:, batch["input_ids"].size(1):]  # (B, at most max_new_tokens)
                found.update(zip(chosen, self.tokenizer.batch_decode(new, skip_special_tokens=True)))
                bar.update(len(chosen))
        return [found[i].strip() for i in range(len(rows))]

    def predict(self, texts):
        """Label names (scores for a regression), in order, of strings or, for a two-text task on an encoder,
        (text_a, text_b) pairs. A decoder wants the prompt it was trained on, TASKS[...].prompt(example); one
        that generates answers with texts."""
        if isinstance(texts, str):
            raise UserError("predict wants a list of texts: predict([text])")
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        labels, longest = self.settings["labels"], self.settings["max_length"]
        cut = dict(truncation=True, max_length=longest, return_token_type_ids=not self.decoder)
        rows = [dict(self.tokenizer(*pair, **({} if self.generates else cut))) for pair in pairs]
        if self.generates:
            room = self.max_tokens - self.settings["max_new_tokens"]
            if (most := max(len(row["input_ids"]) for row in rows)) > room:
                raise UserError(f"a prompt has {most} tokens, {room} leave room for an answer: shorten it")
            return self.generate(rows)
        answers, _ = self.answers(rows)
        return [labels[answer] for answer in answers] if labels else answers

    def round_base(self):
        """A LoRA's frozen weights in bf16: half the memory, for hidden states of 8 bits' precision."""
        for weight in self.lm.parameters():
            weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()

    def merge(self):
        """Every LoRA becomes part of its linear map: from now on save() writes an ordinary model."""
        for name, module in [*self.lm.named_modules()]:
            if isinstance(module, LoRA):
                self.lm.set_submodule(name, module.merged())
        self.settings.update(lora=0, base=None)
        return self

    def state(self):
        """{name: tensor} that save() writes, a tied weight once; of LoRA only adapters and heads."""
        found = {}
        for name, value in self.state_dict(keep_vars=True).items():
            if not self.settings["lora"] or ".lora_" in name or name.startswith("heads."):
                found.setdefault(id(value), (name, value.detach()))
        return dict(found.values())

    def save(self, folder, state=None):
        """A folder that AutoTokenizer and AutoModel (where it generates, AutoModelForCausalLM) open, plus
        heads.safetensors and student.json. Of LoRA only the adapters, in the format of peft's PeftModel.
        state is state(), in one piece where the weights are split over processes."""
        state = self.state() if state is None else state
        lm, heads = ({name.removeprefix(part): value for name, value in state.items()
                      if name.startswith(part)} for part in ("lm.", "heads."))
        rank, base, folder = self.settings["lora"], self.settings["base"], Path(folder)
        if rank:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({f"base_model.model.{name}": value for name, value in lm.items()},
                      folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps({
                "peft_type": "LORA", "task_type": "CAUSAL_LM" if self.generates else "FEATURE_EXTRACTION",
                "base_model_name_or_path": SHORT_NAMES.get(base, base), "bias": "none",
                "inference_mode": True, "r": rank, "lora_alpha": LoRA.alpha, "lora_dropout": LoRA.dropout,
                "target_modules": LORA_TARGETS}))
        else:
            self.lm.save_pretrained(folder, state_dict=lm)
        self.tokenizer.save_pretrained(folder)
        save_file(heads, folder / "heads.safetensors")
        (folder / "student.json").write_text(json.dumps(self.settings))

def build_student(name_or_path, num_labels, proj_dim, texts=None, **settings):
    """A Student from a short name (SHORT_NAMES), hub id or folder; "tiny" makes its vocabulary from `texts`.
    settings: dropout, orthogonal, labels (names for predict), max_length, vocabulary (for generation),
    max_new_tokens and lora (rank), as in Student."""
    model_class = transformers.AutoModelForCausalLM if settings.get("vocabulary") else transformers.AutoModel
    lm, tokenizer = _tiny(texts) if name_or_path == "tiny" else load_pretrained(name_or_path, model_class)
    base = str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path
    return Student(lm, tokenizer, num_labels, proj_dim, base=base, **settings)

def load_student(folder):
    """The Student that save() wrote, on the CPU in eval mode. Neither teacher nor aligner is needed."""
    base = None
    try:
        settings = json.loads(Path(folder, "student.json").read_text())  # before the model is loaded
        base, generates = settings.get("base"), settings.get("vocabulary")
        model_class = transformers.AutoModelForCausalLM if generates else transformers.AutoModel
        student = Student(*load_pretrained(base or str(folder), model_class), **settings)
        if base:
            adapters = load_file(Path(folder, "adapter_model.safetensors"))
            student.lm.load_state_dict({name.removeprefix("base_model.model."): value
                                        for name, value in adapters.items()}, strict=False)
        student.heads.load_state_dict(load_file(Path(folder, "heads.safetensors")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        why = f"needs the base of its LoRA, {base}" if base else "is damaged or no last/ or best/"
        raise UserError(f"{folder} {why}: {' '.join(str(error).split())}") from None
    return student.eval()

def _tiny(texts):
    """A two-layer BERT with random weights and a word-level tokenizer over the words of `texts`: no files."""
    if not texts:
        raise UserError("student tiny makes its vocabulary from texts: build_student(..., texts=[...])")
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # the same \w+|[^\w\s]+
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # or no [CLS] to pool
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=512, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    # BERT's own .02 suits 768 columns; at 64 it starts so flat that some seeds never leave the plateau.
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, intermediate_size=128, initializer_range=0.05)
    return transformers.BertModel(config), tokenizer

def load_pretrained(name, model_class=transformers.AutoModel, weights=True):
    """(model, tokenizer) from a short name, hub id or folder; float32 whatever the checkpoint's dtype.
    OPT's is float16, in which lr times gradient rounds to nothing, and which GradScaler refuses.
    Without weights: (None, tokenizer), after the same checks."""
    how, cut = check_available(name), {"num_hidden_layers": 6} if name == "bert-6l" else {}
    generates = model_class is transformers.AutoModelForCausalLM
    with explain_loading(name):
        config = transformers.AutoConfig.from_pretrained(**how)
        if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
            raise UserError(f"{name} is a {config.model_type} model: give one like BERT or OPT")
        if generates and not is_decoder(config):
            raise UserError(f"{name} reads both ways, it cannot generate: give one like opt-125m or llama-7b")
        tokenizer = load_tokenizer(name, how)
        scales = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # Granite, Cohere, Gemma 2
        if generates and any(getattr(config, scale, None) not in (None, 1) for scale in scales):
            raise UserError(f"{name} changes its logits after the vocabulary head, which is not built here")
        if generates and tokenizer.eos_token is None:
            raise UserError(f"{name}'s tokenizer has no eos_token, with which an answer ends")
        if not weights:
            return None, tokenizer
        model, info = model_class.from_pretrained(**how, **cut, dtype=torch.float32, output_loading_info=True)
    if lacks := ", ".join(sorted(info["missing_keys"])[:3]):
        if generates:
            raise UserError(f"{name} is no {model_class.__name__}: it lacks {lacks}")
        print(f"note: {name} lacks {lacks}, which start at random")
    return model, tokenizer

# ---- where it runs: device, precision, processes ----
def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    """N, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1

def precision(config):
    """(device, autocast context, {role: GradScaler}, the reason in words): the loop has no branch for it."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    if device == torch.device("cuda") and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # a GPU for each process
    if (device.index or 0) >= torch.get_device_module(device).device_count():
        raise UserError(f"--device {config.device}: torch sees no such device here; try --device {auto}")
    best, why = "off", f"float32 on {device.type}"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: 10-bit mantissas in products, several times faster
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        best, why = ("bf16", "the GPU has it") if has else ("fp16", "the GPU has no bf16")
    elif config.amp == "fp16":
        raise UserError("--amp fp16 needs a CUDA device: try --amp bf16 or off")
    amp, why = (best, why) if config.amp == "auto" else (config.amp, "as asked")
    if config.fsdp and amp == "fp16":
        raise UserError("--fsdp: fp16's loss scaling does not see other processes: --amp bf16 or off")
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    # fp16 alone needs loss scaling: below 6e-8 its gradients are zero, while bf16 has float32's range.
    scalers = {role: torch.amp.GradScaler(device.type, enabled=role == "student" and amp == "fp16")
               for role in ("aligner", "student")}  # the aligner is float32 whatever the student is
    why = f"{device}, amp {amp} ({why})"
    return device, partial(torch.autocast, device.type, dtype, amp != "off"), scalers, why
