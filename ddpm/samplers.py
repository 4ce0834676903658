"""Samplers: pure functions from noise to data, given a noise schedule and a function that predicts noise.

    sampler(denoise, z, schedule, limit=..., generator=..., progress=..., [its own options]) -> x_0, like z

``denoise(x, t)`` predicts the noise in x (B, ...) at timesteps t (B,); conditions and guidance are inside it. The types
of denoise, schedule, limit, generator and progress are those of their names in ``ddpm/schedule.py``. A new sampler is a
new function and one entry in ``SAMPLERS``. Ancestral sampling and DDIM are here, the multistep solvers in
``ddpm/solvers.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.schedule import Generator, Limit, NoiseSchedule, clip_start, each_timestep, per_sample, trailing_timesteps
from ddpm.solvers import dpm_solver, unipc


def noise_like(x: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise like x; drawn on the generator's device, so that a seed gives one result on any device.

    With one generator per sample the noise of a sample does not depend on the batch that it is in.
    """
    if generator is None:
        return torch.randn_like(x)
    if not isinstance(generator, torch.Generator):
        return torch.cat([noise_like(sample, own) for sample, own in zip(x.split(1), generator, strict=True)])
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


# ---------------------------------------------------------------------------------------------------- ancestral (DDPM)


def ancestral_step(
    x: Tensor, t: Tensor, noise_prediction: Tensor, schedule: NoiseSchedule, limit: Limit, generator=None
) -> Tensor:
    """x_{t-1} of x_t: a draw from the posterior given the predicted x_0 (Ho et al. 2020, algorithm 2).

    At t = 0 it is the posterior's mean.
    """
    x_start = limit(schedule.predict_start_from_noise(x, t, noise_prediction))
    mean, _, log_variance = schedule.q_posterior(x_start, x, t)
    noise = noise_like(x, generator)  # drawn at t = 0 too: one draw a step, whatever the step
    return mean + per_sample(t > 0, x) * (0.5 * log_variance).exp() * noise


def ancestral(denoise, z, schedule, limit=clip_start, generator=None, progress=None, start=None) -> Tensor:
    """Ancestral sampling: every timestep from ``start`` (None: T - 1) down to 0, one draw of noise each.

    ``z`` is x at timestep ``start``; for None it is pure noise.
    """
    num_steps = schedule.timesteps if start is None else start + 1
    x = z
    for _, t in each_timestep(range(num_steps)[::-1], z, progress):
        x = ancestral_step(x, t, denoise(x, t), schedule, limit, generator)
    return x


# ----------------------------------------------------------------------------------------------------------------- DDIM


def ddim_step(
    x: Tensor, t: Tensor, t_next: Tensor, noise_prediction: Tensor, schedule, limit=clip_start, eta=0.0, generator=None
) -> Tensor:
    """x at timesteps t_next (B,) from x at t (B,), t_next < t; t_next = -1 is clean data, where abar = 1.

    Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, eq. 12 and 16:
    sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) noise direction + sigma noise.
    """
    log_abar = schedule.log_alphas_cumprod()
    now, following = log_abar[t + 1], log_abar[t_next + 1]  # float64, (B,)
    noise_variance, noise_variance_next = -torch.expm1(now), -torch.expm1(following)  # 1 - abar
    sigma_squared = eta**2 * noise_variance_next / noise_variance * -torch.expm1(now - following)

    x_start = limit(schedule.predict_start_from_noise(x, t, noise_prediction))
    # The direction has to belong to the x_0 in use: with the unclipped one x would miss the noise level of t_next.
    direction = (x - per_sample((now / 2).exp(), x) * x_start) / per_sample(noise_variance.sqrt(), x)
    x_next = per_sample((following / 2).exp(), x) * x_start
    x_next = x_next + per_sample((noise_variance_next - sigma_squared).clamp(min=0).sqrt(), x) * direction
    if eta > 0:
        x_next = x_next + per_sample(sigma_squared.sqrt(), x) * noise_like(x, generator)
    return x_next


def ddim(denoise, z, schedule, limit=clip_start, generator=None, progress=None, steps: int = 100, eta=0.0) -> Tensor:
    """DDIM sampling from noise z in ``steps`` steps; eta 0 is deterministic, eta 1 has the posterior's variance."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it has to lie between 0 (deterministic) and 1 (the posterior's variance).")
    timesteps = trailing_timesteps(schedule.timesteps, steps)
    x = z
    for (_, t), following in zip(each_timestep(timesteps, z, progress), [*timesteps[1:], -1], strict=True):
        t_next = torch.full_like(t, following)
        x = ddim_step(x, t, t_next, denoise(x, t), schedule, limit, eta, generator)
    return x


# ------------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Sampler:
    """A sampler and which of the public sampling options it takes, under its own argument names."""

    run: Callable[..., Tensor]
    options: dict[str, str]  # option of GaussianDiffusion.sample -> argument of run


SAMPLERS = {
    "ddpm": Sampler(ancestral, {}),
    "ddim": Sampler(ddim, {"ddim_steps": "steps", "eta": "eta"}),
    "dpm++": Sampler(dpm_solver, {"ddim_steps": "steps"}),
    "unipc": Sampler(unipc, {"ddim_steps": "steps"}),
}


def get_sampler(strategy: str) -> Sampler:
    if strategy not in SAMPLERS:
        raise ValueError(f"sampling strategy {strategy!r} is unknown: choose one of {', '.join(sorted(SAMPLERS))}.")
    return SAMPLERS[strategy]
