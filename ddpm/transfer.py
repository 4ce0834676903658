"""The weights of a checkpoint as the beginning of a BiFlowNet with other classes or attributes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint_files import load_weights
from common.errors import UserError
from ddpm.attributes import AttributeSpec
from ddpm.BiFlowNet import BiFlowNet
from ddpm.checkpoint import ATTRIBUTES, TABLE, biflownet_weights, count_classes
from ddpm.trained import trained_attributes


@dataclass(frozen=True)
class ClassStart:
    """What the row of a class begins as: that of a class of the checkpoint; None: the mean of all of them.

    is_new: it is another class than that one.
    """

    source: int | None
    is_new: bool


ClassMap = Mapping[int, ClassStart]  # by class id; ids that it doesn't name are those of the checkpoint, or new


def parse_class_map(words: Sequence[str]) -> dict[int, ClassStart]:
    """Of words such as 0=3 (class 0 is class 3 of the checkpoint), 1=new and 1=new:4. UserError for others."""
    found: dict[int, ClassStart] = {}
    for word in words:
        match = re.fullmatch(r"(\d{1,6})=(?:(new)(?::(\d{1,6}))?|(\d{1,6}))", word, flags=re.ASCII)
        if match is None:
            raise UserError(f"class_map: classes are given as 0=3 1=new 2=new:4, got {word!r:.60}")
        class_id, source = int(match[1]), match[3] or match[4]
        if class_id in found:
            raise UserError(f"class_map: class {class_id} is given twice")
        found[class_id] = ClassStart(None if source is None else int(source), match[2] is not None)
    return found


def starts_of(num_classes: int, num_known: int, class_map: ClassMap) -> dict[int, ClassStart]:
    """Of each class, 0 to num_classes - 1. UserError for a class map that names others."""
    if strange := [class_id for class_id in class_map if class_id >= num_classes]:
        raise UserError(f"class_map: there is no class {strange[0]}, num_classes is {num_classes}")
    return {
        class_id: class_map.get(
            class_id, ClassStart(class_id, False) if class_id < num_known else ClassStart(None, True)
        )
        for class_id in range(num_classes)
    }


def transfer(
    model: BiFlowNet, path: str | Path, checkpoint: Mapping[str, Any], class_map: ClassMap | None = None
) -> list[str]:
    """Set a model's weights to a checkpoint's averaged ones. Returns notes on what begins anew or is not taken over.

    Raises:
        UserError: no BiFlowNet checkpoint, one of another architecture, a class map with ids that there are not.
    """
    weights = biflownet_weights(path, checkpoint, use_ema=True)
    table, notes = _table(model, path, checkpoint, weights[TABLE], class_map or {})
    weights[TABLE] = table
    notes += _exchange_attributes(model, path, checkpoint, weights)
    load_weights(model, weights, path, "this BiFlowNet config: only its classes and attributes may be others")
    return notes


def _table(
    model: BiFlowNet, path: str | Path, checkpoint: Mapping[str, Any], old: Tensor, class_map: ClassMap
) -> tuple[Tensor, list[str]]:
    """The class table, (classes, K), with one row more where the model has a null label."""
    known, has_null = count_classes(checkpoint, old)
    mean, rows, notes, used = old[:known].mean(0), [], [], set()
    for class_id, start in starts_of(model.cond_classes, known, class_map).items():
        if start.source is not None and start.source >= known:
            raise UserError(f"class_map: class {class_id}: {path} has no class {start.source}, only 0 to {known - 1}")
        rows.append(mean if start.source is None else old[start.source])
        if start.is_new:
            of = "the mean of all classes" if start.source is None else f"class {start.source}"
            notes.append(f"class {class_id} is new and begins as {of}")
        else:
            used.add(start.source)
    if left := sorted(set(range(known)) - used):
        notes.append(f"not taken over: class {', '.join(map(str, left))} of the checkpoint")
    if model.null_label is not None:
        rows.append(old[known] if has_null else mean)
        notes += [] if has_null else ["the null label is new and begins as the mean of all classes"]
    elif has_null:
        notes.append("not taken over: the null label, as label_dropout is 0")
    return torch.stack(rows), notes


def _exchange_attributes(
    model: BiFlowNet, path: str | Path, checkpoint: Mapping[str, Any], weights: dict[str, Tensor]
) -> list[str]:
    """Leave in `weights` those of attributes that both have, and the model's own zeros for what is new to it."""
    known = {spec.name: spec for spec in trained_attributes(path, checkpoint)}
    wanted = {} if model.attribute_emb is None else {spec.name: spec for spec in model.attribute_emb.specs}
    shared = {name for name, spec in wanted.items() if known.get(name) == spec}

    def is_shared(name: str) -> bool:
        return not name.startswith(ATTRIBUTES) or name.split(".")[2] in shared

    for name in [name for name in weights if not is_shared(name)]:
        del weights[name]
    weights |= {name: value for name, value in model.state_dict().items() if not is_shared(name)}
    notes = [_note_on_new(wanted[name], known.get(name)) for name in wanted if name not in shared]
    return notes + [f"not taken over: attribute {name}" for name in known if name not in wanted]


def _note_on_new(spec: AttributeSpec, before: AttributeSpec | None) -> str:
    why = "" if before is None else f", as its values were {before.range or list(before.categories)} before"
    return f"attribute {spec.name} begins anew{why}"
