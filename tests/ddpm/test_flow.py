"""Rectified flow: the shift by size, Euler's steps, a velocity that is known, losses and guidance."""

import math

import pytest
import torch
from golden import GOLDEN_SEED, golden_normal

from config.schema.diffusion import FLOW_STRATEGIES
from ddpm.flow import FLOW_SAMPLERS, RectifiedFlow, euler_times, shift_time, size_ratio
from ddpm.process import find_sampler

SHAPE = (2, 3, 4, 4, 4)
FLOW = RectifiedFlow(3)


def normal(name, shape=SHAPE):
    return golden_normal(GOLDEN_SEED, name, shape)


def test_the_configuration_knows_every_sampler():
    assert list(FLOW_STRATEGIES) == list(FLOW_SAMPLERS) == ["euler"]
    assert find_sampler("euler") is FLOW_SAMPLERS["euler"]


# ------------------------------------------------------------------------------------------------------ times and steps


def test_the_shift_is_the_formula():
    for grid, ratio in (((32, 32, 32), 1.0), ((64, 64, 64), 2.0), ((8, 8, 8), 0.25), ((32, 32, 64), 2 ** (1 / 3))):
        assert size_ratio(torch.empty(2, 1, *grid, device="meta")) == pytest.approx(ratio, rel=1e-12)
        t = torch.linspace(0, 1, 11, dtype=torch.float64)
        expected = torch.tensor([ratio * x / (1 + (ratio - 1) * x) for x in t.tolist()], dtype=torch.float64)
        torch.testing.assert_close(shift_time(t, ratio), expected, rtol=1e-12, atol=0)
    assert shift_time(torch.tensor([0.5]), 2.0).item() == pytest.approx(2 / 3)  # larger grids: more noise


@pytest.mark.parametrize("steps", [1, 7, 10, 25, 30, 1000])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 8 / 3, 16.0])
def test_steps_sum_to_exactly_one(steps, ratio):
    times = euler_times(steps, ratio)
    assert (times.dtype, times[0], times[-1], len(times)) == (torch.float64, 1, 0, steps + 1)
    sizes = (times[:-1] - times[1:]).tolist()
    assert min(sizes) > 0
    assert sum(sizes) == math.fsum(sizes) == sum(sorted(sizes)) == 1
    float32 = torch.tensor(0.0)
    for size in sizes:
        float32 = float32 + size
    assert float32.item() == 1
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(times, shift_time(even, ratio), rtol=0, atol=2**-25)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("steps", [1, 10, 30])
def test_data_that_are_a_point_are_reached_in_any_number_of_steps(steps):
    """Their velocity is (x - x_0) / t: the lines are straight."""
    target, progress = normal("x0"), []
    assert target.abs().max() > 1.5  # nothing is clipped
    found = FLOW.sample(
        lambda x, t: (x - target) / (t / 1000).reshape(-1, 1, 1, 1, 1), normal("z"), ddim_steps=steps,
        progress=lambda *step: progress.append(step),
    )  # fmt: skip
    torch.testing.assert_close(found, target, rtol=0, atol=1e-5)
    assert progress == [(done, steps) for done in range(1, steps + 1)]


def gaussian(mean, std):
    """The expected velocity for data of N(mean, std²) in each voxel: E[noise - x_0 | x_t]."""

    def velocity(x, t, y=None):
        t = (t / 1000).double().reshape(-1, 1, 1, 1, 1)
        center = mean if y is None else mean * y.reshape(-1, 1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        return ((x - (1 - t) * center) * (t - (1 - t) * std**2) / variance - center).float()

    return velocity


@pytest.mark.parametrize("grid", [(8, 8, 8), (32, 32, 32)])
def test_a_gaussian_gets_its_moments(grid):
    """Each voxel keeps its quantile: noise z ends at mean + std z. The error falls as 1 / steps."""
    z, flow = normal("z", (1, 1, *grid)), RectifiedFlow(1)
    errors = []
    for steps in (100, 400):
        found = flow.sample(gaussian(0.3, 0.5), z, ddim_steps=steps)
        assert found.mean().item() == pytest.approx(0.3 + 0.5 * z.mean().item(), abs=5e-3)
        errors.append(found.std().item() / (0.5 * z.std().item()) - 1)
    assert abs(errors[0]) < 0.03
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    # Euler's factor is known: with x - mean(t) as the state, each step multiplies by 1 - dt v'(t).
    times, factor = euler_times(100, size_ratio(z)).tolist(), 1.0
    for now, following in zip(times, times[1:], strict=False):
        factor *= 1 - (now - following) * (now - (1 - now) * 0.25) / ((1 - now) ** 2 * 0.25 + now**2)
    exact = flow.sample(gaussian(0.0, 0.5), z, ddim_steps=100)
    torch.testing.assert_close(exact, factor * z, rtol=1e-4, atol=1e-5)


def test_each_sample_is_as_alone_and_nothing_is_drawn():
    state = torch.get_rng_state()
    both = FLOW.sample(gaussian(0.1, 0.5), normal("z"))
    alone = [FLOW.sample(gaussian(0.1, 0.5), sample[None]) for sample in normal("z")]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


class Guided:
    null_label = 2
    calls = 0

    def __call__(self, x, t, y):
        self.calls += 1
        return y.reshape(-1, 1, 1, 1, 1) * torch.ones_like(x)

    def drop_conditions(self, conditions, is_dropped):
        return {"y": conditions["y"].masked_fill(is_dropped, self.null_label)}


def test_guidance_of_the_velocity():
    z, y, denoiser = normal("z"), torch.tensor([0, 1]), Guided()
    found = FLOW.sample(denoiser, z, y, cond_scale=3.0, ddim_steps=10)
    velocity = (2 + 3 * (y - 2)).reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(found, z - velocity, rtol=0, atol=1e-5)  # a constant velocity: the steps sum to 1
    assert denoiser.calls == 10


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("loss_type", "expected"), [("l1", 0.5), ("l2", 0.25)])
def test_the_loss_is_of_the_velocity_at_the_shifted_time(loss_type, expected):
    x_start, noise, t = normal("x0"), normal("noise"), torch.tensor([0.3, 0.9], dtype=torch.float64)
    seen = []

    def denoiser(x, time):
        seen.append((x, time))
        return noise - x_start + 0.5

    loss = RectifiedFlow(3, loss_type=loss_type).p_losses(denoiser, x_start, t, noise=noise)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    ((x, time),) = seen
    ratio = 4 / 32
    shifted = [ratio * value / (1 + (ratio - 1) * value) for value in (0.3, 0.9)]
    assert time.dtype == x.dtype == torch.float32
    assert time.tolist() == pytest.approx([1000 * value for value in shifted])
    for place, value in enumerate(shifted):
        torch.testing.assert_close(x[place], (1 - value) * x_start[place] + value * noise[place], rtol=0, atol=1e-6)


def test_two_halves_of_a_batch_are_the_whole():
    """As two processes have them."""
    flow, x_start = RectifiedFlow(3, timestep_draw="logit_normal"), normal("x0", (4, 3, 4, 4, 4))

    def loss(places):
        generators = [torch.Generator().manual_seed(place) for place in places]
        t = flow.draw_timesteps(generators)
        noise = torch.stack([torch.randn((3, 4, 4, 4), generator=generator) for generator in generators])
        return flow.p_losses(lambda x, t: x.sin(), x_start[places], t, noise=noise).item()

    assert (loss([0, 1]) + loss([2, 3])) / 2 == pytest.approx(loss([0, 1, 2, 3]), rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ddim"}, "'ddim' is not one of a flow: use euler"),
        ({"strategy": "ddpm"}, "'ddpm' is not one of a flow: use euler"),
        ({"eta": 0.5}, "eta is 0.5: a flow draws no noise"),
        ({"ddim_steps": 0}, "ddim_steps is 0: a flow takes at least 1 step"),
        ({"z": torch.zeros(1, 2, 4, 4, 4)}, r"z has shape .* expected \(B, 3, d, h, w\)"),
        ({"cond_scale": 2.0}, "no class ids"),
    ],
)
def test_what_sampling_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FLOW.sample(gaussian(0.0, 1.0), **{"z": normal("z"), **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "at least 1"),
        ({"channels": 1, "loss_type": "huber"}, "choose one of l1, l2"),
        ({"channels": 1, "timestep_draw": "cosine"}, "choose one of uniform, logit_normal"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlow(**arguments)
