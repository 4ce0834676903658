"""Verdicts of recipe studies on made-up figures, whose truth is known."""

import numpy as np
import pytest

from evaluation.study.statistics import (
    Estimate,
    Measured,
    difference,
    estimate,
    judged_difference,
    to_figures,
    to_record,
    verdict,
)

FLAT = np.zeros(50)


def runs(*values: float, held_out=FLAT, generated=None) -> list[Measured]:
    return [Measured(value, value + held_out, generated) for value in values]


def simulated(rng, num_seeds: int, mean: float = 0.0, spread: float = 1.0) -> list[Measured]:
    """Runs of a variant: seeds differ with `spread`, and the held-out volumes give all of them one error."""
    values = mean + 0.15 * rng.standard_normal() + spread * rng.standard_normal(num_seeds)
    return runs(*values, held_out=0.15 * rng.standard_normal(50))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_equal_recipes_are_rarely_called_different(num_seeds, spread):
    """In at most one of 20 cases or so, whether seeds (spread 1) or held-out volumes (0.02) decide."""
    rng = np.random.default_rng(0)
    said = []
    for _ in range(1500):
        pair = [simulated(rng, num_seeds, spread=spread) for _ in range(2)]
        said.append(verdict("lower", None, *pair))
    called = 1 - said.count("–") / len(said)
    assert called <= 0.065  # 0.05 and two standard errors
    if num_seeds > 2:
        assert called > 0.005  # not by intervals that are far too wide
        assert abs(said.count("better") - said.count("worse")) < 60


def test_a_real_difference_is_found():
    rng = np.random.default_rng(0)
    said = []
    for _ in range(300):
        said.append(verdict("lower", None, simulated(rng, 4, mean=4), simulated(rng, 4)))
    assert said.count("worse") > 270
    assert "better" not in said


@pytest.mark.parametrize(
    ("better", "target", "value", "expected"),
    [
        ("lower", None, -1.0, "better"),
        ("lower", None, 1.0, "worse"),
        ("higher", None, 1.0, "better"),
        ("higher", None, -1.0, "worse"),
        ("higher", None, 0.0, "–"),
        ("real", 1.0, 0.9, "better"),  # the baseline is at 0
        ("real", 1.0, 1.9, "better"),
        ("real", 1.0, 3.0, "worse"),
        ("real", 1.0, 2.0, "–"),
    ],
)
def test_what_is_better(better, target, value, expected):
    others = runs(0.01, -0.01, 0.0)
    assert verdict(better, target, runs(value + 0.01, value - 0.01, value), others) == expected


def test_one_seed_gives_no_verdict_but_an_interval_over_volumes():
    generated = np.tile([-1.0, 1.0], 25)
    one = runs(5.0, held_out=2 * generated, generated=generated)
    sd = np.std(generated, ddof=1)
    assert estimate(one).half == pytest.approx(1.959964 * np.hypot(sd, 2 * sd))
    assert verdict("lower", None, one, runs(100.0, generated=generated)) == "–"
    assert verdict("lower", None, runs(5.0, 5.1), runs(100.0)) == "–"


def test_the_interval_of_several_seeds_is_students():
    assert estimate(runs(1.0, 2.0, 3.0)).half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    of_equal_spreads = difference(runs(1.0, 2.0, 3.0), runs(11.0, 12.0, 13.0))  # 4 degrees of freedom
    assert of_equal_spreads.value == pytest.approx(-10)
    assert of_equal_spreads.half == pytest.approx(2.776445 * (2 / 3) ** 0.5, rel=1e-6)


def test_what_held_out_volumes_do_to_both_cancels():
    held_out = np.random.default_rng(0).standard_normal(50)
    same = [runs(1.0, 1.0, held_out=held_out), runs(2.0, 2.0, held_out=held_out)]
    assert difference(*same).half == pytest.approx(0)
    assert difference(same[0], runs(2.0, 2.0, held_out=-held_out)).half > 3
    assert estimate(same[0]).half == pytest.approx(1.959964 * held_out.std(ddof=1))


def test_runs_that_are_alike_by_chance_are_no_certainty():
    """Shares of few volumes: the same in all seeds, though each would differ with other generated volumes."""
    generated = np.random.default_rng(0).normal(0.1, 0.1, 50)
    some = runs(0.1, 0.1, 0.1, generated=generated)
    assert verdict("higher", None, some, runs(0.0, 0.0, 0.0, generated=FLAT)) == "–"
    assert judged_difference("higher", None, some, runs(0.0, 0.0, 0.0, generated=FLAT)).half > 0.1


def test_an_interval_that_touches_zero_says_nothing():
    assert [Estimate(1.0, half).sign for half in (0.5, 1.0, 1.5)] == [1, 0, 0]
    assert [Estimate(-1.0, half).sign for half in (0.5, 1.0)] == [-1, 0]


def test_figures_come_back_from_json():
    figures = {"a": Measured(1.5, np.array([1.0, 2.0])), "b": Measured(0.1, FLAT, FLAT + 1)}
    found = to_figures(to_record(figures))
    assert found["a"].value == 1.5
    assert found["a"].generated is None
    np.testing.assert_array_equal(found["a"].held_out, [1.0, 2.0])
    np.testing.assert_array_equal(found["b"].generated, FLAT + 1)
