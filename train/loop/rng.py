"""The global random generators' states, for checkpoints. What training draws itself has generators of its own."""

from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """States of the CPU's and of all GPUs' global generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to a state of `random_state`; GPUs only if there are as many as then."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
