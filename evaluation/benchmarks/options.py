"""Options that several parts of the benchmark have, and their checks."""

import argparse

from common.errors import UserError
from ddpm.BiFlowNet import BiFlowNet


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: auto)")


def add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes first")


def add_batch_size(parser: argparse.ArgumentParser, default: int, meaning: str) -> None:
    parser.add_argument("--batch-size", type=int, default=default, help=f"{meaning} (default: %(default)s)")


def check_batch_size(options: argparse.Namespace) -> None:
    """UserError for a batch of nothing."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: at least 1 is needed")


def check_grid(grid: tuple[int, ...], network: BiFlowNet) -> None:
    """UserError for a latent grid (z, x, y) that the network can't do."""
    if any(extent < 1 or extent % multiple for extent, multiple in zip(grid, network.grid_multiple, strict=True)):
        raise UserError(f"--grid {grid}: multiples of {tuple(network.grid_multiple)} are needed")
