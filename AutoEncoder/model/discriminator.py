"""3D PatchGAN discriminator and its losses (paper, section III-A; Isola et al., CVPR 2017)."""

import torch.nn.functional as F
from torch import Tensor, nn

from common.convolution import Conv3d

MAX_WIDTH = 512


class NLayerDiscriminator3D(nn.Module):
    """Judges overlapping patches of a volume as real (high logit) or reconstructed (low).

    Args:
        in_channels: image channels.
        width: channels of the first stage (`disc_channels`); they double from stage to stage, up to 512.
        num_layers: stride-2 stages (`disc_layers`), 3 in the paper; there are num_layers + 2 stages in all.
    """

    def __init__(self, in_channels: int, width: int = 32, num_layers: int = 3) -> None:
        super().__init__()
        widths = [min(width * 2**i, MAX_WIDTH) for i in range(num_layers + 1)]
        self.model0 = nn.Sequential(Conv3d(in_channels, widths[0], 4, stride=2, padding=2), nn.LeakyReLU(0.2))
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            stage = nn.Sequential(
                Conv3d(widths[i - 1], widths[i], 4, stride=stride, padding=2),
                nn.BatchNorm3d(widths[i]),
                nn.LeakyReLU(0.2),
            )
            self.add_module(f"model{i}", stage)
        last = nn.Sequential(Conv3d(widths[-1], 1, 4, stride=1, padding=2))
        self.add_module(f"model{num_layers + 1}", last)
        self.num_stages = num_layers + 2

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, D, H, W) -> logits (B, 1, d', h', w') and the outputs of all stages, the logits last."""
        features = []
        for i in range(self.num_stages):
            x = getattr(self, f"model{i}")(x)  # (B, widths[i], about D/2^(i+1), …)
            features.append(x)
        return x, features


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½(mean relu(1 − D(x)) + mean relu(1 + D(x̂))), a scalar."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½(mean softplus(−D(x)) + mean softplus(D(x̂))), a scalar."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def generator_loss(logits_fake: Tensor) -> Tensor:
    """−mean D(x̂), a scalar."""
    return -logits_fake.mean()


def feature_matching_loss(features_fake: list[Tensor], features_real: list[Tensor]) -> Tensor:
    """Σ_i |F_i(x̂) − sg F_i(x)|₁ over all stages but the last (the logits), each a mean; a scalar."""
    pairs = zip(features_fake[:-1], features_real[:-1], strict=True)
    return sum(F.l1_loss(fake, real.detach()) for fake, real in pairs)
