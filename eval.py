"""Metrics, evaluation of saved runs, and the table.

    compute_metrics("mrpc", predictions, labels)  # {"accuracy": ..., "f1": ...}, fractions of 1
    python eval.py runs/rte                       # score every saved student again, print the table and write
                                                  # predictions_*.{tsv,jsonl} in the official submission form

The headline is the LAST epoch's dev score. The best epoch's stands beside it, marked "chosen on dev": the
largest of many noisy scores is too good, the more so the more often one looks.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

from data import UserError, encode, find_task, load_task


# ---- metrics -----------------------------------------------------------------------------------------------
def _f1(predictions, labels, positive):
    """2 TP / (2 TP + FP + FN) of one class; 0 where it is neither predicted nor there."""
    guessed, true = predictions == positive, labels == positive
    return 2 * (guessed & true).sum() / max(1, guessed.sum() + true.sum())


def _correlation(a, b):
    """Pearson's r; 0 where a column is constant. Of two 0/1 columns it is Matthews' coefficient."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:  # asked of the values: rounding leaves a - mean(a) a little off zero
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return a @ b / np.sqrt((a @ a) * (b @ b))


def _ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def compute_metrics(task_name, predictions, labels):
    """{metric: float} of a registered task, from N class ids (or scores) each.

    f1: class 1 for mrpc and qqp, the mean over the classes seen for cb. Undefined values are 0. Raises
    ValueError on lists of unequal length.
    """
    task, p, y = find_task(task_name), np.asarray(predictions, float), np.asarray(labels, float)
    if p.shape != y.shape or p.ndim != 1 or not len(p):
        raise ValueError(f"predictions {p.shape} and labels {y.shape} must be two equal, non-empty lists")
    classes = np.union1d(p, y) if len(task.labels) > 2 else [1]
    formulas = {"accuracy": lambda: (p == y).mean(), "f1": lambda: np.mean([_f1(p, y, c) for c in classes]),
                "mcc": lambda: _correlation(p, y), "pearson": lambda: _correlation(p, y),
                "spearman": lambda: _correlation(_ranks(p), _ranks(y))}
    return {name: float(formulas[name]()) for name in task.metrics}


# ---- a split, and what was answered ------------------------------------------------------------------------
def score(task, examples, answers):
    """Metrics of a split; None where its labels are unknown (the official test sets)."""
    known = examples[0].label is not None
    return compute_metrics(task.name, answers, [example.label for example in examples]) if known else None


def write_predictions(folder, split, task, examples, answers):
    """predictions_SPLIT: index<TAB>prediction for GLUE's server or {"idx", "label"} lines for SuperGLUE's."""
    names = [task.labels[int(answer)] if task.labels else f"{answer:.3f}" for answer in answers]
    if task.name == "wsc":
        names = [name.capitalize() for name in names]  # True, where WiC and BoolQ want true
    form = "jsonl" if ".jsonl:" in examples[0].where else "tsv"
    if form == "jsonl":
        lines = [json.dumps({"idx": example.idx, "label": int(name) if task.name == "copa" else name})
                 for example, name in zip(examples, names)]
    else:
        lines = ["index\tprediction", *(f"{example.idx}\t{name}" for example, name in zip(examples, names))]
    (Path(folder) / f"predictions_{split}.{form}").write_text("\n".join(lines) + "\n")


# ---- runs --------------------------------------------------------------------------------------------------
def find_cells(runs):
    """The ARM/SEED folders with a saved student at or below the given folders, in order, each once."""
    cells = {}
    for run in map(Path, runs):
        found = [path.parent.parent for path in sorted(run.glob("**/last/student.json"))]
        if not found:
            raise UserError(f"{run} holds no saved run (ARM/SEED/last/): "
                            "give a training's --out, or a folder in it")
        cells |= dict.fromkeys(found)
    return list(cells)


def evaluate_cell(cell, data_dir, batch_size, device):
    """Score a cell's saved students again and write predictions_*; returns its metrics anew."""
    from student import load_student

    config, path = json.loads((cell / "config.json").read_text()), cell / "metrics.json"
    metrics = (json.loads(path.read_text()) if path.exists()
               else {"task": config["task"], "arm": config["arms"][0]})
    task = find_task(config["task"])
    splits = load_task(task.name, data_dir or config["data_dir"], config["cache_dir"])

    def answers(folder, split):
        student = load_student(cell / folder).to(device)
        rows, _ = encode(task, splits[split], student.tokenizer, config["max_length"], student.decoder)
        return student.answers(rows, batch_size)

    for split in [split for split in splits if split != "train"]:
        found = answers("last", split)
        write_predictions(cell, split, task, splits[split], found)
        metrics[split] = score(task, splits[split], found)
    if (cell / "best").exists():  # not in a run that was stopped before its first evaluation
        metrics["best"] = {**(metrics.get("best") or {}),
                           "dev": score(task, splits["dev"], answers("best", "dev"))}
    return metrics


def table(cells):
    """The text for metrics.json contents: an arm a line, mean and standard deviation over seeds, in %."""
    def spread(values):
        values = [100 * value for value in values if value is not None]
        deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{deviation}" if values else "-"

    lines = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        metric, here = find_task(task).metrics[0], [cell for cell in cells if cell["task"] == task]
        lines += [f"{task}: dev {metric} in %, mean ± standard deviation over seeds",
                  f"{'arm':<16} {'seeds':>5}   {'last epoch':<12} {'best epoch*':<12} {'aligner alone':<14} "
                  "gradient norm"]
        for arm in dict.fromkeys(cell["arm"] for cell in here):
            rows = [cell for cell in here if cell["arm"] == arm]
            norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
            lines.append(f"{arm:<16} {len(rows):>5}   {spread([row['dev'][metric] for row in rows]):<12} "
                         f"{spread([row['best']['dev'][metric] for row in rows if row.get('best')]):<12} "
                         f"{spread([(row.get('aligner') or {}).get(metric) for row in rows]):<14} "
                         + (f"{np.mean(norms):.2f}" if norms else "-"))
    return "\n".join([*lines, "* chosen on dev, so too good: compare arms by the last epoch"])


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="eval.py", allow_abbrev=False,
        description="Score saved runs again, write predictions and print the table.")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="Folder that a training wrote, or a folder inside it.")
    parser.add_argument("--data-dir",
                        help="Folder of the task files, where they have moved since the training.")
    parser.add_argument("--batch-size", type=int, default=64, help="Texts evaluated at once (64 by default).")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                        help="Device to evaluate on (cpu by default).")
    args = parser.parse_args(argv)
    try:
        import torch

        if args.batch_size < 1 or (args.device == "cuda" and not torch.cuda.is_available()):
            raise UserError(f"--batch-size {args.batch_size} --device {args.device}: "
                            "a batch of 1 or more, a device that is here")
        results = []
        for cell in find_cells(args.runs):
            print(f"scoring {cell}", file=sys.stderr)
            results.append(evaluate_cell(cell, args.data_dir, args.batch_size, args.device))
        print(table(results))
    except UserError as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
