"""Students: pooling, heads, saving, asking. Every fact is checked for each family of models.

Read beside student.py. The models are tiny and random (tests/conftest.py).
"""
import http.server
import json
import os
import random
import re
import shutil
import threading

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import save_file

import student as student_module
from data import TASKS, UserError, collate, encode, load_task
from student import build_student, load_student
from tests.conftest import FAMILIES, SMALL, TEXTS, family_config
from train import Config, train


def batch_of(student, texts, left=False, extra=0):
    """Pad to the longest text plus `extra`, on the right or on the left."""
    rows = [dict(student.tokenizer(text)) for text in texts]
    width = max(len(row["input_ids"]) for row in rows) + extra
    batch = {}
    for key in rows[0]:
        filler = student.tokenizer.pad_token_id if key == "input_ids" else 0
        padded_rows = []
        for row in rows:
            padding = [filler] * (width - len(row[key]))
            padded_rows.append(padding + row[key] if left else row[key] + padding)
        batch[key] = torch.tensor(padded_rows)
    return batch


@pytest.fixture(params=FAMILIES)
def student(request, model_folder):
    torch.manual_seed(0)
    return build_student(model_folder(request.param), 3, 12).eval()


def test_outputs_have_the_shapes_and_formulas_of_the_method(student):
    batch = batch_of(student, TEXTS)
    heads = student.heads
    out = student(**batch)
    h = student.pool(student.lm(**batch), batch["attention_mask"])
    torch.testing.assert_close(out.logits, heads["classifier"](h))
    torch.testing.assert_close(out.proj, h @ heads["projection"].weight.T)  # linear, no bias
    torch.testing.assert_close(out.aux_logits, heads["aux_classifier"](out.proj))
    assert [tuple(x.shape) for x in out] == [(4, 3), (4, 3), (4, 12)]


def test_padding_changes_nothing(student):
    """A text alone, among longer ones, and with ten columns of padding more: the same vector."""
    together = student(**batch_of(student, TEXTS))
    wide = student(**batch_of(student, TEXTS, extra=10))
    for i, text in enumerate(TEXTS):
        alone = student(**batch_of(student, [text]))
        for one, many, more in zip(alone, together, wide):
            torch.testing.assert_close(one[0], many[i], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(one[0], more[i], atol=2e-5, rtol=1e-4)


def test_a_decoder_gives_the_same_vector_under_left_padding(student):
    if student.decoder:
        right = student(**batch_of(student, TEXTS, extra=3))
        left = student(**batch_of(student, TEXTS, left=True, extra=3))
        torch.testing.assert_close(right.logits, left.logits, atol=2e-5, rtol=1e-4)


def test_pooling_reads_the_position_its_family_calls_for(student):
    """BERT and RoBERTa: the pooler; DeBERTa: the first token; OPT and LLaMA: the last real token.

    The padding's id is here that of a real token (LLaMA folders often pad with end-of-text).
    """
    batch = batch_of(student, TEXTS, extra=2)
    batch["input_ids"][batch["attention_mask"] == 0] = student.tokenizer.sep_token_id
    out = student.lm(**batch)
    family = student.lm.config.model_type
    if family in ("bert", "roberta"):
        expected = out.pooler_output
    elif family == "deberta-v2":
        expected = out.last_hidden_state[:, 0]
    else:
        assert family in ("opt", "llama")
        last = batch["attention_mask"].sum(1) - 1
        expected = out.last_hidden_state[range(4), last]
    assert (student.pool(out, batch["attention_mask"]) == expected).all()


def test_every_word_reaches_the_pooled_vector(student):
    """Position 0 under a causal mask would give the same vector for every text."""
    words = TEXTS[0].split()
    plain = student(**batch_of(student, [TEXTS[0]])).logits
    for i in (0, len(words) // 2, len(words) - 1):
        changed_text = " ".join([*words[:i], "nobody", *words[i + 1:]])
        changed = student(**batch_of(student, [changed_text])).logits
        assert (changed - plain).abs().max() > 1e-6


def test_gradients_reach_every_layer_with_and_without_checkpointing_and_are_equal(student):
    """In train mode, so that the recomputed layers must draw the same dropout."""
    def gradients():
        torch.manual_seed(3)
        student.zero_grad()
        out = student.train()(**batch_of(student, TEXTS))
        (out.logits.square().sum() + out.aux_logits.square().sum()).backward()
        parameters = student.named_parameters()
        return {name: p.grad.clone() for name, p in parameters if p.grad is not None}

    runs = []  # the indices of the layers, in the order in which they run: 0, and 1, the last one
    for i, layer in enumerate(student.layers()):
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        linears[0].register_forward_hook(lambda *_, i=i: runs.append(i))
    plain = gradients()
    assert sorted(runs) == [0, 1]

    student.checkpoint_gradients()
    runs.clear()
    recomputed = gradients()
    # The last layer's backward pass comes first: its activations are still there.
    assert sorted(runs) == [0, 0, 1]

    for layer in (0, 1):
        assert any(f".{layer}." in name for name in plain)
    assert plain.keys() == recomputed.keys()
    torch.testing.assert_close(plain, recomputed)


def test_save_and_load_give_the_same_outputs_and_automodel_opens_the_folder(student, tmp_path):
    student.save(tmp_path)
    loaded = load_student(tmp_path)
    batch = batch_of(student, TEXTS)
    assert not loaded.training
    for a, b in zip(student(**batch), loaded(**batch)):
        assert (a == b).all()
    lm = transformers.AutoModel.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (lm(**batch).last_hidden_state == student.lm(**batch).last_hidden_state).all()
    assert tokenizer(TEXTS[0])["input_ids"] == student.tokenizer(TEXTS[0])["input_ids"]


def test_dropout_hits_both_heads_but_not_the_projection(model_folder):
    """With the language model's own dropout off, p_s is P_s h_s, and o_s and a_s are thinned."""
    student = build_student(model_folder("bert"), 3, 12, dropout=0.5).train()
    student.lm.eval()
    batch = batch_of(student, TEXTS)
    a = student(**batch)
    b = student(**batch)
    assert (a.proj == b.proj).all()
    assert (a.logits != b.logits).any()
    assert (a.aux_logits != b.aux_logits).any()


def test_answers_come_without_dropout_in_order_and_leave_the_mode_alone(student):
    rows = [dict(student.tokenizer(text)) for text in TEXTS]
    expected = student.eval()(**batch_of(student, TEXTS))
    student.train()
    student.drop.p = 0.9
    answers, p_s = student.answers(rows, batch_size=3, keep=2)
    assert answers == expected.logits.argmax(-1).tolist()
    assert student.training
    torch.testing.assert_close(torch.stack(p_s), expected.proj[:2])


def test_predict_names_the_label_of_each_text_in_order_whatever_the_batch_size(student):
    labels = ["no", "maybe", "yes"]
    student.settings["labels"] = labels
    logits = student(**batch_of(student, TEXTS)).logits
    named = [labels[i] for i in logits.argmax(-1)]
    assert student.predict(TEXTS) == named
    assert [student.predict([text])[0] for text in TEXTS] == named
    assert len(student.predict([(text, TEXTS[0]) for text in TEXTS])) == 4
    with pytest.raises(UserError, match=r"predict\(\[text\]\)"):
        student.predict(TEXTS[0])  # would be answered letter by letter


def test_predict_of_a_regression_gives_scores_from_0_to_5_and_leaves_the_mode_alone(model_folder):
    student = build_student(model_folder("bert"), 1, 8).train()
    torch.nn.init.constant_(student.heads["classifier"].bias, 9.0)
    assert student.predict(TEXTS) == [5.0] * 4
    assert student.training


def test_a_float16_checkpoint_is_loaded_in_float32(model_folder):
    """transformers keeps the stored dtype. OPT's is float16, in which a step of 2e-5 times a
    gradient changes nothing."""
    folder = model_folder("opt", torch.float16)
    assert transformers.AutoModel.from_pretrained(folder).dtype == torch.float16
    assert {p.dtype for p in build_student(folder, 2, 8).parameters()} == {torch.float32}


def test_no_vocabulary_head_is_loaded(student):
    """AutoModel, not AutoModelForCausalLM: a head of vocabulary width would be dead weight."""
    assert not any("lm_head" in name for name, _ in student.named_parameters())


@pytest.mark.parametrize("proj_dim", [20, 32, 50])
def test_an_orthogonal_student_projection_is_orthogonal_at_any_width(model_folder, proj_dim):
    student = build_student(model_folder("bert"), 2, proj_dim, orthogonal=True)
    P = student.heads["projection"](torch.eye(32)).T  # (d, d_s)
    gram = P @ P.T if proj_dim <= 32 else P.T @ P
    torch.testing.assert_close(gram, torch.eye(min(proj_dim, 32)), atol=1e-5, rtol=0)


# ---- tiny ----
def test_tiny_makes_its_vocabulary_from_texts_and_reads_pairs():
    student = build_student("tiny", 2, 8, texts=["Is a mouse bigger than a piano?"])
    tokenizer = student.tokenizer
    encoded = tokenizer(["A MOUSE?", "zebra"], ["piano", "piano"])
    first, second = encoded["input_ids"]
    assert tokenizer.convert_ids_to_tokens(first) == [
        "[CLS]", "a", "mouse", "?", "[SEP]", "piano", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(second)[1] == "[UNK]"
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 0, 1, 1]
    rows = [dict(tokenizer("A MOUSE?", "piano")), dict(tokenizer("zebra", "piano"))]
    assert student(**collate(rows, 0)).logits.shape == (2, 2)


def test_tiny_without_texts_is_an_error():
    with pytest.raises(UserError, match="texts="):
        build_student("tiny", 2, 8)


def test_bert_6l_is_the_first_six_layers(monkeypatch, tmp_path, model_folder):
    config = transformers.AutoConfig.from_pretrained(model_folder("bert"), num_hidden_layers=8)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    _, tokenizer = student_module._tiny(TEXTS)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(student_module.SHORT_NAMES, "bert-6l", str(tmp_path))
    student_module.check_available.cache_clear()
    assert len(build_student("bert-6l", 2, 8).lm.encoder.layer) == 6
    student_module.check_available.cache_clear()


def test_a_folder_without_tokenizer_files_is_refused(model_folder, tmp_path):
    """transformers would invent an empty vocabulary and read every text as one unknown word."""
    transformers.AutoModel.from_pretrained(model_folder("bert")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        build_student(str(tmp_path), 2, 8)


def test_a_damaged_checkpoint_is_one_line(student, tmp_path):
    student.save(tmp_path)
    heads = tmp_path / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        load_student(tmp_path)


# ---- names that cannot be had ----
def test_a_folder_without_a_model_and_a_folder_without_a_student_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        build_student(str(tmp_path), 2, 8)
    with pytest.raises(UserError, match="no last/ or best/: .*student.json"):
        load_student(tmp_path)


@pytest.mark.parametrize("status, code, says", [
    (404, "RepoNotFound", "did you mean opt-1.3b"),
    (401, "GatedRepo", "accept its licence"),
    (None, None, "could not fetch")])
def test_what_the_hub_refuses_is_one_line_after_one_question(monkeypatch, status, code, says):
    """Against a loopback server, or (status None) a port that nobody listens on.

    transformers by itself would retry for half a minute.
    """
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    if status is None:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(huggingface_hub, "hf_hub_url",
                        lambda repo, file: f"{url}/{repo}/resolve/main/{file}")
    with pytest.raises(UserError, match=says) as error:
        build_student("opt-1.3", 2, 8)
    assert "\n" not in str(error.value)
    assert len(asked) == (0 if status is None else 1)
    if status:
        server.shutdown()
        server.server_close()


def test_an_encoder_tells_the_second_text_from_the_first(model_folder):
    """By token_type_ids, which must reach the language model."""
    student = build_student(model_folder("bert"), 3, 12).eval()
    batch = batch_of(student, TEXTS)
    first = student(**batch).logits
    batch["token_type_ids"] = batch["attention_mask"]
    second = student(**batch).logits
    assert (first - second).abs().max() > 1e-4


def test_an_orthogonal_student_projection_can_be_any_rotation_of_h_s():
    """That takes a reflection for each coordinate; p_s must meet p_t coordinate by coordinate."""
    student = build_student("tiny", 2, 40, texts=["a"], orthogonal=True)
    assert student.heads["projection"].v.shape == (64, 64)


def test_albert_has_no_weight_that_waits_for_a_gradient_in_vain(tmp_path):
    """Its pooler is not read: DDP would wait for it, and stop at the second step."""
    _, tokenizer = student_module._tiny(TEXTS)
    config = transformers.AlbertConfig(vocab_size=len(tokenizer), embedding_size=16,
                                       intermediate_size=64, **SMALL)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = build_student(str(tmp_path), 3, 12)
    out = student(**batch_of(student, TEXTS))
    sum(tensor.square().sum() for tensor in out).backward()
    for name, weight in student.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name


# ---- a saved student answers as it was scored ----
RTE_LABELS = ("entailment", "not_entailment")


def write_rte(root, rows=40):
    """RTE's three files, whose texts have 3 to 60 words."""
    generator = random.Random(0)
    words = " ".join(TEXTS[:2]).split()
    folder = root / "RTE"
    folder.mkdir()
    for name in ("train", "val"):
        lines = []
        for i in range(rows):
            premise = " ".join(generator.choices(words, k=generator.choice((2, 8, 20, 50))))
            hypothesis = " ".join(generator.choices(words, k=generator.randint(1, 10)))
            marked = hypothesis + (" awake", " stay")[i % 2]  # which tells the label
            row = {"premise": premise, "hypothesis": marked, "label": RTE_LABELS[i % 2]}
            lines.append(json.dumps({**row, "idx": i}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return str(root)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_predict_answers_as_the_run_was_scored_or_refuses(model_folder, tmp_path, family):
    """Long rows were shortened by fields, which a finished text does not tell."""
    data_dir = write_rte(tmp_path)
    train(Config(task="rte", data_dir=data_dir, student=model_folder(family), teacher="painter",
                 epochs=6, lr=1e-2, max_length=32, arms="undistilled", device="cpu",
                 out=str(tmp_path / "run")))
    cell = tmp_path / "run/undistilled/0"
    lines = (cell / "predictions_dev.jsonl").read_text().splitlines()
    scored = [json.loads(line)["label"] for line in lines]
    student = load_student(cell / "last")

    task = TASKS["rte"]
    examples = load_task("rte", data_dir)["dev"]
    rows, shortened = encode(task, examples, student.tokenizer, 32, student.decoder)
    answered = {"answered": [], "expected": []}
    refused = 0
    for example, row, label in zip(examples, rows, scored):
        text = task.prompt(example) if student.decoder else task.pair(example)
        try:
            answered["answered"] += student.predict([text])
        except UserError as error:
            assert re.search(r"text 1 has \d\d tokens, 32 fit: shorten it", str(error))
            refused += 1
        else:
            answered["expected"].append(label)
            assert student._encode_text(text, "") == row
            assert student._encode_text(task.pair(example), "") == row
    assert answered["answered"] == answered["expected"]
    assert set(answered["expected"]) == set(RTE_LABELS)
    assert refused == shortened > 5


@pytest.mark.parametrize("texts, says", [
    ("a man", r"predict\(\[text\]\)"),
    (["a man", 3], "text 2 must be a string or two, not 3"),
    ([("a", "man", "is")], r"text 1 must be a string or two, not \('a', 'man', 'is'\)"),
    ([()], r"text 1 must be a string or two, not \(\)"),
    ([None], "text 1 must be a string or two, not None"),
    ([b"a man"], "text 1 must be a string or two, not b'a man'"),
    (["a man", "half \ud83d"], "text 2 holds half of a character"),
    ([("a man", "\udcff")], "text 1 holds half of a character"),
    (["a man " * 999], "text 1 has 2000 tokens, 80 fit: shorten it"),
])
def test_what_predict_cannot_read_is_one_line(model_folder, texts, says):
    student = build_student(model_folder("deberta-v2"), 2, 8)
    with pytest.raises(UserError, match=says):
        student.predict(texts)


def test_predict_of_nothing_is_nothing_and_an_empty_text_is_one(model_folder, causal_folder):
    encoder = build_student(model_folder("bert"), 2, 8, labels=("no", "yes"))
    assert encoder.predict([]) == []
    assert encoder.predict([("a man", None), ""])[0] in ("no", "yes")  # "" is [CLS] [SEP]
    decoder = build_student(causal_folder(), 2, 8)  # whose tokenizer adds nothing
    writer = build_student(causal_folder(), 2, 8, vocabulary=(5, 6), max_new_tokens=12)
    for student in (decoder, writer):
        assert student.predict([]) == []
        with pytest.raises(UserError, match="text 2 has no token"):
            student.predict(["a", ""])


# ---- folders of which no student can be made ----
def resize_tokenizer(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["more", "words"])
    tokenizer.save_pretrained(folder)


def drop_padding(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for name in ("pad_token", "eos_token", "unk_token"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings))


def take_python_tokenizer(folder):
    spoil_json("tokenizer_config.json", tokenizer_class="CTRLTokenizer")(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"<unk>": 0, "a": 1, "b": 2, "[PAD]": 3}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


def split_weights_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    weight_map = {"embeddings.word_embeddings.weight": "../outside.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Bomb()}, folder / "pytorch_model.bin")


def bring_code(folder):
    """A module that makes a directory when it is imported."""
    (folder / "own.py").write_text("import os\nos.mkdir('exploded')\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    spoil_json("config.json", model_type="own", auto_map=auto_map)(folder)


def spoil_json(file, **changes):
    def spoil(folder):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | changes))
    return spoil


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


@pytest.mark.parametrize("spoil, says", [
    (resize_tokenizer, r"tokenizer has (\d+) tokens, its model only \d+: .*_embeddings\(\1\)"),
    (drop_padding, "has no token to fill rows with: set pad_token"),
    (take_python_tokenizer, "CTRLTokenizer does not tell where in a text a token stands"),
    (split_weights_outside, "index.json names ../outside.safetensors, outside of the folder"),
    (write("model.safetensors.index.json", "["), "index.json is not JSON"),
    (write("model.safetensors.index.json", "{}"), "index.json has no weight_map"),
    (pickle_weights, "could not load .*weights_only|could not load .*Unsupported"),
    (bring_code, "brings code of its own, which is never run here"),
    (spoil_json("config.json", hidden_size="x"), "could not load"),
    (spoil_json("config.json", hidden_size=31), "could not load"),
    (spoil_json("config.json", num_attention_heads=0), "could not load"),
    (spoil_json("config.json", hidden_act="x"), "could not load"),
    (spoil_json("config.json", model_type="none"), "could not load"),
    (spoil_json("config.json", is_decoder=True), "pools a state that has not read the last word"),
    (write("config.json", ""), "could not load"),
    (write("config.json", "[]"), "could not load"),
    (write("config.json", "[" * 99999), "could not load"),
    (write("tokenizer_config.json", "[]"), "could not load"),
    (spoil_json("tokenizer_config.json", model_max_length="x"), "has model_max_length 'x'"),
    (write("tokenizer.json", "{}"), "could not load"),
    (write("model.safetensors", "x"), "could not load"),
])
def test_a_folder_of_which_no_student_can_be_made_is_one_line(
        model_folder, tmp_path, monkeypatch, spoil, says):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("bert"), folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("a question was asked"))
    spoil(folder)
    with pytest.raises(UserError, match=says) as error:
        build_student(str(folder), 2, 8)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_what_a_tokenizer_tells_of_segments_is_for_models_that_have_two(model_folder, tmp_path):
    """RoBERTa has one: the second text's number would be outside of its table."""
    shutil.copytree(model_folder("bert"), tmp_path / "one")
    config = family_config("roberta", 99)
    config.update({"type_vocab_size": 1})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "one")
    student = build_student(str(tmp_path / "one"), 2, 8)
    assert list(student._encode_text(("a man", "is awake"), "")) == ["input_ids"]
    assert len(student.predict([("a man", "is awake")])) == 1


def test_to_try_a_student_out_draws_nothing_and_changes_nothing(model_folder, monkeypatch):
    monkeypatch.setattr(student_module, "try_out", lambda student, name: None)
    torch.manual_seed(5)
    plain = build_student(model_folder("bert"), 2, 8)
    after_plain = torch.rand(1)
    monkeypatch.undo()
    torch.manual_seed(5)
    student = build_student(model_folder("bert"), 2, 8)
    assert torch.rand(1) == after_plain
    for (name, a), (_, b) in zip(plain.named_parameters(), student.named_parameters()):
        assert torch.equal(a, b)
        assert b.requires_grad
        assert b.grad is None
    assert [m.training for m in student.modules()] == [m.training for m in plain.modules()]
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize("spoil, says", [
    (write("student.json", ""), "student.json is not JSON"),
    (write("student.json", "[]"), "student.json is not a JSON object"),
    (spoil_json("student.json", num_labels="3"), "its student.json has num_labels '3'"),
    (spoil_json("student.json", max_length=None), "its student.json has max_length None"),
    (spoil_json("student.json", labels="ab"), "its student.json has labels 'ab'"),
    (spoil_json("student.json", labels=["a"]), "has not num_labels labels"),
    (spoil_json("student.json", max_new_tokens=-1), "its student.json has max_new_tokens -1"),
    (spoil_json("student.json", vocabulary={}), "its student.json has vocabulary {}"),
    (spoil_json("student.json", num_labels=5), "size mismatch"),
    (spoil_json("student.json", proj_dim=-1), "is damaged"),
    (spoil_json("student.json", proj_dim=10**30), "is damaged"),
    (spoil_json("student.json", dropout=7), "dropout probability"),
    (spoil_json("student.json", more=1), "more"),
    (spoil_json("student.json", base="/nowhere"), "needs the base of its LoRA, /nowhere"),
    (write("heads.safetensors", "x"), "is damaged"),
    (lambda folder: save_file({"a": torch.ones(1)}, folder / "heads.safetensors"), "Missing key"),
    (lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors",
                              metadata={"format": "pt"}), "it lacks embeddings"),
])
def test_a_damaged_student_is_one_line(model_folder, tmp_path, spoil, says):
    build_student(model_folder("bert"), 3, 8).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load_student(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
