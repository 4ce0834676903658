"""Reference numbers of the official release, and the recipe that refills our models with the weights behind them.

The weights themselves are not stored. Each parameter, buffer and input is drawn from a generator seeded with its name,
so a test rebuilds them exactly; ``tests/golden/`` holds the outputs (``*.npz``) and every state-dict name and shape
(``*_keys.json``).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN_SEED = 11

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def golden_normal(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 tensor that depends on (seed, name, shape) only; inputs of the golden cases are these."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(np.asarray(rng.standard_normal(tuple(shape)), dtype=np.float32))


def golden_value(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Value of the parameter or buffer with this state-dict name and shape.

    Weights keep activations of order one (scaled by the fan-in), norms stay near the identity, biases near zero.
    """
    last = name.rsplit(".", 1)[-1]
    if last in ("embeddings", "z_avg"):  # both start from the same vectors, under one name with or without a prefix
        return golden_normal(seed, "codebook.embeddings", shape)
    if last == "N":
        return torch.ones(tuple(shape))
    normal = golden_normal(seed, name, shape)
    if last == "running_var":
        return 1 + 0.1 * normal.abs()
    if last == "running_mean":
        return 0.1 * normal
    if len(shape) >= 2:
        return torch.from_numpy(normal.numpy() / np.float32(math.sqrt(math.prod(shape[1:]))))
    return 1 + 0.1 * normal if last == "weight" else 0.1 * normal


@torch.no_grad()
def fill_module(module: ModuleT, seed: int = GOLDEN_SEED, prefix: str = "") -> ModuleT:
    """Overwrite all floating-point parameters and buffers but ``pos_embed`` in place, and return the module.

    ``prefix`` (with its dot) is put before every name: for a sub-module of the model that a golden case was made with.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and name.rsplit(".", 1)[-1] != "pos_embed":
            tensor.copy_(golden_value(seed, prefix + name, tuple(tensor.shape)))
    return module


def load_golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of one case, e.g. ``load_golden("diffusion")``."""
    with np.load(GOLDEN_FOLDER / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


def load_keys(name: str) -> dict[str, tuple[int, ...]]:
    """State-dict names and shapes in the official order, e.g. ``load_keys("biflownet_8x")``."""
    entries = json.loads((GOLDEN_FOLDER / f"{name}_keys.json").read_text())
    return {key: tuple(shape) for key, shape in dict(entries).items()}
