"""Adapter files: the differences that an adapter makes, in safetensors, and beside them what they belong to.

base          fingerprint of the BiFlowNet's averaged weights that it was trained on
rank, alpha, blocks, num_classes, class_map    as of the training
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from common.checkpoint_contents import check_contents
from common.checkpoint_files import load_weights
from common.documents import parse_json
from common.errors import UserError
from common.files import write_atomically
from common.places import exists, is_file
from ddpm.BiFlowNet import BiFlowNet
from ddpm.lora import Adapter

ADAPTER_NAME = "adapter.safetensors"  # in a run's folder
MOST = 10**6  # of classes, and of an adapter's rank
KIND = "3D MedDiffusion adapter"


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds."""

    base: str
    rank: int
    alpha: float
    blocks: tuple[str, ...]
    num_classes: int
    class_map: tuple[str, ...]
    weights: Mapping[str, Tensor]


def write_adapter(path: str | Path, weights: Mapping[str, Tensor], cfg: DictConfig, base: str) -> None:
    """cfg: of the training; base: fingerprint of what it trained on. UserError where it can't be written."""
    from safetensors.torch import save  # models do without

    described = AdapterFile(
        base, cfg.lora_rank, cfg.lora_alpha, tuple(cfg.lora_blocks), cfg.num_classes, tuple(cfg.class_map), {}
    )
    about = {name: value for name, value in asdict(described).items() if name != "weights"}
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomically(path, save(tensors, metadata={"kind": KIND, "about": json.dumps(about)}))


def read_adapter(path: str | Path) -> AdapterFile:
    """UserError: no such file, or none of an adapter of this project."""
    from safetensors import SafetensorError, safe_open

    if not is_file(path):
        raise UserError(f"{path}: no such adapter file")
    try:
        with safe_open(path, framework="pt") as file:
            found, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_contents(path, weights)
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path}: not a readable adapter file, expected whole safetensors ({reason})") from error
    if found.get("kind") != KIND:
        raise UserError(f"{path}: not an adapter of this project: give the {ADAPTER_NAME} of a run")
    try:
        about: dict[str, Any] = parse_json(found["about"])
        if not (0 < about["rank"] <= MOST and 0 < about["num_classes"] <= MOST and math.isfinite(about["alpha"])):
            raise ValueError
        return AdapterFile(
            str(about["base"]),
            int(about["rank"]),
            float(about["alpha"]),
            tuple(map(str, about["blocks"])),
            int(about["num_classes"]),
            tuple(map(str, about["class_map"])),
            weights,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its description is damaged: copy it again") from error


def parse_adapters(words: Sequence[str]) -> list[tuple[str, float]]:
    """Files and weights of words such as FILE and FILE:0.7. UserError for a weight that is no number."""
    found = []
    for word in words:
        path, colon, weight = word.rpartition(":")
        if not colon or exists(word):
            path, weight = word, "1"
        try:
            found.append((path, float(weight)))
        except ValueError as error:
            raise UserError(f"adapter: {word}: FILE or FILE:WEIGHT is expected, {weight!r} is no number") from error
    return found


def build_adapter(path: str | Path, found: AdapterFile, biflownet: BiFlowNet, weight: float) -> Adapter:
    """The adapter of a file beside a network of its `num_classes`, as strong as `weight` says.

    UserError: it does not fit the network.
    """
    try:
        adapter = Adapter(biflownet, found.rank, found.alpha, found.blocks)
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{path}: the adapter does not fit the network: {error}") from error
    load_weights(adapter, found.weights, path, "the layers of this BiFlowNet")
    adapter.strengthen(weight)
    return adapter
