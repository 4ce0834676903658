"""The diffusion process that a config means: one place for training, previews, generation and studies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.errors import UserError
from ddpm.diffusion import GaussianDiffusion

# What the network's output means where a checkpoint doesn't say, as those of the official release.
OFFICIAL = {"prediction": "noise"}


def build_process(cfg: DictConfig) -> GaussianDiffusion:
    """The process of a training or generation config; what it refuses becomes a UserError."""
    try:
        return GaussianDiffusion(
            cfg.volume_channels,
            cfg.timesteps,
            cfg.loss_type,
            prediction=cfg.prediction,
            # Of no effect on sampling, so generation has none of these.
            loss_weighting=cfg.get("loss_weighting", "none"),
            timestep_draw=cfg.get("timestep_draw", "uniform"),
        )
    except ValueError as error:
        raise UserError(f"diffusion config: {error}") from error


def take_process(cfg: DictConfig, path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Set the options of a generation config that say what the network's output means, by its checkpoint.

    Raises:
        UserError: the config says something else.
    """
    for name, official in OFFICIAL.items():
        trained = getattr(checkpoint.get("args"), name, official)
        if cfg[name] not in (None, trained):
            raise UserError(f"{name} is {cfg[name]}, but {path} was trained with {trained}: leave {name} out")
        cfg[name] = trained
