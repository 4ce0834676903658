"""A residual pair of 3³ convolutions with its gradients on a CPU, beside torch's own: `common/convolution.py`.

Few channels and small grids, as in the demo's networks and in tests. Compared first: the gradients of all weights agree
within 1e-4 of their norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.convolution import Conv3d
from evaluation.benchmarks.measuring import Report, Row, compared, in_turn, relative_error, timed

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Work:
    """What is convolved: a batch of so many channels, and its grid."""

    batch: int
    channels: int
    grid: int


WORKS = {
    "paper": {"patches of 16³": Work(8, 8, 16), "a volume of 64³": Work(1, 8, 64), "latents of 16³": Work(2, 24, 16)},
    "tiny": {"patches of 16³": Work(2, 4, 16)},
}


def measure(cfg: DictConfig) -> Report:
    """Compare, then time, each work in turn. UserError if the ways differ."""
    device = torch.device("cpu")
    rows, notes = [], {"threads": torch.get_num_threads()}
    for title, work in WORKS[cfg.size].items():
        ways = {f"{title}, {name}": _step(kind, work) for name, kind in (("torch", nn.Conv3d), ("ours", Conv3d))}
        results = {name: (way, TOLERANCE) for name, way in ways.items()}
        figures = {name: found for name, _, *found in compared(results, device, relative_error)}
        seconds = in_turn({name: partial(timed, way, device) for name, way in ways.items()}, cfg.repetitions)
        rows += [Row(name, seconds[name], work.batch, *figures[name]) for name in ways]
        plain, ours = (median(seconds[name]) for name in ways)
        notes[f"{title}, times torch"] = round(plain / ours, 2)
    return Report("convolutions of few channels, forward and backward, cpu", "samples", rows[0].name, rows, notes)


def _step(kind: type[nn.Conv3d], work: Work) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(work.batch, work.channels, *[work.grid] * 3)  # (B, C, d, h, w)
    convolve = nn.Sequential(*(kind(work.channels, work.channels, 3, padding=1) for _ in range(2)))

    def step() -> Tensor:
        convolve.zero_grad()
        (x + convolve(x)).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in convolve.parameters()])

    return step
