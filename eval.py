"""Metrics, evaluation of saved runs, and whether the teacher mattered.

    compute_metrics("mrpc", predictions, labels)  # {"accuracy": ..., "f1": ...}, fractions of 1
    python eval.py runs/rte [--plot]              # the table, each arm against its controls, a verdict
    python eval.py runs/rte/armada/0 runs/rte/undistilled/0   # two students, example by example (McNemar)
"""
import contextlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

from data import ANSWERS, Parser, UserError, encode, find_task, load_task, seed_of

# ---- metrics -----------------------------------------------------------------------------------------------
def _correlation(a, b):
    """Pearson's r; 0 where a column is constant. Of two 0/1 columns it is Matthews' coefficient."""
    constant = np.ptp(a) == 0 or np.ptp(b) == 0  # asked of the values: rounding leaves a - mean(a) off zero
    return 0.0 if constant else np.corrcoef(a, b)[0, 1]

def extract_answer(text, reference):
    """What a generated text answers, of the reference's family: "answer2", "true", "b", "1234.5"; or None. In
    the sentence after the last "answer is" it is the first word or letter, the last number ("is 3 + 4 = 7");
    else the last in the text."""
    # DEVIATION: LLM-Adapters takes the first letter or word anywhere, such as the A of "A man has ...".
    like = next(like for like in ANSWERS if re.fullmatch(like, reference))
    number = like == ANSWERS[-1]
    like = like if number else rf"(?<![A-Za-z0-9]){like}(?![A-Za-z0-9])"  # whole words
    sentence = re.split(r"\.\s|\n", text.rpartition("answer is")[2])[0] if "answer is" in text else ""
    found = re.findall(like, sentence)[-1 if number else 0:][:1] or re.findall(like, text)[-1:]
    return found[0].lower().replace(",", "") if found else None

def rouge_l(output, reference):
    """F1 of the longest common subsequence of words, c words long: 2 c / (words of both) (Lin 2004). Equal to
    the package rouge-score without its stemmer."""
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (output, reference))
    row = [0] * (len(b) + 1)  # c of the words of a so far and each beginning of b
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return 2 * row[-1] / max(1, len(a) + len(b))

def generation_metrics(task, outputs, references):
    """Of N texts and N tuples of references. accuracy: the extracted answer is right (a number to .001, as in
    LLM-Adapters); answered: there is one. rouge_l_unstemmed, of the best reference, is ours; rouge_l that of
    the package rouge-score with its stemmer, where it is installed."""
    if "accuracy" in task.metrics:
        found = [(extract_answer(text, answer), answer.lower().replace(",", ""))
                 for text, (answer,) in zip(outputs, references)]
        right = [said == answer or said is not None and bool(re.fullmatch(ANSWERS[-1], answer))
                 and abs(float(said) - float(answer)) <= 1e-3 for said, answer in found]
        answered = [said is not None for said, _ in found]
        return {"accuracy": float(np.mean(right)), "answered": float(np.mean(answered))}
    scorers = {}
    with contextlib.suppress(ImportError):
        from rouge_score.rouge_scorer import RougeScorer
        stemmed = RougeScorer(["rougeL"], use_stemmer=True)
        scorers["rouge_l"] = lambda text, reference: stemmed.score(reference, text)["rougeL"].fmeasure
    scorers["rouge_l_unstemmed"] = rouge_l
    return {name: float(np.mean([max(score(text, each) for each in several)
                                 for text, several in zip(outputs, references)]))
            for name, score in scorers.items()}

def compute_metrics(task_name, predictions, labels):
    """{metric: float} of a registered task, from N class ids (scores; texts and tuples of references) each.
    Undefined values are 0."""
    task = find_task(task_name)
    if task.kind == "generate":
        return generation_metrics(task, predictions, labels)
    p, y = np.asarray(predictions, float), np.asarray(labels, float)
    if p.shape != y.shape or p.ndim != 1 or not len(p):
        raise ValueError(f"predictions {p.shape} and labels {y.shape} must be two equal, non-empty lists")
    classes = np.union1d(p, y) if len(task.labels) > 2 else [1]  # f1: mean over those seen, or that of "yes"
    # 2 TP / (2 TP + FP + FN) of each class; 0 where it is neither predicted nor there.
    f1 = [2 * ((p == c) & (y == c)).sum() / max(1, (p == c).sum() + (y == c).sum()) for c in classes]
    # Ranks, doubled: how many are smaller plus how many are not larger, so that equal values share one.
    ranks = (np.searchsorted(np.sort(v), v) + np.searchsorted(np.sort(v), v, "right") for v in (p, y))
    values = {"accuracy": (p == y).mean(), "f1": np.mean(f1), "mcc": _correlation(p, y),
              "pearson": _correlation(p, y), "spearman": _correlation(*ranks)}
    return {name: float(values[name]) for name in task.metrics}

def score(task, examples, answers):
    """Metrics of a split; None where its labels are unknown (the official test sets)."""
    known = examples[0].label is not None
    return compute_metrics(task.name, answers, [example.label for example in examples]) if known else None

def write_predictions(folder, split, task, examples, answers):
    """predictions_SPLIT: index<TAB>prediction for GLUE's server, {"idx", "label"} lines for SuperGLUE's; of
    generated texts, lines with all that a person wants to read."""
    if task.kind == "generate":
        return (Path(folder) / f"predictions_{split}.jsonl").write_text("".join(json.dumps(
            {"idx": each.idx, **each.fields, "references": each.label, "output": text}
            | ({"answer": extract_answer(text, each.label[0])} if "accuracy" in task.metrics else {}),
            ensure_ascii=False) + "\n" for each, text in zip(examples, answers)), encoding="utf-8")
    spelled = {"wsc": str.capitalize, "copa": int}.get(task.name, str)  # WSC's is True, WiC's is true
    rows = [(example.idx, spelled(task.labels[int(answer)]) if task.labels else f"{answer:.3f}")
            for example, answer in zip(examples, answers)]
    form = "jsonl" if ".jsonl:" in examples[0].where else "tsv"
    lines = ([json.dumps({"idx": idx, "label": name}) for idx, name in rows] if form == "jsonl"
             else ["index\tprediction", *(f"{idx}\t{name}" for idx, name in rows)])
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
    Blind to rotation and scale (Kornblith et al. 2019). Compare arms: it starts at 0 only if N >> d."""
    x, y = (p - p.mean(axis=0, dtype=float) for p in (p_t, p_s))
    k, m = x @ x.T, y @ y.T                                       # (N, N); <k, m> = |X^T Y|^2
    return float((k * m).sum() / max(1e-300, np.linalg.norm(k) * np.linalg.norm(m)))

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
    The better-known percentile interval knows no t and covers 88 % at n = 7 (tests/test_eval.py)."""
    if len(values) < 5:
        return None
    x = np.round(np.asarray(values, float), 9)  # so that equal differences are equal to the last bit
    again = np.random.default_rng(0).choice(x, (draws, len(x)))
    again = again[np.ptp(again, axis=1) > 0]  # a resample of one value n times has no t
    t = (again.mean(axis=1) - x.mean()) / again.std(axis=1, ddof=1)
    high, low = np.quantile(t, [0.975, 0.025]) if len(t) else (0, 0)  # without any, all values are equal
    return float(x.mean() - high * x.std(ddof=1)), float(x.mean() - low * x.std(ddof=1))

def holm(ps):
    """Holm's adjusted p, in the order given: each times how many are not smaller, never falling, up to 1."""
    return [min(1.0, max(p * sum(q >= p for q in ps) for p in ps if p <= mine)) for mine in ps]

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
    """scores {arm: {seed: score}} -> {arm: {verdict, note, best_control, comparisons, to_armada}}.
    BEATS: above EVERY control; WORSE: below the best. Holm corrects over an arm's controls (an equal arm gets
    a verdict with probability `level` at most), nothing over the arms. A control meets "undistilled" only."""
    found = {}
    for arm, mine in scores.items():
        others = [name for name in controls if name != arm and (arm not in controls or name == "undistilled")]
        rows = {name: row for name in others if (row := paired(mine, scores[name]))}
        if not rows:
            continue
        for row, p in zip(rows.values(), holm([row["p"] for row in rows.values()])):
            row["p_holm"] = p
            row["verdict"] = "NO DIFFERENCE" if p > level else "BEATS" if row["difference"] > 0 else "WORSE"
        best = min(rows, key=lambda name: rows[name]["difference"])
        beats_all = all(row["verdict"] == "BEATS" for row in rows.values())
        verdict = "BEATS" if beats_all else "WORSE" if rows[best]["verdict"] == "WORSE" else "NO DIFFERENCE"
        # n seeds have no p below 2 / 2^n, which Holm multiplies by the number of controls.
        n, need = min(row["seeds"] for row in rows.values()), math.ceil(math.log2(2 * len(rows) / level))
        note = f"{n} seed{'s' * (n > 1)} cannot reach {100 * level:g} %, {need} can"
        beside = paired(mine, {} if arm in [*controls, "armada"] else scores.get("armada", {}))
        found[arm] = dict(verdict=verdict, best_control=best, comparisons=rows, to_armada=beside,
                          note=note if verdict == "NO DIFFERENCE" and n < need else "")
    return found

def headline(task, cells):
    """The metric that stands for a task: the first that all cells have (rouge_l needs a package)."""
    scores = [cell[split] for cell in cells for split in ("dev", "test") if cell.get(split)]
    return next(name for name in task.metrics if all(name in each for each in scores))

def find_cells(runs):
    """{ARM/SEED folder: its metrics.json, or {} where the saved student is not finished} at or below runs."""
    cells = {}
    for run in runs:
        found = [folder for folder in sorted(Path(run).resolve().glob("**/")) if folder.name.isdigit() and
                 any((folder / name).exists() for name in ("metrics.json", "last/student.json"))]
        if not found:
            raise UserError(f"{run} holds no saved run (ARM/SEED/): give a training's --out, or part of it")
        for path in [folder / "metrics.json" for folder in found]:
            try:
                cells[path.parent] = json.loads(path.read_text()) if path.exists() else {}
            except ValueError:
                raise UserError(f"{path} is damaged: delete it and --resume the run") from None
    return cells

def shard_list(items):
    """Every N-th item, equally many in each process: the first ones stand in where they do not go round."""
    from student import rank, world
    n = -(-len(items) // world()) * world()
    return [items[i % len(items)] for i in range(rank(), n, world())]

def gather_list(own, n):
    """The n results, in order, of which each process computed its shard_list()."""
    import torch.distributed as dist
    from student import world
    found = [own] * world()
    if world() > 1:
        dist.all_gather_object(found, own)
    return [result for group in zip(*found) for result in group][:n]

def score_student(student, task, examples, rows, *, split, seed, batch_size, autocast=contextlib.nullcontext,
                  temperature=0.0, keep=0):
    """(metrics, answers, p_s of the first `keep` texts) of a student on a split: examples and their encoded
    rows. metrics are None for unknown labels. Of several processes each reads a part, and all get all."""
    import torch
    from student import world
    n, keep = len(rows), min(len(rows), keep)
    rows, size, keep_own, p_s = shard_list(rows), -(-batch_size // world()), -(-keep // world()), []
    if student.generates:
        torch.manual_seed(seed_of(seed, "sample", split))
        answers = student.generate(rows, size, autocast, temperature)
    else:  # twice as many: no activations are kept for a backward pass
        answers, p_s = student.answers(rows, 2 * size, autocast, keep_own)
    answers = gather_list(answers, n)
    scores = score(task, examples, answers)
    if student.generates and split == "dev":  # a test file's may be wrong: some are another model's
        losses, p_s = student.answers(rows, size, autocast, keep_own)
        scores["loss"] = sum(gather_list(losses, n)) / n
    return scores, answers, gather_list(p_s, keep)

def evaluate_cell(cell, metrics, data_dir, other_task=None):
    """Score a cell's saved students again, into `metrics` and predictions_* -> who is right on dev. Given
    another task, which is trained on the same files: on its test file alone, into predictions_TASK."""
    import torch
    from types import SimpleNamespace

    from student import load_student, precision
    config = json.loads((cell / "config.json").read_text())  # an earlier version had other fields
    trained, task = find_task(config["task"]), find_task(other_task or config["task"])
    if other_task and (not task.files or task.files != trained.files):
        raise UserError(f"--task {task.name}: {cell} was trained on other files, those of {trained.name}")
    print(f"scoring {cell}", file=sys.stderr)
    amp = config["amp"] if config["amp"] != "fp16" or torch.cuda.is_available() else "off"  # as training had it
    device, autocast, *_ = precision(SimpleNamespace(device="auto", amp=amp, fsdp=False))
    splits = {split: examples if split == "train" else examples[:config["eval_limit"]] for split, examples in
              load_task(task.name, data_dir or config["data_dir"], config["cache_dir"]).items()}
    metrics.update(task=task.name, arm=config["arms"][0])

    def scored(folder, split):
        """(metrics, answers) of the student in a folder of the cell."""
        student = load_student(cell / folder).to(device)
        if torch.bfloat16 in autocast.args:
            student.round_base()
        rows, _ = encode(task, splits[split], student.tokenizer, config["max_length"], student.decoder,
                         config.get("max_new_tokens"))
        scores, answers, _ = score_student(
            student, task, splits[split], rows, split=split, seed=config["seeds"][0], autocast=autocast,
            batch_size=config["micro_batch"], temperature=config.get("sampling_temperature", 0.0))
        return scores, answers

    if other_task:  # dev is that of the same training file
        metrics["test"], answers = scored("last", "test")
        write_predictions(cell, task.name.replace("/", "_"), task, splits["test"], answers)
        return []
    if (cell / "best").exists():  # not in a run that was stopped before its first evaluation
        metrics.setdefault("best", {})["dev"], _ = scored("best", "dev")
    found = {}
    for split in [split for split in splits if split != "train"]:
        metrics[split], found[split] = scored("last", split)
        write_predictions(cell, split, task, splits[split], found[split])
    return [answer == example.label for answer, example in zip(found["dev"], splits["dev"])]

def by_run(cells):
    """Yields (run folder, task, {arm: {seed: metrics}}), the arms in the training's order."""
    for run in dict.fromkeys(folder.parents[1] for folder in cells):
        mine = sorted((int(path.name), path) for path in cells if cells[path] and path.parents[1] == run)
        config = run / "config.json"
        arms = {arm: {} for arm in json.loads(config.read_text())["arms"]} if config.exists() else {}
        for seed, folder in mine:
            arms.setdefault(cells[folder]["arm"], {})[seed] = cells[folder]
        yield run, find_task(cells[folder]["task"]), {arm: seeds for arm, seeds in arms.items() if seeds}

# ---- what a person reads -----------------------------------------------------------------------------------
def aligned(rows):
    """Rows of texts -> lines with the columns under one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]

def spread(cells, *keys):
    """Mean and standard deviation in % of the fraction at [key][key] ... of those cells that have one."""
    for key in keys:
        cells = [cell[key] for cell in cells if cell.get(key) is not None]
    values = 100 * np.array(cells)
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}" if len(values) else "-"

def report(cells, save=True):
    """The text on {cell folder: metrics}, run by run; writes comparison.json into the folder of each run."""
    lines = []
    for run, task, arms in by_run(cells):
        metric = headline(task, [cell for seeds in arms.values() for cell in seeds.values()])
        scores, controls, split = {}, [], "dev"  # on which arms are compared
        columns = {"last epoch": ("dev", metric), "best epoch*": ("best", "dev", metric),
                   "aligner alone": ("aligner", metric), "retrieval@1": ("spaces", "retrieval@1"),
                   "CKA": ("spaces", "cka")}
        if task.kind == "generate":  # dev is part of a training file of several tasks; test is this one's
            del columns["aligner alone"]  # which scores a bag of tokens
            split, columns = "test", {"untrained": ("untrained", metric), **columns, "test": ("test", metric)}
        rows = [("arm", "seeds", *columns, "gradient")]
        for arm, seeds in arms.items():
            norms = [cell["grad_norm"] for cell in seeds.values() if "grad_norm" in cell]
            rows.append((arm, str(len(seeds)), *(spread(seeds.values(), *keys) for keys in columns.values()),
                         f"{np.mean(norms):.2f}" if norms else "-"))
            # Only finished cells are compared; one that was stopped on its way has no "control" to tell.
            scores[arm] = {seed: cell[split][metric] for seed, cell in seeds.items() if "control" in cell}
            controls += [arm] if any(cell.get("control") for cell in seeds.values()) else []
        compared = compare(scores, controls)
        lines += [f"{task.name}: dev {metric} in %, mean ± standard deviation over seeds", *aligned(rows),
                  "* chosen on dev, so too good: compare arms by the last epoch", *verdicts(compared, split)]
        if save and cells.keys() >= {path.parent for path in run.glob("*/*/metrics.json")}:  # of a whole run
            answer = {arm: {"scores": by_seed, "interval": bootstrap_interval([*by_seed.values()]),
                            **compared.get(arm, {})} for arm, by_seed in scores.items() if by_seed}
            answer = {"task": task.name, "metric": metric, "arms": answer}
            (run / "comparison.json").write_text(json.dumps(answer, indent=1))
    return "\n".join(lines)

def verdicts(compared, split="dev"):
    """The lines on compare()'s answer, an arm each."""
    def words(row):
        interval = " [{:+.1f}, {:+.1f}]".format(*100 * np.array(row["interval"])) if row["interval"] else ""
        return f"{100 * row['difference']:+.1f}{interval}, p {row.get('p_holm', row['p']):.2g}"

    if not compared:
        return ["no verdict without a control: train with --arms undistilled,armada,shuffled --seeds 0,1 ..."]
    rows = [("arm", "to undistilled", "to its best control", "to armada", "verdict")]
    for arm, answer in compared.items():
        best, each, note = answer["best_control"], answer["comparisons"], answer["note"]
        more = f" every control: {', '.join(each)}" if answer["verdict"] == "BEATS" else note and f" ({note})"
        beside = [words(row) if row else "-" for row in (each.get("undistilled"), answer["to_armada"])]
        rows.append((arm, beside[0], f"{words(each[best])} ({best})", beside[1], answer["verdict"] + more))
    where = "" if split == "dev" else f"on {split} "
    return [f"differences {where}paired by seed, in points [95 % interval], p after Holm "
            "(to armada: as it is)",
            *aligned(rows)]

def plot(cells):
    """Writes learning_curves.png, arms.png and, given two doses, dose_response.png into each run's folder."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None

    def mark(ax, x, values, colour):
        """The seeds as faint dots, their mean with its interval where there is one."""
        ax.plot([x] * len(values), values, ".", color="0.65")
        ax.plot([x, x], bootstrap_interval(values) or [np.nan, np.nan], "_-", color="black", markersize=10)
        ax.plot(x, np.mean(values), "o", color="black", markerfacecolor=colour)

    labels = {"learning_curves": "epoch (mean over seeds)",
              "arms": "dots are seeds, hollow circles controls, bars 95 % intervals of the mean",
              "dose_response": "dose of the picture, RHO in painter:RHO; dots are seeds, bars 95 % intervals"}
    for run, task, arms in by_run(cells):
        axes = {name: Figure(figsize=(7, 4.5), layout="constrained").subplots() for name in labels}
        (curves, dots, doses), mean_at = axes.values(), {}
        metric = headline(task, [cell for seeds in arms.values() for cell in seeds.values()])
        for i, (arm, seeds) in enumerate(arms.items()):
            values, by_epoch = [100 * cell["dev"][metric] for cell in seeds.values()], {}
            logs = "".join((run / arm / str(seed) / "log.jsonl").read_text() for seed in seeds)
            for line in map(json.loads, logs.splitlines()):
                if "dev" in line:
                    by_epoch.setdefault(line["epoch"], []).append(100 * line["dev"][metric])
            style = "osD^v<>PX*"[i % 10] + ("-", "--", ":", "-.")[i % 4]  # told apart in grey print too
            curves.plot(by_epoch.keys(), [np.mean(seen) for seen in by_epoch.values()], style,
                        color=str(0.75 * i / len(arms)), label=arm)
            first = next(iter(seeds.values()))
            mark(dots, i, values, "white" if first.get("control") else "black")
            kind, _, rho = first.get("teacher", "").partition(":")
            if kind == "painter" and (arm == "armada" or arm.startswith("dose-")):
                mean_at[float(rho or 1)] = np.mean(values)
                mark(doses, float(rho or 1), values, "black")
            elif arm == "undistilled":
                doses.legend([doses.axhline(np.mean(values), color="0.4", linestyle="--")], [arm])
        doses.plot(*zip(*sorted(mean_at.items())), color="black")
        dots.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
        curves.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        for name, ax in [*axes.items()][:3 if len(mean_at) > 1 else 2]:
            ax.set(xlabel=labels[name], ylabel=f"{task.name}, dev {metric} (%)")
            ax.figure.savefig(run / f"{name}.png", dpi=150)
            print(f"wrote {run / name}.png")

def agreement(cells, right):
    """The text on two cells {folder: metrics}, given for each: is a dev example answered right?"""
    task, other = (metrics["task"] for metrics in cells.values())
    a, b = ("/".join(folder.parts[-3:]) for folder in cells)
    if task != other or not find_task(task).labels:
        raise UserError(f"{a} and {b}: example by example, give two cells of one classification task")
    (both, only_a, only_b, neither), p = mcnemar(*right)
    return (f"{task}, {len(right[0])} dev examples: both right {both}, only {a} {only_a}, "
            f"only {b} {only_b}, both wrong {neither}; McNemar's exact p {p:.2g}")

def main(argv=None):
    parser = Parser(prog="eval.py", allow_abbrev=False, description="Compare arms, or two students.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="A run, part of it, or two ARM/SEED folders.")
    parser.add_argument("--plot", action="store_true", help="Draw curves, arms and doses into RUN.")
    parser.add_argument("--rescore", action="store_true", help="Score finished cells again too.")
    parser.add_argument("--task", help="Score on the test file of this task, trained on the same files.")
    parser.add_argument("--data-dir", help="Folder of the task files, where they have moved since.")
    args = parser.parse_args(argv)
    try:
        cells = find_cells(args.runs)
        pair = len(args.runs) == 2 and list(cells) == [Path(run).resolve() for run in args.runs]
        if args.task and not (cells := {folder: metrics for folder, metrics in cells.items() if metrics}):
            raise UserError("--task: no cell there is finished; go on with train.py --resume first")
        right = [evaluate_cell(folder, metrics, args.data_dir, args.task) for folder, metrics in cells.items()
                 if pair or args.rescore or args.task or not metrics]
        print(agreement(cells, right) if pair else report(cells, save=not args.task))
        if args.plot and not pair:
            plot(cells)
    except (UserError, OSError) as error:  # OSError: a folder that cannot be written
        parser.exit(2, f"eval.py: error: {error}\n")

if __name__ == "__main__":
    main()
