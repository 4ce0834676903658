"""The random part of a diffusion training step, drawn per sample.

Each sample's draws come from a generator of its own, seeded by (global seed, step, place in the global batch). So a
global batch gets the same timesteps, noise and dropped conditions however it is split over processes, and a resumed
run needs no generator state. A run's numbers depend on the order of its draws: timesteps (by the diffusion process),
dropped conditions, noise, unknown attributes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sample_generators(seed: int, step: int, positions: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """A generator for each sample of a batch by its place in the global one (a GPU draws other values than a CPU)."""
    return [torch.Generator(device).manual_seed(_mix(seed, step, position)) for position in positions]


def draw_dropped(generators: Sequence[torch.Generator], share: float) -> Tensor:
    """(B,) bool: whose conditions are dropped, each with the probability `share`."""
    chances = torch.empty(len(generators), device=generators[0].device)
    for place, generator in enumerate(generators):  # in place: a small kernel less for each value, and no copies
        chances[place].uniform_(generator=generator)
    return chances < share


def draw_unknown(generators: Sequence[torch.Generator], num_attributes: int, share: float) -> Tensor:
    """(B, A) bool: which attributes are taken for unknown: each, and all of a sample, with the probability `share`."""
    chances = torch.empty(len(generators), num_attributes + 1, device=generators[0].device)
    for place, generator in enumerate(generators):
        chances[place].uniform_(generator=generator)
    return (chances < share)[:, 1:] | (chances < share)[:, :1]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), shape that of one latent (C, d, h, w)."""
    noise = torch.empty(len(generators), *shape, device=generators[0].device)
    for place, generator in enumerate(generators):
        noise[place].normal_(generator=generator)
    return noise


def _mix(seed: int, step: int, position: int) -> int:
    """A 63-bit seed that differs between any two of its arguments' combinations, for all practical purposes."""
    entropy = (seed & 0xFFFFFFFFFFFFFFFF, step, position)  # SeedSequence takes no negative numbers
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
