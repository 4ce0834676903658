"""Checkpoint files: the only place that reads or writes them, builds models from them and checks that they fit.

Loading executes no code: files are unpickled with `weights_only=True` and an allow-list of the plain types that
published checkpoints hold (an OmegaConf config in Lightning's `hyper_parameters`, `argparse.Namespace` in BiFlowNet's
`args`). Saving never leaves half a file: a temporary file beside the target takes its place only once it is whole.
"""

import argparse
import collections
import glob
import hashlib
import logging
import os
import pickle
import re
import typing
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode
from torch import nn

from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.errors import UserError
from ddpm.BiFlowNet import BiFlowNet

# What a pickled DictConfig of plain values consists of, and argparse's Namespace; nothing here can run code.
SAFE_TYPES = (
    DictConfig,
    ListConfig,
    AnyNode,
    ContainerMetadata,
    Metadata,
    typing.Any,
    collections.defaultdict,
    dict,
    list,
    int,
    argparse.Namespace,
)
# Losses' networks that official autoencoder checkpoints may carry along.
IGNORED_WEIGHTS = ("perceptual_loss.",)
SHAPE_FLAGS = ("volume_channels", "model_dim", "dim_mults", "use_attn", "patch_size", "num_dit", "num_classes")

logger = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------------- files


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without executing any code from it.

    Args:
        path: file written by `save_checkpoint`, Lightning or the official release.
        mmap: map tensors instead of reading them, for a look at small entries.

    Raises:
        UserError: missing file, truncated file, another kind of file, or a file that holds a type that is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with _only_safe_types():
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged or hostile file may fail in any way
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint: holds a {type(checkpoint).__name__}, expected a dict")
    return checkpoint


@contextmanager
def _only_safe_types() -> Iterator[None]:
    """The process-wide allow-list, to which any imported library may have added, is ours alone for a while."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(list(SAFE_TYPES)):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            return (
                f"refused: it asks for {found[1]}, and loading that could run code; "
                "expected only tensors, plain values, an OmegaConf config or an argparse.Namespace"
            )
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        return "truncated checkpoint (its end is missing); copy or download it again"
    return f"not a readable checkpoint, truncated or another kind of file ({type(error).__name__})"


def save_checkpoint(obj: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint so that `path` is at any moment the old file or the whole new one.

    Raises:
        UserError: the file could not be written, e.g. on a full disk; the old file is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                torch.save(obj, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch reports a failed write of its archive as RuntimeError
        reason = _os_reason(error)
        if reason is None:
            raise
        kept = "; the previous file is kept" if path.exists() else ""
        raise UserError(
            f"{path}: the checkpoint could not be written ({reason}){kept}; make space and start again"
        ) from error


def _os_reason(error: BaseException) -> str | None:
    """What the operating system said, found along the chain of exceptions; None if this is no failed write."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link.strerror or str(link)
        link = link.__cause__ or link.__context__
    from_writer = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    return "write failed, is the disk full?" if from_writer else None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The readable checkpoint with the highest step in a folder, or None; the step is read from the file.

    Temporary files are left aside; a file that cannot be read is skipped with a warning.
    """
    steps = []
    for path in sorted(Path(folder).glob("*")):
        if path.suffix not in (".pt", ".ckpt") or path.name.startswith("."):
            continue
        try:
            checkpoint = load_checkpoint(path, mmap=True)
        except UserError as error:
            logger.warning("skipped: %s", error)
            continue
        step = checkpoint.get("step", checkpoint.get("global_step", -1))
        steps.append((step if isinstance(step, int) else -1, path.stat().st_mtime_ns, path))
    return max(steps)[2] if steps else None


# ----------------------------------------------------------------------------------------------- autoencoder


def build_autoencoder(cfg: DictConfig) -> patchvolumeAE:
    """A new autoencoder; what the model refuses in its config becomes a UserError."""
    try:
        return patchvolumeAE(cfg)
    except ValueError as error:
        raise UserError(f"autoencoder config: {error}") from error


def load_autoencoder(
    path: str | Path, device: str | torch.device = "cpu", downsample: int | None = None
) -> patchvolumeAE:
    """Builds the autoencoder that a checkpoint describes, with its weights, frozen and in eval mode.

    Args:
        path: Lightning checkpoint, ours or official; weights of its perceptual network are left aside.
        device: where the model goes.
        downsample: compression that is needed (8 or 4); None accepts any.

    Raises:
        UserError: unreadable file, a BiFlowNet checkpoint, another compression, or weights that do not fit the config.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    state = _autoencoder_state(path, checkpoint)
    cfg = _autoencoder_config(path, checkpoint)
    found = list(cfg.model.downsample)
    if downsample is not None and found != [downsample] * 3:
        raise UserError(
            f"{path}: this autoencoder compresses by {_times(found)}, {downsample}x is needed here; "
            f"use a {downsample}x checkpoint or the config and script for {_times(found)}"
        )
    try:
        model = build_autoencoder(cfg)
    except (TypeError, AttributeError) as error:  # a value of another type, a missing key
        raise _damaged(path, error) from error
    _load_state(model, state, path, f"an autoencoder of its config ({_times(found)})")
    if not model.codebook.initialised:
        raise UserError(f"{path}: its codebook was never started from data: train this autoencoder for longer")
    return model.eval().requires_grad_(False).to(device)


def load_autoencoder_weights(model: patchvolumeAE, path: str | Path) -> None:
    """Loads a checkpoint's weights into an autoencoder of the same architecture, for training to start from them.

    Raises:
        UserError: unreadable file, another kind of checkpoint, or weights that do not fit.
    """
    path = Path(path)
    state = _autoencoder_state(path, load_checkpoint(path))
    _load_state(model, state, path, f"the configured autoencoder ({_times(list(model.cfg.model.downsample))})")


def _autoencoder_state(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or "codebook.embeddings" not in state:
        if {"model", "ema"} & set(checkpoint):
            raise UserError(
                f"{path}: a BiFlowNet checkpoint, expected an autoencoder; give it as --model-ckpt or --ckpt"
            )
        raise UserError(
            f"{path}: no autoencoder checkpoint: expected a Lightning file with the autoencoder's state_dict"
        )
    return {name: value for name, value in state.items() if not name.startswith(IGNORED_WEIGHTS)}


def _autoencoder_config(path: Path, checkpoint: Mapping[str, Any]) -> DictConfig:
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


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: the stored autoencoder config is damaged: {' '.join(str(error).split())}")


def _times(downsample: Sequence[int]) -> str:
    return f"{downsample[0]}x" if len(set(downsample)) == 1 else " ".join(map(str, downsample))


def latent_fingerprint(autoencoder: nn.Module) -> str:
    """SHA-256 of everything that latents depend on: encoder, pre_vq_conv and the codebook's vectors.

    Stage 2 trains none of these, so both stages of one autoencoder share latents and this fingerprint.
    """
    digest = hashlib.sha256()
    for name, value in sorted(autoencoder.state_dict().items()):
        if name.startswith(("encoder.", "pre_vq_conv.")) or name == "codebook.embeddings":
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- BiFlowNet


def build_biflownet(cfg: DictConfig, null_label: bool | None = None) -> BiFlowNet:
    """A new BiFlowNet from a training or generation config; what the model refuses becomes a UserError.

    null_label: whether the class table has a row for "no label"; None = where `label_dropout` > 0.
    """
    if null_label is None:
        null_label = cfg.get("label_dropout", 0.0) > 0
    try:
        return BiFlowNet(
            dim=cfg.model_dim,
            dim_mults=tuple(cfg.dim_mults),
            use_sparse_linear_attn=tuple(cfg.use_attn),
            channels=cfg.volume_channels,
            cond_classes=cfg.num_classes,
            patch_size=cfg.patch_size,
            num_mid_DiT=cfg.num_dit,
            vq_size=cfg.vq_size,
            resnet_groups=cfg.resnet_groups,
            DiT_num_heads=cfg.dit_num_heads,
            attn_heads=cfg.attn_heads,
            null_label=null_label,
        )
    except ValueError as error:
        raise UserError(f"BiFlowNet config: {error}") from error


def load_biflownet(cfg: DictConfig, path: str | Path, device: str | torch.device = "cpu") -> BiFlowNet:
    """Builds the model of a generation config with a checkpoint's EMA weights, frozen and in eval mode.

    Whether the model has the null label (which guidance needs) is read off the file.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    weights = _biflownet_weights(path, checkpoint, use_ema=True)
    model = build_biflownet(cfg, null_label=_has_null_label(checkpoint, weights, cfg.num_classes))
    _load_biflownet_state(model, checkpoint, path, use_ema=True)
    return model.eval().requires_grad_(False).to(device)


def load_biflownet_weights(model: BiFlowNet, path: str | Path, use_ema: bool = True) -> None:
    """Loads a checkpoint's averaged (or plain) weights into a model of the same shape.

    A model with a null label takes a file without one: its null row then stays as initialised, with a warning. The
    null row of a file is left aside by a model without one.

    Raises:
        UserError: unreadable file, an autoencoder checkpoint, or other shapes.
    """
    path = Path(path)
    _load_biflownet_state(model, load_checkpoint(path), path, use_ema)


def _biflownet_weights(path: Path, checkpoint: Mapping[str, Any], use_ema: bool) -> dict[str, torch.Tensor]:
    entry = "ema" if use_ema else "model"
    weights = checkpoint.get(entry)
    if not isinstance(weights, Mapping) or "cond_emb.weight" not in weights:
        if "state_dict" in checkpoint:
            raise UserError(f"{path}: an autoencoder checkpoint, expected a BiFlowNet one; give it as --AE-ckpt")
        raise UserError(f"{path}: no BiFlowNet checkpoint: expected a dict whose entry {entry!r} holds its weights")
    return dict(weights)


def _has_null_label(checkpoint: Mapping[str, Any], weights: Mapping[str, torch.Tensor], num_classes: int) -> bool:
    """Whether the class table has a row more than `num_classes`, and not because it was trained with more classes."""
    trained_with = getattr(checkpoint.get("args"), "num_classes", num_classes)
    return len(weights["cond_emb.weight"]) == num_classes + 1 and trained_with == num_classes


def _load_biflownet_state(model: BiFlowNet, checkpoint: Mapping[str, Any], path: Path, use_ema: bool) -> None:
    weights = _biflownet_weights(path, checkpoint, use_ema)
    own, table = model.cond_emb.weight.detach(), weights["cond_emb.weight"]
    if model.null_label is None and _has_null_label(checkpoint, weights, len(own)):
        weights["cond_emb.weight"] = table[:-1]
    elif model.null_label is not None and len(table) == len(own) - 1:
        logger.warning("%s has no null label: the model's own null row stays as initialised", path)
        weights["cond_emb.weight"] = torch.cat([table.to(own), own[-1:]])
    args = checkpoint.get("args")
    flags = [f"{name}={getattr(args, name)}" for name in SHAPE_FLAGS if hasattr(args, name)]
    trained = f"; the file was trained with {', '.join(flags)}" if flags else ""
    _load_state(model, weights, path, f"this BiFlowNet config{trained}")


# ---------------------------------------------------------------------------------------------------- shapes


def _load_state(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path, target: str) -> None:
    """Loads a state dict whose names and shapes must all fit; the error names the first that does not."""
    problems = list(_misfits(model.state_dict(), state))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path}: the weights do not fit {target}: {problems[0]}{more}")
    model.load_state_dict(state)


def _misfits(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, value in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif not isinstance(found[name], torch.Tensor):
            yield f"{name} is a {type(found[name]).__name__}, expected a tensor"
        elif found[name].shape != value.shape:
            yield f"{name} has shape {tuple(found[name].shape)}, expected {tuple(value.shape)}"
    yield from (f"{name} is not part of the model" for name in found if name not in expected)
