"""Adapter files: the differences that an adapter makes, in safetensors, and beside them what they belong to.

base          fingerprint of the BiFlowNet's averaged weights that it was trained on
rank, alpha, blocks, num_classes, class_map    as of the training
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from common.checkpoint_contents import check_contents
from common.checkpoint_files import load_weights
from common.errors import UserError
from common.files import write_atomically
from common.hub import PREFIX
from common.places import exists
from common.tensor_files import ADAPTER, SUFFIX, read_tensor_file, tensor_file
from ddpm.BiFlowNet import BiFlowNet
from ddpm.lora import Adapter

ADAPTER_NAME = f"adapter{SUFFIX}"  # in a run's folder
MOST = 10**6  # of classes, and of an adapter's rank


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
    described = AdapterFile(
        base, cfg.lora_rank, cfg.lora_alpha, tuple(cfg.lora_blocks), cfg.num_classes, tuple(cfg.class_map), {}
    )
    about = {name: value for name, value in asdict(described).items() if name != "weights"}
    write_atomically(path, tensor_file(weights, ADAPTER, about))


def read_adapter(path: str | Path) -> AdapterFile:
    """UserError: no such file, or none of an adapter of this project."""
    weights, about = read_tensor_file(path, ADAPTER)
    check_contents(path, weights)
    try:
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
        if not colon or f"{path}://" == PREFIX or exists(word):
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
