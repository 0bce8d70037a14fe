"""Metrics, evaluation of saved runs, and the table.

    compute_metrics("mrpc", predictions, labels)      # {"accuracy": ..., "f1": ...}, fractions of 1
    python eval.py runs/rte                            # evaluate every saved student again, print the table,
                                                       # write predictions_*.tsv / .jsonl in the official submission form
The headline is the LAST epoch's dev score. The best epoch's stands beside it, marked "chosen on dev": picking the largest
of many noisy scores is optimistic, the more so the more often one looks.
"""
import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from data import UserError, collate, encode, find_task, load_task


# ---- metrics -------------------------------------------------------------------------------------------------------------
def _f1(predictions, labels, positive):
    """2 TP / (2 TP + FP + FN) of one class."""
    hit, guess, truth = ((predictions == positive) & (labels == positive)).sum(), (predictions == positive).sum(), (labels == positive).sum()
    return 2 * hit / (guess + truth) if guess + truth else 0.0


def _correlation(a, b):
    """Pearson's r; 0 where a side is constant (or there is one row), which has no correlation."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return a @ b / norm if norm > 0 else 0.0


def _ranks(values):
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def compute_metrics(task_name, predictions, labels):
    """{metric: float} for the metrics of a registered task. predictions, labels: N class ids (or N scores).

    f1 is of class 1 for mrpc and qqp, the mean over the classes seen for cb; mcc (Matthews) equals the correlation of two
    0/1 columns. Undefined values (nothing predicted positive, a constant column) are 0. Raises ValueError on unequal lengths.
    """
    task, predictions, labels = find_task(task_name), np.asarray(predictions, float), np.asarray(labels, float)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must be two equal, non-empty lists")
    classes = np.union1d(predictions, labels) if len(task.labels) > 2 else [1]
    metrics = {"accuracy": lambda: (predictions == labels).mean(),
               "f1": lambda: np.mean([_f1(predictions, labels, c) for c in classes]),
               "mcc": lambda: _correlation(predictions, labels),
               "pearson": lambda: _correlation(predictions, labels),
               "spearman": lambda: _correlation(_ranks(predictions), _ranks(labels))}
    return {name: float(metrics[name]()) for name in task.metrics}


# ---- a student on a split ------------------------------------------------------------------------------------------------
def predict(student, rows, batch_size=64, autocast=nullcontext):
    """Predictions (N,) of encoded rows, in order. Rows of equal length go together: evaluation needs no shuffling."""
    import torch

    from losses import predictions

    training, device, answers = student.training, next(student.parameters()).device, np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    student.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in chosen], student.tokenizer.pad_token_id).items()}
            with autocast():
                answers[chosen] = predictions(student(**batch).logits).cpu().numpy()
    student.train(training)
    return answers


def score(task, examples, predictions):
    """Metrics of a split, or None where its labels are not known (the official test sets)."""
    return None if examples[0].label is None else compute_metrics(task.name, predictions, [e.label for e in examples])


def write_predictions(folder, split, task, examples, predictions):
    """predictions_SPLIT in the official form: GLUE index<TAB>prediction, SuperGLUE one {"idx", "label"} a line."""
    if task.labels:
        names = [task.labels[int(p)] for p in predictions]
        if task.name == "wsc":
            names = [name.capitalize() for name in names]  # its server wants True, WiC's and BoolQ's true
    else:
        names = [f"{p:.3f}" for p in predictions]
    if examples[0].where.split(":")[0].endswith(".jsonl"):
        lines = [json.dumps({"idx": e.idx, "label": int(n) if n.isdigit() else n}) for e, n in zip(examples, names)]
        path = Path(folder) / f"predictions_{split}.jsonl"
    else:
        lines = ["index\tprediction"] + [f"{e.idx}\t{n}" for e, n in zip(examples, names)]
        path = Path(folder) / f"predictions_{split}.tsv"
    path.write_text("\n".join(lines) + "\n")


# ---- runs ----------------------------------------------------------------------------------------------------------------
def find_cells(runs):
    """The ARM/SEED folders below the given folders that hold a saved student, in order, each once."""
    cells = []
    for run in map(Path, runs):
        found = sorted(path.parent for path in run.glob("**/last/student.json")) if run.is_dir() else []
        found = [last.parent for last in found]
        if not found:
            raise UserError(f"{run} holds no saved run (ARM/SEED/last): give the --out folder of a training, or a folder inside it")
        cells += [cell for cell in found if cell not in cells]
    return cells


def evaluate_cell(cell, data_dir=None, batch_size=64, device="cpu"):
    """Load a cell's last/ and best/ students and score them again; writes predictions_*; returns what metrics.json holds."""
    from student import load_student

    config = json.loads((cell / "config.json").read_text())
    metrics = json.loads((cell / "metrics.json").read_text()) if (cell / "metrics.json").exists() else {}
    task = find_task(config["task"])
    splits = load_task(task.name, data_dir or config["data_dir"], config["cache_dir"])
    metrics.update(task=task.name, arm=config["arms"][0], seed=config["seeds"][0])
    for folder in ("last", "best"):
        student = load_student(cell / folder).to(device)
        for split, examples in splits.items():
            if split == "train" or (folder == "best" and split != "dev"):
                continue
            rows, _ = encode(task, examples, student.tokenizer, config["max_length"], student.decoder)
            answers = predict(student, rows, batch_size)
            if folder == "best":
                metrics["best"] = {**metrics.get("best", {}), "dev": score(task, examples, answers)}
                continue
            write_predictions(cell, split, task, examples, answers)
            metrics[split] = score(task, examples, answers)
    return metrics


def table(cells):
    """The table of a list of metrics.json contents: a line an arm, mean and standard deviation over seeds, in percent."""
    def spread(values):
        values = [100 * v for v in values if v is not None]
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}" if values else "-"

    lines = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        name = find_task(task).metrics[0]
        lines += [f"{task}: dev {name} in %, mean ± standard deviation over seeds",
                  f"{'arm':<16} {'seeds':>5}   {'last epoch':<13} {'best epoch*':<13} {'aligner alone':<13} gradient norm"]
        for arm in dict.fromkeys(cell["arm"] for cell in cells if cell["task"] == task):
            rows = [cell for cell in cells if (cell["task"], cell["arm"]) == (task, arm)]
            norms = [row["grad_norm"] for row in rows if row.get("grad_norm") is not None]
            lines.append(f"{arm:<16} {len(rows):>5}   {spread([row['dev'][name] for row in rows]):<13} "
                         f"{spread([row['best']['dev'][name] for row in rows]):<13} "
                         f"{spread([(row.get('aligner') or {}).get(name) for row in rows]):<13} "
                         + (f"{np.mean(norms):.2f}" if norms else "-"))
        lines.append("* chosen on dev, so optimistic: compare arms by the last epoch")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="eval.py", description="Evaluate saved runs again and print their table.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder that a training wrote (its --out, or an ARM/SEED folder inside it).")
    parser.add_argument("--data-dir", help="Folder of the task files, where it is not the one that the run was trained with.")
    parser.add_argument("--batch-size", type=int, default=64, help="Texts evaluated at once (default 64).")
    parser.add_argument("--device", default="cpu", help="Device to evaluate on, cpu or cuda (default cpu).")
    args = parser.parse_args(argv)
    try:
        results = []
        for cell in find_cells(args.runs):
            print(f"evaluating {cell}", file=sys.stderr, flush=True)
            results.append(evaluate_cell(cell, args.data_dir, args.batch_size, args.device))
        print(table(results))
    except UserError as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
