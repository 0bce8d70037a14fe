"""Metrics against their definitions, statistics against enumeration and simulation, what a run's report says.
Read beside eval.py."""
import itertools
import json
import math
import sys

import numpy as np
import pytest

import eval as evaluation
from data import TASKS, Example, UserError, load_task
from eval import (bootstrap_interval, compare, compute_metrics, holm, linear_cka, mcnemar, retrieval_at_1,
                  sign_flip_p)

def test_accuracy_and_binary_f1_from_counts():
    """3 hits, 1 false alarm, 2 misses: precision 3/4, recall 3/5, F1 their harmonic mean."""
    predictions, labels = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0]
    expected = {"accuracy": 5 / 8, "f1": 2 / (4 / 3 + 5 / 3)}
    assert compute_metrics("mrpc", predictions, labels) == pytest.approx(expected)
    assert compute_metrics("QQP", predictions, labels) == pytest.approx(expected)

def test_cbs_f1_is_the_mean_over_the_classes_seen():
    """Class 0: F1 2/3 (one hit, one false alarm); class 1: 0 (one miss);
    class 2, never seen, does not count as 0."""
    assert compute_metrics("cb", [0, 0], [0, 1])["f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert compute_metrics("cb", [0, 1, 2], [0, 1, 2]) == {"accuracy": 1.0, "f1": 1.0}

def test_matthews_correlation_from_the_four_counts():
    predictions, labels = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1]
    tp, fp, fn, tn = 3, 1, 1, 3
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute_metrics("cola", predictions, labels) == {"mcc": pytest.approx(mcc)}

def test_pearson_sees_a_line_and_spearman_any_order():
    labels = [0.0, 1.0, 2.0, 3.0, 5.0]
    assert compute_metrics("stsb", [2 * y + 1 for y in labels], labels) == pytest.approx(
        {"pearson": 1, "spearman": 1})
    bent = compute_metrics("stsb", [-math.exp(y) for y in labels], labels)
    assert bent["spearman"] == pytest.approx(-1) and -1 < bent["pearson"] < -0.8

def test_spearman_gives_equal_values_the_mean_of_their_ranks():
    """Ranks of (1, 2, 2, 3) are (1, 2.5, 2.5, 4); without ties d^2 would give another number."""
    ranks, labels = [1, 2.5, 2.5, 4], [1, 2, 3, 4]
    dot = sum((a - 2.5) * (b - 2.5) for a, b in zip(ranks, labels))
    expected = dot / math.sqrt(sum((a - 2.5) ** 2 for a in ranks) * sum((b - 2.5) ** 2 for b in labels))
    assert (compute_metrics("stsb", [1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])["spearman"]
            == pytest.approx(expected))

def test_undefined_values_are_0():
    assert compute_metrics("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert compute_metrics("cola", [1, 1, 1], [0, 1, 1]) == {"mcc": 0.0}
    assert compute_metrics("stsb", [2.0, 2.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}

@pytest.mark.parametrize("predictions, labels", [([1], [1, 0]), ([], []), ([[1]], [[1]])])
def test_lists_that_do_not_match_are_refused(predictions, labels):
    with pytest.raises(ValueError, match="equal, non-empty"):
        compute_metrics("rte", predictions, labels)

@pytest.mark.parametrize("name, first", [
    ("rte", '{"idx": 0, "label": "not_entailment"}'), ("cb", '{"idx": 0, "label": "neutral"}'),
    ("copa", '{"idx": 0, "label": 1}'), ("boolq", '{"idx": 0, "label": "true"}'),
    ("wic", '{"idx": 0, "label": "true"}'), ("wsc", '{"idx": 0, "label": "True"}'),
    ("mnli", "0\tneutral"), ("qnli", "0\tnot_entailment"), ("cola", "0\t1"), ("mrpc", "0\t1"),
    ("stsb", "0\t1.000")])
def test_predictions_are_written_in_the_form_that_the_official_server_reads(name, first, official, tmp_path):
    task, examples = TASKS[name], load_task(name, official)["test"]
    evaluation.write_predictions(tmp_path, "test", task, examples, [1.0, 0.0, 1.0])
    path, = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    if path.suffix == ".tsv":
        assert lines.pop(0) == "index\tprediction"
    assert path.stem == "predictions_test" and lines[0] == first and len(lines) == 3

def test_unlabelled_splits_have_no_score():
    assert evaluation.score(TASKS["rte"], [Example({}, None, 0, "")], [1]) is None

def test_the_table_gives_mean_and_standard_deviation_over_seeds_and_marks_the_best_epoch(tmp_path):
    cells = {tmp_path / "armada" / str(seed): {
        "task": "rte", "arm": "armada", "dev": {"accuracy": a}, "best": {"dev": {"accuracy": b}},
        "aligner": {"accuracy": 0.5}, "grad_norm": 2.0}
        for seed, (a, b) in enumerate(((0.6, 0.7), (0.7, 0.7), (0.8, 0.9)))}
    cells[tmp_path / "undistilled/0"] = {"task": "rte", "arm": "undistilled", "dev": {"accuracy": 0.55},
                                         "best": {"dev": {"accuracy": 0.55}}, "aligner": None}
    text = evaluation.report(cells)
    armada, undistilled = [line.split() for line in text.splitlines()
                           if line.startswith(("armada", "undist"))]
    assert armada == "armada 3 70.0 ± 10.0 76.7 ± 11.5 50.0 ± 0.0 - - 2.00".split()
    assert undistilled == "undistilled 1 55.0 55.0 - - - -".split() and "chosen on dev" in text

def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no saved run"):
        evaluation.find_cells([tmp_path])
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1

# ---- the two spaces ----------------------------------------------------------------------------------------
def points(n=12, d=5, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))

def test_retrieval_counts_the_texts_whose_own_picture_is_nearest():
    p = points()
    assert retrieval_at_1(p, p) == 1 and retrieval_at_1(p, np.roll(p, 1, axis=0)) == 0
    assert retrieval_at_1(p, 7 * p) == 1          # a cosine: lengths do not matter
    half = np.concatenate([p[:6], np.roll(p[6:], 1, axis=0)])
    assert retrieval_at_1(p, half) == 0.5
    assert retrieval_at_1(p, 0 * p) == pytest.approx(1 / 12)  # no direction: chance, not a full score
    # From text to picture: two texts call for the first picture, and one of them is wrong.
    assert retrieval_at_1(np.eye(3), np.eye(3)[[0, 0, 2]]) == pytest.approx(2 / 3)
    twins = np.repeat(p[:6], 2, axis=0)
    assert retrieval_at_1(twins, twins) == 0.5    # two texts with one picture share the point

def test_retrieval_needs_shared_coordinates_and_cka_does_not():
    p, (rotation, _) = points(200), np.linalg.qr(points(5, 5, 1))
    assert linear_cka(p, p @ rotation * 3 + 7) == pytest.approx(1)
    assert retrieval_at_1(p, p @ rotation) < 0.5

def test_linear_cka_is_its_definition_over_features():
    """|X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) with (d, d) matrices; the code multiplies (N, N) ones."""
    x, y = points(), points(d=3, seed=1)
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    assert linear_cka(x, y) == pytest.approx(norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))
    assert linear_cka(x, np.ones((12, 3))) == 0

def test_linear_cka_of_uncorrelated_features_is_0():
    x = np.array([[1.0], [1], [-1], [-1]])
    assert linear_cka(x, np.array([[1.0], [-1], [1], [-1]])) == pytest.approx(0)

# ---- statistics --------------------------------------------------------------------------------------------
def test_the_sign_flip_p_counts_the_ways_to_swap_that_are_as_extreme():
    assert sign_flip_p([1, 2, 3, 4, 5]) == 2 / 2**5  # all signs equal: two of 32, whatever the sizes
    assert sign_flip_p([0.1] * 7) == 2 / 2**7        # what seven seeds can reach at most
    assert sign_flip_p([1, -1]) == 1 and sign_flip_p([0.0, 0.0, 0.0]) == 1
    d = points(9, 1).ravel() + 0.5
    swaps = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=9)]
    assert sign_flip_p(d) == np.mean([swap >= abs(sum(d)) - 1e-9 for swap in swaps])
    assert sign_flip_p(d) == sign_flip_p(-d)

def test_many_seeds_are_tested_by_monte_carlo_and_never_get_p_0():
    d = points(18, 1).ravel() + 0.35
    signs = np.array(list(itertools.product((1, -1), repeat=18)), np.int8)
    assert sign_flip_p(d) == pytest.approx((abs(signs @ d) >= abs(d.sum()) - 1e-9).mean(), abs=0.003)
    assert sign_flip_p([1.0] * 40) == pytest.approx(1 / 100_001)

@pytest.mark.parametrize("n", [7, 10])
def test_the_studentised_interval_covers_and_the_percentile_interval_does_not(n):
    """Of 400 samples with mean 0. Two standard errors of such a share are 2 points."""
    rng, hits, percentile = np.random.default_rng(1), 0, 0
    for _ in range(400):
        x = rng.standard_normal(n)
        low, high = bootstrap_interval(x, draws=2000)
        hits += low <= 0 <= high
        low, high = np.quantile(rng.choice(x, (2000, n)).mean(1), [0.025, 0.975])
        percentile += low <= 0 <= high
    assert 0.92 <= hits / 400 <= 0.98 and percentile / 400 < 0.92  # .88 at n = 7

def test_intervals_at_the_edge():
    assert bootstrap_interval([1, 2, 3, 4]) is None                # too few to tell
    assert bootstrap_interval([0.5] * 6) == (0.5, 0.5)
    low, high = bootstrap_interval([1, 2, 3, 4, 5])
    assert low < 3 < high and bootstrap_interval([1, 2, 3, 4, 5]) == (low, high)  # the same each time

def test_holm_multiplies_by_the_hypotheses_still_open_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([0.02]) == [0.02] and holm([]) == []

def test_mcnemar_is_a_coin_over_the_examples_that_one_student_gets_right():
    a = [1] * 5 + [1] * 9 + [0] * 1 + [0] * 4
    b = [1] * 5 + [0] * 9 + [1] * 1 + [0] * 4
    counts, p = mcnemar(a, b)
    assert counts == (5, 9, 1, 4) and p == pytest.approx(2 * (1 + 10) / 2**10)  # at most 1 head of 10 coins
    assert mcnemar(a, a)[1] == 1 and mcnemar([1, 0], [0, 1])[1] == 1

# ---- verdicts ----------------------------------------------------------------------------------------------
def arms_of(seeds=7, noise=0.01, seed=0, **shifts):
    """{arm: {seed: accuracy}}: a seed's own luck, shared by its arms, plus noise, plus the arm's shift."""
    rng = np.random.default_rng(seed)
    luck = rng.normal(0.6, 0.05, seeds)
    return {arm.replace("_", "-"): dict(enumerate((luck + rng.normal(0, noise, seeds) + shift).tolist()))
            for arm, shift in shifts.items()}

CONTROLS = ["undistilled", "shuffled"]

@pytest.mark.parametrize("shift, verdict", [(0.1, "BEATS"), (0.0, "NO DIFFERENCE"), (-0.1, "WORSE")])
def test_the_verdict_is_on_the_best_control(shift, verdict):
    """`shuffled` lies 20 points below: to beat it is nothing. Pairing takes a seed's luck out."""
    found = compare(arms_of(undistilled=0, shuffled=-0.2, armada=shift), CONTROLS)["armada"]
    assert (found["verdict"], found["best_control"], found["note"]) == (verdict, "undistilled", "")
    assert found["comparisons"]["undistilled"]["difference"] == pytest.approx(shift, abs=0.02)

def test_beats_means_above_every_control():
    """The best control is beaten in every seed; the other one is worse on average, but has a lucky seed."""
    scores = arms_of(undistilled=0, shuffled=-0.2, armada=0.1)
    scores["shuffled"][0] += 1.2
    found = compare(scores, CONTROLS)["armada"]
    assert (found["verdict"], found["best_control"]) == ("NO DIFFERENCE", "undistilled")
    assert found["comparisons"]["undistilled"]["verdict"] == "BEATS"

def test_a_control_is_compared_with_undistilled_only_and_undistilled_with_nothing():
    found = compare(arms_of(undistilled=0, shuffled=-0.1, armada=0), CONTROLS)
    assert list(found) == ["shuffled", "armada"] and list(found["shuffled"]["comparisons"]) == ["undistilled"]
    assert found["shuffled"]["verdict"] == "WORSE" and compare(arms_of(armada=0), []) == {}

@pytest.mark.parametrize("controls, fewest", [(1, 6), (2, 7), (4, 8)])
def test_too_few_seeds_are_said_to_be_too_few(controls, fewest):
    """2 / 2^n times the number of controls must get under 5 %."""
    names = [f"c{i}" for i in range(controls)]
    for seeds in (fewest - 1, fewest):
        found = compare(arms_of(seeds, armada=0.2, **dict.fromkeys(names, 0)), names)["armada"]
        assert (found["verdict"] == "BEATS") == (seeds == fewest)
        assert found["note"] == ("" if seeds == fewest else
                                 f"{seeds} seeds cannot reach 5 %, {fewest} can")

def test_a_verdict_that_was_reached_needs_no_excuse():
    """A control has six seeds only: twice its p passes 5 %, but Holm doubles the smaller p alone."""
    scores = arms_of(7, undistilled=0, shuffled=0, armada=0.2)
    del scores["shuffled"][6]
    found = compare(scores, CONTROLS)["armada"]
    assert (found["verdict"], found["note"]) == ("BEATS", "")

def test_only_seeds_that_both_arms_have_are_paired():
    scores = arms_of(8, undistilled=0, armada=0.1)
    del scores["armada"][3], scores["undistilled"][5]
    assert compare(scores, ["undistilled"])["armada"]["comparisons"]["undistilled"]["seeds"] == 6

def verdicts_on_identical_arms(seeds, controls, monkeypatch):
    """The share of 200 comparisons of identical arms that get a verdict."""
    monkeypatch.setattr(evaluation, "bootstrap_interval", lambda values: None)  # no part of the verdict
    names = [f"c{i}" for i in range(controls)]
    return np.mean([compare(arms_of(seeds, seed=seed, armada=0, **dict.fromkeys(names, 0)),
                            names)["armada"]["verdict"] != "NO DIFFERENCE" for seed in range(200)])

@pytest.mark.parametrize("seeds, controls", [(7, 2), (10, 4), (17, 1)])
def test_identical_arms_get_a_verdict_in_at_most_5_percent(seeds, controls, monkeypatch):
    """Type-I error of the whole procedure, the best control and Holm included."""
    assert verdicts_on_identical_arms(seeds, controls, monkeypatch) <= 0.07

def test_without_holm_the_best_of_eight_controls_would_be_found_better_far_too_often(monkeypatch):
    assert verdicts_on_identical_arms(10, 8, monkeypatch) <= 0.07
    monkeypatch.setattr(evaluation, "holm", lambda ps: ps)
    assert verdicts_on_identical_arms(10, 8, monkeypatch) > 0.1

# ---- a run on disk -----------------------------------------------------------------------------------------
@pytest.fixture
def finished(tmp_path):
    """A grid of three arms and seven seeds as train.py leaves it, without the weights."""
    run = tmp_path / "run"
    for arm, seeds in arms_of(undistilled=0, armada=0.1, shuffled=-0.1, dose_0=0).items():
        for seed, accuracy in seeds.items():
            cell = run / arm / str(seed)
            cell.mkdir(parents=True)
            (cell / "metrics.json").write_text(json.dumps({
                "task": "objects", "arm": arm, "seed": seed, "control": arm in CONTROLS, "grad_norm": 2.0,
                "teacher": "painter:0" if arm == "dose-0" else "painter", "dev": {"accuracy": accuracy},
                "best": {"dev": {"accuracy": accuracy}}, "aligner": None,
                "spaces": {"retrieval@1": 0.25, "cka": 0.5}}))
            (cell / "log.jsonl").write_text("".join(
                json.dumps({"epoch": epoch, "dev": {"accuracy": epoch / 20 * accuracy}}) + "\n"
                for epoch in (10, 20)))
    (run / "config.json").write_text(json.dumps({"arms": ["undistilled", "armada", "shuffled", "dose-0"]}))
    return run

def test_the_report_says_who_beats_whom_and_comparison_json_holds_the_numbers(finished, capsys):
    evaluation.main([str(finished)])
    text = capsys.readouterr().out
    first = [line.split()[0] for line in text.splitlines()]
    assert first[2:6] == ["undistilled", "armada", "shuffled", "dose-0"]  # in the order of the run
    armada = text.splitlines()[-3]
    assert armada.startswith("armada") and "BEATS every control: undistilled, shuffled" in armada
    saved = json.loads((finished / "comparison.json").read_text())
    row = saved["arms"]["armada"]["comparisons"]["undistilled"]
    assert (saved["task"], saved["metric"], row["seeds"], row["p"]) == ("objects", "accuracy", 7, 2 / 2**7)
    assert row["p_holm"] == 2 * row["p"] and row["interval"][0] < row["difference"] < row["interval"][1]
    assert f"{100 * row['difference']:+.1f}" in armada and "25.0 ± 0.0" in text and "50.0 ± 0.0" in text

def test_a_cell_that_was_stopped_on_its_way_stands_in_the_table_but_is_not_compared(finished, capsys):
    path = finished / "armada/3/metrics.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                if key != "control"}))  # as --rescore leaves an unfinished one
    evaluation.main([str(finished)])
    first, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("armada")]
    assert first.split()[1] == "7"
    saved = json.loads((finished / "comparison.json").read_text())["arms"]["armada"]
    assert "3" not in saved["scores"] and saved["comparisons"]["undistilled"]["seeds"] == 6

def test_a_part_of_a_run_is_printed_and_leaves_the_whole_runs_comparison_alone(finished, monkeypatch, capsys):
    evaluation.main([str(finished)])
    before = (finished / "comparison.json").read_text()
    monkeypatch.chdir(finished / "armada/3")
    evaluation.main(["."])
    assert "no verdict without a control" in capsys.readouterr().out
    assert (finished / "comparison.json").read_text() == before

def test_an_ablation_is_also_compared_with_armada():
    scores = arms_of(undistilled=0, armada=0.1, no_aux=0.2)
    found = compare(scores, ["undistilled"])
    assert found["no-aux"]["to_armada"]["difference"] == pytest.approx(0.1, abs=0.02)
    assert found["armada"]["to_armada"] is None

@pytest.mark.parametrize("flags, says", [
    (["--plott"], "did you mean --plot?"), (["--data-dir"], "expected one")])
def test_a_mistyped_flag_is_one_line(flags, says, finished, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1

def test_a_damaged_metrics_file_is_named(finished, capsys):
    (finished / "armada/3/metrics.json").write_text("{")
    with pytest.raises(SystemExit):
        evaluation.main([str(finished)])
    assert "armada/3/metrics.json is damaged: delete it" in capsys.readouterr().err

def test_a_teacher_without_doses_has_no_dose_figure(finished, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    for path in finished.glob("*/*/metrics.json"):
        path.write_text(path.read_text().replace('"painter', '"vectors:painter'))
    evaluation.main([str(finished), "--plot"])
    assert capsys.readouterr().out.count("wrote") == 2

def test_plots_are_png_files_beside_the_run(finished, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    evaluation.main([str(finished), "--plot"])
    assert capsys.readouterr().out.count("wrote") == 3
    for name in ("learning_curves", "arms", "dose_response"):
        assert (finished / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

def test_a_missing_matplotlib_is_one_line_with_the_pip_command(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), "--plot"])
    assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
