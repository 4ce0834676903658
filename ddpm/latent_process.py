"""What diffusion and flow have in common: options, the scale of latents, what comes before and after the network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.denoiser import Conditions, all_conditions, check_conditions, check_latent
from ddpm.latent_scaling import LatentScaling
from ddpm.schedule import Limit
from ddpm.timesteps import check_timestep_draw

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class LatentProcess(nn.Module):
    """A process between normalised latents and noise. It has no parameters; the denoiser is an argument of its methods.

    Each has: ``draw_timesteps``, ``timesteps_at``, ``_output_and_target``, ``sample``, and for previews
    ``fast_strategy``, the name of a sampler that takes few steps.

    Args:
        channels: channels of the latents, C.
        timesteps: T, number of noise levels, or what a flow's network is given for t = 1.
        loss_type: 'l1' or 'l2', the norm of the prediction's error.
        timestep_draw: how training spreads its timesteps: 'uniform' or 'logit_normal' (``ddpm/timesteps.py``).
        scaling: what latents go through on the way in and back out; noise is mixed in between. None: nothing.

    Raises:
        ValueError: an argument out of range.
    """

    fast_strategy: str

    def __init__(
        self, channels: int, timesteps: int, loss_type: str, timestep_draw: str, scaling: LatentScaling | None
    ) -> None:
        super().__init__()
        if channels < 1 or timesteps < 1:
            raise ValueError(f"channels ({channels}) and timesteps ({timesteps}) have to be at least 1.")
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type is {loss_type!r}: choose one of {', '.join(LOSSES)}.")
        check_timestep_draw(timestep_draw)
        self.channels = channels
        self.num_timesteps = timesteps
        self.loss_type = loss_type
        self.timestep_draw = timestep_draw
        self.scaling = scaling

    def scaled(self, x: Tensor) -> Tensor:
        """Normalised latents (B, C, d, h, w) as the network sees them."""
        return x if self.scaling is None else self.scaling(x)

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of ``scaled``."""
        return x if self.scaling is None else self.scaling.restore(x)

    def corrected(self, limit: Limit, correct: Limit | None, last_steps: int, steps: int) -> Limit:
        """`limit`, and after it `correct` in the last of `steps` steps. A sampler calls it once a step.

        correct: predicted x_0 -> x_0, normalised latents (B, C, d, h, w), limited before and after; None: nothing.

        Raises:
            ValueError: more last steps than steps.
        """
        if correct is None or last_steps == 0:
            return limit
        if not 0 < last_steps <= steps:
            raise ValueError(f"correct_last is {last_steps}: it has to lie between 0 and the {steps} steps.")
        left = iter(range(steps, 0, -1))

        def limit_and_correct(x_start: Tensor) -> Tensor:
            x_start = limit(x_start)
            return limit(self.scaled(correct(self.restored(x_start)))) if next(left) <= last_steps else x_start

        return limit_and_correct

    def p_losses(
        self,
        denoise_fn,
        x_start,
        t,
        y=None,
        res=None,
        noise=None,
        conditions: Conditions | None = None,
        reduction="mean",
    ) -> Tensor:
        """Mean error (``loss_type``) of what is predicted from x_t; noise None: drawn.

        reduction: "mean": a scalar; "none": of each sample, (B,).
        """
        conditions = all_conditions(conditions, y, res)
        check_latent(x_start, "x_start", self.channels)
        if x_start.device.type == "cpu":  # on a GPU the check would wait for the device at every step
            check_conditions(denoise_fn, conditions)
        noise = torch.randn_like(x_start) if noise is None else noise
        output, target = self._output_and_target(denoise_fn, self.scaled(x_start), t, noise, conditions)
        if reduction == "mean":
            return LOSSES[self.loss_type](output, target)
        return LOSSES[self.loss_type](output, target, reduction="none").flatten(1).mean(1)

    def _output_and_target(
        self, denoise_fn, x_start: Tensor, t: Tensor, noise: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """What the denoiser gives for x_t, and what it should; x_start as the network sees latents."""
        raise NotImplementedError
