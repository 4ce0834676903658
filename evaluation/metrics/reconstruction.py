"""How close a reconstruction is to its volume. Pure functions of two tensors, computed in float64."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError

WINDOW_EDGE = 11  # voxels
WINDOW_SIGMA = 1.5  # voxels
LUMINANCE_CONSTANT, CONTRAST_CONSTANT = 0.01, 0.03  # K1, K2: times the data range, squared
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest first
# Windows are filtered for so many positions along D and H at once. Maps of the whole volume take 1 GB each at 512³ in
# float64; blocks take 20 MB and three times less time, since they stay in the cache. So nothing is gained by float32,
# whose differences of squares lose digits where a volume is flat.
BLOCK = (8, 32)
ELEMENTS_AT_ONCE = 2**20


def l1(x: Tensor, y: Tensor) -> float:
    """Mean absolute difference over all elements together, in units of the intensities.

    x, y: tensors of the same shape, such as two volumes (1, D, H, W).
    Raises UserError for other shapes, an empty tensor, NaN or infinite values.
    """
    return _mean_difference("L1", x, y, Tensor.abs_)


def psnr(x: Tensor, y: Tensor, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio, `10·log10(data_range² / mean((x − y)²))`, in dB, over all elements together.

    x, y: tensors of the same shape, such as two volumes (1, D, H, W).
    data_range: largest minus smallest possible value; 2 for intensities in [-1, 1].
    Nothing is clamped or masked. Identical tensors give infinity.
    Raises UserError for other shapes, an empty tensor, NaN or infinite values, or a range that is not positive.
    """
    _check_data_range("PSNR", data_range)
    mse = _mean_difference("PSNR", x, y, Tensor.square_)
    return 10 * math.log10(data_range**2 / mse) if mse > 0 else math.inf


def ssim(x: Tensor, y: Tensor, data_range: float = 2.0, low: float = -1.0) -> float:
    """Structural similarity, the mean over all windows that lie wholly in the volume; 1 for identical volumes.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 13 (2004),
    equation 13, in 3D: Gaussian windows of 11³ voxels with a standard deviation of 1.5 voxels, K1 = 0.01, K2 = 0.03.

    x, y: two volumes (D, H, W) or (1, D, H, W). data_range: see `psnr`.
    low: the lowest possible value, from which luminance is counted: the paper's images are not negative, and two means
        of opposite sign, however near, would be as different as can be.
    Raises UserError for other shapes, a side below 11, NaN or infinite values, or a range that is not positive.
    """
    _check_data_range("SSIM", data_range)
    return _similarity_and_contrast(*_check_volumes("SSIM", x, y), data_range, low)[0]


def ms_ssim(x: Tensor, y: Tensor, data_range: float = 2.0, num_scales: int | None = None, low: float = -1.0) -> float:
    """Multi-scale structural similarity: contrast and structure at every scale, luminance at the coarsest.

    Wang et al., "Multiscale Structural Similarity for Image Quality Assessment", Asilomar 2003, equation 7, with the
    windows and constants of `ssim`. Volumes are averaged over 2³ voxels from one scale to the next. A scale's
    negative mean counts as 0, since a power of it isn't defined.

    x, y: two volumes (D, H, W) or (1, D, H, W). data_range: see `psnr`. low: see `ssim`.
    num_scales: 1 to 5, finest first; None takes `num_scales_of(x.shape)`. The paper has five. With fewer, their weights
        are divided by their sum, and the values compare only with those of as many scales.
    Raises UserError as `ssim` does, and for more scales than the volume allows.
    """
    _check_data_range("MS-SSIM", data_range)
    x, y = _check_volumes("MS-SSIM", x, y)
    possible = num_scales_of(x.shape)
    num_scales = possible if num_scales is None else num_scales
    if not 1 <= num_scales <= possible:
        raise UserError(f"MS-SSIM of a volume {tuple(x.shape)} takes 1 to {possible} scales, got {num_scales}")

    weights = SCALE_WEIGHTS[:num_scales]
    product = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            x, y = (F.avg_pool3d(volume[None].double(), 2)[0] for volume in (x, y))  # every side halved, rounded down
        similarity, contrast = _similarity_and_contrast(x, y, data_range, low)
        product *= max(similarity if scale == num_scales - 1 else contrast, 0.0) ** (weight / sum(weights))
    return product


def num_scales_of(shape: Sequence[int]) -> int:
    """How many of the five scales of `ms_ssim` keep every side at 11 voxels or more: 3 at 64³, 4 at 128³, 5 at 256³.

    shape: (..., D, H, W). Raises UserError for a side below 11.
    """
    shortest = min(shape[-3:])
    if shortest < WINDOW_EDGE:
        raise UserError(f"structural similarity needs sides of at least {WINDOW_EDGE} voxels, got {tuple(shape)}")
    return min(len(SCALE_WEIGHTS), (shortest // WINDOW_EDGE).bit_length())


def _mean_difference(name: str, x: Tensor, y: Tensor, of_difference: Callable[[Tensor], Tensor]) -> float:
    """Mean of `of_difference(x − y)`, a function that works in place."""
    if x.shape != y.shape:
        raise UserError(f"{name} compares tensors of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.numel() == 0:
        raise UserError(f"{name} of an empty tensor of shape {tuple(x.shape)} is not defined")
    pairs = zip(x.reshape(-1).split(ELEMENTS_AT_ONCE), y.reshape(-1).split(ELEMENTS_AT_ONCE), strict=True)
    mean = sum(of_difference(a.double() - b.double()).sum().item() for a, b in pairs) / x.numel()
    if not math.isfinite(mean):
        raise UserError(f"{name} is not defined for tensors with NaN or infinite values")
    return mean


def _check_data_range(name: str, data_range: float) -> None:
    if not data_range > 0:
        raise UserError(f"{name} needs a positive data range, got {data_range}; for intensities in [-1, 1] it is 2")


def _check_volumes(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both volumes as (D, H, W), after the checks."""
    if x.shape != y.shape or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[0] != 1):
        raise UserError(
            f"{name} compares two volumes (D, H, W) or (1, D, H, W) of one shape, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    num_scales_of(x.shape)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError(f"{name} is not defined for volumes with NaN or infinite values")
    return x.reshape(x.shape[-3:]), y.reshape(y.shape[-3:])


def _similarity_and_contrast(x: Tensor, y: Tensor, data_range: float, low: float) -> tuple[float, float]:
    """(D, H, W) twice -> mean over all whole windows of SSIM, and of its factor for contrast and structure.

    Libraries were measured and not taken. torchmetrics 1.9 averages over windows in a reflected border too (off by
    7e-4 at 128³) and its window of 11³ weights in float64 asks for 112 GB there. MONAI 1.6 means the same, but
    computes in float32 (off by up to 1e-5 where volumes are flat), takes 30 times as long as the separated window, and
    refuses four scales of sides of 88 to 98 voxels, where they fit.
    """
    c1, c2 = (LUMINANCE_CONSTANT * data_range) ** 2, (CONTRAST_CONSTANT * data_range) ** 2
    similarity_sum = contrast_sum = 0.0
    num_windows = math.prod(side - WINDOW_EDGE + 1 for side in x.shape)
    starts = (range(0, side - WINDOW_EDGE + 1, step) for side, step in zip(x.shape[:2], BLOCK, strict=True))
    for z, h in itertools.product(*starts):
        # Neighbouring blocks overlap by 10 voxels, their windows don't.
        block = (slice(z, z + BLOCK[0] + WINDOW_EDGE - 1), slice(h, h + BLOCK[1] + WINDOW_EDGE - 1))
        a, b = x[block].double() - low, y[block].double() - low
        mean_a, mean_b, mean_squares, mean_product = _window_means(torch.stack([a, b, a * a + b * b, a * b]))
        product_of_means = mean_a * mean_b
        squares_of_means = mean_a.square() + mean_b.square()
        contrast = (2 * (mean_product - product_of_means) + c2) / (mean_squares - squares_of_means + c2)
        contrast_sum += contrast.sum().item()
        similarity_sum += (contrast * (2 * product_of_means + c1) / (squares_of_means + c1)).sum().item()
    return similarity_sum / num_windows, contrast_sum / num_windows


def _window_means(maps: Tensor) -> Tensor:
    """(maps, D, H, W) -> (maps, D - 10, H - 10, W - 10): Gaussian means of whole windows, one axis after the other.

    By shifted sums: conv3d is 6 times slower in float64 on the CPU.
    """
    offsets = torch.arange(WINDOW_EDGE, dtype=torch.float64) - WINDOW_EDGE // 2
    weights = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA**2))
    weights = (weights / weights.sum()).tolist()
    for axis in (1, 2, 3):
        length = maps.shape[axis] - WINDOW_EDGE + 1
        means = maps.narrow(axis, 0, length) * weights[0]
        for offset in range(1, WINDOW_EDGE):
            means.add_(maps.narrow(axis, offset, length), alpha=weights[offset])
        maps = means
    return maps
