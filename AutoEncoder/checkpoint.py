"""Autoencoders from checkpoint files, ours and official ones, and the fingerprint of what latents depend on."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from AutoEncoder.model.autoencoder import Autoencoder
from common.checkpoint_contents import tensors_in
from common.checkpoint_files import check_fits, fingerprint, load_checkpoint, load_weights
from common.errors import UserError
from common.text import shown

# Of whole numbers in a stored config, which are at least 1, the largest that an autoencoder is believed to have.
LARGEST = {
    **{"model.embedding_dim": 4096, "model.n_codes": 2**24, "model.n_hiddens": 4096, "model.num_groups": 4096},
    **{"dataset.image_channels": 256, "dataset.patch_size": 4096},
}
LARGEST_IN_TRAINING = {"model.disc_channels": 1024, "model.disc_layers": 16}  # may be missing
MOST_DOWNSAMPLE = 64
MOST_QUOTED = 120  # characters of what a library says
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
    found = cfg.model.downsample
    if downsample is not None and found != [downsample] * 3:
        raise UserError(
            f"{path}: this autoencoder compresses by {_times(found)}, {downsample}x is needed here; "
            f"use a {downsample}x checkpoint or the config and script for {_times(found)}"
        )
    _check_describes(path, cfg, state)
    model = Autoencoder(cfg)
    model.load_state_dict(state)
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


def check_autoencoder(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """UserError: a file whose config is not that of its weights, or of no autoencoder. Nothing is built."""
    state = _autoencoder_state(path, checkpoint, without=(PERCEPTUAL, DISCRIMINATOR))
    _check_describes(path, _autoencoder_config(path, checkpoint), state)


def _check_describes(path: str | Path, cfg: DictConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Compares the networks of a config with weights while they take no memory, whatever their size."""
    try:
        with torch.device("meta"):
            outline = Autoencoder(cfg)
    except ValueError as error:
        raise UserError(f"{path}: autoencoder config: {error}") from error
    except Exception as error:  # a value of another type, a missing key
        raise _damaged(path, " ".join(str(error).split())[:MOST_QUOTED]) from error
    check_fits(outline, state, path, f"an autoencoder of its config ({_times(cfg.model.downsample)})")


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
    state = tensors_in(path, "state_dict", state)
    return {name: value for name, value in state.items() if not name.startswith(without)}


def _autoencoder_config(path: str | Path, checkpoint: Mapping[str, Any]) -> DictConfig:
    """The config in `hyper_parameters`: itself, or under `cfg`; what networks are built by and encoding reads is sound.

    It holds no interpolations, which `load_checkpoint` refuses.
    """
    stored = checkpoint.get("hyper_parameters")
    if isinstance(stored, (Mapping, DictConfig)) and "cfg" in stored:
        stored = stored["cfg"]
    if not isinstance(stored, (Mapping, DictConfig)) or "model" not in stored or "dataset" not in stored:
        raise UserError(f"{path}: holds no autoencoder config (hyper_parameters with the sections model and dataset)")
    try:
        plain = OmegaConf.to_container(OmegaConf.create(stored), resolve=False)
        cfg = OmegaConf.create(plain)
    except (OmegaConfBaseException, TypeError, AttributeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__} in hyper_parameters") from error
    if not isinstance(plain["model"], dict) or not isinstance(plain["dataset"], dict):
        raise _damaged(path, "model and dataset are no sections with keys")
    for key, largest in {**LARGEST, **LARGEST_IN_TRAINING}.items():
        section, name = key.split(".")
        if name not in plain[section] and key in LARGEST_IN_TRAINING:
            continue
        if name not in plain[section]:
            raise _damaged(path, f"{key} is missing")
        if not _is_whole(value := plain[section][name], largest):
            raise _damaged(path, f"{key} is {shown(value)}, expected a whole number from 1 to {largest}")
    factors, scale = plain["model"].get("downsample"), plain["dataset"].get("intensity_range")
    if not isinstance(factors, list) or not all(_is_whole(factor, MOST_DOWNSAMPLE) for factor in factors or [0]):
        raise _damaged(path, f"model.downsample is {shown(factors)}, expected three numbers up to {MOST_DOWNSAMPLE}")
    is_range = isinstance(scale, list) and len(scale) == 2 and all(isinstance(end, int | float) for end in scale)
    if scale is not None and not (is_range and -math.inf < scale[0] < scale[1] < math.inf):
        raise _damaged(path, f"dataset.intensity_range is {shown(scale)}, expected two numbers, the lower one first")
    return cfg


def _is_whole(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _damaged(path: str | Path, what: str) -> UserError:
    return UserError(f"{path}: the stored autoencoder config is damaged: {what}")


def _times(downsample: Sequence[int]) -> str:
    return f"{downsample[0]}x" if len(set(downsample)) == 1 else " ".join(map(str, downsample))


def latent_fingerprint(autoencoder: nn.Module) -> str:
    """SHA-256 of everything that latents depend on: encoder, pre_vq_conv and the codebook's vectors.

    Stage 2 trains none of these, so both stages of one autoencoder share latents and this fingerprint.
    """
    state = autoencoder.state_dict()
    latent = ("encoder.", "pre_vq_conv.", "codebook.embeddings")
    return fingerprint({name: value for name, value in state.items() if name.startswith(latent)})
