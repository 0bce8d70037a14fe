"""What the README's "Does the teacher matter?" says beyond its tables, printed again.

    python -m tests.findings pictures        # how far the mean and a few directions describe the pictures
    python -m tests.findings losses RUN      # where each arm's training losses ended, mean over seeds
    python -m tests.findings majority DATA   # the share of each real task's most frequent dev label
    python -m tests.findings costs DATA      # seconds for 1,000 texts: the painter, a CLIP of random weights
    python -m tests.findings generations RUN # a generation run before and after training, and ten texts of it
    python -m tests.findings bags DATA MODEL # how well token frequencies alone predict 30 Dolly answers' bags
    python -m tests.findings tune            # the grid behind the defaults of `objects`; a quarter of an hour
"""
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import student as student_module
from data import TASKS, answer_bags, answer_vocabulary, bag_labels, load_task
from losses import task_loss
from teacher import build_teacher
from train import Config, train

def pictures():
    """Of the 120 training pictures at mean square 1: what guessing their mean leaves, and how the rest is
    spread over directions, beside noise of the same mean and variance in each dimension."""
    e = build_teacher("painter").encode([TASKS["objects"].prompt(x) for x in load_task("objects")["train"]])
    e /= np.sqrt((e**2).mean())
    centred = e - e.mean(0)
    noise = e.std(0) * np.random.default_rng(0).standard_normal(e.shape)
    print(f"manifold loss of guessing the mean picture: {(centred**2).mean():.2f}")
    for name, x in (("pictures", centred), ("noise", noise - noise.mean(0))):
        variance = np.linalg.svd(x, compute_uv=False) ** 2
        print(f"share of 8 of {len(x)} directions in the variance of {name}: "
              f"{100 * variance[:8].sum() / variance.sum():.0f} %")

def losses(run):
    """Each term before its weight, mean over the last epoch."""
    print(f"{'arm':<16} {'task':>7} {'output':>7} {'manifold':>9}   (task when guessing: 2 ln 2 = 1.39)")
    for arm in json.loads((Path(run) / "config.json").read_text())["arms"]:
        last = []
        for log in Path(run).glob(f"{arm}/*/log.jsonl"):
            lines = map(json.loads, log.read_text().splitlines())
            last.append([line for line in lines if line.get("role") == "student"][-1])
        task, output, manifold = (np.mean([line[name] for line in last])
                                  for name in ("task", "output", "manifold"))
        print(f"{arm:<16} {task:>7.2f} {output:>7.2f} {manifold:>9.2f}")

def majority(data_dir):
    """What a student that always gives one answer gets."""
    for task in ("rte", "wic", "cb", "copa"):
        labels = [example.label for example in load_task(task, data_dir)["dev"]]
        print(f"{task:<5} {100 * np.bincount(labels).max() / len(labels):.1f} %")

def tune():
    """Accuracy on `test`, seeds 100 to 104, over initial weights, learning rate and beta."""
    torch.set_num_threads(1)
    original = transformers.BertConfig
    for init in (0.02, 0.05, 0.1):
        student_module.transformers.BertConfig = lambda init=init, **settings: original(
            **{**settings, "initializer_range": init})
        for lr in (1e-3, 2e-3, 4e-3, 8e-3):
            for arm, beta in (("undistilled", 0.0), ("armada", 5.0), ("armada", 20.0), ("armada", 50.0)):
                with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
                    cells = train(Config(arms=(arm,), seeds=(100, 101, 102, 103, 104), lr=lr, beta=beta,
                                         eval_every=40, out=out))[arm].values()
                scores = [100 * cell["test"]["accuracy"] for cell in cells]
                print(f"init {init:<4} lr {lr:.0e} beta {beta:<4} {arm:<12} "
                      f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}", flush=True)

def costs(data_dir):
    """Seconds for 1,000 RTE texts: the painter; a text model of CLIP ViT-L/14's shapes, random weights."""
    texts = [TASKS["rte"].prompt(example) for example in load_task("rte", data_dir)["train"][:1000]]
    began = time.perf_counter()
    build_teacher("painter").encode(texts)
    print(f"painter {time.perf_counter() - began:.0f} s")
    clip = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)).eval()
    began = time.perf_counter()
    with torch.no_grad():
        clip(input_ids=torch.randint(0, 49_000, (64, 77)))  # all at the most tokens that it reads
    print(f"clip {(time.perf_counter() - began) * 1000 / 64:.0f} s")

def generations(run):
    """Each arm's and seed's scores before and after training; ten generated texts of the first cell."""
    cells = sorted(Path(run).glob("**/metrics.json"))
    for cell in cells:
        metrics, log = json.loads(cell.read_text()), (cell.parent / "log.jsonl").read_text()
        untrained = json.loads(log.splitlines()[0])["dev"]
        told = {"untrained dev": untrained, "dev": metrics["dev"], "test": metrics["test"]}
        for when, scores in told.items():
            words = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            print(f"{metrics['arm']} seed {metrics['seed']}, {when}: {words}")
    for line in (cells[0].parent / "predictions_test.jsonl").read_text().splitlines()[:10]:
        row = json.loads(line)
        for name, text in (("prompt   ", row["instruction"]), ("reference", row["references"][0]),
                           ("output   ", row["output"])):
            print(name, " ".join(text.split())[:120])

def bags(data_dir, model):
    """Cross entropy of the dev bags under the mean training bag, which knows nothing of a text."""
    task, splits = TASKS["instruct/dolly"], load_task("instruct/dolly", data_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train, dev = (answer_bags(task, splits[split][:n], tokenizer)
                  for split, n in (("train", 800), ("dev", 30)))
    vocabulary = answer_vocabulary(train)
    y, frequencies = bag_labels(dev, vocabulary), bag_labels(train, vocabulary).mean(0)  # (30, V_a), (V_a,)
    loss = task_loss(frequencies.log().expand_as(y), y)
    print(f"{len(vocabulary)} tokens: log {np.log(len(vocabulary)):.2f}, frequencies {loss:.2f}")

if __name__ == "__main__":
    try:
        commands = {command.__name__: command for command in (
            pictures, losses, majority, tune, costs, generations, bags)}
        commands[sys.argv[1]](*sys.argv[2:])
    except (IndexError, KeyError, TypeError, FileNotFoundError):
        sys.exit(__doc__)
