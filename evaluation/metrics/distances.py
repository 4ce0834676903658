"""Distances between two sets of feature vectors. Pure functions, computed in float64.

A set is a tensor (N, F): N volumes, F features each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import UserError

ROWS_AT_ONCE = 1024  # of a matrix of distances
PAIRS_AT_ONCE = 4096  # of vectors whose difference is taken: 64 MB of 2048 features


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to both sets, `‖m₁ − m₂‖² + tr(S₁ + S₂ − 2·√(S₁S₂))`.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017, equation 6 (as "FID" it is given
    squared). The covariances S are divided by N − 1. The estimate falls with the number of vectors, so only distances
    of equal set sizes compare.

    MONAI 1.6's FIDMetric agrees to 5e-8 and takes 100 times as long (100 vectors of 512), too long for intervals. Its
    MMDMetric has a linear kernel, so that it compares means alone.

    x: (N, F), y: (M, F) features of the two sets.
    Raises UserError for other shapes, fewer than 2 vectors or values that are not finite.
    """
    x, y = check_sets(x, y, minimum=2)
    factor_x, factor_y = _covariance_factor(x), _covariance_factor(y)
    # With S₁ = AᵀA and S₂ = BᵀB the eigenvalues of S₁S₂ are the squared singular values of A·Bᵀ. No root of a
    # matrix is taken, which is slow and inexact where N < F leaves the covariances singular.
    trace_of_root = torch.linalg.svdvals(factor_x @ factor_y.T).sum()
    traces = factor_x.square().sum() + factor_y.square().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * trace_of_root
    return max(distance.item(), 0.0)  # rounding leaves equal sets a little below 0


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
    x, y = check_sets(x, y, minimum=2 if unbiased else 1)
    bandwidth = median_bandwidth(x, y) if bandwidth is None else bandwidth
    kernels = (rbf_kernel(a, b, bandwidth) for a, b in ((x, x), (y, y), (x, y)))
    return mmd_from_kernels(*kernels, unbiased=unbiased)


def rbf_kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Gaussian kernel `exp(−‖a − b‖² / (2·bandwidth²))` of every vector of x with every one of y.

    x: (N, F), y: (M, F); bandwidth in units of the features. Returns (N, M) in float64.
    Raises UserError for other shapes, values that are not finite, or a bandwidth that is not positive.
    """
    x, y = check_sets(x, y, minimum=1)
    if not bandwidth > 0:
        raise UserError(f"MMD needs a positive bandwidth, got {bandwidth}")
    kernel = x.new_empty(len(x), len(y))
    for rows, squared in squared_distance_rows(x, y):
        kernel[rows] = squared.div_(-2 * bandwidth**2).exp_()
    return kernel


def mmd_from_kernels(
    kernel_xx: Tensor,
    kernel_yy: Tensor,
    kernel_xy: Tensor,
    unbiased: bool = True,
    subjects: tuple[Tensor | None, Tensor | None] = (None, None),
) -> float:
    """Squared maximum mean discrepancy from the kernels of `rbf_kernel`, see `mmd_rbf`.

    kernel_xx: (N, N), kernel_yy: (M, M), kernel_xy: (N, M). A resample with indices i and j of the two sets needs no
        new ones: `kernel_xx[i][:, i]`, `kernel_yy[j][:, j]`, `kernel_xy[i][:, j]`.
    subjects: of the vectors of x (N,) and y (M,); None: each of another one. The unbiased estimate leaves out all
        pairs of vectors of one subject, as it leaves out those of a vector with itself: they are no pair of
        independent draws, and nearer to each other.
    Raises UserError for shapes that don't belong together or fewer vectors than the estimate needs.
    """
    count_x, count_y = len(kernel_xx), len(kernel_yy)
    expected = (count_x, count_x), (count_y, count_y), (count_x, count_y)
    if (kernel_xx.shape, kernel_yy.shape, kernel_xy.shape) != expected:
        shapes = ", ".join(str(tuple(kernel.shape)) for kernel in (kernel_xx, kernel_yy, kernel_xy))
        raise UserError(f"expected kernels (N, N), (M, M) and (N, M), got {shapes}")
    _check_counts(count_x, count_y, minimum=2 if unbiased else 1)
    of_x, of_y = (_mean_kernel(k, unbiased, of) for k, of in zip((kernel_xx, kernel_yy), subjects, strict=True))
    return (of_x + of_y - 2 * kernel_xy.mean()).item()


def median_bandwidth(x: Tensor, y: Tensor) -> float:
    """Median heuristic: the median distance between two different vectors of both sets together.

    x: (N, F), y: (M, F). Raises UserError where that median is 0 (most vectors are the same one).
    """
    x, y = check_sets(x, y, minimum=1)
    pooled = torch.cat([x, y])  # (N + M, F)
    squared = torch.empty(len(pooled) * (len(pooled) - 1) // 2, dtype=torch.float64)
    filled = 0
    for rows, distances in squared_distance_rows(pooled, pooled):
        for index, row in zip(range(rows.start, rows.stop), distances, strict=True):
            later = row[index + 1 :]
            squared[filled : filled + len(later)] = later
            filled += len(later)
    # NumPy orders around the middle in place, where quantile() is limited to 16 million values, sort() takes twice the
    # memory again, and median() takes the lower of two middle ones.
    lower, upper = (len(squared) - 1) // 2, len(squared) // 2
    squared.numpy().partition((lower, upper))
    median = (squared[lower].sqrt() + squared[upper].sqrt()) / 2
    if median == 0:
        raise UserError(
            "the median distance between the feature vectors is 0, so most of them are the same: "
            "check the features, or give a bandwidth"
        )
    return median.item()


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each query to its nearest reference, and which one that is.

    queries: (M, F), references: (N, F). Returns (M,) distances in float64 and (M,) indices into the references.
    A query that is among the references has the distance 0 exactly.
    Raises UserError for other shapes, an empty set or values that are not finite.
    """
    queries, references = check_sets(queries, references, minimum=1)
    found = [squared.min(1) for _, squared in squared_distance_rows(queries, references)]
    return torch.cat([of_rows.values for of_rows in found]).sqrt(), torch.cat([of_rows.indices for of_rows in found])


def nearest_class_mean(features: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Class whose mean feature vector is the nearest to each query: the simplest classifier there is.

    features: (N, F) of known class; labels: (N,) their integer class ids; queries: (M, F).
    Returns (M,) class ids, of the dtype of `labels`. Of equally near classes the smallest id is taken.
    Raises UserError for other shapes, an empty set or values that are not finite.
    """
    features, queries = check_sets(features, queries, minimum=1)
    if labels.shape != (len(features),):
        raise UserError(f"{len(features)} feature vectors need as many labels, got shape {tuple(labels.shape)}")
    classes = labels.unique()  # sorted
    means = torch.stack([features[labels == label].mean(0) for label in classes])  # (classes, F)
    # By differences: exact, so that equal distances are.
    return classes[torch.cdist(queries, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)]


def check_sets(x: Tensor, y: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    """Both sets as float64, after the checks that every distance needs."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"expected feature sets (N, F) and (M, F), got {tuple(x.shape)} and {tuple(y.shape)}")
    _check_counts(len(x), len(y), minimum)
    x, y = x.double(), y.double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("the feature vectors hold NaN or infinite values")
    return x, y


def squared_distance_rows(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared Euclidean distances of float64 vectors (N, F), (M, F) to 1e-10 of each, some rows at a time.

    Yields slices of range(N) and the new tensors (rows, M) that belong to them, which the caller may change.
    ‖a‖² + ‖b‖² − 2·a·b is 15 times faster than differences at F = 2048, but wrong by about 1e-14 of the norms: much
    where vectors are nearly equal. Those pairs alone are computed by differences.
    """
    origin = (a.mean(0) + b.mean(0)) / 2  # norms small, so errors are
    centred_b = b - origin
    norms_b = centred_b.square().sum(1)  # (M,)
    for first in range(0, len(a), ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, len(a)))
        centred_a = a[rows] - origin
        norms = centred_a.square().sum(1)[:, None] + norms_b  # (rows, M)
        squared = (centred_a @ centred_b.T).mul_(-2).add_(norms)
        for near in (squared <= 1e-4 * norms).nonzero().split(PAIRS_AT_ONCE):
            row, column = near.T
            squared[row, column] = (a[rows][row] - b[column]).square().sum(1)
        yield rows, squared


def _check_counts(count_x: int, count_y: int, minimum: int) -> None:
    if min(count_x, count_y) < minimum:
        raise UserError(f"a set needs at least {minimum} feature vectors here, got {count_x} and {count_y}")


def _covariance_factor(vectors: Tensor) -> Tensor:
    """(N, F) -> (min(N, F), F) matrix A whose AᵀA is the covariance, divided by N - 1."""
    factor = (vectors - vectors.mean(0)) / (len(vectors) - 1) ** 0.5
    return torch.linalg.qr(factor, mode="r").R if len(factor) > factor.shape[1] else factor


def _mean_kernel(kernel: Tensor, unbiased: bool, subjects: Tensor | None) -> Tensor:
    """Mean of a set's kernel matrix (N, N) with itself, when unbiased without the pairs of one subject."""
    if not unbiased:
        return kernel.mean()
    if subjects is not None:
        return kernel[subjects[:, None] != subjects].mean()
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))
