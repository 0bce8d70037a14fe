"""Metrics, evaluation of saved runs, and whether the teacher mattered.

    compute_metrics("mrpc", predictions, labels)  # {"accuracy": ..., "f1": ...}, fractions of 1
    python eval.py runs/rte [--plot]              # the table, each arm against its controls, a verdict
    python eval.py runs/rte --rescore             # score every saved student again, write predictions_*
    python eval.py runs/rte/armada/0 runs/rte/undistilled/0   # two students, example by example (McNemar)

The headline is the LAST epoch's dev score. The best epoch's stands beside it, marked "chosen on dev": the
largest of many noisy scores is too good, the more so the more often one looks.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

from data import Parser, UserError, encode, find_task, load_task

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
    ValueError on lists of unequal length."""
    task, p, y = find_task(task_name), np.asarray(predictions, float), np.asarray(labels, float)
    if p.shape != y.shape or p.ndim != 1 or not len(p):
        raise ValueError(f"predictions {p.shape} and labels {y.shape} must be two equal, non-empty lists")
    classes = np.union1d(p, y) if len(task.labels) > 2 else [1]
    formulas = {"accuracy": lambda: (p == y).mean(), "f1": lambda: np.mean([_f1(p, y, c) for c in classes]),
                "mcc": lambda: _correlation(p, y), "pearson": lambda: _correlation(p, y),
                "spearman": lambda: _correlation(_ranks(p), _ranks(y))}
    return {name: float(formulas[name]()) for name in task.metrics}

def score(task, examples, answers):
    """Metrics of a split; None where its labels are unknown (the official test sets)."""
    known = examples[0].label is not None
    return compute_metrics(task.name, answers, [example.label for example in examples]) if known else None

def write_predictions(folder, split, task, examples, answers):
    """predictions_SPLIT: index<TAB>prediction for GLUE's server or {"idx", "label"} lines for SuperGLUE's."""
    names = [task.labels[int(answer)] if task.labels else f"{answer:.3f}" for answer in answers]
    names = [name.capitalize() for name in names] if task.name == "wsc" else names  # True; WiC's is true
    form = "jsonl" if ".jsonl:" in examples[0].where else "tsv"
    if form == "jsonl":
        lines = [json.dumps({"idx": example.idx, "label": int(name) if task.name == "copa" else name})
                 for example, name in zip(examples, names)]
    else:
        lines = ["index\tprediction", *(f"{example.idx}\t{name}" for example, name in zip(examples, names))]
    (Path(folder) / f"predictions_{split}.{form}").write_text("\n".join(lines) + "\n")

# ---- are the two spaces aligned? ---------------------------------------------------------------------------
def retrieval_at_1(p_t, p_s):
    """How often a text's p_s is nearer (in cosine) to its own picture's p_t than to any other; chance 1 / N.
    Arrays (N, d). Equal pictures share the point. It wants both spaces in the SAME coordinates."""
    unit_t, unit_s = (p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-30)
                      for p in (p_t.astype(float), p_s.astype(float)))
    similar = unit_s @ unit_t.T                                   # (N, N), text by picture
    nearest = similar >= similar.max(axis=1, keepdims=True) - 1e-9
    return float((nearest.diagonal() / nearest.sum(axis=1)).mean())

def linear_cka(p_t, p_s):
    """|X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms, X, Y the centred arrays (N, d): 0 to 1, constant: 0.
    Are the same examples alike in both spaces? Rotation and scale do not matter (Kornblith et al. 2019).
    Unless N is far above d, unrelated spaces score well above 0 too: compare arms."""
    x, y = (p - p.mean(axis=0, dtype=float) for p in (p_t, p_s))
    k, m = x @ x.T, y @ y.T                                       # (N, N); <k, m> = |X^T Y|^2
    scale = np.linalg.norm(k) * np.linalg.norm(m)
    return float((k * m).sum() / scale) if scale else 0.0

# ---- statistics of n paired differences, one a seed --------------------------------------------------------
def sign_flip_p(differences, draws=100_000):
    """Two-sided p of "no difference", under which a seed's two arms may be swapped: a coin for each sign.
    Exact over all 2^n signs up to n = 16, else Monte Carlo. n seeds cannot go below 2 / 2^n: 5 give .0625."""
    d, n = np.asarray(differences, float), len(differences)
    signs = (1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1) if n <= 16
             else np.random.default_rng(0).choice([-1, 1], (draws, n)))
    extreme = abs(signs @ d) >= abs(d.sum()) - 1e-12  # or rounding loses ties, even the identity
    return float(extreme.mean() if n <= 16 else (1 + extreme.sum()) / (1 + draws))

def bootstrap_interval(values, draws=10_000):
    """95 % (low, high) around the mean by the studentised bootstrap; None for fewer than 5 values.
    The better-known percentile interval covers 88 % at n = 7 (tests/test_eval.py): resampled means vary too
    little, by sqrt((n-1)/n), and know no t distribution. From few values it is a rough guide either way."""
    if len(values) < 5:
        return None
    x = np.round(np.asarray(values, float), 9)  # so that equal differences are equal to the last bit
    again = np.random.default_rng(0).choice(x, (draws, len(x)))
    again = again[np.ptp(again, axis=1) > 0]  # a resample of one value n times has no t
    if not len(again):
        return float(x.mean()), float(x.mean())
    t = (again.mean(axis=1) - x.mean()) / again.std(axis=1, ddof=1)
    high, low = x.mean() - x.std(ddof=1) * np.quantile(t, [0.025, 0.975])
    return float(low), float(high)

def holm(ps):
    """Holm's adjusted p, in the order given: the k-th smallest of m times m - k + 1, never falling."""
    order, adjusted = np.argsort(ps), np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1))
    return np.minimum(adjusted, 1).tolist()

def mcnemar(right_a, right_b):
    """((both, only a, only b, neither) right, exact p) of two students on the same examples.
    Only examples that one of the two gets right count: were both equally good, each would be a fair coin."""
    a, b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    both, only_a, only_b, neither = (int(x.sum()) for x in (a & b, a & ~b, b & ~a, ~a & ~b))
    n, less = only_a + only_b, min(only_a, only_b)
    return (both, only_a, only_b, neither), min(1.0, 2 * sum(math.comb(n, k) for k in range(less + 1)) / 2**n)

def paired(a, b):
    """The difference of two arms {seed: score} over the seeds that both have; None if there is none."""
    d = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    return {"seeds": len(d), "difference": float(np.mean(d)), "interval": bootstrap_interval(d),
            "p": sign_flip_p(d)} if d else None

def compare(scores, controls, level=0.05):
    """Each arm against each control: {arm: {verdict, note, best_control, comparisons, to_armada}}.

    scores {arm: {seed: score}}. BEATS: above EVERY control. WORSE: below the best one, found by looking: Holm
    corrects over an arm's controls, so that an arm equal to them gets either verdict with probability `level`
    at most. Nothing corrects over the arms of a table. A control is compared with "undistilled" only.
    """
    found = {}
    for arm, mine in scores.items():
        rows = {control: row for control in controls
                if control != arm and (arm not in controls or control == "undistilled")
                and (row := paired(mine, scores[control]))}
        if not rows:
            continue
        for row, p in zip(rows.values(), holm([row["p"] for row in rows.values()])):
            row["p_holm"] = p
            row["verdict"] = ("NO DIFFERENCE" if p > level else "BEATS" if row["difference"] > 0 else "WORSE")
        best = min(rows, key=lambda control: rows[control]["difference"])
        verdict = rows[best]["verdict"]
        if verdict == "BEATS" and any(row["verdict"] != "BEATS" for row in rows.values()):
            verdict = "NO DIFFERENCE"
        # n seeds have no p below 2 / 2^n, which Holm multiplies by the number of controls.
        n, need = min(row["seeds"] for row in rows.values()), math.ceil(math.log2(2 * len(rows) / level))
        note = f"{n} seed{'s' * (n > 1)} cannot reach {100 * level:g} %, {need} can"
        found[arm] = {"verdict": verdict, "best_control": best, "comparisons": rows, "to_armada": None,
                      "note": note if verdict == "NO DIFFERENCE" and n < need else ""}
        if arm not in controls and arm != "armada" and "armada" in scores:
            found[arm]["to_armada"] = paired(mine, scores["armada"])
    return found

# ---- runs --------------------------------------------------------------------------------------------------
def find_cells(runs):
    """The ARM/SEED folders, finished or with a saved student, at or below the given ones, each once."""
    cells = {}
    for run in runs:
        found = {path.parent for path in Path(run).resolve().glob("**/metrics.json")}
        found |= {path.parent.parent for path in Path(run).resolve().glob("**/last/student.json")}
        found = sorted(cell for cell in found if cell.name.isdigit())
        if not found:
            raise UserError(f"{run} holds no saved run (ARM/SEED/): give a training's --out, or part of it")
        cells |= dict.fromkeys(found)
    return list(cells)

def read_cells(folders):
    """{folder: its metrics.json}; an unfinished cell has none."""
    cells = {}
    for path in [folder / "metrics.json" for folder in folders if (folder / "metrics.json").exists()]:
        try:
            cells[path.parent] = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged: delete it and --resume the run") from None
    return cells

def evaluate_cell(cell, data_dir):
    """Score a cell's saved students again, write predictions_*; its metrics anew, and who is right on dev."""
    import torch

    from student import load_student

    config = json.loads((cell / "config.json").read_text())
    metrics = read_cells([cell]).get(cell) or {"task": config["task"], "arm": config["arms"][0]}
    task, device = find_task(config["task"]), "cuda" if torch.cuda.is_available() else "cpu"
    splits = load_task(task.name, data_dir or config["data_dir"], config["cache_dir"])

    def answers(folder, split):
        student = load_student(cell / folder).to(device)
        rows, _ = encode(task, splits[split], student.tokenizer, config["max_length"], student.decoder)
        return student.answers(rows)[0]

    for split in [split for split in splits if split != "train"]:
        found = answers("last", split)
        write_predictions(cell, split, task, splits[split], found)
        metrics[split] = score(task, splits[split], found)
        if split == "dev":
            right = [answer == example.label for answer, example in zip(found, splits[split])]
    if (cell / "best").exists():  # not in a run that was stopped before its first evaluation
        metrics["best"] = {**(metrics.get("best") or {}),
                           "dev": score(task, splits["dev"], answers("best", "dev"))}
    return metrics, right

def by_run(cells):
    """Yields (run folder, task, {arm: {seed: (cell folder, metrics)}}), the arms in the training's order."""
    for run in dict.fromkeys(folder.parent.parent for folder in cells):
        mine = [(folder, metrics) for folder, metrics in cells.items() if folder.parent.parent == run]
        path = run / "config.json"
        arms = {arm: {} for arm in json.loads(path.read_text())["arms"]} if path.exists() else {}
        for folder, metrics in sorted(mine, key=lambda item: int(item[0].name)):
            arms.setdefault(metrics["arm"], {})[int(folder.name)] = folder, metrics
        yield run, find_task(mine[0][1]["task"]), {arm: seeds for arm, seeds in arms.items() if seeds}

# ---- what a person reads -----------------------------------------------------------------------------------
def aligned(rows):
    """Rows of texts -> lines with the columns under one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]

def spread(values):
    """Mean and standard deviation over seeds of fractions, as a text in %."""
    values = [100 * value for value in values if value is not None]
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}" if values else "-"

def report(cells):
    """The text on {cell folder: metrics}, run by run; writes comparison.json into the folder of each run."""
    lines = []
    for run, task, arms in by_run(cells):
        metric, scores, controls = task.metrics[0], {}, []
        rows = ["arm,seeds,last epoch,best epoch*,aligner alone,retrieval@1,CKA,gradient".split(",")]
        for arm, seeds in arms.items():
            found = [metrics for _, metrics in seeds.values()]
            norms = [metrics["grad_norm"] for metrics in found if "grad_norm" in metrics]
            rows.append((arm, str(len(found)), spread(metrics["dev"][metric] for metrics in found),
                         spread(metrics["best"]["dev"][metric] for metrics in found if metrics.get("best")),
                         *(spread((metrics.get(part) or {}).get(name) for metrics in found) for part, name in
                           (("aligner", metric), ("spaces", "retrieval@1"), ("spaces", "cka"))),
                         f"{np.mean(norms):.2f}" if norms else "-"))
            # Only finished cells are compared; one that was stopped on its way has no "control" to tell.
            scores[arm] = {seed: metrics["dev"][metric] for seed, (_, metrics) in seeds.items()
                           if "control" in metrics}
            controls += [arm] if any(metrics.get("control") for metrics in found) else []
        lines += [f"{task.name}: dev {metric} in %, mean ± standard deviation over seeds", *aligned(rows),
                  "* chosen on dev, so too good: compare arms by the last epoch"]
        lines += verdicts(compared := compare(scores, controls))
        if {folder for seeds in arms.values() for folder, _ in seeds.values()} >= {
                path.parent for path in run.glob("*/*/metrics.json")}:  # not for a part of a run
            write = {arm: {"scores": by_seed, "interval": bootstrap_interval([*by_seed.values()]),
                           **compared.get(arm, {})} for arm, by_seed in scores.items() if by_seed}
            (run / "comparison.json").write_text(
                json.dumps({"task": task.name, "metric": metric, "arms": write}, indent=1))
    return "\n".join(lines)

def verdicts(compared):
    """The lines on compare()'s answer, an arm each."""
    def words(row, p="p_holm"):
        interval = row["interval"] and " [{:+.1f}, {:+.1f}]".format(*100 * np.array(row["interval"]))
        return f"{100 * row['difference']:+.1f}{interval or ''}, p {row[p]:.2g}"

    rows = [("arm", "to undistilled", "to its best control", "to armada", "verdict")]
    for arm, answer in compared.items():
        best, each, beside = answer["best_control"], answer["comparisons"], answer["to_armada"]
        more = f" every control: {', '.join(each)}" if answer["verdict"] == "BEATS" else ""
        more += f" ({answer['note']})" if answer["note"] else ""
        rows.append((arm, words(each["undistilled"]) if "undistilled" in each else "-",
                     f"{words(each[best])} ({best})", words(beside, "p") if beside else "-",
                     answer["verdict"] + more))
    if not compared:
        return ["no verdict without a control: train with --arms undistilled,armada,shuffled --seeds 0,1 ..."]
    return ["differences paired by seed, in points [95 % interval], p after Holm (to armada: as it is)",
            *aligned(rows)]

def agreement(a, b, results):
    """The text on two cells, from evaluate_cell's results: on how many dev examples which one is right."""
    (first, right_a), (second, right_b) = results
    if first["task"] != second["task"] or not find_task(first["task"]).labels:
        raise UserError(f"{a} and {b}: example by example, give two cells of one classification task")
    a, b = ("/".join(cell.parts[-3:]) for cell in (a, b))
    (both, only_a, only_b, neither), p = mcnemar(right_a, right_b)
    return (f"{first['task']}, {len(right_a)} dev examples: both right {both}, only {a} {only_a}, "
            f"only {b} {only_b}, both wrong {neither}; McNemar's exact p {p:.2g}")

def plot(cells):
    """Writes learning_curves.png, arms.png and, given two doses, dose_response.png into each run's folder."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None

    def mark(ax, x, values, colour):
        """The seeds as faint dots, their mean with its interval."""
        mean, ends = np.mean(values), bootstrap_interval(values)
        ax.plot([x] * len(values), values, ".", color="0.65", zorder=1)
        ax.errorbar(x, mean, ends and [[mean - ends[0]], [ends[1] - mean]], fmt="o", color="black", capsize=5,
                    markerfacecolor=colour)

    for run, task, arms in by_run(cells):
        figures = {name: Figure(figsize=(7, 4.5), layout="constrained")
                   for name in ("learning_curves", "arms", "dose_response")}
        (curves, dots, doses), rhos = (figure.subplots() for figure in figures.values()), {}
        for i, (arm, seeds) in enumerate(arms.items()):
            by_epoch, (_, first) = {}, next(iter(seeds.values()))
            values = [100 * metrics["dev"][task.metrics[0]] for _, metrics in seeds.values()]
            for folder, _ in seeds.values():
                for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
                    if "dev" in line:
                        by_epoch.setdefault(line["epoch"], []).append(100 * line["dev"][task.metrics[0]])
            curves.plot(by_epoch.keys(), [np.mean(seen) for seen in by_epoch.values()], label=arm,
                        marker="osD^v<>PX*"[i % 10], linestyle=("-", "--", ":", "-.")[i % 4],
                        color=str(0.75 * i / len(arms)))  # told apart in grey print too
            mark(dots, i, values, "white" if first.get("control") else "black")
            kind, _, rho = first.get("teacher", "").partition(":")
            if kind == "painter" and (arm == "armada" or arm.startswith("dose-")):
                rhos[float(rho or 1)] = values
            elif arm == "undistilled":
                doses.axhline(np.mean(values), color="0.4", linestyle="--", label=arm)
                doses.legend()
        for rho in rhos:
            mark(doses, rho, rhos[rho], "black")
        doses.plot(sorted(rhos), [np.mean(rhos[rho]) for rho in sorted(rhos)], color="black")
        doses.set_xlabel("dose of the picture, RHO in painter:RHO (dots are seeds, bars 95 % intervals)")
        dots.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
        dots.set_title("dots are seeds, hollow circles controls, bars 95 % intervals of the mean")
        curves.set_xlabel("epoch (mean over seeds)")
        curves.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        for name in [*figures][:3 if len(rhos) > 1 else 2]:
            figures[name].axes[0].set_ylabel(f"{task.name}, dev {task.metrics[0]} (%)")
            figures[name].savefig(run / f"{name}.png", dpi=150)
            print(f"wrote {run / name}.png")

def main(argv=None):
    parser = Parser(prog="eval.py", allow_abbrev=False, description="Compare arms, or two students.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder that a training wrote, or part of it; "
                        "two ARM/SEED folders are compared example by example.")
    parser.add_argument("--plot", action="store_true", help="Draw curves, arms and doses into RUN.")
    parser.add_argument("--rescore", action="store_true", help="Score finished cells again too.")
    parser.add_argument("--data-dir", help="Folder of the task files, where they have moved since.")
    args = parser.parse_args(argv)
    try:
        folders, results = find_cells(args.runs), {}
        pair = len(args.runs) == 2 and folders == [Path(run).resolve() for run in args.runs]  # are cells
        cells = {} if pair or args.rescore else read_cells(folders)
        for folder in [folder for folder in folders if folder not in cells]:
            print(f"scoring {folder}", file=sys.stderr)
            results[folder] = evaluate_cell(folder, args.data_dir)
        if pair:
            print(agreement(*folders, results.values()))
        else:
            cells = {folder: cells.get(folder) or results[folder][0] for folder in folders}
            print(report(cells))
            if args.plot:
                plot(cells)
    except (UserError, OSError) as error:  # OSError: a folder that cannot be written
        parser.exit(2, f"eval.py: error: {error}\n")

if __name__ == "__main__":
    main()
