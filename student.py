"""Students: a text-only language model, a pooled vector, three heads.

Shapes: B batch, L tokens, d_s hidden size of the language model, C labels, d shared projection space.
    h_s = pool(LM(x))                         (B, d_s)
    o_s = C_s drop(h_s)                       (B, C)    main logits
    p_s = P_s h_s                             (B, d)    linear, no bias; orthogonal on request
    a_s = C'_s drop(p_s)                      (B, C)    auxiliary logits

    student = build_student("bert-base", num_labels=2, proj_dim=1024)      # short name, hub id, local folder or "tiny"
    student(input_ids, attention_mask).logits
    load_student("runs/rte/armada/0/last").predict([("A man sleeps.", "A man is awake.")])
"""
import difflib
import json
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from align import Householder, Outputs
from data import UserError, collate
from losses import predictions

transformers.logging.set_verbosity_error()  # its load report names every vocabulary weight that we leave out on purpose
transformers.logging.disable_progress_bar()

# DEVIATION: the authors' `nlayers 6` cuts every student to six layers; here only bert-6l is cut, all others are whole.
SHORT_NAMES = {
    "bert-base": "google-bert/bert-base-uncased", "bert-6l": "google-bert/bert-base-uncased",
    "deberta-v2-xxlarge": "microsoft/deberta-v2-xxlarge", "opt-125m": "facebook/opt-125m", "opt-1.3b": "facebook/opt-1.3b",
    "llama-3b": "meta-llama/Llama-3.2-3B", "llama-7b": "huggyllama/llama-7b", "llama-8b": "meta-llama/Llama-3.1-8B"}
POOLED = ("bert", "roberta", "xlm-roberta")  # families whose pretrained pooler (a tanh layer on [CLS]) is used


class Student(nn.Module):
    """A language model with heads. Call: student(input_ids, attention_mask, token_type_ids=None) -> Outputs."""

    def __init__(self, lm, tokenizer, num_labels, proj_dim, dropout=0.1, orthogonal=False, labels=(), max_length=128):
        super().__init__()
        self.lm, self.tokenizer = lm, tokenizer
        self.settings = dict(num_labels=num_labels, proj_dim=proj_dim, dropout=dropout, orthogonal=orthogonal,
                             labels=list(labels), max_length=max_length)
        self.decoder = is_decoder(lm.config)
        # OPT-350m projects its last layer to another width than hidden_size.
        width = getattr(lm.config, "word_embed_proj_dim", None) or lm.config.hidden_size  # d_s
        self.classifier = nn.Linear(width, num_labels)         # C_s
        # The aligner's gauge argument does not hold here (p_s must meet p_t coordinate by coordinate), so an orthogonal
        # P_s gets as many reflections as it takes to reach every orthogonal matrix.
        self.projection = Householder(width, proj_dim, width) if orthogonal else nn.Linear(width, proj_dim, bias=False)  # P_s
        self.aux_classifier = nn.Linear(proj_dim, num_labels)  # C'_s
        self.drop = nn.Dropout(dropout)

    def checkpoint_gradients(self):
        """Recompute each layer in the backward pass: about a third more time, the activations of one layer only."""
        # The re-entrant form loses all gradients without a word when the first layer's inputs need none (frozen embeddings).
        self.lm.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def heads(self):
        return nn.ModuleDict({"classifier": self.classifier, "projection": self.projection, "aux_classifier": self.aux_classifier})

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        h = self.pool(self.lm(input_ids=input_ids, attention_mask=attention_mask, **extra), attention_mask)  # (B, d_s)
        o = self.classifier(self.drop(h))        # (B, C)
        p = self.projection(h)                   # (B, d)
        return Outputs(o, self.aux_classifier(self.drop(p)), p)

    def pool(self, out, attention_mask):
        """One vector a text, whatever the padding: (B, L, d_s) -> (B, d_s)."""
        if self.lm.config.model_type in POOLED:
            return out.pooler_output
        # DEVIATION: the authors take the last position of OPT even where it is padding, and position 0 of LLaMA, which
        # under a causal mask has read one token: the same vector for every text. We take the last real token, found by
        # the mask, never by its id: pad may be the same id as end-of-text. Other encoders: the first real token.
        position = torch.arange(attention_mask.size(1), device=attention_mask.device)       # (L,)
        position = attention_mask * (position + 1 if self.decoder else position.flip(0) + 1)  # 0 at padding  (B, L)
        row = torch.arange(len(position), device=position.device)
        return out.last_hidden_state[row, position.argmax(-1)]                               # (B, d_s)

    @torch.inference_mode()
    def predict(self, texts, batch_size=32):
        """Labels (strings; floats for a regression) of a person's own texts, in order.

        texts: strings, or (text_a, text_b) pairs for a two-text task on an encoder. A decoder wants the one prompt that
        it was trained on: TASKS["rte"].prompt(Example({"premise": ..., "hypothesis": ...}, None, 0, "")).
        """
        training, device, answers = self.training, next(self.parameters()).device, []
        self.eval()
        for start in range(0, len(texts), batch_size):
            pairs = [(text, None) if isinstance(text, str) else text for text in texts[start:start + batch_size]]
            rows = [self.tokenizer(*pair, truncation=True, max_length=self.settings["max_length"]) for pair in pairs]
            batch = {key: value.to(device) for key, value in collate(rows, self.tokenizer.pad_token_id).items()}
            answers += predictions(self(**batch).logits).tolist()
        self.train(training)
        labels = self.settings["labels"]
        return [labels[answer] for answer in answers] if labels else answers

    def save(self, folder):
        """Write a folder that AutoModel and AutoTokenizer open, plus heads.safetensors and student.json."""
        folder = Path(folder)
        self.lm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file({key: value.contiguous() for key, value in self.heads.state_dict().items()}, folder / "heads.safetensors")
        (folder / "student.json").write_text(json.dumps(self.settings, indent=1))


def load_student(folder):
    """The Student that Student.save wrote, in eval mode, on the CPU. Teacher and aligner are not needed any more."""
    folder = Path(folder)
    if not (folder / "student.json").is_file():
        raise UserError(f"{folder} holds no saved student (no student.json): give a run's last/ or best/ folder")
    lm, tokenizer = load_pretrained(str(folder))
    student = Student(lm, tokenizer, **json.loads((folder / "student.json").read_text()))
    student.heads.load_state_dict(load_file(folder / "heads.safetensors"))
    return student.eval()


def build_student(name_or_path, num_labels, proj_dim, dropout=0.1, orthogonal=False, labels=(), max_length=128, texts=None):
    """A Student by short name (SHORT_NAMES), hub id or local folder; "tiny" is random and makes its words from `texts`."""
    lm, tokenizer = _tiny(texts) if name_or_path == "tiny" else load_pretrained(name_or_path)
    return Student(lm, tokenizer, num_labels, proj_dim, dropout, orthogonal, labels, max_length)


def _tiny(texts):
    """A two-layer BERT with random weights and a word-level tokenizer over the words of `texts`: no files."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    if not texts:
        raise UserError("student tiny makes its vocabulary from texts: build_student('tiny', ..., texts=[...])")
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # the same \w+|[^\w\s]+
    tokenizer.post_processor = processors.TemplateProcessing(  # without it no [CLS]: nothing to pool
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=128)
    return transformers.BertModel(config), tokenizer


def is_decoder(config):
    """Whether a family reads left to right: it has a causal and no masked language-model class in transformers."""
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check_available(name):
    """from_pretrained's arguments for a short name, hub id or folder, or a UserError, within seconds and without weights.

    Left alone, transformers retries each file of an unreachable hub for half a minute; we ask once, for the config.
    """
    import huggingface_hub as hub

    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"folder {name} holds no config.json: give a folder that save_pretrained wrote")
        return {"pretrained_model_name_or_path": str(name)}
    repo = SHORT_NAMES.get(name, name)
    near = difflib.get_close_matches(name, [*SHORT_NAMES, "tiny"], 1)
    hint = f"did you mean {near[0]}? " if near and name not in SHORT_NAMES else ""
    how = {"pretrained_model_name_or_path": repo, **({"num_hidden_layers": 6} if name == "bert-6l" else {})}
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", repo):
        raise UserError(f"student {name!r} is no folder here and no hub id: {hint}known: tiny, {', '.join(SHORT_NAMES)}")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, "config.json"), timeout=5)
        return how
    except hub.errors.GatedRepoError:
        raise UserError(f"{repo} is gated: accept its licence at {hub.constants.ENDPOINT}/{repo}, then set HF_TOKEN") from None
    except (hub.errors.RepositoryNotFoundError, hub.errors.EntryNotFoundError):
        raise UserError(f"the hub has no model {repo!r} with a config.json: {hint}known short names: tiny, {', '.join(SHORT_NAMES)}"
                        " (a private model needs HF_TOKEN)") from None
    except Exception as error:  # no network, a proxy, a time-out, HF_HUB_OFFLINE: what the cache holds still works
        if isinstance(hub.try_to_load_from_cache(repo, "config.json"), str):
            return {**how, "local_files_only": True}
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"could not fetch {repo} from the hub ({reason}): {hint}connect, or copy its folder here (`hf download {repo}` "
                        "where there is a network) and give that folder instead of the name") from None


def load_pretrained(name, model_class=AutoModel):
    """(model, tokenizer) from a short name, hub id or folder. Float32, whatever the checkpoint's dtype: OPT's is float16,
    whose updates of size lr * grad round to nothing, and GradScaler refuses float16 weights."""
    how = check_available(name)
    try:
        config = AutoConfig.from_pretrained(**how)
        if model_class is AutoModel and (config.is_encoder_decoder or not hasattr(config, "hidden_size")):
            raise UserError(f"student {name} is a {config.model_type} model: give an encoder (BERT, DeBERTa ...) or a decoder (OPT, LLaMA ...)")
        tokenizer = AutoTokenizer.from_pretrained(how["pretrained_model_name_or_path"],
                                                  local_files_only=how.get("local_files_only", False))
        model, info = model_class.from_pretrained(**how, dtype=torch.float32, output_loading_info=True)
    except ImportError as error:
        raise UserError(f"{name} needs an optional package: {str(error).strip().splitlines()[0]} (try pip install sentencepiece protobuf)") from None
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"could not load {name}: {' '.join(str(error).split())[:300]}") from None
    if info["missing_keys"]:
        print(f"note: {name} lacks {', '.join(sorted(info['missing_keys'])[:3])}: these start at random", flush=True)
    if tokenizer.pad_token is None:  # LLaMA: padding is found by the mask, so sharing an id costs nothing
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return model, tokenizer
