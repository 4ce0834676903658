"""Chooses the perceptual network of the autoencoder (`model.perceptual_3d`); imported only when one is needed."""

from torch import nn

from AutoEncoder.model.lpips import TriplanarLPIPS
from AutoEncoder.model.MedicalNetPerceptual import MedicalNetPerceptual


def build_perceptual(perceptual_3d: bool, weights_dir: str | None = None) -> nn.Module:
    """A frozen network with `loss = net(reconstruction, target)`: (B, C, D, H, W) twice, in [-1, 1] -> scalar.

    Args:
        perceptual_3d: True: MedicalNet ResNet-10 features; False: LPIPS on slices across the three axes.
        weights_dir: folder with the weight files (`model.perceptual_weights`); None: see the two modules.

    Raises:
        ValueError: a weight file is missing and can't be fetched, is unreadable, or is another network's.
    """
    return MedicalNetPerceptual(weights_dir) if perceptual_3d else TriplanarLPIPS(weights_dir)
