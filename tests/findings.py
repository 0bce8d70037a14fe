"""Tools that print the numbers of tests/RESULTS.md which no table of train.py or eval.py holds.

    python -m tests.findings figures RUNS    # the README's three figures, two of them of runs
    python -m tests.findings pictures        # how far a few directions describe the pictures
    python -m tests.findings losses RUN      # where each arm's training losses ended
    python -m tests.findings majority DATA   # the share of each real task's commonest dev label
    python -m tests.findings costs DATA      # seconds for 1,000 texts: the painter, CLIP
    python -m tests.findings generations RUN # scores before and after training, ten answers
    python -m tests.findings said RUN        # how much of its sentences each arm has right
    python -m tests.findings bags DATA MODEL # how well frequencies alone predict answers' bags
    python -m tests.findings tune            # the grid behind the defaults of `objects`: 15 min
    python -m tests.findings tune-say        # bags and soft labels of `say/objects`: 8 min
    python -m tests.findings tune-unlabelled # the epochs for 120 + 480 rows of `objects`: 3 min
    python -m tests.findings way RUN         # how far each arm came from undistilled to its aligner

They are started by hand, and no test runs them. DATA is a --data-dir, RUN a folder of train.py.
"""
import contextlib
import io
import json
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers

import eval as evaluation
import train as training
from data import (TASKS, UserError, answer_bags, answer_vocabulary, bag_labels, exit_with_message,
                  load_task, read_json)
from losses import output_kl, student_loss, task_loss
from teacher import build_teacher
from train import Config, train

# Rows of the training split, one for each way to ask; the answers are yes, yes, no, no.
PICTURED = (6, 8, 27, 26)

TUNING_SEEDS = (100, 101, 102, 103, 104)  # no table uses them
TUNING_ARMS = (  # (arm, beta)
    ("undistilled", 0.0),
    ("armada", 5.0),
    ("armada", 20.0),
    ("armada", 50.0),
)


def objects_texts():
    """The 120 texts that `objects` trains on by default, as a teacher gets them."""
    task = TASKS["objects"]
    examples = load_task("objects")["train"][:120]
    return [task.prompt(example) for example in examples]


def figures(runs):
    """Draw painter.png, and, of the runs in a folder, dose.png and labels.png, beside this file.

    The commands that make RUNS/unlabelled-dose and RUNS/labels stand in section 15 of RESULTS.md.
    """
    from PIL import Image

    painter()
    for folder, drawn, name in (("unlabelled-dose", "dose_response.png", "dose.png"),
                                ("labels", "label_curve.png", "labels.png")):
        folder = Path(runs, folder)
        evaluation.plot(evaluation.find_cells([folder]))
        save_small(Image.open(folder / drawn).convert("L"), name)


def painter():
    """Draw painter.png: four training questions below the painter's pictures of them."""
    from PIL import Image, ImageDraw, ImageFont

    side, margin, caption = 192, 16, 44  # in screen pixels; a picture has 16 x 16 of its own
    texts = objects_texts()
    teacher = build_teacher("painter")

    width = margin + len(PICTURED) * (side + margin)
    height = margin + side + caption
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)

    left = margin
    for row in PICTURED:
        # Without smoothing, so that one sees the 16 x 16 numbers that the aligner gets.
        picture = teacher.picture(texts[row])
        picture = picture.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, margin))

        frame = (left - 1, margin - 1, left + side, margin + side)
        draw.rectangle(frame, outline="grey")
        question = textwrap.fill(texts[row], width=26)
        draw.text((left, margin + side + 4), question, fill="black", font=font)
        left += side + margin

    save_small(sheet, "painter.png")


def save_small(image, name):
    """Save an image beside this file with 64 colours, which are enough for what is drawn here."""
    path = Path(__file__).with_name(name)
    image.quantize(64).save(path, optimize=True)
    print(f"wrote {path}, {path.stat().st_size:,} bytes")


def pictures():
    """Print how well a few numbers describe the 120 training pictures, scaled to mean square 1.

    The first line says what is left of them when their mean is guessed. The other two say how
    the rest is spread over directions, beside noise of the same mean and variance in each
    dimension: what lies in few directions can be learnt by heart.
    """
    e = build_teacher("painter").encode(objects_texts())  # (N, d_e)
    e /= np.sqrt((e**2).mean())
    centred = e - e.mean(0)
    noise = e.std(0) * np.random.default_rng(0).standard_normal(e.shape)
    noise_centred = noise - noise.mean(0)

    print(f"manifold loss of guessing the mean picture: {(centred**2).mean():.2f}")
    for name, x in (("pictures", centred), ("noise", noise_centred)):
        variance = np.linalg.svd(x, compute_uv=False) ** 2  # (N,), a direction each, falling
        share = 100 * variance[:8].sum() / variance.sum()
        print(f"share of 8 of {len(x)} directions in the variance of {name}: {share:.0f} %")


def read_jsonl(path):
    """The lines of a .jsonl file as dictionaries, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    """Print each arm's terms of L_S before their weights, mean over last epoch and seeds."""
    names = f"{'arm':<16} {'task':>7} {'output':>7} {'manifold':>9}"
    print(f"{names}   (task when guessing: 2 ln 2 = 1.39)")
    config = json.loads(Path(run, "config.json").read_text())
    for arm in config["arms"]:
        last = []  # the last line of each seed's student, which is its last epoch on `objects`
        for path in Path(run).glob(f"{arm}/*/log.jsonl"):
            lines = read_jsonl(path)
            of_student = [line for line in lines if line.get("role") == "student"]
            last.append(of_student[-1])
        task = np.mean([line["task"] for line in last])
        output = np.mean([line["output"] for line in last])
        manifold = np.mean([line["manifold"] for line in last])
        print(f"{arm:<16} {task:>7.2f} {output:>7.2f} {manifold:>9.2f}")


def majority(data_dir):
    """Print what a student that always gives one answer gets on each real task."""
    for task in ("rte", "wic", "cb", "copa"):
        examples = load_task(task, data_dir)["dev"]
        counts = np.bincount([example.label for example in examples])
        share = 100 * counts.max() / len(examples)
        print(f"{task:<5} {share:.1f} %")


def bert_config(initializer_range):
    """A BertConfig whose initial weights have this standard deviation, whatever it is told."""
    original = transformers.BertConfig

    def make(**settings):
        settings["initializer_range"] = initializer_range
        return original(**settings)

    return make


def accuracy_on_test(arm, **flags):
    """Mean and deviation over TUNING_SEEDS, which no table of ours uses, of test accuracy in %."""
    silence = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as out, silence:
        config = Config(arms=(arm,), seeds=TUNING_SEEDS, eval_every=40, out=out, **flags)
        by_seed = train(config)[arm]
    values = [100 * metrics["test"]["accuracy"] for metrics in by_seed.values()]
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def tune():
    """Print accuracies over initial weights, learning rate and beta: 48 lines, 240 cells."""
    torch.set_num_threads(1)  # as the command line does for tiny
    for init in (0.02, 0.05, 0.1):
        with patch.object(transformers, "BertConfig", bert_config(init)):
            for lr in (1e-3, 2e-3, 4e-3, 8e-3):
                for arm, beta in TUNING_ARMS:
                    setting = f"init {init:<4} lr {lr:.0e} beta {beta:<4} {arm:<12}"
                    print(setting, accuracy_on_test(arm, lr=lr, beta=beta), flush=True)


def bags_of_answers(task, examples, tokenizer):
    """answer_bags of "true" or "false" alone."""
    return answer_bags(task._replace(label_column="answer"), examples, tokenizer)


def bags_that_differ(task, examples, tokenizer):
    """answer_bags without the tokens that stand in every answer."""
    bags = answer_bags(task, examples, tokenizer)
    shared = set.intersection(*map(set, bags))
    return [[token for token in bag if token not in shared] for bag in bags]


def both_heads(student_out, aligner_out, *args, alpha, temperature, **weights):
    """student_loss with soft labels for the language model's own logits as well."""
    total, parts = student_loss(student_out, aligner_out, *args, alpha=alpha,
                                temperature=temperature, **weights)
    main_output = output_kl(aligner_out.logits, student_out.logits, temperature)
    return total + alpha * main_output, parts


def answer_within(*args, alpha, answer_loss, **weights):
    """student_loss as it was, with the answer's cross entropy inside of (1 - alpha)."""
    total, parts = student_loss(*args, alpha=alpha, answer_loss=answer_loss, **weights)
    return total - alpha * answer_loss, parts


def tune_say():
    """Print accuracies on `say/objects` over bags, soft labels and T: 16 lines, 80 cells."""
    torch.set_num_threads(1)
    print_say("whole output", "undistilled")
    bags = {"whole output": answer_bags, "what differs": bags_that_differ,
            "answer alone": bags_of_answers}
    for bag, make_bags in bags.items():
        with patch.object(training, "answer_bags", make_bags):
            for arm in ("no-output", "armada"):
                print_say(bag, arm)
    with patch.object(training, "answer_bags", bags_of_answers):
        print_say("answer alone", "armada", "temperature 5.0", temperature=5.0)
        with patch.object(training, "student_loss", both_heads):
            print_say("answer alone", "armada", "soft labels of both heads")
            print_say("answer alone", "armada", "the same, temperature 5", temperature=5.0)
    for flag, value in (("alpha", 0.2), ("alpha", 0.0), ("temperature", 5.0)):
        print_say("whole output", "armada", f"{flag} {value}", **{flag: value})
    with patch.object(training, "student_loss", both_heads):
        print_say("whole output", "armada", "soft labels of both heads")
    with patch.object(training, "student_loss", answer_within):
        print_say("whole output", "armada", "answer within (1 - a)")
        print_say("whole output", "armada", "the same, temperature 5", temperature=5.0)


def print_say(bag, arm, note="", **flags):
    """Print one line of tune_say()."""
    accuracy = accuracy_on_test(arm, task="say/objects", **flags)
    print(f"{bag}  {arm:<11}  {note:<25}  {accuracy}", flush=True)


def tune_unlabelled():
    """Print accuracies over the epochs, where 120 rows with a label train beside 480 without."""
    torch.set_num_threads(1)
    for epochs in (10, 20):
        for arm in ("undistilled", "armada"):
            accuracy = accuracy_on_test(arm, epochs=epochs, unlabelled=480)
            print(f"epochs {epochs} {arm:<12} {accuracy}", flush=True)


def way(run):
    """Print how much of its aligner's dev accuracy reached each arm's student.

    0 % is the student that no teacher helps, 100 % is the aligner, which reads the picture.
    """
    means = {}  # arm -> (the student's mean accuracy over seeds, its aligner's or None)
    for folder in sorted(Path(run).iterdir()):
        cells = [json.loads(path.read_text()) for path in folder.glob("*/metrics.json")]
        if cells:
            student = np.mean([cell["dev"]["accuracy"] for cell in cells])
            aligner = None
            if cells[0]["aligner"]:
                aligner = np.mean([cell["aligner"]["accuracy"] for cell in cells])
            means[folder.name] = student, aligner
    start, _ = means["undistilled"]
    for arm, (student, aligner) in means.items():
        if aligner and aligner > start:  # an untrained one has nothing to give
            share = 100 * (student - start) / (aligner - start)
            print(f"{arm:<16} {100 * student:.1f} of {100 * aligner:.1f}: {share:.0f} % of the way")


def costs(data_dir):
    """Print the seconds for 1,000 RTE texts of the painter, and of CLIP ViT-L/14's text side.

    The CLIP has that model's shapes and random weights, which take as long as the real ones.
    It is timed on one batch of 64 texts, all of them at the most tokens that it reads.
    """
    examples = load_task("rte", data_dir)["train"][:1000]
    texts = [TASKS["rte"].prompt(example) for example in examples]
    began = time.perf_counter()
    build_teacher("painter").encode(texts)
    seconds = time.perf_counter() - began
    print(f"painter {seconds:.0f} s")

    config = transformers.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    clip = transformers.CLIPTextModelWithProjection(config).eval()
    began = time.perf_counter()
    with torch.no_grad():
        clip(input_ids=torch.randint(0, 49_000, (64, 77)))
    seconds = (time.perf_counter() - began) * 1000 / 64
    print(f"clip {seconds:.0f} s")


def generations(run):
    """Print each cell's scores before and after training, and ten answers of the first cell."""
    cells = sorted(Path(run).glob("**/metrics.json"))
    for path in cells:
        metrics = json.loads(path.read_text())
        first_line = read_jsonl(path.with_name("log.jsonl"))[0]  # of epoch 0
        moments = {
            "untrained dev": first_line["dev"],
            "dev": metrics["dev"],
            "test": metrics["test"],
        }
        for moment, scores in moments.items():
            words = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            print(f"{metrics['arm']} seed {metrics['seed']}, {moment}: {words}")

    rows = read_jsonl(cells[0].with_name("predictions_test.jsonl"))
    for row in rows[:10]:
        print_start("prompt", row.get("instruction") or row["text"])
        print_start("reference", row["references"][0])
        print_start("output", row["output"])


def said(run):
    """Print what share of dev each arm of a `say/objects` run has right, over all its seeds.

    The answer is "true" or "false", which is what is scored; the object is the one that the
    sentence calls bigger; the sentence is all of it.
    """
    wanted = {example.idx: example.output for example in load_task("say/objects")["dev"]}
    print(f"{'arm':<16} answer  object  sentence")
    for arm in read_json(Path(run, "config.json"))["arms"]:
        shares = []
        for path in Path(run, arm).glob("*/predictions_dev.jsonl"):
            for row in read_jsonl(path):
                output = row["output"].split()
                target = wanted[row["idx"]].split()
                shares.append((output[:1] == target[:1], output[3:4] == target[3:4],
                               output == target))
        answer, bigger, sentence = 100 * np.mean(shares, 0)
        print(f"{arm:<16} {answer:6.1f}  {bigger:6.1f}  {sentence:8.1f}")


def print_start(name, text):
    """Print the first 120 characters of a text on one line, behind its name."""
    one_line = " ".join(text.split())
    print(f"{name:<9} {one_line[:120]}")


def bags(data_dir, model):
    """Print how well the mean training bag predicts 30 dev bags of Dolly, whatever their text.

    The number is their cross entropy in nats, beside the log of the vocabulary's size. An
    aligner whose own score is no lower has learnt how frequent tokens are, and no more.
    """
    task = TASKS["instruct/dolly"]
    splits = load_task("instruct/dolly", data_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train_bags = answer_bags(task, splits["train"][:800], tokenizer)
    dev_bags = answer_bags(task, splits["dev"][:30], tokenizer)

    vocabulary = answer_vocabulary(train_bags)
    y = bag_labels(dev_bags, vocabulary)                      # (30, V_a)
    frequencies = bag_labels(train_bags, vocabulary).mean(0)  # (V_a,)
    loss = task_loss(frequencies.log().expand_as(y), y)
    size = len(vocabulary)
    print(f"{size} tokens: log {np.log(size):.2f}, frequencies {loss:.2f}")


COMMANDS = {
    "figures": figures,
    "pictures": pictures,
    "losses": losses,
    "majority": majority,
    "costs": costs,
    "generations": generations,
    "said": said,
    "bags": bags,
    "tune": tune,
    "tune-say": tune_say,
    "tune-unlabelled": tune_unlabelled,
    "way": way,
}


if __name__ == "__main__":
    try:
        command = COMMANDS[sys.argv[1]]
        command(*sys.argv[2:])
    except UserError as error:
        exit_with_message(2, f"tests.findings: {error}")
    except (IndexError, KeyError, TypeError, FileNotFoundError):
        sys.exit(__doc__)  # no such command, or not its arguments
