"""Exercise 5: how many seeds would 3 points need?

    python -m pytest tests/exercises/5_how_many_seeds.py

QUESTION. A run says NO DIFFERENCE. Is there none, or were there too few seeds to see it? Before
you buy seeds, say how many would find a true difference of 3 points with a probability of 80 % (the
power), at a level of 5 %. What counts is how much the DIFFERENCE of two arms varies from seed to
seed; what both arms share drops out, as they share initial weights, data order and dropout.

WHERE TO LOOK. eval.py: paired, sign_flip_p (what n seeds can reach at best), note_on_too_few_seeds.
`python eval.py RUN` writes RUN/comparison.json: {"arms": {ARM: {"scores": {SEED: score}, ...}}}.
The scores are fractions of 1, and a seed's name is a text, as always in json.

WHAT TO CHANGE. Write the two functions below.
- deviation_of_differences(): the standard deviation of the differences, seed by seed, in points.
  Only the seeds that both arms have count; divide by n - 1, for the mean is estimated, too.
- seeds_needed(): the smallest n. For normal differences the mean of n has the deviation s / sqrt(n)
  and must come out beyond z_(1 - level/2) of them, with a probability of `power`:

      n  =  ((z_(1 - level/2) + z_power) s / difference)^2  +  z_(1 - level/2)^2 / 2

  The last term (Guenther 1981) pays for s being estimated; it is 2 seeds at 5 %. The function
  statistics.NormalDist().inv_cdf gives z. But the sign-flip test has a floor: no n with
  2 / 2^n > level can ever show anything. The checks simulate, with that very test.

THEN USE IT on a run of yours:  python -m tests.exercises.5_how_many_seeds runs/objects
Why does armada against undistilled need more seeds than noise against undistilled? With c controls
Holm's correction asks level / c of the smallest p: what do four controls cost?
"""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import sign_flip_p

HERE = "5_how_many_seeds.py"


def deviation_of_differences(comparison, arm, control):
    """Return by how many points arm - control varies from seed to seed.

    comparison: what comparison.json holds. ValueError where the arms share fewer than two seeds.
    """
    raise NotImplementedError(f"{HERE}: write deviation_of_differences()")


def seeds_needed(difference, deviation, power=0.8, level=0.05):
    """Return the smallest number of seeds that finds a true difference with probability `power`.

    difference and deviation are in points, of the differences of single seeds.
    """
    raise NotImplementedError(f"{HERE}: write seeds_needed()")


# ---- the checks ----

COMPARISON = {"task": "objects", "metric": "accuracy", "arms": {
    "armada": {"scores": {"3": 0.84, "1": 0.80, "2": 0.75, "7": 0.10}},
    "undistilled": {"scores": {"1": 0.60, "2": 0.58, "3": 0.61, "10": 0.99}}}}


def test_the_deviation_is_that_of_the_paired_differences_in_points():
    found = deviation_of_differences(COMPARISON, "armada", "undistilled")
    differences = [20, 17, 23]  # of seeds 1, 2, 3
    expected = 3.0
    mistakes = {
        "it is in fractions, not in points": expected / 100,
        "divide by n - 1, not by n": np.std(differences),
        "the arms were not paired by seed": np.hypot(np.std([80, 75, 84], ddof=1),
                                                     np.std([60, 58, 61], ddof=1)),
    }
    for mistake, value in mistakes.items():
        assert found != pytest.approx(value), f"{HERE}: deviation_of_differences(): {mistake}"
    assert found == pytest.approx(expected), (
        f"{HERE}: deviation_of_differences() of the differences {differences} is {found}, not 3")


@pytest.mark.parametrize("shared, scores", [(0, {"2": 0.5, "3": 0.5}), (1, {"1": 0.5, "3": 0.5})])
def test_arms_without_two_seeds_in_common_have_no_deviation(shared, scores):
    arms = {"arms": {"a": {"scores": {"0": 0.5, "1": 0.6}}, "b": {"scores": scores}}}
    try:
        deviation_of_differences(arms, "a", "b")
    except ValueError:
        return
    pytest.fail(f"{HERE}: deviation_of_differences() of {shared} shared seeds should be a "
                "ValueError")


def simulated_power(n, difference, deviation, level):
    """How often eval.py's own test finds the difference in n normal seeds, of 600 tries."""
    rng = np.random.default_rng(0)
    tries = rng.normal(difference, deviation, (600, n))  # (600, n)
    return np.mean([sign_flip_p(row) <= level for row in tries])


@pytest.mark.parametrize("deviation", [2.5, 3.0, 3.4])
def test_so_many_seeds_find_3_points_in_four_runs_of_five_and_fewer_do_not(deviation):
    """Found by simulation, with the very test that gives the verdicts."""
    n = seeds_needed(3, deviation)
    assert isinstance(n, int), f"{HERE}: seeds_needed() should return a whole number, not {n!r}"
    assert 3 < n < 17, f"{HERE}: seeds_needed(3, {deviation}) is {n}"
    enough = simulated_power(n, 3, deviation, 0.05)
    fewer = simulated_power(n - 3, 3, deviation, 0.05)
    assert enough > 0.74, f"{HERE}: seeds_needed() is {n}, which finds 3 points in {enough:.0%}"
    assert fewer < 0.79, f"{HERE}: seeds_needed() is {n}, and {n - 3} would do: {fewer:.0%}"


@pytest.mark.parametrize("level, floor", [(0.05, 6), (0.05 / 4, 8), (0.001, 11)])
def test_no_difference_however_clear_can_be_shown_by_fewer_seeds_than_the_tests_floor(level, floor):
    n = seeds_needed(50, 0.1, level=level)
    assert n == floor, (
        f"{HERE}: seeds_needed() at level {level:g} is {n} for a difference that is plain to see; "
        f"the least n with 2 / 2^n <= level is {floor}")


@pytest.mark.parametrize("power, level, n", [(0.8, 0.05, 787), (0.95, 0.05, 1302),
                                             (0.8, 0.01, 1172)])
def test_more_power_and_a_smaller_level_cost_seeds(power, level, n):
    """The numbers are the formula's, from a table's z: 0.8416, 1.6449, 1.9600 and 2.5758."""
    found = seeds_needed(1, 10, power=power, level=level)
    assert found == pytest.approx(n, abs=1), (
        f"{HERE}: seeds_needed(1, 10) at power {power:g} and level {level:g} is {found}, not {n}")


def test_half_the_difference_costs_four_times_the_seeds():
    ratio = seeds_needed(0.5, 10) / seeds_needed(1, 10)
    assert ratio == pytest.approx(4, rel=0.02), f"{HERE}: seeds_needed() grows by {ratio:.2f}"


def main(run):
    """Print how many seeds each pair of arms of a run would need for 3 points."""
    comparison = json.loads(Path(run, "comparison.json").read_text(encoding="utf-8"))
    arms = list(comparison["arms"])
    for arm in arms[1:]:
        deviation = deviation_of_differences(comparison, arm, arms[0])
        print(f"{arm} against {arms[0]}: differences vary by {deviation:.1f} points from seed to "
              f"seed; {seeds_needed(3, deviation)} seeds would find 3 points")


if __name__ == "__main__":
    main(sys.argv[1])
