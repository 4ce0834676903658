"""SSIM and MS-SSIM against float64 references of SciPy, and by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ms_ssim
from scipy.ndimage import gaussian_filter

from common.errors import UserError
from evaluation.metrics.reconstruction import ms_ssim, num_scales_of, ssim

# As the references count luminance: from 0, whatever the lowest value is.
ssim_from_0, ms_ssim_from_0 = partial(ssim, low=0.0), partial(ms_ssim, low=0.0)


def volumes(*shape: int, noise: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth volume with a flat background of -1, and the same with noise, clamped to [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = gaussian_filter(torch.randn(shape, generator=generator).numpy(), 2.0) * 4
    x[:, : shape[1] // 3] = -1
    x = torch.from_numpy(x).clamp(-1, 1)
    y = (x + noise * torch.randn(shape, generator=generator)).clamp(-1, 1)
    y[:, : shape[1] // 4] = -1
    return x, y


def reference(x: np.ndarray, y: np.ndarray, data_range: float) -> tuple[float, float]:
    """SSIM and its contrast factor, written once more from the paper, on SciPy's filter."""

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5, 5:-5]

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    variance_x, variance_y = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    contrast = (2 * (mean(x * y) - mean(x) * mean(y)) + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean(x) * mean(y) + c1) / (mean(x) ** 2 + mean(y) ** 2 + c1)
    return (luminance * contrast).mean(), contrast.mean()


# The blocks that are filtered at once give 8 x 32 windows: 11 voxels are one window, 50 are 40.
@pytest.mark.parametrize("shape", [(11, 11, 11), (19, 16, 13), (30, 50, 24), (13, 60, 12)])
@pytest.mark.parametrize("data_range", [2.0, 1.0])
def test_ssim_agrees_with_the_reference(shape, data_range):
    x, y = volumes(*shape)
    expected, _ = reference(x.double().numpy(), y.double().numpy(), data_range)
    assert 0.1 < expected < 0.95
    assert ssim_from_0(x, y, data_range) == pytest.approx(expected, abs=1e-12)
    assert (
        ssim_from_0(x[None], y[None], data_range)
        == ssim_from_0(x, y, data_range)
        == pytest.approx(ssim_from_0(y, x, data_range))
    )


def test_ssim_of_constants_is_the_luminance_term():
    """(2·0.5·1 + C1) / (0.25 + 1 + C1) with C1 = (0.01·2)²; the contrast of two constants is 1."""
    x, y = torch.full((11, 12, 13), 0.5), torch.ones(11, 12, 13)
    assert ssim_from_0(x, y) == pytest.approx(1.0004 / 1.2504, abs=1e-12)


def test_opposite_contrast_is_negative_in_ssim_and_zero_in_ms_ssim():
    noise = 0.2 * torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(0))
    assert -0.95 < ssim_from_0(0.5 + noise, 0.5 - noise) < -0.85
    for num_scales in (1, 2):
        assert ms_ssim_from_0(0.5 + noise, 0.5 - noise, num_scales=num_scales) == 0


def test_identical_volumes_have_similarity_one():
    x, _ = volumes(24, 24, 24)
    assert ssim_from_0(x, x) == pytest.approx(1.0, abs=1e-12)
    assert ms_ssim_from_0(x, x) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64, 64), 3),
        ((1, 128, 128, 128), 4),
        ((256, 256, 256), 5),
        ((512, 512, 512), 5),
        ((512, 512, 64), 3),
        ((11, 99, 99), 1),
        ((21, 99, 99), 1),
        ((22, 99, 99), 2),
        ((175, 175, 175), 4),
        ((176, 176, 176), 5),
    ],
)
def test_num_scales(shape, expected):
    assert num_scales_of(shape) == expected


@pytest.mark.parametrize(("num_scales", "weights"), [(1, [1.0]), (2, [0.0448, 0.2856]), (3, [0.0448, 0.2856, 0.3001])])
def test_ms_ssim_agrees_with_the_reference(num_scales, weights):
    """44 and 47 voxels make 22 and 23, then 11: the odd last slice is dropped."""
    x, y = volumes(44, 47, 45)
    a, b = x.double().numpy(), y.double().numpy()
    expected = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            a, b = (
                v[: d // 2 * 2, : h // 2 * 2, : w // 2 * 2].reshape(d // 2, 2, h // 2, 2, w // 2, 2).mean((1, 3, 5))
                for v in (a, b)
                for d, h, w in [v.shape]
            )
        similarity, contrast = reference(a, b, 2.0)
        expected *= (similarity if scale == num_scales - 1 else contrast) ** (weight / sum(weights))
    assert 0.1 < expected < 0.95
    assert ms_ssim_from_0(x, y, num_scales=num_scales) == pytest.approx(expected, abs=1e-12)
    if num_scales == 3:
        assert ms_ssim_from_0(x, y) == ms_ssim_from_0(x[None], y[None]) == pytest.approx(expected, abs=1e-12)
    if num_scales == 1:
        assert ms_ssim_from_0(x, y, num_scales=1) == ssim_from_0(x, y)


@pytest.mark.parametrize("data_range", [2.0, 1.0])
def test_ms_ssim_agrees_with_monai(data_range):
    """Which computes in float32, and is off by 1.2e-5 for a range of 1 here."""
    x, y = volumes(48, 48, 48)
    weights = torch.tensor([0.0448, 0.2856, 0.3001])
    expected = compute_ms_ssim(x[None, None], y[None, None], 3, data_range, weights=(weights / weights.sum()).tolist())
    assert ms_ssim_from_0(x, y, data_range) == pytest.approx(expected.item(), abs=5e-5)


@pytest.mark.parametrize(("metric", "name"), [(ssim, "SSIM"), (ms_ssim, "MS-SSIM")])
@pytest.mark.parametrize(
    ("x", "y", "data_range", "message"),
    [
        (torch.zeros(16, 10, 16), torch.zeros(16, 10, 16), 2.0, r"sides of at least 11 voxels, got \(16, 10, 16\)"),
        (
            torch.zeros(16, 16, 16),
            torch.zeros(1, 16, 16, 16),
            2.0,
            r"{name} compares two volumes .* got \(16, 16, 16\)",
        ),
        (torch.zeros(2, 16, 16, 16), torch.zeros(2, 16, 16, 16), 2.0, r"{name} compares two volumes"),
        (torch.zeros(16, 16), torch.zeros(16, 16), 2.0, r"{name} compares two volumes"),
        (
            torch.zeros(16, 16, 16),
            torch.full((16, 16, 16), math.nan),
            2.0,
            "{name} is not defined for volumes with NaN",
        ),
        (
            torch.full((16, 16, 16), math.inf),
            torch.zeros(16, 16, 16),
            2.0,
            "{name} is not defined for volumes with NaN",
        ),
        (torch.zeros(16, 16, 16), torch.zeros(16, 16, 16), 0.0, "{name} needs a positive data range"),
    ],
)
def test_refuses(metric, name, x, y, data_range, message):
    with pytest.raises(UserError, match="^" + message.format(name=name) if "{name}" in message else message):
        metric(x, y, data_range)


@pytest.mark.parametrize("num_scales", [0, 3])
def test_ms_ssim_refuses_scales_that_do_not_fit(num_scales):
    x = torch.zeros(24, 24, 24)
    with pytest.raises(UserError, match=rf"MS-SSIM of a volume \(24, 24, 24\) takes 1 to 2 scales, got {num_scales}"):
        ms_ssim_from_0(x, x, num_scales=num_scales)


def test_luminance_is_counted_from_the_lowest_value():
    """Nearly equal greys on both sides of 0 are alike, and intensities of [-1, 1] are as good as those of [0, 2]."""
    grey = torch.full((48, 48, 48), 0.05)
    for metric, from_0 in ((ssim, ssim_from_0), (ms_ssim, ms_ssim_from_0)):
        assert metric(grey, -grey) > 0.99
        assert from_0(grey, -grey) <= 0.0
        x, y = (volume.double() for volume in volumes(48, 48, 48))
        assert metric(x, y) == pytest.approx(from_0(x + 1, y + 1), abs=1e-12)
        assert metric(x - 1, y - 1, low=-2.0) == pytest.approx(metric(x, y), abs=1e-12)
