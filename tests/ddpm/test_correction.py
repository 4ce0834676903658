"""What is put in place of the predicted x_0 in the last steps, by every sampler of both processes."""

import pytest
import torch
from golden import GOLDEN_SEED, golden_normal

from ddpm.diffusion import GaussianDiffusion
from ddpm.flow import RectifiedFlow
from ddpm.latent_scaling import LatentScaling
from ddpm.process import SAMPLERS_OF

SHAPE, STEPS = (2, 3, 4, 4, 4), 6
CASES = [(process, strategy) for process, samplers in SAMPLERS_OF.items() for strategy in samplers]


def toy_denoiser(x, t):
    return 0.9 * x + 0.05 * torch.sin(3 * x)


def process_of(name: str):
    scaling = LatentScaling(3)
    scaling.mean[:], scaling.std[:] = torch.tensor([0.1, -0.2, 0.0]), torch.tensor([0.5, 0.3, 0.4])
    return RectifiedFlow(3, scaling=scaling) if name == "flow" else GaussianDiffusion(3, STEPS, scaling=scaling)


def sampled(process, strategy: str, **options) -> torch.Tensor:
    z = golden_normal(GOLDEN_SEED, "z", SHAPE)
    generator = torch.Generator().manual_seed(0)
    return process.sample(toy_denoiser, z, strategy=strategy, ddim_steps=STEPS, generator=generator, **options)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_the_last_steps_are_led_to_what_is_given(name, strategy):
    process, target = process_of(name), 0.5 * golden_normal(GOLDEN_SEED, "x0", SHAPE).clamp(-1, 1)
    plain, seen = sampled(process, strategy), []

    def correct(x_start: torch.Tensor) -> torch.Tensor:
        seen.append(x_start)
        return target

    torch.testing.assert_close(sampled(process, strategy, correct=correct, correct_last=2), target, rtol=0, atol=1e-5)
    assert len(seen) == 2
    sampled(process, strategy, correct=correct, correct_last=1)
    torch.testing.assert_close(seen[2], plain, rtol=0, atol=2e-5)  # up to there as without: normalised latents
    # What changes nothing, in all steps
    found = sampled(process, strategy, correct=lambda x_start: x_start, correct_last=STEPS)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-5)
    assert torch.equal(sampled(process, strategy, correct=correct, correct_last=0), plain)
    with pytest.raises(ValueError, match="correct_last is 7: it has to lie between 0 and the 6 steps"):
        sampled(process, strategy, correct=correct, correct_last=7)
