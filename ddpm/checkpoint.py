"""BiFlowNets from configs and from checkpoint files, ours and official ones."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common.checkpoint_files import load_checkpoint, load_weights
from common.errors import UserError
from ddpm.attributes import specs_of
from ddpm.BiFlowNet import BiFlowNet

ATTRIBUTES = "attribute_emb."  # what the names of their weights begin with
SHAPE_FLAGS = ("volume_channels", "model_dim", "dim_mults", "use_attn", "patch_size", "num_dit", "num_classes")

logger = logging.getLogger(__name__)


def build_biflownet(
    cfg: DictConfig, null_label: bool | None = None, attributes: list[Mapping] | None = None
) -> BiFlowNet:
    """A new BiFlowNet from a training or generation config; what the model refuses becomes a UserError.

    null_label: whether the class table has a row for "no label"; None = where `label_dropout` > 0.
    attributes: rows of a training config; None = those of `cfg`.
    """
    rows = cfg.attributes if attributes is None else attributes
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
            attributes=specs_of(rows),
        )
    except ValueError as error:
        raise UserError(f"BiFlowNet config: {error}") from error


def load_biflownet(
    cfg: DictConfig, path: str | Path, device: str | torch.device = "cpu", checkpoint: Mapping[str, Any] | None = None
) -> BiFlowNet:
    """Builds the model of a generation config with a checkpoint's EMA weights, frozen and in eval mode.

    Whether the model has the null label (which guidance needs), and which attributes, is read off the file.
    checkpoint, errors: as of `load_biflownet_weights`.
    """
    checkpoint = load_checkpoint(path) if checkpoint is None else checkpoint
    weights = _biflownet_weights(path, checkpoint, use_ema=True)
    has_null_label = _has_null_label(checkpoint, weights, cfg.num_classes)
    model = build_biflownet(cfg, has_null_label, getattr(checkpoint.get("args"), "attributes", []))
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
    weights = _biflownet_weights(path, checkpoint, use_ema)
    own, table = model.cond_emb.weight.detach(), weights["cond_emb.weight"]
    if model.null_label is None and _has_null_label(checkpoint, weights, len(own)):
        weights["cond_emb.weight"] = table[:-1]
    elif model.null_label is not None and len(table) == len(own) - 1:
        logger.warning("%s has no null label: the model's own null row stays as initialised", path)
        weights["cond_emb.weight"] = torch.cat([table.to(own), own[-1:]])
    new = {n: w for n, w in model.state_dict().items() if n.startswith(ATTRIBUTES) and n not in weights}
    if new:
        names = ", ".join(dict.fromkeys(name.split(".")[2] for name in new))
        logger.warning("%s knows no %s: the model's own part for it stays as initialised", path, names)
        weights |= new
    args = checkpoint.get("args")
    flags = [f"{name}={getattr(args, name)}" for name in SHAPE_FLAGS if hasattr(args, name)]
    trained = f"; the file was trained with {', '.join(flags)}" if flags else ""
    load_weights(model, weights, path, f"this BiFlowNet config{trained}")


def _biflownet_weights(path: str | Path, checkpoint: Mapping[str, Any], use_ema: bool) -> dict[str, torch.Tensor]:
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
