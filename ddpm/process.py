"""The process that a config means, diffusion or flow: one place for training, previews, generation and studies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.errors import UserError
from common.text import shown
from ddpm.diffusion import GaussianDiffusion
from ddpm.flow import FLOW_SAMPLERS, RectifiedFlow
from ddpm.latent_process import LatentProcess
from ddpm.latent_scaling import LatentScaling
from ddpm.predictions import PREDICTIONS
from ddpm.samplers import SAMPLERS, Sampler
from ddpm.trained import check_trained

# What the network's output means where a checkpoint doesn't say, as those of the official release.
OFFICIAL = {"process": "diffusion", "prediction": "noise"}
SCALING = "latent_scaling"  # entry of a checkpoint: mean and standard deviation of each channel, where they count
SAMPLERS_OF = {"diffusion": SAMPLERS, "flow": FLOW_SAMPLERS}  # of each process
KNOWN = {"process": tuple(SAMPLERS_OF), "prediction": PREDICTIONS}


def build_process(cfg: DictConfig, checkpoint: Mapping[str, Any] | None = None) -> LatentProcess:
    """The process of a training or generation config; what it refuses becomes a UserError.

    checkpoint: that of a generation, which says how latents are scaled. In training its `scaling` is still to be set.
    """
    # These have no effect on sampling, so generation has none of them.
    loss_weighting, timestep_draw = cfg.get("loss_weighting", "none"), cfg.get("timestep_draw", "uniform")
    loss_type = cfg.get("loss_type", "l1")
    state = (checkpoint or {}).get(SCALING)
    scaling = LatentScaling(cfg.volume_channels) if state or cfg.get("latent_scaling") == "unit" else None
    try:
        if state:
            scaling.take(state)
        if cfg.process == "flow":  # the configuration refuses prediction and loss_weighting with it
            return RectifiedFlow(cfg.volume_channels, cfg.timesteps, loss_type, timestep_draw, scaling)
        return GaussianDiffusion(
            cfg.volume_channels,
            cfg.timesteps,
            loss_type,
            prediction=cfg.prediction,
            loss_weighting=loss_weighting,
            timestep_draw=timestep_draw,
            scaling=scaling,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"diffusion config: {error}") from error


def take_process(cfg: DictConfig, path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Set the options of a generation config that say what the network's output means, by its checkpoint.

    Raises:
        UserError: the config says something else, or names a sampler of another process.
    """
    check_trained(path, checkpoint)
    for name, official in OFFICIAL.items():
        trained = getattr(checkpoint.get("args"), name, official)
        if trained not in KNOWN[name]:
            raise UserError(f"{path}: trained with {name} {shown(trained)}, expected {' or '.join(KNOWN[name])}")
        if cfg[name] not in (None, trained):
            raise UserError(f"{name} is {cfg[name]}, but {path} was trained with {trained}: leave {name} out")
        cfg[name] = trained
    if cfg.sampling_strategy not in SAMPLERS_OF[cfg.process]:
        raise UserError(
            f"sampling_strategy is {cfg.sampling_strategy}, but {path} was trained with process {cfg.process}: choose "
            f"{' or '.join(SAMPLERS_OF[cfg.process])}"
        )


def take_scaling(scaling: LatentScaling | None, path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Set the scale of latents, where there is one, to that of a checkpoint. UserError: it is damaged."""
    if scaling is not None:
        try:
            scaling.take(checkpoint.get(SCALING))
        except ValueError as error:
            raise UserError(f"{path}: {error}: take another checkpoint") from error


def find_sampler(strategy: str) -> Sampler:
    """The sampler of this name, of whichever process."""
    return {name: sampler for samplers in SAMPLERS_OF.values() for name, sampler in samplers.items()}[strategy]
