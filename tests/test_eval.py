"""Metrics against their definitions, statistics against enumeration and simulation, what a run's
report says. Read beside eval.py."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
from data import TASKS, Example, UserError, load_task
from eval import (bootstrap_interval, compare, compute_metrics, extract_answer, holm, linear_cka,
                  mcnemar, retrieval_at_1, sign_flip_p)


# ---- metrics ----

def test_accuracy_and_binary_f1_from_counts():
    """3 hits, 1 false alarm, 2 misses: precision 3/4, recall 3/5, F1 their harmonic mean."""
    predictions = [1, 1, 1, 1, 0, 0, 0, 0]
    labels = [1, 1, 1, 0, 1, 1, 0, 0]
    expected = {"accuracy": 5 / 8, "f1": 2 / (4 / 3 + 5 / 3)}
    assert compute_metrics("mrpc", predictions, labels) == pytest.approx(expected)
    assert compute_metrics("QQP", predictions, labels) == pytest.approx(expected)


def test_cbs_f1_is_the_mean_over_the_classes_seen():
    """Class 0: F1 2/3 (one hit, one false alarm); class 1: 0 (one miss);
    class 2, never seen, does not count as 0."""
    assert compute_metrics("cb", [0, 0], [0, 1])["f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert compute_metrics("cb", [0, 1, 2], [0, 1, 2]) == {"accuracy": 1.0, "f1": 1.0}


def test_matthews_correlation_from_the_four_counts():
    predictions = [1, 1, 1, 0, 0, 0, 0, 1]
    labels = [1, 1, 0, 0, 0, 1, 0, 1]
    tp, fp, fn, tn = (3, 1, 1, 3)
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(margins)
    assert compute_metrics("cola", predictions, labels) == {"mcc": pytest.approx(expected)}


def test_pearson_sees_a_line_and_spearman_any_order():
    labels = [0.0, 1.0, 2.0, 3.0, 5.0]
    line = compute_metrics("stsb", [2 * y + 1 for y in labels], labels)
    assert line == pytest.approx({"pearson": 1, "spearman": 1})
    bent = compute_metrics("stsb", [-math.exp(y) for y in labels], labels)
    assert bent["spearman"] == pytest.approx(-1)
    assert -1 < bent["pearson"] < -0.8


def test_equal_values_share_the_mean_of_the_ranks_that_they_would_take_up():
    """The oracle sorts, numbers the places from 1 and averages the places of each value."""
    assert evaluation.ranks(np.array([1.0, 2.0, 2.0, 3.0])).tolist() == [1, 2.5, 2.5, 4]
    values = np.random.default_rng(0).integers(0, 6, 30)
    ascending = sorted(values)
    for value, rank in zip(values, evaluation.ranks(values)):
        places = [place for place, other in enumerate(ascending, 1) if other == value]
        assert rank == np.mean(places)


def test_spearman_gives_equal_values_the_mean_of_their_ranks():
    """Ranks of (1, 2, 2, 3) are (1, 2.5, 2.5, 4); without ties d^2 would give another number."""
    ranks = np.array([1, 2.5, 2.5, 4]) - 2.5
    labels = np.array([1, 2, 3, 4]) - 2.5
    expected = ranks @ labels / math.sqrt((ranks @ ranks) * (labels @ labels))
    metrics = compute_metrics("stsb", [1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    assert metrics["spearman"] == pytest.approx(expected)


def test_undefined_values_are_0():
    assert compute_metrics("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert compute_metrics("cola", [1, 1, 1], [0, 1, 1]) == {"mcc": 0.0}
    assert compute_metrics("stsb", [2.0, 2.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("predictions, labels", [([1], [1, 0]), ([], []), ([[1]], [[1]])])
def test_lists_that_do_not_match_are_refused(predictions, labels):
    with pytest.raises(ValueError, match="equal, non-empty"):
        compute_metrics("rte", predictions, labels)


@pytest.mark.parametrize("task, predictions, labels", [
    ("stsb", [1.0, math.nan], [1.0, 2.0]),
    ("stsb", [1.0, math.inf], [1.0, 2.0]),
    ("rte", [0, 1], [1, None]),  # numpy makes nan of None
])
def test_what_is_not_finite_is_refused_instead_of_counted_as_wrong(task, predictions, labels):
    with pytest.raises(UserError, match="is not a finite number"):
        compute_metrics(task, predictions, labels)


def labelled(*labels):
    """Examples with these labels, of a file f.tsv."""
    return [Example({}, label, i, f"f.tsv:{i + 2}") for i, label in enumerate(labels)]


def test_unlabelled_splits_have_no_score():
    assert evaluation.score(TASKS["rte"], labelled(None, None), [1, 0]) is None
    with pytest.raises(UserError, match="is not a finite number"):
        evaluation.score(TASKS["stsb"], labelled(None), [math.nan])


@pytest.mark.parametrize("rank", [0, 1])
def test_of_a_partly_labelled_file_the_rows_with_a_label_are_scored(
        rank, tmp_path, monkeypatch, capsys):
    """One of several processes says how many, and all rows get a prediction. None first, or last:
    an unlabelled row is neither wrong nor a sign that the others have no label."""
    monkeypatch.setattr("student.rank", lambda: rank)
    examples = labelled(None, 1, 0, 1, None)
    answers = [1, 1, 1, 1, 0]
    metrics = evaluation.score(TASKS["rte"], examples, answers)
    assert metrics == {"accuracy": pytest.approx(2 / 3)}
    told = "" if rank else "f.tsv: 3 of 5 rows have a label, only they are scored\n"
    assert capsys.readouterr().err == told
    evaluation.write_predictions(tmp_path, "test", TASKS["rte"], examples, answers)
    assert len((tmp_path / "predictions_test.tsv").read_text().splitlines()) == 1 + 5


# ---- answers ----

@pytest.mark.parametrize("text, reference, expected", [
    ("A or B? The Answer is C, not D.", "A", "c"),
    ("THE ANSWER IS true. Others say false.", "false", "true"),
    ("The answer  is 7. I count 8.", "7", "7"),
    ("It is \u22125", "5", "-5"),               # the minus sign
    ("The answer is \u20115.", "5", "-5"),      # the hyphen that does not break a line
    ("The answer is \u20135.", "5", "-5"),      # the short dash
    ("5\u22123 = 2, so 5\u22123", "2", "3"),     # between numbers it is no sign
    ("-5", "\u22125", "-5"),
    ("The answer is 1,234,567.", "1,234,567", "1234567"),
    ("The answer is 1\u202f234\u202f567.5 m", "7", "1234567.5"),
    ("The answer is 12'345.", "7", "12345"),
    ("The answer is 5'11.", "7", "11"),        # feet and inches
])
def test_answers_are_read_however_they_are_printed(text, reference, expected):
    assert extract_answer(text, reference) == expected


@pytest.mark.parametrize("output, reference", [
    ("\u22125", "-5"), ("-5.0", "\u22125"), ("1234", "1,234.0"), ("1\u00a0234", "1234")])
def test_equal_numbers_are_right_however_they_are_spelled(output, reference):
    metrics = compute_metrics("reason/gsm8k", [output], [(reference,)])
    assert metrics == {"accuracy": 1.0, "answered": 1.0}


def test_of_several_accepted_answers_the_best_counts(tmp_path):
    """Each tells its own form: 0.5 or true, B or 7. The file of predictions names all of them."""
    outputs = ["The answer is B", "It is 7", "It is 8", "I do not know"]
    accepted = [("A", "B"), ("B", "7"), ("B", "7"), ("true", "7")]
    metrics = compute_metrics("reason/aqua", outputs, accepted)
    assert metrics == {"accuracy": 2 / 4, "answered": 3 / 4}

    examples = []
    for i, references in enumerate(accepted):
        fields = {"instruction": f"question {i}", "input": ""}
        examples.append(Example(fields, references, i, f"test.json:{i + 1}", references[0]))
    evaluation.write_predictions(tmp_path, "test", TASKS["reason/aqua"], examples, outputs)
    lines = (tmp_path / "predictions_test.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [tuple(line["references"]) for line in lines] == accepted
    assert [line["answer"] for line in lines] == ["b", "7", "8", None]


@pytest.mark.parametrize("outputs, references, says", [
    ([], [], "two equal, non-empty lists"),
    (["7"], [("7",), ("8",)], "two equal, non-empty lists"),
    (["7"], ["78"], "not one string"),
    (["7"], [("seven",)], "'seven' is no answer"),
])
def test_texts_and_references_that_do_not_match_are_refused(outputs, references, says):
    with pytest.raises(ValueError, match=says):
        compute_metrics("reason/gsm8k", outputs, references)


# ---- the two spaces ----

def points(n=12, d=5, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def test_retrieval_counts_the_texts_whose_own_picture_is_nearest():
    p = points()
    assert retrieval_at_1(p, p) == 1
    assert retrieval_at_1(p, np.roll(p, 1, axis=0)) == 0
    assert retrieval_at_1(p, 7 * p) == 1  # a cosine: lengths do not matter
    half = np.concatenate([p[:6], np.roll(p[6:], 1, axis=0)])
    assert retrieval_at_1(p, half) == 0.5
    assert retrieval_at_1(p, 0 * p) == pytest.approx(1 / 12)  # no direction: chance, not all points


def test_retrieval_goes_from_text_to_picture_and_not_back():
    """Two texts call for the first picture, and one of them is wrong."""
    assert retrieval_at_1(np.eye(3), np.eye(3)[[0, 0, 2]]) == pytest.approx(2 / 3)


def test_two_texts_with_one_picture_share_the_point_of_retrieval():
    twins = np.repeat(points()[:6], 2, axis=0)
    assert retrieval_at_1(twins, twins) == 0.5


def test_retrieval_needs_shared_coordinates_and_cka_does_not():
    p = points(200)
    rotation, _ = np.linalg.qr(points(5, 5, 1))
    assert linear_cka(p, p @ rotation * 3 + 7) == pytest.approx(1)
    assert retrieval_at_1(p, p @ rotation) < 0.5


@pytest.mark.parametrize("measure", [retrieval_at_1, linear_cka])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_projections_that_are_not_finite_are_refused(measure, value):
    spoiled = points()
    spoiled[3, 2] = value
    for pair in ((points(), spoiled), (spoiled, points())):
        with pytest.raises(UserError, match="projection is not a finite number"):
            measure(*pair)


def test_linear_cka_is_its_definition_over_features():
    """|X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) with (d, d) matrices; the code multiplies (N, N) ones."""
    x = points()
    y = points(d=3, seed=1)
    x = x - x.mean(0)
    y = y - y.mean(0)
    norm = np.linalg.norm
    expected = norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    assert linear_cka(x, y) == pytest.approx(expected)
    assert linear_cka(x, np.ones((12, 3))) == 0


def test_linear_cka_of_uncorrelated_features_is_0():
    x = np.array([[1.0], [1], [-1], [-1]])
    y = np.array([[1.0], [-1], [1], [-1]])
    assert linear_cka(x, y) == pytest.approx(0)


# ---- statistics ----

def test_the_sign_flip_p_counts_the_ways_to_swap_that_are_as_extreme():
    assert sign_flip_p([1, 2, 3, 4, 5]) == 2 / 2**5  # all signs equal: two of 32, whatever the size
    assert sign_flip_p([0.1] * 7) == 2 / 2**7  # what seven seeds can reach at most
    assert sign_flip_p([1, -1]) == 1
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1


def test_the_sign_flip_p_is_that_of_an_enumeration():
    d = points(9, 1).ravel() + 0.5
    sums = []
    for signs in itertools.product((1, -1), repeat=9):
        sums.append(abs(sum(sign * x for sign, x in zip(signs, d))))
    assert sign_flip_p(d) == np.mean([each >= abs(sum(d)) - 1e-9 for each in sums])
    assert sign_flip_p(d) == sign_flip_p(-d)


def test_many_seeds_are_tested_by_monte_carlo_and_never_get_p_0():
    d = points(18, 1).ravel() + 0.35
    signs = np.array(list(itertools.product((1, -1), repeat=18)), np.int8)
    exact = (abs(signs @ d) >= abs(d.sum()) - 1e-9).mean()
    assert sign_flip_p(d) == pytest.approx(exact, abs=0.003)
    assert sign_flip_p([1.0] * 40) == pytest.approx(1 / 100_001)


@pytest.mark.parametrize("n", [7, 10])
def test_the_studentised_interval_covers_and_the_percentile_interval_does_not(n):
    """Of 400 samples with mean 0. Two standard errors of such a share are 2 points."""
    rng = np.random.default_rng(1)
    studentised = 0
    percentile = 0
    for _ in range(400):
        x = rng.standard_normal(n)
        low, high = bootstrap_interval(x, draws=2000)
        studentised += low <= 0 <= high
        means = rng.choice(x, (2000, n)).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        percentile += low <= 0 <= high
    assert 0.92 <= studentised / 400 <= 0.98
    assert percentile / 400 < 0.92  # .88 at n = 7


def test_intervals_at_the_edge():
    assert bootstrap_interval([1, 2, 3, 4]) is None  # too few to tell
    assert bootstrap_interval([0.5] * 6) == (0.5, 0.5)
    low, high = bootstrap_interval([1, 2, 3, 4, 5])
    assert low < 3 < high
    assert bootstrap_interval([1, 2, 3, 4, 5]) == (low, high)  # the same each time


def test_holm_multiplies_by_the_hypotheses_still_open_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, 0.02, 0.5]) == pytest.approx([0.06, 0.06, 0.5])  # equal p stay equal
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.parametrize("statistic", [sign_flip_p, bootstrap_interval, holm])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 7, 20])
def test_statistics_refuse_what_is_not_finite(statistic, value, n):
    """No comparison with nan is true: left alone, the p of its sign flips would be 0."""
    with pytest.raises(UserError, match="is not a finite number"):
        statistic([0.1] * (n - 1) + [value])


def test_a_score_that_is_not_finite_is_told_with_its_arm_and_seed():
    scores = arms_of(undistilled=0, shuffled=-0.2, armada=0.1)
    scores["armada"][3] = math.nan
    with pytest.raises(UserError, match="arm armada, seed 3: the score nan"):
        compare(scores, CONTROLS)


def test_mcnemar_is_a_coin_over_the_examples_that_one_student_gets_right():
    a = [1] * 5 + [1] * 9 + [0] * 1 + [0] * 4
    b = [1] * 5 + [0] * 9 + [1] * 1 + [0] * 4
    counts, p = mcnemar(a, b)
    assert counts == (5, 9, 1, 4)
    assert p == pytest.approx(2 * (1 + 10) / 2**10)  # at most 1 head of 10 coins
    assert mcnemar(a, a)[1] == 1
    assert mcnemar([1, 0], [0, 1])[1] == 1


# ---- verdicts ----

def arms_of(seeds=7, noise=0.01, seed=0, **shifts):
    """{arm: {seed: accuracy}}: a seed's own luck, shared by its arms, plus noise, plus a shift."""
    rng = np.random.default_rng(seed)
    luck = rng.normal(0.6, 0.05, seeds)
    arms = {}
    for arm, shift in shifts.items():
        accuracies = luck + rng.normal(0, noise, seeds) + shift
        arms[arm.replace("_", "-")] = dict(enumerate(accuracies.tolist()))
    return arms


CONTROLS = ["undistilled", "shuffled"]


@pytest.mark.parametrize("shift, verdict", [
    (0.1, "BEATS"), (0.0, "NO DIFFERENCE"), (-0.1, "WORSE")])
def test_the_verdict_is_on_the_best_control(shift, verdict):
    """`shuffled` lies 20 points below: to beat it is nothing. Pairing takes a seed's luck out."""
    scores = arms_of(undistilled=0, shuffled=-0.2, armada=shift)
    armada = compare(scores, CONTROLS)["armada"]
    assert armada["verdict"] == verdict
    assert armada["best_control"] == "undistilled"
    assert armada["note"] == ""
    difference = armada["comparisons"]["undistilled"]["difference"]
    assert difference == pytest.approx(shift, abs=0.02)


def test_beats_means_above_every_control():
    """The best control is beaten in every seed; the other one is worse on average, but has a lucky
    seed."""
    scores = arms_of(undistilled=0, shuffled=-0.2, armada=0.1)
    scores["shuffled"][0] += 1.2
    armada = compare(scores, CONTROLS)["armada"]
    assert armada["verdict"] == "NO DIFFERENCE"
    assert armada["best_control"] == "undistilled"
    assert armada["comparisons"]["undistilled"]["verdict"] == "BEATS"


def test_a_control_is_compared_with_undistilled_only_and_undistilled_with_nothing():
    compared = compare(arms_of(undistilled=0, shuffled=-0.1, armada=0), CONTROLS)
    assert list(compared) == ["shuffled", "armada"]
    assert list(compared["shuffled"]["comparisons"]) == ["undistilled"]
    assert compared["shuffled"]["verdict"] == "WORSE"
    assert compare(arms_of(armada=0), []) == {}


@pytest.mark.parametrize("controls, fewest", [(1, 6), (2, 7), (4, 8)])
def test_too_few_seeds_are_said_to_be_too_few(controls, fewest):
    """2 / 2^n times the number of controls must get under 5 %."""
    names = [f"c{i}" for i in range(controls)]
    shifts = {"armada": 0.2, **dict.fromkeys(names, 0)}
    enough = compare(arms_of(fewest, **shifts), names)["armada"]
    assert (enough["verdict"], enough["note"]) == ("BEATS", "")
    too_few = compare(arms_of(fewest - 1, **shifts), names)["armada"]
    assert too_few["verdict"] != "BEATS"
    assert too_few["note"] == f"{fewest - 1} seeds cannot reach 5 %, {fewest} can"


def test_a_verdict_that_was_reached_needs_no_excuse():
    """A control has six seeds: twice its p passes 5 %, but Holm doubles the smaller p alone."""
    scores = arms_of(7, undistilled=0, shuffled=0, armada=0.2)
    del scores["shuffled"][6]
    armada = compare(scores, CONTROLS)["armada"]
    assert (armada["verdict"], armada["note"]) == ("BEATS", "")


def test_only_seeds_that_both_arms_have_are_paired():
    scores = arms_of(8, undistilled=0, armada=0.1)
    del scores["armada"][3]
    del scores["undistilled"][5]
    armada = compare(scores, ["undistilled"])["armada"]
    assert armada["comparisons"]["undistilled"]["seeds"] == 6


def test_an_ablation_is_also_compared_with_armada():
    scores = arms_of(undistilled=0, armada=0.1, no_aux=0.2)
    compared = compare(scores, ["undistilled"])
    assert compared["no-aux"]["to_armada"]["difference"] == pytest.approx(0.1, abs=0.02)
    assert compared["armada"]["to_armada"] is None


def share_of_verdicts_on_identical_arms(seeds, controls, monkeypatch):
    """The share of 200 comparisons of identical arms that get a verdict."""
    # An interval is no part of the verdict, and takes time.
    monkeypatch.setattr(evaluation, "bootstrap_interval", lambda values: None)
    names = [f"c{i}" for i in range(controls)]
    shifts = dict.fromkeys(["armada", *names], 0)
    verdicts = []
    for seed in range(200):
        compared = compare(arms_of(seeds, seed=seed, **shifts), names)
        verdicts.append(compared["armada"]["verdict"])
    return np.mean([verdict != "NO DIFFERENCE" for verdict in verdicts])


@pytest.mark.parametrize("seeds, controls", [(7, 2), (10, 4), (17, 1)])
def test_identical_arms_get_a_verdict_in_at_most_5_percent(seeds, controls, monkeypatch):
    """Type-I error of the whole procedure, the best control and Holm included."""
    assert share_of_verdicts_on_identical_arms(seeds, controls, monkeypatch) <= 0.07


def test_without_holm_the_best_of_eight_controls_would_be_found_better_far_too_often(monkeypatch):
    assert share_of_verdicts_on_identical_arms(10, 8, monkeypatch) <= 0.07
    monkeypatch.setattr(evaluation, "holm", lambda ps: ps)
    assert share_of_verdicts_on_identical_arms(10, 8, monkeypatch) > 0.1


# ---- several processes, files of predictions, cells on disk ----

@pytest.mark.parametrize("n, processes", [(1, 1), (1, 3), (6, 3), (7, 3), (5, 4)])
def test_what_is_dealt_to_several_processes_is_gathered_in_order(n, processes, monkeypatch):
    """Each gets equally many, or one would wait for ever for the forward pass of another."""
    monkeypatch.setattr("student.world", lambda: processes)
    shards = []
    for rank in range(processes):
        monkeypatch.setattr("student.rank", lambda rank=rank: rank)
        shards.append(evaluation.shard_list(list(range(n))))
    assert len({len(shard) for shard in shards}) == 1

    def all_gather_object(parts, own):
        parts[:] = shards

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    assert evaluation.gather_list(shards[0], n) == list(range(n))


@pytest.mark.parametrize("name, first", [
    ("rte", '{"idx": 0, "label": "not_entailment"}'),
    ("cb", '{"idx": 0, "label": "neutral"}'),
    ("copa", '{"idx": 0, "label": 1}'),
    ("boolq", '{"idx": 0, "label": "true"}'),
    ("wic", '{"idx": 0, "label": "true"}'),
    ("wsc", '{"idx": 0, "label": "True"}'),
    ("mnli", "0\tneutral"),
    ("qnli", "0\tnot_entailment"),
    ("cola", "0\t1"),
    ("mrpc", "0\t1"),
    ("stsb", "0\t1.000"),
])
def test_predictions_are_written_in_the_form_that_the_official_server_reads(
        name, first, official, tmp_path):
    examples = load_task(name, official)["test"]
    evaluation.write_predictions(tmp_path, "test", TASKS[name], examples, [1.0, 0.0, 1.0])
    path, = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    if path.suffix == ".tsv":
        assert lines.pop(0) == "index\tprediction"
    assert path.stem == "predictions_test"
    assert lines[0] == first
    assert len(lines) == 3


def test_the_table_gives_mean_and_standard_deviation_over_seeds_and_marks_the_best_epoch(tmp_path):
    cells = {}
    for seed, (last, best) in enumerate([(0.6, 0.7), (0.7, 0.7), (0.8, 0.9)]):
        cells[tmp_path / "armada" / str(seed)] = {
            "task": "rte", "arm": "armada", "dev": {"accuracy": last},
            "best": {"dev": {"accuracy": best}}, "aligner": {"accuracy": 0.5}, "grad_norm": 2.0}
    cells[tmp_path / "undistilled/0"] = {
        "task": "rte", "arm": "undistilled", "dev": {"accuracy": 0.55},
        "best": {"dev": {"accuracy": 0.55}}, "aligner": None}
    text = evaluation.report(cells)
    lines = [line.split() for line in text.splitlines()]
    armada, = [line for line in lines if line[0] == "armada"]
    undistilled, = [line for line in lines if line[0] == "undistilled"]
    assert armada == "armada 3 70.0 ± 10.0 76.7 ± 11.5 50.0 ± 0.0 - - 2.00".split()
    assert undistilled == "undistilled 1 55.0 55.0 - - - -".split()
    assert "chosen on dev" in text


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no saved run"):
        evaluation.find_cells([tmp_path])
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def finished(tmp_path):
    """A grid of four arms and seven seeds as train.py leaves it, without the weights."""
    run = tmp_path / "run"
    for arm, seeds in arms_of(undistilled=0, armada=0.1, shuffled=-0.1, dose_0=0).items():
        for seed, accuracy in seeds.items():
            write_cell(run, arm, seed, accuracy)
    arms = ["undistilled", "armada", "shuffled", "dose-0"]
    (run / "config.json").write_text(json.dumps({"arms": arms}))
    return run


def write_cell(run, arm, seed, accuracy):
    """RUN/ARM/SEED with metrics.json and a log of two evaluations."""
    folder = run / arm / str(seed)
    folder.mkdir(parents=True)
    metrics = {
        "task": "objects", "arm": arm, "seed": seed, "control": arm in CONTROLS, "grad_norm": 2.0,
        "teacher": "painter:0" if arm == "dose-0" else "painter",
        "dev": {"accuracy": accuracy}, "best": {"dev": {"accuracy": accuracy}},
        "aligner": None, "spaces": {"retrieval@1": 0.25, "cka": 0.5}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with open(folder / "log.jsonl", "w") as log:
        for epoch in (10, 20):
            line = {"epoch": epoch, "dev": {"accuracy": epoch / 20 * accuracy}}
            log.write(json.dumps(line) + "\n")


def test_the_report_says_who_beats_whom_and_comparison_json_holds_the_numbers(finished, capsys):
    evaluation.main([str(finished)])
    text = capsys.readouterr().out
    first_words = [line.split()[0] for line in text.splitlines()]
    assert first_words[2:6] == ["undistilled", "armada", "shuffled", "dose-0"]  # the run's order
    armada = text.splitlines()[-3]
    assert armada.startswith("armada")
    assert "BEATS every control: undistilled, shuffled" in armada
    saved = json.loads((finished / "comparison.json").read_text())
    assert (saved["task"], saved["metric"]) == ("objects", "accuracy")
    comparison = saved["arms"]["armada"]["comparisons"]["undistilled"]
    assert (comparison["seeds"], comparison["p"]) == (7, 2 / 2**7)
    assert comparison["p_holm"] == 2 * comparison["p"]
    low, high = comparison["interval"]
    assert low < comparison["difference"] < high
    assert f"{100 * comparison['difference']:+.1f}" in armada
    assert "25.0 ± 0.0" in text  # retrieval@1
    assert "50.0 ± 0.0" in text  # CKA


def test_a_cell_that_was_stopped_on_its_way_stands_in_the_table_but_is_not_compared(
        finished, capsys):
    path = finished / "armada/3/metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["control"]  # as --rescore leaves an unfinished one
    path.write_text(json.dumps(metrics))
    evaluation.main([str(finished)])
    lines = capsys.readouterr().out.splitlines()
    in_table, _ = [line.split() for line in lines if line.startswith("armada")]
    assert in_table[1] == "7"
    saved = json.loads((finished / "comparison.json").read_text())["arms"]["armada"]
    assert "3" not in saved["scores"]
    assert saved["comparisons"]["undistilled"]["seeds"] == 6


def test_a_part_of_a_run_is_printed_and_leaves_the_whole_runs_comparison_alone(
        finished, monkeypatch, capsys):
    evaluation.main([str(finished)])
    before = (finished / "comparison.json").read_text()
    monkeypatch.chdir(finished / "armada/3")
    evaluation.main(["."])
    assert "no verdict without a control" in capsys.readouterr().out
    assert (finished / "comparison.json").read_text() == before


@pytest.mark.parametrize("flags, says", [
    (["--plott"], "did you mean --plot?"), (["--data-dir"], "expected one")])
def test_a_mistyped_flag_is_one_line(flags, says, finished, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error
    assert error.count("\n") == 1


def error_of(capsys, *arguments):
    """The one line on stderr with which eval.py ends at status 2."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


DAMAGES = ["{", "[]", "3", "[" * 100_000, '{"task": 1' + 5000 * "0" + "}", b"\xff\xfe", "folder"]


@pytest.mark.parametrize("name", ["armada/3/metrics.json", "config.json", "armada/3/config.json"])
@pytest.mark.parametrize("content", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_file_of_a_run_is_named_with_its_cure(name, content, finished, capsys):
    path = finished / name
    path.unlink(missing_ok=True)
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    arguments = [finished]
    if name == "armada/3/config.json":  # only scoring reads it
        arguments = [finished / "armada/3", "--rescore"]
    error = error_of(capsys, *arguments)
    assert f"run/{name}" in error
    assert "delete it and --resume" in error or "restore it" in error


def spoil_metrics(run, **changes):
    """Change some keys of RUN/armada/3/metrics.json."""
    path = run / "armada/3/metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, **changes}))


@pytest.mark.parametrize("changes, says", [
    ({"dev": {"accuracy": math.nan}}, "the dev accuracy nan is not a finite number"),
    ({"dev": {"accuracy": math.inf}}, "the dev accuracy inf is not a finite number"),
    ({"dev": {"accuracy": 10**400}}, "is not a finite number"),
    ({"dev": {"accuracy": "0.7"}}, "the dev accuracy '0.7' is not a finite number"),
    ({"best": {"dev": {"accuracy": math.nan}}}, "the best accuracy nan is not"),
    ({"spaces": {"cka": math.nan}}, "the spaces cka nan is not"),
    ({"dev": [0.7]}, "its 'dev' is [0.7]"),
    ({"dev": None}, "its 'dev' is None"),
    ({"best": {"dev": "0.7"}}, "its 'best' is {'dev': '0.7'}"),
    ({"test": "0.7"}, "its 'test' is '0.7'"),
    ({"arm": None}, "its 'arm' is None"),
    ({"seed": "3"}, "its 'seed' is '3'"),
    ({"task": "objcts"}, "did you mean objects?"),
])
def test_what_cannot_be_averaged_is_told_with_file_and_key(changes, says, finished, capsys):
    """A student of nan got "WORSE, p 0" once; nothing is written on what is refused."""
    spoil_metrics(finished, **changes)
    error = error_of(capsys, finished)
    assert "armada/3/metrics.json" in error
    assert says in error
    assert not (finished / "comparison.json").exists()


def test_a_saved_student_of_nan_is_not_scored(finished, monkeypatch, capsys):
    """The largest of nan, nan would be class 0, and accuracy a number like any other."""
    student = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(student.weight, math.nan)
    monkeypatch.setattr("student.load_student", lambda folder: student)
    config = {"task": "objects", "arms": ["armada"], "seeds": [3], "cache_dir": "", "amp": "off",
              "max_length": 32, "micro_batch": 8}
    (finished / "armada/3/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="armada/3/last: a weight is not a finite number"):
        evaluation.rescore_cell(finished / "armada/3", {}, None)


@pytest.mark.parametrize("trained_on, scored_on", [("cpu", "cpu"), ("auto", "auto"),
                                                   ("cuda:7", "auto"), (None, "auto")])
def test_a_student_is_scored_on_the_cpu_where_it_was_trained_there(
        trained_on, scored_on, tmp_path, monkeypatch):
    """A GPU would round and sample otherwise; any other device may be absent here."""
    class Found(Exception):
        pass

    def note(wanted):
        raise Found(wanted.device)

    monkeypatch.setattr("student.precision", note)
    config = {"amp": "off"}
    if trained_on:  # runs of an earlier version lack it
        config["device"] = trained_on
    with pytest.raises(Found, match=f"^{scored_on}$"):
        evaluation.score_saved(tmp_path, config, TASKS["rte"], "dev", [])


# ---- which cells are one arm ----

def copy_seed(run):
    shutil.copytree(run / "armada/3", run / "armada/9")


def copy_arm(run):
    shutil.copytree(run / "armada", run / "armada-old")


def move_seed_to_another_folder(run):
    (run / "old").mkdir()
    (run / "armada/3").rename(run / "old/3")


def write_seed_with_zeros(run):
    shutil.copytree(run / "armada/3", run / "armada/03")


def change_task(run):
    spoil_metrics(run, task="rte")


def change_student(run):
    for seed, student in (("3", "tiny"), ("4", "bert-base")):
        path = run / "armada" / seed / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "student": student}))


@pytest.mark.parametrize("spoil, says", [
    (change_task, "differ in their task: objects"),
    (change_student, "differ in their student: tiny"),
    (copy_seed, "armada/3 and "),
    (copy_arm, "armada-old/0 (seed 0) are both of arm armada"),
    (move_seed_to_another_folder, "old/3 (seed 3) are both of arm armada"),
    (write_seed_with_zeros, "armada/3 (seed 3) are both of arm armada"),
])
def test_cells_that_are_not_of_one_training_are_not_averaged(
        spoil, says, finished, monkeypatch, capsys):
    """Under one name they would be one number, and a copy would count twice. It is told before
    hours of scoring."""
    spoil(finished)
    monkeypatch.setattr(evaluation, "rescore_cell", None)
    assert says in error_of(capsys, finished, "--rescore")


def test_cells_that_share_no_metric_are_not_averaged(finished, capsys):
    spoil_metrics(finished, dev={"f1": 0.5})
    error = error_of(capsys, finished)
    assert "armada/3 has no accuracy" in error
    assert "--rescore" in error


def test_only_ascii_digits_are_a_seed(finished, capsys):
    """To str.isdigit a superscript is a digit, to int() an Arabic 3 is 3."""
    evaluation.main([str(finished)])
    before = capsys.readouterr().out
    for name in ("\u00b2", "\u0663", "3.0", "-3", "3 ", "copy"):
        shutil.copytree(finished / "armada/3", finished / "armada" / name)
    (finished / "comparison.json").unlink()
    evaluation.main([str(finished)])
    assert capsys.readouterr().out == before
    assert (finished / "comparison.json").exists()


def link_arm(run):
    (run / "armada").rename(run.parent / "other disk")
    (run / "armada").symlink_to(run.parent / "other disk")


def link_seed(run):
    (run / "armada/3").rename(run.parent / "other disk")
    (run / "armada/3").symlink_to(run.parent / "other disk")


def link_seed_twice(run):
    (run / "armada/9").symlink_to(run / "armada/3")


def link_run_into_itself(run):
    (run / "loop").symlink_to(run)
    (run / "armada/loop").symlink_to(run)


@pytest.mark.parametrize("link", [link_arm, link_seed, link_seed_twice, link_run_into_itself])
def test_a_cell_counts_once_whatever_symbolic_links_lead_to_it(link, finished, capsys):
    evaluation.main([str(finished)])
    before = capsys.readouterr().out
    link(finished)
    (finished / "comparison.json").unlink()
    evaluation.main([str(finished), str(finished)])
    assert capsys.readouterr().out == before
    assert (finished / "comparison.json").exists()


# ---- two cells, consoles ----

@pytest.mark.parametrize("flags", [["--task", "objects"], ["--plot"], ["--rescore", "--plot"]])
def test_what_a_pair_of_cells_has_not_is_refused_before_they_are_scored(
        flags, finished, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "rescore_cell", None)
    error = error_of(capsys, finished / "armada/0", finished / "undistilled/0", *flags)
    assert "leave out --task and --plot" in error


def test_files_and_the_tables_sign_need_no_locale(finished):
    """In an ASCII locale the sign is shown as ?, and no file is read or written in the locale's
    encoding, which Python can be made to tell."""
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning",
               evaluation.__file__, str(finished)]
    result = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"},
                            capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "mean ? standard deviation" in result.stdout
    assert (finished / "comparison.json").exists()


def test_two_cells_are_compared_example_by_example_on_one_classification_task_only(tmp_path):
    cells = {tmp_path / "run/armada/0": {"task": "rte"},
             tmp_path / "run/undistilled/0": {"task": "rte"}}
    right = [[True, True, False], [True, False, False]]
    text = evaluation.agreement(cells, right)
    assert "rte, 3 dev examples: both right 1, only run/armada/0 1" in text
    assert "only run/undistilled/0 0, both wrong 1; McNemar's exact p 1" in text
    for tasks in (("rte", "cb"), ("stsb", "stsb")):
        with pytest.raises(UserError, match="two cells of one classification task"):
            evaluation.agreement({a: {"task": task} for a, task in zip(cells, tasks)}, right)
    with pytest.raises(UserError, match="armada/0 and .* have 3 and 2 dev examples"):
        evaluation.agreement(cells, [right[0], right[1][:2]])


# ---- figures ----

def test_plots_are_png_files_beside_the_run(finished, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    evaluation.main([str(finished), "--plot"])
    assert capsys.readouterr().out.count("wrote") == 3
    for name in ("learning_curves", "arms", "dose_response"):
        assert (finished / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("log, says", [
    ('{"epoch": 1, "dev": {"accuracy": 0.5', "log.jsonl:1 is not JSON"),
    ('{"epoch": 1}\n{"epoch": [1], "dev": {"accuracy": 0.5}}', "log.jsonl:2: the epoch [1]"),
    ('{"dev": {"accuracy": 0.5}}', "log.jsonl:1: the epoch None"),
    ('{"epoch": 1, "dev": {"accuracy": NaN}}', "log.jsonl:1: the dev accuracy nan"),
    ('{"epoch": 1, "dev": [0.5]}', "its 'dev' is [0.5]"),
    ("\0", "log.jsonl:1 is not JSON"),
    (None, "log.jsonl cannot be read"),
])
def test_a_log_that_cannot_be_drawn_is_told_with_its_line(log, says, tmp_path):
    path = tmp_path / "log.jsonl"
    if log:
        path.write_text(log)
    with pytest.raises(UserError) as told:
        evaluation.read_curve(path, "accuracy")
    assert says in str(told.value)


def test_a_missing_log_is_told_below_the_table(finished, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    (finished / "armada/3/log.jsonl").unlink()
    assert "armada/3/log.jsonl cannot be read" in error_of(capsys, finished, "--plot")


def test_a_curve_leaves_out_blank_lines_and_epochs_without_the_metric(tmp_path):
    """rouge_l's package may have been installed while the run went on."""
    path = tmp_path / "log.jsonl"
    lines = [{"epoch": 1, "dev": {"rouge_l_unstemmed": 0.3}}, {"epoch": 2, "role": "student"},
             {"epoch": 2, "dev": {"rouge_l_unstemmed": 0.3, "rouge_l": 0.4}}]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n\n")
    assert evaluation.read_curve(path, "rouge_l") == [(2, 0.4)]


def test_a_teacher_without_doses_has_no_dose_figure(finished, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    for path in finished.glob("*/*/metrics.json"):
        path.write_text(path.read_text().replace('"painter', '"vectors:painter'))
    evaluation.main([str(finished), "--plot"])
    assert capsys.readouterr().out.count("wrote") == 2


def test_a_run_that_was_scored_once_has_no_learning_curves(finished, capsys):
    """A point is no curve: matplotlib would put epochs 19.25 and 20.75 beside 20."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    for path in finished.glob("*/*/log.jsonl"):
        path.write_text('{"epoch": 20, "dev": {"accuracy": 0.5}}\n')
    evaluation.main([str(finished), "--plot"])
    assert not (finished / "learning_curves.png").exists()
    assert (finished / "arms.png").exists()


def test_arms_are_told_apart_in_grey():
    """Each curve has its own marker and dashes, and all colours are shades of grey."""
    figure = pytest.importorskip("matplotlib.figure", reason="optional: pip install matplotlib")
    axes = figure.Figure().subplots()
    evaluation.draw_curves(axes, {f"arm {i}": {1: 50.0, 2: 60.0 + i} for i in range(10)})
    lines = axes.get_lines()
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 10
    shades = [float(line.get_color()) for line in lines]  # a grey is a string, and "0" is black
    assert shades == sorted(set(shades))
    assert 0 <= min(shades) < max(shades) < 0.8


def grid_of_labels(root):
    """Runs with 30 and 60 labels; armada with and without 30 texts that have none."""
    for labelled, rest in ((30, 0), (60, 0), (30, 30)):
        run = root / f"{labelled}-{rest}"
        for arm in ("undistilled", "armada"):
            for seed in range(5):
                accuracy = 0.5 + labelled / 1000 + rest / 100 + seed / 1000
                write_cell(run, arm, seed, accuracy)
                path = run / arm / str(seed) / "metrics.json"
                metrics = json.loads(path.read_text())
                metrics |= {"labelled": labelled, "unlabelled": rest}
                path.write_text(json.dumps(metrics))


def test_runs_with_more_and_fewer_labels_are_one_figure_beside_them(tmp_path, capsys):
    """An arm is one curve without and another with unlabelled texts."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    grid_of_labels(tmp_path)
    curves = evaluation.label_curves(list(evaluation.by_run(evaluation.find_cells([tmp_path]))))
    rest = "armada, and the rest unlabelled"
    assert set(curves) == {"undistilled", "armada", "undistilled, and the rest unlabelled", rest}
    assert set(curves["armada"]) == {30, 60}
    assert curves["armada"][60] == pytest.approx([56.0, 56.1, 56.2, 56.3, 56.4])
    assert curves[rest].keys() == {30}
    assert curves[rest][30] == pytest.approx([83.0, 83.1, 83.2, 83.3, 83.4])
    evaluation.main([str(tmp_path), "--plot"])
    assert f"wrote {tmp_path / 'label_curve.png'}" in capsys.readouterr().out
    assert (tmp_path / "label_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_that_have_as_many_labels_or_other_tasks_have_no_figure_of_labels(tmp_path):
    grid_of_labels(tmp_path)
    runs = list(evaluation.by_run(evaluation.find_cells([tmp_path])))
    as_many = [run for run in runs if run[0].name.startswith("30")]
    assert evaluation.label_curves(as_many) == {}
    (folder, _, arms), *others = runs
    assert evaluation.label_curves([(folder, evaluation.TASKS["cb"], arms), *others]) == {}
    del arms["armada"][0]["labelled"]  # a run of an earlier version
    assert evaluation.label_curves([(folder, runs[0][1], arms)]) == {}


def test_a_figure_of_labels_or_doses_shows_means_intervals_and_greys():
    figure = pytest.importorskip("matplotlib.figure", reason="optional: pip install matplotlib")
    values = [50.0, 51.0, 52.0, 54.0, 58.0]
    low, high = evaluation.bootstrap_interval(values)
    axes = figure.Figure().subplots()
    evaluation.draw_label_curves(axes, {f"curve {i}": {60: values, 30: values} for i in range(4)})
    curves = [line for line in axes.get_lines() if line.get_label().startswith("curve")]
    assert [list(line.get_xdata()) for line in curves] == [[30, 60]] * 4
    assert [list(line.get_ydata()) for line in curves] == [[53.0, 53.0]] * 4
    assert len({(line.get_marker(), line.get_linestyle()) for line in curves}) == 4
    assert len({line.get_color() for line in curves}) == 4
    bars = [line for line in axes.get_lines() if line not in curves]
    assert [list(bar.get_ydata()) for bar in bars] == [[low, high]] * 8

    axes = figure.Figure().subplots()
    points = {"undistilled": values, "dose-0.5": values, "armada": values}
    aligners = {"dose-0.5": [40.0], "armada": [60.0]}
    evaluation.draw_doses(axes, points, {"armada": 1.0, "dose-0.5": 0.5}, aligners)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["student"].get_ydata()) == [53.0, 53.0]
    assert list(lines["aligner alone"].get_ydata()) == [40.0, 60.0]
    assert list(lines["undistilled"].get_ydata()) == [53.0, 53.0]


def test_a_missing_matplotlib_is_one_line_with_the_pip_command(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), "--plot"])
    assert stop.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_rounding_loses_no_tie_of_the_sign_flips():
    """The signs as observed count too, however their sum is rounded: no p is below 2 / 2^n."""
    assert sign_flip_p([0.7, 0.1, 0.2, 0.3, 0.4]) == 2 / 2**5


def test_the_interval_reaches_further_on_the_side_of_the_long_tail():
    """A sample without the tail has a mean too low and a deviation too small: the sides swap."""
    values = [1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 4.0]
    low, high = bootstrap_interval(values)
    assert high - np.mean(values) > 1.5 * (np.mean(values) - low)
