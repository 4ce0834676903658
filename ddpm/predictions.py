"""What a denoiser's output means in the diffusion process: the noise, v, or clean data.

Letters as in ``ddpm/schedule.py``: x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise, and v = sqrt(abar) noise -
sqrt(1 - abar) x_0 (Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section
4 and appendix D). A loss compares the output with ``target``; samplers work on noise, which ``implied_noise`` gives.
"""

from torch import Tensor

from ddpm.schedule import NoiseSchedule, at_timestep

PREDICTIONS = ("noise", "v", "x0")


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
