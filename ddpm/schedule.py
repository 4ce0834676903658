"""The noise schedule: how much of the data is left at each timestep, the Gaussian formulas that follow from it, and the
limits that keep a predicted x_0 in the range of normalised latents, [-1, 1].

Letters: a_t = 1 - beta_t; abar_t = a_0 * ... * a_t (``alphas_cumprod``). Timestep 0 is the least noisy, T - 1 the most.
Equation numbers are those of Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Limit = Callable[[Tensor], Tensor]  # keeps a predicted x_0 in range; every sampler takes one
Denoise = Callable[[Tensor, Tensor], Tensor]  # noise in x (B, ...) at timesteps t (B,), conditions and guidance inside
Generator = torch.Generator | Sequence[torch.Generator] | None  # one for all, one per sample, or the global one
Progress = Callable[[int, int], None]  # called after each step with (steps done, steps in all)

COSINE_OFFSET = 0.008  # Nichol & Dhariwal 2021, eq. 17: keeps beta_0 from vanishing
MAX_BETA = 0.9999  # same source: the cosine would put beta_{T-1} at 1, a singular step
MIN_POSTERIOR_VARIANCE = 1e-20  # the posterior variance of step 0 is zero, its logarithm has to stay finite


def cosine_betas(timesteps: int) -> Tensor:
    """Betas of the cosine schedule (Nichol & Dhariwal 2021, eq. 17), float64, shape (T,)."""
    steps = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64)
    signal = torch.cos((steps / timesteps + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(0, MAX_BETA)


def trailing_timesteps(timesteps: int, steps: int) -> list[int]:
    """``steps`` distinct timesteps, falling from T - 1, evenly ("trailing") spaced.

    Trailing spacing starts at pure noise, which is what samplers are given (Lin et al., "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", WACV 2024, section 3.3).
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(
            f"ddim_steps is {steps}: it has to lie between 1 and the {timesteps} timesteps of the schedule."
        )
    return [(2 * timesteps * left + steps) // (2 * steps) - 1 for left in range(steps, 0, -1)]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, (B,), as (B, 1, ..., 1) in the dtype and rank of ``like`` (B, ...)."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def each_timestep(timesteps: Sequence[int], x: Tensor, progress: Progress | None) -> Iterator[tuple[int, Tensor]]:
    """Each timestep as a number and as (B,) for the samples of x (B, ...); `progress` is called after its step."""
    for done, timestep in enumerate(timesteps, start=1):
        yield timestep, torch.full((len(x),), timestep, device=x.device, dtype=torch.long)
        if progress is not None:
            progress(done, len(timesteps))


def at_timestep(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a (T,) table at timesteps t (B,), broadcast over ``like`` (B, ...)."""
    return per_sample(table[t], like)


class NoiseSchedule(NamedTuple):
    """Tables of shape (T,), float32, computed in float64. Named as the buffers of the official release.

    Every method takes x of shape (B, ...) and t (B,), and broadcasts one coefficient per sample.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    @property
    def timesteps(self) -> int:
        return len(self.betas)  # T

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noisy x_t of clean data: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (eq. 4)."""
        signal = at_timestep(self.sqrt_alphas_cumprod, t, x_start)
        return signal * x_start + at_timestep(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x_0 that q_sample would have turned into x_t with this noise (eq. 4 solved for x_0), like x_t.

        Noise in float64 is worked on in float64.
        """
        x = x_t.to(torch.promote_types(x_t.dtype, noise.dtype))
        x_start = at_timestep(self.sqrt_recip_alphas_cumprod, t, x) * x
        return (x_start - at_timestep(self.sqrt_recipm1_alphas_cumprod, t, x) * noise).to(x_t.dtype)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (eq. 6 and 7)."""
        mean = at_timestep(self.posterior_mean_coef1, t, x_t) * x_start
        mean = mean + at_timestep(self.posterior_mean_coef2, t, x_t) * x_t
        variance = at_timestep(self.posterior_variance, t, x_t)
        return mean, variance, at_timestep(self.posterior_log_variance_clipped, t, x_t)

    def log_alphas_cumprod(self) -> Tensor:
        """ln(abar) in float64, shape (T + 1,): entry t + 1 belongs to timestep t, entry 0 to clean data (abar = 1).

        From the betas, because 1 - abar and abar_t / abar_s lose their digits when taken from the float32 tables.
        """
        log_alphas = torch.log1p(-self.betas.double())
        return torch.cat([log_alphas.new_zeros(1), log_alphas.cumsum(0)])


def noise_schedule(betas: Tensor) -> NoiseSchedule:
    """All tables of a schedule from its betas (T,), computed in float64 and rounded to float32."""
    betas = betas.double()
    alphas = 1 - betas
    cumprod = alphas.cumprod(0)
    previous = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - cumprod)
    tables = NoiseSchedule(
        betas=betas,
        alphas_cumprod=cumprod,
        alphas_cumprod_prev=previous,
        sqrt_alphas_cumprod=cumprod.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - cumprod).sqrt(),
        log_one_minus_alphas_cumprod=(1 - cumprod).log(),
        sqrt_recip_alphas_cumprod=(1 / cumprod).sqrt(),
        sqrt_recipm1_alphas_cumprod=(1 / cumprod - 1).sqrt(),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=posterior_variance.clamp(min=MIN_POSTERIOR_VARIANCE).log(),
        posterior_mean_coef1=betas * previous.sqrt() / (1 - cumprod),
        posterior_mean_coef2=(1 - previous) * alphas.sqrt() / (1 - cumprod),
    )
    return NoiseSchedule(*(table.float() for table in tables))


# ------------------------------------------------------------------------------------------------------------- limits


def clip_start(x_start: Tensor) -> Tensor:
    """Clip a predicted x_0 to the range of normalised latents, [-1, 1]."""
    return x_start.clamp(-1, 1)


def dynamic_threshold(x_start: Tensor, percentile: float) -> Tensor:
    """Clip each sample to the percentile of its own |x_0|, at least 1, and scale it back to [-1, 1].

    Saharia et al., "Imagen", NeurIPS 2022, section 2.3: strong guidance otherwise saturates most values at the clip.
    """
    bound = torch.quantile(x_start.flatten(1).abs().float(), percentile, dim=1).clamp(min=1)  # (B,)
    bound = per_sample(bound, x_start)
    return x_start.clamp(-bound, bound) / bound
