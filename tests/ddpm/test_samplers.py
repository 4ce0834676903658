"""Samplers against known answers: oracles that know the noise, the DDIM identity, the posterior variance."""

import pytest
import torch
from golden import GOLDEN_SEED, golden_normal

from ddpm import samplers
from ddpm.diffusion import GaussianDiffusion
from ddpm.schedule import clip_start, cosine_betas, noise_schedule, trailing_timesteps

SCHEDULE = noise_schedule(cosine_betas(1000))
SHORT = noise_schedule(cosine_betas(20))
SHAPE = (2, 3, 4, 4, 4)


def normal(name, shape=SHAPE):
    return golden_normal(GOLDEN_SEED, name, shape)


def rates(schedule, t):
    """sqrt(abar_t) and sqrt(1 - abar_t), broadcast."""
    tables = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    return (table[t].reshape(-1, 1, 1, 1, 1) for table in tables)


def start_oracle(x_start, schedule):
    """The denoiser of data that are x_start and nothing else."""

    def denoise(x, t):
        signal, noise = rates(schedule, t)
        return (x - signal * x_start) / noise

    return denoise


def toy_denoiser(x, t):
    return 0.9 * x + 0.05 * torch.sin(3 * x) + 0.3 * torch.cos(t.reshape(-1, 1, 1, 1, 1) / 100)


# ---------------------------------------------------------------------------------------------------------------- DDIM


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_ddim_reaches_the_target_of_an_oracle(steps, eta):
    target = normal("x0").clamp(-1, 1)
    result = samplers.ddim(start_oracle(target, SCHEDULE), normal("z"), SCHEDULE, steps=steps, eta=eta)
    # One step from pure noise divides float32 rounding by sqrt(abar_999) = 5e-5.
    torch.testing.assert_close(result, target, rtol=0, atol=2e-2 if steps == 1 else 1e-4)


def test_ddim_maps_noise_onto_a_gaussian():
    mean, std = 0.2, 0.15

    def denoise(x, t):  # the exact noise expectation for data of N(mean, std²)
        signal, noise = rates(SCHEDULE, t)
        return noise * (x - signal * mean) / (signal**2 * std**2 + noise**2)

    z = normal("z", (2, 1, 16, 16, 16))
    # The probability flow of a Gaussian is linear: each voxel keeps its quantile. The error falls as 1 / steps.
    for steps, share in ((50, 0.1), (200, 0.03)):
        result = samplers.ddim(denoise, z, SCHEDULE, steps=steps)
        assert result.std().item() == pytest.approx(std * z.std().item(), rel=share)
        torch.testing.assert_close(result, mean + std * z, rtol=0, atol=share * std * z.abs().max().item())


def test_ddim_identity():
    """With the true noise, a deterministic step from any t lands on q_sample of the same noise at t_next."""
    x_start, noise = normal("x0").clamp(-1, 1), normal("noise")
    t, t_next = torch.tensor([900, 40]), torch.tensor([420, 39])
    x = SCHEDULE.q_sample(x_start, t, noise)
    result = samplers.ddim_step(x, t, t_next, noise, SCHEDULE)
    torch.testing.assert_close(result, SCHEDULE.q_sample(x_start, t_next, noise), rtol=0, atol=1e-4)


def test_ddim_direction_belongs_to_the_clipped_start():
    noise, t, t_next = normal("noise"), torch.tensor([600, 600]), torch.tensor([300, 300])
    x = SCHEDULE.q_sample(torch.full(SHAPE, 3.0), t, noise)  # outside the range: x_0 will be clipped to 1
    result = samplers.ddim_step(x, t, t_next, noise, SCHEDULE)
    signal, sigma = rates(SCHEDULE, t)
    direction = (x - signal * 1.0) / sigma
    torch.testing.assert_close(result, SCHEDULE.q_sample(torch.ones(SHAPE), t_next, direction), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_ends_at_the_predicted_start_without_noise(eta):
    calls = []

    def denoise(x, t):
        noise = toy_denoiser(x, t)
        calls.append((x, t, noise))
        return noise

    result = samplers.ddim(denoise, normal("z"), SCHEDULE, steps=10, eta=eta)
    last = SCHEDULE.predict_start_from_noise(*calls[-1]).clamp(-1, 1)
    torch.testing.assert_close(result, last, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 19, 20])
def test_ddim_steps_are_honoured(steps):
    seen = []

    def denoise(x, t):
        assert t.shape == (2,)
        seen.append(int(t[0]))
        return toy_denoiser(x, t)

    progress = []
    samplers.ddim(denoise, normal("z"), SHORT, steps=steps, progress=lambda *step: progress.append(step))
    assert seen[0] == 19
    assert len(seen) == steps
    gaps = [before - after for before, after in zip(seen, [*seen[1:], -1], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1  # even
    assert progress == [(done, steps) for done in range(1, steps + 1)]


def test_few_steps_are_trailing():
    assert trailing_timesteps(1000, 5) == [999, 799, 599, 399, 199]
    assert trailing_timesteps(1000, 1000) == list(reversed(range(1000)))


def test_batch_of_two_equals_two_batches_of_one():
    z = normal("z")
    both = samplers.ddim(toy_denoiser, z, SCHEDULE, steps=20)
    single = [samplers.ddim(toy_denoiser, sample[None], SCHEDULE, steps=20) for sample in z]
    torch.testing.assert_close(both, torch.cat(single), rtol=0, atol=1e-6)


def test_a_step_takes_one_timestep_per_sample():
    x, noise = normal("z"), normal("noise")
    t, t_next = torch.tensor([15, 5]), torch.tensor([9, -1])
    both = samplers.ddim_step(x, t, t_next, noise, SHORT)
    single = [
        samplers.ddim_step(x[i : i + 1], t[i : i + 1], t_next[i : i + 1], noise[i : i + 1], SHORT) for i in (0, 1)
    ]
    torch.testing.assert_close(both, torch.cat(single), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------- eta and the posterior


@pytest.mark.parametrize("timestep", [1, 10, 19])
def test_eta_one_has_the_variance_of_the_posterior(timestep):
    x, noise, t = normal("z"), normal("noise"), torch.tensor([timestep] * 2)
    drawn, results = [], []
    for seed in (0, 1):
        drawn.append(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))
        generator = torch.Generator().manual_seed(seed)
        results.append(samplers.ddim_step(x, t, t - 1, noise, SHORT, eta=1.0, generator=generator))
    sigma = (results[0] - results[1]) / (drawn[0] - drawn[1])
    expected = SHORT.posterior_variance[timestep].sqrt()
    assert sigma.median().item() == pytest.approx(expected.item(), rel=1e-3)


def test_ddim_with_eta_one_and_all_steps_is_ancestral_sampling():
    results = []
    for sampler, options in ((samplers.ancestral, {}), (samplers.ddim, {"steps": 20, "eta": 1.0})):
        generator = torch.Generator().manual_seed(3)
        results.append(sampler(toy_denoiser, normal("z"), SHORT, generator=generator, **options))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_keeps_the_noise_level(eta):
    """What the random noise adds, the direction gives up: total variance stays 1 - abar."""
    shape = (1, 1, 48, 48, 48)
    x_start, noise = torch.zeros(shape), normal("noise", shape)
    t, t_next = torch.tensor([800]), torch.tensor([300])
    x = SCHEDULE.q_sample(x_start, t, noise)
    generator = torch.Generator().manual_seed(0)
    result = samplers.ddim_step(x, t, t_next, noise, SCHEDULE, eta=eta, generator=generator)
    assert result.std().item() == pytest.approx(SCHEDULE.sqrt_one_minus_alphas_cumprod[300].item(), rel=0.01)


# ----------------------------------------------------------------------------------------------------------- ancestral


def test_ancestral_reaches_the_target_of_an_oracle():
    target, progress = normal("x0").clamp(-1, 1), []
    denoise = start_oracle(target, SHORT)
    result = samplers.ancestral(denoise, normal("z"), SHORT, progress=lambda *step: progress.append(step))
    torch.testing.assert_close(result, target, rtol=0, atol=1e-4)
    assert progress == [(done, 20) for done in range(1, 21)]


def test_ancestral_step_takes_one_timestep_per_sample():
    x, noise, t = normal("z"), normal("noise"), torch.tensor([0, 12])
    result = samplers.ancestral_step(x, t, noise, SHORT, clip_start, torch.Generator().manual_seed(0))
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    mean, variance, _ = SHORT.q_posterior(SHORT.predict_start_from_noise(x, t, noise).clamp(-1, 1), x, t)
    torch.testing.assert_close(result[0], mean[0])  # no noise in the last step
    torch.testing.assert_close(result[1], (mean + variance.sqrt() * drawn)[1])


@pytest.mark.parametrize(("sampler", "options"), [(samplers.ancestral, {}), (samplers.ddim, {"steps": 5, "eta": 1.0})])
def test_generator_decides_the_noise_and_leaves_the_global_one_alone(sampler, options):
    state = torch.get_rng_state()
    runs = [
        sampler(toy_denoiser, normal("z"), SHORT, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_deterministic_ddim_draws_nothing():
    state = torch.get_rng_state()
    samplers.ddim(toy_denoiser, normal("z"), SHORT, steps=5)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- the public API


def test_sample_runs_the_sampler_it_names():
    diffusion, z, progress = GaussianDiffusion(3, timesteps=20), normal("z"), []
    result = diffusion.sample(
        toy_denoiser, z, strategy="ddim", ddim_steps=6, eta=0.5, generator=torch.Generator().manual_seed(1),
        progress=lambda *step: progress.append(step),
    )  # fmt: skip
    expected = samplers.ddim(toy_denoiser, z, SHORT, steps=6, eta=0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(result, expected)
    assert len(progress) == 6
    result = diffusion.sample(toy_denoiser, z, generator=torch.Generator().manual_seed(1))
    assert torch.equal(result, samplers.ancestral(toy_denoiser, z, SHORT, generator=torch.Generator().manual_seed(1)))


def test_single_steps_of_the_module_make_up_its_loops():
    diffusion, z = GaussianDiffusion(3, timesteps=4), normal("z")
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    x = z
    for timestep in (3, 2, 1, 0):
        x = diffusion.p_sample(toy_denoiser, x, torch.tensor([timestep] * 2), generator=generators[0])
    torch.testing.assert_close(x, diffusion.p_sample_loop(toy_denoiser, z, generator=generators[1]))
    x = z
    for timestep, following in ((3, 1), (1, -1)):
        x = diffusion.p_sample_ddim(toy_denoiser, x, torch.tensor([timestep] * 2), torch.tensor([following] * 2))
    torch.testing.assert_close(x, diffusion.sample(toy_denoiser, z, strategy="ddim", ddim_steps=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "euler"}, "'euler' is unknown: choose one of ddim, ddpm"),
        ({"strategy": "ddim", "ddim_steps": 0}, "ddim_steps is 0"),
        ({"strategy": "ddim", "ddim_steps": 21}, "between 1 and the 20 timesteps"),
        ({"strategy": "ddim", "ddim_steps": 5, "eta": 1.5}, "eta is 1.5"),
    ],
)
def test_sampling_errors(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(3, timesteps=20).sample(toy_denoiser, normal("z"), **options)


def test_an_option_without_effect_is_pointed_out():
    with pytest.warns(UserWarning, match="eta has no effect with the sampling strategy 'ddpm'"):
        GaussianDiffusion(3, timesteps=2).sample(toy_denoiser, normal("z"), eta=0.5)
