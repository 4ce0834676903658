"""The multistep solvers against known answers: a Gaussian, a point mass; and what every sampler has to keep to."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import GOLDEN_SEED, golden_normal
from torch import nn

from common.errors import UserError
from config.loading import CONFIG_FOLDER, load_config
from config.schema.diffusion import SAMPLING_STRATEGIES, GenerationConfig
from ddpm.diffusion import GaussianDiffusion
from ddpm.samplers import SAMPLERS, get_sampler
from ddpm.schedule import cosine_betas, noise_schedule, trailing_timesteps
from ddpm.solvers import _scheduler, dpm_solver, unipc

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = noise_schedule(cosine_betas(1000))
SHORT = noise_schedule(cosine_betas(20))
SHAPE = (2, 3, 4, 4, 4)
SOLVERS = {"dpm++": dpm_solver, "unipc": unipc}
CLASSES = {"dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
STD = 0.5

each_solver = pytest.mark.parametrize("strategy", SOLVERS)


def normal(name, shape=SHAPE):
    return golden_normal(GOLDEN_SEED, name, shape)


def unlimited(x_start):
    return x_start


def gaussian_oracle(x, t):
    """The noise to expect in x where the data are normal with mean 0 and standard deviation STD."""
    abar = SCHEDULE.log_alphas_cumprod()[t + 1].exp().reshape(-1, 1, 1, 1, 1)  # float64
    return ((1 - abar).sqrt() * x.double() / (abar * STD**2 + 1 - abar)).float()


def point_oracle(x_start, schedule):
    """The denoiser of data that are x_start and nothing else."""

    def denoise(x, t):
        abar = schedule.log_alphas_cumprod()[t + 1].exp().reshape(-1, 1, 1, 1, 1)
        return ((x.double() - abar.sqrt() * x_start) / (1 - abar).sqrt()).float()

    return denoise


def toy_denoiser(x, t):
    return 0.9 * x + 0.05 * torch.sin(3 * x) + 0.3 * torch.cos(t.reshape(-1, 1, 1, 1, 1) / 100)


# ------------------------------------------------------------------------------------------------------- known answers


def relative_error(strategy: str, steps: int) -> float:
    """Of the standard deviation that noise of one ends up with. The flow of a Gaussian scales each voxel alike."""
    z = normal("z", (1, 1, 8, 8, 8))
    diffusion = GaussianDiffusion(1)
    x = diffusion.sample(gaussian_oracle, z, strategy=strategy, ddim_steps=steps, clip_denoised=False)
    scale = (x / z).median().item()
    torch.testing.assert_close(x, scale * z, rtol=1e-3, atol=1e-5)
    return scale / STD - 1


@pytest.mark.parametrize(("strategy", "expected"), [("ddim", -0.0758), ("dpm++", -0.0030), ("unipc", -0.0034)])
def test_twenty_steps_to_a_gaussian(strategy, expected):
    assert relative_error(strategy, 20) == pytest.approx(expected, abs=2e-4)


@each_solver
def test_the_error_falls_faster_than_that_of_a_first_order_sampler(strategy):
    errors = [abs(relative_error(strategy, steps)) for steps in (5, 10, 20)]
    first_order = [abs(relative_error("ddim", steps)) for steps in (5, 10, 20)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert all(error < other for error, other in zip(errors, first_order, strict=True))
    assert first_order[0] < 2 * first_order[1] < 4 * first_order[2]


@each_solver
def test_all_timesteps_to_a_gaussian(strategy):
    assert relative_error(strategy, 1000) == pytest.approx(0, abs=2e-4)


@each_solver
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_point_mass_is_recovered(strategy, steps):
    target = normal("x0").clamp(-1, 1)
    result = SOLVERS[strategy](point_oracle(target, SCHEDULE), normal("z"), SCHEDULE, steps=steps)
    # One step from pure noise divides float32 rounding by sqrt(abar_999) = 5e-5.
    torch.testing.assert_close(result, target, rtol=0, atol=2e-2 if steps == 1 else 1e-4)


# -------------------------------------------------------------------------------------------------- steps and timesteps


@each_solver
@pytest.mark.parametrize("steps", range(1, 21))
def test_every_number_of_steps(strategy, steps):
    seen, progress = [], []

    def denoise(x, t):
        assert t.dtype == torch.long
        assert t.shape == (2,)
        assert t[0] == t[1]
        seen.append(int(t[0]))
        return toy_denoiser(x, t)

    result = SOLVERS[strategy](
        denoise, normal("z"), SHORT, steps=steps, progress=lambda *step: progress.append(step)
    )  # fmt: skip
    assert result.isfinite().all()
    assert result.shape == SHAPE
    assert seen == trailing_timesteps(20, steps)
    assert progress == [(done, steps) for done in range(1, steps + 1)]


def test_timesteps_fall_from_the_last_for_every_number_of_steps():
    for steps in range(1, 1001):
        timesteps = trailing_timesteps(1000, steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0
        assert all(before > after for before, after in zip(timesteps, timesteps[1:], strict=False))


@each_solver
@pytest.mark.parametrize("steps", [1, 2, 14, 15, 61, 103, 121, 999, 1000])
def test_the_scheduler_goes_through_our_noise_levels(strategy, steps):
    """61, 103, 121: diffusers' own trailing timesteps end at -1 there."""
    timesteps = trailing_timesteps(1000, steps)
    scheduler = _scheduler(CLASSES[strategy], SCHEDULE, timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    assert scheduler.num_inference_steps == steps
    assert scheduler.sigmas.shape == (steps + 1,)
    assert scheduler.sigmas[-1] == 0
    x_0, noise = torch.tensor([[[0.3]]]), torch.tensor([[[-0.8]]])
    x = SCHEDULE.q_sample(x_0, torch.tensor([999]), noise)
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        x = scheduler.step(x_0, timestep, x).prev_sample  # with the true x_0 each step is exact
        expected = x_0 if following is None else SCHEDULE.q_sample(x_0, torch.tensor([following]), noise)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    assert scheduler.step_index == steps


# ------------------------------------------------------------------------------------------ what every sampler keeps to


@each_solver
def test_an_error_at_the_first_step_is_clipped(strategy):
    def denoise(x, t):
        return x + torch.where(t == 999, 0.1, 0.0).reshape(-1, 1, 1, 1, 1)  # x_0 is off by 0.1 / 5e-5

    starts = []

    def limit(x_start):
        starts.append(x_start.abs().max().item())
        return x_start.clamp(-1, 1)

    result = SOLVERS[strategy](denoise, normal("z"), SCHEDULE, limit, steps=10)
    assert starts[0] > 100
    assert result.abs().max() <= 1
    free = SOLVERS[strategy](denoise, normal("z"), SCHEDULE, unlimited, steps=10)
    assert free.abs().max() > 1


@each_solver
def test_dynamic_thresholding_goes_through(strategy):
    kinds = [GaussianDiffusion(3, timesteps=20, use_dynamic_thres=dynamic) for dynamic in (False, True)]
    clipped, scaled = (
        kind.sample(lambda x, t: 0.1 * x, normal("z"), strategy=strategy, ddim_steps=4) for kind in kinds
    )
    assert scaled.abs().max() <= 1
    assert (clipped - scaled).abs().max() > 0.1


@each_solver
def test_batch_of_two_equals_two_batches_of_one(strategy):
    z = normal("z")
    both = SOLVERS[strategy](toy_denoiser, z, SCHEDULE, steps=20)
    single = [SOLVERS[strategy](toy_denoiser, sample[None], SCHEDULE, steps=20) for sample in z]
    torch.testing.assert_close(both, torch.cat(single), rtol=0, atol=1e-6)


@each_solver
def test_nothing_is_drawn(strategy):
    state = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    before = [generator.get_state() for generator in generators]
    runs = [
        SOLVERS[strategy](toy_denoiser, normal("z"), SHORT, generator=generator, steps=5)
        for generator in (None, generators)
    ]
    assert torch.equal(*runs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(generator.get_state(), old) for generator, old in zip(generators, before, strict=True))


class ClassDenoiser(nn.Module):
    """Noise that depends on the class; class 7 is the null label."""

    null_label = 7

    def forward(self, x, t, y=None, res=None):
        return 0.9 * x + 0.02 * y.reshape(-1, 1, 1, 1, 1)

    def drop_conditions(self, conditions, is_dropped):
        return {**conditions, "y": conditions["y"].masked_fill(is_dropped, self.null_label)}


@each_solver
def test_guidance_goes_through(strategy):
    diffusion, y = GaussianDiffusion(3, timesteps=20), torch.tensor([1, 2])
    guided = diffusion.sample(ClassDenoiser(), normal("z"), y, cond_scale=3.0, strategy=strategy, ddim_steps=6)
    by_hand = (0.14 + 3 * (0.02 * y - 0.14)).reshape(2, 1, 1, 1, 1)  # eps_null + s (eps_y - eps_null)
    expected = SOLVERS[strategy](lambda x, t: 0.9 * x + by_hand, normal("z"), SHORT, steps=6)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-4)


@each_solver
def test_sample_runs_the_solver_it_names(strategy):
    diffusion, z = GaussianDiffusion(3, timesteps=20), normal("z")
    result = diffusion.sample(toy_denoiser, z, strategy=strategy, ddim_steps=6)
    assert torch.equal(result, SOLVERS[strategy](toy_denoiser, z, SHORT, steps=6))
    other = next(name for name in SOLVERS if name != strategy)
    assert not torch.equal(result, SOLVERS[other](toy_denoiser, z, SHORT, steps=6))


@pytest.mark.parametrize("strategy", SAMPLERS)
def test_clipping_can_be_turned_off(strategy):
    results = [
        GaussianDiffusion(3, timesteps=20).sample(
            lambda x, t: 0.0 * x, normal("z"), strategy=strategy, ddim_steps=5, clip_denoised=clip
        )
        for clip in (True, False)
    ]
    assert results[0].abs().max() <= 1 < results[1].abs().max()


# ------------------------------------------------------------------------------------------------- options and packages


def test_the_configuration_knows_every_sampler():
    assert set(SAMPLING_STRATEGIES) == set(SAMPLERS)
    with_steps = {name for name in SAMPLERS if "ddim_steps" in get_sampler(name).options}
    assert with_steps == set(SAMPLERS) - {"ddpm"}  # config/validation.py bounds ddim_steps for these


@each_solver
def test_eta_has_no_effect_and_says_so(strategy):
    with pytest.warns(UserWarning, match="eta has no effect with the sampling strategy"):
        GaussianDiffusion(3, timesteps=20).sample(toy_denoiser, normal("z"), strategy=strategy, ddim_steps=2, eta=0.5)


@each_solver
@pytest.mark.parametrize("steps", [0, 21])
def test_steps_out_of_range(strategy, steps):
    with pytest.raises(ValueError, match="between 1 and the 20 timesteps"):
        GaussianDiffusion(3, timesteps=20).sample(toy_denoiser, normal("z"), strategy=strategy, ddim_steps=steps)


@each_solver
def test_without_diffusers_one_line_says_what_to_install(strategy, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="need the package diffusers: pip install -r requirements.txt") as caught:
        SOLVERS[strategy](toy_denoiser, normal("z"), SHORT, steps=2)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("config.validation.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package diffusers"):
        load_config(GenerationConfig, CONFIG_FOLDER / "generation_8x.yaml", [f"sampling_strategy={strategy}"])
    load_config(GenerationConfig, CONFIG_FOLDER / "generation_8x.yaml", ["sampling_strategy=ddim"])


def test_the_models_and_the_other_samplers_do_without_diffusers():
    code = (
        "import sys, torch\nsys.modules['diffusers'] = None\n"
        "from ddpm.BiFlowNet import BiFlowNet, GaussianDiffusion\nfrom ddpm.samplers import SAMPLERS\n"
        "diffusion = GaussianDiffusion(1, timesteps=4)\n"
        "for strategy in ('ddpm', 'ddim'):\n"
        "    diffusion.sample(lambda x, t: x, torch.zeros(1, 1, 2, 2, 2), strategy=strategy, ddim_steps=2)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
