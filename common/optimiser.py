"""Adam, fused where it may be, and the learning-rate schedule; the trainings of both networks use them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def build_adam(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], fused: bool
) -> torch.optim.Adam:
    """Adam that stays what it is whatever state it loads.

    A loaded state brings its own options and memory layouts: one of an older run would switch `fused` off and keep the
    betas that a run has set anew, and the fused kernel takes for granted that averages and parameters lie in memory
    alike (`model.channels_last`).

    Args:
        fused: one kernel for all parameters, which leaves a step out where `optimizer.found_inf` is a tensor of 1.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_keep_options)
    optimizer.register_load_state_dict_post_hook(_match_layouts)
    return optimizer


def _keep_options(optimizer: torch.optim.Adam, state: dict) -> dict:
    own = {name: optimizer.defaults[name] for name in ("fused", "betas")}
    groups = [{**group, **own} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _match_layouts(optimizer: torch.optim.Adam) -> None:
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])


def learning_rate_factor(schedule: str, step: int, warm_up_steps: int, num_steps: float) -> float:
    """Share of the full learning rate at optimiser step `step`, counted from 1: linear warm-up, then the schedule.

    Args:
        schedule: "constant", or "cosine" down to 0 at the end.
        warm_up_steps: over which the share rises linearly from 0.
        num_steps: of the whole training, for the cosine.
    """
    warm_up = min(1.0, step / warm_up_steps) if warm_up_steps else 1.0
    if schedule == "constant":
        return warm_up
    return warm_up * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / num_steps)))


def clip_gradients(parameters: Sequence[nn.Parameter], largest_norm: float) -> Tensor:
    """Norm of all gradients before they are scaled down to `largest_norm`; 0: they stay as they are."""
    if largest_norm:
        return nn.utils.clip_grad_norm_(parameters, largest_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
