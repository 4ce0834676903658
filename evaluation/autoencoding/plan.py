"""What an evaluation of autoencoders is about to do, and all that can be wrong with it, before long work starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.exact_decoding import plan_blocks
from AutoEncoder.model.lpips import TriplanarLPIPS
from AutoEncoder.model.lpips_weights import HEADS_FILE, VGG_FILE, VGG_HASH, first_existing, package_folder
from AutoEncoder.patches import padded_size
from common.errors import UserError
from common.files import file_sha256
from common.hub import absolute_name, local_file
from common.memory import free_memory
from common.processes import Distributed
from dataset.volumes.intensity import is_empty
from evaluation.comparison.networks import weight_folders
from evaluation.comparison.sets import Grid, Group, SetVolume, groups_of_one_set, list_refused, read_headers, without
from evaluation.metrics.reconstruction import WINDOW_EDGE, num_scales_of
from evaluation.results.results import cache_folder
from evaluation.results.work import Arrays, ResultCache, Work, do_work

ROLE = "held-out"  # of the one set that a group has
READING_VERSION = 1  # rises when other volumes are refused
LPIPS_PIXELS = 2**19  # that go through VGG-16 at once: about 1 GB


@dataclass(frozen=True)
class Checkpoint:
    """What is to be known of an autoencoder before it is used. name: in the results. patch_size: in voxels."""

    name: str
    path: str
    sha256: str
    compression: int
    patch_size: int
    n_codes: int


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    grids: of every file whose header can be read; refused: why those of the others can't. lpips: SHA-256 of its weight
    files by name; None: it is left out.
    """

    checkpoints: list[Checkpoint]
    groups: list[Group]
    grids: dict[Path, Grid]
    refused: dict[Path, str]
    lpips: dict[str, str] | None
    warnings: list[str]

    def shortest_side(self, group: Group) -> int:
        """Voxels of the shortest side of any volume of a group."""
        return min(min(self.grids[volume.path].shape) for volume in group.sets[ROLE])

    def num_scales(self, group: Group) -> int | None:
        """Scales of MS-SSIM that all volumes of a group allow; None: not even one."""
        side = self.shortest_side(group)
        return None if side < WINDOW_EDGE else num_scales_of((side, side, side))


def make_plan(cfg: DictConfig, device: torch.device) -> Plan:
    """Looks at everything but the voxels.

    Raises UserError: options, folders, checkpoints or weight files that are wrong, too few volumes, too little memory.
    """
    names = ROLE, Path(cfg.data).resolve().name
    groups, notes = groups_of_one_set(cfg.data, "data", *names, cfg.real_range, cfg.subject_pattern)
    without(groups, set())  # raises where a class has too few
    paths, files = [absolute_name(path) for path in cfg.AE_ckpt], [local_file(path).resolve() for path in cfg.AE_ckpt]
    if twice := [path for i, path in enumerate(paths) if files[i] in files[:i]]:
        raise UserError(f"AE_ckpt: {twice[0]} is given twice: name each checkpoint once")
    lpips, warnings = find_lpips(cfg)
    grids, refused = read_headers(groups)
    limit = max_bytes(cfg, device)
    names = short_names(cfg.AE_ckpt)
    checkpoints = [look_at(path, name, grids, limit) for path, name in zip(cfg.AE_ckpt, names, strict=True)]
    return Plan(checkpoints, groups, grids, refused, lpips, [*notes, *warnings])


def look_at(path: str, name: str, grids: dict[Path, Grid], limit: int) -> Checkpoint:
    """Loads a checkpoint once and describes it.

    Raises UserError: as `load_autoencoder`; more than one image channel; `limit` bytes don't suffice for a volume.
    """
    autoencoder = load_autoencoder(path)
    channels = autoencoder.cfg.dataset.image_channels
    if channels != 1:
        raise UserError(f"{path}: its volumes have {channels} channels, only autoencoders of one can be evaluated")
    factor, patch_size = autoencoder.downsample_factor, autoencoder.patch_size
    for (x, y, z), volume in {grid.shape: volume for volume, grid in grids.items()}.items():
        latent = [extent // factor for extent in padded_size((z, x, y), patch_size)]
        try:
            plan_blocks(autoencoder.decoder, (1, autoencoder.embedding_dim, *latent), torch.float32.itemsize, limit)
        except ValueError as error:
            raise too_little(volume, error) from error
    return Checkpoint(name, path, file_sha256(path), factor, patch_size, autoencoder.codebook.n_codes)


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of checkpoints: those of their files or runs, if these differ; otherwise the paths.

    RUN/checkpoints/FILE and RUN/last.ckpt are called RUN first, other files by their own name.
    """
    runs, names = [], []
    for path in map(Path, paths):
        folders = [part for part in path.parts[:-1] if part != "checkpoints"]
        is_of_run = path.name == "last.ckpt" or path.parent.name == "checkpoints"
        runs.append(folders[-1] if folders else path.stem)
        names.append(runs[-1] if is_of_run else path.stem)
    return next(found for found in (names, runs, list(map(str, paths))) if len(set(found)) == len(found))


def too_little(place: str | Path, error: ValueError) -> UserError:
    return UserError(f"{place}: {error}: raise max_memory")


def max_bytes(cfg: DictConfig, device: torch.device) -> int:
    """Bytes that decoding may take."""
    return free_memory(device) if cfg.max_memory is None else int(cfg.max_memory * 1e9)


# -------------------------------------------------------------------------------------------------------------- LPIPS


def find_lpips(cfg: DictConfig) -> tuple[dict[str, str] | None, list[str]]:
    """SHA-256 of the weight files of LPIPS, or None where it is left out, and warnings. Nothing is downloaded.

    Raises UserError: with lpips=on files that are missing; files that are damaged or another network's.
    """
    own, hub_cache = weight_folders(cfg.weights_dir)
    if cfg.lpips == "off":
        return None, ["LPIPS is left out: lpips is off"]
    places = {VGG_FILE: [*own, hub_cache], HEADS_FILE: own + package_folder()}
    files = {name: first_existing(folders, name) for name, folders in places.items()}
    for name, path in files.items():
        if path is None:
            looked = ", ".join(map(str, places[name])) or "any folder"
            missing = f"{name} is not in {looked}: put it there, or name its folder with --weights-dir"
            if cfg.lpips == "on":
                raise UserError(f"lpips is on: {missing}")
            return None, [f"LPIPS is left out: {missing}"]
    load_lpips(cfg)
    hashes = {name: file_sha256(path) for name, path in files.items()}
    if hashes[VGG_FILE].startswith(VGG_HASH):
        return hashes, []
    return hashes, [f"{files[VGG_FILE]} is not torchvision's file: LPIPS can't be compared with that of others"]


def load_lpips(cfg: DictConfig) -> TriplanarLPIPS:
    """LPIPS over all slices. UserError: a weight file is damaged or another network's."""
    try:
        return TriplanarLPIPS(cfg.weights_dir, fraction=1.0, chunk_pixels=LPIPS_PIXELS)
    except ValueError as error:
        raise UserError(f"lpips: {error}") from error


# ------------------------------------------------------------------------------------------------------------ volumes


def read_all(cfg: DictConfig, plan: Plan, place: Distributed) -> tuple[list[Group], dict[Path, str]]:
    """Reads every volume once, so that all faults are known before long work.

    Returns the groups without the files that are left out, and why they are. To be called on every rank.
    Raises UserError: files that can't be read without `exclude_unreadable`, or too few that can.
    """
    volumes = [v for group in plan.groups for v in group.sets[ROLE] if v.path not in plan.refused]
    cache = ResultCache(cache_folder(cfg), "volumes", {"version": READING_VERSION})
    work = Work("reading volumes", SetVolume.key, read_range, _kept_ranges, cache)
    _, found = do_work(work, volumes, place, cfg.num_workers, cfg.shard)
    refused = plan.refused | {volume.path: reason for volume, reason in found.items()}
    if not refused:
        return plan.groups, {}
    listed = list_refused(refused, "volumes")
    if not cfg.exclude_unreadable:
        raise UserError(f"{listed}; --exclude-unreadable leaves such files out")
    try:
        return without(plan.groups, set(refused)), refused
    except UserError as error:
        raise UserError(f"{error}; {listed}") from error


def read_range(volume: SetVolume) -> Tensor:
    """(2,) lowest and highest intensity, in [-1, 1]. UserError: as `SetVolume.read`, and nothing but background."""
    data = volume.read()
    if is_empty(data):
        raise UserError(f"{volume.path}: nothing to see, every voxel is background or they are equal: remove the file")
    return torch.stack([data.min(), data.max()])


def _kept_ranges(ranges: Tensor) -> list[Arrays]:
    return [{"range": of_volume.numpy()} for of_volume in ranges]  # (B, 2)
