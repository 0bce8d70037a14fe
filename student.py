"""Students: a text-only language model, one pooled vector a text, three heads.

Shapes: B batch, L tokens, d_s width of the language model, C labels, d shared projection space.
    h_s = pool(LM(x))         (B, d_s)
    o_s = C_s drop(h_s)       (B, C)    main logits
    p_s = P_s h_s             (B, d)    linear, no bias; orthogonal on request
    a_s = C'_s drop(p_s)      (B, C)    auxiliary logits

    load_student("runs/rte/armada/0/last").predict([("A man sleeps.", "A man is awake.")])
"""
import difflib
import functools
import json
import re
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub as hub
import torch
import torch.nn as nn
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from align import Householder, Outputs
from data import UserError, collate
from losses import predictions

transformers.logging.set_verbosity_error()  # its load report lists the vocabulary heads, left out on purpose
transformers.logging.disable_progress_bar()

# DEVIATION: the authors' `nlayers 6` cuts every student to six layers; here only bert-6l is cut.
SHORT_NAMES = {"bert-base": "google-bert/bert-base-uncased", "bert-6l": "google-bert/bert-base-uncased",
               "deberta-v2-xxlarge": "microsoft/deberta-v2-xxlarge", "opt-125m": "facebook/opt-125m",
               "opt-1.3b": "facebook/opt-1.3b", "llama-3b": "meta-llama/Llama-3.2-3B",
               "llama-7b": "huggyllama/llama-7b", "llama-8b": "meta-llama/Llama-3.1-8B"}

class Student(nn.Module):
    """A language model with heads: student(input_ids, attention_mask, token_type_ids=None) -> Outputs."""
    def __init__(self, lm, tokenizer, num_labels, proj_dim, dropout=0.1, orthogonal=False, labels=(),
                 max_length=128):
        super().__init__()
        self.lm, self.tokenizer, config = lm, tokenizer, lm.config
        self.settings = dict(num_labels=num_labels, proj_dim=proj_dim, dropout=dropout, orthogonal=orthogonal,
                             labels=list(labels), max_length=max_length)
        # The longest text that tokenizer and position table allow; OPT's tokenizer alone would say 1e30.
        self.max_tokens = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
        # Reads left to right: has a causal and no masked language-model class.
        self.decoder = (type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
                        and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING)
        d_s = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # they differ in OPT-350m
        # The aligner's gauge argument does not hold here, since p_s must meet p_t coordinate by coordinate:
        # an orthogonal P_s gets d_s reflections, enough for every rotation of h_s.
        projection = Householder(d_s, proj_dim, d_s) if orthogonal else nn.Linear(d_s, proj_dim, bias=False)
        self.heads = nn.ModuleDict({"classifier": nn.Linear(d_s, num_labels), "projection": projection,
                                    "aux_classifier": nn.Linear(proj_dim, num_labels)})  # C_s, P_s, C'_s
        self.drop = nn.Dropout(dropout)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self.decoder:
            extra = {"use_cache": False}  # keys and values for a next token that never comes: gigabytes
        out = self.lm(input_ids=input_ids, attention_mask=attention_mask, **extra)
        h = self.pool(out, attention_mask)                    # (B, d_s)
        o = self.heads["classifier"](self.drop(h))            # (B, C)
        p = self.heads["projection"](h)                       # (B, d)
        a = self.heads["aux_classifier"](self.drop(p))        # (B, C)
        return Outputs(o, a, p)

    def pool(self, out, attention_mask):
        """One vector a text, the same whatever the padding: (B, L, d_s) -> (B, d_s)."""
        if self.lm.config.model_type in ("bert", "roberta", "xlm-roberta"):
            return out.pooler_output  # tanh on the first token
        # DEVIATION: the authors take OPT's last position, padding or not, and LLaMA's position 0, which under
        # a causal mask has read one token: the same vector for every text. Here it is the last real token,
        # found by the mask, never by its id (pad may equal end-of-text). Other encoders: the first token.
        if not self.decoder:
            return out.last_hidden_state[:, 0]
        last = attention_mask.cumsum(-1).argmax(-1)  # (B,), where the count of real tokens peaks first
        return out.last_hidden_state[torch.arange(len(last), device=last.device), last]

    def checkpoint_gradients(self):
        """Recompute layers in the backward pass: about a third more time, one layer's activations only."""
        # Re-entrant checkpointing drops all gradients, silently, if the inputs need none (frozen embeddings).
        self.lm.activation_checkpointing_enable({"use_reentrant": False})

    @torch.inference_mode()
    def answers(self, rows, batch_size=64, autocast=nullcontext, keep=0):
        """For encoded rows: class ids (or scores), a list in order, and p_s (d,) of the first `keep`."""
        training, device, found, p_s = self.training, self.heads["classifier"].weight.device, {}, {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # for little padding
        self.eval()
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            batch = collate([rows[i] for i in chosen], self.tokenizer.pad_token_id)
            with autocast():
                out = self(**{key: value.to(device) for key, value in batch.items()})
            found.update(zip(chosen, predictions(out.logits).tolist()))
            p_s.update((i, p) for i, p in zip(chosen, out.proj.float().cpu()) if i < keep)
        self.train(training)
        return [found[i] for i in range(len(rows))], [p_s[i] for i in range(len(p_s))]

    def predict(self, texts):
        """Label names (scores for a regression), in order, of strings or, for a two-text task on an encoder,
        (text_a, text_b) pairs. A decoder wants the prompt it was trained on, TASKS[...].prompt(example)."""
        if isinstance(texts, str):
            raise UserError("predict wants a list of texts: predict([text])")
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        labels, longest = self.settings["labels"], self.settings["max_length"]
        cut = dict(truncation=True, max_length=longest, return_token_type_ids=not self.decoder)
        answers, _ = self.answers([dict(self.tokenizer(*pair, **cut)) for pair in pairs])
        return [labels[answer] for answer in answers] if labels else answers

    def save(self, folder):
        """A folder that AutoModel and AutoTokenizer open, plus heads.safetensors and student.json."""
        self.lm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.heads.state_dict(), Path(folder, "heads.safetensors"))
        Path(folder, "student.json").write_text(json.dumps(self.settings, indent=1))

def build_student(name_or_path, num_labels, proj_dim, texts=None, **settings):
    """A Student from a short name (SHORT_NAMES), hub id or folder; "tiny" makes its vocabulary from `texts`.
    settings: dropout, orthogonal, labels (names for predict) and max_length, as in Student."""
    lm, tokenizer = _tiny(texts) if name_or_path == "tiny" else load_pretrained(name_or_path)
    return Student(lm, tokenizer, num_labels, proj_dim, **settings)

def load_student(folder):
    """The Student that save() wrote, on the CPU in eval mode. Neither teacher nor aligner is needed."""
    try:
        settings = json.loads(Path(folder, "student.json").read_text())  # before the model is loaded
        student = Student(*load_pretrained(str(folder)), **settings)
        student.heads.load_state_dict(load_file(Path(folder, "heads.safetensors")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is damaged or no last/ or best/: {' '.join(str(error).split())}") from None
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

@functools.cache
def check_available(name, file="config.json"):
    """from_pretrained arguments for a short name, hub id or folder; UserError in seconds, before any weight.
    Left alone, transformers retries an unreachable hub for half a minute; we ask once, for the config."""
    repo = str(Path(name).resolve()) if Path(name).is_dir() else SHORT_NAMES.get(name, name)
    how = {"pretrained_model_name_or_path": repo}
    if Path(repo, file).is_file():
        return how
    if Path(repo).is_dir():
        raise UserError(f"{name} holds no {file}: give a folder that save_pretrained wrote")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=5)
        return how
    except hub.errors.GatedRepoError:
        why = f"gated: accept its licence at {hub.constants.ENDPOINT}/{repo} and set HF_TOKEN"
    except (hub.errors.HFValidationError, hub.errors.RepositoryNotFoundError, hub.errors.EntryNotFoundError):
        why = f"no folder here, no public model (private: HF_TOKEN); known: tiny, {', '.join(SHORT_NAMES)}"
    except Exception as error:  # no network, a proxy, a time-out, HF_HUB_OFFLINE; the hub's cache may have it
        if isinstance(hub.try_to_load_from_cache(repo, file), str):
            return how | {"local_files_only": True}
        why = f"{' '.join(str(error).split())[:100]}; connect, or give the folder of an `hf download {repo}`"
    near = difflib.get_close_matches(name, [*SHORT_NAMES, "tiny"], 1) if repo == name else []
    raise UserError(f"could not fetch {repo}: {why}" + "".join(f"; did you mean {short}?" for short in near))

def load_pretrained(name, model_class=transformers.AutoModel):
    """(model, tokenizer) from a short name, hub id or folder; float32 whatever the checkpoint's dtype.
    OPT's is float16, in which lr times gradient rounds to nothing, and which GradScaler refuses."""
    how, cut = check_available(name), {"num_hidden_layers": 6} if name == "bert-6l" else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**how, padding_side="right")
        model, info = model_class.from_pretrained(**how, **cut, dtype=torch.float32, output_loading_info=True)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        missing = re.search("entencepiece|tiktoken", str(error))  # transformers names the wrong package
        more = "; pip install sentencepiece protobuf" if missing else ""
        raise UserError(f"could not load {name}: {' '.join(str(error).split())[:300]}{more}") from None
    if model.config.is_encoder_decoder or not hasattr(model.config, "hidden_size"):
        raise UserError(f"{name} is a {model.config.model_type} model: give one like BERT or OPT")
    # Without its files transformers invents an empty tokenizer, to which every text is the same.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{name} has no tokenizer files: copy tokenizer.json (or the vocabulary) into it")
    if lacks := ", ".join(sorted(info["missing_keys"])[:3]):
        if model_class is not transformers.AutoModel:  # a teacher, which nobody trains
            raise UserError(f"{name} is no {model_class.__name__}: it lacks {lacks}")
        print(f"note: {name} lacks {lacks}, which start at random")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token  # LLaMA has none
    return model, tokenizer
