"""Limits: functions that keep a predicted x_0 in the range of normalised latents, [-1, 1]. Every sampler takes one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.schedule import per_sample

Limit = Callable[[Tensor], Tensor]


def clip_start(x_start: Tensor) -> Tensor:
    """Clip a predicted x_0 to the range of normalised latents, [-1, 1]."""
    return x_start.clamp(-1, 1)


def dynamic_threshold(x_start: Tensor, percentile: float) -> Tensor:
    """Clip each sample to the percentile of its own |x_0|, at least 1, and scale it back to [-1, 1].

    Saharia et al., "Imagen", NeurIPS 2022, section 2.3: strong guidance otherwise saturates most values at the clip.
    """
    bound = torch.quantile(x_start.flatten(1).abs().float(), percentile, dim=1).clamp(min=1)  # (B,)
    bound = per_sample(bound, x_start)  # (B, 1, ..., 1)
    return x_start.clamp(-bound, bound) / bound
