"""Tensors in safetensors with a description beside them: adapters, and whole checkpoints in place of pickled ones.

Metadata of a file: `kind`, which says what it is, and `about`, JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.documents import parse_json
from common.errors import UserError
from common.hub import local_file
from common.places import is_file

SUFFIX = ".safetensors"
PROJECT = "3D MedDiffusion"
ADAPTER, CHECKPOINT = "adapter", "checkpoint"
# What to do with one kind where the other is needed.
INSTEAD = {
    ADAPTER: "an adapter: give the checkpoint that it was trained on, or merge the two (train/merge_adapters.py)",
    CHECKPOINT: "a whole checkpoint, no adapter: give it as --model-ckpt",
}


def tensor_file(tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> bytes:
    """The content of a file. about: what JSON can hold."""
    from safetensors.torch import save  # models do without

    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}  # none share memory
    return save(copies, metadata={"kind": f"{PROJECT} {kind}", "about": json.dumps(about)})


def read_tensor_file(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description. UserError: no such file, a damaged one, or one of another kind."""
    from safetensors import SafetensorError, safe_open

    file = local_file(path)
    if not is_file(file):
        raise UserError(f"{path}: no such {kind} file")
    try:
        with safe_open(file, framework="pt") as content:
            found, tensors = content.metadata() or {}, {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable {kind} file, expected whole safetensors ({str(error):.80})") from error
    found_kind = found.get("kind", "").removeprefix(f"{PROJECT} ")
    if found_kind != kind:
        of_others = f"not {'an' if kind == ADAPTER else 'a'} {kind} of this project: "
        written_by = "training with trainable=lora" if kind == ADAPTER else "train/export.py"
        raise UserError(f"{path}: {INSTEAD.get(found_kind, f'{of_others}give a file that {written_by} wrote')}")
    try:
        about = parse_json(found["about"])
        about.keys()
    except (KeyError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its description is damaged: copy it again") from error
    return tensors, about
