"""Metrics against their definitions, submission files, the table. Read beside eval.py."""
import json
import math

import pytest

import eval as evaluation
from data import TASKS, Example, UserError, load_task
from eval import compute_metrics


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


def test_the_table_gives_mean_and_standard_deviation_over_seeds_and_marks_the_best_epoch():
    cells = [{"task": "rte", "arm": "armada", "dev": {"accuracy": a}, "best": {"dev": {"accuracy": b}},
              "aligner": {"accuracy": 0.5}, "grad_norm": 2.0}
             for a, b in ((0.6, 0.7), (0.7, 0.7), (0.8, 0.9))]
    cells.append({"task": "rte", "arm": "undistilled", "dev": {"accuracy": 0.55},
                  "best": {"dev": {"accuracy": 0.55}}, "aligner": None})
    text = evaluation.table(cells)
    armada, undistilled = [line.split() for line in text.splitlines()
                           if line.startswith(("armada", "undist"))]
    assert armada == ["armada", "3", "70.0", "±", "10.0", "76.7", "±", "11.5", "50.0", "±", "0.0", "2.00"]
    assert undistilled == ["undistilled", "1", "55.0", "55.0", "-", "-"] and "chosen on dev" in text


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no saved run"):
        evaluation.find_cells([tmp_path])
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
