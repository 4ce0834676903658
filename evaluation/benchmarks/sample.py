"""Sampling steps of BiFlowNet: float32 eager, and what `precision`, `channels_last`, `batch_size` and `compile` do.

Weights are random. Compared first: the noise that each way predicts for one noisy latent; in float32 within 1e-3
standard deviations of the plain way, in half precision within 0.3. Then all ways take turns at whole samplings.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.compilation import CompiledDenoiser
from common.errors import UserError
from common.precision import autocast
from common.processes import choose_device
from ddpm.BiFlowNet import BiFlowNet
from ddpm.diffusion import GaussianDiffusion
from evaluation.benchmarks.measuring import Report, Row, compared, in_turn, timed

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.3  # largest difference, in standard deviations


@dataclass(frozen=True)
class Scale:
    """Arguments of BiFlowNet, the latent grid, and steps of a sampling."""

    network: dict
    grid: tuple[int, int, int]
    steps: int


PAPER = {"dim": 72, "channels": 8, "patch_size": 1, "cond_classes": 7}
TINY = {"dim": 24, "channels": 4, "patch_size": 2, "cond_classes": 2, "dim_mults": (1, 2)}
TINY |= {"use_sparse_linear_attn": (0, 0), "resnet_groups": 4, "DiT_num_heads": 4}
SCALES = {"paper": Scale(PAPER, (32, 32, 32), 2), "tiny": Scale(TINY, (8, 8, 8), 2)}


def measure(cfg: DictConfig) -> Report:
    """Compare, then time. UserError if the ways differ, or for a grid that the network can't do."""
    scale, device = SCALES[cfg.size], choose_device(cfg.device)
    grid = tuple(cfg.grid or scale.grid)
    network = random_network(scale, device)
    check_grid(grid, network)
    ways = _ways(network, scale, grid, cfg, device)

    predictions = {name: (way.predict, way.tolerance) for name, way in ways.items()}
    figures = {name: found for name, _, *found in compared(predictions, device)}  # peak memory, difference
    seconds = in_turn({name: partial(timed, way.sample, device) for name, way in ways.items()}, cfg.repetitions)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    title = f"BiFlowNet, {millions:.1f} M parameters, latents of {grid}, {device}"
    rows = [Row(name, seconds[name], scale.steps * way.batch_size, *figures[name]) for name, way in ways.items()]
    notes = {"threads": torch.get_num_threads(), "unit": "one step of one latent"}
    return Report(title, "steps", "plain", rows, notes)


def check_grid(grid: tuple[int, ...], network: BiFlowNet) -> None:
    """UserError for a latent grid (z, x, y) that the network can't do."""
    if any(extent < 1 or extent % multiple for extent, multiple in zip(grid, network.grid_multiple, strict=True)):
        raise UserError(f"--grid {grid}: multiples of {tuple(network.grid_multiple)} are needed")


@dataclass(frozen=True)
class Way:
    """One way of sampling: a single prediction, and a whole sampling."""

    predict: Callable[[], Tensor]
    sample: Callable[[], Tensor]
    tolerance: float
    batch_size: int


def random_network(scale: Scale, device: torch.device) -> BiFlowNet:
    """A frozen network whose parts all have an effect, the same at every call."""
    torch.manual_seed(0)
    network = BiFlowNet(**scale.network).eval().requires_grad_(False)
    for parameter in network.parameters():  # the intra-patch flow starts at zero: without this it would do nothing
        parameter.add_(0.02 * torch.randn_like(parameter))
    return network.to(device)


def _ways(network: BiFlowNet, scale: Scale, grid: tuple, cfg: DictConfig, device: torch.device) -> dict[str, Way]:
    half = ["bf16", "16"] if device.type == "cuda" else ["bf16"]
    other_layout = copy.deepcopy(network).to(memory_format=torch.channels_last_3d)
    ways = {
        "plain": _way(network, scale, grid, device),
        "channels last": _way(other_layout, scale, grid, device, channels_last=True),
        f"batch {cfg.batch_size}": _way(network, scale, grid, device, batch_size=cfg.batch_size),
    }
    for precision in half:
        ways[precision] = _way(network, scale, grid, device, precision)
        ways[f"{precision} channels last"] = _way(other_layout, scale, grid, device, precision, channels_last=True)
    if cfg.compile:
        compiled = CompiledDenoiser(network)
        for precision in ["32", *half]:
            ways[f"compile {precision}"] = _way(compiled, scale, grid, device, precision)
    return ways


def _way(
    denoiser, scale: Scale, grid: tuple[int, ...], device, precision: str = "32", channels_last=False, batch_size=1
) -> Way:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    shape = (1, denoiser.channels, *grid)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    z = z.repeat(batch_size, 1, 1, 1, 1).to(device, memory_format=layout)  # (B, C, d, h, w)
    y = torch.zeros(batch_size, dtype=torch.long, device=device)
    conditions = {"y": y, "res": torch.tensor(grid, device=device) / denoiser.vq_size}
    diffusion = GaussianDiffusion(denoiser.channels).to(device)

    @torch.inference_mode()
    def run(function: Callable[[], Tensor]) -> Tensor:
        with autocast(device, precision):
            return function()

    def predict() -> Tensor:
        return denoiser(z, torch.full((batch_size,), 500, device=device), **conditions)[:1]  # all are the same latent

    def sample() -> Tensor:
        return diffusion.sample(denoiser, z, strategy="dpm++", ddim_steps=scale.steps, **conditions)

    tolerance = TOLERANCE if precision == "32" else HALF_TOLERANCE
    return Way(partial(run, predict), partial(run, sample), tolerance, batch_size)
