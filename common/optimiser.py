"""Adam, fused where it may be; the trainings of both networks use it."""

from collections.abc import Iterable

import torch
from torch import nn


def build_adam(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], fused: bool
) -> torch.optim.Adam:
    """Adam that stays what it is whatever state it loads.

    A loaded state brings its own options and memory layouts: one of an older run would switch `fused` off, and the
    fused kernel takes for granted that averages and parameters lie in memory alike (`model.channels_last`).

    Args:
        fused: one kernel for all parameters, which leaves a step out where `optimizer.found_inf` is a tensor of 1.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    optimizer.register_load_state_dict_post_hook(_match_layouts)
    return optimizer


def _keep_fused(optimizer: torch.optim.Adam, state: dict) -> dict:
    groups = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _match_layouts(optimizer: torch.optim.Adam) -> None:
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])
