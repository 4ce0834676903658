"""Latents scaled to unit variance on the way into the network, and back on the way out."""

import pytest
import torch

from ddpm.diffusion import GaussianDiffusion
from ddpm.flow import RectifiedFlow
from ddpm.latent_scaling import LatentScaling

MEAN, STD = torch.tensor([0.2, -0.3]), torch.tensor([0.03, 0.4])
SHAPE = (2, 4, 4, 4)


def latents(count: int) -> torch.Tensor:
    normal = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(0))
    return normal * STD[:, None, None, None] + MEAN[:, None, None, None]


@pytest.fixture
def scaling() -> LatentScaling:
    scaling = LatentScaling(2)
    scaling.load_state_dict({"mean": MEAN, "std": STD})
    return scaling


def test_mean_and_deviation_are_measured_over_all_voxels():
    scaling, x = LatentScaling(2), latents(50)
    scaling.measure(x)
    torch.testing.assert_close(scaling.mean, x.mean((0, 2, 3, 4)))
    torch.testing.assert_close(scaling.std, x.std((0, 2, 3, 4), correction=0))
    torch.testing.assert_close(scaling(x).std((0, 2, 3, 4), correction=0), torch.ones(2))
    torch.testing.assert_close(scaling.restore(scaling(x)), x)


def test_a_constant_channel_is_only_shifted():
    scaling, x = LatentScaling(2), latents(3)
    x[:, 0] = 0.1
    scaling.measure(x)
    torch.testing.assert_close(scaling(x)[:, 0], torch.zeros(3, 4, 4, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [GaussianDiffusion, RectifiedFlow])
def test_the_network_sees_scaled_latents_with_noise(scaling, kind):
    seen, x, noise = [], latents(4), torch.randn(4, *SHAPE)
    process = kind(2, scaling=scaling)
    t = torch.zeros(4, dtype=torch.long) if kind is GaussianDiffusion else torch.zeros(4)
    process.p_losses(lambda x_t, t: seen.append(x_t) or torch.zeros_like(x_t), x, t, noise=noise)
    torch.testing.assert_close(seen[0], scaling(x), atol=0.05, rtol=0)  # timestep 0: next to no noise


@pytest.mark.parametrize("strategy", ["ddim", "dpm++", "ddpm", "euler"])
def test_samples_come_back_in_the_range_of_files(scaling, strategy):
    """A denoiser that knows the data returns it, whatever its scale."""
    x = latents(2).clamp(-1, 1)
    process = RectifiedFlow(2, scaling=scaling) if strategy == "euler" else GaussianDiffusion(2, 20, scaling=scaling)

    def denoiser(x_t, t):
        if strategy == "euler":
            return (x_t - scaling(x)) / (t / 1000)[:, None, None, None, None]
        signal, noise = (
            table[t][:, None, None, None, None]
            for table in (process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod)
        )
        return (x_t - signal * scaling(x)) / noise

    found = process.sample(denoiser, torch.randn(2, *SHAPE), strategy=strategy, ddim_steps=10)
    torch.testing.assert_close(found, x, atol=2e-3, rtol=0)


def test_x0_is_limited_to_the_range_of_files(scaling):
    """Not to [-1, 1] of what the network sees, where a unit channel reaches 3 and more."""
    inside, outside = scaling(latents(1)), scaling(torch.full((1, *SHAPE), 5.0))
    process = GaussianDiffusion(2, scaling=scaling)
    torch.testing.assert_close(process.limit_start(inside), scaling(latents(1).clamp(-1, 1)))
    torch.testing.assert_close(scaling.restore(process.limit_start(outside)), torch.ones(1, *SHAPE))
