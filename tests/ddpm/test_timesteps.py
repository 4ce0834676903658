"""How timesteps are drawn: their distribution, and that each is its sample's own."""

import pytest
import torch

from config.schema.diffusion import TIMESTEP_DRAWS as KNOWN_TO_CONFIG
from ddpm.diffusion import GaussianDiffusion
from ddpm.timesteps import TIMESTEP_DRAWS, draw_fractions


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_configuration_knows_every_draw():
    assert KNOWN_TO_CONFIG == TIMESTEP_DRAWS


def test_logit_normal_fractions_are_normal_before_the_sigmoid():
    normal = draw_fractions("logit_normal", generators(range(4000))).logit()
    assert normal.dtype == torch.float64
    assert normal.mean().item() == pytest.approx(0, abs=0.06)
    assert normal.std().item() == pytest.approx(1, abs=0.05)
    quarter = torch.tensor(-0.6744897501960817)  # of the normal distribution
    assert (normal < quarter).double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_uniform_fractions_are_uniform():
    drawn = draw_fractions("uniform", generators(range(2000)))
    assert torch.bincount((10 * drawn).long()).tolist() == pytest.approx([200] * 10, abs=60)


@pytest.mark.parametrize("draw", TIMESTEP_DRAWS)
def test_each_timestep_is_of_its_samples_own_generator(draw):
    """So two processes draw what one does."""
    diffusion = GaussianDiffusion(2, timesteps=1000, timestep_draw=draw)
    whole = diffusion.draw_timesteps(generators(range(20)))
    assert whole.dtype == torch.int64
    assert 0 <= whole.min() < whole.max() < 1000
    halves = [diffusion.draw_timesteps(generators(seeds)) for seeds in (range(10), range(10, 20))]
    assert torch.equal(torch.cat(halves), whole)


def test_logit_normal_timesteps_are_shares_of_all():
    drawn = GaussianDiffusion(2, timesteps=50, timestep_draw="logit_normal").draw_timesteps(generators(range(500)))
    assert torch.equal(drawn, (50 * draw_fractions("logit_normal", generators(range(500)))).long())
    assert ((drawn >= 10) & (drawn < 40)).float().mean().item() == pytest.approx(0.834, abs=0.05)  # within logit 0.8


def test_another_draw_is_refused():
    with pytest.raises(ValueError, match="timestep_draw is 'cosine': choose one of uniform, logit_normal"):
        GaussianDiffusion(2, timestep_draw="cosine")
