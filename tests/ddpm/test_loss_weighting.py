"""Losses weighted by timestep: the paper's table, one loss whatever is predicted, batches that may be split."""

import pytest
import torch
from golden import GOLDEN_SEED, golden_normal

from config.schema.diffusion import LOSS_WEIGHTINGS as KNOWN_TO_CONFIG
from ddpm.diffusion import GaussianDiffusion
from ddpm.predictions import LOSS_WEIGHTINGS, PREDICTIONS, error_factors, target
from ddpm.schedule import cosine_betas, noise_schedule

SCHEDULE = noise_schedule(cosine_betas(1000))
SHAPE = (4, 2, 4, 4, 4)
TIMES = torch.tensor([0, 200, 600, 990])


def normal(name):
    return golden_normal(GOLDEN_SEED, name, SHAPE)


def snr(t):
    abar = SCHEDULE.log_alphas_cumprod()[t + 1].exp().item()
    return abar / (1 - abar)


def loss_of(prediction, weighting, loss_type):
    """The loss where x_0 is predicted 0.1 too high everywhere, in terms of what is predicted."""
    x_start, noise, t = normal("x0").clamp(-1, 1), normal("noise"), TIMES
    x_t = SCHEDULE.q_sample(x_start, t, noise)
    signal, sigma = (table[t].reshape(-1, 1, 1, 1, 1) for table in (SCHEDULE[3], SCHEDULE[4]))
    wrong = x_start + 0.1
    wrong_noise = ((x_t.double() - signal * wrong) / sigma).float()
    output = target(prediction, SCHEDULE, wrong, t, wrong_noise)
    diffusion = GaussianDiffusion(2, loss_type=loss_type, prediction=prediction, loss_weighting=weighting)
    return diffusion.p_losses(lambda x, t: output, x_start, t, noise=noise).item()


def test_the_configuration_knows_every_weighting():
    assert KNOWN_TO_CONFIG == LOSS_WEIGHTINGS


def test_weights_of_squared_errors_are_those_of_the_paper():
    """Hang et al. 2023, section 3.4, gamma 5."""
    for t in (0, 100, 300, 500, 700, 900, 999):
        ratio = snr(t)
        expected = {"noise": min(ratio, 5) / ratio, "v": min(ratio, 5) / (ratio + 1), "x0": min(ratio, 5)}
        for prediction, weight in expected.items():
            squared = error_factors("min_snr", prediction, SCHEDULE)[t].item() ** 2
            assert squared == pytest.approx(weight, rel=1e-5), (t, prediction)
        assert error_factors("x0", "v", SCHEDULE)[t].item() ** 2 == pytest.approx(1 / (ratio + 1), rel=1e-5)
        assert error_factors("x0", "x0", SCHEDULE)[t].item() == 1
    assert snr(100) > 5 > snr(500)  # both sides of the limit


@pytest.mark.parametrize(("loss_type", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("weighting", ["min_snr", "x0"])
def test_a_weighted_loss_is_the_same_whatever_is_predicted(weighting, loss_type, power):
    weights = [min(snr(t), 5) ** (power / 2) if weighting == "min_snr" else 1 for t in TIMES.tolist()]
    expected = 0.1**power * sum(weights) / 4
    for prediction in PREDICTIONS[weighting == "x0" :]:
        assert loss_of(prediction, weighting, loss_type) == pytest.approx(expected, rel=1e-3), prediction


@pytest.mark.parametrize("weighting", ["min_snr", "x0"])
def test_two_halves_of_a_batch_are_the_whole(weighting):
    """As two processes have them: no weight depends on the batch that it is in."""
    diffusion, x_start, noise = (
        GaussianDiffusion(2, prediction="v", loss_weighting=weighting),
        normal("x0"),
        normal("n"),
    )

    def loss(places):
        return diffusion.p_losses(lambda x, t: 0 * x, x_start[places], TIMES[places], noise=noise[places]).item()

    halves = [loss(slice(0, 2)), loss(slice(2, 4))]
    assert sum(halves) / 2 == pytest.approx(loss(slice(None)), rel=1e-5)
    assert halves[0] != pytest.approx(halves[1], rel=0.1)


def test_without_weighting_nothing_is_multiplied():
    diffusion = GaussianDiffusion(2)
    assert error_factors("none", "noise", SCHEDULE) is diffusion.error_factors is None
    assert "error_factors" not in GaussianDiffusion(2, loss_weighting="min_snr").state_dict()


def test_mistakes():
    with pytest.raises(ValueError, match="loss_weighting is 'snr': choose one of none, min_snr, x0"):
        GaussianDiffusion(2, loss_weighting="snr")
    with pytest.raises(ValueError, match="use prediction 'v' or 'x0' with it, or 'min_snr'"):
        GaussianDiffusion(2, loss_weighting="x0")
