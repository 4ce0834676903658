"""What a checkpoint file from a stranger may hold: looked at before it takes memory, and before it is believed.

Files are zip archives of `torch.save`, which stores and never compresses, or, older ones, a row of pickles.
"""

import math
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from common.errors import UserError
from common.text import shown

INTERPOLATION = "${"  # begins what OmegaConf would replace, by a variable of the environment for example
MOST_STEPS = 2**53  # that a training is believed to have done


def check_archive(file: Path, name: str | Path) -> None:
    """UserError: a zip archive whose entries are larger unpacked than the file; anything else passes.

    name: of the file, for messages.
    """
    state = file.stat()
    if reason := _oversized(str(file), state.st_ino, state.st_size, state.st_mtime_ns):
        raise UserError(f"{name}: refused: {reason}, as torch.save never writes it: save it again with torch")


@lru_cache(maxsize=256)
def _oversized(path: str, inode: int, size: int, time: int) -> str | None:
    """inode, size, time: what a file of other content differs in."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # damage may show itself in any way, and torch reads what Python does not
        return "its list of entries is damaged"
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        return f"its entry {shown(packed[0])} is compressed"
    if sum(entry.file_size for entry in entries) > size:
        return f"its entries say they are larger than the {size} bytes of the file"
    return None


def check_contents(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """UserError: names that are no text, tensors that aren't plain, interpolations in a config."""
    todo, seen, kept = [("", checkpoint, False)], set(), []
    while todo:
        name, value, is_config = todo.pop()
        if isinstance(value, torch.Tensor):
            if problem := "not a plain value" if is_config else _odd_tensor(value):
                raise UserError(f"{path}: {name} is a tensor, {problem}: save plain values and weights")
        elif isinstance(value, str):
            if is_config and INTERPOLATION in value:
                raise UserError(
                    f"{path}: {name} is {shown(value)}: interpolations in checkpoints are not resolved: save the "
                    "configuration with its values"
                )
        elif isinstance(value, Mapping | list | tuple | Namespace | DictConfig | ListConfig):
            if (id(value), is_config) in seen:  # lists of the same lists, or of themselves
                continue
            seen.add((id(value), is_config))
            if isinstance(value, DictConfig | ListConfig):
                kept.append(_plain(path, name, value))  # what is seen must not make place for another of its id
                todo.append((name, kept[-1], True))
                continue
            if isinstance(value, Namespace):
                value, is_config = vars(value), True
            if isinstance(value, Mapping):
                if not name and (odd := [key for key in value if not isinstance(key, str)]):
                    raise UserError(f"{path}: not a checkpoint: an entry is named {shown(odd[0])}, expected text")
                items = value.items()
            else:
                items = enumerate(value)
            for key, item in items:
                key = key if isinstance(key, str) else shown(key)
                below = f"{name}.{key}" if name else key
                todo.append((shown(below) if len(below) > 80 else below, item, is_config or key == "hyper_parameters"))


def _plain(path: str | Path, name: str, value: DictConfig | ListConfig) -> Any:
    try:
        return OmegaConf.to_container(value, resolve=False)
    except Exception as error:  # a pickled one may be anything inside
        raise UserError(f"{path}: the configuration in {name} is damaged ({type(error).__name__})") from error


def _odd_tensor(value: torch.Tensor) -> str | None:
    """What a tensor is that no model's weights or optimiser's averages are."""
    if value.layout != torch.strided or value.is_nested:
        return "sparse or nested, not dense"
    if value.is_meta:
        return "without values (of the meta device)"
    if value.is_quantized or value.is_conj() or value.is_neg():
        return "quantised or a view"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of size {shown(tuple(value.shape))}, larger than what is stored of it"
    return None


def tensors_in(path: str | Path, entry: str, weights: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """A state dict. UserError: names that are no text, or values that are no tensors."""
    for name, value in weights.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: {entry} has a weight named {shown(name)}, expected text: not one of this project")
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {entry}: {shown(name)} is a {type(value).__name__}, expected a tensor")
    return dict(weights)


def count_in(path: str | Path, checkpoint: Mapping[str, Any], name: str, default: int | None = 0) -> int | None:
    """An entry that counts steps or samples, 0 or more. UserError: anything else."""
    value = checkpoint.get(name, default)
    if value is default:
        return default
    is_whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value.is_integer())
    if not is_whole or isinstance(value, bool) or not 0 <= value <= MOST_STEPS:
        raise UserError(
            f"{path}: {name} is {shown(value)}, expected a whole number from 0 on: the file is damaged, take another"
        )
    return int(value)
