"""Volumes made worse in ways that a distance between sets has to see."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from dataset.volumes.intensity import MODEL_RANGE
from evaluation.comparison.networks import FeatureNetwork
from evaluation.comparison.sets import SetVolume

NOISE = (0.05, 0.1, 0.2, 0.4)  # standard deviations, of intensities in [-1, 1]
BLUR = (0.5, 1.0, 2.0, 4.0)  # standard deviations in voxels
DEGRADATIONS = (
    ("noise", NOISE, "standard deviation of the noise, of intensities in [-1, 1]"),
    ("blur", BLUR, "standard deviation of the filter, voxels"),
)


@dataclass(frozen=True)
class Degraded:
    """A volume made worse in a known way. level: standard deviation of the noise, or of the blur in voxels."""

    volume: SetVolume
    kind: str
    level: float

    @property
    def path(self) -> Path:
        return self.volume.path

    def key(self) -> str:
        """Equal for equal voxels."""
        return hashlib.sha256(f"{self.volume.key()} {self.kind} {self.level}".encode()).hexdigest()

    def read(self) -> Tensor:
        """(1, D, H, W) in [-1, 1]."""
        data = self.volume.read().numpy()
        if self.kind == "blur":
            data[0] = ndimage.gaussian_filter(data[0], self.level)
        else:
            rng = np.random.default_rng(int(self.volume.key()[:16], 16))
            data = data + np.float32(self.level) * rng.standard_normal(data.shape, dtype=np.float32)
        return torch.from_numpy(data).clamp(*MODEL_RANGE)


class ReconstructedFeatures(FeatureNetwork):
    """The features of an autoencoder's reconstructions."""

    def __init__(self, network: FeatureNetwork, autoencoder: nn.Module, sha256: str) -> None:
        super().__init__()
        self.network, self.autoencoder = network, autoencoder
        self.name, self.planes = network.name, network.planes
        self.description = f"{network.description}, of reconstructions"
        self.settings = {**network.settings, "autoencoder_sha256": sha256}
        self.requires_grad_(False).eval()

    def forward(self, volumes: Tensor) -> dict[str, Tensor]:
        reconstructed = torch.cat([self.autoencoder.reconstruct(volume[None]) for volume in volumes])
        return self.network(reconstructed.clamp(*MODEL_RANGE))
