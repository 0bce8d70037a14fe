"""Tiny models and tiny official files, made on the spot.

No test needs a network or data from elsewhere.
"""
import http.server
import json
import signal
import threading

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

import student as student_module
from data import ALPACA, TASKS

# As the command line does for small models: more threads would round sums in another order.
torch.set_num_threads(1)

TEXTS = ["a man is sleeping on the red sofa", "two dogs run after the small ball",
         "nobody is awake", "it rains , they stay"]
FAMILIES = ("bert", "roberta", "deberta-v2", "opt", "llama")
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


# ---- models ----
def family_config(family, vocab):
    """The smallest sensible configuration of each supported family."""
    if family == "bert":
        return transformers.BertConfig(vocab_size=vocab, intermediate_size=64, **SMALL)
    if family == "roberta":
        return transformers.RobertaConfig(
            vocab_size=vocab, intermediate_size=64, pad_token_id=0, max_position_embeddings=80,
            **SMALL)
    if family == "deberta-v2":
        return transformers.DebertaV2Config(
            vocab_size=vocab, intermediate_size=64, relative_attention=True,
            pos_att_type=["c2p", "p2c"], max_position_embeddings=80, **SMALL)
    if family == "opt":
        return transformers.OPTConfig(
            vocab_size=vocab, ffn_dim=64, max_position_embeddings=80, word_embed_proj_dim=16,
            pad_token_id=0, bos_token_id=2, eos_token_id=3, **SMALL)
    return transformers.LlamaConfig(
        vocab_size=vocab, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=80,
        bos_token_id=2, eos_token_id=3, **SMALL)


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Under nohup, or behind & in a script, a process is born ignoring SIGINT or SIGHUP, and the
    program respects that; the tests of what it does with them must not depend on it."""
    standard = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    before = {}
    for name, handler in standard.items():
        if hasattr(signal, name):
            number = getattr(signal, name)
            before[number] = signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """family -> a folder with random weights and a word-level tokenizer, as save_pretrained writes
    it."""
    made = {}

    def make(family, dtype=torch.float32):
        if (family, dtype) in made:
            return made[family, dtype]
        folder = tmp_path_factory.mktemp(family)
        _, tokenizer = student_module._tiny(TEXTS)
        if family in ("opt", "llama", "roberta"):
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        config = family_config(family, len(tokenizer))
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).to(dtype).save_pretrained(folder)
        if family == "llama":  # whose hub folders have no pad token
            tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
        made[family, dtype] = str(folder)
        return str(folder)

    return make


def reasoning_row(i):
    """(instruction, output, answer) of a made-up question with two answers, as LLM-Adapters has
    them."""
    answer = f"answer{1 + i % 2}"
    question = f"Please choose the correct answer to the question: what is {i} plus {i}?"
    choices = f"Answer1: {3 * i + 1} Answer2: {2 * i}"
    instruction = f"{question}\n\n{choices}\n\nAnswer format: answer1/answer2"
    return instruction, f"the correct answer is {answer}", answer


REASONING = [reasoning_row(i) for i in range(10)]


def byte_level_tokenizer():
    """A byte-level BPE, to which " answer" and "answer" are two tokens, as to LLaMA's and OPT's."""
    texts = list(ALPACA)
    for row in REASONING:
        texts += row
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def causal_folder(tmp_path_factory):
    """family -> a folder with a random language model, vocabulary head included, and a byte-level
    tokenizer."""
    made = {}

    def make(family="llama"):
        if family in made:
            return made[family]
        tokenizer = byte_level_tokenizer()
        config = family_config(family, len(tokenizer))
        config.update(dict(
            bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=512))
        folder = str(tmp_path_factory.mktemp(f"causal-{family}"))
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[family] = folder
        return folder

    return make


# ---- files ----
SUPERGLUE = ("rte", "boolq", "cb", "copa", "wic", "wsc")


def write_reasoning(root, train=REASONING, test=REASONING):
    """Write reasoning/train_commonsense.json and ARC-Easy/test.json as LLM-Adapters has them;
    return root as a string."""
    folder = root / "reasoning" / "ARC-Easy"
    folder.mkdir(parents=True)
    for path, rows in ((folder.parent / "train_commonsense.json", train),
                       (folder / "test.json", test)):
        items = []
        for instruction, output, answer in rows:
            items.append({"instruction": instruction, "output": output, "answer": answer,
                          "input": ""})
        path.write_text(json.dumps(items))
    return str(root)


def official_row(task, form, i, label):
    """Row i of a made-up official file: each text column holds its own words, so that a lost one is
    noticed."""
    row = {}
    for name in task.fields:
        column = task.columns.get(name, name) if form == "tsv" else name
        row[column] = f"{name.replace('_', '')}word{i} stands here ."
    if task.name == "copa":
        row["question"] = ("cause", "effect")[i % 2]
    if task.name == "wsc":
        target = {"span1_index": 0, "span1_text": f"Ann{i}", "span2_index": 4,
                  "span2_text": "she"}
        row = {"text": f"Ann{i} told Bob{i} that she won .", "target": target}
    row[task.label_column] = label
    return row


def official_label(task, form, i):
    """The label of row i, as the form spells it."""
    if not task.labels:
        return f"{i % 6 * 0.9:.3f}"
    label = task.labels[i % len(task.labels)]
    if form == "jsonl":  # JSON has its own true and 1
        return {"false": False, "true": True, "0": 0, "1": 1}.get(label, label)
    return label


def official_rows(task, form, split, count):
    """The rows of one official file; those of a test file have no labels."""
    rows = []
    for i in range(count):
        row = official_row(task, form, i, official_label(task, form, i))
        if split == "test":
            del row[task.label_column]
        if form == "jsonl":
            row["idx"] = i
        rows.append(row)
    return rows


def as_text(task, form, split, rows):
    """The content of one official file."""
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if task.name == "cola" and split != "test":  # no header line, four columns
        return "".join(f"gj04\t{row['label']}\t\t{row['sentence']}\n" for row in rows)
    lines = [list(rows[0])]  # the header
    lines += [row.values() for row in rows]
    return "".join("\t".join(line) + "\n" for line in lines)


def official_names(task, form):
    """{split: the official name of its file, without its ending}."""
    if task.name == "mnli":
        return {"train": "train", "dev": "dev_matched", "dev_mismatched": "dev_mismatched",
                "test": "test_matched"}
    dev = "val" if form == "jsonl" else "dev"
    return {"train": "train", "dev": dev, "test": "test"}


def write_official(task, root, counts={"train": 12, "dev": 6, "test": 3}):
    """Write the files of one understanding task in its official form below root; return root as a
    string."""
    form = "jsonl" if task.name in SUPERGLUE else "tsv"
    folder = root / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in official_names(task, form).items():
        rows = official_rows(task, form, split, counts.get(split, 4))
        text = as_text(task, form, split, rows)
        if task.name == "mrpc":
            text = "\ufeff" + text  # a byte order mark
        (folder / f"{name}.{form}").write_text(text, encoding="utf-8")
    return str(root)


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """A data folder with small official files of all fourteen understanding tasks."""
    root = tmp_path_factory.mktemp("official")
    for task in TASKS.values():
        if task.name != "objects" and task.kind != "generate":
            write_official(task, root)
    return str(root)


# ---- a server ----
def handler_class(answer):
    """A class that lets answer(request, body) write each response."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                answer(self, body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client hung up first

        do_POST = do_GET

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture
def loopback():
    """loopback(answer) -> the URL of a server on this machine; answer(request, body) writes each
    response."""
    servers = []

    def serve(answer):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_class(answer))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def respond(request, content=b"", status=200, length=None, **headers):
    """Write a whole HTTP response; `length` may promise more bytes than come."""
    if length is None:
        length = len(content)
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(length))
    request.end_headers()
    request.wfile.write(content)
