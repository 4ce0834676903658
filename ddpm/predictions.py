"""What a denoiser's output means in the diffusion process: the noise, v, or clean data.

Letters as in ``ddpm/schedule.py``: x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise, and v = sqrt(abar) noise -
sqrt(1 - abar) x_0 (Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section
4 and appendix D). A loss compares the output with ``target``; samplers work on noise, which ``implied_noise`` gives.
``error_factors`` weigh a loss by timesteps.
"""

import torch
from torch import Tensor

from ddpm.schedule import NoiseSchedule, at_timestep

PREDICTIONS = ("noise", "v", "x0")
LOSS_WEIGHTINGS = ("none", "min_snr", "x0")
LARGEST_SNR = 5.0  # gamma of Hang et al.


def target(prediction: str, schedule: NoiseSchedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the denoiser should predict for x_t of x_start and noise (B, ...) at timesteps t (B,), like x_start."""
    if prediction == "noise":
        return noise
    if prediction == "x0":
        return x_start
    signal = at_timestep(schedule.sqrt_alphas_cumprod, t, x_start)
    return signal * noise - at_timestep(schedule.sqrt_one_minus_alphas_cumprod, t, x_start) * x_start


def implied_noise(prediction: str, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """The noise in x_t (B, ...) at timesteps t (B,) by the denoiser's output; a prediction of noise as it is.

    Otherwise in float64, and exactly the noise of which ``NoiseSchedule.predict_start_from_noise`` makes the x_0 that
    was predicted: at T - 1 that divides by sqrt(abar) = 5e-5, and noise in float32 would move x_0 by up to 1e-2.
    """
    if prediction == "noise":
        return output
    x_t, x_start = x_t.double(), output.double()
    if prediction == "v":
        signal = at_timestep(schedule.sqrt_alphas_cumprod, t, x_t)
        x_start = signal * x_t - at_timestep(schedule.sqrt_one_minus_alphas_cumprod, t, x_t) * x_start
    scaled = at_timestep(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
    return (scaled - x_start) / at_timestep(schedule.sqrt_recipm1_alphas_cumprod, t, x_t)


def error_factors(weighting: str, prediction: str, schedule: NoiseSchedule) -> Tensor | None:
    """What the error at each timestep is multiplied by before its norm is taken, float32, (T,); None: by nothing.

    With SNR = abar / (1 - abar), the error of x_0 is that of the output times 1 / sqrt(SNR) for noise and
    1 / sqrt(SNR + 1) for v. 'x0' is that factor: the loss as measured in x_0. 'min_snr' multiplies it by
    sqrt(min(SNR, 5)), which weighs squared errors as Hang et al., "Efficient Diffusion Training via Min-SNR Weighting
    Strategy", ICCV 2023, section 3.4: min(SNR, 5) / SNR for noise, / (SNR + 1) for v, / 1 for x_0. So a weighted loss,
    L1 or L2, is the same whatever is predicted. Weights are not normalised, neither over timesteps nor in a batch: the
    mean of a batch is that of its samples' own losses, however it is split.

    Raises:
        ValueError: 'x0' with predicted noise, whose weights reach 4e8 at T - 1.
    """
    if weighting == "none":
        return None
    if (weighting, prediction) == ("x0", "noise"):
        raise ValueError(
            "loss_weighting 'x0' would weigh the noise of the last timestep 4e8 times as much as the middle one's: "
            "use prediction 'v' or 'x0' with it, or 'min_snr'."
        )
    log_abar = schedule.log_alphas_cumprod()[1:]  # float64, (T,)
    snr = torch.exp(log_abar) / -torch.expm1(log_abar)
    squared = {"noise": 1 / snr, "v": 1 / (snr + 1), "x0": torch.ones_like(snr)}[prediction]
    if weighting == "min_snr":
        squared = squared * snr.clamp(max=LARGEST_SNR)
    return squared.sqrt().float()
