"""Bootstrap intervals and random halves: known spreads, and what doesn't move them."""

import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from evaluation.metrics.intervals import (
    bootstrap_interval,
    bootstrap_spread,
    random_halves,
    subsampling_interval,
    subsampling_spread,
)


def test_interval_covers_the_mean_of_normal_numbers():
    """As often as it says: 0.95, less about 0.01 at 40 numbers, with a standard error of 0.01 from 500 trials."""
    generator = torch.Generator().manual_seed(0)
    covered, widths = 0, []
    for trial in range(500):
        numbers = torch.randn(40, generator=generator).double()
        lower, upper = bootstrap_interval(lambda i, x=numbers: x[i].mean().item(), [40], num_resamples=100, seed=trial)
        covered += lower <= 0 <= upper
        widths.append(upper - lower)
    assert 0.91 < covered / 500 < 0.97
    assert sum(widths) / 500 == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.05)


def test_interval_by_hand():
    """Resamples 0, 1, 2, 7 of mean 2.5 around 10: places 1.25 and 3.75 (p·(n + 1)) among them hold 0.25 and 5.75."""
    results = iter([10.0, 7.0, 1.0, 0.0, 2.0])
    interval = bootstrap_interval(lambda i: next(results), [5], num_resamples=4, confidence=0.5)
    assert interval == pytest.approx((10 + 0.25 - 2.5, 10 + 5.75 - 2.5), abs=1e-12)


def test_resamples_are_independent_draws_with_replacement_of_every_set():
    calls = []
    bootstrap_interval(lambda *indices: calls.append(indices) or 0.0, [3, 50], num_resamples=200)
    assert [i.tolist() for i in calls[0]] == [list(range(3)), list(range(50))]
    assert len(calls) == 201
    small, large = (torch.stack(set_) for set_ in zip(*calls[1:], strict=True))  # (200, 3), (200, 50)
    assert small.unique().tolist() == [0, 1, 2]
    assert large.unique().tolist() == list(range(50))
    different = sum(len(row.unique()) for row in large) / (200 * 50)
    assert different == pytest.approx(1 - (1 - 1 / 50) ** 50, abs=0.01)


def test_subsamples_are_draws_without_replacement_of_a_share_of_every_set():
    calls = []
    subsampling_interval(lambda *indices: calls.append(indices) or 0.0, [3, 50], num_resamples=200)
    assert [i.tolist() for i in calls[0]] == [list(range(3)), list(range(50))]
    small, large = (torch.stack(set_) for set_ in zip(*calls[1:], strict=True))
    assert small.shape == (200, 2)
    assert large.shape == (200, 40)
    assert all(len(row.unique()) == len(row) for row in (*small, *large))
    assert small.unique().tolist() == [0, 1, 2]
    assert len({tuple(row.tolist()) for row in large}) == 200


def test_subsamples_show_the_spread_of_all_volumes():
    """That of a mean is known: 1.96 times the deviation over √N on both sides, for any share."""
    numbers = torch.randn(900, generator=torch.Generator().manual_seed(2)).double()
    sizes = set()

    def mean(i: torch.Tensor) -> float:
        sizes.add(len(i))
        return numbers[i].mean().item()

    for share, largest, drawn in ((0.8, 1000, 720), (0.5, 1000, 450), (0.8, 90, 90)):
        sizes.clear()
        lower, upper = subsampling_interval(mean, [900], num_resamples=1000, share=share, largest=largest)
        assert sizes == {900, drawn}
        assert upper - lower == pytest.approx(2 * 1.96 * numbers.std().item() / 30, rel=0.1)
        assert (lower + upper) / 2 == pytest.approx(numbers.mean().item(), abs=0.01)


def test_a_subsample_leaves_a_volume_out_of_every_set():
    sizes = []
    subsampling_interval(lambda i, j: sizes.append((len(i), len(j))) or 0.0, [3, 10], share=0.99)
    assert set(sizes[1:]) == {(2, 9)}


def test_subsampling_needs_three_volumes():
    with pytest.raises(UserError, match=r"at least 3 volumes, got \[5, 2\]"):
        subsampling_interval(lambda *i: 0.0, [5, 2])


def test_repeated_volumes_do_not_move_the_interval():
    """The share of different volumes is 1 for all of them and about 0.64 in resamples."""
    lower, upper = bootstrap_interval(lambda i: len(i.unique()) / 30, [30])
    assert lower < 1 < upper
    assert upper - lower < 0.3


def test_interval_depends_on_its_seed_alone():
    numbers = torch.randn(20, generator=torch.Generator().manual_seed(1))

    def interval(seed: int) -> tuple[float, float]:
        return bootstrap_interval(lambda i: numbers[i].mean().item(), [20], num_resamples=20, seed=seed)

    state = torch.get_rng_state()
    first = interval(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert interval(0) == first
    assert interval(1) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [5, 1]}, r"sets of at least 2 volumes, got \[5, 1\]"),
        ({"sizes": []}, "sets of at least 2 volumes"),
        ({"num_resamples": 1}, "at least 2 resamples, got 1"),
        ({"confidence": 1.0}, "lies between 0 and 1, got 1.0"),
        ({"confidence": 0.0}, "lies between 0 and 1, got 0.0"),
        ({"statistic": lambda i: math.inf}, "got inf for all volumes"),
        (
            {"statistic": lambda i: math.nan if i[0] == i[1] else 0.0, "sizes": [2], "seed": 0, "num_resamples": 100},
            r"not finite for \d\d of 100 resamples of \[2\] volumes",
        ),
    ],
)
def test_interval_refuses(options, message):
    with pytest.raises(UserError, match=message):
        bootstrap_interval(**{"statistic": lambda i: 0.0, "sizes": [5], **options})


def test_random_halves_are_disjoint_and_random():
    pairs = list(random_halves(9, 4, 50, seed=3))
    assert len(pairs) == 50
    seen = torch.zeros(9)
    for one, other in pairs:
        assert len(one) == len(other) == 4
        assert len(torch.cat([one, other]).unique()) == 8
        seen[one] += 1
    assert seen.min() > 10  # 22 expected
    assert len({tuple(one.tolist()) for one, _ in pairs}) > 40
    again = list(random_halves(9, 4, 50, seed=3))
    assert all(
        torch.equal(a, b) for pair, other in zip(pairs, again, strict=True) for a, b in zip(pair, other, strict=True)
    )
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(pairs, random_halves(9, 4, 50, seed=4), strict=True))


@pytest.mark.parametrize(("count", "half"), [(7, 4), (5, 0)])
def test_random_halves_refuse_before_the_first(count, half):
    with pytest.raises(UserError, match=f"two disjoint sets of {half} volumes each can't be drawn from {count}"):
        random_halves(count, half, 3)


@pytest.mark.parametrize(
    ("spread", "interval"), [(bootstrap_spread, bootstrap_interval), (subsampling_spread, subsampling_interval)]
)
def test_intervals_are_percentiles_of_the_spread(spread, interval):
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    found = spread(lambda chosen: values[chosen].mean().item(), [30], num_resamples=99, seed=1)
    assert found.mean() == pytest.approx(values.mean().item())
    of_interval = interval(lambda chosen: values[chosen].mean().item(), [30], num_resamples=99, seed=1)
    assert np.quantile(found, [0.025, 0.975], method="weibull") == pytest.approx(of_interval)
    # The same resamples for another statistic: differences can be taken one by one
    shifted = spread(lambda chosen: values[chosen].mean().item() + 3, [30], num_resamples=99, seed=1)
    np.testing.assert_allclose(shifted - found, 3)
