"""Autoencoders from checkpoint files, ours and official ones, and the fingerprint of what latents depend on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from AutoEncoder.model.autoencoder import Autoencoder
from common.checkpoint_files import fingerprint, load_checkpoint, load_weights
from common.errors import UserError

PERCEPTUAL, DISCRIMINATOR = "perceptual_loss.", "volume_discriminator."  # weights for training alone


def load_autoencoder(
    path: str | Path, device: str | torch.device = "cpu", downsample: int | None = None
) -> Autoencoder:
    """Builds the autoencoder that a checkpoint describes, with its weights, frozen and in eval mode.

    Args:
        path: Lightning checkpoint or one that was exported, ours or official; weights of discriminator and perceptual
            network are left aside.
        device: where the model goes.
        downsample: compression that is needed (8 or 4); None accepts any.

    Raises:
        UserError: unreadable file, a BiFlowNet checkpoint, another compression, or weights that do not fit the config.
    """
    checkpoint = load_checkpoint(path)
    state = _autoencoder_state(path, checkpoint, without=(PERCEPTUAL, DISCRIMINATOR))
    cfg = _autoencoder_config(path, checkpoint)
    found = list(cfg.model.downsample)
    if downsample is not None and found != [downsample] * 3:
        raise UserError(
            f"{path}: this autoencoder compresses by {_times(found)}, {downsample}x is needed here; "
            f"use a {downsample}x checkpoint or the config and script for {_times(found)}"
        )
    try:
        model = Autoencoder(cfg)
    except ValueError as error:
        raise UserError(f"autoencoder config: {error}") from error
    except (TypeError, AttributeError) as error:  # a value of another type, a missing key
        raise _damaged(path, error) from error
    load_weights(model, state, path, f"an autoencoder of its config ({_times(found)})")
    if not model.codebook.initialised:
        raise UserError(f"{path}: its codebook was never started from data: train this autoencoder for longer")
    return model.eval().requires_grad_(False).to(device)


def load_autoencoder_weights(model: Autoencoder, path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint's weights into a `patchvolumeAE` of the same architecture, for training to start from them.

    Returns the whole checkpoint.

    Raises:
        UserError: unreadable file, another kind of checkpoint, or weights that do not fit.
    """
    checkpoint = load_checkpoint(path)
    state = _autoencoder_state(path, checkpoint, without=(PERCEPTUAL,))
    load_weights(model, state, path, f"the configured autoencoder ({_times(list(model.cfg.model.downsample))})")
    return checkpoint


def _autoencoder_state(
    path: str | Path, checkpoint: Mapping[str, Any], without: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or "codebook.embeddings" not in state:
        if {"model", "ema"} & set(checkpoint):
            raise UserError(
                f"{path}: a BiFlowNet checkpoint, expected an autoencoder; give it as --model-ckpt or --ckpt"
            )
        raise UserError(
            f"{path}: no autoencoder checkpoint: expected a Lightning file with the autoencoder's state_dict"
        )
    return {name: value for name, value in state.items() if not name.startswith(without)}


def _autoencoder_config(path: str | Path, checkpoint: Mapping[str, Any]) -> DictConfig:
    """The config in `hyper_parameters`: itself, or under `cfg`."""
    stored = checkpoint.get("hyper_parameters")
    if isinstance(stored, (Mapping, DictConfig)) and "cfg" in stored:
        stored = stored["cfg"]
    if not isinstance(stored, (Mapping, DictConfig)) or "model" not in stored or "dataset" not in stored:
        raise UserError(f"{path}: holds no autoencoder config (hyper_parameters with the sections model and dataset)")
    try:
        cfg = OmegaConf.create(OmegaConf.to_container(OmegaConf.create(stored), resolve=True))
        list(cfg.model.downsample)  # read by the caller
        return cfg
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path}: the stored autoencoder config is damaged: {' '.join(str(error).split())}")


def _times(downsample: Sequence[int]) -> str:
    return f"{downsample[0]}x" if len(set(downsample)) == 1 else " ".join(map(str, downsample))


def latent_fingerprint(autoencoder: nn.Module) -> str:
    """SHA-256 of everything that latents depend on: encoder, pre_vq_conv and the codebook's vectors.

    Stage 2 trains none of these, so both stages of one autoencoder share latents and this fingerprint.
    """
    state = autoencoder.state_dict()
    latent = ("encoder.", "pre_vq_conv.", "codebook.embeddings")
    return fingerprint({name: value for name, value in state.items() if name.startswith(latent)})
