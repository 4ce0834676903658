"""Prepares all volumes of an input folder: finds them, resolves what is asked for, and says what became of each."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import UserError
from common.files import lock_folder, write_atomically
from dataset.preparation.classes import add_classes, choose_class_id
from dataset.preparation.prepared_folder import Outcome, PreparedFolder
from dataset.preparation.recipe import Recipe
from dataset.preparation.sources import Found, Source, check_source, find_sources

DEFAULT_WINDOW = (-1000.0, 1000.0)  # HU: air to dense bone
DEFAULT_PERCENTILES = (0.5, 99.5)
PROBLEMS_NAME = "problems.jsonl"
PLAIN = {"highlight": False, "markup": False, "soft_wrap": True}  # of lines on the console
MAX_SHOWN = 20  # problems on the console; all are in problems.jsonl
NOTABLE_LOSS = 0.02  # share of the foreground cut off from which a volume is mentioned


@dataclass(frozen=True)
class Target:
    """The class that volumes are prepared for. class_id None: the next free one."""

    name: str
    class_id: int | None
    modality: str
    recipe: Recipe


def preprocess(cfg: DictConfig) -> bool:
    """Prepares all volumes of an input folder that are not prepared yet. Returns whether every file could be used.

    UserError, before anything is read or written, for whatever is wrong with the options, the folders or the volumes
    that are there already; later only where nothing can be written.
    """
    console = Console(stderr=True)
    if cfg.dry_run:
        found = find_sources(cfg.input, cfg.num_workers)
        Console(width=None if sys.stdout.isatty() else 160).print(_listing(cfg, found))
        return True
    target = resolve_target(cfg)
    source_folder, output_dir = Path(cfg.input).resolve(), Path(cfg.output_dir)
    folder = output_dir / target.name
    _check_output(cfg, folder, source_folder)
    class_id = choose_class_id(output_dir, target.name, target.class_id)

    selected, outcomes = _find(cfg, target.modality)
    PreparedFolder(folder, source_folder, target.recipe).plan(selected)  # what is wrong, before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "preparing volumes"):
        prepared = PreparedFolder(folder, source_folder, target.recipe)  # another run may have ended since
        todo = prepared.plan(selected)
        console.print(
            f"{len(selected)} volumes in {cfg.input} -> {folder} (class {class_id}, "
            f"{target.modality}), {len(selected) - len(todo)} of them are there",
            **PLAIN,
        )
        outcomes += prepared.prepare(todo, cfg.num_workers)
        prepared.tidy()
        if unwanted := prepared.unwanted(selected):
            console.print(
                f"{folder}: {len(unwanted)} volume(s) of earlier runs come from sources in {cfg.input} that this run "
                f"leaves out or no longer finds, e.g. {unwanted[0]}: they stay, delete them if they are not wanted",
                **PLAIN,
            )
    if prepared.entries:
        class_id = choose_class_id(output_dir, target.name, target.class_id)  # another class may have come since
        add_classes(output_dir, {class_id: target.name})
    _report(console, outcomes, len(selected) - len(todo), prepared)
    return not any(outcome.status == "failed" for outcome in outcomes)


def _check_output(cfg: DictConfig, folder: Path, source_folder: Path) -> None:
    """UserError: the class folder lies among the sources, or can't be written."""
    if folder.resolve() == source_folder or source_folder in folder.resolve().parents:
        raise UserError(
            f"output_dir: {folder} lies in the input folder {cfg.input}: its volumes would be found as sources; "
            "choose a folder outside"
        )
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"output_dir: {parent} can't be written to: choose another folder")


def _find(cfg: DictConfig, modality: str) -> tuple[list[Source], list[Outcome]]:
    """The sources that are wanted, and what is said of all others. UserError where none is wanted."""
    found = find_sources(cfg.input, cfg.num_workers)
    selected, outcomes = [], [Outcome(Source(path, (Path(path),)), reason=reason) for path, reason in found.failed]
    for source in found.sources:
        reason = _reason_to_leave_out(cfg, source, modality)
        if reason is None:
            selected.append(source)
        else:
            outcomes.append(Outcome(source, reason=reason, is_fault=False))
    if not selected and not found.failed:
        raise UserError(
            f"input: of {len(found.sources)} volumes in {cfg.input} none is wanted (select {cfg.select!r}, modality "
            f"{modality}): --dry-run lists them"
        )
    return selected, outcomes


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
    if modality and source.series and source.series.modality != modality:
        return f"modality {source.series.modality or 'unknown'}"
    return None


# ------------------------------------------------------------------------------------------------------------ reports


def _listing(cfg: DictConfig, found: Found) -> Table:
    """What is in the input folder, and by their headers whether the volumes can be used."""
    preset = _find_preset(cfg)[0]
    modality = cfg.modality or (preset.modality if preset else None)
    table = Table(caption=f"{len(found.sources)} volumes, {found.num_other} other files")
    for column in ("source", "kind", "images", "description", "would be used"):
        table.add_column(column, overflow="fold")
    for source in found.sources:
        kind = f"DICOM {source.series.modality}" if source.series else "NIfTI"
        try:
            verdict = _reason_to_leave_out(cfg, source, modality) or "yes"
            if verdict == "yes":
                check_source(source, cfg.assume_orientation)
        except UserError as error:
            verdict = f"no: {str(error).removeprefix(source.label + ': ')}"
        description = source.series.description if source.series else ""
        _add_row(table, source.name, kind, str(len(source.files)), description, verdict)
    for path, reason in found.failed:
        _add_row(table, path, "damaged", "1", "", f"no: {reason}")
    return table


def _report(console: Console, outcomes: Sequence[Outcome], num_kept: int, prepared: PreparedFolder) -> None:
    """Prints the table of what became of everything, and writes the problems beside the volumes."""
    problems_path = prepared.folder / PROBLEMS_NAME
    console.print(f"{prepared.folder}: {len(prepared.entries)} volumes", **PLAIN)
    table = Table()
    for column in ("status", "volumes", "why"):
        table.add_column(column, overflow="fold")
    counts = Counter(outcome.status for outcome in outcomes)
    _add_row(table, "prepared", str(counts["prepared"]), "")
    _add_row(table, "were there", str(num_kept), "")
    reasons = Counter(outcome.reason for outcome in outcomes if outcome.status == "left out")
    for reason, count in reasons.most_common():
        _add_row(table, "left out", str(count), reason)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed[:MAX_SHOWN]:
        _add_row(table, "failed", "1", f"{outcome.source.label}: {outcome.reason}")
    if len(failed) > MAX_SHOWN:
        _add_row(table, "failed", str(len(failed) - MAX_SHOWN), f"more, see {problems_path}")
    console.print(table)
    cut = {file: e["foreground_lost"] for file, e in prepared.entries.items() if e["foreground_lost"] > NOTABLE_LOSS}
    if cut:
        worst = max(cut, key=cut.get)
        console.print(
            f"cropping cut off more than {NOTABLE_LOSS:.0%} of the foreground of {len(cut)} volumes, at most "
            f"{cut[worst]:.0%} ({worst}): foreground_lost in the manifest has all",
            **PLAIN,
        )
    _write_problems(problems_path, failed)


def _add_row(table: Table, *cells: str) -> None:
    """A row of plain text: a name in square brackets is no markup."""
    table.add_row(*map(Text, cells), style="red" if cells[0] == "failed" else None)


def _write_problems(path: Path, failed: Sequence[Outcome]) -> None:
    """One JSON object a line: source and reason. No file without problems."""
    if failed:
        lines = [json.dumps({"source": outcome.source.label, "reason": outcome.reason}) + "\n" for outcome in failed]
        write_atomically(path, "".join(lines).encode())
    else:
        path.unlink(missing_ok=True)
