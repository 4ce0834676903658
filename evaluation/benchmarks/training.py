"""What the benchmarks of training steps share: ways, their gradients compared, timed and held against the limit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from evaluation.benchmarks import measuring
from evaluation.benchmarks.measuring import Report, Row

OPTIMISER_TOUCHES = 7  # Adam reads weights, gradients and two averages, and writes all but the gradients


@dataclass(frozen=True)
class Way:
    """One way of training.

    backward: computes the gradients anew, (parameters,) as one vector. step: the same, and the optimisers' steps.
    weights: of its networks. tolerance: largest norm of the gradients' difference from the plain ones, over their norm.
    dtype: type of its convolutions.
    """

    backward: Callable[[], Tensor]
    step: Callable[[], None]
    weights: Sequence[Tensor]
    tolerance: float
    dtype: torch.dtype


def compare_and_time(
    title: str, ways: Mapping[str, Way], num_samples: int, device: torch.device, repetitions: int
) -> Report:
    """Gradients of each way beside those of the first, then whole steps in turn. UserError where they differ.

    The share of the limit counts the operations of the first way for all, so recomputing does not raise it, and beside
    them what the optimisers read and write.
    """
    first = next(iter(ways))
    results = {name: (way.backward, way.tolerance) for name, way in ways.items()}
    rows = {
        name: figures for name, _, *figures in measuring.compared(results, device, measuring.relative_error)
    }  # memory, difference
    flops = measuring.count_flops(ways[first].backward)
    moved = OPTIMISER_TOUCHES * sum(weight.nbytes for weight in ways[first].weights if weight.requires_grad)
    limits = measuring.Limits.measured(device, (way.dtype for way in ways.values()))
    seconds = measuring.in_turn(
        {name: partial(measuring.timed, way.step, device) for name, way in ways.items()}, repetitions
    )

    def row(name: str) -> Row:
        share = limits.seconds(flops, moved, ways[name].dtype) / median(seconds[name])
        return Row(name, seconds[name], num_samples, *rows[name], limit_share=share)

    named = {str(dtype).removeprefix("torch."): rate for dtype, rate in limits.products.items()}
    notes = {
        "threads": torch.get_num_threads(),
        "floating point operations": f"{flops:.3g}",
        "limit, operations a second": {name: f"{rate:.3g}" for name, rate in named.items()},
        "floor, seconds": {name: f"{flops / rate:.3g}" for name, rate in named.items()},
    }
    if device.type == "cpu":  # it keeps all at once; a GPU's peak is exact and says as much
        kept = {name: measuring.kept_gb(way.backward, way.weights) / num_samples for name, way in ways.items()}
        notes["kept for backward, GB a sample"] = {name: float(f"{value:.3g}") for name, value in kept.items()}
    return Report(title, "samples", first, [row(name) for name in ways], notes)


def gradients(*modules: nn.Module) -> Tensor:
    """The gradients of the modules' parameters as one vector; zeros for parameters without."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    found = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    return torch.cat([gradient.float().flatten() for gradient in found])
