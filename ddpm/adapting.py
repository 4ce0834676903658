"""A checkpoint's BiFlowNet with adapters from files beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common.checkpoint_files import fingerprint, load_checkpoint
from common.errors import UserError
from ddpm.adapter_files import AdapterFile, build_adapter, read_adapter
from ddpm.checkpoint import TABLE, biflownet_weights, build_biflownet, count_classes
from ddpm.lora import AdaptedBiFlowNet
from ddpm.transfer import parse_class_map, transfer


def load_adapted(
    cfg: DictConfig,
    path: str | Path,
    device: str | torch.device = "cpu",
    checkpoint: Mapping[str, Any] | None = None,
    *,
    adapters: Sequence[tuple[str, float]],
) -> AdaptedBiFlowNet:
    """As `load_biflownet`, with adapters: files, and how much each counts.

    The classes are those of the adapters, which all have to have the same.

    Raises:
        UserError: as `load_biflownet`; adapters of another checkpoint, or of other classes.
    """
    checkpoint = load_checkpoint(path) if checkpoint is None else checkpoint
    weights = biflownet_weights(path, checkpoint, use_ema=True)
    base, files = fingerprint(weights), [(name, read_adapter(name), weight) for name, weight in adapters]
    first = files[0][1]
    for name, found, _ in files:
        _check(name, found, files[0][0], first, path, base)
    if cfg.num_classes != first.num_classes:
        raise UserError(
            f"num_classes is {cfg.num_classes}, but {files[0][0]} was trained with {first.num_classes}: give that"
        )
    _, has_null_label = count_classes(checkpoint, weights[TABLE])
    model = build_biflownet(cfg, has_null_label, getattr(checkpoint.get("args"), "attributes", []))
    transfer(model, path, checkpoint, parse_class_map(first.class_map))
    built = [build_adapter(name, found, model, weight) for name, found, weight in files]
    return AdaptedBiFlowNet(model, *built).eval().requires_grad_(False).to(device)


def _check(name: str, found: AdapterFile, other: str, first: AdapterFile, path: str | Path, base: str) -> None:
    if found.base != base:
        raise UserError(f"{name}: an adapter of another model than {path}: give the checkpoint that it was trained on")
    if (found.num_classes, found.class_map) != (first.num_classes, first.class_map):
        raise UserError(
            f"{name}: trained with {found.num_classes} classes (class_map {list(found.class_map)}), {other} with "
            f"{first.num_classes} ({list(first.class_map)}): only adapters of the same classes can be combined"
        )
