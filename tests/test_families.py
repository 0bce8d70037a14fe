"""Families of models: each does all that a student does, or is refused in one line.

FAMILIES says what is expected of each. The folders hold tiny random models and a word-level
tokenizer, as save_pretrained writes them; no position table holds more than 32 tokens.
"""
import copy

import pytest
import torch
import transformers

from align import Outputs
from data import UserError, collate
from losses import student_loss
from student import LoRA, _tiny, build_student, load_student
from tests.conftest import TEXTS
from train import main

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64}
SHORT = {**SMALL, "max_position_embeddings": 32}
# RoBERTa's relatives count positions from padding_idx + 1 = 2: 34 of them hold 32 tokens.
OFFSET = {**SMALL, "max_position_embeddings": 34, "pad_token_id": 1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
           "sep_token_id": 3}

# What is refused, and with which words.
PADDING = "gives a text another vector when longer texts stand beside it"
NO_LORA = "has no linear map named .*, but .*: try --lora 0"
READS_BOTH_WAYS = "has read the later tokens that it should write"
CHANGES_LOGITS = "changes its logits after the vocabulary head"


class Family:
    """What is expected: the words of a refusal, or True for what works.

    lora: the names of the maps that get one. generate: None for a model without such a class, or
    one that is an encoder. frozen: a part of the name of a weight that gets no gradient.
    """
    def __init__(self, config, lora, classify=True, checkpoint=True, bf16=True, generate=None,
                 frozen=None, tokens=32):
        self.config = config
        self.lora = lora
        self.classify = classify
        self.checkpoint = checkpoint
        self.bf16 = bf16
        self.generate = generate
        self.frozen = frozen
        self.tokens = tokens


QV = ["query", "value"]
FAMILIES = {
    # ---- encoders ----
    "roberta": Family(transformers.RobertaConfig(**OFFSET), QV),
    "xlm-roberta": Family(transformers.XLMRobertaConfig(**OFFSET), QV),
    "mpnet": Family(transformers.MPNetConfig(**OFFSET), ["q", "v"], checkpoint=False,
                    frozen="pooler"),
    "longformer": Family(transformers.LongformerConfig(**OFFSET, attention_window=16), QV,
                         frozen="query_global"),
    "luke": Family(transformers.LukeConfig(**OFFSET, entity_vocab_size=9, entity_emb_size=8), QV,
                   frozen="entity_embeddings"),
    "albert": Family(transformers.AlbertConfig(**SHORT, embedding_size=16), QV, checkpoint=False,
                     frozen="pooler"),
    "squeezebert": Family(transformers.SqueezeBertConfig(**SHORT, embedding_size=32), NO_LORA,
                          checkpoint=False, frozen="pooler"),
    "distilbert": Family(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64,
                                      max_position_embeddings=32), ["q_lin", "v_lin"]),
    "modernbert": Family(transformers.ModernBertConfig(**SHORT, **SPECIAL), ["Wqkv"]),
    "deberta": Family(
        transformers.DebertaConfig(**SHORT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        ["in_proj"], bf16=False),
    "funnel": Family(
        transformers.FunnelConfig(d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[1, 1],
                                  num_decoder_layers=1, architectures=["FunnelModel"]),
        None, classify=PADDING),
    "convbert": Family(transformers.ConvBertConfig(**SHORT, embedding_size=16), None,
                       classify=PADDING),
    "fnet": Family(
        transformers.FNetConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                                max_position_embeddings=32), None, classify=PADDING),
    "bert, causal": Family(transformers.BertConfig(**SHORT, is_decoder=True), None,
                           classify="pools a state that has not read the last word"),
    "t5": Family(transformers.T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=64, d_kv=16),
                 None, classify="is a t5 model: give one like BERT or OPT"),
    # ---- decoders ----
    "gpt2": Family(transformers.GPT2Config(**GPT), ["c_attn"], generate=True),
    "openai-gpt": Family(transformers.OpenAIGPTConfig(**GPT), ["c_attn"], checkpoint=False,
                         generate=True),
    "pythia": Family(transformers.GPTNeoXConfig(**SHORT), ["query_key_value"], generate=True),
    "falcon": Family(
        transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  max_position_embeddings=32), ["query_key_value"], generate=True),
    "mpt": Family(transformers.MptConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=32),
                  ["Wqkv"], generate=True),
    "phi-3": Family(transformers.Phi3Config(**SHORT, **SPECIAL), ["qkv_proj"], generate=True),
    "bloom": Family(transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2),
                    ["query_key_value"], generate=True, tokens=512),
    "xlnet": Family(transformers.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64), NO_LORA,
                    checkpoint=False, generate=READS_BOTH_WAYS, frozen="mask_emb", tokens=512),
    "bert-generation": Family(transformers.BertGenerationConfig(**SHORT), QV,
                              generate=READS_BOTH_WAYS),
    # These scale, multiply and cap their logits.
    "granite": Family(transformers.GraniteConfig(**SHORT, logits_scaling=8.0),
                      ["q_proj", "v_proj"], generate=CHANGES_LOGITS),
    "cohere": Family(transformers.CohereConfig(**SHORT), ["q_proj", "v_proj"],
                     generate=CHANGES_LOGITS),
    "gemma-2": Family(transformers.Gemma2Config(**SHORT, head_dim=16, num_key_value_heads=2),
                      ["q_proj", "v_proj"], generate=CHANGES_LOGITS),
    # Its head reads what a further layer makes of the states.
    "modernbert-decoder": Family(transformers.ModernBertDecoderConfig(**SHORT, **SPECIAL),
                                 ["q_proj", "v_proj"], generate="writes from other states"),
}
WORKING = [name for name, family in FAMILIES.items() if family.classify is True]
DECODERS = [name for name, family in FAMILIES.items() if family.generate]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(name, head=False) -> its folder, with a vocabulary head or without one."""
    made = {}

    def make(name, head=False):
        if (name, head) not in made:
            _, tokenizer = _tiny(TEXTS)
            tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
            config = copy.deepcopy(FAMILIES[name].config)
            config.vocab_size = len(tokenizer)
            model_class = transformers.AutoModelForCausalLM if head else transformers.AutoModel
            torch.manual_seed(0)
            folder = str(tmp_path_factory.mktemp("family"))
            model_class.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name, head] = folder
        return made[name, head]

    return make


def build(folder, **settings):
    torch.manual_seed(0)
    student = build_student(folder, 3, 8, labels=["no", "maybe", "yes"], max_length=30, **settings)
    return student.eval()


def step(student):
    """Forward, loss and backward of a long and a short text; return {name: gradient}."""
    length = min(student.max_tokens, 40)
    rows = []
    for n in (length, 5):
        row = {"input_ids": [4 + i % 9 for i in range(n)]}
        if not student.decoder and "token_type_ids" in student.tokenizer.model_input_names:
            row["token_type_ids"] = [i * 2 // n for i in range(n)]
        rows.append(row)
    torch.manual_seed(1)
    student.zero_grad()
    out = student.train()(**collate(rows, student.tokenizer.pad_token_id))
    target = Outputs(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 8))
    loss, _ = student_loss(out, target, torch.tensor([0, 2]), alpha=0.5, beta=1.0, gamma=1.0,
                           temperature=5.0, kind="manifold")
    loss.backward()
    student.eval()
    named = student.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def refusal(call, *args, **settings):
    """The UserError of a call, which is one line."""
    with pytest.raises(UserError) as error:
        call(*args, **settings)
    assert "\n" not in str(error.value)
    return error


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WORKING])
def test_what_cannot_classify_is_refused_before_training(folder_of, name):
    error = refusal(build, folder_of(name))
    error.match(FAMILIES[name].classify)


@pytest.mark.parametrize("name", WORKING)
def test_a_family_learns_answers_and_is_saved(folder_of, tmp_path, name):
    """All that may learn gets a gradient, or DistributedDataParallel would wait for it."""
    family = FAMILIES[name]
    student = build(folder_of(name))
    assert student.max_tokens == family.tokens
    gradients = step(student)
    named = list(student.named_parameters())
    assert set(gradients) == {name for name, weight in named if weight.requires_grad}
    frozen = " ".join(name for name, weight in named if not weight.requires_grad)
    assert (family.frozen in frozen) if family.frozen else (not frozen)

    student.save(tmp_path)
    loaded = load_student(tmp_path)
    answers = student.predict(TEXTS)
    assert loaded.predict(TEXTS) == answers
    pairs = [(text, TEXTS[2]) for text in TEXTS]
    assert loaded.predict(pairs) == [student.predict([pair])[0] for pair in pairs]
    rows = [student._encode_text(text, "") for text in TEXTS]
    _, together = student.answers(rows, keep=4)
    for row, p in zip(rows, together):
        _, (alone,) = loaded.answers([row], keep=1)
        torch.testing.assert_close(alone, p, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", WORKING)
def test_checkpointing_gives_the_same_gradients_or_is_refused(folder_of, name):
    student = build(folder_of(name))
    if not FAMILIES[name].checkpoint:
        refusal(student.checkpoint_gradients).match("--grad-checkpoint on: .* cannot: give off")
        return
    plain = step(student)
    student.checkpoint_gradients()
    recomputed = step(student)
    assert recomputed.keys() == plain.keys()
    torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("name", WORKING)
def test_bf16_runs_or_is_refused(folder_of, name):
    student = build(folder_of(name))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    if FAMILIES[name].bf16:
        student.try_autocast(autocast)
        with autocast():
            gradients = step(student)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    else:
        refusal(student.try_autocast, autocast).match("in half precision .*: give --amp off")


@pytest.mark.parametrize("name", WORKING)
def test_lora_finds_its_maps_or_says_which_it_wants(folder_of, tmp_path, name):
    targets = FAMILIES[name].lora
    if isinstance(targets, str):
        refusal(build, folder_of(name), lora=2).match(targets)
        return
    student = build(folder_of(name), lora=2)
    modules = dict(student.lm.named_modules())
    maps = {name.split(".")[-1] for name in modules if isinstance(modules[name], LoRA)}
    assert sorted(maps) == targets
    gradients = step(student)
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert set(gradients) == trained
    for module in modules.values():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_B.weight)
    student.save(tmp_path)
    loaded = load_student(tmp_path)
    rows = [student._encode_text(text, "") for text in TEXTS]
    _, expected = student.answers(rows, keep=4)
    _, again = loaded.answers(rows, keep=4)
    _, merged = loaded.merge().answers(rows, keep=4)
    for p, same, close in zip(expected, again, merged):
        assert torch.equal(p, same)
        torch.testing.assert_close(close, p, rtol=1e-3, atol=1e-4)


def test_peft_opens_the_adapters_of_gpt2_which_holds_its_weights_transposed(folder_of, tmp_path):
    peft = pytest.importorskip("peft")
    student = build(folder_of("gpt2"), lora=2)
    for module in student.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_B.weight)
    student.save(tmp_path)
    base = transformers.AutoModel.from_pretrained(folder_of("gpt2"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        states = theirs(input_ids=ids).last_hidden_state
        expected = student.lm(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_what_generates_answers_with_the_model_that_is_trained(folder_of, tmp_path, name):
    expected = FAMILIES[name].generate
    settings = {"vocabulary": [4, 5, 6], "max_new_tokens": 5}
    if expected is not True:
        refusal(build, folder_of(name, head=True), **settings).match(expected)
        return
    student = build(folder_of(name, head=True), **settings)
    answers = student.predict(TEXTS)
    assert answers == [student.predict([text])[0] for text in TEXTS]
    student.save(tmp_path)
    assert load_student(tmp_path).predict(TEXTS) == answers

    # Oracle: the training forward, one token after the other.
    ids = student._encode_text(TEXTS[0], "")["input_ids"]
    written = []
    while len(written) < 5 and written[-1:] != [student.tokenizer.eos_token_id]:
        x = torch.tensor([ids + written])
        with torch.no_grad():
            states = student.lm.base_model(x).last_hidden_state        # (1, L, d_s)
            logits = student.lm.get_output_embeddings()(states[0, -1])  # (V,)
        written.append(logits.argmax().item())
    assert student.tokenizer.decode(written, skip_special_tokens=True).strip() == answers[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_told_or_refused_in_one_line(folder_of, capsys, name):
    flags = ["--plan", "--task", "rte", "--student", folder_of(name), "--teacher", "painter",
             "--max-length", "30", "--cache-dir", folder_of(name), "--device", "cpu"]
    try:
        main(flags)
    except SystemExit as stop:
        told = capsys.readouterr().err
        assert stop.code == 2
        assert told.count("\n") == 1
        assert "is a t5 model" in told or "has no formula" in told
    else:
        assert "peak memory" in capsys.readouterr().out
