"""Generation tasks and LoRA: what is learnt, what the aligner predicts, what is generated, how it scores."""
import copy
import json
import math
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

import eval as evaluation
import train as training
from data import (ALPACA, TASKS, Example, UserError, answer_bags, answer_vocabulary, bag_labels, collate,
                  encode, load_task)
from eval import compute_metrics, extract_answer, rouge_l
from losses import answer_losses, output_kl, output_loss, student_loss, task_loss
from student import LoRA, add_lora, build_student, load_student
from tests.conftest import REASONING, write_reasoning
from train import Cell, Config, train

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

# ---- files and prompts -------------------------------------------------------------------------------------
def test_train_and_dev_share_no_row_and_each_task_is_scored_on_its_own_file(tmp_path):
    """One file trains eight tasks. Its seeded tenth is dev, so the scored file chooses nothing."""
    splits = load_task("reason/arc_e", write_reasoning(tmp_path, test=REASONING[:3]))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 9, "dev": 1, "test": 3}
    ids = [example.idx for split in ("train", "dev") for example in splits[split]]
    assert sorted(ids) == list(range(10))
    again = load_task("reason/arc_e", str(tmp_path))
    assert again == splits
    (tmp_path / "reasoning/train_commonsense.json").rename(tmp_path / "reasoning/commonsense_15k.json")
    assert load_task("reason/arc_e", str(tmp_path))["dev"][0].fields == splits["dev"][0].fields

def test_instruction_sets_train_on_dolly_and_may_have_several_references(tmp_path):
    for name, row in (("dolly/train", {"input": "in", "output": "one"}), ("vicuna/valid", {"output": "x"}),
                      ("sinst/valid", {"output": ["a", "b"]})):  # vicuna has no input column
        path = tmp_path / "instruct" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text((json.dumps({"instruction": "do", **row}) + "\n") * 20)
    splits = load_task("instruct/s-ni", str(tmp_path))
    assert (len(splits["train"]), len(splits["dev"])) == (18, 2)
    assert splits["test"][0].label == ("a", "b") and splits["train"][0].output == "one"
    assert load_task("instruct/vicuna", str(tmp_path))["test"][0].fields == {"instruction": "do", "input": ""}

@pytest.mark.parametrize("text, says", [
    ('[{"instruction": "a", "output": "b", "answer": "answer1"},\n {"instruction"', "is not JSON"),
    ('{"instruction": "a"}', "is not a list of JSON objects"), ("[1]", "json:1 is not a JSON object"),
    ("[]", "train_commonsense.json has no rows"), ("null", "is not a list of JSON objects"),
    ('[{"instruction": "a", "output": [], "answer": "true"}]', ":1 has no text 'output' or 'answer'"),
    ('[{"instruction": "a", "output": "b", "answer": "true"}]', "has one row"),
    ('[{"instruction": "a", "answer": "true"}]', ":1 has no text 'output' or 'answer': found input, instr"),
    ('[{"instruction": "a", "output": "b", "answer": true}]', ":1 has no text 'output' or 'answer'"),
    ('[{"output": "b", "answer": "true"}]', ":1 has no text 'instruction'"),
    ('[{"instruction": "a", "output": "b", "answer": "perhaps"}]', ":1 has the answer 'perhaps': expected"),
])
def test_a_broken_file_is_told_in_one_line_that_names_the_item(tmp_path, text, says):
    root = write_reasoning(tmp_path)
    (tmp_path / "reasoning/train_commonsense.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_task("reason/arc_e", root)
    assert says in str(error.value) and "\n" not in str(error.value)

def test_a_missing_reasoning_file_is_told_with_the_folder_that_is_wanted(tmp_path):
    with pytest.raises(UserError, match="train_commonsense.json is missing: give --data-dir the folder that "
                                        "holds reasoning/ with"):
        load_task("reason/arc_e", str(tmp_path))
    with pytest.raises(UserError, match="no official archive: put instruct/dolly/"):
        load_task("instruct/dolly", None, str(tmp_path))

def test_the_prompt_is_alpacas_with_and_without_an_input():
    """Word for word what MiniLLM's files hold as `prompt`."""
    prompt = TASKS["instruct/dolly"].prompt
    assert prompt(Example({"instruction": "Name a fish.", "input": ""}, None, 0, "")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a fish.\n\n### Response:\n")
    assert prompt(Example({"instruction": "Sum it up.", "input": "A {b}."}, None, 0, "")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSum it up.\n\n"
        "### Input:\nA {b}.\n\n### Response:\n")

# ---- what is learnt: the answer's tokens, and nothing else -------------------------------------------------
def test_the_loss_is_on_the_answers_tokens_token_by_token(student):
    """-100 stands for every token of the prompt; then come the output and end-of-text, in this order."""
    made, rows, _ = student()
    tokenizer = made.tokenizer
    for row, example in zip(rows, REASONING):
        prompt = tokenizer(ALPACA[0].format(instruction=example[0]))["input_ids"]
        answer = tokenizer(example[1])["input_ids"] + [tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + answer and row["labels"] == [-100] * len(prompt) + answer

def test_how_much_of_a_prompt_is_read_does_not_depend_on_its_answer(causal_folder, examples):
    """Else a test prompt would betray the length of the answer. One too long is cut, its end with it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal_folder())
    short, long = (examples[0]._replace(output=text) for text in ("a", "the correct answer " * 40))
    rows, cut = encode(TASK, [short, long], tokenizer, 80, True, 20)
    prompts = [row["input_ids"][:row["labels"].count(-100)] for row in rows]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 60 and len(rows[1]["input_ids"]) == 80 and cut == 2
    assert tokenizer.decode(prompts[0]).endswith("### Response:\n")  # the field was shortened, not the prompt

@pytest.mark.parametrize("family", ["llama", "opt"])
def test_answer_losses_and_bags_against_a_loop_over_positions(student, family):
    """Oracle: one example at a time, no padding, the library's own logits, probabilities in float64."""
    made, rows, _ = student(family)
    batch = collate(rows[:4], 0)
    with torch.no_grad():
        out, losses = made(**batch)
    for i, row in enumerate(rows[:4]):
        ids, first = torch.tensor([row["input_ids"]]), row["labels"].count(-100)
        with torch.no_grad():
            whole = made.lm(input_ids=ids, output_hidden_states=True)
        p = whole.logits[0].double().softmax(-1)
        positions = range(first, ids.size(1))
        expected = -sum(math.log(p[t - 1, ids[0, t]]) for t in positions) / len(positions)
        assert losses[i].item() == pytest.approx(expected, rel=1e-5)
        bag = sum(p[t - 1, made.vocabulary] for t in positions) / len(positions)
        torch.testing.assert_close(out.logits[i].exp().double(), bag, rtol=1e-4, atol=1e-9)
        h_s = whole.hidden_states[-1][0, first - 1]  # the last prompt token's
        torch.testing.assert_close(out.proj[i], made.heads["projection"](h_s), rtol=1e-4, atol=1e-6)

def test_no_logits_are_made_for_prompt_positions(student):
    """(B, L, V) would be gigabytes at 512 tokens and 128,000 words: the head sees answers' states alone."""
    made, rows, _ = student()
    seen = []
    made.lm.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    made(**collate(rows[:4], 0))
    answers = sum(label != -100 for row in rows[:4] for label in row["labels"])
    assert seen == [(answers, len(made.tokenizer))]

@pytest.mark.parametrize("family", ["llama", "opt"])
def test_left_and_right_padding_agree_and_a_batch_generates_what_each_prompt_does_alone(student, family):
    made, rows, _ = student(family)
    prompts = [{"input_ids": row["input_ids"][row["labels"].count(-100) - n:row["labels"].count(-100)]}
               for row, n in zip(rows, (9, 30, 17))]
    left, right = collate(prompts, 0, "left"), collate(prompts, 0)
    with torch.no_grad():
        by_left = made.lm(**left, position_ids=(left["attention_mask"].cumsum(-1) - 1).clamp(0)).logits[:, -1]
        by_right = made(**right).logits
    torch.testing.assert_close(by_left.log_softmax(-1)[:, made.vocabulary], by_right, rtol=1e-4, atol=1e-5)
    assert made.generate(prompts) == [made.generate([prompt])[0] for prompt in prompts]

def test_sampling_follows_the_seed_and_greedy_does_not(student):
    made, rows, _ = student()
    def sample(seed, temperature):
        torch.manual_seed(seed)
        return made.generate(rows, temperature=temperature)
    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    assert sample(1, 0) == sample(2, 0) == sample(1, 1e-4)  # cold sampling takes the likeliest

def test_a_checkpoints_own_way_of_generating_is_not_taken_over(student, causal_folder, tmp_path):
    """LLaMA's folders come with sampling switched on: answers would differ from run to run."""
    made, rows, _ = student()
    shutil.copytree(causal_folder(), tmp_path / "own")
    transformers.GenerationConfig(do_sample=True, repetition_penalty=9.0, max_length=40).save_pretrained(
        tmp_path / "own")
    own = build_student(str(tmp_path / "own"), 2, 16, vocabulary=(5, 6), max_new_tokens=12)
    assert own.generate(rows) == made.generate(rows)

# ---- the aligner over an answer vocabulary -----------------------------------------------------------------
def test_one_answer_position_and_labels_for_a_vocabulary_are_classification():
    """Then o_s is the logits up to a constant, which neither softmax nor cross entropy sees."""
    logits, vocabulary = torch.randn(6, 50), torch.tensor([7, 3, 20])
    answer = torch.tensor([0, 2, 1, 1, 0, 2])  # as classes, that is columns of V_a
    losses, o_s = answer_losses(logits, vocabulary[answer], [1] * 6, vocabulary)
    torch.testing.assert_close(losses, F.cross_entropy(logits, vocabulary[answer], reduction="none"))
    torch.testing.assert_close(o_s.softmax(-1), logits[:, vocabulary].softmax(-1))
    y = bag_labels([[vocabulary[i].item()] for i in answer], vocabulary.tolist())
    torch.testing.assert_close(y, F.one_hot(answer, 3).float())
    torch.testing.assert_close(task_loss(o_s, y), F.cross_entropy(logits[:, vocabulary], answer))

def test_bags_are_distributions_over_the_most_frequent_answer_tokens():
    bags = [[5, 5, 9], [5, 9], [8], []]
    vocabulary = answer_vocabulary(bags, size=2)
    assert vocabulary == [5, 9]
    y = bag_labels(bags, vocabulary)
    assert y.tolist() == [[pytest.approx(2 / 3), pytest.approx(1 / 3)], [0.5, 0.5], [0, 0], [0, 0]]
    # A row without a known token asks for nothing: no loss, no gradient.
    o = torch.zeros(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(task_loss(o, y), o)
    assert gradient[2:].abs().max() == 0 and gradient[0].abs().max() > 0

def test_the_bag_holds_the_tokens_that_the_output_is_made_of(student, examples):
    """To a BPE "answer2" and " answer2" are other tokens; a bag of the first asks for what nobody says."""
    made, rows, _ = student()
    for bag, row, example in zip(answer_bags(TASK, examples, made.tokenizer), rows, REASONING):
        assert made.tokenizer.decode(bag).strip() == example[2]
        assert set(bag) <= set(row["labels"]) and bag != made.tokenizer(example[2])["input_ids"]
    absent = examples[0]._replace(output="15 apples", label=("5",))  # 15 does not spell 5
    assert answer_bags(TASK, [absent], made.tokenizer) == [[]]
    number = examples[0]._replace(output="1 + 1 = 72. The answer is 72.", label=("72.0",))
    assert made.tokenizer.decode(answer_bags(TASK, [number], made.tokenizer)[0]).strip() == "72"
    dolly = examples[0]._replace(output="one two", label=("one two",))
    (bag,) = answer_bags(TASKS["instruct/dolly"], [dolly], made.tokenizer)
    assert made.tokenizer.decode(bag) == "one two"

def test_output_kl_against_a_loop_and_zero_where_both_agree():
    o_t, o_s, T = torch.randn(4, 6), torch.randn(4, 6), 3.0
    p, q = (o_t / T).softmax(-1), (o_s / T).softmax(-1)
    loop = sum(p[b, v] * (p[b, v] / q[b, v]).log() for b in range(4) for v in range(6)) / 4
    torch.testing.assert_close(output_kl(o_t, o_s, T), T**2 * loop)
    torch.testing.assert_close(output_kl(o_t, o_t + 2, T), torch.tensor(0.0))
    assert output_kl(o_t.half(), o_s.half(), T).dtype == torch.float32

def test_over_a_thousand_tokens_the_gradient_of_the_mse_vanishes_and_the_kls_does_not():
    """Why a generation task has another L_output: soft labels of 1,000 tokens are a thousandth each."""
    torch.manual_seed(0)
    o_t, y = torch.randn(32, 1000), torch.randint(1000, (32,))
    o_s = torch.randn(32, 1000, requires_grad=True)
    def norm(loss):
        return torch.autograd.grad(loss, o_s)[0].norm().item()
    cross_entropy = norm(F.cross_entropy(o_s, y))
    assert norm(output_loss(o_t, o_s, 5.0)) < 1e-4 * cross_entropy
    assert norm(output_kl(o_t, o_s, 5.0)) > 1e-2 * cross_entropy

def test_student_loss_adds_the_answers_cross_entropy_and_takes_the_kl():
    out, target = ([torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 3)] for _ in range(2))
    y, answer = torch.rand(4, 6).softmax(-1), torch.tensor(2.5)
    how = dict(alpha=0.3, beta=2.0, gamma=0.7, temperature=5.0, kind="manifold")
    total, parts = student_loss(out, target, y, **how, answer_loss=answer)
    task = answer + F.cross_entropy(out[0], y) + 0.7 * F.cross_entropy(out[1], y)
    kl = output_kl(target[0], out[0], 5.0) + 0.7 * output_kl(target[1], out[1], 5.0)
    torch.testing.assert_close(parts["task"], task)
    torch.testing.assert_close(parts["output"], kl)
    torch.testing.assert_close(total, 0.7 * task + 0.3 * kl + 2 * parts["manifold"])

def test_gradients_of_the_answers_losses():
    """gradcheck in float64, answers of different lengths."""
    logits = torch.randn(5, 7, dtype=torch.double, requires_grad=True)
    tokens, vocabulary = torch.tensor([1, 2, 0, 6, 3]), torch.tensor([2, 5, 6])
    assert torch.autograd.gradcheck(lambda x: answer_losses(x, tokens, [2, 3], vocabulary), logits)

# ---- LoRA --------------------------------------------------------------------------------------------------
def loosened(made):
    """B is zero at first; with random ones the adapters do something."""
    for module in made.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_B.weight)
    return made

def test_lora_is_exact_at_initialisation_and_draws_nothing_from_other_weights(student):
    (plain, rows, _), (adapted, _, _) = student(), student(lora=4)
    batch = collate(rows, 0)
    with torch.no_grad():
        (expected, losses), (found, again) = plain(**batch), adapted(**batch)
    assert all(map(torch.equal, (*expected, losses), (*found, again)))

def total_loss(made, rows, y):
    """L_S without a teacher, and a term for p_s, which nothing else would reach."""
    out, losses = made(**collate(rows, 0))
    return student_loss(out, None, y, alpha=0, beta=0, gamma=1, temperature=1, kind="manifold",
                        answer_loss=losses.mean())[0] + out.proj.square().mean()

@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_only_adapters_and_heads_train_with_the_gradients_of_the_merged_map(student, family, checkpoint,
                                                                            monkeypatch):
    """Oracle: W' = W + s B A gives dB = s dW' A^T and dA = s B^T dW'. Re-entrant checkpointing under frozen
    embeddings would lose every gradient without a word."""
    monkeypatch.setattr(F, "dropout", lambda x, *args, **kwargs: x)  # a merged map has no dropout to share
    made, rows, y = student(family, lora=4)
    loosened(made).train()
    plain = student(family, lora=4)[0]
    plain.load_state_dict(made.state_dict())
    plain.merge().requires_grad_(True)
    if checkpoint:
        made.checkpoint_gradients()
    total_loss(made, rows, y).backward()
    total_loss(plain, rows, y).backward()
    trained = {name for name, value in made.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in made.named_parameters() if value.requires_grad}
    assert all(".lora_" in name or name.startswith("heads.") for name in trained)
    for name, lora in made.named_modules():
        if isinstance(lora, LoRA):
            A, B, dW = lora.lora_A.weight, lora.lora_B.weight, plain.get_submodule(name).weight.grad
            torch.testing.assert_close(A.grad, lora.scale * B.T @ dW, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(B.grad, lora.scale * dW @ A.T, rtol=1e-3, atol=1e-5)
    for a, b in zip(made.heads.parameters(), plain.heads.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)

def test_merged_equals_unmerged_and_is_saved_as_an_ordinary_model(student, tmp_path):
    made, rows, _ = student(lora=4)
    loosened(made)
    batch = collate(rows, 0)
    with torch.no_grad():
        before, losses = made(**batch)
        unmerged = copy.deepcopy(made)
        after, merged = made.merge()(**batch)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(unmerged.train()(**batch)[1], losses)  # dropout, of the adapters alone
    torch.testing.assert_close(merged, losses, rtol=1e-5, atol=1e-5)
    made.save(tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"
    with torch.no_grad():
        torch.testing.assert_close(load_student(tmp_path)(**batch)[1], merged)

def test_a_saved_adapter_is_loaded_again_with_its_base(student, tmp_path):
    made, rows, _ = student(lora=4)
    loosened(made).save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()  # the base stays where it is
    again = load_student(tmp_path)
    assert again.generate(rows) == made.generate(rows)
    with torch.no_grad():
        assert torch.equal(again(**collate(rows, 0))[1], made(**collate(rows, 0))[1])

def test_a_bf16_base_keeps_float32_adapters_and_nearly_the_same_losses(student):
    made, rows, _ = student(lora=4)
    with torch.no_grad():
        expected = loosened(made)(**collate(rows, 0))[1]
    for value in made.lm.parameters():
        value.data = value.data if value.requires_grad else value.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, losses = made(**collate(rows, 0))
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)
    losses.mean().backward()
    lora = next(module for module in made.modules() if isinstance(module, LoRA))
    assert lora.lora_A.weight.grad.dtype == torch.float32 and lora.base.weight.dtype == torch.bfloat16
    with torch.no_grad():
        made(**collate(rows, 0))  # without autocast too

@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "opt", "llama"])
def test_lora_fits_classification_students_of_every_family(model_folder, family):
    made = build_student(model_folder(family), 3, 8, lora=2)
    x = made.tokenizer(["a man is sleeping", "two dogs"], padding=True, return_tensors="pt")
    made(x["input_ids"], x["attention_mask"]).logits.sum().backward()
    assert any(isinstance(module, LoRA) for module in made.modules())
    assert all((value.grad is not None) == (".lora_" in name or name.startswith("heads.classifier"))
               for name, value in made.named_parameters() if not name.startswith("heads."))

def test_peft_opens_a_saved_adapter_to_the_same_outputs(student, model_folder, causal_folder, tmp_path):
    """The files are PEFT's own format, so a LoRA trained here serves wherever PEFT does."""
    peft = pytest.importorskip("peft")
    made, rows, _ = student(lora=4)
    loosened(made).save(tmp_path / "causal")
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_folder())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "causal").eval()
    batch = {key: value for key, value in collate(rows, 0).items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, made.lm(**batch).logits, rtol=1e-5, atol=1e-5)
    encoder = loosened(build_student(model_folder("bert"), 3, 8, lora=2)).eval()
    encoder.save(tmp_path / "bert")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(model_folder("bert")), tmp_path / "bert").eval()
    x = encoder.tokenizer(["a man is sleeping"], return_tensors="pt")
    with torch.no_grad():
        pooled, expected = theirs(**x).pooler_output, encoder.lm(**x).pooler_output
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)

# ---- scoring -----------------------------------------------------------------------------------------------
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
    assert extract_answer(text, reference) == (expected and expected.lower())

def test_accuracy_compares_numbers_as_numbers_and_counts_what_could_not_be_read():
    outputs = ["The answer is 1,234.50.", "no idea", "It is 7", "about 3.0004"]
    found = compute_metrics("reason/gsm8k", outputs, [("1,234.5",), ("3",), ("8.0",), ("3",)])
    assert found == {"accuracy": 0.5, "answered": 0.75}
    assert compute_metrics("reason/boolq", ["True"], [("true",)]) == {"accuracy": 1.0, "answered": 1.0}

def test_rouge_l_by_hand_and_equal_to_the_package_without_its_stemmer():
    """F1 of the longest common subsequence: "the cat sat" in "the black cat sat down" is 3 of 3 and of 5."""
    assert rouge_l("the cat sat", "The black cat sat, down!") == pytest.approx(2 * 3 / (3 + 5))
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3) and rouge_l("", "") == rouge_l("a", "") == 0
    assert compute_metrics("instruct/s-ni", ["a b"], [("c", "a b")])["rouge_l_unstemmed"] == 1  # of the best
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    texts = ["The cats' 3.5 tails, running", "a-b running cat tails", "cat", "Über 3 5 the tails the"]
    for a in texts:
        for b in texts:
            assert rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)
    assert set(compute_metrics("instruct/dolly", ["a"], [("a",)])) == {"rouge_l", "rouge_l_unstemmed"}

# ---- end to end --------------------------------------------------------------------------------------------
WORDS = ["red", "green", "blue", "black", "white", "grey", "pink", "gold", "dull"]
ROWS = [(f"Say {word}", f"{word} {word[::-1]} the answer is answer{1 + i % 3}", f"answer{1 + i % 3}")
        for i, word in enumerate(WORDS)]

@pytest.fixture
def config(tmp_path, causal_folder):
    """A Config of the words' task: nine rows, of which one becomes dev, and all are test."""
    return Config(task="reason/arc_e", data_dir=write_reasoning(tmp_path, train=ROWS, test=ROWS), lora=0,
                  student=causal_folder(), teacher="painter", batch_size=4, max_length=128, max_new_tokens=32,
                  device="cpu", out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))

def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def test_eight_prompts_are_learnt_and_generated_back_exactly(config, tmp_path):
    """The whole path: files, prompts, losses, checkpoint, generation, extraction."""
    metrics = train(replace(config, epochs=100, lr=5e-3, beta=0.1, eval_every=100))["armada"][0]
    folder = tmp_path / "run/armada/0"
    lines = [json.loads(line) for line in (folder / "predictions_test.jsonl").read_text().splitlines()]
    assert [line["instruction"] for line in lines] == [row[0] for row in ROWS]
    assert sum(line["output"] == row[1] for line, row in zip(lines, ROWS)) == 8  # all but the row that is dev
    assert metrics["test"]["accuracy"] >= 8 / 9 and 0 < metrics["aligner"]["loss"]
    untrained, trained = (line for line in logged(folder) if "dev" in line)
    assert untrained["epoch"] == 0 and trained["dev"]["loss"] < untrained["dev"]["loss"]
    student = load_student(folder / "last")
    prompts = [ALPACA[0].format(instruction=row[0]) for row in ROWS]
    assert student.predict(prompts) == [line["output"] for line in lines]

def test_a_stopped_lora_run_goes_on_to_the_same_adapters(config, tmp_path, monkeypatch):
    """The checkpoint holds adapters, heads and their moments; the base comes from where it came from."""
    config = replace(config, lora=2, epochs=2, lr=1e-2)
    train(config)
    save, seen = Cell.save, []
    def once(cell, name="last"):
        save(cell, name)
        if name == "last" and not seen:
            seen.append(cell.done)
            raise KeyboardInterrupt
    monkeypatch.setattr(Cell, "save", once)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, out=str(tmp_path / "again")))
    state = tmp_path / "again/armada/0/last/training.json"  # as if a metric's package had come only now
    state.write_text(state.read_text().replace('"accuracy"', '"another"', 1))
    train(Config(resume=str(tmp_path / "again")))
    first, second = (tmp_path / out / "armada/0" for out in ("run", "again"))
    assert seen and (first / "last/adapter_model.safetensors").read_bytes() == (
        second / "last/adapter_model.safetensors").read_bytes()
    assert (first / "predictions_test.jsonl").read_text() == (second / "predictions_test.jsonl").read_text()
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["trained"] < metrics["parameters"] / 2

def test_without_a_teacher_the_student_is_fine_tuned_with_the_bag_of_its_own(config, tmp_path):
    """undistilled: language-model cross entropy plus task(o_s, y), no auxiliary head, no aligner."""
    train(replace(config, arms=("undistilled",), epochs=1, eval_limit=1, sampling_temperature=1.0))
    folder = tmp_path / "run/undistilled/0"
    steps = [line for line in logged(folder) if "step" in line]
    assert all(line["role"] == "student" and line["output"] == line["manifold"] == 0 for line in steps)
    written = (folder / "predictions_test.jsonl").read_text()
    assert len(written.splitlines()) == 1  # --eval-limit
    evaluation.main([str(tmp_path / "run"), "--rescore"])  # samples with the run's seed, as training did
    assert (folder / "predictions_test.jsonl").read_text() == written

def test_arms_are_compared_on_the_tasks_own_file(tmp_path):
    """On dev, a part of the mixed training file, armada is behind here; on test it is ahead."""
    cells = {tmp_path / f"{arm}/{seed}": {
        "task": "reason/arc_e", "arm": arm, "control": arm != "armada", "untrained": {"accuracy": 0.0},
        "dev": {"accuracy": 0.9 - ahead}, "test": {"accuracy": 0.4 + ahead}, "best": {"dev": {}}}
        for arm, ahead in (("undistilled", 0.0), ("armada", 0.1)) for seed in range(7)}
    text = evaluation.report(cells)
    assert "differences on test" in text and "+10.0" in text and "BEATS every control" in text

def test_one_training_is_scored_on_the_test_file_of_another_task(config, tmp_path, capsys):
    train(replace(config, epochs=1))
    evaluation.main([str(tmp_path / "run")])  # writes comparison.json
    shutil.copytree(tmp_path / "reasoning/ARC-Easy", tmp_path / "reasoning/ARC-Challenge")
    before = {path: path.read_text() for path in (tmp_path / "run").rglob("*.json*")}
    evaluation.main([str(tmp_path / "run"), "--task", "reason/arc_c"])
    assert "reason/arc_c" in capsys.readouterr().out
    folder = tmp_path / "run/armada/0"
    written = (folder / "predictions_reason_arc_c.jsonl").read_text()
    assert written == before[folder / "predictions_test.jsonl"]
    assert all(path.read_text() == text for path, text in before.items())  # the run's own are untouched
    for task in ("reason/gsm8k", "rte"):
        with pytest.raises(SystemExit):
            evaluation.main([str(tmp_path / "run"), "--task", task])
        assert "was trained on other files, those of reason/arc_e" in capsys.readouterr().err

def test_under_bf16_a_loras_base_is_bf16_and_what_trains_is_float32(config, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "finish", lambda cell: seen.append(cell.student))
    with pytest.raises(FileNotFoundError):  # no metrics.json without finish()
        train(replace(config, epochs=1, lora=2, amp="bf16"))
    assert all(value.dtype == (torch.float32 if value.requires_grad else torch.bfloat16)
               for value in seen[0].parameters())

def test_a_press_of_ctrl_c_during_the_last_evaluation_stops_the_run(config, monkeypatch):
    generate, presses = Cell.evaluate, []
    def pressed(cell, split="dev"):
        if cell.done and not presses:  # a second press would stop at once
            presses.append(signal.raise_signal(signal.SIGINT))
        return generate(cell, split)
    monkeypatch.setattr(Cell, "evaluate", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, epochs=1, arms=("undistilled", "armada")))

def test_another_students_mistakes_are_told_before_anything_is_made(config, model_folder, tmp_path):
    for student, says in ((model_folder("bert"), "reads both ways"), ("tiny", "--student tiny is random"),
                          (model_folder("llama"), "no eos_token")):
        with pytest.raises(UserError, match=says):
            train(replace(config, student=student))
        assert not (tmp_path / "run").exists()

def test_what_a_library_user_may_get_wrong_is_told(student, model_folder, causal_folder, tmp_path):
    made, _, _ = student("opt", lora=2)
    with pytest.raises(UserError, match="a prompt has .* tokens, 500 leave room"):
        made.predict(["answer " * 600])
    with pytest.raises(UserError, match="--lora 33: the model's maps are of rank 32"):
        student(lora=33)
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(UserError, match="gpt2 has no linear map named .* try --lora 0"):
        add_lora(transformers.GPT2Model(config), 2)
    shutil.copytree(causal_folder(), tmp_path / "base")
    build_student(str(tmp_path / "base"), 2, 16, vocabulary=(5, 6), lora=2).save(tmp_path / "a" / "last")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="needs the base of its LoRA, .*base: could not"):
        load_student(tmp_path / "a" / "last")
