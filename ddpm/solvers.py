"""Multistep solvers from diffusers: more accurate than DDIM for the same number of steps.

Both solve the probability-flow ODE for x_0 predictions, at second order. They draw no noise: ``generator`` belongs to
the interface of samplers (``ddpm/samplers.py``) and is not used. diffusers supplies their formulas only; timesteps,
noise levels and the limit of x_0 are ours, so that every sampler sees the same ones.
The package is imported when a solver is called: models and the other samplers do without it.
"""

import torch
from torch import Tensor

from ddpm.schedule import NoiseSchedule, clip_start, each_timestep, trailing_timesteps


def dpm_solver(denoise, z, schedule, limit=clip_start, generator=None, progress=None, steps: int = 25) -> Tensor:
    """DPM-Solver++(2M) from noise z in ``steps`` steps (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    return _solve("DPMSolverMultistepScheduler", denoise, z, schedule, limit, progress, steps)


def unipc(denoise, z, schedule, limit=clip_start, generator=None, progress=None, steps: int = 25) -> Tensor:
    """UniPC of order 2, B_2(h), from noise z in ``steps`` steps (Zhao et al., NeurIPS 2023, arXiv 2302.04867).

    The corrector uses each prediction a second time, so a step costs one call of the denoiser as elsewhere.
    """
    return _solve("UniPCMultistepScheduler", denoise, z, schedule, limit, progress, steps)


def _solve(scheduler_name: str, denoise, z, schedule, limit, progress, steps: int) -> Tensor:
    timesteps = trailing_timesteps(schedule.timesteps, steps)
    scheduler = _scheduler(scheduler_name, schedule, timesteps)
    x = z
    for timestep, t in each_timestep(timesteps, z, progress):
        x_start = limit(schedule.predict_start_from_noise(x, t, denoise(x, t)))
        x = scheduler.step(x_start, timestep, x).prev_sample
    return x


def _scheduler(name: str, schedule: NoiseSchedule, timesteps: list[int]):
    """The diffusers scheduler of this class name, about to step through ``timesteps``."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            "the sampling strategies dpm++ and unipc need the package diffusers: pip install -r requirements.txt, or "
            "choose ddpm or ddim."
        ) from error
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas.tolist(),
        prediction_type="sample",  # we predict x_0 from the noise ourselves, and limit it
        final_sigmas_type="zero",  # the last step ends at clean data
    )
    # In place of its set_timesteps, where trailing timesteps are a float range: for 62 of the 1,000 step counts of
    # T = 1000 (61, 103, 121, ...) that has one too many, the timestep -1.
    log_abar = schedule.log_alphas_cumprod()  # float64, (T + 1,); entry 0 is clean data
    visited = torch.tensor([*timesteps, -1], device=log_abar.device) + 1
    scheduler.timesteps = torch.tensor(timesteps)
    scheduler.sigmas = torch.expm1(-log_abar[visited]).sqrt().cpu()  # sqrt((1 - abar) / abar), (steps + 1,), last 0
    scheduler.num_inference_steps = len(timesteps)
    scheduler.set_begin_index(0)  # else it looks the first timestep up on the device
    return scheduler
