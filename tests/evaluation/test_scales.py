"""How figures are read: directions, bounds of their intervals, and where there is no interval."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from evaluation_sets import own

from dataset.volumes.pictures import PLANES
from evaluation.autoencoding.measures import COUNTS, METRICS, VOLUME_METRICS, summarise
from evaluation.comparison.definitions import DEFINITIONS
from evaluation.comparison.figures import (
    Memorisation,
    Sampling,
    diversity_figures,
    manifold_figures,
    memorisation_figures,
)
from evaluation.comparison.pairs import PairScores, choose_pairs
from evaluation.comparison.warnings import diversity_warning, noise_warning
from evaluation.controlled.paired import DEFINITIONS as OF_PAIRS
from evaluation.controlled.paired import RESIDUAL
from evaluation.metrics.intervals import share_interval
from evaluation.metrics.units import Units
from evaluation.report_page.content import Making, Part
from evaluation.report_page.page import page
from evaluation.results.results import Results
from evaluation.results.scales import SCALES, make_figure

SAMPLING = Sampling(num_resamples=40, num_halvings=2, seed=0)
TWO_SIDED = {
    "seam index ratio": "ratio 1",
    "density": "value 1",
    "MS-SSIM of generated pairs": "that of real pairs",
    "MS-SSIM of real pairs": "what the generated are compared with",
    "diversity gap": "difference 0",
    "nearer than held-out": "probability 0.5",
    "nearest distance ratio": "ratio 1",
}


def test_what_is_better_is_said_of_every_metric():
    known = {metric.title for metric in METRICS.values()} | set(DEFINITIONS) - {"interval", "floor", "subjects"}
    known |= {f"FID-2.5D {plane}" for plane in PLANES} | {"FID of a half", "FID to itself"} | set(OF_PAIRS)
    assert set(SCALES) == known
    assert {name: scale.like_real for name, scale in SCALES.items() if scale.better == "real"} == TWO_SIDED
    assert all(scale.like_real == "" for scale in SCALES.values() if scale.better in ("lower", "higher"))
    lower = {"L1", "L1, foreground", "LPIPS", "MMD", "FID-3D", "FID-2.5D", "FID of a half", "FID to itself"}
    lower |= {f"FID-2.5D {plane}" for plane in PLANES} | {RESIDUAL}
    assert {name for name, scale in SCALES.items() if scale.better == "lower"} == lower


@pytest.mark.parametrize(
    ("metric", "interval", "expected"),
    [
        ("codebook usage", (-0.1, 1.002), (0, 1)),
        ("SSIM", (0.9, 1.1), (0.9, 1)),
        ("MS-SSIM", (0.9, 1.1), (0.9, 1)),
        ("precision", (-0.2, 1.3), (0, 1)),
        ("density", (-0.2, 1.3), (0, 1.3)),
        ("FID-3D", (-3, 4), (0, 4)),
        ("FID to itself: noise 0.1", (-3, 4), (0, 4)),
        ("MMD", (-3, 4), (-3, 4)),
        ("PSNR", (-3, 40), (-3, 40)),
        ("diversity gap", (-1.5, 0.2), (-1, 0.2)),
        ("nearer than held-out", (0.9, 1.04), (0.9, 1)),
        ("codebook perplexity", (0.5, 9), (1, 9)),
    ],
)
def test_intervals_lie_within_the_bounds_of_their_figure(metric, interval, expected):
    assert make_figure("CT", metric, 0.95, interval, {}).interval == expected


def test_a_difference_of_bounded_figures_is_bounded_too():
    assert make_figure("CT", "codebook usage", 0.9, (-0.2, 1.2), {}, is_difference=True).interval == (-0.2, 1)
    assert make_figure("CT", "codebook perplexity", 0, (-9, 9), {}, is_difference=True, high=4).interval == (-3, 3)


def pairs_of(count: int, num_pairs: int, value: float = 0.5) -> PairScores:
    pairs = choose_pairs(Units.own(count), num_pairs, 0)
    scores = value + 0.1 * torch.rand(len(pairs), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    return PairScores(pairs, scores, Units.own(count))


@pytest.mark.parametrize(
    ("count", "num_pairs", "is_enough"), [(2, 9, False), (40, 1, False), (40, 2, False), (3, 2, False), (3, 9, True)]
)
def test_one_pair_or_two_have_no_interval(count, num_pairs, is_enough):
    few, many = pairs_of(count, num_pairs), pairs_of(8, 28)
    for real, generated in ((few, many), (many, few)):
        figures = diversity_figures("CT", real, generated, SAMPLING)
        expected = [generated is many or is_enough, real is many or is_enough, is_enough]
        assert [figure.interval is not None for figure in figures] == expected
        assert {figure.no_interval for figure in figures if figure.interval is None} <= {"n too small"}
        assert diversity_warning("CT", figures[-1]) == noise_warning("CT", figures[-1]) == []


@pytest.mark.parametrize(("num_generated", "num_real"), [(2, 9), (9, 2), (2, 2), (3, 3)])
def test_nearest_distances_of_two_volumes_have_no_interval(num_generated, num_real):
    distances = torch.rand(num_generated) + 1, torch.rand(num_real) + 1
    found = Memorisation(*distances, torch.zeros(num_generated).long(), own((num_real,), (num_generated,)))
    for figure in memorisation_figures("CT", "net", found, 9, SAMPLING):
        assert (figure.interval is None) == (min(num_generated, num_real) < 3)
        assert figure.no_interval == ("" if figure.interval else "n too small")


@pytest.mark.parametrize(
    ("interval", "count", "expected"),
    [
        ((1.0, 1.0), 8, (0.025**0.125, 1)),
        ((0.0, 0.0), 8, (0, 1 - 0.025**0.125)),
        ((0.5, 1.0), 8, (0.5, 1)),
        ("n too small", 2, "n too small"),
    ],
)
def test_a_share_of_all_or_none_has_the_exact_interval(interval, count, expected):
    assert share_interval(interval, count) == expected


def test_no_figure_of_sets_at_its_bound_has_an_interval_of_no_width():
    """Sets far apart: nothing is in the other's balls; training volumes copied: all are nearer."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    found = Memorisation(torch.zeros(9), torch.rand(12) + 1, torch.zeros(9).long(), own((12,), (9,)))
    figures = manifold_figures("CT", "net", x, x[:9] + 99, 3, own((12,), (9,)), SAMPLING)[:2]
    figures.append(memorisation_figures("CT", "net", found, 20, SAMPLING)[0])
    assert [figure.value for figure in figures] == [0, 0, 1]
    for figure, count in zip(figures, (9, 12, 9), strict=True):
        assert figure.interval[1] - figure.interval[0] == pytest.approx(1 - 0.025 ** (1 / count))


def test_shares_at_their_bounds_do_not_exceed_them():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    for figure in manifold_figures("CT", "net", x, 0.3 * x, 3, own((12,), (12,)), SAMPLING):
        if figure.metric != "density":
            assert 0 <= figure.interval[0] <= figure.value <= figure.interval[1] <= 1


def volume(counts: list[int], value: float = 1.0) -> dict[str, np.ndarray]:
    return {**{name: np.asarray(value) for name in VOLUME_METRICS}, COUNTS: np.array(counts)}


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_figures_of_reconstruction(count):
    """Each volume has a code of its own: resamples lack some, and the interval around all of them would exceed 1."""
    one_each = np.eye(count, dtype=int).tolist()
    results = {model: [volume(counts) for counts in one_each] for model in ("A", "B")}
    found = {(figure.metric, figure.model): figure for figure in summarise("CT", results, Units.own(count), 40, 0)[0]}
    usage, perplexity = found["codebook usage", "A"], found["codebook perplexity", "A"]
    assert (usage.value, perplexity.value) == (1, pytest.approx(count))
    for figure in found.values():
        assert (figure.interval is None) == (count < 3)
        assert figure.no_interval == ("n too small" if count < 3 else "")
    if count >= 3:
        assert usage.interval[0] < usage.interval[1] == 1
        assert perplexity.interval[0] < perplexity.interval[1] == pytest.approx(count)
        assert found["codebook usage", "B minus A"].interval == (0, 0)  # of the same encoder


def test_resamples_of_all_classes_keep_their_numbers():
    """Two classes that differ by much more than their volumes do."""
    arrays = [volume([1], value) for value in (1.0, 1.1, 1.2, 9.0, 9.1, 9.2)]
    kept, mixed = (summarise("all classes", {"A": arrays}, Units.own(*sizes), 40, 0)[0][0] for sizes in ([3, 3], [6]))
    assert kept.value == mixed.value == pytest.approx(5.1)
    assert kept.interval[1] - kept.interval[0] < 0.2
    assert mixed.interval[1] - mixed.interval[0] > 2
    assert kept.num == {"volumes": 6}


def test_what_a_class_lacks_is_left_out_of_all():
    arrays = [volume([1]) | {"ssim": np.asarray(value)} for value in (0.9, 0.8, math.nan, math.nan)]
    titles = {
        sizes: {figure.metric for figure in summarise("all", {"A": arrays}, Units.own(*sizes), 9, 0)[0]}
        for sizes in ((2, 2), (1, 3))
    }
    assert "SSIM" not in titles[2, 2]
    assert "SSIM" in titles[1, 3]


@pytest.mark.parametrize(("shift", "words"), [(0.0, []), (0.4, ["collapsed"]), (-0.4, ["noise"])])
def test_both_sides_of_a_diversity_gap_are_warned_of(shift, words):
    gap = diversity_figures("CT", pairs_of(9, 36), pairs_of(8, 28, 0.5 + shift), SAMPLING)[-1]
    found = diversity_warning("CT", gap) + noise_warning("CT", gap)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def page_of(*figure) -> str:
    results = Results("generation", {}, {}, [make_figure("CT", *figure)])
    return page([Part(Making("", "", {}), results, [])], title="", made="")


def test_the_page_says_what_like_real_means_and_why_there_is_no_interval():
    for (metric, meaning), interval in product(TWO_SIDED.items(), ("n too small", (0.25, 0.75))):
        text = page_of(metric, 0.5, interval, {"real": 2})
        assert f'≈ like real<span class="like-real">{meaning}</span>' in text
        assert "both less and more are worse" in text
        assert (">n too small<" in text) == (interval == "n too small") == ("so few subjects or pairs" in text)
    assert "like real" not in page_of("PSNR", 30.0, (29, 31), {"volumes": 9}).lower()
