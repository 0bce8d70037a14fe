"""Generation tasks and LoRA: what is learnt, what the aligner predicts, what is generated.

Then how an answer is scored, and the whole path from files to predictions. The language models are
tiny and random (tests/conftest.py).
"""
import copy
import json
import math
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors

import eval as evaluation
import train as training
from align import Outputs
from data import (ALPACA, OBJECTS, TASKS, Example, UserError, answer_bags, answer_span,
                  answer_vocabulary, bag_labels, collate, encode, load_task)
from eval import compute_metrics, extract_answer, rouge_l
from losses import answer_losses, output_kl, output_loss, student_loss, task_loss
from student import AnswerOutputs, LoRA, add_lora, build_student, load_student, tiny_tokenizer
from tests.conftest import REASONING, write_reasoning
from train import Cell, Config, resolve, train

TASK = TASKS["reason/arc_e"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return load_task("reason/arc_e", write_reasoning(tmp_path_factory.mktemp("data")))["test"]


@pytest.fixture
def student(causal_folder, examples):
    """family, settings -> (a generation student in eval mode, the encoded rows, y)."""
    def make(family="llama", **settings):
        tokenizer = transformers.AutoTokenizer.from_pretrained(causal_folder(family))
        bags = answer_bags(TASK, examples, tokenizer)
        vocabulary = answer_vocabulary(bags)
        rows, _ = encode(TASK, examples, tokenizer, 300, True, 32)
        torch.manual_seed(1)
        made = build_student(causal_folder(family), len(vocabulary), 16, vocabulary=vocabulary,
                             max_new_tokens=12, **settings)
        return made.eval(), rows, bag_labels(bags, vocabulary)
    return make


def prompt_ids(row):
    """The token ids of an encoded row's prompt, without its answer."""
    prompt_length = row["labels"].count(-100)
    return row["input_ids"][:prompt_length]


# ---- files and prompts ----
def test_train_and_dev_share_no_row_and_each_task_is_scored_on_its_own_file(tmp_path):
    """One file trains eight tasks. Its seeded tenth is dev, so the scored file chooses nothing."""
    splits = load_task("reason/arc_e", write_reasoning(tmp_path, test=REASONING[:3]))
    sizes = {split: len(examples) for split, examples in splits.items()}
    assert sizes == {"train": 9, "dev": 1, "test": 3}
    ids = [example.idx for example in splits["train"] + splits["dev"]]
    assert sorted(ids) == list(range(10))
    assert load_task("reason/arc_e", str(tmp_path)) == splits
    # The tenth is the same one under the file's other name.
    folder = tmp_path / "reasoning"
    (folder / "train_commonsense.json").rename(folder / "commonsense_15k.json")
    renamed = load_task("reason/arc_e", str(tmp_path))
    assert renamed["dev"][0].fields == splits["dev"][0].fields


def test_instruction_sets_train_on_dolly_and_may_have_several_references(tmp_path):
    files = {"dolly/train": {"input": "in", "output": "one"},
             "vicuna/valid": {"output": "x"},  # which has no input column
             "sinst/valid": {"output": ["a", "b"]}}
    for name, row in files.items():
        path = tmp_path / "instruct" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        line = json.dumps({"instruction": "do", **row}) + "\n"
        path.write_text(line * 20)
    splits = load_task("instruct/s-ni", str(tmp_path))
    assert len(splits["train"]) == 18
    assert len(splits["dev"]) == 2
    assert splits["test"][0].label == ("a", "b")
    assert splits["train"][0].output == "one"
    vicuna = load_task("instruct/vicuna", str(tmp_path))
    assert vicuna["test"][0].fields == {"instruction": "do", "input": ""}


@pytest.mark.parametrize("text, says", [
    ('[{"instruction": "a", "output": "b", "answer": "answer1"},\n {"instruction"', "is not JSON"),
    ('{"instruction": "a"}', "is not a JSON list"),
    ("null", "is not a JSON list"),
    ("[1]", "json:1 is not a JSON object"),
    ("[]", "train_commonsense.json has no rows"),
    ('[{"instruction": "a", "output": "b", "answer": "true"}]', "has one row"),
    ('[{"output": "b", "answer": "true"}]', ":1 has no text 'instruction'"),
    ('[{"instruction": "a", "answer": "true"}]',
     ":1 has no text 'output' or 'answer': found input, instr"),
    ('[{"instruction": "a", "output": [], "answer": "true"}]',
     ":1 has no text 'output' or 'answer'"),
    ('[{"instruction": "a", "output": "b", "answer": {}}]',
     ":1 has no text 'output' or 'answer'"),
    ('[{"instruction": "a", "output": "b", "answer": "perhaps"}]',
     ":1 has the answer 'perhaps': expected"),
])
def test_a_broken_file_is_told_in_one_line_that_names_the_item(tmp_path, text, says):
    root = write_reasoning(tmp_path)
    (tmp_path / "reasoning/train_commonsense.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_task("reason/arc_e", root)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_reasoning_file_is_told_with_the_folder_that_is_wanted(tmp_path):
    with pytest.raises(UserError, match="train_commonsense.json is missing: give --data-dir the "
                                        "folder that holds reasoning/ with"):
        load_task("reason/arc_e", str(tmp_path))
    with pytest.raises(UserError, match="no official archive: put instruct/dolly/"):
        load_task("instruct/dolly", None, str(tmp_path))


def test_the_prompt_is_alpacas_with_and_without_an_input():
    """Word for word what MiniLLM's files hold as `prompt`."""
    prompt = TASKS["instruct/dolly"].prompt
    without = Example({"instruction": "Name a fish.", "input": ""}, None, 0, "")
    assert prompt(without) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\nName a fish.\n\n"
        "### Response:\n")
    with_input = Example({"instruction": "Sum it up.", "input": "A {b}."}, None, 0, "")
    assert prompt(with_input) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSum it up.\n\n"
        "### Input:\nA {b}.\n\n"
        "### Response:\n")


# ---- what is learnt: the answer's tokens, and nothing else ----
def test_the_loss_is_on_the_answers_tokens_token_by_token(student):
    """-100 stands for every token of the prompt; then come the output and end-of-text."""
    made, rows, _ = student()
    tokenizer = made.tokenizer
    for row, example in zip(rows, REASONING):
        prompt = tokenizer(ALPACA[0].format(instruction=example[0]))["input_ids"]
        answer = tokenizer(example[1])["input_ids"] + [tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + answer
        assert row["labels"] == [-100] * len(prompt) + answer


def test_labels_decide_what_a_student_returns(student, model_folder):
    """A student that generates returns its answers' losses only where it is given answers."""
    made, rows, _ = student()
    batch = collate(rows[:3], 0)
    with torch.no_grad():
        out = made(**batch)
        del batch["labels"]
        without = made(**batch)
    assert type(out) is AnswerOutputs
    width = len(made.vocabulary)
    assert [tuple(x.shape) for x in out] == [(3, width), (3, width), (3, 16), (3,)]
    assert type(without) is Outputs
    encoder = build_student(model_folder("bert"), 2, 8)
    assert type(encoder(torch.tensor([[2, 4, 3]]), torch.ones(1, 3))) is Outputs


def test_how_much_of_a_prompt_is_read_does_not_depend_on_its_answer(causal_folder, examples):
    """Else a test prompt would betray the length of the answer.

    An answer that is too long is cut, its end-of-text with it.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal_folder())
    short = examples[0]._replace(output="a")
    long = examples[0]._replace(output="the correct answer " * 40)
    rows, cut = encode(TASK, [short, long], tokenizer, 80, True, 20)
    prompts = [prompt_ids(row) for row in rows]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 60
    assert len(rows[1]["input_ids"]) == 80
    assert cut == 2
    # A field was shortened, not the filled prompt.
    assert tokenizer.decode(prompts[0]).endswith("### Response:\n")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_answer_losses_and_bags_against_a_loop_over_positions(student, family):
    """Oracle: one example at a time, no padding, the library's logits, float64 probabilities."""
    made, rows, _ = student(family)
    batch = collate(rows[:4], 0)
    with torch.no_grad():
        out = made(**batch)
    for i, row in enumerate(rows[:4]):
        ids = torch.tensor([row["input_ids"]])     # (1, L)
        with torch.no_grad():
            whole = made.lm(input_ids=ids, output_hidden_states=True)
        p = whole.logits[0].double().softmax(-1)   # (L, V)
        first = row["labels"].count(-100)
        positions = range(first, ids.size(1))
        expected = -sum(math.log(p[t - 1, ids[0, t]]) for t in positions) / len(positions)
        assert out.answer_loss[i].item() == pytest.approx(expected, rel=1e-5)
        bag = sum(p[t - 1, made.vocabulary] for t in positions) / len(positions)  # (V_a,)
        torch.testing.assert_close(out.logits[i].exp().double(), bag, rtol=1e-4, atol=1e-9)
        h_s = whole.hidden_states[-1][0, first - 1]  # the last prompt token's
        p_s = made.heads["projection"](h_s)
        torch.testing.assert_close(out.proj[i], p_s, rtol=1e-4, atol=1e-6)


def test_no_logits_are_made_for_prompt_positions(student):
    """(B, L, V) of them would be gigabytes at 512 tokens and 128,000 words.

    The vocabulary head sees the states of answers alone.
    """
    made, rows, _ = student()
    seen = []
    made.lm.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    made(**collate(rows[:4], 0))
    answer_tokens = 0
    for row in rows[:4]:
        answer_tokens += len(row["labels"]) - row["labels"].count(-100)
    assert seen == [(answer_tokens, len(made.tokenizer))]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_left_and_right_padding_agree_and_a_batch_generates_what_each_prompt_does_alone(
        student, family):
    made, rows, _ = student(family)
    lengths = (9, 30, 17)
    prompts = [{"input_ids": prompt_ids(row)[-n:]} for row, n in zip(rows, lengths)]
    left = collate(prompts, 0, "left")
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(0)       # (B, L)
    with torch.no_grad():
        by_left = made.lm(**left, position_ids=positions).logits[:, -1]  # (B, V)
        by_right = made(**collate(prompts, 0)).logits                  # (B, V_a)
    by_left = by_left.log_softmax(-1)[:, made.vocabulary]              # (B, V_a)
    torch.testing.assert_close(by_left, by_right, rtol=1e-4, atol=1e-5)
    assert made.generate(prompts) == [made.generate([prompt])[0] for prompt in prompts]


def test_sampling_follows_the_seed_and_greedy_does_not(student):
    made, rows, _ = student()

    def sample(seed, temperature):
        torch.manual_seed(seed)
        return made.generate(rows, temperature=temperature)

    assert sample(1, 1.0) == sample(1, 1.0)
    assert sample(1, 1.0) != sample(2, 1.0)
    assert sample(1, 0) == sample(2, 0)
    assert sample(1, 0) == sample(1, 1e-4)  # cold sampling takes the likeliest


def test_a_checkpoints_own_way_of_generating_is_not_taken_over(student, causal_folder, tmp_path):
    """LLaMA's folders come with sampling switched on: answers would differ from run to run."""
    made, rows, _ = student()
    folder = tmp_path / "samples"
    shutil.copytree(causal_folder(), folder)
    way = transformers.GenerationConfig(do_sample=True, repetition_penalty=9.0, max_length=40)
    way.save_pretrained(folder)
    samples = build_student(str(folder), 2, 16, vocabulary=(5, 6), max_new_tokens=12)
    assert samples.generate(rows) == made.generate(rows)


# ---- the aligner over an answer vocabulary ----
def test_one_answer_position_and_labels_for_a_vocabulary_are_classification():
    """Then o_s is the logits up to a constant, which neither softmax nor cross entropy sees."""
    logits = torch.randn(6, 50)                # (B, V)
    vocabulary = torch.tensor([7, 3, 20])      # (V_a,)
    answer = torch.tensor([0, 2, 1, 1, 0, 2])  # (B,), as classes, that is columns of V_a
    tokens = vocabulary[answer]                # (B,)
    losses, o_s = answer_losses(logits, tokens, [1] * 6, vocabulary)
    torch.testing.assert_close(losses, F.cross_entropy(logits, tokens, reduction="none"))
    torch.testing.assert_close(o_s.softmax(-1), logits[:, vocabulary].softmax(-1))
    y = bag_labels([[token] for token in tokens.tolist()], vocabulary.tolist())
    torch.testing.assert_close(y, F.one_hot(answer, 3).float())
    torch.testing.assert_close(task_loss(o_s, y), F.cross_entropy(logits[:, vocabulary], answer))


def test_bags_are_distributions_over_the_most_frequent_answer_tokens():
    bags = [[5, 5, 9], [5, 9], [8], []]
    vocabulary = answer_vocabulary(bags, size=2)
    assert vocabulary == [5, 9]
    y = bag_labels(bags, vocabulary)
    expected = torch.tensor([[2 / 3, 1 / 3], [0.5, 0.5], [0, 0], [0, 0]])
    torch.testing.assert_close(y, expected, atol=0, rtol=1e-6)
    # A row without a known token asks for nothing: no loss, no gradient.
    o = torch.zeros(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(task_loss(o, y), o)
    assert gradient[2:].abs().max() == 0
    assert gradient[0].abs().max() > 0


def test_the_bag_holds_the_tokens_that_the_output_is_made_of(student, examples):
    """To a BPE "answer2" and " answer2" are other tokens.

    A bag of the first asks for what nobody says.
    """
    made, rows, _ = student()
    tokenizer = made.tokenizer
    bags = answer_bags(TASK, examples, tokenizer)
    for bag, row, example in zip(bags, rows, REASONING):
        assert tokenizer.decode(bag).strip() == example[2]
        assert set(bag) <= set(row["labels"])
        assert bag != tokenizer(example[2])["input_ids"]

    absent = examples[0]._replace(output="15 apples", label=("5",))  # 15 does not spell 5
    assert answer_bags(TASK, [absent], tokenizer) == [[]]

    number = examples[0]._replace(output="1 + 1 = 72. The answer is 72.", label=("72.0",))
    (bag,) = answer_bags(TASK, [number], tokenizer)
    assert tokenizer.decode(bag).strip() == "72"

    dolly = examples[0]._replace(output="one two", label=("one two",))
    (bag,) = answer_bags(TASKS["instruct/dolly"], [dolly], tokenizer)
    assert tokenizer.decode(bag) == "one two"


def test_output_kl_against_a_loop_and_zero_where_both_agree():
    o_t = torch.randn(4, 6)
    o_s = torch.randn(4, 6)
    T = 3.0
    p = (o_t / T).softmax(-1)
    q = (o_s / T).softmax(-1)
    divergence = 0
    for b in range(4):
        for v in range(6):
            divergence += p[b, v] * (p[b, v] / q[b, v]).log()
    torch.testing.assert_close(output_kl(o_t, o_s, T), T**2 * divergence / 4)
    torch.testing.assert_close(output_kl(o_t, o_t + 2, T), torch.tensor(0.0))
    assert output_kl(o_t.half(), o_s.half(), T).dtype == torch.float32


def test_over_a_thousand_tokens_the_gradient_of_the_mse_vanishes_and_the_kls_does_not():
    """Why a generation task has another L_output: 1,000 soft labels are a thousandth each."""
    torch.manual_seed(0)
    o_t = torch.randn(32, 1000)
    y = torch.randint(1000, (32,))
    o_s = torch.randn(32, 1000, requires_grad=True)

    def norm(loss):
        (gradient,) = torch.autograd.grad(loss, o_s)
        return gradient.norm().item()

    cross_entropy = norm(F.cross_entropy(o_s, y))
    assert norm(output_loss(o_t, o_s, 5.0)) < 1e-4 * cross_entropy
    assert norm(output_kl(o_t, o_s, 5.0)) > 1e-2 * cross_entropy


def test_student_loss_adds_the_answers_cross_entropy_at_full_weight_and_takes_the_kl():
    """alpha trades soft labels for true ones. How to write is in no soft label: it has no such
    weight, and with alpha 1 the answers are still learnt."""
    def random_outputs():
        return Outputs(torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 3))

    out = random_outputs()
    target = random_outputs()
    y = torch.rand(4, 6).softmax(-1)
    answer = torch.tensor(2.5)
    total, parts = student_loss(out, target, y, alpha=0.3, beta=2.0, gamma=0.7, temperature=5.0,
                                kind="manifold", answer_loss=answer)
    main_task = F.cross_entropy(out.logits, y)
    aux_task = F.cross_entropy(out.aux_logits, y)
    task = main_task + 0.7 * aux_task
    kl = 0.7 * output_kl(target.aux_logits, out.aux_logits, 5.0)
    assert list(parts) == ["task", "output", "manifold", "answer"]
    torch.testing.assert_close(parts["answer"], answer)
    torch.testing.assert_close(parts["task"], task)
    torch.testing.assert_close(parts["output"], kl)
    torch.testing.assert_close(total, answer + 0.7 * task + 0.3 * kl + 2 * parts["manifold"])


def test_no_soft_label_reaches_the_language_models_own_logits():
    """They are what it writes with. A teacher that knows nothing of the texts still has a bag."""
    o_s = torch.randn(4, 6, requires_grad=True)
    a_s = torch.randn(4, 6, requires_grad=True)
    out = Outputs(o_s, a_s, torch.randn(4, 3))
    target = Outputs(torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 3))
    y = torch.rand(4, 6).softmax(-1)
    _, parts = student_loss(out, target, y, alpha=0.5, beta=1, gamma=1, temperature=1,
                            kind="manifold", answer_loss=torch.tensor(2.5))
    of_main, of_aux = torch.autograd.grad(parts["output"], (o_s, a_s), allow_unused=True)
    assert of_main is None
    assert of_aux.norm() > 1e-2


def test_gradients_of_the_answers_losses():
    """gradcheck in float64, answers of different lengths."""
    logits = torch.randn(5, 7, dtype=torch.double, requires_grad=True)
    tokens = torch.tensor([1, 2, 0, 6, 3])
    vocabulary = torch.tensor([2, 5, 6])
    assert torch.autograd.gradcheck(lambda x: answer_losses(x, tokens, [2, 3], vocabulary), logits)


# ---- LoRA ----
def loosened(made):
    """Fill each B, zero at first, with random numbers, so that the adapters do something."""
    for module in made.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_B.weight)
    return made


def test_lora_is_exact_at_initialisation_and_draws_nothing_from_other_weights(student):
    plain, rows, _ = student()
    adapted, _, _ = student(lora=4)
    batch = collate(rows, 0)
    with torch.no_grad():
        for expected, value in zip(plain(**batch), adapted(**batch)):
            assert torch.equal(expected, value)


def total_loss(made, rows, y):
    """L_S without a teacher, and a term for p_s, which nothing else would reach."""
    o_s, a_s, p_s, losses = made(**collate(rows, 0))
    total, _ = student_loss(Outputs(o_s, a_s, p_s), None, y, alpha=0, beta=0, gamma=1,
                            temperature=1, kind="manifold", answer_loss=losses.mean())
    return total + p_s.square().mean()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_only_adapters_and_heads_train_with_the_gradients_of_the_merged_map(
        student, family, checkpoint, monkeypatch):
    """Oracle: W' = W + s B A gives dB = s dW' A^T and dA = s B^T dW'."""
    # A merged map has no dropout to share.
    monkeypatch.setattr(F, "dropout", lambda x, *args, **kwargs: x)
    made, rows, y = student(family, lora=4)
    loosened(made).train()
    plain, _, _ = student(family, lora=4)
    plain.load_state_dict(made.state_dict())
    plain.merge().requires_grad_(True)
    if checkpoint:
        made.checkpoint_gradients()
    total_loss(made, rows, y).backward()
    total_loss(plain, rows, y).backward()

    for name, value in made.named_parameters():
        is_trained = ".lora_" in name or name.startswith("heads.")
        assert value.requires_grad == is_trained
        assert (value.grad is not None) == is_trained
    for name, lora in made.named_modules():
        if isinstance(lora, LoRA):
            A = lora.lora_A.weight  # (r, in)
            B = lora.lora_B.weight  # (out, r)
            dW = plain.get_submodule(name).weight.grad  # (out, in)
            torch.testing.assert_close(A.grad, lora.scale * B.T @ dW, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(B.grad, lora.scale * dW @ A.T, rtol=1e-3, atol=1e-5)
    for a, b in zip(made.heads.parameters(), plain.heads.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_merged_equals_unmerged_and_is_saved_as_an_ordinary_model(student, tmp_path):
    made, rows, _ = student(lora=4)
    loosened(made)
    batch = collate(rows, 0)
    with torch.no_grad():
        before = made(**batch)
        unmerged = copy.deepcopy(made)
        after = made.merge()(**batch)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.answer_loss, before.answer_loss, rtol=1e-5, atol=1e-5)
    # In train mode the adapters, and they alone, have dropout.
    assert not torch.equal(unmerged.train()(**batch).answer_loss, before.answer_loss)

    made.save(tmp_path)
    lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert lm.config.model_type == "llama"
    with torch.no_grad():
        loaded = load_student(tmp_path)(**batch)
    torch.testing.assert_close(loaded.answer_loss, after.answer_loss)


def written_by_hand(made, row):
    """What greedy generation is, without a cache: the whole text is read again for each token."""
    ids = prompt_ids(row)
    new_ids = []
    for _ in range(made.settings["max_new_tokens"]):
        with torch.no_grad():
            logits = made.lm(torch.tensor([ids + new_ids])).logits[0, -1]  # (V,)
        new_ids.append(logits.argmax().item())
        if new_ids[-1] == made.tokenizer.eos_token_id:
            break
    return made.tokenizer.decode(new_ids, skip_special_tokens=True).strip()


def weights_of(made):
    return {name: value.clone() for name, value in made.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_lora_is_called_while_generating_and_the_texts_are_those_of_the_unmerged_student(
        student, family, monkeypatch):
    """A token of 32 layers with LoRA costs hundreds of calls more, each of hardly any work."""
    made, rows, _ = student(family, lora=4)
    loosened(made)
    expected = [written_by_hand(made, row) for row in rows]
    monkeypatch.setattr(LoRA, "forward", lambda *_: pytest.fail("a LoRA was called"))
    assert made.generate(rows) == expected
    with torch.inference_mode():
        assert made.generate(rows) == expected


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_after_generating_weights_modules_and_mode_are_what_they_were(
        student, rounded, fails, monkeypatch):
    """Bit for bit, and also where it stops in the middle: training goes on with these weights."""
    made, rows, _ = student(lora=4)
    loosened(made).train()
    if rounded:
        made.round_frozen_weights()
    before = weights_of(made)
    modules = dict(made.named_modules())
    generated_from = []

    def generate(**how):
        generated_from.append(weights_of(made))
        if fails:
            raise KeyboardInterrupt
        return how["input_ids"]

    monkeypatch.setattr(made.lm, "generate", generate)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            made.generate(rows)
    else:
        made.generate(rows)
    after = made.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert dict(made.named_modules()) == modules
    assert all(module.training for module in made.modules())
    merged = generated_from[0]
    name = "lm.model.layers.0.self_attn.q_proj"
    assert not torch.equal(merged[f"{name}.weight"], before[f"{name}.base.weight"])


def test_a_rounded_base_is_merged_with_one_rounding():
    """W + s B A may be much smaller than either, and still is off by its own rounding alone."""
    linear = torch.nn.Linear(64, 64, bias=False)
    lora = LoRA(linear, 4)
    torch.nn.init.normal_(lora.lora_B.weight)
    down = lora.lora_A.weight.detach().double()
    up = lora.lora_B.weight.detach().double()
    update = lora.scale * up @ down
    linear.weight.data = (torch.randn(64, 64) * 0.01 - update).bfloat16()
    exact = linear.weight.detach().double() + update             # (64, 64)
    merged = lora.merged().weight.detach().double()
    half_a_step = exact.abs() * 2.0**-8                          # bf16 keeps 8 digits
    assert ((merged - exact).abs() <= half_a_step + 1e-6).all()  # and float32's rounding


def test_a_saved_adapter_is_loaded_again_with_its_base(student, tmp_path):
    made, rows, _ = student(lora=4)
    loosened(made).save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()  # the base stays where it is
    again = load_student(tmp_path)
    assert again.generate(rows) == made.generate(rows)
    batch = collate(rows, 0)
    with torch.no_grad():
        assert torch.equal(again(**batch).answer_loss, made(**batch).answer_loss)


def test_a_bf16_base_keeps_float32_adapters_and_nearly_the_same_losses(student):
    made, rows, _ = student(lora=4)
    batch = collate(rows, 0)
    with torch.no_grad():
        expected = loosened(made)(**batch).answer_loss
    made.round_frozen_weights()
    with torch.autocast("cpu", torch.bfloat16):
        losses = made(**batch).answer_loss
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)
    losses.mean().backward()
    for module in made.modules():
        if isinstance(module, LoRA):
            assert module.lora_A.weight.grad.dtype == torch.float32
            assert module.base.weight.dtype == torch.bfloat16
    with torch.no_grad():
        made(**batch)  # without autocast too


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "opt", "llama"])
def test_lora_fits_classification_students_of_every_family(model_folder, family):
    made = build_student(model_folder(family), 3, 8, lora=2)
    x = made.tokenizer(["a man is sleeping", "two dogs"], padding=True, return_tensors="pt")
    made(x["input_ids"], x["attention_mask"]).logits.sum().backward()
    assert any(isinstance(module, LoRA) for module in made.modules())
    for name, value in made.lm.named_parameters():
        assert (value.grad is not None) == (".lora_" in name)


def test_peft_opens_a_saved_adapter_to_the_same_outputs(student, model_folder, causal_folder,
                                                        tmp_path):
    """The files are PEFT's own format, so a LoRA trained here serves wherever PEFT does."""
    peft = pytest.importorskip("peft")
    made, rows, _ = student(lora=4)
    loosened(made).save(tmp_path / "causal")
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_folder())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "causal").eval()
    batch = collate(rows, 0)
    del batch["labels"]
    with torch.no_grad():
        logits = theirs(**batch).logits
        expected = made.lm(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    encoder = loosened(build_student(model_folder("bert"), 3, 8, lora=2)).eval()
    encoder.save(tmp_path / "bert")
    base = transformers.AutoModel.from_pretrained(model_folder("bert"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "bert").eval()
    x = encoder.tokenizer(["a man is sleeping"], return_tensors="pt")
    with torch.no_grad():
        pooled = theirs(**x).pooler_output
        expected = encoder.lm(**x).pooler_output
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


# ---- scoring ----
@pytest.mark.parametrize("text, reference, expected", [
    ("the correct answer is answer2", "answer1", "answer2"),
    ("answer2", "answer1", "answer2"),
    ("The answer is Answer3: the plants. answer1 is wrong.", "answer1", "answer3"),
    ("Answer1 is wrong, hence answer2.", "answer1", "answer2"),
    ("answer12", "answer1", None),
    ("I do not know.", "solution1", None),
    ("the correct answer is False.", "true", "false"),
    ("untrue", "true", None),
    ("option1", "answer1", None),                       # another family's word
    ("The answer is 1,234.50.", "72.0", "1234.50"),
    ("The answer is $72.", "72.0", "72"),
    ("The answer is 49 - 34 = 15.\nNot 16.", "15", "15"),
    ("48/2 = 24 clips, 24+48 = 72 clips", "72.0", "72"),
    ("He lost 3, so -5", "1", "-5"),
    ("10-3=7. The answer is 7. 8 is wrong", "7", "7"),
    ("", "7", None),
    ("A man has 3 coins. The answer is (D).", "A", "D"),  # not the article
    ("A: Sam bought 13. So B", "A", "B"),
])
def test_answers_are_extracted_by_the_references_family(text, reference, expected):
    answer = extract_answer(text, reference)
    if expected is None:
        assert answer is None
    else:
        assert answer == expected.lower()


def test_accuracy_compares_numbers_as_numbers_and_counts_what_could_not_be_read():
    outputs = ["The answer is 1,234.50.", "no idea", "It is 7", "about 3.0004"]
    references = [("1,234.5",), ("3",), ("8.0",), ("3",)]
    metrics = compute_metrics("reason/gsm8k", outputs, references)
    assert metrics == {"accuracy": 0.5, "answered": 0.75}
    metrics = compute_metrics("reason/boolq", ["True"], [("true",)])
    assert metrics == {"accuracy": 1.0, "answered": 1.0}


def test_rouge_l_by_hand_and_equal_to_the_package_without_its_stemmer():
    """F1 of the longest common subsequence.

    "the cat sat" in "the black cat sat down" is 3 of 3 words and 3 of 5.
    """
    assert rouge_l("the cat sat", "The black cat sat, down!") == pytest.approx(2 * 3 / (3 + 5))
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert rouge_l("", "") == 0
    assert rouge_l("a", "") == 0
    metrics = compute_metrics("instruct/s-ni", ["a b"], [("c", "a b")])
    assert metrics["rouge_l_unstemmed"] == 1  # of the best reference

    package = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = package.RougeScorer(["rougeL"], use_stemmer=False)
    texts = ["The cats' 3.5 tails, running", "a-b running cat tails", "cat",
             "Über 3 5 the tails the"]
    for a in texts:
        for b in texts:
            assert rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)
    metrics = compute_metrics("instruct/dolly", ["a"], [("a",)])
    assert set(metrics) == {"rouge_l", "rouge_l_unstemmed"}


# ---- end to end ----
WORDS = ["red", "green", "blue", "black", "white", "grey", "pink", "gold", "dull"]
ROWS = []  # (instruction, output, answer)
for i, word in enumerate(WORDS):
    answer = f"answer{1 + i % 3}"
    ROWS.append((f"Say {word}", f"{word} {word[::-1]} the answer is {answer}", answer))


@pytest.fixture
def config(tmp_path, causal_folder):
    """A Config of the words' task: nine rows, of which one becomes dev, and all are test."""
    data_dir = write_reasoning(tmp_path, train=ROWS, test=ROWS)
    return Config(task="reason/arc_e", data_dir=data_dir, student=causal_folder(), lora=0,
                  teacher="painter", batch_size=4, max_length=128, max_new_tokens=32, device="cpu",
                  out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eight_prompts_are_learnt_and_generated_back_exactly(config, tmp_path):
    """The whole path: files, prompts, losses, checkpoint, generation, extraction."""
    config = replace(config, epochs=100, lr=5e-3, beta=0.1, eval_every=100)
    metrics = train(config)["armada"][0]
    folder = tmp_path / "run/armada/0"
    written = json_lines(folder / "predictions_test.jsonl")
    assert [line["instruction"] for line in written] == [row[0] for row in ROWS]
    outputs = [line["output"] for line in written]
    right = sum(output == row[1] for output, row in zip(outputs, ROWS))
    assert right == 8  # all but the row that is dev
    assert metrics["test"]["accuracy"] >= 8 / 9
    assert metrics["aligner"]["loss"] > 0

    log = json_lines(folder / "log.jsonl")
    untrained, trained = [line for line in log if "dev" in line]
    assert untrained["epoch"] == 0
    assert trained["dev"]["loss"] < untrained["dev"]["loss"]

    student = load_student(folder / "last")
    prompts = [ALPACA[0].format(instruction=row[0]) for row in ROWS]
    assert student.predict(prompts) == outputs
    assert [student.predict([prompt])[0] for prompt in prompts] == outputs


def test_an_adapter_file_of_other_maps_is_refused(student, tmp_path):
    made, _, _ = student(lora=4)
    made.save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    adapters = load_file(path)
    renamed = {name.replace("q_proj", "k_proj"): value for name, value in adapters.items()}
    fewer = dict(list(adapters.items())[1:])
    for tensors in (renamed, fewer, {}):
        save_file(tensors, path)
        with pytest.raises(UserError, match="adapters are other maps' than the base's: .*lora_"):
            load_student(tmp_path)


def test_the_adapters_file_names_the_maps_that_were_found(student, tmp_path):
    made, _, _ = student(lora=4)
    made.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_a_tokenizer_that_ends_texts_does_not_end_prompts(student, causal_folder, tmp_path):
    """An answer is to follow. A state that is pooled would be that of the same token each time."""
    made, rows, _ = student()
    shutil.copytree(causal_folder(), tmp_path / "ends")
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal_folder())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save_pretrained(tmp_path / "ends")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ends")
    assert tokenizer("a b")["input_ids"][-1] == 2
    for vocabulary in ((5, 6), ()):
        ends = build_student(str(tmp_path / "ends"), 2, 16, vocabulary=vocabulary)
        ends.save(tmp_path / "saved")
        for one in (ends, load_student(tmp_path / "saved")):
            for text in ("a b", ""):
                assert one.tokenizer(text)["input_ids"] == [1, *made.tokenizer(text)["input_ids"]]


def test_a_stopped_lora_run_goes_on_to_the_same_adapters(config, tmp_path, monkeypatch):
    """The checkpoint holds adapters, heads and their moments; the base stays where it is."""
    config = replace(config, lora=2, epochs=2, lr=1e-2)
    train(config)
    save = Cell.save
    saves = []

    def stop_after_the_first(cell, name="last"):
        save(cell, name)
        if name == "last" and not saves:
            saves.append(cell.done)
            raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "save", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, out=str(tmp_path / "again")))
    assert saves
    # As if the package of a metric had been installed only now.
    state = tmp_path / "again/armada/0/last/training.json"
    state.write_text(state.read_text().replace('"accuracy"', '"another"', 1))
    (state.parent / "checksum").write_text(str(training.checksum(state.parent)))
    train(Config(resume=str(tmp_path / "again")))

    whole = tmp_path / "run/armada/0"
    resumed = tmp_path / "again/armada/0"
    for name in ("last/adapter_model.safetensors", "predictions_test.jsonl"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["trained"] < metrics["parameters"] / 2


def test_without_a_teacher_the_student_is_fine_tuned_with_the_bag_of_its_own(config, tmp_path):
    """undistilled: language-model cross entropy plus task(o_s, y), and no aligner."""
    train(replace(config, arms=("undistilled",), epochs=1, eval_limit=1, sampling_temperature=1.0))
    folder = tmp_path / "run/undistilled/0"
    steps = [line for line in json_lines(folder / "log.jsonl") if "step" in line]
    for line in steps:
        assert line["role"] == "student"
        assert line["output"] == 0
        assert line["manifold"] == 0
    written = (folder / "predictions_test.jsonl").read_text()
    assert len(written.splitlines()) == 1  # --eval-limit
    # Sampling again takes the run's seed, as training did.
    evaluation.main([str(tmp_path / "run"), "--rescore"])
    assert (folder / "predictions_test.jsonl").read_text() == written


def test_arms_are_compared_on_the_tasks_own_file(tmp_path):
    """On dev, a part of the mixed training file, armada is behind here; on test it is ahead."""
    cells = {}
    for arm, ahead in (("undistilled", 0.0), ("armada", 0.1)):
        for seed in range(7):
            cells[tmp_path / f"{arm}/{seed}"] = {
                "task": "reason/arc_e",
                "arm": arm,
                "control": arm != "armada",
                "untrained": {"accuracy": 0.0},
                "dev": {"accuracy": 0.9 - ahead},
                "test": {"accuracy": 0.4 + ahead},
                "best": {"dev": {}}}
    text = evaluation.report(cells)
    assert "differences on test" in text
    assert "+10.0" in text
    assert "BEATS every control" in text


def test_one_training_is_scored_on_the_test_file_of_another_task(config, tmp_path, capsys):
    train(replace(config, epochs=1))
    run = tmp_path / "run"
    evaluation.main([str(run)])  # writes comparison.json
    shutil.copytree(tmp_path / "reasoning/ARC-Easy", tmp_path / "reasoning/ARC-Challenge")
    before = {path: path.read_text() for path in run.rglob("*.json*")}
    evaluation.main([str(run), "--task", "reason/arc_c"])
    assert "reason/arc_c" in capsys.readouterr().out
    folder = run / "armada/0"
    written = (folder / "predictions_reason_arc_c.jsonl").read_text()
    assert written == before[folder / "predictions_test.jsonl"]
    for path, text in before.items():  # the run's own files are untouched
        assert path.read_text() == text
    for task in ("reason/gsm8k", "rte"):
        with pytest.raises(SystemExit):
            evaluation.main([str(run), "--task", task])
        assert "was trained on other files, those of reason/arc_e" in capsys.readouterr().err


def test_under_bf16_a_loras_base_is_bf16_and_what_trains_is_float32(config, monkeypatch):
    students = []
    monkeypatch.setattr(training, "finish", lambda cell: students.append(cell.student))
    with pytest.raises(UserError, match="metrics.json"):  # there is none without finish()
        train(replace(config, epochs=1, lora=2, amp="bf16"))
    for value in students[0].parameters():
        expected = torch.float32 if value.requires_grad else torch.bfloat16
        assert value.dtype == expected


def test_a_press_of_ctrl_c_during_the_last_evaluation_stops_the_run(config, monkeypatch):
    evaluate = Cell.evaluate
    presses = []

    def pressed(cell, split="dev"):
        if cell.done and not presses:  # a second press would stop at once
            presses.append(cell.done)
            signal.raise_signal(signal.SIGINT)
        return evaluate(cell, split)

    monkeypatch.setattr(Cell, "evaluate", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, epochs=1, arms=("undistilled", "armada")))


def test_another_students_mistakes_are_told_before_anything_is_made(config, model_folder, tmp_path):
    mistakes = {model_folder("bert"): "reads both ways",
                model_folder("llama"): "no eos_token",
                "tiny": "--student tiny is random"}
    for student, says in mistakes.items():
        with pytest.raises(UserError, match=says):
            train(replace(config, student=student))
        assert not (tmp_path / "run").exists()


def test_what_a_library_user_may_get_wrong_is_told(student, causal_folder, tmp_path):
    made, _, _ = student("opt", lora=2)
    # Of 128 tokens 12 are the answer's.
    with pytest.raises(UserError, match="text 2 has .* tokens, 116 leave room .*: shorten it"):
        made.predict(["answer", "answer " * 600])
    with pytest.raises(UserError, match="--lora 33: the model's maps are of rank 32"):
        student(lora=33)
    config = transformers.CTRLConfig(vocab_size=40, n_embd=8, n_layer=1, n_head=1, dff=8)
    with pytest.raises(UserError, match="ctrl has no linear map named .*, but .*, Wq, Wv, dense"):
        add_lora(transformers.CTRLModel(config), 2)

    base = tmp_path / "base"
    shutil.copytree(causal_folder(), base)
    adapted = build_student(str(base), 2, 16, vocabulary=(5, 6), lora=2)
    adapted.save(tmp_path / "a" / "last")
    shutil.rmtree(base)
    with pytest.raises(UserError, match="needs the base of its LoRA, .*base: could not"):
        load_student(tmp_path / "a" / "last")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_answers_of_different_lengths_have_the_losses_that_they_have_alone(
        student, examples, family):
    """Padding is neither read nor learnt."""
    made, _, _ = student(family)
    outputs = ("the correct answer is answer1", "answer2", "it is, I think, the answer1")
    mixed = [example._replace(output=output) for example, output in zip(examples, outputs)]
    rows, _ = encode(TASK, mixed, made.tokenizer, 300, True, 32)
    assert len({len(row["input_ids"]) for row in rows}) == 3
    with torch.no_grad():
        together = made(**collate(rows, 0))
        for i, row in enumerate(rows):
            alone = made(**collate([row], 0))
            for one, many in zip(alone, together):
                torch.testing.assert_close(one[0], many[i], rtol=1e-4, atol=1e-5)


def test_of_an_answer_that_is_named_twice_the_last_naming_counts(student, examples):
    """The first one begins the output: to a BPE it is another token than the last."""
    made, _, _ = student()
    twice = examples[0]._replace(output="answer1 or answer2? It is answer1", label=("answer1",))
    (bag,) = answer_bags(TASK, [twice], made.tokenizer)
    assert made.tokenizer.decode(bag) == " answer1"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_keys_and_values_are_kept_for_a_next_token(student, family):
    """They would be gigabytes in training, where none comes."""
    made, rows, _ = student(family)
    kept = []
    made.lm.base_model.register_forward_hook(
        lambda module, args, out: kept.append(out.past_key_values))
    made(**collate(rows[:2], 0))
    assert kept == [None]


def test_of_a_lora_the_adapters_alone_are_written(student, tmp_path):
    """With its base a checkpoint of a 7B model would be 28 GB."""
    made, _, _ = student(lora=4)
    made.save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as written:
        names = list(written.keys())
    assert names
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_kl_raises_half_precision_to_float32(dtype):
    """Under autocast a_s comes in half precision, and a softmax in it would lose most digits."""
    o_t = torch.linspace(-4, 4, 24).reshape(4, 6).to(dtype)
    o_s = o_t.flip(0)
    assert output_kl(o_t, o_s, 5.0) == output_kl(o_t.float(), o_s.float(), 5.0)


# ---- say/objects: the built-in task ----
SAY = TASKS["say/objects"]


def test_say_objects_asks_what_objects_asks_and_names_the_bigger_one():
    """The same pairs on the same side of the same split, so the two tasks may be compared."""
    asked = load_task("objects")
    said = load_task("say/objects")
    assert asked.keys() == said.keys()
    for split in asked:
        for question, example in zip(asked[split], said[split], strict=True):
            assert example.fields == question.fields
            first, second = [word for word in re.findall(r"\w+", question.fields["text"])
                             if word in OBJECTS]
            bigger, answer = (first, "true") if question.label else (second, "false")
            assert example.output == f"{answer} , the {bigger} is bigger"
            assert example.label == (answer,)
            assert extract_answer(example.output, answer) == answer
            # The label is a part of the output, its bag is all of it.
            assert answer_span(SAY, example) == (0, len(example.output))
            # No frame around the question: the teacher draws the very text that objects has.
            assert SAY.prompt(example) == TASKS["objects"].prompt(question)


def test_say_objects_is_the_demonstration_of_generation_at_temperature_1():
    """Three arms and seven seeds without a flag. T = 5 is for classes: a bag flattened by it is
    nearly the same for every text."""
    say = resolve(Config(task="say/objects"))
    objects = resolve(Config(task="objects"))
    assert say.arms == ("undistilled", "armada", "shuffled")
    assert say.seeds == tuple(range(7))
    assert (say.student, say.teacher, say.lora) == ("tiny", "painter", 0)
    for name in ("lr", "epochs", "beta", "alpha", "gamma", "limit"):
        assert getattr(say, name) == getattr(objects, name), name
    assert resolve(Config(task="say/objects", lora=0)).lr == objects.lr  # which was no LoRA's
    for task in TASKS.values():
        expected = 1.0 if task.kind == "generate" else 5.0
        assert resolve(Config(task=task.name)).temperature == expected, task.name
    assert resolve(Config(task="say/objects", temperature=3.0)).temperature == 3.0


def test_tiny_that_generates_reads_left_to_right_and_writes_its_words_back():
    """A word is a token, and texts are not ended: end-of-text comes behind an answer alone."""
    texts = ["true , the lorry is bigger", "is a mouse bigger than a piano?"]
    made = build_student("tiny", 2, 16, texts=texts, vocabulary=[3, 4])
    assert made.decoder
    assert made.generates
    for text in texts:
        ids = made.tokenizer(text)["input_ids"]
        assert len(ids) == len(re.findall(r"\w+|[^\w\s]", text))
        assert made.tokenizer.eos_token_id not in ids
    assert made.tokenizer("unheard")["input_ids"] != [made.tokenizer.eos_token_id]
    rows, _ = encode(SAY, load_task("say/objects")["train"][:1], made.tokenizer, 32, True, 8)
    assert rows[0]["input_ids"][-1] == made.tokenizer.eos_token_id
    assert made.tokenizer.decode(made.tokenizer(texts[0])["input_ids"]) == texts[0]


def test_say_objects_from_the_prompt_to_the_answer_and_back(tmp_path, monkeypatch):
    """The one place where the whole path is seen to work without files: a student learns to say
    sentences, is saved, stopped, resumed, loaded and asked again."""
    config = Config(task="say/objects", arms="armada", seeds="0", limit=16, eval_limit=16,
                    batch_size=8, epochs=50, eval_every=25, out=str(tmp_path / "run"))
    metrics = train(config)["armada"][0]
    whole = tmp_path / "run/armada/0"
    learnt = load_task("say/objects")["train"][:16]
    student = load_student(whole / "last")
    outputs = student.predict([SAY.prompt(example) for example in learnt])
    assert outputs == [example.output for example in learnt]
    answers = [extract_answer(output, "true") for output in outputs]
    assert compute_metrics("say/objects", outputs, [example.label for example in learnt]) == {
        "accuracy": 1.0, "answered": 1.0}
    assert set(answers) == {"true", "false"}

    # What the run wrote is what the loaded student says of dev.
    written = json_lines(whole / "predictions_dev.jsonl")
    said = student.predict([line["text"] for line in written])
    assert [line["output"] for line in written] == said
    right = [line["answer"] in line["references"] for line in written]
    assert metrics["dev"]["accuracy"] == pytest.approx(sum(right) / len(right))
    steps = [line for line in json_lines(whole / "log.jsonl") if line.get("role") == "student"]
    last = steps[-1]
    assert last["loss"] == pytest.approx(
        last["answer"] + 0.5 * last["task"] + 0.5 * last["output"] + 20 * last["manifold"],
        rel=1e-3)

    save = Cell.save

    def stop_halfway(cell, name):
        save(cell, name)
        if name == "last":
            raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "save", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, out=str(tmp_path / "again")))
    monkeypatch.undo()
    train(Config(resume=str(tmp_path / "again")))
    resumed = tmp_path / "again/armada/0"
    for name in ("last/model.safetensors", "last/heads.safetensors", "predictions_test.jsonl"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_tiny_generates_from_built_in_words_alone(config, capsys):
    """Elsewhere its words would be those of a prompt's frame, and most of an answer unknown."""
    with pytest.raises(UserError, match="--student tiny is random"):
        resolve(replace(config, student="tiny"))
    training.main(["--task", "say/objects", "--plan"])
    told = capsys.readouterr().out
    assert "plan: say/objects, student tiny, teacher painter" in told
    limit = resolve(Config(task="say/objects")).limit
    texts = training.tiny_texts(SAY, load_task("say/objects")["train"][:limit])
    words = tiny_tokenizer(texts, True)
    made = build_student("tiny", len(words), 1024, texts, vocabulary=range(len(words)))
    assert f"parameters: {training.count_parameters(made):,}, " in told
    assert "64 tokens each, 16 of them an answer's" in told


def test_verdicts_of_a_built_in_task_are_those_of_dev(tmp_path):
    """Its dev split is its own, and test is where it was tuned."""
    cells = {}
    for arm, ahead in (("undistilled", 0.0), ("armada", 0.1)):
        for seed in range(7):
            cells[tmp_path / f"{arm}/{seed}"] = {
                "task": "say/objects", "arm": arm, "control": arm != "armada",
                "untrained": {"accuracy": 0.0}, "dev": {"accuracy": 0.6 + ahead},
                "test": {"accuracy": 0.6}, "best": {"dev": {}}}
    text = evaluation.report(cells)
    assert "differences paired" in text
    assert "differences on test" not in text
    assert "+10.0" in text


def test_a_new_adapter_can_learn(student):
    """B is zero, so that nothing changes at first, and A is not: were both, neither would ever get
    a gradient."""
    made, rows, y = student(lora=4)
    total_loss(made, rows, y).backward()
    adapters = [module for module in made.modules() if isinstance(module, LoRA)]
    assert len(adapters) == 4  # queries and values of two layers
    for adapter in adapters:
        assert adapter.lora_B.weight.grad.abs().max() > 0
