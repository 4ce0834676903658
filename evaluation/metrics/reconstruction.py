"""How close a reconstruction is to its volume. Pure functions of two tensors, computed in float64."""

import math

from torch import Tensor

from config.errors import UserError


def psnr(x: Tensor, y: Tensor, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio, `10·log10(data_range² / mean((x − y)²))`, in dB, over all elements together.

    x, y: tensors of the same shape, such as two volumes (1, D, H, W).
    data_range: largest minus smallest possible value; 2 for intensities in [-1, 1].
    Nothing is clamped or masked. Identical tensors give infinity.
    Raises UserError for other shapes, an empty tensor, NaN or infinite values, or a range that is not positive.
    """
    if x.shape != y.shape:
        raise UserError(f"PSNR compares tensors of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.numel() == 0:
        raise UserError(f"PSNR of an empty tensor of shape {tuple(x.shape)} is not defined")
    if data_range <= 0:
        raise UserError(f"PSNR needs a positive data range, got {data_range}; for intensities in [-1, 1] it is 2")
    mse = (x.double() - y.double()).square().mean().item()
    if not math.isfinite(mse):
        raise UserError("PSNR is not defined for tensors with NaN or infinite values")
    if mse == 0:
        return math.inf
    return 10 * math.log10(data_range**2 / mse)
