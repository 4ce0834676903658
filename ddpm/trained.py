"""What a BiFlowNet's checkpoint says of its training in `args`: believed after a look, as options are."""

import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import ListConfig

from common.errors import UserError
from common.text import shown
from ddpm.attributes import AttributeSpec, specs_of

COUNTS = (
    *("num_classes", "timesteps", "resnet_groups", "dit_num_heads", "attn_heads", "vq_size"),
    *("volume_channels", "model_dim", "patch_size", "num_dit"),
)
LISTS = ("dim_mults", "use_attn")
NAMES = ("process", "prediction")
MOST = 10**6  # of anything that is counted
MOST_ATTRIBUTES, MOST_CATEGORIES = 1000, 10**5  # categories of all attributes together: each is a row of a table


def check_trained(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """UserError: an option that no training can have had. Files without `args`, or with some of them, pass."""
    args = checkpoint.get("args")
    if not isinstance(args, Namespace):
        return
    for name, value in vars(args).items():
        if name in COUNTS and not (_is_count(value) or (name == "num_dit" and value == 0)):
            raise _damaged(path, name, value, f"a whole number from 1 to {MOST:,}")
        if name in LISTS and not (_is_list(value) and all(isinstance(item, int | float) for item in value)):
            raise _damaged(path, name, value, "a list of numbers")
        if name in NAMES and not isinstance(value, str):
            raise _damaged(path, name, value, "text")
    trained_attributes(path, checkpoint)


def trained_attributes(path: str | Path, checkpoint: Mapping[str, Any]) -> tuple[AttributeSpec, ...]:
    """The attributes that a checkpoint's network knows. UserError: rows that are none."""
    rows = getattr(checkpoint.get("args"), "attributes", [])
    try:
        specs = specs_of(rows)
        is_small = len(rows) <= MOST_ATTRIBUTES and sum(len(spec.categories) for spec in specs) <= MOST_CATEGORIES
        if is_small and all(map(_is_sound, specs)):
            return specs
    except (TypeError, KeyError, ValueError, AttributeError, IndexError):
        pass
    raise _damaged(path, "attributes", rows, "rows with name, source, column, and range or categories")


def _is_sound(spec: AttributeSpec) -> bool:
    texts = (spec.name, *spec.categories)
    if not all(isinstance(text, str) for text in texts) or not spec.name:
        return False
    if spec.range is None:
        return len(spec.categories) > 0
    return len(spec.range) == 2 and all(map(math.isfinite, spec.range)) and spec.range[0] < spec.range[1]


def _is_count(value: Any) -> bool:
    if _is_list(value):  # an edge for each axis
        return 0 < len(value) <= 3 and all(map(_is_count, value))
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | ListConfig) and len(value) <= MOST


def _damaged(path: str | Path, name: str, value: Any, expected: str) -> UserError:
    return UserError(f"{path}: its args say that {name} was {shown(value)}, expected {expected}: take another file")
