"""Metrics against their definitions, statistics against enumeration and simulation, what a run's
report says. Read beside eval.py."""
import itertools
import json
import math
import sys

import numpy as np
import pytest

import eval as evaluation
from data import TASKS, Example, UserError, load_task
from eval import (bootstrap_interval, compare, compute_metrics, holm, linear_cka, mcnemar,
                  retrieval_at_1, sign_flip_p)


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


def test_unlabelled_splits_have_no_score():
    assert evaluation.score(TASKS["rte"], [Example({}, None, 0, "")], [1]) is None


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


def test_a_damaged_metrics_file_is_named(finished, capsys):
    (finished / "armada/3/metrics.json").write_text("{")
    with pytest.raises(SystemExit):
        evaluation.main([str(finished)])
    assert "armada/3/metrics.json is damaged: delete it" in capsys.readouterr().err


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


# ---- figures ----

def test_plots_are_png_files_beside_the_run(finished, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    evaluation.main([str(finished), "--plot"])
    assert capsys.readouterr().out.count("wrote") == 3
    for name in ("learning_curves", "arms", "dose_response"):
        assert (finished / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_teacher_without_doses_has_no_dose_figure(finished, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    for path in finished.glob("*/*/metrics.json"):
        path.write_text(path.read_text().replace('"painter', '"vectors:painter'))
    evaluation.main([str(finished), "--plot"])
    assert capsys.readouterr().out.count("wrote") == 2


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


def test_a_missing_matplotlib_is_one_line_with_the_pip_command(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), "--plot"])
    assert stop.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err
