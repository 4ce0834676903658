"""A training step of BiFlowNet: loss, backward, gradient norm, Adam; float32 eager beside what the options do.

Plain is the same network in float32 with a loop over parameters in Adam. Weights and latents are random. Compared
first: the gradients of one batch, by the norm of their difference. The averaged weights, which move every tenth step,
are left out.
"""

import copy
import math
from functools import cache, partial

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.precision import autocast
from common.processes import choose_device
from ddpm.BiFlowNet import BiFlowNet
from ddpm.diffusion import GaussianDiffusion
from evaluation.benchmarks.measuring import Report, chosen, fitting
from evaluation.benchmarks.sample import SCALES, check_grid, random_network
from evaluation.benchmarks.training import Way, compare_and_time, gradients

LR = 1e-4
TOLERANCE, HALF_TOLERANCE = 2e-3, 0.2  # of the gradients, relative
GRIDS = {"paper": (16, 16, 16), "tiny": (8, 8, 8)}


def measure(cfg: DictConfig) -> Report:
    """Compare, then time. UserError if the ways differ, or for a grid that the network can't do."""
    return fitting(partial(_measure, cfg), cfg.batch_size)


def _measure(cfg: DictConfig, batch_size: int) -> Report:
    scale, device = SCALES[cfg.size], choose_device(cfg.device)
    grid = tuple(cfg.grid or GRIDS[cfg.size])
    network = random_network(scale, device).train().requires_grad_(True)
    network.pos_embed.requires_grad_(False)
    check_grid(grid, network)
    batch = _batch(network, batch_size, grid, device)
    plain_adam = torch.optim.Adam(network.parameters(), lr=LR, foreach=False)
    ours = Trained(network)
    other_layout = cache(lambda: Trained(copy.deepcopy(network).to(memory_format=torch.channels_last_3d)))
    compiled = cache(lambda: Trained(_compiled(network)))
    ways = chosen(
        {
            "plain": lambda: Trained(network, plain_adam).way(batch),
            "float32": lambda: ours.way(batch),
            "float32 channels last": lambda: other_layout().way(batch),
            "bf16": lambda: ours.way(batch, "bf16"),
            "bf16 channels last": lambda: other_layout().way(batch, "bf16"),
            "bf16 checkpointing": lambda: ours.way(batch, "bf16", checkpointing=True),
            "32 compiled": lambda: compiled().way(batch, "32"),
            "bf16 compiled": lambda: compiled().way(batch, "bf16"),
        },
        cfg.ways,
        cfg.compile,
    )
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    title = f"training step of BiFlowNet, {millions:.1f} M parameters, {batch_size} x {grid}, {device}"
    return compare_and_time(title, ways, batch_size, device, cfg.repetitions)


def _compiled(network: BiFlowNet) -> BiFlowNet:
    network = copy.deepcopy(network)
    network.compile(dynamic=False)
    return network


class Trained:
    """A network with its Adam, fused unless another one is given; ways in the same layout share both, for memory."""

    def __init__(self, network: BiFlowNet, optimizer: torch.optim.Adam | None = None) -> None:
        self.network = network
        self.optimizer = optimizer or torch.optim.Adam(network.parameters(), lr=LR, fused=True)

    def way(self, batch: dict[str, Tensor], precision: str = "32", checkpointing: bool = False) -> Way:
        """A step on this batch in this precision."""
        device = batch["t"].device
        diffusion = GaussianDiffusion(self.network.channels).to(device)

        def backward() -> None:
            self.network.gradient_checkpointing = checkpointing
            with autocast(device, precision):
                loss = diffusion.p_losses(self.network, **batch)
            loss.backward()

        def step() -> None:
            backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        def gradient() -> Tensor:
            backward()
            found = gradients(self.network)
            self.optimizer.zero_grad(set_to_none=True)
            return found

        kind = (TOLERANCE, torch.float32) if precision == "32" else (HALF_TOLERANCE, torch.bfloat16)
        return Way(gradient, step, list(self.network.parameters()), *kind)


def _batch(network: BiFlowNet, batch_size: int, grid: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, network.channels, *grid)
    batch = {
        "x_start": torch.rand(shape, generator=generator) * 2 - 1,
        "t": torch.randint(1000, (batch_size,), generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "y": torch.zeros(batch_size, dtype=torch.long),
        "res": (torch.tensor(grid) / network.vq_size).expand(batch_size, 3),
    }
    return {name: value.to(device) for name, value in batch.items()}
