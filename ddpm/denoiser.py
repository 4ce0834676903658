"""How a process calls its denoiser: with the conditions that there are, checked, and with guidance."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

Conditions = Mapping[str, Tensor]  # what a denoiser is given beside (x, t), by the names of its arguments


def all_conditions(conditions: Conditions | None, y: Tensor | None, res: Tensor | None) -> dict[str, Tensor]:
    """One mapping of the conditions that are given, together or singly."""
    singly = {name: value for name, value in (("y", y), ("res", res)) if value is not None}
    return {**(conditions or {}), **singly}


def predict(denoise_fn, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """Call a denoiser with the conditions that there are, so that plain functions of (x, t) are denoisers too."""
    output = denoise_fn(x, t, **conditions)
    if output.shape != x.shape:
        raise ValueError(
            f"the denoiser returned {tuple(output.shape)} for latents {tuple(x.shape)}: it has to predict noise of the "
            "same shape (a BiFlowNet with learn_sigma=True predicts twice the channels: build it without)."
        )
    return output.to(x.dtype)  # half precision under autocast; steps and losses are computed in full


def conditioned(denoise_fn, x: Tensor, conditions: Conditions, cond_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser as a function of (x, t), with the conditions of the batch x and the guidance inside.

    Guidance (Ho & Salimans 2021) is out_null + s (out_y - out_null) on the network's output. Whatever it predicts, that
    is guidance of the noise: noise, v, x_0 and velocity are affine functions of each other at given (x, t), and the two
    weights 1 - s and s sum to 1.

    Raises:
        ValueError: values that the denoiser refuses, guidance with neither a null label for y nor attributes or a hint.
    """
    check_conditions(denoise_fn, conditions)
    if cond_scale == 1:
        return partial(predict, denoise_fn, conditions=conditions)
    has_label = "y" in conditions and _attribute(denoise_fn, "null_label") is not None
    if not has_label and not {"attributes", "hint"} & set(conditions):
        reason = "the denoiser was trained without a null label" if "y" in conditions else "no class ids y were given"
        raise ValueError(
            f"cond_scale is {cond_scale}, but {reason}: guidance needs both, attributes or a hint. Use cond_scale=1, "
            "or a model trained with label dropout (BiFlowNet(..., null_label=True))."
        )
    if "res" in conditions:
        conditions = {**conditions, "res": conditions["res"].expand(len(x), 3)}
    is_dropped = torch.ones(len(x), dtype=torch.bool, device=x.device)
    without = _attribute(denoise_fn, "drop_conditions")(conditions, is_dropped)  # (B, ...) each
    both = {name: torch.cat([value, without[name]]) for name, value in conditions.items()}  # (2B, ...)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        # One pass over both halves instead of two passes: the same work with fewer launches.
        output = predict(denoise_fn, torch.cat([x, x]), torch.cat([t, t]), both)  # (2B, C, d, h, w)
        output_with, output_without = output.chunk(2)  # (B, C, d, h, w) each
        return torch.lerp(output_without, output_with, cond_scale)

    return guided


def check_latent(x: Tensor, name: str, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (B, {channels}, d, h, w).")


def check_conditions(denoise_fn, conditions: Conditions) -> None:
    """Let the denoiser check values where it can (``BiFlowNet.check_conditions``): a wrong id is opaque on a GPU."""
    check = _attribute(denoise_fn, "check_conditions")
    if check is not None:
        check(conditions)


def _attribute(denoise_fn, name: str):
    """An attribute of the denoiser, also through a DistributedDataParallel wrapper; None where there is none."""
    inner = getattr(denoise_fn, "module", denoise_fn)
    return getattr(denoise_fn, name, getattr(inner, name, None))
