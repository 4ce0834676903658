"""What the network predicts: conversions against their definitions, and samplers that end at the same samples."""

import pytest
import torch
from golden import GOLDEN_SEED, golden_normal

from config.schema.diffusion import PREDICTIONS as KNOWN_TO_CONFIG
from ddpm.diffusion import GaussianDiffusion
from ddpm.predictions import PREDICTIONS, implied_noise, target
from ddpm.samplers import SAMPLERS
from ddpm.schedule import cosine_betas, noise_schedule, trailing_timesteps

SCHEDULE = noise_schedule(cosine_betas(1000))
SHAPE = (2, 3, 4, 4, 4)
MEAN, STD = 0.1, 0.2  # of the toy data
OTHERS = ("v", "x0")

each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def normal(name, shape=SHAPE):
    return golden_normal(GOLDEN_SEED, name, shape)


def every_timestep():
    """x_0, noise and x_t (T, 8) at all timesteps t (T,)."""
    t = torch.arange(1000)
    x_start, noise = normal("x0", (1000, 8)).clamp(-1, 1), normal("noise", (1000, 8))
    return x_start, noise, SCHEDULE.q_sample(x_start, t, noise), t


def perfect(prediction, x, t, schedule=SCHEDULE, mean=MEAN):
    """The expectation of what is predicted, for data of N(mean, STD²) in each voxel: its posterior mean given x_t."""
    abar = torch.exp(schedule.log_alphas_cumprod())[t + 1].reshape(-1, 1, 1, 1, 1)
    noise_variance = -torch.expm1(schedule.log_alphas_cumprod())[t + 1].reshape(-1, 1, 1, 1, 1)
    x, signal, variance = x.double(), abar.sqrt(), abar * STD**2 + noise_variance
    noise = noise_variance.sqrt() * (x - signal * mean) / variance
    x_start = mean + signal * STD**2 * (x - signal * mean) / variance
    return {"noise": noise, "x0": x_start, "v": signal * noise - noise_variance.sqrt() * x_start}[prediction].float()


def test_the_configuration_knows_every_prediction():
    assert KNOWN_TO_CONFIG == PREDICTIONS


# ---------------------------------------------------------------------------------------------------------- conversions


def test_targets_are_those_of_the_paper():
    x_start, noise, x_t, t = every_timestep()
    assert target("noise", SCHEDULE, x_start, t, noise) is noise
    assert target("x0", SCHEDULE, x_start, t, noise) is x_start
    v = target("v", SCHEDULE, x_start, t, noise).double()
    log_abar = SCHEDULE.log_alphas_cumprod()[1:]
    signal, sigma = log_abar.exp().sqrt(), (-torch.expm1(log_abar)).sqrt()  # float64
    torch.testing.assert_close(v, signal[:, None] * noise - sigma[:, None] * x_start, rtol=0, atol=1e-6)
    rotated = signal[:, None] * x_t - sigma[:, None] * v  # Salimans & Ho, appendix D: x_0 = alpha z - sigma v
    torch.testing.assert_close(rotated, x_start.double(), rtol=0, atol=2e-6)


@each_prediction
def test_the_noise_of_a_target_is_the_noise_at_every_timestep(prediction):
    x_start, noise, x_t, t = every_timestep()
    found = implied_noise(prediction, SCHEDULE, x_t, t, target(prediction, SCHEDULE, x_start, t, noise))
    # At timestep 0 the noise is 6e-3 of x_t: rounding of x_t in float32 counts 150 times.
    torch.testing.assert_close(found.float(), noise, rtol=0, atol=6e-5)
    torch.testing.assert_close(found[50:].float(), noise[50:], rtol=0, atol=4e-6)


@pytest.mark.parametrize("prediction", OTHERS)
def test_the_start_survives_its_way_through_the_noise_at_every_timestep(prediction):
    """Where sqrt(abar) is 5e-5 too; noise in float32 loses two digits of x_0 there."""
    x_start, noise, x_t, t = every_timestep()
    output = target(prediction, SCHEDULE, x_start, t, noise)
    implied = implied_noise(prediction, SCHEDULE, x_t, t, output)
    found = SCHEDULE.predict_start_from_noise(x_t, t, implied)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x_start, rtol=0, atol=1e-6)
    rounded = SCHEDULE.predict_start_from_noise(x_t, t, implied.float())
    assert (rounded - x_start)[-1].abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("prediction", OTHERS)
@pytest.mark.parametrize("strategy", SAMPLERS)
def test_perfect_predictors_of_each_kind_end_at_the_same_samples(strategy, prediction):
    z, timesteps = normal("z"), 50
    schedule = noise_schedule(cosine_betas(timesteps))
    ends = []
    for kind in ("noise", prediction):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        diffusion = GaussianDiffusion(3, timesteps, prediction=kind)
        options = {"strategy": strategy, "ddim_steps": 10, "generator": generators}
        ends.append(diffusion.sample(lambda x, t, kind=kind: perfect(kind, x, t, schedule), z, **options))
    assert ends[0].dtype == ends[1].dtype == torch.float32
    torch.testing.assert_close(*ends, rtol=0, atol=2e-4)
    assert ends[0].std() > 0.5 * STD


@pytest.mark.parametrize("prediction", OTHERS)
def test_one_step_from_the_last_timestep_is_exact(prediction):
    """From pure noise, where predicted noise says nothing of x_0: data that are one point are found all the same."""
    x_start = normal("x0").clamp(-1, 1)

    def oracle(x, t):
        signal, sigma = (table[t].reshape(-1, 1, 1, 1, 1).double() for table in (SCHEDULE[3], SCHEDULE[4]))
        v = signal * (x - signal * x_start) / sigma - sigma * x_start
        return {"x0": x_start, "v": v.float()}[prediction]

    found = GaussianDiffusion(3, prediction=prediction).sample(oracle, normal("z"), strategy="ddim", ddim_steps=1)
    torch.testing.assert_close(found, x_start, rtol=0, atol=2e-6)


@each_prediction
def test_predicted_starts_are_limited_whatever_is_predicted(prediction):
    schedule = noise_schedule(cosine_betas(20))
    options = {"strategy": "ddim", "ddim_steps": 5}
    ends = [
        GaussianDiffusion(3, 20, prediction=prediction).sample(
            lambda x, t: perfect(prediction, x, t, schedule, mean=3.0), normal("z"), clip_denoised=clip, **options
        )
        for clip in (True, False)
    ]
    assert ends[0].max() == 1
    assert ends[1].mean() == pytest.approx(3, abs=0.1)


class Guided:
    """A perfect predictor of two classes with other means; the null label has a third."""

    null_label, means = 2, torch.tensor([-0.2, 0.2, 0.0])

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, x, t, y):
        return perfect(self.prediction, x, t, mean=self.means[y].reshape(-1, 1, 1, 1, 1))

    def drop_conditions(self, conditions, is_dropped):
        return {"y": conditions["y"].masked_fill(is_dropped, self.null_label)}


@pytest.mark.parametrize("prediction", OTHERS)
def test_guidance_of_the_output_is_guidance_of_the_noise(prediction):
    y, t = torch.tensor([0, 1]), torch.tensor([3, 996])
    x = normal("z")
    means = [
        GaussianDiffusion(3, prediction=kind).p_mean_variance(Guided(kind), x, t, y, cond_scale=3.0)[0]
        for kind in ("noise", prediction)
    ]
    torch.testing.assert_close(*means, rtol=0, atol=2e-5)
    unguided = GaussianDiffusion(3, prediction=prediction).p_mean_variance(Guided(prediction), x, t, y)[0]
    assert (means[1] - unguided)[0].abs().max() > 1e-4


@each_prediction
def test_interpolation_of_a_point(prediction):
    schedule = noise_schedule(cosine_betas(50))
    oracle = {"x0": lambda x, t: torch.full_like(x, 0.25)}
    oracle["noise"] = lambda x, t: (
        (x - schedule.sqrt_alphas_cumprod[t].reshape(-1, 1, 1, 1, 1) * 0.25)
        / schedule.sqrt_one_minus_alphas_cumprod[t].reshape(-1, 1, 1, 1, 1)
    )
    oracle["v"] = lambda x, t: target("v", schedule, oracle["x0"](x, t), t, oracle["noise"](x, t))
    middle = GaussianDiffusion(3, 50, prediction=prediction).interpolate(oracle[prediction], normal("x1"), normal("x2"))
    torch.testing.assert_close(middle, torch.full(SHAPE, 0.25), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- losses


@each_prediction
def test_the_loss_is_that_of_what_is_predicted(prediction):
    x_start, noise, t = normal("x0").clamp(-1, 1), normal("noise"), torch.tensor([7, 800])
    diffusion = GaussianDiffusion(3, loss_type="l2", prediction=prediction)
    for error in (0.0, 0.5):
        wanted = target(prediction, SCHEDULE, x_start, t, noise) + error
        loss = diffusion.p_losses(lambda x, t, wanted=wanted: wanted, x_start, t, noise=noise)
        assert loss.item() == pytest.approx(error**2, rel=1e-5)


def test_another_prediction_is_refused():
    with pytest.raises(ValueError, match="prediction is 'eps': choose one of noise, v, x0"):
        GaussianDiffusion(3, prediction="eps")


def test_few_steps_begin_where_the_signal_is_almost_none():
    """What the tests above rely on."""
    assert trailing_timesteps(1000, 1) == [999]
    assert SCHEDULE.sqrt_alphas_cumprod[999].item() < 1e-4
