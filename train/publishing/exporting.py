"""Checkpoints as safetensors: averaged weights, config, what they belong to; nothing that only a training needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from AutoEncoder.checkpoint import PERCEPTUAL, latent_fingerprint, load_autoencoder
from common.checkpoint_files import fingerprint, load_checkpoint, save_checkpoint
from common.errors import UserError
from common.files import check_writable, write_atomically
from common.hub import is_on_hub
from common.log import get_logger
from common.tensor_files import SUFFIX
from config.loading import require
from ddpm.checkpoint import averaged_checkpoint, biflownet_weights, trained_options
from train.publishing.card import CARD_NAME, write_card

AUTOENCODER, BIFLOWNET, CONTROLNET = "autoencoder", "biflownet", "controlnet"  # names of files, and of what they hold
OF_LIGHTNING = ("global_step", "pytorch-lightning_version")
# Options that name files and folders: of these nobody else needs more than the last part.
PATHS = {"root_dir", "default_root_dir", "resume_from_checkpoint", "perceptual_weights", "continue_from", "cache_dir"}
PATHS |= {"data_path", "split", "AE_ckpt", "base_ckpt", "results_dir", "run_name", "ckpt", "init_from", "source"}


@dataclass(frozen=True)
class Part:
    """identity: the fingerprint by which other checkpoints say that they belong to it."""

    path: str
    kind: str
    content: dict[str, Any]
    identity: str


def export(cfg: DictConfig) -> Path:
    """Write the files and the card; return the folder.

    Raises:
        UserError: before anything is written, for files of another kind or that do not belong together, a folder that
            is there already, results that are none.
    """
    require(cfg, "ckpt", "output_dir", "licence")
    folder = Path(cfg.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already: remove it, or name another output_dir")
    parts: dict[str, Part] = {}
    for path in cfg.ckpt:
        part = published(path)
        if part.kind in parts:
            raise UserError(f"{path}: a second {part.kind}: a folder has one of each kind")
        parts[part.kind] = part
    _check_belong(parts, AUTOENCODER, "autoencoder", "trained on latents of another autoencoder")
    _check_belong(parts, BIFLOWNET, "base", "trained beside another BiFlowNet")
    contents = {kind: part.content for kind, part in parts.items()}
    card = write_card(cfg, contents)
    check_writable(folder / CARD_NAME)
    for kind, content in contents.items():
        save_checkpoint(content, folder / f"{kind}{SUFFIX}")
    write_atomically(folder / CARD_NAME, card.encode())
    get_logger().info("%s: %s and %s", folder, ", ".join(f"{kind}{SUFFIX}" for kind in parts), CARD_NAME)
    return folder


def published(path: str) -> Part:
    """What is published of a checkpoint. UserError: none of these networks, an adapter, weights that do not fit."""
    checkpoint = load_checkpoint(path)
    if "state_dict" in checkpoint:
        identity = latent_fingerprint(load_autoencoder(path))  # which also says what is wrong with it
        state = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(PERCEPTUAL)}
        stored = OmegaConf.to_container(OmegaConf.create(checkpoint["hyper_parameters"]), resolve=True)
        kept = {name: checkpoint[name] for name in OF_LIGHTNING if name in checkpoint}
        config = {"cfg": _without_folders(stored.get("cfg", stored))}
        return Part(path, AUTOENCODER, {"state_dict": state, "hyper_parameters": config, **kept}, identity)
    weights = checkpoint.get("ema", checkpoint.get("model"))
    is_controlnet = isinstance(weights, Mapping) and "mid_zero_conv.weight" in weights
    weights = dict(weights) if is_controlnet else biflownet_weights(path, checkpoint, use_ema=True)
    content = averaged_checkpoint(weights, _without_folders(trained_options(checkpoint)), checkpoint)
    return Part(path, CONTROLNET if is_controlnet else BIFLOWNET, content, fingerprint(weights))


def _check_belong(parts: Mapping[str, Part], kind: str, entry: str, problem: str) -> None:
    """UserError where another part says in `entry` that it belongs to another network than the one of this kind."""
    for part in parts.values() if kind in parts else ():
        if part.content.get(entry, parts[kind].identity) != parts[kind].identity:
            raise UserError(f"{part.path}: {problem} than {parts[kind].path}: give the two that belong together")


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _last_part(item) if name in PATHS else _without_folders(item) for name, item in value.items()}
    return [_without_folders(item) for item in value] if isinstance(value, list | tuple) else value


def _last_part(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and not is_on_hub(value) else value
