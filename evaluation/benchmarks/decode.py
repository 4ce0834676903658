"""Decoding of latents: one pass in float32, block by block in little memory, in tiles, in half precision.

Compared first: exact ways agree with the first within 5e-3 standard deviations in float32 and 1 in half precision.
Tiles give other volumes by design: their difference is shown. Weights and latents are random, or with --AE-ckpt and
--latents those of a trained autoencoder; then the seam index at tile borders is shown too, as a ratio to one pass.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch._subclasses import FakeTensorMode

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.decoding import decode
from AutoEncoder.model.autoencoder import Autoencoder
from common.errors import UserError
from common.processes import choose_device
from config.loading import CONFIG_FOLDER, load_config
from config.schema.autoencoder import AutoencoderConfig
from evaluation.benchmarks.measuring import Limits, Report, Row, chosen, compared, count_flops, in_turn, timed
from evaluation.metrics.seams import seam_index

# Largest difference, in standard deviations. Another layout has other kernels; and with random weights, which amplify
# rounding, the largest of 512³ voxels is some way out. Volumes that had nothing to do with each other would be at 5.
TOLERANCE, HALF_TOLERANCE = 5e-3, 1.0
UNLIMITED = 10**15


@dataclass(frozen=True)
class Scale:
    """Config of the autoencoder with overrides, latent grid, GB for the way with little memory."""

    config: str
    overrides: tuple[str, ...]
    grid: tuple[int, int, int]
    max_memory: float


TINY = ("model.n_hiddens=8", "model.num_groups=4", "model.n_codes=32", "model.embedding_dim=4")
SCALES = {
    "paper": Scale("PatchVolume_8x.yaml", (), (16, 16, 16), 1.0),
    "tiny": Scale("PatchVolume_4x.yaml", TINY, (8, 8, 8), 0.008),
}


def measure(cfg: DictConfig) -> Report:
    """Compare, then time. UserError if exact ways differ from one pass, or for options that don't go together."""
    device = choose_device(cfg.device)
    scale = SCALES[cfg.size]
    if (cfg.AE_ckpt is None) != (cfg.latents is None):
        raise UserError("--AE-ckpt and --latents belong together: give both or none")
    if cfg.latents is not None and cfg.grid is not None:
        raise UserError("--grid is for random latents: those of --latents have theirs, leave it out")
    if cfg.AE_ckpt is None:
        autoencoder = random_autoencoder(scale, device)
        latent = random_latent(autoencoder, tuple(cfg.grid or scale.grid), device)
    else:
        autoencoder, latent = load_autoencoder(cfg.AE_ckpt, device), _first_latent(Path(cfg.latents)).to(device)
    ratio = autoencoder.downsample_factor
    tile = cfg.tile or max(latent.shape[1:]) * ratio // 2
    if tile < ratio or tile % ratio:
        raise UserError(f"--tile {tile}: a multiple of the compression {ratio} is needed")
    little = int((scale.max_memory if cfg.max_memory is None else cfg.max_memory) * 1e9)
    ways = chosen(_ways(autoencoder, latent, tile, little), cfg.ways)
    first = next(iter(ways))

    rows, seams = {}, {}
    for name, found, *figures in compared(ways, device):
        rows[name] = figures  # peak memory, difference
        if cfg.AE_ckpt is not None and tile < max(found.shape[1:]):
            seams[name] = seam_index(found, tile)

    seconds = in_turn({name: partial(timed, way, device) for name, (way, _) in ways.items()}, cfg.repetitions)
    notes = {"threads": torch.get_num_threads(), "tile": tile}
    if seams:
        notes["seam_index_times_one_pass"] = {name: round(value / seams[first], 4) for name, value in seams.items()}
    size = tuple(extent * ratio for extent in latent.shape[1:])
    title = f"latents of {tuple(latent.shape[1:])} to {size} voxels, {device}"
    flops = decoding_flops(autoencoder, latent)
    notes["floating point operations of one pass"] = f"{flops:.3g}"
    dtypes = {name: torch.bfloat16 if "bf16" in name else torch.float32 for name in ways}
    limits = Limits.measured(device, dtypes.values())

    def row(name: str) -> Row:
        least = limits.seconds(flops, 4 * math.prod(size), dtypes[name])
        return Row(name, seconds[name], 1, *rows[name], limit_share=least / median(seconds[name]))

    return Report(title, "volumes", first, [row(name) for name in ways], notes)


def _ways(
    autoencoder: Autoencoder, latent: Tensor, tile: int, little: int
) -> dict[str, Callable[[], tuple[partial, float]]]:
    """What builds each way by name, and how far its volume may be from that of the first."""
    other_layout = cache(lambda: copy.deepcopy(autoencoder).to(memory_format=torch.channels_last_3d))

    def way(network: Callable[[], Autoencoder], tolerance: float, *how) -> tuple[partial, float]:
        return partial(decode, network(), latent, *how), tolerance

    def same() -> Autoencoder:
        return autoencoder

    half = (HALF_TOLERANCE, "exact", None)
    limited = f"exact in {little / 1e9:g} GB"
    return {
        "plain": partial(way, same, TOLERANCE, "exact", None, UNLIMITED),
        limited: partial(way, same, TOLERANCE, "exact", None, little),
        "blended tiles": partial(way, same, math.inf, "blended", tile, UNLIMITED),
        "tiles": partial(way, same, math.inf, "tiles", tile, UNLIMITED),
        "channels last": partial(way, other_layout, TOLERANCE, "exact", None, UNLIMITED),
        "bf16": partial(way, same, *half, UNLIMITED, "bf16"),
        "bf16 channels last": partial(way, other_layout, *half, UNLIMITED, "bf16"),
        f"bf16 {limited}": partial(way, same, *half, little, "bf16"),
        f"bf16 channels last {limited}": partial(way, other_layout, *half, little, "bf16"),
    }


def random_autoencoder(scale: Scale, device: torch.device) -> Autoencoder:
    """The same at every call."""
    torch.manual_seed(0)
    cfg = load_config(AutoencoderConfig, CONFIG_FOLDER / scale.config, ["model.perceptual_weight=0", *scale.overrides])
    autoencoder = Autoencoder(OmegaConf.create(OmegaConf.to_container(cfg))).eval().requires_grad_(False)
    autoencoder.codebook.embeddings.normal_()
    return autoencoder.to(device)


def random_latent(autoencoder: Autoencoder, grid: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(autoencoder.embedding_dim, *grid, device=device) * 2 - 1


def decoding_flops(autoencoder: Autoencoder, latent: Tensor) -> int:
    """Operations of one pass, counted on tensors without data: it takes no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return count_flops(partial(autoencoder.decoder, torch.empty(1, *latent.shape, device=latent.device)))


def _first_latent(folder: Path) -> Tensor:
    paths = sorted(folder.glob("*.nii.gz"))
    if not paths:
        raise UserError(
            f"--latents {folder}: no latents there (*.nii.gz): give a folder of generate_training_latent.py"
        )
    from dataset.volumes.volume_io import read_latent  # random latents go without the imaging libraries

    return read_latent(paths[0])
