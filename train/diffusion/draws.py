"""The random part of a diffusion training step, drawn per sample.

Each sample's draws come from a generator of its own, seeded by (global seed, step, place in the global batch). So a
global batch gets the same timesteps, noise and dropped labels however it is split over processes, and a resumed run
needs no generator state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The random values of one batch."""

    timesteps: Tensor  # (B,) int64 in [0, T)
    noise: Tensor  # (B, C, d, h, w) standard normal
    is_dropped: Tensor  # (B,) bool: the label is replaced by the null label


def draw(
    seed: int,
    step: int,
    positions: Sequence[int],
    shape: Sequence[int],
    num_timesteps: int,
    label_dropout: float,
    device: torch.device,
) -> Draws:
    """Timestep, noise and label dropout for each sample of a batch.

    Args:
        seed: the run's global seed.
        step: optimiser step, counted from 1.
        positions: (B,) place of each sample in the global batch of this step.
        shape: of one latent, (C, d, h, w).
        num_timesteps: T.
        label_dropout: probability of a dropped label.
        device: where the values are drawn (a GPU draws other values than a CPU).
    """
    timesteps = torch.empty(len(positions), dtype=torch.int64, device=device)
    chances = torch.empty(len(positions), device=device)
    noise = torch.empty(len(positions), *shape, device=device)
    for place, position in enumerate(positions):  # in place: a small kernel less for each value, and no copies
        generator = torch.Generator(device).manual_seed(_mix(seed, step, position))
        timesteps[place].random_(num_timesteps, generator=generator)
        chances[place].uniform_(generator=generator)
        noise[place].normal_(generator=generator)
    return Draws(timesteps, noise, chances < label_dropout)


def _mix(seed: int, step: int, position: int) -> int:
    """A 63-bit seed that differs between any two of its arguments' combinations, for all practical purposes."""
    entropy = (seed & 0xFFFFFFFFFFFFFFFF, step, position)  # SeedSequence takes no negative numbers
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
