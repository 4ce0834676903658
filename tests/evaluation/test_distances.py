"""Distances between sets of feature vectors against numbers worked out by hand, and against SciPy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.metrics import FIDMetric
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from common.errors import UserError
from evaluation.metrics import distances
from evaluation.metrics.distances import (
    frechet_distance,
    median_bandwidth,
    mmd_from_kernels,
    mmd_rbf,
    nearest,
    nearest_class_mean,
    rbf_kernel,
    squared_distance_rows,
)


def features(count: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return mean + torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_parts(monkeypatch):
    """Seven rows and three pairs at once, so that sets of tens of vectors take several parts."""
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(distances, "PAIRS_AT_ONCE", 3)


def set_with_moments(count: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """(count, F) vectors whose sample mean and covariance are these, to rounding."""
    white = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    white = torch.linalg.qr(white - white.mean(0)).Q * math.sqrt(count - 1)  # columns still sum to 0
    return mean + white @ torch.linalg.cholesky(covariance).T


# Fréchet distance ---------------------------------------------------------------------------------------------------


def test_frechet_distance_of_diagonal_gaussians():
    """Axes are independent: the squared differences of means (1, 0, 2) and of standard deviations (1, 3, 0)."""
    x = set_with_moments(20, torch.zeros(3).double(), torch.tensor([1.0, 4.0, 9.0]).double().diag(), seed=0)
    y = set_with_moments(9, torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([4.0, 25.0, 9.0]).diag().double(), 1)
    assert frechet_distance(x, y) == pytest.approx(1 + 4 + 1 + 9, abs=1e-10)


@pytest.mark.parametrize(("angle", "expected"), [(0.0, 2.0), (math.pi / 2, 10.0), (math.pi / 3, 6.0)])
def test_frechet_distance_of_fewer_vectors_than_features(angle, expected):
    """Two vectors at ±1 and two at ±2 along directions at an angle: variances 2 and 8, tr √(S₁S₂) = 4·cos(angle)."""
    direction, other = torch.zeros(2, 4).double()
    direction[0] = 1
    other[0], other[2] = math.cos(angle), math.sin(angle)
    assert frechet_distance(torch.stack([direction, -direction]), 2 * torch.stack([other, -other])) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(("count_x", "count_y"), [(40, 40), (40, 9), (9, 9), (12, 13)])
def test_frechet_distance_agrees_with_the_matrix_square_root(count_x, count_y):
    generator = np.random.default_rng(0)
    x, y = (generator.normal(size=(n, 12)) @ generator.normal(size=(12, 12)) for n in (count_x, count_y))
    y += 0.5
    root = sqrtm(np.cov(x.T) @ np.cov(y.T))
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root.real)
    # SciPy's root of a singular matrix has only half the digits.
    tolerance = 1e-10 if min(count_x, count_y) > 12 else 1e-5
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=tolerance)


def test_frechet_distance_of_equal_sets_is_zero_and_never_below():
    for seed in range(10):
        x = features(20, seed=seed)
        assert 0 <= frechet_distance(x, x.flip(0)) < 1e-12


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (features(3)[:, :2], features(3), r"got \(3, 2\) and \(3, 5\)"),
        (features(3), features(1), "at least 2 feature vectors here, got 3 and 1"),
        (features(3), features(3) * math.inf, "NaN or infinite"),
    ],
)
def test_frechet_distance_refuses(x, y, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(x, y)


# Distances in parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("spread", [1.0, 2e-2, 1e-3, 1e-9])
def test_squared_distances_keep_their_digits(small_parts, spread, offset):
    """Also between vectors that are nearly equal, and where all are far from the origin."""
    a = features(20).double() + offset
    b = torch.cat([a + spread * features(20, seed=1).double(), a[4:5], features(3, seed=2).double()])
    rows, parts = zip(*squared_distance_rows(a, b), strict=True)
    assert [r.stop - r.start for r in rows] == [7, 7, 6]
    assert all(before.stop == after.start for before, after in pairwise(rows))
    squared = torch.cat(parts).numpy()
    np.testing.assert_allclose(squared, cdist(a, b, "sqeuclidean"), rtol=1e-10, atol=0)
    assert squared[4, 20] == 0


def test_nearest_by_hand():
    references = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])
    distance, index = nearest(torch.tensor([[9.0, 0.0], [3.0, 4.0], [0.0, 5.0]]), references)
    assert index.tolist() == [1, 2, 2]
    assert distance.tolist() == pytest.approx([1.0, math.sqrt(10), 0.0])
    assert distance[2] == 0
    assert distance.dtype == torch.float64


def test_nearest_in_parts(small_parts):
    queries, references = features(20), features(30, seed=1)
    distance, index = nearest(queries, references)
    expected = cdist(queries.double(), references.double())
    assert index.tolist() == expected.argmin(1).tolist()
    np.testing.assert_allclose(distance, expected.min(1), rtol=1e-10)


def test_nearest_refuses_an_empty_set():
    with pytest.raises(UserError, match="at least 1 feature vectors here, got 2 and 0"):
        nearest(features(2), features(0))


# MMD ----------------------------------------------------------------------------------------------------------------


def test_mmd_by_hand():
    """Points 0, 1 against 1, 3 with bandwidth 1: the kernel exp(−d²/2) at distances 1, 2 and 0, 1, 2, 3."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    k = [math.exp(-(d**2) / 2) for d in range(4)]
    cross = 2 * (k[1] + k[3] + k[0] + k[2]) / 4
    assert mmd_rbf(x, y, bandwidth=1.0) == pytest.approx(k[1] + k[2] - cross, abs=1e-12)
    assert mmd_rbf(x, y, bandwidth=1.0, unbiased=False) == pytest.approx(
        (1 + k[1]) / 2 + (1 + k[2]) / 2 - cross, abs=1e-12
    )


@pytest.mark.parametrize(("values", "expected"), [([0.0, 1.0, 4.0], 3.0), ([0.0, 1.0, 4.0, 10.0], 5.0)])
def test_median_bandwidth_by_hand(values, expected):
    """Distances 1, 3, 4 have the median 3; 1, 3, 4, 6, 9, 10 have 5, the mean of the middle two."""
    points = torch.tensor(values)[:, None]
    assert median_bandwidth(points[:1], points[1:]) == pytest.approx(expected)


def test_mmd_takes_the_median_bandwidth_by_default():
    x, y = features(6), features(7, mean=1.0, seed=1)
    assert mmd_rbf(x, y) == mmd_rbf(x, y, bandwidth=median_bandwidth(x, y))


def test_unbiased_mmd_is_zero_on_average_for_one_distribution_and_the_biased_is_not():
    draws = [(features(8, seed=2 * i), features(8, seed=2 * i + 1)) for i in range(200)]
    unbiased = np.array([mmd_rbf(x, y, bandwidth=3.0) for x, y in draws])
    biased = np.array([mmd_rbf(x, y, bandwidth=3.0, unbiased=False) for x, y in draws])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(len(draws))
    assert unbiased.min() < 0 < biased.min()
    assert biased.mean() > 0.02


def test_mmd_grows_with_the_shift_and_does_not_depend_on_order():
    x = features(40)
    shifted = [mmd_rbf(x, features(40, mean=shift, seed=1), bandwidth=3.0) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted)
    y = features(40, mean=0.5, seed=1)
    assert mmd_rbf(x.flip(0), y, bandwidth=3.0) == pytest.approx(shifted[1], abs=1e-12)
    assert mmd_rbf(y, x, bandwidth=3.0) == pytest.approx(shifted[1], abs=1e-12)


def test_mmd_keeps_its_digits_far_from_the_origin():
    """Adding 2²⁶ to multiples of 2⁻²⁰ is exact in float64 and changes no distance, hence no digit of the result."""
    x, y = (set_.double().mul(2**20).round() / 2**20 for set_ in (features(10), features(10, mean=1.0, seed=1)))
    assert mmd_rbf(x + 2**26, y + 2**26) == pytest.approx(mmd_rbf(x, y), rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (features(3)[:, :2], features(3), {}, r"got \(3, 2\) and \(3, 5\)"),
        (features(1), features(3), {}, "at least 2 feature vectors"),
        (features(3), features(3) * math.nan, {}, "NaN or infinite"),
        (features(3), features(3), {"bandwidth": 0.0}, "positive bandwidth"),
        (torch.zeros(3, 5), torch.zeros(3, 5), {}, "median distance between the feature vectors is 0"),
    ],
)
def test_mmd_refuses(x, y, options, message):
    with pytest.raises(UserError, match=message):
        mmd_rbf(x, y, **options)


def test_mmd_in_parts(small_parts):
    x, y = features(20), features(15, mean=0.5, seed=1)
    pooled = torch.cat([x, y]).double()
    bandwidth = np.median(cdist(pooled, pooled)[np.triu_indices(35, 1)])
    assert median_bandwidth(x, y) == pytest.approx(bandwidth, rel=1e-12)
    kernel = np.exp(-cdist(pooled, pooled, "sqeuclidean") / (2 * bandwidth**2))
    np.testing.assert_allclose(rbf_kernel(x, y, bandwidth), kernel[:20, 20:], rtol=1e-10)
    assert mmd_rbf(x, y, unbiased=False) == pytest.approx(
        kernel[:20, :20].mean() + kernel[20:, 20:].mean() - 2 * kernel[:20, 20:].mean(), abs=1e-12
    )


def test_mmd_of_a_resample_from_the_kernels_of_all():
    x, y = features(8), features(9, mean=0.5, seed=1)
    i, j = torch.tensor([0, 3, 3, 7]), torch.tensor([8, 1, 1, 2, 4])
    kernel_xx, kernel_yy, kernel_xy = rbf_kernel(x, x, 2.0), rbf_kernel(y, y, 2.0), rbf_kernel(x, y, 2.0)
    for unbiased in (True, False):
        resampled = mmd_from_kernels(kernel_xx[i][:, i], kernel_yy[j][:, j], kernel_xy[i][:, j], unbiased)
        assert resampled == pytest.approx(mmd_rbf(x[i], y[j], bandwidth=2.0, unbiased=unbiased), abs=1e-12)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 3), (4, 4), (4, 3)), r"\(N, N\), \(M, M\) and \(N, M\), got \(3, 3\), \(4, 4\), \(4, 3\)"),
        (((3, 2), (4, 4), (3, 4)), r"got \(3, 2\)"),
        (((1, 1), (4, 4), (1, 4)), "at least 2 feature vectors here, got 1 and 4"),
    ],
)
def test_mmd_from_kernels_refuses(shapes, message):
    with pytest.raises(UserError, match=message):
        mmd_from_kernels(*(torch.ones(shape) for shape in shapes))


def test_rbf_kernel_refuses_a_bandwidth_that_is_not_positive():
    with pytest.raises(UserError, match="positive bandwidth, got nan"):
        rbf_kernel(features(2), features(2), math.nan)


# Nearest class mean -------------------------------------------------------------------------------------------------


def test_nearest_class_mean_by_hand():
    """Class 7 has the mean (1, 0), class 2 the mean (0, 4); the nearest single vector would decide otherwise."""
    known = torch.tensor([[-1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 7.0]])
    labels = torch.tensor([7, 7, 2, 2])
    queries = torch.tensor([[0.0, 1.2], [0.0, 4.0], [3.0, 1.0]])
    assert nearest_class_mean(known, labels, queries).tolist() == [7, 2, 7]


def test_nearest_class_mean_takes_the_smallest_of_equally_near_classes():
    known, labels = torch.tensor([[4.0], [0.0], [2.0]]), torch.tensor([5, 3, 4])
    assert nearest_class_mean(known, labels, torch.tensor([[3.0], [1.0]])).tolist() == [4, 3]


def test_nearest_class_mean_refuses_other_label_counts():
    with pytest.raises(UserError, match="3 feature vectors need as many labels"):
        nearest_class_mean(features(3), torch.tensor([0, 1]), features(2))


@pytest.mark.parametrize(("count", "width"), [(50, 8), (16, 64)])
def test_frechet_distance_is_that_of_monai(count, width):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    expected = FIDMetric()(x, 1.1 * y + 0.3).item()
    assert frechet_distance(x, 1.1 * y + 0.3) == pytest.approx(expected, rel=1e-6)
