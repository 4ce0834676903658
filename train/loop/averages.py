"""Adam's averages and states of optimisers in checkpoints, before they are believed."""

from typing import Any

from torch import Tensor


def is_average(state: Any) -> bool:
    """Whether it is what Adam keeps of a parameter: two averages of one shape, and how many steps it has done."""
    if not isinstance(state, dict):
        return False
    first, second, step = (state.get(name) for name in ("exp_avg", "exp_avg_sq", "step"))
    are_tensors = isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape
    if not are_tensors or not (first.is_floating_point() and second.is_floating_point()):
        return False
    return step.numel() == 1 if isinstance(step, Tensor) else isinstance(step, int | float)


def is_optimizer_state(saved: Any) -> bool:
    """Whether it has the form that optimisers give theirs, with Adam's averages."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return False
    groups = saved.get("param_groups")
    are_groups = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )
    return are_groups and all(map(is_average, saved["state"].values()))
