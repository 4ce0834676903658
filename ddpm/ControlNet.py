"""ControlNet on BiFlowNet: a trained copy of the way down that adds what a hint says to the frozen network's way up.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023; Wang et al., IEEE TMI 2025,
section III-C. Letters as in ``ddpm/BiFlowNet.py``; H channels of the hint.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm.BiFlowNet import BiFlowNet
from ddpm.blocks import PatchEmbed_Voxel
from ddpm.frozen_base import WithFrozenBase
from ddpm.latent_scaling import LatentScaling

__all__ = ["ControlNet", "ControlledBiFlowNet"]


class ControlNet(BiFlowNet):
    """BiFlowNet's conditions, input blocks and way down, which see the hint beside the latent, and no way up.

    Parts have the names that they have in BiFlowNet. Levels and middle end in a convolution that starts at zero.

    Args:
        dim: as of ``BiFlowNet``, as are all further arguments.
        hint_channel: channels of the hint, H.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(self, dim, hint_channel, *arguments, **named_arguments):
        super().__init__(dim, *arguments, **named_arguments)
        if hint_channel < 1:
            raise ValueError(f"hint_channel is {hint_channel}: at least 1 is needed.")
        self.hint_channel = hint_channel
        for name in ("IntraPatchFlow_mid", "IntraPatchFlow_output", "ups", "final_conv"):
            delattr(self, name)
        seen = self.channels + hint_channel
        old = self.init_conv
        self.init_conv = nn.Conv3d(seen, old.out_channels, old.kernel_size, padding=old.padding)
        self.x_embedder = PatchEmbed_Voxel(self.sub_volume_size, self.patch_size, seen, dim)
        for level in self.downs:
            level.append(_zero_convolution(level[2].block2.proj.out_channels))
        self.mid_zero_conv = _zero_convolution(self.mid_block2.block2.proj.out_channels)

    @torch.no_grad()
    def begin_as(self, biflownet: BiFlowNet) -> None:
        """Take a BiFlowNet's weights; what sees the hint is zero, and so are the last convolutions."""
        theirs, own = biflownet.state_dict(), self.state_dict()
        for name, value in own.items():
            if name not in theirs:
                value.zero_()
            elif value.shape == theirs[name].shape:
                value.copy_(theirs[name])
            else:  # (out, C + H, k, k, k) of (out, C, k, k, k)
                value.zero_()[:, : self.channels].copy_(theirs[name])

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        hint: Tensor,
        y: Tensor | None = None,
        res: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> list[Tensor]:
        """What is added to the way up: a map (B, width, …) for each level, from the first, and one for the middle.

        Args:
            hint: on the grid of the latent x, (B, H, d, h, w).
            x, time, y, res, attributes: as of ``BiFlowNet.forward``.

        Raises:
            ValueError: wrong shapes, or a condition missing or superfluous.
        """
        self.check_inputs(x, time, y, res, attributes)
        expected = (len(x), self.hint_channel, *x.shape[2:])
        if tuple(hint.shape) != expected:
            raise ValueError(f"hint has shape {tuple(hint.shape)}: expected {expected}, the grid of the latents.")
        condition = self.embed_conditions(time, y, res, attributes)  # (B, K)
        seen = torch.cat([x, hint], dim=1)  # (B, C + H, d, h, w)
        features, *_ = self.intra_patch_input(seen, condition)  # F × (B, M, d, h, w)
        middle, halves = self.way_down(self.init_conv(seen), condition, features)
        maps = [level[5](half2) for level, (_, half2) in zip(self.downs, halves, strict=True)]  # (B, width, …) each
        return [*maps, self.mid_zero_conv(middle)]


class ControlledBiFlowNet(WithFrozenBase):
    """A frozen BiFlowNet whose way up takes what a ControlNet adds. Takes the place of a BiFlowNet with `hint`.

    Args:
        biflownet: is frozen, and in eval mode whatever mode this module is in.
        controlnet: the part that trains.
        control_scale: how much what it adds counts; 0: the BiFlowNet's output, bit for bit.
        hint_scaling: what hints go through on the way in; None: nothing.
    """

    def __init__(
        self,
        biflownet: BiFlowNet,
        controlnet: ControlNet,
        control_scale: float = 1.0,
        hint_scaling: LatentScaling | None = None,
    ) -> None:
        super().__init__(biflownet)
        self.controlnet = controlnet
        self.control_scale = control_scale
        self.hint_scaling = hint_scaling

    @property
    def part(self) -> ControlNet:
        return self.controlnet

    def with_part(self, part: ControlNet) -> "ControlledBiFlowNet":
        return ControlledBiFlowNet(self.biflownet, part, self.control_scale, self.hint_scaling)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        y: Tensor | None = None,
        res: Tensor | None = None,
        hint: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> Tensor:
        """As ``BiFlowNet.forward``, with a hint (B, H, d, h, w), NaN where there is none.

        Raises:
            ValueError: as there; no hint, where it counts.
        """
        base = self.biflownet
        if self.control_scale == 0:
            return base(x, time, y, res, attributes)
        if hint is None:
            raise ValueError("no hint was given: this network needs one, (B, H, d, h, w).")
        maps = self.controlnet(x, time, self._prepared(hint), y, res, attributes)
        condition = base.embed_conditions(time, y, res, attributes)  # (B, K)
        features = base.intra_patch_flow(x, condition)  # 2F × (B, M, d, h, w)
        return base.inter_patch_flow(x, condition, features, [self.control_scale * m for m in maps])

    def drop_conditions(self, conditions: Mapping[str, Tensor], is_dropped: Tensor) -> dict[str, Tensor]:
        """The conditions of a batch, without hints where is_dropped (B,) is true: guidance is that of the hint."""
        dropped = is_dropped[:, None, None, None, None]
        return {**conditions, "hint": conditions["hint"].masked_fill(dropped, math.nan)}

    def _prepared(self, hint: Tensor) -> Tensor:
        """Scaled as the network sees latents, and 0 where there is none."""
        return (hint if self.hint_scaling is None else self.hint_scaling(hint)).nan_to_num(0.0)


def _zero_convolution(width: int) -> nn.Conv3d:
    convolution = nn.Conv3d(width, width, kernel_size=1)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution
