"""Distances between two sets of feature vectors. Pure functions, computed in float64.

A set is a tensor (N, F): N volumes, F features each.
"""

import torch
from torch import Tensor

from config.errors import UserError


def mmd_rbf(x: Tensor, y: Tensor, *, bandwidth: float | None = None, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel `k(a, b) = exp(−‖a − b‖² / (2·bandwidth²))`.

    Gretton et al., "A Kernel Two-Sample Test", JMLR 13 (2012), equations 3 (unbiased) and 5 (biased).

    x: (N, F), y: (M, F) features of the two sets.
    bandwidth: in units of the features; None takes `median_bandwidth(x, y)`. Give the same value wherever two
        distances are to be compared with each other.
    unbiased: leave each vector's kernel with itself out of the means. The result is then 0 on average for two sets
        of one distribution, and can be a little below. False gives the biased estimate, which is never negative.
    Raises UserError for other shapes, fewer vectors than the estimate needs (2 unbiased, 1 biased), values that are
    not finite, or a bandwidth that is not positive.
    """
    x, y = _check_sets(x, y, minimum=2 if unbiased else 1)
    if bandwidth is None:
        bandwidth = median_bandwidth(x, y)
    if not bandwidth > 0:
        raise UserError(f"MMD needs a positive bandwidth, got {bandwidth}")

    kernel_xx, kernel_yy, kernel_xy = (
        torch.exp(-_squared_distances(a, b) / (2 * bandwidth**2)) for a, b in ((x, x), (y, y), (x, y))
    )
    return (_mean_kernel(kernel_xx, unbiased) + _mean_kernel(kernel_yy, unbiased) - 2 * kernel_xy.mean()).item()


def median_bandwidth(x: Tensor, y: Tensor) -> float:
    """Median heuristic: the median distance between two different vectors of both sets together.

    x: (N, F), y: (M, F). Raises UserError where that median is 0 (most vectors are the same one).
    """
    x, y = _check_sets(x, y, minimum=1)
    pooled = torch.cat([x, y])  # (N + M, F)
    row, column = torch.triu_indices(len(pooled), len(pooled), offset=1)
    # quantile() is limited to 16 million values, and median() alone takes the lower of two middle ones.
    distances = _squared_distances(pooled, pooled)[row, column].sqrt().sort().values
    middle = len(distances) // 2
    median = distances[middle] if len(distances) % 2 else (distances[middle - 1] + distances[middle]) / 2
    if median == 0:
        raise UserError(
            "the median distance between the feature vectors is 0, so most of them are the same: "
            "check the features, or give a bandwidth"
        )
    return median.item()


def nearest_class_mean(features: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Class whose mean feature vector is the nearest to each query: the simplest classifier there is.

    features: (N, F) of known class; labels: (N,) their integer class ids; queries: (M, F).
    Returns (M,) class ids, of the dtype of `labels`. Of equally near classes the smallest id is taken.
    Raises UserError for other shapes, an empty set or values that are not finite.
    """
    features, queries = _check_sets(features, queries, minimum=1)
    if labels.shape != (len(features),):
        raise UserError(f"{len(features)} feature vectors need as many labels, got shape {tuple(labels.shape)}")
    classes = labels.unique()  # sorted
    means = torch.stack([features[labels == label].mean(0) for label in classes])  # (classes, F)
    return classes[_squared_distances(queries, means).argmin(1)]


def _check_sets(x: Tensor, y: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    """Both sets as float64, after the checks that every distance needs."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"expected feature sets (N, F) and (M, F), got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < minimum:
        raise UserError(f"a set needs at least {minimum} feature vectors here, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("the feature vectors hold NaN or infinite values")
    return x, y


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, F), (M, F) -> (N, M) squared Euclidean distances, by differences: exact where vectors are nearly equal."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def _mean_kernel(kernel: Tensor, unbiased: bool) -> Tensor:
    """Mean of a set's kernel matrix (N, N) with itself, without its diagonal of ones when unbiased."""
    if not unbiased:
        return kernel.mean()
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))
