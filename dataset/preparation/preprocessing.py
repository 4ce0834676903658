"""Prepares all volumes of an input folder: finds them, resolves what is asked for, and says what became of each."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.files import LOCK_NAME, lock
from common.places import exists, is_file, is_folder
from common.shards import folder_shared_out, shard_of
from dataset.order.data_split import SPLIT_NAME, subject_finder
from dataset.order.draw_split import agreed_shares, check_shares, keep_or_draw, show_split, subjects_of
from dataset.preparation.classes import AUTOENCODER_JSON, add_classes, check_place, choose_class_id
from dataset.preparation.manifest import read_manifest
from dataset.preparation.prepared_folder import Outcome, PreparedFolder, file_name
from dataset.preparation.recipe import Recipe
from dataset.preparation.sources import Found, Source, check_source, find_sources
from dataset.preparation.summary import Run, add_row, count_other_sizes, report, say
from dataset.volumes.index import size_folder

DEFAULT_WINDOW = (-1000.0, 1000.0)  # HU: air to dense bone
DEFAULT_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Target:
    """The class that volumes are prepared for. class_id None: the next free one."""

    name: str
    class_id: int | None
    modality: str
    recipe: Recipe


def preprocess(cfg: DictConfig, diffusion_multiple: int) -> bool:
    """Prepares all volumes of an input folder, or the shard's, that are not prepared yet. Returns whether all could be.

    diffusion_multiple: of voxels, that each side of a volume must be to serve a diffusion model.

    UserError, before anything is read or written, for whatever is wrong with the options, the folders or the volumes
    that are there already; later only where nothing can be written.
    """
    console = Console(stderr=True)
    if cfg.dry_run:
        found = find_sources(cfg.input, cfg.num_workers)
        Console(width=None if sys.stdout.isatty() else 160).print(_listing(cfg, found))
        return True
    target = resolve_target(cfg)
    _hint_at_size(cfg, target.recipe, diffusion_multiple, console)
    source_folder, output_dir = Path(cfg.input).resolve(), Path(cfg.output_dir)
    class_folder, size = output_dir / target.name, size_folder(target.recipe.size)
    _check_output(cfg, class_folder / size, source_folder)
    place = _find_place(class_folder, size)
    folder = output_dir / place
    class_id = choose_class_id(output_dir, target.name, target.class_id)
    check_place(output_dir, place)
    other_sizes = count_other_sizes(class_folder, folder)

    selected, passed_over, outcomes = _find(cfg, target.modality)
    _check_split(cfg, output_dir / AUTOENCODER_JSON, folder, selected)
    with folder_shared_out(folder, cfg.shard, "preparing volumes") as own:
        prepared = PreparedFolder(folder, source_folder, target.recipe, own)
        prepared.tidy()
        fitting, refused = prepared.without_collisions(selected, cfg.num_workers)
        mine = {id(source) for source in shard_of(fitting, cfg.shard)}
        todo = [source for source in prepared.plan(fitting, cfg.num_workers) if id(source) in mine]
        say(
            console,
            f"{len(selected)} volumes in {cfg.input} -> {folder} (class {class_id}, "
            f"{target.modality}), {len(mine) - len(todo)} of "
            f"{'them' if cfg.shard is None else f'the {len(mine)} of shard {cfg.shard}'} are there",
        )
        if cfg.shard is not None:
            return _prepare_shard(prepared, todo, cfg, console)
        outcomes += [*refused, *prepared.prepare(todo, cfg.num_workers)]
        prepared.tidy()
        if unwanted := prepared.unwanted(selected):
            say(
                console,
                f"{folder}: {len(unwanted)} volume(s) of earlier runs come from sources in {cfg.input} that this run "
                f"leaves out or no longer finds, e.g. {unwanted[0]}: they stay, delete them if they are not wanted",
            )
    run = Run(size, source_folder, selected, passed_over, outcomes)
    with lock(output_dir / LOCK_NAME, on_wait=lambda: None) or nullcontext():  # another size may be ready as well
        if prepared.entries:
            add_classes(output_dir, {choose_class_id(output_dir, target.name, target.class_id): place})
        report(console, class_folder, prepared, run, other_sizes)
        if prepared.entries:
            _keep_split(cfg, output_dir / AUTOENCODER_JSON, console)
    return not any(outcome.status == "failed" for outcome in outcomes)


def _prepare_shard(prepared: PreparedFolder, todo: Sequence[Source], cfg: DictConfig, console: Console) -> bool:
    """Prepares these alone. What failed is said here, and tried and listed again by the call without a shard."""
    failed = [outcome for outcome in prepared.prepare(todo, cfg.num_workers) if outcome.status == "failed"]
    for outcome in failed:
        say(console, f"{outcome.source.label}: {outcome.reason}")
    done = f"shard {cfg.shard}: {len(todo) - len(failed)} done, {len(failed)} failed"
    say(console, f"{done}; after all shards the same command without --shard completes the folder")
    return not failed


def _hint_at_size(cfg: DictConfig, recipe: Recipe, multiple: int, console: Console) -> None:
    """Says early that volumes will serve the autoencoder alone."""
    if recipe.size is None:
        what = "without a size (--size) volumes keep sizes of their own"
    elif any(extent % multiple for extent in recipe.size):
        what = f"size {size_folder(recipe.size)}: not all are multiples of {multiple}"
    else:
        return
    say(
        console,
        f"{what}: good for the autoencoder; a diffusion model needs one size, each side a multiple of {multiple} at "
        f"{cfg.downsample}x",
    )


def _shares(cfg: DictConfig) -> dict[str, str | float | None]:
    return {key: cfg[key] for key in ("subject_pattern", "validation", "held_out")}


def _has_split(cfg: DictConfig, json_file: Path) -> bool:
    return is_file(json_file.with_name(SPLIT_NAME)) or any(value is not None for value in _shares(cfg).values())


def _check_split(cfg: DictConfig, json_file: Path, folder: Path, sources: Sequence[Source]) -> None:
    """UserError, while nothing has been done, where the split could not be drawn with the volumes to come."""
    if _has_split(cfg, json_file):
        shares = agreed_shares(json_file, _shares(cfg))
        check_shares(shares)
        if is_file(json_file):
            subjects_of(json_file, shares)
        subject_of = subject_finder(shares.subject_pattern)
        for source in sources:
            subject_of(folder / file_name(source), folder)


def _keep_split(cfg: DictConfig, json_file: Path, console: Console) -> None:
    """Gives new subjects a side, in the split that is there or that is asked for."""
    if _has_split(cfg, json_file):
        show_split(keep_or_draw(json_file, _shares(cfg)), json_file)
    else:
        say(
            console,
            f"who trains and who is held out is not said yet: python dataset/split.py {json_file} --subject-pattern "
            "'^[^/]+' if each patient has a folder",
        )


def _find_place(class_folder: Path, size: str) -> str:
    """Where the volumes go, below the output folder: NAME/SIZE, or NAME where an earlier version put them there.

    UserError: volumes of another size lie in NAME itself.
    """
    name, entries = class_folder.name, read_manifest(class_folder)
    if not entries:
        return f"{name}/{size}"
    found = size_folder(next(iter(entries.values()))["recipe"].get("size"))
    if found != size:
        raise UserError(
            f"{class_folder}: an earlier version put volumes (size: {found}) into the class folder itself, so it can't "
            f"get another size ({size}): move its content into {class_folder / found} and write {name}/{found} into "
            "the dataset JSONs, or give another output_dir"
        )
    return name


def _check_output(cfg: DictConfig, folder: Path, source_folder: Path) -> None:
    """UserError: the class folder lies among the sources, or can't be written."""
    if folder.resolve() == source_folder or source_folder in folder.resolve().parents:
        raise UserError(
            f"output_dir: {folder} lies in the input folder {cfg.input}: its volumes would be found as sources; "
            "choose a folder outside"
        )
    for place in (folder, Path(cfg.output_dir)):  # the latter gets the dataset JSONs
        parent = next(found for found in (place, *place.absolute().parents) if exists(found))
        if not is_folder(parent) or not os.access(parent, os.W_OK):
            raise UserError(f"output_dir: {parent} can't be written to: choose another folder")


def _find(cfg: DictConfig, modality: str) -> tuple[list[Source], list[Outcome], list[Outcome]]:
    """The sources that are wanted, those that are not, and damaged files. UserError where none is wanted."""
    found = find_sources(cfg.input, cfg.num_workers)
    selected = []
    passed_over = [
        Outcome(Source(str(path), (path,)), reason="archive: unpack it if it holds volumes", is_fault=False)
        for path in found.archives
    ]
    failed = [Outcome(Source(path, (Path(path),)), reason=reason) for path, reason in found.failed]
    for source in found.sources:
        reason = _reason_to_leave_out(cfg, source, modality)
        if reason is None:
            selected.append(source)
        else:
            passed_over.append(Outcome(source, reason=reason, is_fault=False))
    if not selected and not found.failed:
        raise UserError(
            f"input: of {len(found.sources)} volumes in {cfg.input} none is wanted (select {cfg.select!r}, exclude "
            f"{cfg.exclude!r}, modality {modality}): --dry-run lists them"
        )
    return selected, passed_over, failed


# ------------------------------------------------------------------------------------------------------------ options


def resolve_target(cfg: DictConfig) -> Target:
    """The class and the recipe that the options ask for.

    UserError: an unknown preset, or neither preset nor name and modality.
    """
    preset, grid, spacing = _find_preset(cfg)
    name = cfg.name or (preset.name if preset else None)
    if name is None:
        raise UserError("which class is it? Give preset (e.g. --preset CTChestAbdomen), or name and modality")
    modality = cfg.modality or (preset.modality or "MR" if preset else None)
    if modality is None:
        raise UserError(f"modality of {name} is not set: give --modality CT or --modality MR")
    if preset and preset.modality and modality != preset.modality:
        raise UserError(f"modality {modality} doesn't fit the preset {cfg.preset}, which is {preset.modality}")
    window, percentiles = cfg.window, cfg.percentiles
    if window is None and percentiles is None:
        window, percentiles = (DEFAULT_WINDOW, None) if modality == "CT" else (None, DEFAULT_PERCENTILES)
    size = _voxels(cfg, grid) if cfg.size is None and grid is not None else cfg.size
    recipe = Recipe(
        window=_floats(window),
        percentiles=_floats(percentiles),
        unit="HU" if modality == "CT" and window is not None else None,
        spacing_mm=_floats(cfg.spacing if cfg.spacing is not None else spacing),
        size=None if size is None else tuple(size),
        multiple=cfg.multiple,
        interpolation=cfg.interpolation,
        assume_orientation=cfg.assume_orientation,
    )
    class_id = cfg.class_id
    if class_id is None and preset is not None and name == preset.name:
        class_id = preset.id
    return Target(name, class_id, modality, recipe)


def _find_preset(cfg: DictConfig) -> tuple:
    """(row of the class table, grid, spacing), or three times None without a preset."""
    if cfg.preset is None:
        return None, None, None
    presets = {}
    for row in cfg.classes:
        for grid, spacing in zip(row.grids, row.spacings_mm, strict=True):
            presets.setdefault(row.name, (row, grid, spacing))
            presets[f"{row.name}_{'x'.join(map(str, _voxels(cfg, grid)))}"] = (row, grid, spacing)
    if cfg.preset not in presets:
        raise UserError(f"preset: there is no {cfg.preset}: choose one of {', '.join(presets)}")
    return presets[cfg.preset]


def _voxels(cfg: DictConfig, grid: Sequence[int]) -> tuple[int, int, int]:
    """Size (x, y, z) of the volume of a latent grid (z, x, y)."""
    d, h, w = (extent * cfg.downsample for extent in grid)
    return h, w, d


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _reason_to_leave_out(cfg: DictConfig, source: Source, modality: str | None) -> str | None:
    if cfg.select and not re.search(cfg.select, source.title, re.IGNORECASE):
        return "not selected"
    if cfg.exclude and re.search(cfg.exclude, source.title, re.IGNORECASE):
        return "excluded"
    if modality and source.series and source.series.modality != modality:
        return f"modality {source.series.modality or 'unknown'}"
    return None


# ------------------------------------------------------------------------------------------------------------ dry run


def _listing(cfg: DictConfig, found: Found) -> Table:
    """What is in the input folder, and by their headers whether the volumes can be used."""
    preset = _find_preset(cfg)[0]
    modality = cfg.modality or (preset.modality if preset else None)
    table = Table(
        caption=f"{len(found.sources)} volumes, {len(found.archives)} archives, {found.num_other} other files"
    )
    for column in ("source", "kind", "images", "description", "would be used"):
        table.add_column(column, overflow="fold")
    first: dict[str, str] = {}  # of sources that would become the same volume
    for source in found.sources:
        kind = f"DICOM {source.series.modality}" if source.series else "NIfTI"
        try:
            verdict = _reason_to_leave_out(cfg, source, modality) or "yes"
            if verdict == "yes":
                check_source(source, cfg.assume_orientation)
                if (other := first.setdefault(source.name, source.label)) != source.label:
                    verdict = f"no: would become the same volume as {other}"
        except UserError as error:
            verdict = f"no: {str(error).removeprefix(source.label + ': ')}"
        description = source.series.description if source.series else ""
        add_row(table, source.name, kind, str(len(source.files)), description, verdict)
    for path, reason in found.failed:
        add_row(table, path, "damaged", "1", "", f"no: {reason}")
    return table
