"""How normalised latents are scaled for the network: by nothing, or each channel to mean 0 and variance 1.

Latent files are scaled by the range of the whole codebook, as in the official release. That leaves some channels with a
standard deviation of a few hundredths, which noise drowns at nearly all timesteps.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LEAST_STD = 1e-6  # of a channel; one that is constant in all latents is only shifted


class LatentScaling(nn.Module):
    """Mean and standard deviation of each channel of normalised latents, (C,) float32; 0 and 1 until they are set.

    They are part of what a checkpoint is: set by ``measure`` in training, by the file elsewhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def take(self, state: Any) -> None:
        """Set them to those of a checkpoint. ValueError: none, or those of other channels."""
        is_mapping = isinstance(state, Mapping) and set(state) == {"mean", "std"}
        for name in ("mean", "std") if is_mapping else ():
            value, own = state[name], getattr(self, name)
            if not isinstance(value, Tensor) or value.shape != own.shape or not value.is_floating_point():
                raise ValueError(f"the scale of latents: {name} is not one number for each of {len(own)} channels")
            if not value.isfinite().all() or (name == "std" and not (value > 0).all()):
                raise ValueError(f"the scale of latents: {name} has {value.tolist()[:8]}, which can't scale anything")
        if not is_mapping:
            raise ValueError("the scale of latents is damaged: expected mean and std")
        self.load_state_dict(state)

    def measure(self, latents: Iterable[Tensor]) -> None:
        """Set them to those of all voxels of some latents, each (C, d, h, w)."""
        count, total, squares = 0, torch.zeros_like(self.mean.double()), torch.zeros_like(self.mean.double())
        for latent in latents:
            voxels = latent.double().flatten(1)  # (C, d·h·w)
            count, total, squares = count + voxels.shape[1], total + voxels.sum(1), squares + voxels.square().sum(1)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < LEAST_STD, 1.0, std))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised latents (B, C, d, h, w) as the network sees them."""
        return (x - self._per_channel(self.mean)) / self._per_channel(self.std)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x * self._per_channel(self.std) + self._per_channel(self.mean)

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values[:, None, None, None]
