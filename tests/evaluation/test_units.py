"""Subjects with several volumes: what is resampled, halved and paired, and what intervals come to."""

from collections import Counter

import pytest
import torch
from evaluation_sets import own

from evaluation.autoencoding.measures import COUNTS, VOLUME_METRICS, summarise
from evaluation.comparison.figures import (
    Sampling,
    _halvings,
    distance_figures,
    diversity_figures,
    manifold_figures,
    memorisation_figures,
    memorisation_of,
)
from evaluation.comparison.pairs import PairScores, choose_pairs
from evaluation.metrics.distances import mmd_from_kernels, rbf_kernel
from evaluation.metrics.intervals import bootstrap_interval
from evaluation.metrics.manifolds import precision_recall_density_coverage
from evaluation.metrics.units import Units, by_subject, interval_of_enough

SAMPLING = Sampling(num_resamples=40, num_halvings=8, seed=0)
THREE_OF_TWO = Units.of(["a", "b", "a", "c", "b", "c"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_chosen_subject_brings_all_of_its_volumes():
    assert THREE_OF_TWO.volumes([torch.tensor([1, 1, 0])]).tolist() == [1, 4, 1, 4, 0, 2]
    assert (len(THREE_OF_TWO), THREE_OF_TWO.num_subjects) == (6, 3)
    assert THREE_OF_TWO.count("real") == {"real": 6, "real subjects": 3}
    assert Units.own(6).count("real") == {"real": 6}
    assert (THREE_OF_TWO.said("real"), Units.own(6).said()) == ("6 real volumes of 3 subjects", "6 volumes")


def test_volumes_of_nobody_else_are_drawn_as_they_are():
    units = Units.own(4, 3)
    assert units.volumes([torch.tensor([3, 0]), torch.tensor([2, 2])]).tolist() == [3, 0, 6, 6]
    assert units.shared is None
    assert units[torch.tensor([1, 3, 5])].volumes([torch.tensor([0, 1]), torch.tensor([0])]).tolist() == [0, 1, 2]


def test_a_subject_of_two_classes_is_one():
    """Those with both are drawn by themselves; the two with one alone, too few for that, among them."""
    units = Units.of(["a", "b", "c", "d", "x"], ["a", "b", "c", "d", "y"], [None, None, None])
    assert [len(stratum) for stratum in units.strata] == [6, 3]
    assert sorted(units.volumes([torch.arange(6), torch.arange(3)]).tolist()) == list(range(13))
    assert units.volumes([torch.tensor([0]), torch.arange(0)]).tolist() == [0, 5]
    assert [len(stratum) for stratum in Units.of("abcdefg", "abcxyz").strata] == [3, 4, 3]


@pytest.mark.parametrize(
    ("classes", "fewest"), [(["aabbcc"], 3), (["aabb"], 2), (["abc", "ab"], 2), (["abcd", "xyz"], 3), (["aa", "ab"], 1)]
)
def test_subjects_are_what_there_must_be_three_of(classes, fewest):
    units = Units.of(*classes)
    assert units.fewest == fewest
    interval = interval_of_enough(lambda i: float(len(i)), [units])
    assert (interval == "n too small") == (fewest < 3)


def test_the_interval_of_repeated_volumes_is_that_of_the_subjects():
    """Every volume four times: nothing more is known."""
    numbers = normal(12)
    mean = lambda x: lambda i: x[i].mean().item()  # noqa: E731
    repeated = Units.of([i // 4 for i in range(48)])
    found = interval_of_enough(mean(numbers.repeat_interleave(4)), [repeated])
    assert found == pytest.approx(bootstrap_interval(mean(numbers), [12]))
    assert by_subject(len, [repeated])[1] == [12]


def test_halves_have_no_subject_twice_and_equal_numbers_of_each_class():
    units = Units.of("aabbbccdefgg", "abcdwwxxyz", [None] * 5)
    names = [*"aabbbccdefgg", *"abcdwwxxyz", *range(5)]
    drawn = list(units.halvings([9, 9, 1], 30, 0))
    assert len({tuple(a.tolist()) for a, _ in drawn}) > 5
    for a, b in drawn:
        subjects = [names[i] for i in (*a.tolist(), *b.tolist())]
        assert len(set(subjects)) == len(subjects)
        # Of e f g one each, of w x y z two, of a b c d two, the first of class 0 and the second of 1, of the last one.
        assert [Counter(units.classes[half].tolist()) for half in (a, b)] == [{0: 2, 1: 3, 2: 1}] * 2
    parts = [part for *_, part in _halvings((units, Units.own(9, 9, 1)), SAMPLING)]
    assert {tuple(Counter((part > 8).int().add(part > 17).tolist()).items()) for part in parts} == {
        ((0, 2), (1, 3), (2, 1))
    }
    assert {i for a, _ in drawn for i in a.tolist()} >= {0, 1, 2, 3, 4}  # any scan of a subject


def test_pairs_are_of_two_subjects():
    units = Units.of([i // 4 for i in range(40)])
    for num in (5, 30, 1000):
        pairs = choose_pairs(units, num, 0)
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == min(num, 720)
        assert (units.subjects[pairs[:, 0]] != units.subjects[pairs[:, 1]]).all()
        scores = PairScores(pairs, torch.ones(len(pairs), dtype=torch.float64), units)
        assert (scores.are_independent, scores.num_units) == ((True, 5) if num == 5 else (False, 10))
    by_other_scans = PairScores(torch.tensor([[0, 4], [1, 8]]), torch.ones(2).double(), units)
    assert (by_other_scans.are_independent, by_other_scans.num_units) == (False, 10)


def test_intervals_of_pairs_are_over_subjects():
    """What is odd about a subject is odd in all of its pairs: by volumes the interval would be half as wide."""
    units = Units.of([i // 4 for i in range(40)])
    pairs = choose_pairs(units, 1000, 0)
    scores = 0.5 + 0.02 * normal(10)[units.subjects[pairs]].sum(1).double()
    alone, minded = (
        diversity_figures("CT", *[PairScores(pairs, scores, of)] * 2, SAMPLING)[1] for of in (Units.own(40), units)
    )
    assert alone.value == minded.value
    assert minded.num == {"real": 40, "real subjects": 10, "pairs": 720}
    assert minded.interval[1] - minded.interval[0] > 1.5 * (alone.interval[1] - alone.interval[0])


def test_kernels_of_one_subject_do_not_count():
    x, y = normal(6, 3), normal(4, 3, seed=1)
    kernels = [rbf_kernel(a, b, 1.0) for a, b in ((x, x), (y, y), (x, y))]
    of_x = [
        kernels[0][i, j] for i in range(6) for j in range(6) if THREE_OF_TWO.subjects[i] != THREE_OF_TWO.subjects[j]
    ]
    of_y = [kernels[1][i, j] for i in range(4) for j in range(4) if i != j]
    expected = sum(of_x) / len(of_x) + sum(of_y) / len(of_y) - 2 * kernels[2].mean()
    assert mmd_from_kernels(*kernels, subjects=(THREE_OF_TWO.subjects, None)) == pytest.approx(expected.item())
    (_, mmd) = distance_figures("CT", "n", {"v": x[:, None]}, {"v": y[:, None]}, (THREE_OF_TWO, Units.own(4)), SAMPLING)
    ignored = distance_figures("CT", "n", {"v": x[:, None]}, {"v": y[:, None]}, own((6,), (4,)), SAMPLING)[1]
    assert mmd.value != ignored.value
    assert mmd.num == {"real": 6, "real subjects": 3, "generated": 4}
    assert (mmd.floor, ignored.floor.num) == (None, 3)  # a volume each is no set


def test_neighbours_are_of_another_subject():
    """Real balls: 0 and 1 of one subject end at 4, 4 at 1; at the nearest other volume they would end at 1 and 0."""
    real, generated = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[2.5], [3.5]])
    minded = precision_recall_density_coverage(real, generated, 1, (torch.tensor([0, 0, 1]), None))
    assert minded["density"].tolist() == [3.0, 3.0]
    assert precision_recall_density_coverage(real, generated, 1)["density"].tolist() == [1.0, 1.0]


def test_figures_of_scans_that_are_copies_are_those_of_subjects():
    """Intervals as wide, shares as uncertain, floors the same."""
    x, y, training = normal(15, 4), normal(30, 4, seed=1), normal(20, 4, seed=2)
    copies = x.repeat_interleave(3, dim=0), (Units.of([i // 3 for i in range(45)]), Units.own(30))
    once = x, own((15,), (30,))
    for figures in (
        lambda x, units: distance_figures("CT", "n", {"v": x[:, None]}, {"v": y[:, None]}, units, SAMPLING)[1:],
        lambda x, units: memorisation_figures("CT", "n", memorisation_of(x, y, training, units), 20, SAMPLING),
        # Shares of 1 and 0 in all resamples.
        lambda x, units: memorisation_figures("CT", "n", memorisation_of(x, y, y, units), 20, SAMPLING)[:1],
        lambda x, units: manifold_figures("CT", "n", x, y + 99, 2, units, SAMPLING)[1:2],
    ):
        for of_copies, of_once in zip(figures(*copies), figures(*once), strict=True):
            width, expected = (high - low for low, high in (of_copies.interval, of_once.interval))
            assert width == pytest.approx(expected, rel=0.02), of_once.metric
            assert of_copies.num["real subjects"] == of_once.num["real"] == 15
            if of_once.floor:
                assert of_copies.floor.num == of_once.floor.num == 7
            if of_once.metric == "MMD":  # whose bandwidth is that of all pairs
                assert of_copies.value == pytest.approx(of_once.value, rel=0.2)
            elif of_once.floor:
                assert of_copies.floor == of_once.floor


def test_reconstruction_resamples_subjects():
    """Scans of one subject that are equal: twelve of three tell as much as three."""
    values = [20.0, 25.0, 33.0]
    arrays = [dict.fromkeys(VOLUME_METRICS, torch.tensor(value).numpy()) | {COUNTS: [1, 2]} for value in values]
    repeated = [array for array in arrays for _ in range(4)]
    once, minded = (
        summarise("CT", {"A": of}, units, 100, 0)[0][0]
        for of, units in ((arrays, Units.own(3)), (repeated, Units.of("aaaabbbbcccc")))
    )
    assert (minded.value, minded.interval) == (pytest.approx(once.value), pytest.approx(once.interval))
    assert (once.num, minded.num) == ({"volumes": 3}, {"volumes": 12, "subjects": 3})
    few = summarise("CT", {"A": repeated[:8]}, Units.of("aaaabbbb"), 100, 0)[0][0]
    assert (few.interval, few.no_interval) == (None, "n too small")
