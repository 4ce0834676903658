"""A BiFlowNet beside a ControlNet: put together for training, and from checkpoint files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig

from common.checkpoint_files import fingerprint
from ddpm.BiFlowNet import BiFlowNet
from ddpm.checkpoint import biflownet_weights, build_controlnet, load_biflownet, load_part_weights
from ddpm.ControlNet import ControlledBiFlowNet
from ddpm.latent_process import LatentProcess
from ddpm.latent_scaling import LatentScaling


class HintChannels(Protocol):
    """What is to be known of a hint (`dataset/hints.py`); is_image: it is scaled as latents are."""

    channels: int
    is_image: bool


def beside_controlnet(
    cfg: DictConfig, base: BiFlowNet, hints: Sequence[HintChannels], process: LatentProcess, control_scale: float
) -> ControlledBiFlowNet:
    """A BiFlowNet with a ControlNet that begins as it. The scale of hints that are images is that of the process."""
    channels = sum(hint.channels for hint in hints)
    scaling = None
    if process.scaling is not None:
        scaling, first = LatentScaling(channels), 0
        for hint in hints:
            if hint.is_image:
                scaling.mean[first : first + hint.channels] = process.scaling.mean
                scaling.std[first : first + hint.channels] = process.scaling.std
            first += hint.channels
    return ControlledBiFlowNet(base, build_controlnet(cfg, base, channels), control_scale, scaling)


def load_controlled(
    cfg: DictConfig,
    hints: Sequence[HintChannels],
    process: LatentProcess,
    base: tuple[str | Path, Mapping[str, Any]],
    control: tuple[str | Path, Mapping[str, Any]],
    device: torch.device,
) -> ControlledBiFlowNet:
    """The averaged weights of both checkpoints, each with its path, frozen and in eval mode.

    Raises:
        UserError: files of other networks than the config's, a ControlNet that was trained beside another BiFlowNet.
    """
    path, checkpoint = base
    model = beside_controlnet(cfg, load_biflownet(cfg, path, checkpoint=checkpoint), hints, process, cfg.control_scale)
    of_base = fingerprint(biflownet_weights(path, checkpoint, use_ema=True))
    path, checkpoint = control
    entry = "ema" if "ema" in checkpoint else "model"  # others save the trained weights alone
    load_part_weights(model.part, path, entry == "ema", checkpoint, of_base)
    return model.eval().requires_grad_(False).to(device)
