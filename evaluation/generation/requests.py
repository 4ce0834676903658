"""What to generate: the volumes that a config asks for, their sizes and their names.

The class table of the config says which classes there are and in which sizes; `class_names`, `seeds`, `resolution` and
`spacing`, or a list of requests in a file, choose among them and replace their sizes.
"""

import difflib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from common.errors import UserError
from common.text import shown
from dataset.preparation.manifest import Intensity, common_intensity
from dataset.volumes.geometry import LARGEST_SPACING_MM, SMALLEST_SPACING_MM, is_plausible_spacing
from dataset.volumes.index import read_class_folders
from dataset.volumes.intensity import MODEL_RANGE
from ddpm.architecture import grid_multiple
from evaluation.generation.attributes import Attributes, file_suffix, parse_attributes
from evaluation.generation.request_file import Entry, check_number, parse_seeds, read_request_file

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
LARGEST_SIDE = 32_767  # voxels along an axis of a NIfTI-1 file


@dataclass(frozen=True)
class Request:
    """One volume to generate."""

    class_id: int
    class_name: str
    seed: int
    grid: Triple  # latent grid (d, h, w)
    spacing_mm: Spacing  # (x, y, z)
    sample: int  # number of the volume among those of its class, grid and seed
    path: Path  # where it goes
    voxels: Triple  # its size (X, Y, Z)
    decoding: str  # "exact", "blended" or "tiles"
    tile: int | None  # edge in voxels of the tiles it is decoded in; None: as a whole
    intensity: Intensity | None = None  # how -1 and 1 are written; None: as they are
    attributes: Attributes = ()  # as they are asked for

    @property
    def intensity_range(self) -> tuple[float, float]:
        """What -1 and 1 become in the file."""
        return MODEL_RANGE if self.intensity is None else (self.intensity.low, self.intensity.high)

    @property
    def is_hounsfield(self) -> bool:
        """Whether the file is in HU."""
        return self.intensity is not None and self.intensity.unit == "HU"


def list_requests(cfg: DictConfig) -> list[Request]:
    """All volumes that the config asks for, seed by seed, or in the order of its list of requests.

    Raises UserError for an empty table, unknown classes, sizes that the network can't do, tiles that cut latents, a
    volume asked for twice, or classes whose units `denormalize` doesn't tell.
    """
    if cfg.decoding != "exact" and cfg.tile % cfg.downsample:
        raise UserError(f"tile is {cfg.tile}: it has to be a multiple of downsample {cfg.downsample}")
    entries = [(entry, _class_row(cfg, entry)) for entry in _entries(cfg)]
    intensities = class_intensities(cfg, {row.id for _, row in entries})
    requests: list[Request] = []
    asked_by: dict[object, Entry] = {}  # path, or what the noise depends on
    for entry, row in entries:
        sizes = _sizes(cfg, entry, row)
        check_number(len(requests) + len(sizes) * len(entry.seeds) * entry.num_samples, entry.where)
        for request in _requests_of(cfg, entry, row, sizes, intensities[row.id]):
            for key in (request.path, (noise_key(request), request.attributes)):
                if key in asked_by:
                    raise UserError(
                        f"{entry.where or f'classes: {row.name}: '}asks for {request.path} a second time, after "
                        f"{asked_by[key].where.removesuffix(': ') or asked_by[key].class_key}: give classes different "
                        "names, grids different sizes and requests different seeds"
                    )
                asked_by[key] = entry
            requests.append(request)
    return requests


# Entries


def _entries(cfg: DictConfig) -> Iterator[Entry]:
    """What is asked for, with every field filled from the options but the sizes, which the class table may have."""
    if not cfg.classes:
        raise UserError("classes is empty: give a class table (class_table=FILE), as config/classes_8x.yaml")
    if cfg.seeds is not None and cfg.seed != 0:
        raise UserError(f"seeds is {cfg.seeds} and seed is {cfg.seed}: give one of them")
    if cfg.requests is not None and cfg.class_names:
        raise UserError(f"requests and --classes exclude each other: {cfg.requests} names the classes")
    seeds = (cfg.seed,) if cfg.seeds is None else parse_seeds(cfg.seeds, "seeds: ")
    options = {
        "num_samples": cfg.num_samples,
        "resolution": None if cfg.resolution is None else tuple(cfg.resolution),
        "spacing_mm": None if cfg.spacing is None else tuple(map(float, cfg.spacing)),
        "attributes": parse_attributes(cfg.attributes),
    }
    if cfg.requests is None:
        names = cfg.class_names or [row.name for row in cfg.classes]
        for seed in seeds:
            yield from (Entry("", name, (seed,), **options) for name in names)
        return
    for entry in read_request_file(cfg.requests):
        missing = {name: value for name, value in options.items() if getattr(entry, name) is None}
        yield replace(entry, seeds=entry.seeds or seeds, **missing)


def _class_row(cfg: DictConfig, entry: Entry) -> DictConfig:
    """The row of the class table that an entry names, by name or else by id."""
    by_name = [row for row in cfg.classes if row.name == entry.class_key]
    if rows := by_name or [row for row in cfg.classes if str(row.id) == entry.class_key]:
        return rows[0]
    by_lower = {row.name.lower(): row.name for row in cfg.classes}
    close = difflib.get_close_matches(entry.class_key.lower(), by_lower, n=1)
    hint = f", did you mean {by_lower[close[0]]}?" if close else ";"
    known = ", ".join(f"{row.name} ({row.id})" for row in cfg.classes)
    raise UserError(f"{entry.where or 'classes: '}no class {shown(entry.class_key)}{hint} the config knows {known}")


def _requests_of(
    cfg: DictConfig, entry: Entry, row: DictConfig, sizes: Sequence[tuple[Triple, Spacing]], intensity: Intensity | None
) -> Iterator[Request]:
    for grid, spacing_mm in sizes:
        d, h, w = (side * cfg.downsample for side in grid)
        is_whole = math.prod(grid) <= cfg.max_single_pass**3 or max(h, w, d) <= cfg.tile
        decoding, tile = ("exact", None) if is_whole or cfg.decoding == "exact" else (cfg.decoding, cfg.tile)
        for seed in entry.seeds:
            folder = seed_folder(cfg, seed)
            for sample in range(entry.num_samples):
                stem = f"{row.name}_{h}x{w}x{d}{file_suffix(entry.attributes)}"
                path = _volume_path(folder, stem, sample, entry.num_samples)
                asked = (row.id, row.name, seed, grid, spacing_mm, sample)
                yield Request(*asked, path, (h, w, d), decoding, tile, intensity, entry.attributes)


def _volume_path(folder: Path, stem: str, sample: int, num_samples: int) -> Path:
    """NAME_XxYxZ, with several samples NAME_XxYxZ_I.

    Sample 0 is the same volume with one sample and with several, so what is there of it under the other name is kept.
    """
    alone, numbered = folder / f"{stem}.nii.gz", folder / f"{stem}_{sample}.nii.gz"
    path, other = (numbered, alone) if num_samples > 1 else (alone, numbered)
    return other if sample == 0 and not path.exists() and other.exists() else path


# Sizes


def _sizes(cfg: DictConfig, entry: Entry, row: DictConfig) -> list[tuple[Triple, Spacing]]:
    """Latent grids (d, h, w) and spacings (x, y, z) of what an entry asks for."""
    if entry.spacing_mm is not None:
        _check_spacing(entry.spacing_mm, entry.where)
    table = [(tuple(grid), tuple(map(float, mm))) for grid, mm in zip(row.grids, row.spacings_mm, strict=True)]
    if entry.resolution is None:
        for grid, spacing_mm in table:
            where = f"{entry.where}classes: {row.name}: "
            _check_grid(cfg, grid, where)
            _check_spacing(entry.spacing_mm or spacing_mm, where)
        return [(grid, entry.spacing_mm or spacing_mm) for grid, spacing_mm in table]
    z, y, x = _checked_resolution(cfg, entry)
    grid = (z // cfg.downsample, x // cfg.downsample, y // cfg.downsample)
    spacing_mm = entry.spacing_mm or _table_spacing(entry, row, table, grid)
    _check_spacing(spacing_mm, f"{entry.where}classes: {row.name}: ")
    return [(grid, spacing_mm)]


def _check_spacing(spacing_mm: Spacing, where: str) -> None:
    if not is_plausible_spacing(spacing_mm):
        raise UserError(
            f"{where}spacing {_words(spacing_mm)}: voxels have {SMALLEST_SPACING_MM:g} to {LARGEST_SPACING_MM:g} mm"
        )


def _table_spacing(entry: Entry, row: DictConfig, table: list[tuple[Triple, Spacing]], grid: Triple) -> Spacing:
    """The spacing of a class at a grid: that of the table's entry for it, otherwise the only one of the class."""
    of_grid = dict(table)
    spacings = {of_grid[grid]} if grid in of_grid else set(of_grid.values())
    if len(spacings) > 1:
        shown = " or ".join(_words(spacing) for spacing in dict.fromkeys(of_grid.values()))
        raise UserError(
            f"{entry.where}{row.name} has several spacings ({shown}) and none for {_words(entry.resolution)}: give "
            "--spacing X Y Z in mm, or spacing in the list of requests"
        )
    return spacings.pop()


def _checked_resolution(cfg: DictConfig, entry: Entry) -> Triple:
    multiple = grid_multiple([1, *cfg.dim_mults])[0] * cfg.downsample
    nearest = _nearest(entry.resolution, multiple)
    if nearest != entry.resolution:
        raise UserError(
            f"{entry.where}resolution {_words(entry.resolution)} (z y x): the network can do multiples of {multiple} "
            f"voxels up to {LARGEST_SIDE // multiple * multiple}: the nearest is {_words(nearest)}"
        )
    return nearest


def _check_grid(cfg: DictConfig, grid: Triple, where: str) -> None:
    multiple = grid_multiple([1, *cfg.dim_mults])[0]
    nearest = _nearest(grid, multiple, LARGEST_SIDE // cfg.downsample)
    if nearest != grid:
        raise UserError(
            f"{where}the network cannot do the latent grid {list(grid)}, only multiples of {multiple}: the nearest is "
            f"{list(nearest)}"
        )


def _nearest(sides: Sequence[int], multiple: int, largest: int = LARGEST_SIDE) -> tuple[int, ...]:
    """The nearest sizes that are whole multiples, at least one."""
    return tuple(min(max(1, round(side / multiple)), largest // multiple) * multiple for side in sides)


def _words(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)


# Names, noise


def class_intensities(cfg: DictConfig, ids: Collection[int]) -> dict[int, Intensity | None]:
    """For each of the class ids the units of its data, from the manifests of its folders; None without."""
    if cfg.denormalize is None:
        return dict.fromkeys(ids)
    folders = read_class_folders(cfg.denormalize)
    if missing := sorted(set(ids) - folders.keys()):
        raise UserError(f"denormalize: {cfg.denormalize} has no class {missing[0]}: name its folder there")
    return {class_id: common_intensity(folders[class_id]) for class_id in ids}


def seed_folder(cfg: DictConfig, seed: int) -> Path:
    """OUT/seed_S, the folder of all volumes of a seed."""
    return Path(cfg.output_dir) / f"seed_{seed}"


def noise_key(request: Request) -> tuple[int, ...]:
    """What the noise of a volume depends on."""
    return (request.seed, request.class_id, *request.grid, request.sample)


def noise_generator(request: Request) -> torch.Generator:
    """The source of all noise of one volume, on the CPU so that it is the same on every device."""
    state = np.random.SeedSequence(noise_key(request)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
