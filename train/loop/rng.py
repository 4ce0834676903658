"""The global random generators' states, for checkpoints. What training draws itself has generators of its own."""

from pathlib import Path
from typing import Any

import torch

from common.errors import UserError


def random_state() -> dict[str, Any]:
    """States of the CPU's and of all GPUs' global generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state: dict[str, Any], path: str | Path = "the checkpoint") -> None:
    """Set the global generators to a state of `random_state`; GPUs only if there are as many as then.

    UserError: the state is damaged. path: where it comes from.
    """
    try:
        torch.set_rng_state(state["cpu"])
        if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: its states of random numbers (rng) are damaged: go on from another one") from error
