"""3D perceptual loss on the features of MedicalNet (paper, section III-A; Chen et al., Med3D, arXiv 1904.00625)."""

from pathlib import Path

import torch
from torch import Tensor

from AutoEncoder.model.lpips import EvalModule, normalise_channels

HUB_FOLDER = Path(__file__).resolve().parents[2] / "warvito_MedicalNet-models_main"
MIN_STD = 1e-6  # of a volume in [-1, 1]; only a constant one is below, and must not give NaN


class MedicalNetPerceptual(EvalModule):
    """Squared distance of channel-normalised MedicalNet features, summed over channels, averaged over space.

    Frozen and always in eval mode; gradients flow to the inputs only.

    Args:
        weights_dir: folder with the weight file (`resnet_10_23dataset.pth`); None: `medicalnet/` in the hub folder.
        pretrained: False gives the network with random weights (tests, or a state dict loaded afterwards).
        entry_point: the network, by its name in the hub folder's hubconf.py.

    Raises:
        ValueError: the weight file is missing and can't be fetched, is unreadable, or is another network's.
    """

    def __init__(
        self, weights_dir: str | Path | None = None, pretrained=True, entry_point="medicalnet_resnet10_23datasets"
    ) -> None:
        super().__init__()
        self.net = torch.hub.load(
            str(HUB_FOLDER), entry_point, source="local", pretrained=pretrained, weights_dir=weights_dir
        )
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Volumes (B, 1, D, H, W) -> scalar.

        Raises:
            ValueError: shapes differ, or are not those of volumes of one channel.
        """
        if x.shape != y.shape or x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(
                "the MedicalNet loss needs two volumes (B, 1, D, H, W) of one shape, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        features_y = normalise_channels(self.net(z_score(y)), 1e-7)  # (B, F, D/8, H/8, W/8)
        features_x = normalise_channels(self.net(z_score(x)), 1e-7)  # (B, F, D/8, H/8, W/8)
        return ((features_x - features_y) ** 2).sum(dim=1).mean()


def z_score(volume: Tensor) -> Tensor:
    """(x − mean) / std over the whole tensor, batch included, in float32; a constant tensor gives zeros."""
    volume = volume.float()
    return (volume - volume.mean()) / volume.std().clamp_min(MIN_STD)
