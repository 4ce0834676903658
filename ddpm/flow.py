"""Rectified flow: the second process on normalised latents, from noise to data along straight lines.

Liu et al., "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", ICLR 2023; Esser et
al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpm.denoiser import Conditions, all_conditions, check_latent, conditioned, predict
from ddpm.latent_process import LatentProcess
from ddpm.latent_scaling import LatentScaling
from ddpm.samplers import Sampler
from ddpm.schedule import Generator, Limit, Progress, per_sample
from ddpm.timesteps import draw_fractions

REFERENCE_VOXELS = 32**3  # of a latent, where times are not shifted
TIME_UNIT = 2.0**-24  # a sampler's times are multiples of it: float32 holds them and their differences exactly


class RectifiedFlow(LatentProcess):
    """Predicts the velocity noise - x_0 of x_t = (1 - t) x_0 + t noise, t from 0 (data) to 1 (noise).

    Times are shifted by the latent's size, in training and sampling alike, since larger grids need more noise to lose
    as much of their structure (Esser et al., eq. 23): ``shift_time``. The network is given the shifted time times
    ``timesteps``, as a float32 number, so its embedding sees the range that it sees in a diffusion.

    Args:
        channels: channels of the latents, C.
        timesteps: what the network is given at t = 1.
        loss_type: 'l1' or 'l2', the norm of the velocity's error.
        timestep_draw: how training spreads t before the shift: 'uniform' or 'logit_normal' (``ddpm/timesteps.py``).
        scaling: as of ``LatentProcess``.

    Shapes: x, noise (B, C, d, h, w); t (B,) in [0, 1], before the shift; conditions as for ``GaussianDiffusion``.

    Raises:
        ValueError: an argument out of range.
    """

    fast_strategy = "euler"

    def __init__(
        self, channels, timesteps=1000, loss_type="l1", timestep_draw="uniform", scaling: LatentScaling | None = None
    ):
        super().__init__(channels, timesteps, loss_type, timestep_draw, scaling)

    def draw_timesteps(self, generators: Sequence[torch.Generator]) -> Tensor:
        """A time to train each sample at, float64, (B,), by the sample's own generator and on its device."""
        return draw_fractions(self.timestep_draw, generators)

    def timesteps_at(self, fractions: Tensor) -> Tensor:
        """Times (B,) at fractions (B,) of the way from data to noise, in [0, 1)."""
        return fractions.double()

    def _output_and_target(
        self, denoise_fn, x_start: Tensor, t: Tensor, noise: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """The velocities."""
        t = shift_time(t, size_ratio(x_start))
        time = per_sample(t, x_start)
        velocity = predict(denoise_fn, (1 - time) * x_start + time * noise, self._embedded(t), conditions)
        return velocity, noise - x_start

    @torch.no_grad()
    def sample(
        self,
        denoise_fn,
        z: Tensor,
        y: Tensor | None = None,
        res: Tensor | None = None,
        cond_scale: float = 1.0,
        strategy: str = "euler",
        eta: float = 0.0,
        ddim_steps: int = 25,
        generator: Generator = None,
        progress: Progress | None = None,
        conditions: Conditions | None = None,
        correct: Limit | None = None,
        correct_last: int = 0,
    ) -> Tensor:
        """Normalised latents like z (B, C, d, h, w) from standard normal noise z. They are not limited to [-1, 1].

        Args:
            cond_scale: guidance scale, as of ``GaussianDiffusion.sample``, on the velocity.
            strategy: 'euler', the only one.
            eta: 0: no noise is drawn on the way.
            ddim_steps: number of Euler steps, at least 1; 10 to 30 are usual.
            generator: not used, as nothing is drawn.
            progress: called as progress(steps done, steps in all) after each step.
            conditions: what the denoiser is given, y and res among it or apart.
            correct, correct_last: as of ``GaussianDiffusion.sample``.

        Raises:
            ValueError: another strategy, eta, ddim_steps below 1, correct_last out of range, wrong shape of z, class
                ids that the denoiser does not know, guidance without a null label.
        """
        check_latent(z, "z", self.channels)
        if strategy not in FLOW_SAMPLERS:
            raise ValueError(f"sampling strategy {strategy!r} is not one of a flow: use {', '.join(FLOW_SAMPLERS)}.")
        if eta != 0:
            raise ValueError(f"eta is {eta}: a flow draws no noise on the way, leave it at 0.")
        velocity = conditioned(denoise_fn, z, all_conditions(conditions, y, res), cond_scale)
        correct_start = self.corrected(lambda x_start: x_start, correct, correct_last, ddim_steps)

        def at_time(x: Tensor, t: Tensor) -> Tensor:
            found = velocity(x, self._embedded(t))
            if correct_last == 0:
                return found
            time = per_sample(t, x)
            return (x - correct_start(x - time * found)) / time  # the line through x from the corrected x_0

        return self.restored(FLOW_SAMPLERS[strategy].run(at_time, z, steps=ddim_steps, progress=progress))

    def _embedded(self, t: Tensor) -> Tensor:
        """What the network is given for times t (B,), float32."""
        return (t * self.num_timesteps).float()


def size_ratio(x: Tensor) -> float:
    """r of a latent x (B, C, d, h, w): (voxels / 32³)^(1/3), 1 for latents of 32³."""
    return (x[0, 0].numel() / REFERENCE_VOXELS) ** (1 / 3)


def shift_time(t: Tensor, ratio: float) -> Tensor:
    """t' = r t / (1 + (r - 1) t) of times t (B,) in [0, 1], so written that 0 and 1 stay exactly what they are."""
    return ratio * t / ((1 - t) + ratio * t)


def euler_times(steps: int, ratio: float) -> Tensor:
    """Times (steps + 1,) from 1 down to 0, evenly spaced before the shift, float64.

    All are multiples of ``TIME_UNIT``, so that their differences are exact and add up to exactly 1 in any order.
    """
    if steps < 1:
        raise ValueError(f"ddim_steps is {steps}: a flow takes at least 1 step.")
    times = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), ratio)
    return (times / TIME_UNIT).round() * TIME_UNIT


def euler(velocity, z: Tensor, steps: int, progress: Progress | None = None) -> Tensor:
    """Follow ``velocity(x, t)``, t (B,) float32, from noise z (B, ...) at t = 1 to data at t = 0 in Euler steps."""
    times = euler_times(steps, size_ratio(z)).tolist()
    x = z
    for done, (now, following) in enumerate(pairwise(times), start=1):
        t = torch.full((len(z),), now, device=z.device)
        x = x - (now - following) * velocity(x, t)
        if progress is not None:
            progress(done, steps)
    return x


FLOW_SAMPLERS = {"euler": Sampler(euler, {"ddim_steps": "steps"})}
