"""BiFlowNets from configs and from checkpoint files, ours and official ones."""

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from common.checkpoint_contents import tensors_in
from common.checkpoint_files import load_checkpoint, load_weights
from common.errors import UserError
from ddpm.attributes import specs_of
from ddpm.BiFlowNet import BiFlowNet
from ddpm.ControlNet import ControlNet
from ddpm.process import SCALING
from ddpm.trained import check_trained

TABLE = "cond_emb.weight"  # of the classes, and behind them the null label
ATTRIBUTES = "attribute_emb."  # what the names of their weights begin with
# Options of the network that no weight's shape tells: a wrong value loads, and gives other images.
WITHOUT_SHAPE = ("vq_size", "resnet_groups", "dit_num_heads")
# Entries beside weights and options that say what a network belongs to, and how far it was trained.
BELONGS_TO = ("autoencoder", "base", SCALING, "step")
SHAPE_FLAGS = ("volume_channels", "model_dim", "dim_mults", "use_attn", "patch_size", "num_dit", "num_classes")

logger = logging.getLogger(__name__)


def build_biflownet(
    cfg: DictConfig, null_label: bool | None = None, attributes: list[Mapping] | None = None
) -> BiFlowNet:
    """A new BiFlowNet from a training or generation config; what the model refuses becomes a UserError.

    null_label: whether the class table has a row for "no label"; None = where `label_dropout` > 0.
    attributes: rows of a training config; None = those of `cfg`.
    """
    if null_label is None:
        null_label = cfg.get("label_dropout", 0.0) > 0
    rows = cfg.attributes if attributes is None else attributes
    return _build(BiFlowNet, cfg, null_label=null_label, attributes=specs_of(rows))


def build_controlnet(cfg: DictConfig, base: BiFlowNet, hint_channel: int) -> ControlNet:
    """A ControlNet that begins as the BiFlowNet of the same config."""
    specs = () if base.attribute_emb is None else base.attribute_emb.specs
    options = {"null_label": base.null_label is not None, "attributes": specs, "hint_channel": hint_channel}
    network = _build(ControlNet, cfg, **options)
    network.begin_as(base)
    return network


def _build(network: type[BiFlowNet], cfg: DictConfig, **options: Any) -> BiFlowNet:
    try:
        return network(
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
            **options,
        )
    except ValueError as error:
        raise UserError(f"{network.__name__} config: {error}") from error


def load_biflownet(
    cfg: DictConfig, path: str | Path, device: str | torch.device = "cpu", checkpoint: Mapping[str, Any] | None = None
) -> BiFlowNet:
    """Builds the model of a generation config with a checkpoint's EMA weights, frozen and in eval mode.

    Whether the model has the null label (which guidance needs), and which attributes, is read off the file.
    checkpoint, errors: as of `load_biflownet_weights`.
    """
    checkpoint = load_checkpoint(path) if checkpoint is None else checkpoint
    weights = biflownet_weights(path, checkpoint, use_ema=True)
    has_null = has_null_label(checkpoint, weights[TABLE], cfg.num_classes)
    model = build_biflownet(cfg, has_null, getattr(checkpoint.get("args"), "attributes", []))
    load_biflownet_weights(model, path, checkpoint=checkpoint)
    return model.eval().requires_grad_(False).to(device)


def load_biflownet_weights(
    model: BiFlowNet, path: str | Path, use_ema: bool = True, checkpoint: Mapping[str, Any] | None = None
) -> None:
    """Loads a checkpoint's averaged (or plain) weights into a model of the same shape.

    A model with a null label takes a file without one: its null row then stays as initialised, with a warning. The
    null row of a file is left aside by a model without one. Attributes that the file doesn't know stay as initialised,
    and add nothing at first.

    checkpoint: what the file holds, where it has been read already.

    Raises:
        UserError: unreadable file, an autoencoder checkpoint, or other shapes.
    """
    checkpoint = load_checkpoint(path) if checkpoint is None else checkpoint
    weights = biflownet_weights(path, checkpoint, use_ema)
    own, table = model.cond_emb.weight.detach(), weights[TABLE]
    if model.null_label is None and has_null_label(checkpoint, table, len(own)):
        weights[TABLE] = table[:-1]
    elif model.null_label is not None and len(table) == len(own) - 1:
        logger.warning("%s has no null label: the model's own null row stays as initialised", path)
        weights[TABLE] = torch.cat([table.to(own), own[-1:]])
    new = {n: w for n, w in model.state_dict().items() if n.startswith(ATTRIBUTES) and n not in weights}
    if new:
        names = ", ".join(dict.fromkeys(name.split(".")[2] for name in new))
        logger.warning("%s knows no %s: the model's own part for it stays as initialised", path, names)
        weights |= new
    args = checkpoint.get("args")
    flags = [f"{name}={getattr(args, name)}" for name in SHAPE_FLAGS if hasattr(args, name)]
    trained = f"; the file was trained with {', '.join(flags)}" if flags else ""
    load_weights(model, weights, path, f"this BiFlowNet config{trained}")


def load_part_weights(
    part: nn.Module, path: str | Path, use_ema: bool, checkpoint: Mapping[str, Any], base: str
) -> None:
    """Loads what was trained beside a frozen BiFlowNet, whose fingerprint is `base`. UserError: another one."""
    entry = "ema" if use_ema else "model"
    weights = checkpoint.get(entry)
    if not isinstance(weights, Mapping):
        raise UserError(f"{path}: no checkpoint of this training: expected a dict whose entry {entry!r} holds weights")
    check_trained(path, checkpoint)
    load_weights(part, tensors_in(path, entry, weights), path, f"the {type(part).__name__} of this config")
    if checkpoint.get("base") not in (None, base):
        raise UserError(f"{path}: trained beside another BiFlowNet than the one that is given: give that")


def trained_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a network was trained with, as far as its file says: official ones lack some options, others have none."""
    args = checkpoint.get("args")
    return dict(vars(args)) if isinstance(args, Namespace) else {}


def averaged_checkpoint(
    weights: Mapping[str, torch.Tensor], options: Mapping[str, Any], checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    """A checkpoint without what only training needs: averaged weights, and what `checkpoint` says of them."""
    kept = {name: checkpoint[name] for name in BELONGS_TO if checkpoint.get(name) is not None}
    return {"ema": weights, "args": Namespace(**options), **kept}


def biflownet_weights(path: str | Path, checkpoint: Mapping[str, Any], use_ema: bool) -> dict[str, torch.Tensor]:
    entry = "ema" if use_ema else "model"
    weights = checkpoint.get(entry)
    if not isinstance(weights, Mapping) or TABLE not in weights:
        if "state_dict" in checkpoint:
            raise UserError(f"{path}: an autoencoder checkpoint, expected a BiFlowNet one; give it as --AE-ckpt")
        if not use_ema and isinstance(checkpoint.get("ema"), Mapping):
            raise UserError(f"{path}: has averaged weights alone, so no training goes on: begin one with --init-from")
        if isinstance(weights, Mapping) and any(".lora_" in str(name) for name in weights):
            raise UserError(f"{path}: an adapter, expected a BiFlowNet checkpoint: give the one that it was trained on")
        raise UserError(f"{path}: no BiFlowNet checkpoint: expected a dict whose entry {entry!r} holds its weights")
    if "mid_zero_conv.weight" in weights:
        raise UserError(
            f"{path}: a ControlNet, expected a BiFlowNet checkpoint: give the one that it was trained beside"
        )
    if getattr(weights[TABLE], "ndim", None) != 2:
        raise UserError(f"{path}: {TABLE} is no table of classes: no BiFlowNet of this project")
    check_trained(path, checkpoint)
    return tensors_in(path, entry, weights)


def count_classes(checkpoint: Mapping[str, Any], table: torch.Tensor) -> tuple[int, bool]:
    """How many classes a file's table has, and whether the null label lies behind them. Older files don't say."""
    num_classes = getattr(checkpoint.get("args"), "num_classes", len(table))
    return num_classes, len(table) == num_classes + 1


def has_null_label(checkpoint: Mapping[str, Any], table: torch.Tensor, num_classes: int) -> bool:
    """Whether the class table has a row more than `num_classes`, and not because it was trained with more classes."""
    trained_with = getattr(checkpoint.get("args"), "num_classes", num_classes)
    return len(table) == num_classes + 1 and trained_with == num_classes


def check_options(cfg: DictConfig, path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """UserError where a config says other things of the network than its checkpoint that no weight's shape tells."""
    check_trained(path, checkpoint)
    for name in ("timesteps", *WITHOUT_SHAPE):
        trained = getattr(checkpoint.get("args"), name, cfg[name])
        if trained != cfg[name]:
            raise UserError(f"{name} is {cfg[name]}, but {path} was trained with {trained}: give that")
