"""Sampling steps of BiFlowNet: float32 eager, and what `precision`, `channels_last`, `batch_size` and `compile` do.

Weights are random. Compared first: the noise that each way predicts for one noisy latent; in float32 within 1e-3
standard deviations of the plain way, in half precision within 0.3. Then all ways take turns at whole samplings by DDIM,
whose start counts too: many steps show what one of them takes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from statistics import median

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.compilation import CompiledDenoiser
from common.errors import UserError
from common.precision import PRECISIONS, autocast
from common.processes import choose_device
from ddpm.BiFlowNet import BiFlowNet
from ddpm.diffusion import GaussianDiffusion
from evaluation.benchmarks.measuring import Limits, Report, Row, chosen, compared, count_flops, in_turn, timed

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.3  # largest difference, in standard deviations


@dataclass(frozen=True)
class Scale:
    """Arguments of BiFlowNet and the latent grid."""

    network: dict
    grid: tuple[int, int, int]


PAPER = {"dim": 72, "channels": 8, "patch_size": 1, "cond_classes": 7}
TINY = {"dim": 24, "channels": 4, "patch_size": 2, "cond_classes": 2, "dim_mults": (1, 2)}
TINY |= {"use_sparse_linear_attn": (0, 0), "resnet_groups": 4, "DiT_num_heads": 4}
SCALES = {"paper": Scale(PAPER, (32, 32, 32)), "tiny": Scale(TINY, (8, 8, 8))}


def measure(cfg: DictConfig) -> Report:
    """Compare, then time. UserError if the ways differ, or for a grid that the network can't do."""
    scale, device = SCALES[cfg.size], choose_device(cfg.device)
    grid = tuple(cfg.grid or scale.grid)
    network = random_network(scale, device)
    check_grid(grid, network)
    ways = chosen(_ways(network, grid, cfg, device), cfg.ways, cfg.compile)

    flops = count_flops(build_way(network, grid, device).predict)
    limits = Limits.measured(device, (way.dtype for way in ways.values()))
    num_weights = sum(parameter.numel() for parameter in network.parameters())
    predictions = {name: (way.predict, way.tolerance) for name, way in ways.items()}
    figures = {name: found for name, _, *found in compared(predictions, device)}  # peak memory, difference
    seconds = in_turn({name: partial(timed, way.sample, device) for name, way in ways.items()}, cfg.repetitions)

    def row(name: str) -> Row:
        way = ways[name]
        least = limits.seconds(way.batch_size * flops, num_weights * way.dtype.itemsize, way.dtype)
        share = cfg.steps * least / median(seconds[name])
        return Row(name, seconds[name], cfg.steps * way.batch_size, *figures[name], limit_share=share)

    title = f"BiFlowNet, {num_weights / 1e6:.1f} M parameters, latents of {grid}, {device}"
    notes = {"threads": torch.get_num_threads(), "unit": "one step of one latent"}
    notes["floating point operations of a step"] = f"{flops:.3g}"
    return Report(title, "steps", next(iter(ways)), [row(name) for name in ways], notes)


def check_grid(grid: tuple[int, ...], network: BiFlowNet) -> None:
    """UserError for a latent grid (z, x, y) that the network can't do."""
    if any(extent < 1 or extent % multiple for extent, multiple in zip(grid, network.grid_multiple, strict=True)):
        raise UserError(f"--grid {grid}: multiples of {tuple(network.grid_multiple)} are needed")


@dataclass(frozen=True)
class Way:
    """One way of sampling: a single prediction, and a whole sampling. dtype: of its products."""

    predict: Callable[[], Tensor]
    sample: Callable[[], Tensor]
    tolerance: float
    batch_size: int
    dtype: torch.dtype


def random_network(scale: Scale, device: torch.device) -> BiFlowNet:
    """A frozen network whose parts all have an effect, the same at every call."""
    torch.manual_seed(0)
    network = BiFlowNet(**scale.network).eval().requires_grad_(False)
    for parameter in network.parameters():  # the intra-patch flow starts at zero: without this it would do nothing
        parameter.add_(0.02 * torch.randn_like(parameter))
    return network.to(device)


def _ways(
    network: BiFlowNet, grid: tuple[int, ...], cfg: DictConfig, device: torch.device
) -> dict[str, Callable[[], Way]]:
    """What builds each way."""
    half = ["bf16", "16"] if device.type == "cuda" else ["bf16"]
    other_layout = cache(lambda: copy.deepcopy(network).to(memory_format=torch.channels_last_3d))
    compiled = cache(lambda: CompiledDenoiser(network))

    def way(precision: str = "32", compiles: bool = False, channels_last: bool = False, batch_size: int = 1) -> Way:
        denoiser = compiled() if compiles else other_layout() if channels_last else network
        return build_way(denoiser, grid, device, precision, channels_last, batch_size, cfg.steps)

    builders = {
        "plain": way,
        "channels last": partial(way, channels_last=True),
        f"batch {cfg.batch_size}": partial(way, batch_size=cfg.batch_size),
    }
    for precision in half:
        builders[precision] = partial(way, precision)
        builders[f"{precision} channels last"] = partial(way, precision, channels_last=True)
    return builders | {f"compile {precision}": partial(way, precision, True) for precision in ["32", *half]}


def build_way(
    denoiser: BiFlowNet | CompiledDenoiser,
    grid: tuple[int, ...],
    device: torch.device,
    precision: str = "32",
    channels_last: bool = False,
    batch_size: int = 1,
    steps: int = 2,
) -> Way:
    """Sampling of the latent of seed 0, `batch_size` times."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    shape = (1, denoiser.channels, *grid)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    z = z.repeat(batch_size, 1, 1, 1, 1).to(device, memory_format=layout)  # (B, C, d, h, w)
    y = torch.zeros(batch_size, dtype=torch.long, device=device)
    conditions = {"y": y, "res": torch.tensor(grid, device=device) / denoiser.vq_size}
    diffusion = GaussianDiffusion(denoiser.channels).to(device)

    @torch.no_grad()  # as in generation; in inference mode z and later x differ in kind, and each would be compiled for
    def run(function: Callable[[], Tensor]) -> Tensor:
        with autocast(device, precision):
            return function()

    def predict() -> Tensor:
        return denoiser(z, torch.full((batch_size,), 500, device=device), **conditions)[:1]  # all are the same latent

    def sample() -> Tensor:
        return diffusion.sample(denoiser, z, strategy="ddim", ddim_steps=steps, **conditions)

    tolerance = TOLERANCE if precision == "32" else HALF_TOLERANCE
    dtype = PRECISIONS[precision] or torch.float32
    return Way(partial(run, predict), partial(run, sample), tolerance, batch_size, dtype)
