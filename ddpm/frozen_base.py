"""Denoisers that consist of a frozen BiFlowNet and a part that is trained beside it: an adapter, a ControlNet."""

from typing import Any

from torch import nn

from ddpm.BiFlowNet import BiFlowNet


class WithFrozenBase(nn.Module):
    """A BiFlowNet, frozen and in eval mode, and the `part` that is trained, averaged and saved in its place.

    It is called as the BiFlowNet, and has its attributes and methods beside its own.
    """

    part: nn.Module

    def __init__(self, biflownet: BiFlowNet) -> None:
        super().__init__()
        self.biflownet = biflownet.eval().requires_grad_(False)

    def with_part(self, part: nn.Module) -> "WithFrozenBase":
        """The same base, its weights shared, with another part."""
        raise NotImplementedError

    @property
    def gradient_checkpointing(self) -> bool:
        return self.biflownet.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = value

    def train(self, mode: bool = True) -> "WithFrozenBase":
        super().train(mode)
        self.biflownet.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copying and unpickling ask for names before there are any modules.
            if name.startswith("_") or "biflownet" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.biflownet, name)


def part_of(denoiser: nn.Module) -> nn.Module:
    """What of a denoiser is trained and saved: all of it, but for one with a frozen base."""
    return denoiser.part if isinstance(denoiser, WithFrozenBase) else denoiser


def with_part(denoiser: nn.Module, part: nn.Module) -> nn.Module:
    """The denoiser with another `part_of`."""
    return denoiser.with_part(part) if isinstance(denoiser, WithFrozenBase) else part
