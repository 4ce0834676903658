"""Single samples on a CPU are convolved in halves, gradients of few channels are computed with them last: the same."""

import pytest
import torch
from torch import nn

from common.convolution import Conv3d


def results(convolve, conv: nn.Conv3d, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    y = convolve(x)
    conv.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()]


@pytest.mark.parametrize("grid", [(6, 5, 4), (16, 16, 16)])
def test_halves_are_the_whole(grid):
    torch.manual_seed(0)
    conv, x = Conv3d(4, 5, kernel_size=3, padding=1), torch.randn(1, 4, *grid)
    assert conv._is_faster_in_halves(x)
    for found, expected in zip(
        results(conv, conv, x), results(lambda v: nn.Conv3d.forward(conv, v), conv, x), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16, 16), (1, 4, 32, 16, 16)])
def test_gradients_of_few_channels_are_the_same(shape):
    torch.manual_seed(0)
    conv, x = Conv3d(4, 5, kernel_size=3, padding=1), torch.randn(shape)
    assert conv._has_faster_gradients(x)
    found, expected = results(conv, conv, x), results(lambda v: nn.Conv3d.forward(conv, v), conv, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert "FewChannels" in repr(conv(x.requires_grad_()).grad_fn) or len(x) == 1
    with torch.no_grad():
        assert not conv._has_faster_gradients(x)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"kernel_size": 3, "padding": 1}, (2, 4, 8, 8, 8)),  # a batch, which is fast as it is
        ({"kernel_size": 3, "padding": 1}, (1, 4, 7, 8, 8)),
        ({"kernel_size": 3, "padding": 1}, (1, 4, 4, 8, 8)),
        ({"kernel_size": 3, "padding": 1}, (1, 4, 72, 72, 8)),  # large enough for oneDNN
        ({"kernel_size": 4, "padding": 1, "stride": 2}, (1, 4, 8, 8, 8)),
        ({"kernel_size": 1}, (1, 4, 8, 8, 8)),
    ],
)
def test_what_is_fast_as_it_is_stays_so(options, shape):
    conv, x = Conv3d(4, 5, **options), torch.randn(shape)
    assert not (conv._is_plain(x) and conv._is_faster_in_halves(x))
    torch.testing.assert_close(conv(x), nn.Conv3d.forward(conv, x), rtol=0, atol=0)
