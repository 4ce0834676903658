"""Decoding of latents: one pass in float32, block by block in little memory, in tiles, in half precision.

Compared first: exact ways agree with one pass within 5e-3 standard deviations in float32 and 0.5 in half precision.
Tiles give other volumes by design: their difference is shown. Weights and latents are random, or with --AE-ckpt and
--latents those of a trained autoencoder; then the seam index at tile borders is shown too, as a ratio to one pass.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.decoding import decode
from AutoEncoder.model.autoencoder import Autoencoder
from common.errors import UserError
from common.processes import choose_device
from config.loading import CONFIG_FOLDER, load_config
from config.schema.autoencoder import AutoencoderConfig
from dataset.volumes.volume_io import read_latent
from evaluation.benchmarks.measuring import Report, Row, compared, in_turn, timed
from evaluation.metrics.seams import seam_index

TOLERANCE, HALF_TOLERANCE = 5e-3, 0.5  # largest difference, in standard deviations; another layout has other kernels
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
        autoencoder, latent = _random(scale, tuple(cfg.grid or scale.grid), device)
    else:
        autoencoder, latent = load_autoencoder(cfg.AE_ckpt, device), _first_latent(Path(cfg.latents)).to(device)
    ratio = autoencoder.downsample_factor
    tile = cfg.tile or max(latent.shape[1:]) * ratio // 2
    if tile < ratio or tile % ratio:
        raise UserError(f"--tile {tile}: a multiple of the compression {ratio} is needed")
    little = int((scale.max_memory if cfg.max_memory is None else cfg.max_memory) * 1e9)
    ways = _ways(autoencoder, latent, tile, little)

    rows, seams = {}, {}
    for name, found, *figures in compared(ways, device):
        rows[name] = figures  # peak memory, difference
        if cfg.AE_ckpt is not None and tile < max(found.shape[1:]):
            seams[name] = seam_index(found, tile)

    seconds = in_turn({name: partial(timed, way, device) for name, (way, _) in ways.items()}, cfg.repetitions)
    notes = {"threads": torch.get_num_threads(), "tile": tile}
    if seams:
        notes["seam_index_times_one_pass"] = {name: round(value / seams["plain"], 4) for name, value in seams.items()}
    size = tuple(extent * ratio for extent in latent.shape[1:])
    title = f"latents of {tuple(latent.shape[1:])} to {size} voxels, {device}"
    return Report(title, "volumes", "plain", [Row(name, seconds[name], 1, *rows[name]) for name in ways], notes)


def _ways(autoencoder: Autoencoder, latent: Tensor, tile: int, little: int) -> dict[str, tuple[partial, float]]:
    """Each way by name, and how far its volume may be from that of the first."""
    whole = partial(decode, autoencoder, latent, "exact", None)
    other_layout = partial(decode, copy.deepcopy(autoencoder).to(memory_format=torch.channels_last_3d), latent)
    limited = f"exact in {little / 1e9:g} GB"
    return {
        "plain": (partial(whole, UNLIMITED), TOLERANCE),
        limited: (partial(whole, little), TOLERANCE),
        "blended tiles": (partial(decode, autoencoder, latent, "blended", tile, UNLIMITED), math.inf),
        "tiles": (partial(decode, autoencoder, latent, "tiles", tile, UNLIMITED), math.inf),
        "channels last": (partial(other_layout, "exact", None, UNLIMITED), TOLERANCE),
        "bf16": (partial(whole, UNLIMITED, "bf16"), HALF_TOLERANCE),
        "bf16 channels last": (partial(other_layout, "exact", None, UNLIMITED, "bf16"), HALF_TOLERANCE),
        f"bf16 {limited}": (partial(whole, little, "bf16"), HALF_TOLERANCE),
    }


def _random(scale: Scale, grid: tuple[int, int, int], device: torch.device) -> tuple[Autoencoder, Tensor]:
    torch.manual_seed(0)
    cfg = load_config(AutoencoderConfig, CONFIG_FOLDER / scale.config, ["model.perceptual_weight=0", *scale.overrides])
    autoencoder = Autoencoder(OmegaConf.create(OmegaConf.to_container(cfg))).eval().requires_grad_(False)
    autoencoder.codebook.embeddings.normal_()
    return autoencoder.to(device), torch.rand(autoencoder.embedding_dim, *grid, device=device) * 2 - 1


def _first_latent(folder: Path) -> Tensor:
    paths = sorted(folder.glob("*.nii.gz"))
    if not paths:
        raise UserError(
            f"--latents {folder}: no latents there (*.nii.gz): give a folder of generate_training_latent.py"
        )
    return read_latent(paths[0])
