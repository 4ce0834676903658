"""Figures from features: values by the pure metrics, intervals and floors within classes, warnings."""

from statistics import fmean

import pytest
import torch
from evaluation_sets import own

from evaluation.comparison.figures import (
    Memorisation,
    Sampling,
    _halvings,
    distance_figures,
    diversity_figures,
    manifold_figures,
    memorisation_figures,
    memorisation_of,
    mmd_statistics,
)
from evaluation.comparison.pairs import PairScores, choose_pairs
from evaluation.comparison.warnings import (
    distance_warnings,
    diversity_warning,
    memorisation_warnings,
)
from evaluation.metrics.distances import frechet_distance, median_bandwidth, mmd_rbf
from evaluation.metrics.intervals import bootstrap_interval
from evaluation.metrics.manifolds import precision_recall_density_coverage
from evaluation.metrics.units import Units
from evaluation.results.results import Figure

SAMPLING = Sampling(num_resamples=40, num_halvings=3, seed=0)


def features(count: int, mean: float = 0.0, seed: int = 0, slices: int = 1, width: int = 3) -> torch.Tensor:
    return mean + torch.randn(count, slices, width, generator=torch.Generator().manual_seed(seed))


def test_distances_of_volumes():
    real, generated = features(20), features(12, 1.0, seed=1)
    fid, mmd = distance_figures("CT", "net", {"volume": real}, {"volume": generated}, own((20,), (12,)), SAMPLING)
    x, y = real[:, 0], generated[:, 0]
    assert (fid.metric, fid.value) == ("FID-3D", frechet_distance(x, y))
    assert (mmd.metric, mmd.value) == ("MMD", pytest.approx(mmd_rbf(x, y, bandwidth=median_bandwidth(x[:10], x[10:]))))
    for figure in (fid, mmd):
        assert (figure.group, figure.network, figure.better) == ("CT", "net", "lower")
        assert figure.num == {"real": 20, "generated": 12}
        assert figure.interval[0] < figure.value < figure.interval[1]
        assert figure.floor.num == 10
        assert figure.floor.value < figure.floor.comparable  # 1 off is farther than two halves of one set
    assert abs(fid.floor.comparable - fid.value) < fid.value


def test_distances_of_slices_take_all_slices_of_a_set_and_the_mean_of_the_planes():
    real = {plane: features(6, seed=i, slices=4) for i, plane in enumerate(("axial", "coronal", "sagittal"))}
    generated = {plane: features(5, 0.3, seed=7 + i, slices=4) for i, plane in enumerate(real)}
    figures = distance_figures("CT", "net", real, generated, own((6,), (5,)), SAMPLING)
    found = {figure.metric: figure for figure in figures}
    assert list(found) == ["FID-2.5D", "FID-2.5D axial", "FID-2.5D coronal", "FID-2.5D sagittal"]
    for plane in real:
        expected = frechet_distance(real[plane].flatten(0, 1), generated[plane].flatten(0, 1))
        assert found[f"FID-2.5D {plane}"].value == pytest.approx(expected)
    mean = fmean(found[f"FID-2.5D {plane}"].value for plane in real)
    assert found["FID-2.5D"].value == pytest.approx(mean)
    assert found["FID-2.5D"].num == {"real": 6, "generated": 5, "slices of each": 12}
    assert found["FID-2.5D axial"].num["slices of each"] == 4
    assert found["FID-2.5D"].floor.num == 3
    assert len({figure.floor.value for figure in figures}) == 4


def test_the_order_of_volumes_changes_nothing():
    x, y = features(20), features(12, 0.5, seed=1)
    shuffled = y[torch.randperm(12, generator=torch.Generator().manual_seed(4))]
    before, after = (
        [f.value for f in distance_figures("CT", "net", {"volume": x}, {"volume": z}, own((20,), (12,)), SAMPLING)]
        for z in (y, shuffled)
    )
    assert before == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize(
    ("sizes", "has_interval"), [((6, 6), True), ((5, 6), False), ((4, 4, 4, 4), True), ((2, 9, 2, 9), False)]
)
def test_resamples_too_small_for_the_neighbours_give_no_interval(sizes, has_interval):
    """Of six volumes a resample has five, of five four: four neighbours need five volumes."""
    half = len(sizes) // 2
    units = own(sizes[:half], sizes[half:])
    real, generated = (features(count, seed=i)[:, 0] for i, count in enumerate(map(len, units)))
    figures = manifold_figures("CT", "net", real, generated, 4, units, SAMPLING)
    assert [figure.interval is not None for figure in figures] == [has_interval] * 4


def test_distances_are_not_negative_nor_are_their_intervals():
    x = features(20)
    fid, mmd = distance_figures("CT", "net", {"volume": x}, {"volume": x}, own((20,), (20,)), SAMPLING)
    assert fid.interval[0] == 0 <= fid.value < 1e-9
    assert mmd.interval[0] < 0


def test_one_kernel_gives_the_distances_of_parts():
    x, y = features(9)[:, 0], features(7, 1.0, seed=1)[:, 0]
    with_generated, with_real = mmd_statistics(x, y, own((9,), (7,)))
    a, b, c = torch.tensor([0, 3, 5]), torch.tensor([1, 2]), torch.tensor([4, 6, 7, 8])
    bandwidth = median_bandwidth(x[:4], x[4:])
    assert with_generated(a, b) == pytest.approx(mmd_rbf(x[a], y[b], bandwidth=bandwidth))
    assert with_real(a, c) == pytest.approx(mmd_rbf(x[a], x[c], bandwidth=bandwidth))


def test_halvings_keep_the_classes():
    drawn = list(_halvings(own((7, 1, 4), (2, 5, 9)), SAMPLING))
    assert len(drawn) == 3
    assert len({tuple(a.tolist()) for a, _, _ in drawn}) > 1
    for a, b, part in drawn:
        assert [sum((low <= x) & (x < high) for x in a) for low, high in ((0, 7), (7, 8), (8, 12))] == [2, 0, 2]
        assert not set(a.tolist()) & set(b.tolist())
        assert len(set(part.tolist())) == len(a) == len(b) == 4
        assert [sum((low <= x) & (x < high) for x in part) for low, high in ((0, 2), (2, 7), (7, 16))] == [2, 0, 2]


@pytest.mark.parametrize("planes", [["volume"], ["axial", "coronal"]])
def test_floors_are_means_over_halvings(planes):
    """Of four volumes there are few halvings, so that the same indices come again for other sets."""
    real = {plane: features(4, seed=i, slices=3) for i, plane in enumerate(planes)}
    generated = {plane: features(4, 1.0, seed=5 + i, slices=3) for i, plane in enumerate(planes)}
    sampling = Sampling(num_resamples=20, num_halvings=30, seed=1)
    units = own((4,), (4,))
    figure = distance_figures("CT", "net", real, generated, units, sampling)[0]

    def distance(x, a, y, b):
        return fmean(frechet_distance(x[p][a].flatten(0, 1), y[p][b].flatten(0, 1)) for p in planes)

    drawn = list(_halvings(units, sampling))
    assert figure.floor.value == pytest.approx(fmean(distance(real, a, real, b) for a, b, _ in drawn))
    assert figure.floor.comparable == pytest.approx(fmean(distance(real, b, generated, part) for _, b, part in drawn))
    assert figure.floor.num == 2


def test_resamples_keep_the_classes():
    """Two classes far apart: with their numbers kept, the distance of a set to itself hardly varies."""
    x = torch.cat([features(8), features(8, 100.0, seed=1)])
    kept, mixed = (
        distance_figures("all", "net", {"volume": x}, {"volume": x}, units, SAMPLING)[0].interval
        for units in (own((8, 8), (8, 8)), own((16,), (16,)))
    )
    assert kept[1] - kept[0] < 0.1 * (mixed[1] - mixed[0])


def test_a_real_set_that_can_not_be_halved_has_no_floor():
    figures = distance_figures("CT", "net", {"volume": features(3)}, {"volume": features(5)}, own((3,), (5,)), SAMPLING)
    assert [figure.floor for figure in figures] == [None, None]


def test_manifold_figures_are_means_over_volumes():
    real, generated = features(20)[:, 0], features(12, 1.0, seed=1)[:, 0]
    figures = manifold_figures("CT", "net", real, generated, 3, own((20,), (12,)), SAMPLING)
    expected = precision_recall_density_coverage(real, generated, 3)
    assert {figure.metric: figure.value for figure in figures} == pytest.approx(
        {name: values.mean().item() for name, values in expected.items()}
    )
    for figure in figures:
        assert figure.num == {"real": 20, "generated": 12, "neighbours": 3}
        assert figure.floor.num == 10
        assert figure.interval[0] <= figure.value <= figure.interval[1]
    precision = figures[0]
    assert precision.floor.value > precision.floor.comparable
    assert precision.interval[1] - precision.interval[0] > 0.1
    few = manifold_figures("CT", "net", real[:7], generated, 3, own((7,), (12,)), SAMPLING)
    assert [figure.floor for figure in few] == [None] * 4


# Diversity ----------------------------------------------------------------------------------------------------------


def scores_of(count: int, value: float, spread: float = 0.0, seed: int = 0) -> PairScores:
    pairs = choose_pairs(Units.own(count), 1000, 0)
    noise = torch.randn(len(pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return PairScores(pairs, value + spread * noise, Units.own(count))


def test_diversity_gap():
    made, of_real, gap = diversity_figures("CT", scores_of(8, 0.5, 0.05), scores_of(6, 0.9, 0.02, seed=1), SAMPLING)
    assert (made.metric, of_real.metric) == ("MS-SSIM of generated pairs", "MS-SSIM of real pairs")
    assert gap.value == pytest.approx(made.value - of_real.value)
    assert gap.value == pytest.approx(0.4, abs=0.03)
    assert (made.num, of_real.num) == ({"generated": 6, "pairs": 15}, {"real": 8, "pairs": 28})
    for figure in (made, of_real, gap):
        assert figure.interval[0] < figure.value < figure.interval[1]
    assert "collapsed" in diversity_warning("CT", gap)[0]
    real, generated = scores_of(8, 0.5, 0.05), scores_of(6, 0.9, 0.02, seed=1)
    expected = bootstrap_interval(lambda a, b: generated.mean_of(a) - real.mean_of(b), [6, 8], num_resamples=40)
    assert gap.interval == pytest.approx(expected)


def test_sets_of_equal_variety_give_no_warning():
    gap = diversity_figures("CT", scores_of(8, 0.5, 0.05), scores_of(8, 0.5, 0.05, seed=1), SAMPLING)[-1]
    assert gap.interval[0] < 0 < gap.interval[1]
    assert diversity_warning("CT", gap) == []


def test_intervals_of_pairs_are_over_volumes():
    """One odd volume is in seven of 28 pairs: resampling pairs would hide how much hangs on it."""
    pairs = choose_pairs(Units.own(8), 1000, 0)
    scores = torch.where((pairs == 0).any(1), 0.0, 1.0).double()
    found = PairScores(pairs, scores, Units.own(8))
    figure = diversity_figures("CT", found, found, SAMPLING)[0]
    assert figure.interval[1] - figure.interval[0] > 4 * 0.433 / 28**0.5  # the width if pairs were independent


def test_a_resample_of_pairs_has_the_pairs_of_its_volumes():
    """Every pair of two different volumes that are in it, as often as they are."""
    found = scores_of(5, 0.5, 0.3)
    table = torch.zeros(5, 5, dtype=torch.float64)
    table[found.pairs[:, 0], found.pairs[:, 1]] = found.scores
    table += table.T.clone()

    def mean_of_pairs(chosen: torch.Tensor) -> float:
        pairs = [(i, j) for n, i in enumerate(chosen.tolist()) for j in chosen.tolist()[:n] if i != j]
        return fmean(table[i, j].item() for i, j in pairs)

    expected = bootstrap_interval(mean_of_pairs, [5], num_resamples=40)
    assert diversity_figures("CT", found, found, SAMPLING)[0].interval == pytest.approx(expected)


def test_pairs_that_share_no_volume_are_resampled_themselves():
    pairs = choose_pairs(Units.own(40), 20, 0)
    assert sorted(pairs.flatten().tolist()) == list(range(40))
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = PairScores(pairs, scores, Units.own(40))
    expected = bootstrap_interval(lambda chosen: scores[chosen].mean().item(), [20], num_resamples=40)
    assert diversity_figures("CT", found, found, SAMPLING)[1].interval == pytest.approx(expected)


@pytest.mark.parametrize(
    ("count", "num", "expected"), [(4, 10, 6), (4, 6, 6), (30, 20, 20), (40, 20, 20), (8, 26, 26), (2, 5, 1)]
)
def test_pairs_are_different_ones(count, num, expected):
    pairs = choose_pairs(Units.own(count), num, 0)
    assert pairs.shape == (expected, 2)
    assert len({tuple(pair) for pair in pairs.tolist()}) == expected
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert pairs.max() < count
    if expected == num and count > 4:
        assert choose_pairs(Units.own(count), num, 1).tolist() != pairs.tolist()
        assert choose_pairs(Units.own(count), num, 0).tolist() == pairs.tolist()


# Memorisation -------------------------------------------------------------------------------------------------------


def test_memorisation_by_hand():
    training = torch.tensor([[0.0], [10.0]])
    sets = torch.tensor([[3.0], [12.0], [6.0]]), torch.tensor([[10.5], [2.0]])
    found = memorisation_of(*sets, training, own((3,), (2,)))
    assert found.generated.tolist() == [0.5, 2.0]
    assert found.nearest.tolist() == [1, 0]
    assert found.held_out.tolist() == [3.0, 2.0, 4.0]
    nearer, ratio = memorisation_figures("CT", "net", found, 2, SAMPLING)
    assert nearer.value == pytest.approx((3 + 2.5) / 6)  # 2.0 against 2.0 counts half
    assert ratio.value == pytest.approx(1.25 / 3)  # medians
    assert nearer.num == {"generated": 2, "real": 3, "training": 2}


def warnings_of(generated, held_out):
    units = own((len(held_out),), (len(generated),))
    found = Memorisation(generated, held_out, torch.zeros(len(generated), dtype=torch.long), units)
    return memorisation_warnings("CT", "net", found, memorisation_figures("CT", "net", found, 9, SAMPLING))


def test_copies_and_what_lies_too_near_are_noticed():
    usual = torch.linspace(1.0, 2.0, 20)
    assert warnings_of(usual + 0.1, usual) == []
    some = warnings_of(torch.cat([torch.tensor([0.0, 0.4]), usual]), usual)
    assert len(some) == 1
    assert "2 of 22 generated volumes are copies" in some[0]
    assert warnings_of(0.7 * usual[:4], usual) == []  # too few to say so
    near = warnings_of(0.7 * usual, usual)
    assert len(near) == 1
    assert "lie nearer to training volumes" in near[0]
    assert len(warnings_of(torch.zeros(5), usual)) == 2


def figure(value: float, *interval: float) -> Figure:
    return Figure("CT", "x", value, interval, {}, "real")


@pytest.mark.parametrize(
    ("gap", "num_warnings"), [(figure(0.2, 0.06, 0.3), 1), (figure(0.2, 0.04, 0.3), 0), (figure(-0.2, -0.3, -0.1), 0)]
)
def test_a_gap_is_warned_of_where_its_interval_says_so(gap, num_warnings):
    assert len(diversity_warning("CT", gap)) == num_warnings


@pytest.mark.parametrize(
    ("nearer", "ratio", "num_warnings"),
    [
        (figure(0.7, 0.6, 0.8), figure(0.8, 0.7, 0.9), 1),
        (figure(0.7, 0.4, 0.8), figure(0.8, 0.7, 0.9), 0),
        (figure(0.7, 0.6, 0.8), figure(0.8, 0.7, 1.1), 0),
    ],
)
def test_nearness_is_warned_of_where_both_intervals_say_so(nearer, ratio, num_warnings):
    found = Memorisation(torch.ones(5), torch.ones(5), torch.zeros(5, dtype=torch.long), own((5,), (5,)))
    assert len(memorisation_warnings("CT", "net", found, [nearer, ratio])) == num_warnings


def test_held_out_volumes_that_were_trained_on_are_noticed():
    held_out = torch.tensor([0.0, 0.0, 1.0])
    (first, *others) = warnings_of(torch.tensor([0.0, 0.6]), held_out)
    assert "2 of 3 real volumes are training volumes" in first
    assert not any("copies" in other for other in others)


def test_there_is_no_ratio_to_real_volumes_that_were_trained_on():
    found = Memorisation(torch.ones(3), torch.arange(3.0), torch.zeros(3, dtype=torch.long), own((3,), (3,)))
    nearer, ratio = memorisation_figures("CT", "net", found, 3, SAMPLING)
    assert nearer.value == pytest.approx(0.5)  # one of three nearer, one as near: (1 + 0.5) / 3
    assert ratio.value != ratio.value
    assert ratio.interval is None


def test_too_few_volumes_for_the_features_are_noticed():
    enough, few = {"volume": features(4)}, {"volume": features(3)}
    assert distance_warnings("CT", "net", enough, enough) == []
    (warning,) = distance_warnings("CT", "net", enough, few)
    assert "3 generated volumes are too few for the 3 features of net" in warning
    planes = {plane: features(2, slices=4) for plane in ("axial", "coronal")}
    assert distance_warnings("CT", "net", planes, planes) == []
    (warning,) = distance_warnings("CT", "net", {p: x[:, :1] for p, x in planes.items()}, planes)
    assert "2 real slices" in warning
