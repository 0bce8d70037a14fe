"""Metrics, evaluation of saved runs, and whether the teacher mattered.

    compute_metrics("mrpc", predictions, labels)  # {"accuracy": ..., "f1": ...}, fractions of 1
    python eval.py runs/rte [--plot]              # the table, each arm against its controls
    python eval.py runs/rte/armada/0 runs/rte/undistilled/0   # two students, example by example

Shapes: N texts or predictions, d the space that student and teacher share, n seeds.
Words: an arm is one way to train (armada, undistilled, ...); a control is an arm whose teacher
cannot help; a cell is one arm with one seed and lives in the folder RUN/ARM/SEED.
"""
import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data import (ANSWERS, MINUS, STOPPED, TASKS, Parser, UserError, encode, exit_with_message,
                  find_task, known, load_task, parse_json, prepare_console, read_json, seed_of)

NUMBER = ANSWERS[-1]  # the one family of answers that are compared by value, not by spelling


# ---- metrics ----

def compute_metrics(task_name, predictions, labels):
    """Compute the metrics of a registered task: {name: float}, fractions of 1 or correlations.

    Both arguments hold N class ids or N scores. Where the task is to generate, predictions are N
    texts and labels N tuples of reference texts. A value that is undefined, such as the
    correlation with a constant, is 0. Raises ValueError for lists that do not match, and for what
    is not finite.
    """
    task = find_task(task_name)
    if task.kind == "generate":
        return generation_metrics(task, predictions, labels)
    p = np.asarray(predictions, float)  # (N,)
    y = np.asarray(labels, float)       # (N,)
    if p.shape != y.shape or p.ndim != 1 or not len(p):
        raise ValueError(
            f"predictions {p.shape} and labels {y.shape} must be two equal, non-empty lists")
    check_finite(p, "a prediction")
    check_finite(y, "a label")
    # With two classes F1 is that of "yes"; with more it is the mean over the classes seen.
    classes = [1]
    if len(task.labels) > 2:
        classes = np.union1d(p, y)
    values = {
        "accuracy": (p == y).mean(),
        "f1": mean_f1(p, y, classes),
        "mcc": correlation(p, y),  # Matthews' coefficient is Pearson's r of two 0/1 columns
        "pearson": correlation(p, y),
        "spearman": correlation(ranks(p), ranks(y)),
    }
    return {name: float(values[name]) for name in task.metrics}


DIVERGED = ("is not a finite number, as of a student that diverged: train it again with a smaller "
            "--lr, or leave it out")


def check_finite(values, what):
    """Raise a UserError that begins with `what` unless all numbers are finite.

    Whatever is compared with nan is False: it would pass for a wrong answer, and for a p of 0.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{what} {DIVERGED}")


def mean_f1(p, y, classes):
    """F1 = 2 TP / (2 TP + FP + FN), averaged over classes; 0 for a class that is nowhere."""
    scores = []
    for c in classes:
        hits = ((p == c) & (y == c)).sum()        # TP
        named = (p == c).sum() + (y == c).sum()   # (TP + FP) + (TP + FN)
        scores.append(2 * hits / max(1, named))
    return np.mean(scores)


def correlation(a, b):
    """Compute Pearson's r of two columns (N,); 0 where one of them is constant."""
    # Ask the values themselves: rounding can leave a - mean(a) of a constant column off zero.
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return np.corrcoef(a, b)[0, 1]


def ranks(values):
    """Rank N values from 1, the smallest, to N; equal values share the mean of their ranks.

    The rule for ties, on 10, 20, 20, 30: one value is smaller than 20 and three are not larger,
    so the two 20s take up the ranks 2 and 3, and each gets 2.5. Spearman's correlation is
    Pearson's of such ranks; the shortcut with squared differences is wrong once there are ties.
    """
    ascending = np.sort(values)                                  # (N,)
    smaller = np.searchsorted(ascending, values, "left")         # (N,), how many are < each
    not_larger = np.searchsorted(ascending, values, "right")     # (N,), how many are <= each
    first = smaller + 1
    last = not_larger
    return (first + last) / 2                                    # (N,)


def generation_metrics(task, outputs, references):
    """Score N generated texts against N tuples of reference texts: {name: float}."""
    if len(outputs) != len(references) or not len(outputs):
        raise ValueError(f"{len(outputs)} texts and {len(references)} tuples of references must be "
                         "two equal, non-empty lists")
    if any(isinstance(accepted, str) for accepted in references):
        raise ValueError("each text needs a tuple of references, not one string")
    if "accuracy" in task.metrics:
        return answer_metrics(outputs, references)
    return rouge_metrics(outputs, references)


def answer_metrics(outputs, references):
    """Return how often the extracted answer is right and how often there is one ("answered")."""
    right = []
    answered = []
    for output, accepted in zip(outputs, references):
        answer, answer_is_right = best_answer(output, accepted)
        right.append(answer_is_right)
        answered.append(answer is not None)
    return {"accuracy": float(np.mean(right)), "answered": float(np.mean(answered))}


def best_answer(output, references):
    """Return (what a text answers, whether that is one of the accepted references).

    Each reference tells where to look. If none is met, the first answer that was found counts.
    """
    first = None
    for reference in references:
        answer = extract_answer(output, reference)
        if is_right(answer, reference):
            return answer, True
        if first is None:
            first = answer
    return first, False


def is_right(answer, reference):
    """Tell whether an extracted answer (or None) is right; a number to .001, as in LLM-Adapters."""
    expected = normalise(reference)
    if answer is None:
        return False
    if answer == expected:
        return True
    if not re.fullmatch(NUMBER, expected):
        return False
    return abs(float(answer) - float(expected)) <= 1e-3


def extract_answer(text, reference):
    """Return what a generated text answers, such as "answer2", "true", "b", "1234.5"; or None.

    The reference tells what an answer looks like (data.ANSWERS). It is looked for in the sentence
    after the last "answer is": there it is the first word or letter, but the last number, as in
    "the answer is 3 + 4 = 7". Where that finds nothing, it is the last one in the whole text.
    Raises UserError for a reference that is no answer.
    """
    # DEVIATION: LLM-Adapters takes the first letter or word anywhere, such as the A of
    # "A man has ...".
    text = plain_numbers(text)
    families = [family for family in ANSWERS if re.fullmatch(family, plain_numbers(reference))]
    if not families:
        raise UserError(f"the reference {reference!r} is no answer: "
                        "expected true, answer1 ..., A ... or a number")
    family = families[0]
    pattern = family
    if family != NUMBER:
        pattern = rf"(?<![A-Za-z0-9]){family}(?![A-Za-z0-9])"  # whole words only

    parts = re.split(r"(?i)answer\s+is", text)
    if len(parts) > 1:
        sentence = re.split(r"\.\s|\n", parts[-1])[0]  # the point in 3.5 does not end a sentence
        in_sentence = re.findall(pattern, sentence)
        if in_sentence and family == NUMBER:
            return normalise(in_sentence[-1])
        if in_sentence:
            return normalise(in_sentence[0])
    in_text = re.findall(pattern, text)
    if in_text:
        return normalise(in_text[-1])
    return None


def normalise(answer):
    """Spell an answer so that equal ones are equal strings: in lower case, 1,234 as 1234."""
    return plain_numbers(answer).lower().replace(",", "")


def plain_numbers(text):
    """Spell a text's numbers as on a keyboard: \u22125 as -5, and 1\u202f234 or 1'234 as 1234."""
    text = re.sub(MINUS, "-", text)
    return re.sub(THOUSANDS, "", text)


# Between a digit and just three of them: unbreakable and thin spaces, and what stands for a comma.
THOUSANDS = r"(?<=\d)[\u00a0\u2009\u202f'\u2019_](?=\d{3}(?!\d))"


def rouge_metrics(outputs, references):
    """Average ROUGE-L over the texts, each against the reference that it resembles most.

    rouge_l_unstemmed is ours and always there. rouge_l, with which papers report, is that of the
    package rouge-score with its stemmer, where it is installed (pip install rouge-score).
    """
    scorers = {}
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        pass
    else:
        package = RougeScorer(["rougeL"], use_stemmer=True)

        def stemmed(text, reference):
            return package.score(reference, text)["rougeL"].fmeasure

        scorers["rouge_l"] = stemmed
    scorers["rouge_l_unstemmed"] = rouge_l

    values = {}
    for name, scorer in scorers.items():
        best = []
        for text, alternatives in zip(outputs, references):
            best.append(max(scorer(text, reference) for reference in alternatives))
        values[name] = float(np.mean(best))
    return values


def rouge_l(output, reference):
    """ROUGE-L = 2 c / (words of both texts), c words long being their longest common subsequence.

    It is an F1 between 0 and 1, defined in Lin 2004 and equal to the package rouge-score without
    its stemmer. The table of c is filled row by row, of which two are kept: time is the product of
    the two lengths.
    """
    a = re.findall("[a-z0-9]+", output.lower())
    b = re.findall("[a-z0-9]+", reference.lower())
    row = [0] * (len(b) + 1)  # row[j] is c of the words of a read so far and the first j of b
    for word in a:
        above = row
        row = [0]
        for j, other in enumerate(b):
            if word == other:
                row.append(above[j] + 1)
            else:
                row.append(max(above[j + 1], row[j]))
    return 2 * row[-1] / max(1, len(a) + len(b))


def score(task, examples, answers):
    """Return the metrics over the rows with a label; None where no row has one (official tests).

    Where only some rows have one, a line on stderr says how many.
    """
    if task.kind != "generate":
        check_finite(answers, "a prediction")
    scored = []  # the answers to the rows with a label
    labels = []
    for example, answer in zip(examples, answers, strict=True):
        if example.label is not None:
            scored.append(answer)
            labels.append(example.label)
    if not labels:
        return None
    if len(labels) < len(examples):
        from student import rank
        path, _, _ = examples[0].where.rpartition(":")
        if rank() == 0:  # of several processes one says so
            print(f"{path}: {len(labels)} of {len(examples)} rows have a label, only they are "
                  "scored", file=sys.stderr)
    return compute_metrics(task.name, scored, labels)


# ---- are the two spaces aligned? ----

def retrieval_at_1(p_t, p_s):
    """Return how often a text's p_s is nearest to its own picture's p_t; pure chance is 1 / N.

    Both are arrays (N, d) and near means a high cosine. Equal pictures share the point. It wants
    both spaces in the SAME coordinates: a rotation of one of them, which linear_cka does not see,
    destroys it.
    """
    check_finite(p_t, "a picture's projection")
    check_finite(p_s, "a text's projection")
    similarity = unit_rows(p_s) @ unit_rows(p_t).T                # (N, N), text by picture
    best = similarity.max(axis=1, keepdims=True)                  # (N, 1)
    nearest = similarity >= best - 1e-9                           # (N, N), ties up to rounding
    points = nearest.diagonal() / nearest.sum(axis=1)             # (N,)
    return float(points.mean())


def unit_rows(p):
    """Scale each row to length 1; a row of zeros stays one, for it has no direction."""
    p = p.astype(float)                                           # (N, d)
    lengths = np.linalg.norm(p, axis=1, keepdims=True)            # (N, 1)
    return p / np.maximum(lengths, 1e-30)                         # (N, d)


def linear_cka(p_t, p_s):
    """CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms, X and Y the centred arrays (N, d).

    It lies between 0 and 1, is 0 where one array is constant, and is blind to rotation and scale
    (Kornblith et al. 2019). Use it to compare arms: of unrelated arrays it is near 0 only if
    N >> d. It is computed from matrices (N, N), since <X X^T, Y Y^T> = |X^T Y|^2.
    """
    check_finite(p_t, "a picture's projection")
    check_finite(p_s, "a text's projection")
    x = p_t - p_t.mean(axis=0, dtype=float)                       # (N, d)
    y = p_s - p_s.mean(axis=0, dtype=float)                       # (N, d)
    k = x @ x.T                                                   # (N, N)
    m = y @ y.T                                                   # (N, N)
    norms = np.linalg.norm(k) * np.linalg.norm(m)
    return float((k * m).sum() / max(1e-300, norms))


# ---- does the teacher matter? statistics of n paired differences, one a seed ----

def compare(scores, controls, level=0.05):
    """Compare each arm with the controls: {arm: {verdict, note, best_control, ...}}.

    scores is {arm: {seed: score}}, controls a list of arms. A control itself is compared with
    "undistilled" only, and "undistilled" with nothing. The verdict BEATS means above EVERY control,
    WORSE means below the best one, at significance `level`. Holm's correction is over an arm's
    controls, so an arm that equals them gets a verdict with probability `level` at most; nothing
    corrects over the arms. "comparisons" holds the numbers, control by control, and "to_armada"
    those of an ablation against armada, without a verdict. Raises UserError, which names arm and
    seed, for a score that is not finite.
    """
    for arm, by_seed in scores.items():
        for seed, score_of_seed in by_seed.items():
            check_finite(score_of_seed, f"arm {arm}, seed {seed}: the score {score_of_seed}")
    answer = {}
    for arm, by_seed in scores.items():
        opponents = [name for name in controls if name != arm]
        if arm in controls:
            opponents = [name for name in opponents if name == "undistilled"]
        comparisons = compare_with_each(by_seed, {name: scores[name] for name in opponents}, level)
        if not comparisons:
            continue
        best = min(comparisons, key=lambda name: comparisons[name]["difference"])
        verdict = joint_verdict(comparisons, best)
        note = ""
        if verdict == "NO DIFFERENCE":
            note = note_on_too_few_seeds(comparisons, level)
        to_armada = None
        if arm != "armada" and arm not in controls:
            to_armada = paired(by_seed, scores.get("armada", {}))
        answer[arm] = {"verdict": verdict, "best_control": best, "comparisons": comparisons,
                       "to_armada": to_armada, "note": note}
    return answer


def compare_with_each(by_seed, opponents, level):
    """Compare an arm {seed: score} with each of its opponents {control: {seed: score}}.

    Returns {control: paired() with "p_holm", corrected for their number, and "verdict"}, without
    those that share no seed with the arm.
    """
    comparisons = {}
    for name, other in opponents.items():
        comparison = paired(by_seed, other)
        if comparison:
            comparisons[name] = comparison
    corrected = holm([comparison["p"] for comparison in comparisons.values()])
    for comparison, p in zip(comparisons.values(), corrected):
        comparison["p_holm"] = p
        if p > level:
            comparison["verdict"] = "NO DIFFERENCE"
        elif comparison["difference"] > 0:
            comparison["verdict"] = "BEATS"
        else:
            comparison["verdict"] = "WORSE"
    return comparisons


def joint_verdict(comparisons, best):
    """One word on all controls: BEATS asks for every one of them, WORSE for the best alone."""
    if all(comparison["verdict"] == "BEATS" for comparison in comparisons.values()):
        return "BEATS"
    if comparisons[best]["verdict"] == "WORSE":
        return "WORSE"
    return "NO DIFFERENCE"


def note_on_too_few_seeds(comparisons, level):
    """Say so where no result whatsoever could have been significant; else return "".

    n seeds have no p below 2 / 2^n (sign_flip_p), which Holm multiplies by the number c of
    controls. From 2 c / 2^n <= level follows n >= log2(2 c / level).
    """
    seeds = min(comparison["seeds"] for comparison in comparisons.values())
    needed = math.ceil(math.log2(2 * len(comparisons) / level))
    if seeds >= needed:
        return ""
    plural = "s" if seeds > 1 else ""
    return f"{seeds} seed{plural} cannot reach {100 * level:g} %, {needed} can"


def paired(a, b):
    """Describe the difference of two arms {seed: score} over the seeds that both have.

    A seed decides on initial weights, batches and dropout in both arms, so pairing takes its luck
    out. Returns {seeds, difference, interval, p}, or None where they share no seed.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    differences = [a[seed] - b[seed] for seed in shared]
    return {"seeds": len(differences), "difference": float(np.mean(differences)),
            "interval": bootstrap_interval(differences), "p": sign_flip_p(differences)}


def sign_flip_p(differences, draws=100_000):
    """Two-sided p = the share of sign flips whose sum is as far from 0 as the sum observed.

    Under "no difference" a seed's two arms may be swapped, which flips the sign of its difference:
    a fair coin each. Exact over all 2^n flips up to n = 16, else by Monte Carlo. The p of n
    seeds cannot go below 2 / 2^n: that of five is .0625 at best.
    """
    check_finite(differences, "a difference")
    d = np.asarray(differences, float)                            # (n,)
    n = len(d)
    exact = n <= 16
    if exact:
        flip_numbers = np.arange(2**n)[:, None]                   # (2^n, 1)
        bits = flip_numbers >> np.arange(n) & 1                   # (2^n, n), each number in binary
        signs = 1 - 2 * bits                                      # (2^n, n), 1 or -1
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (draws, n))  # (draws, n)
    sums = signs @ d                                              # (2^n,) or (draws,)
    # Without the tolerance rounding would lose ties, even the one with the signs as observed.
    extreme = abs(sums) >= abs(d.sum()) - 1e-12
    if exact:
        return float(extreme.mean())
    # The signs as observed count as one more draw, or p could be 0.
    return float((1 + extreme.sum()) / (1 + draws))


def bootstrap_interval(values, draws=10_000):
    """Return the 95 % interval (low, high) of the mean; None for fewer than 5 values.

    It is the studentised bootstrap: t = (mean* - mean) / sd*, where * marks a resample, shows how
    far a mean strays in units of the standard deviation (each side's sqrt(n) cancels). The
    better-known percentile interval knows no t and covers 88 % at n = 7 (tests/test_eval.py).
    """
    check_finite(values, "a value")
    if len(values) < 5:
        return None
    x = np.round(np.asarray(values, float), 9)  # (n,), equal values are now equal to the last bit
    resamples = np.random.default_rng(0).choice(x, (draws, len(x)))  # (draws, n)
    varies = np.ptp(resamples, axis=1) > 0      # (draws,), one value n times has sd* = 0 and no t
    resamples = resamples[varies]               # (at most draws, n)
    if not len(resamples):                      # all values are equal
        return float(x.mean()), float(x.mean())
    t = (resamples.mean(axis=1) - x.mean()) / resamples.std(axis=1, ddof=1)
    t_high, t_low = np.quantile(t, [0.975, 0.025])
    # A mean that strays upwards, t_high, says that the true one may lie that far below: they swap.
    low = x.mean() - t_high * x.std(ddof=1)
    high = x.mean() - t_low * x.std(ddof=1)
    return float(low), float(high)


def holm(ps):
    """Correct m p-values for their number, in the order given (Holm 1979).

    The smallest is multiplied by m, the next by m - 1, and so on: by the number of hypotheses that
    are still open. No corrected p is below that of a smaller one, and none is above 1.
    """
    check_finite(ps, "a p")
    adjusted = [0.0] * len(ps)
    ascending = sorted(range(len(ps)), key=lambda i: ps[i])
    largest = 0.0
    for done, i in enumerate(ascending):
        still_open = len(ps) - done
        largest = max(largest, ps[i] * still_open)
        adjusted[i] = min(1.0, largest)
    return adjusted


def mcnemar(right_a, right_b):
    """Return ((both, only a, only b, neither) right, exact p) of two students on the same examples.

    Only examples that one of the two alone gets right tell them apart: were both equally good,
    each would be a fair coin (McNemar 1947). The arguments are lists of booleans.
    """
    a = np.asarray(right_a, bool)                                 # (N,)
    b = np.asarray(right_b, bool)                                 # (N,)
    both = int((a & b).sum())
    only_a = int((a & ~b).sum())
    only_b = int((~a & b).sum())
    neither = int((~a & ~b).sum())
    coins = only_a + only_b
    fewer = min(only_a, only_b)
    # p = 2 P(at most `fewer` heads of so many coins) = 2 sum_k C(coins, k) / 2^coins, up to 1
    ways = sum(math.comb(coins, k) for k in range(fewer + 1))
    return (both, only_a, only_b, neither), min(1.0, 2 * ways / 2**coins)


# ---- the method ends here; below is bookkeeping ----

# ---- scoring a student ----

def score_student(student, task, examples, rows, *, split, seed, batch_size,
                  autocast=contextlib.nullcontext, temperature=0.0, keep=0):
    """Score a student on a split: (metrics, answers, p_s of the first `keep` texts, (d,) each).

    rows are the examples after data.encode. Training and this module both score with this
    function. Metrics are None where the labels are unknown. Of several processes each reads its
    part, and all return the whole.
    """
    import torch

    from student import world
    n = len(rows)
    keep = min(n, keep)
    own_rows = shard_list(rows)
    own_batch = math.ceil(batch_size / world())
    own_keep = math.ceil(keep / world())
    if student.generates:
        torch.manual_seed(seed_of(seed, "sample", split))
        own_answers = student.generate(own_rows, own_batch, autocast, temperature)
        own_p_s = []
    else:
        # Twice as many at a time as in training: nothing is kept for a backward pass.
        own_answers, own_p_s = student.answers(own_rows, 2 * own_batch, autocast, own_keep)
    answers = gather_list(own_answers, n)
    metrics = score(task, examples, answers)
    # Of a test file no loss is reported: some hold outputs that another model wrote.
    if student.generates and split == "dev":
        own_losses, own_p_s = student.answers(own_rows, own_batch, autocast, own_keep)
        metrics["loss"] = sum(gather_list(own_losses, n)) / n
    return metrics, answers, gather_list(own_p_s, keep)


def shard_list(items):
    """Deal out items: process r of N gets items r, r + N, r + 2 N, ...; each gets equally many.

    The first items stand in where they do not go round, since each process must take part in as
    many forward passes as the others.
    """
    from student import rank, world
    share = math.ceil(len(items) / world())
    dealt = range(rank(), share * world(), world())
    return [items[i % len(items)] for i in dealt]


def gather_list(own, n):
    """Undo shard_list: return n results in order, of which each process computed its own."""
    import torch.distributed as dist

    from student import world
    parts = [own] * world()
    if world() > 1:
        dist.all_gather_object(parts, own)
    results = []
    for one_of_each in zip(*parts):
        results.extend(one_of_each)
    return results[:n]  # what follows are the stand-ins


def rescore_cell(cell, metrics, data_dir, other_task=None):
    """Score a cell's saved students again, into `metrics` and predictions_*.

    Returns a list of booleans: is a dev example answered right? Given another task, which must be
    trained on the same files, score on that task's test file alone, into predictions_TASK; the
    list is empty then.
    """
    config = read_record(
        cell / "config.json", CONFIG,
        cure="restore it; that of another seed of this arm differs from it in \"seeds\" alone")
    task = task_to_score(cell, config, other_task)
    print(f"scoring {cell}", file=sys.stderr)
    splits = load_task(task.name, data_dir or config.get("data_dir"), config["cache_dir"])
    limit = config.get("eval_limit")
    splits = {split: splits[split][:limit] for split in splits if split != "train"}
    metrics.update(task=task.name, arm=config["arms"][0], seed=config["seeds"][0])

    if other_task:  # its dev split is the run's own: both come from the same training file
        metrics["test"], answers = score_saved(cell / "last", config, task, "test", splits["test"])
        write_predictions(cell, task.name.replace("/", "_"), task, splits["test"], answers)
        return []

    if (cell / "best").exists():  # it does not before a run's first evaluation
        best, _ = score_saved(cell / "best", config, task, "dev", splits["dev"])
        metrics.setdefault("best", {})["dev"] = best
    right = []
    for split, examples in splits.items():
        metrics[split], answers = score_saved(cell / "last", config, task, split, examples)
        write_predictions(cell, split, task, examples, answers)
        if split == "dev":
            right = [answer == example.label for answer, example in zip(answers, examples)]
    return right


def task_to_score(cell, config, other_task):
    """Return the cell's own Task, or another one that was trained on the same files."""
    trained = find_task(config["task"])
    if not other_task:
        return trained
    task = find_task(other_task)
    if task == trained and not task.files:
        raise UserError(f"--task {task.name}: leave it out, it is for tasks to generate, of which "
                        "one training serves several")
    if not task.files or task.files != trained.files:
        raise UserError(
            f"--task {task.name}: {cell} was trained on other files, those of {trained.name}")
    return task


def score_saved(folder, config, task, split, examples):
    """Score the student saved in a folder on one split: (metrics, answers).

    It runs in the precision that training had, on the CPU if training did, else on whatever device
    there is: sampled answers and rounding are those of training. Raises UserError for weights that
    are not finite, to which a class would still be the largest of the logits.
    """
    import torch

    from student import load_student, precision
    amp = config["amp"]
    if amp == "fp16" and not torch.cuda.is_available():
        amp = "off"
    where = "cpu" if config.get("device") == "cpu" else "auto"
    device, autocast, *_ = precision(SimpleNamespace(
        device=where, student=config.get("student"), amp=amp, fsdp=False))
    student = load_student(folder).to(device)
    if not all(weight.isfinite().all() for weight in student.parameters()):
        raise UserError(f"{folder}: a weight {DIVERGED}")
    if torch.bfloat16 in autocast.args:
        student.round_frozen_weights()
    # Runs of an earlier version, which could not generate, lack what only generation reads.
    rows, _ = encode(task, examples, student.tokenizer, config["max_length"], student.decoder,
                     config.get("max_new_tokens"))
    metrics, answers, _ = score_student(
        student, task, examples, rows, split=split, seed=config["seeds"][0],
        batch_size=config["micro_batch"], autocast=autocast,
        temperature=config.get("sampling_temperature", 0.0))
    return metrics, answers


# ---- files of predictions ----

def write_predictions(folder, split, task, examples, answers):
    """Write FOLDER/predictions_SPLIT.tsv or .jsonl in the form of the task's official server."""
    if task.kind == "generate":
        form = "jsonl"
        lines = generation_lines(task, examples, answers)
    elif ".jsonl:" in examples[0].where:  # read from SuperGLUE's files, which are in JSON
        form = "jsonl"
        lines = superglue_lines(task, examples, answers)
    else:
        form = "tsv"
        lines = glue_lines(task, examples, answers)
    path = Path(folder) / f"predictions_{split}.{form}"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def glue_lines(task, examples, answers):
    """Return the lines of GLUE's form: a header, then index<TAB>prediction."""
    lines = ["index\tprediction"]
    for example, answer in zip(examples, answers):
        lines.append(f"{example.idx}\t{spell(task, answer)}")
    return lines


def superglue_lines(task, examples, answers):
    """Return the lines of SuperGLUE's form, {"idx": ..., "label": ...} each."""
    lines = []
    for example, answer in zip(examples, answers):
        lines.append(json.dumps({"idx": example.idx, "label": spell(task, answer)}))
    return lines


def spell(task, answer):
    """Spell a class id (or a score) as the official server does."""
    if not task.labels:
        return f"{answer:.3f}"
    label = task.labels[int(answer)]
    if task.name == "wsc":
        return label.capitalize()  # WSC's server wants True, WiC's and BoolQ's want true
    if task.name == "copa":
        return int(label)
    return label


def generation_lines(task, examples, answers):
    """Return lines in JSON with all that a person wants to read: no server asks for such texts."""
    lines = []
    for example, text in zip(examples, answers):
        line = {"idx": example.idx, **example.fields, "references": example.label, "output": text}
        if "accuracy" in task.metrics:
            line["answer"], _ = best_answer(text, example.label)
        lines.append(json.dumps(line, ensure_ascii=False))
    return lines


# ---- cells on disk ----

# What is read of a run's files: key -> type. OPTIONAL may be null, or not there at all.
OPTIONAL = type(None)
METRICS = {"task": str, "arm": str, "seed": (int, OPTIONAL), "student": (str, OPTIONAL),
           "teacher": (str, OPTIONAL), "grad_norm": (int, float, OPTIONAL),
           "labelled": (int, OPTIONAL), "unlabelled": (int, OPTIONAL)}
SCORES = ("dev", "test", "untrained", "best", "aligner", "spaces")  # {metric: number}, or null
CONFIG = {"task": str, "arms": list, "seeds": list, "cache_dir": str, "amp": str,
          "max_length": int, "micro_batch": int, "data_dir": (str, OPTIONAL),
          "eval_limit": (int, OPTIONAL), "max_new_tokens": (int, OPTIONAL)}


def find_cells(runs):
    """Find the cells in or below some folders: {ARM/SEED folder: what its metrics.json holds}.

    A cell whose student is saved but not finished has no metrics.json and gets {}. Raises
    UserError for a folder without a cell and for a damaged file.
    """
    cells = {}
    for run in runs:
        folders = cell_folders(run)
        if not folders:
            raise UserError(f"{run} holds no saved run (ARM/SEED/): "
                            "give a training's --out, or part of it")
        for folder in folders:
            cells[folder] = read_metrics(folder / "metrics.json")
    return cells


def cell_folders(run):
    """Return the cells in or below a folder, each once, whatever symbolic links lead there."""
    called = {}  # where a cell really lies -> what it is called below `run`
    # ** enters no symbolic links, but a run, an arm or a seed may be one, to another disk.
    for pattern in ("**/", "*/", "*/*/", "*/*/*/"):
        for folder in sorted(Path(run).resolve().glob(pattern)):
            if is_cell(folder):
                called.setdefault(folder.resolve(), folder)
    return sorted(called.values())


def is_cell(folder):
    """Tell a cell's folder: it is named by its seed and holds results or a checkpoint."""
    finished = (folder / "metrics.json").exists()
    saved = (folder / "last/student.json").exists()
    is_seed = re.fullmatch("[0-9]+", folder.name)  # to str.isdigit a superscript is a digit too
    return bool(is_seed) and (finished or saved)


def read_metrics(path):
    """Read a metrics.json; {} where there is none."""
    if not path.exists():
        return {}
    return read_record(path, METRICS, cure="delete it and --resume the run")


def read_record(path, kinds, cure):
    """Read a JSON file of a run; `kinds` tells the type of what is wanted of it: {key: type}.

    Raises UserError, which names the file and how to cure it, where that is not there.
    """
    record = read_json(path, hint=cure)
    for key, kind in kinds.items():
        value = record.get(key)
        if not isinstance(value, kind) or value == []:
            raise UserError(f"{path} is damaged, its {key!r} is {value!r}: {cure}")
    if "task" in kinds:
        known(record["task"].lower(), TASKS, f"task in {path},")
    return record


def by_run(cells):
    """Yield (run folder, task, {arm: {seed: metrics}}) run by run, arms in the training's order.

    Cells without metrics are left out; those of the others gain the cell's "folder". Raises
    UserError for cells that must not be averaged, and for scores that are no finite numbers.
    """
    for run in dict.fromkeys(folder.parent.parent for folder in cells):
        folders = [folder for folder in cells if folder.parent.parent == run and cells[folder]]
        if not folders:
            continue
        folders.sort(key=lambda folder: (int(folder.name), folder))
        for key in ("task", "student"):
            check_same(key, {folder: cells[folder].get(key) for folder in folders})
        arms = {}
        config = run / "config.json"
        if config.exists():
            named = read_record(config, {"arms": list}, cure="restore it, or move it away")
            arms = {str(arm): {} for arm in named["arms"]}
        for folder in folders:
            check_scores(cells[folder], folder / "metrics.json")
            add_cell(arms, folder, cells[folder])
        arms = {arm: seeds for arm, seeds in arms.items() if seeds}
        yield run, find_task(cells[folders[-1]]["task"]), arms


def check_same(key, values):
    """Raise a UserError if cells of one run, {folder: value of the key}, do not agree on a key."""
    folder_of = {value: folder for folder, value in values.items() if value is not None}
    if len(folder_of) > 1:
        examples = ", ".join(f"{value} ({folder})" for value, folder in folder_of.items())
        raise UserError(f"cells of one run differ in their {key}: {examples}; "
                        "move them apart, into a RUN/ARM/SEED each")


def check_scores(metrics, where):
    """Raise a UserError that begins with `where` unless a cell's scores are finite numbers."""
    for key in SCORES:
        scores = metrics.get(key)
        if key == "best" and isinstance(scores, dict):
            scores = scores.get("dev")  # beside the epoch
        if scores is None and key != "dev":
            continue
        if not isinstance(scores, dict):
            raise UserError(f"{where} is damaged, its {key!r} is {metrics.get(key)!r}: delete the "
                            "folder of this cell and --resume the run")
        for name, value in scores.items():
            check_number(value, f"{where}: the {key} {name}")


def check_number(value, what):
    """Raise a UserError that begins with `what` unless a value out of a file is a finite number."""
    is_number = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # nan is not
    if not is_number:
        raise UserError(f"{what} {value!r} {DIVERGED}")


def add_cell(arms, folder, metrics):
    """Add a cell to by_run's {arm: {seed: metrics}}.

    A copy would be averaged with its original, or overwrite it: an arm has one folder, in which
    each seed is once.
    """
    arm = metrics["arm"]
    seed = metrics.get("seed")
    if seed is None:  # not told by cells of an earlier version
        seed = int(folder.name)
    seeds = arms.setdefault(arm, {})
    arm_folders = {cell["folder"].parent for cell in seeds.values()}
    if seed in seeds or arm_folders - {folder.parent}:
        twin = seeds.get(seed, first_cell(seeds))
        raise UserError(f"{twin['folder']} and {folder} (seed {seed}) are both of arm {arm}: keep "
                        "one folder an arm, one cell a seed; move the other elsewhere")
    seeds[seed] = {**metrics, "folder": folder}


def headline(task, arms):
    """Return the metric that stands for a task: the first that all cells have.

    (rouge_l needs a package, which may have been missing when a cell was scored.) Raises
    UserError where they share none.
    """
    scores = []
    for seeds in arms.values():
        for cell in seeds.values():
            scores.append((cell["dev"], cell["folder"]))
            if cell.get("test"):
                scores.append((cell["test"], cell["folder"]))
    for name in task.metrics:
        lacking = [folder for metrics, folder in scores if name not in metrics]
        if not lacking:
            return name
    raise UserError(f"{lacking[0]} has no {name} as the other cells of {task.name} have: "
                    "score all of them again with --rescore")


# ---- what a person reads ----

def report(cells, save=True):
    """Return the text on {cell folder: metrics}, run by run: a table, then the verdicts.

    Unless save is False, each run that is there as a whole gets a comparison.json.
    """
    lines = []
    runs = list(by_run(cells))
    for run, task, arms in runs:
        metric = headline(task, arms)
        # Where several tasks share a training file, dev is a part of that, and test is their own.
        split = "test" if task.files else "dev"
        scores, controls = scores_to_compare(arms, split, metric)
        compared = compare(scores, controls)
        of_run = f"{run}: " if len(runs) > 1 else ""
        lines.append(f"{of_run}{task.name}: dev {metric} in %, mean ± standard deviation over "
                     "seeds")
        lines += table(task, metric, arms)
        lines.append("* chosen on dev, so too good: compare arms by the last epoch")
        lines += verdicts(compared, split)
        if save and set(cell_folders(run)) <= cells.keys():
            write_comparison(run, task, metric, scores, compared)
    return "\n".join(lines)


def table(task, metric, arms):
    """Return the lines of a table, one an arm; a cell without a value counts in "seeds" only."""
    columns = {  # heading -> where a cell keeps the value
        "last epoch": ("dev", metric),
        "best epoch*": ("best", "dev", metric),
        "aligner alone": ("aligner", metric),
        "retrieval@1": ("spaces", "retrieval@1"),
        "CKA": ("spaces", "cka"),
    }
    if task.kind == "generate":
        del columns["aligner alone"]  # it scores a bag of tokens, not an answer
        columns = {"untrained": ("untrained", metric), **columns, "test": ("test", metric)}
    rows = [("arm", "seeds", *columns, "gradient")]
    for arm, seeds in arms.items():
        values = [mean_and_deviation(seeds.values(), path) for path in columns.values()]
        norms = [cell["grad_norm"] for cell in seeds.values() if cell.get("grad_norm") is not None]
        gradient = f"{np.mean(norms):.2f}" if norms else "-"
        rows.append((arm, str(len(seeds)), *values, gradient))
    return align_columns(rows)


def mean_and_deviation(cells, path):
    """Spell mean and standard deviation in % of the fractions at cell[key][key]..., "-" for none.

    path is (key, key, ...). Cells that lack the value, or hold None, are left out.
    """
    for key in path:
        cells = [cell[key] for cell in cells if cell.get(key) is not None]
    if not cells:
        return "-"
    values = 100 * np.array(cells)
    if len(values) == 1:
        return f"{np.mean(values):.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def align_columns(rows):
    """Turn rows of texts into lines with the columns under one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append("  ".join(padded).rstrip())
    return lines


def scores_to_compare(arms, split, metric):
    """Return ({arm: {seed: score}}, [the arms that are controls]) for compare().

    Only finished cells take part; one that was stopped on its way has no "control" to tell, and
    one whose test file has no labels has no score.
    """
    scores = {}
    controls = []
    for arm, seeds in arms.items():
        scored = {seed: cell for seed, cell in seeds.items() if cell.get(split)}
        finished = {seed: cell for seed, cell in scored.items() if "control" in cell}
        scores[arm] = {seed: cell[split][metric] for seed, cell in finished.items()}
        if any(cell["control"] for cell in finished.values()):
            controls.append(arm)
    return scores, controls


def write_comparison(run, task, metric, scores, compared):
    """Write RUN/comparison.json: each arm's scores and what compare() found."""
    arms = {}
    for arm, by_seed in scores.items():
        if by_seed:
            interval = bootstrap_interval(list(by_seed.values()))
            arms[arm] = {"scores": by_seed, "interval": interval, **compared.get(arm, {})}
    answer = {"task": task.name, "metric": metric, "arms": arms}
    (run / "comparison.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")


def verdicts(compared, split="dev"):
    """Return the lines on what compare() found: a heading, then a line for each arm."""
    if not compared:
        return ["no verdict without a control: "
                "train with --arms undistilled,armada,shuffled --seeds 0,1 ..."]
    rows = [("arm", "to undistilled", "to its best control", "to armada", "verdict")]
    for arm, answer in compared.items():
        comparisons = answer["comparisons"]
        best = answer["best_control"]
        verdict = answer["verdict"]
        if verdict == "BEATS":
            verdict += f" every control: {', '.join(comparisons)}"
        elif answer["note"]:
            verdict += f" ({answer['note']})"
        rows.append((arm, in_points(comparisons.get("undistilled")),
                     f"{in_points(comparisons[best])} ({best})",
                     in_points(answer["to_armada"]), verdict))
    where = "" if split == "dev" else f"on {split} "
    heading = (f"differences {where}paired by seed, in points [95 % interval], p after Holm "
               "(to armada: as it is)")
    return [heading, *align_columns(rows)]


def in_points(comparison):
    """Spell a paired() in percentage points, "+2.9 [+1.0, +4.8], p 0.031"; "-" for None."""
    if comparison is None:
        return "-"
    interval = ""
    if comparison["interval"]:
        low, high = comparison["interval"]
        interval = f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    p = comparison.get("p_holm", comparison["p"])
    return f"{100 * comparison['difference']:+.1f}{interval}, p {p:.2g}"


def agreement(cells, right):
    """Return the text on two cells {folder: metrics}, given for each who is right on dev.

    Raises UserError unless both are of one classification task and of the same dev examples.
    """
    task, other_task = [metrics["task"] for metrics in cells.values()]
    a, b = ["/".join(folder.parts[-3:]) for folder in cells]
    if task != other_task or not find_task(task).labels:
        raise UserError(
            f"{a} and {b}: example by example, give two cells of one classification task")
    counts = [len(answers) for answers in right]
    if len(set(counts)) > 1:
        raise UserError(f"{a} and {b} have {counts[0]} and {counts[1]} dev examples: give cells of "
                        "one --eval-limit, and --data-dir where they read other files")
    (both, only_a, only_b, neither), p = mcnemar(*right)
    return (f"{task}, {len(right[0])} dev examples: both right {both}, only {a} {only_a}, "
            f"only {b} {only_b}, both wrong {neither}; McNemar's exact p {p:.2g}")


# ---- figures (matplotlib is optional) ----

MARKERS = "osD^v<>PX*"
LINES = ("-", "--", ":", "-.")


def plot(cells):
    """Draw arms.png into each run; learning_curves.png, where it was scored more than once; and
    dose_response.png, where there are two doses.

    Given runs of one task with more and fewer labels, draw label_curve.png beside them.
    Arms are told apart by markers, dashes and greys, so that a black-and-white print will do.
    Raises UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None

    def new_axes():
        return Figure(figsize=(7, 4.5), layout="constrained").subplots()

    def save(axes, task, metric, path):
        axes.set_ylabel(f"{task.name}, dev {metric} (%)")
        axes.figure.savefig(path, dpi=150)
        print(f"wrote {path}")

    runs = list(by_run(cells))
    for run, task, arms in runs:
        metric = headline(task, arms)
        points = {}
        for arm, seeds in arms.items():
            points[arm] = [100 * cell["dev"][metric] for cell in seeds.values()]
        doses = doses_in(arms)

        curves = learning_curves(arms, metric)

        figures = {"arms": new_axes()}
        draw_arms(figures["arms"], points, controls_in(arms))
        if max(len(by_epoch) for by_epoch in curves.values()) > 1:
            figures["learning_curves"] = new_axes()
            draw_curves(figures["learning_curves"], curves)
        if len(set(doses.values())) > 1:
            figures["dose_response"] = new_axes()
            draw_doses(figures["dose_response"], points, doses, aligners_in(arms, metric))
        for name, axes in figures.items():
            save(axes, task, metric, run / f"{name}.png")

    curves = label_curves(runs)
    if curves:
        axes = new_axes()
        draw_label_curves(axes, curves)
        folder = Path(os.path.commonpath([run for run, _, _ in runs]))
        save(axes, task, metric, folder / "label_curve.png")


def label_curves(runs):
    """Return {curve: {how many labels: [the dev metric in %, a value a seed]}} of by_run's runs.

    An arm is one curve with unlabelled texts and another without. Empty where the runs are not of
    one task, or all have as many labels.
    """
    curves = {}
    for _, task, arms in runs:
        metric = headline(task, arms)
        for arm, seeds in arms.items():
            cell = first_cell(seeds)
            if cell.get("labelled") is None:  # of an earlier version
                continue
            curve = f"{arm}, and the rest unlabelled" if cell.get("unlabelled") else arm
            values = [100 * cell["dev"][metric] for cell in seeds.values()]
            curves.setdefault(curve, {})[cell["labelled"]] = values
    counts = set().union(*curves.values())
    tasks = {task.name for _, task, _ in runs}
    if len(counts) < 2 or len(tasks) > 1:
        return {}
    return curves


def learning_curves(arms, metric):
    """Read the logs: {arm: {epoch: mean over seeds of the dev metric in %}}."""
    curves = {}
    for arm, seeds in arms.items():
        by_epoch = {}
        for cell in seeds.values():
            for epoch, value in read_curve(cell["folder"] / "log.jsonl", metric):
                by_epoch.setdefault(epoch, []).append(100 * value)
        curves[arm] = {epoch: np.mean(values) for epoch, values in by_epoch.items()}
    return curves


def read_curve(path, metric):
    """Return [(epoch, dev metric)] of a log.jsonl; UserError for a line that is no such thing."""
    cure = "--resume writes the log of a cell anew that is not finished; else leave --plot out"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {cure}") from None
    points = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        record = parse_json(line, where, hint=cure)
        if "dev" not in record:  # it tells of training steps
            continue
        check_scores(record, where)
        check_number(record.get("epoch"), f"{where}: the epoch")
        if metric in record["dev"]:  # rouge_l's package may have come during the run
            points.append((record["epoch"], record["dev"][metric]))
    return points


def controls_in(arms):
    """Return the arms whose first cell says that it is a control."""
    return [arm for arm, seeds in arms.items() if first_cell(seeds).get("control")]


def doses_in(arms):
    """Return {arm: RHO of its teacher painter:RHO} for armada and the arms dose-*.

    RHO weighs the true picture against noise; plain painter is painter:1.
    """
    doses = {}
    for arm, seeds in arms.items():
        teacher = first_cell(seeds).get("teacher") or ""
        kind, _, rho = teacher.partition(":")
        if kind == "painter" and (arm == "armada" or arm.startswith("dose-")):
            doses[arm] = float(rho or 1)
    return doses


def aligners_in(arms, metric):
    """Return {arm: [the aligner's own dev metric in %, a value a seed]} of arms that have one."""
    aligners = {}
    for arm, seeds in arms.items():
        scores = [cell.get("aligner") or {} for cell in seeds.values()]
        values = [100 * score[metric] for score in scores if metric in score]
        if values:
            aligners[arm] = values
    return aligners


def first_cell(seeds):
    """Return one cell to speak for an arm, all of whose seeds have the same teacher."""
    return next(iter(seeds.values()))


def draw_curves(axes, curves):
    """Draw {arm: {epoch: value}}, a line for each arm."""
    axes.set_xlabel("epoch (mean over seeds)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for i, (arm, by_epoch) in enumerate(curves.items()):
        style = MARKERS[i % len(MARKERS)] + LINES[i % len(LINES)]
        grey = str(0.75 * i / len(curves))  # from black, "0", to a light grey
        axes.plot(by_epoch.keys(), by_epoch.values(), style, color=grey, label=arm)
    axes.legend(fontsize="small", handlelength=4, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_arms(axes, points, controls):
    """Draw {arm: [a value a seed]}, a column of dots for each arm."""
    axes.set_xlabel("dots are seeds, hollow circles controls, bars 95 % intervals of the mean")
    for i, (arm, values) in enumerate(points.items()):
        fill = "white" if arm in controls else "black"
        draw_column(axes, i, values, fill)
    axes.set_xticks(range(len(points)), points.keys(), rotation=30, ha="right")


def draw_doses(axes, points, doses, aligners):
    """Draw an arm's values, and its aligner's, over its dose; a dashed line for undistilled."""
    axes.set_xlabel("dose of the picture, RHO in painter:RHO; bars are 95 % intervals")
    for i, (name, values) in enumerate({"student": points, "aligner alone": aligners}.items()):
        by_dose = {doses[arm]: values[arm] for arm in doses if arm in values}
        draw_curve(axes, by_dose, i, name)
    if "undistilled" in points:
        level = np.mean(points["undistilled"])
        axes.axhline(level, color="0.4", linestyle=":", label="undistilled")
    axes.legend(handlelength=4)


def draw_label_curves(axes, curves):
    """Draw {curve: {how many labels: [a value a seed]}}, each doubling of them as far apart."""
    axes.set_xlabel("training texts with a label; bars are 95 % intervals")
    axes.set_xscale("log", base=2)
    counts = sorted(set().union(*curves.values()))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    for i, (curve, by_count) in enumerate(curves.items()):
        draw_curve(axes, by_count, i, curve)
    axes.legend(fontsize="small", handlelength=4)  # long enough to tell a dash from a dot


def draw_curve(axes, by_x, i, label):
    """Draw {x: [a value a seed]} as a line through the means, number i, with their intervals."""
    grey = str(0.2 * (i % 4))  # from black, "0"
    ascending = sorted(by_x)
    means = [np.mean(by_x[x]) for x in ascending]
    style = MARKERS[i % len(MARKERS)] + LINES[i % len(LINES)]
    axes.plot(ascending, means, style, color=grey, label=label)
    for x in ascending:
        interval = bootstrap_interval(by_x[x])
        if interval:
            axes.plot([x, x], interval, "_-", color=grey)


def draw_column(axes, x, values, fill):
    """Draw the mean of the seeds at x, with its interval where there is one, and to its left the
    seeds, as faint dots."""
    axes.plot([x - 0.15] * len(values), values, ".", color="0.65")
    interval = bootstrap_interval(values)
    if interval:
        axes.plot([x, x], interval, "_-", color="black", markersize=10)
    axes.plot(x, np.mean(values), "o", color="black", markerfacecolor=fill)


# ---- the command line ----

def main(argv=None):
    """Run the command line: status 2 and one line on stderr for what the user can mend."""
    prepare_console()
    parser = Parser(prog="eval.py", allow_abbrev=False,
                    description="Compare the arms of a run, or two students example by example.")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="A run, a part of it, or two ARM/SEED folders.")
    parser.add_argument("--plot", action="store_true",
                        help="Draw learning curves, arms and doses into RUN (needs matplotlib).")
    parser.add_argument("--rescore", action="store_true",
                        help="Score the saved students of finished cells again too.")
    parser.add_argument("--task",
                        help="Score on the test file of this task, which shares its training file "
                             "with the run's own.")
    parser.add_argument("--data-dir",
                        help="Folder of the task files; default: the one that training read.")
    args = parser.parse_args(argv)
    try:
        evaluate(args)
    except (UserError, OSError) as error:  # OSError: a folder that cannot be written
        exit_with_message(2, f"eval.py: error: {error}")
    except KeyboardInterrupt:
        exit_with_message(STOPPED, "stopped; the same command starts over")


def evaluate(args):
    """Score what has to be scored, then print the agreement of two cells or the report on all."""
    cells = find_cells(args.runs)
    named = [Path(run).resolve() for run in args.runs]
    is_pair = len(named) == 2 and list(cells) == named
    if is_pair and (args.task or args.plot):
        raise UserError("two cells are compared on the dev examples of their task: leave out "
                        "--task and --plot, or give their RUN")
    if args.task:
        cells = {folder: metrics for folder, metrics in cells.items() if metrics}
        if not cells:
            raise UserError("--task: no cell there is finished; go on with train.py --resume first")
    if not is_pair:
        list(by_run(cells))  # refuses what cannot be reported before anything is scored
    right = []
    for folder, metrics in cells.items():
        if is_pair or args.rescore or args.task or not metrics:
            right.append(rescore_cell(folder, metrics, args.data_dir, args.task))
    if is_pair:
        print(agreement(cells, right))
        return
    print(report(cells, save=not args.task))
    if args.plot:
        plot(cells)


if __name__ == "__main__":
    main()
