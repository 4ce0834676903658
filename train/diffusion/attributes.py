"""Attributes of latents: read from the volumes' headers or from tables, and checked against the config's rows."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.documents import parse_json, read_text
from common.errors import UserError
from common.places import is_file
from common.progress import tracked
from dataset.Multires_dataset import Multires_dataset
from dataset.volumes.index import LATENT_SUFFIX, VOLUME_SUFFIX
from dataset.volumes.volume_io import read_header
from ddpm.attributes import OF_VOLUMES, VOLUME, AttributeSpec, of_volume, specs_of

KEYS = ("file", "subject")  # columns of a table by which its rows are found
MOST_MISSING = 0.5  # of the files; of fewer known ones a slip is more likely than missing knowledge

Lookup = Callable[[Path], Any]  # latent file -> value, None or "" where it is not known


def read_attributes(
    rows: Sequence[DictConfig], dataset: Multires_dataset, logger: logging.Logger, is_trained: bool = True
) -> Tensor:
    """The attributes of each latent, (N, A) as `AttributeSpec.encoded` has them; a line for the log on each.

    is_trained: on these latents; else unknown ones and missing categories are no matter.

    Raises:
        UserError: a table or column that isn't there, a value out of its range or that is no value of its category,
            a category that no latent has, more than half of the latents without a value.
    """
    tables: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    columns = []
    for row, spec in zip(rows, specs_of(rows), strict=True):
        look_up = _of_volumes(row, dataset) if row.source == VOLUME else _of_table(row, dataset, tables)
        files = tracked(dataset.files, f"reading {row.name}", "file", transient=True)
        values = [_checked(look_up(path), row, spec, path) for path in files]
        known = [value for value in values if value is not None]
        columns.append([spec.encoded(value) for value in values])
        if not is_trained:
            continue
        if len(known) < MOST_MISSING * len(values):
            raise UserError(
                f"attributes: {row.name}: {len(values) - len(known)} of {len(values)} latents have none in "
                f"{row.source}, e.g. {dataset.files[values.index(None)]}: complete it, or leave the attribute out"
            )
        if never := [value for value in row.categories if value not in known]:
            raise UserError(
                f"attributes: {row.name}: no latent is {never[0]}, so it could not be learned: take it out of its "
                "categories"
            )
        counts = f"{min(known):g} to {max(known):g}" if spec.range else f"{len(row.categories)} categories"
        logger.info("attribute %s: %s, known of %d of %d latents", row.name, counts, len(known), len(values))
    return torch.tensor(columns).T.contiguous()  # (N, A)


def _checked(value: Any, row: DictConfig, spec: AttributeSpec, path: Path) -> float | str | None:
    text = "" if value is None else str(value).strip()
    if text.lower() in ("", "nan", "none", "null", "n/a", "na"):
        return None
    where = f"attributes: {row.name} of {path} is {text!r} in {row.source}"
    if spec.range is None:
        if text not in spec.categories:
            raise UserError(f"{where}: expected {' | '.join(spec.categories)}: correct it, or add it to categories")
        return text
    try:
        number = float(text)
    except ValueError as error:
        raise UserError(f"{where}: expected a number") from error
    if not spec.range[0] <= number <= spec.range[1]:
        raise UserError(f"{where}: expected {spec.range[0]:g} to {spec.range[1]:g}: correct it, or widen its range")
    return number


def _of_volumes(row: DictConfig, dataset: Multires_dataset) -> Lookup:
    """From the header of the volume that a latent was made from, beside the latents."""
    column = row.column or row.name
    if column not in OF_VOLUMES:
        raise UserError(f"attributes: {row.name}: volumes have {', '.join(OF_VOLUMES)}, not {column}: give a column")

    def look_up(path: Path) -> float | None:
        folder = dataset.class_folders[path]
        volume = Path(str(folder.absolute()).removesuffix(LATENT_SUFFIX)) / path.relative_to(folder)
        if not is_file(volume):
            return None
        header = read_header(volume)
        return of_volume(column, header.spacing_mm, header.shape)

    return look_up


def _of_table(row: DictConfig, dataset: Multires_dataset, tables: dict) -> Lookup:
    """From a table, by file name (with or without its ending or folder) or by subject."""
    if row.source not in tables:
        tables[row.source] = _read_table(Path(row.source))
    key, lines = tables[row.source]
    column = row.column or row.name
    if not any(column in line for line in lines.values()):
        known = ", ".join(sorted({name for line in lines.values() for name in line if name}))
        raise UserError(f"{row.source}: has no column {column} for attribute {row.name}: there are {known}")
    if key == "subject" and dataset.split is None:
        raise UserError(f"{row.source}: goes by subject, but the data has no split.json: draw one (dataset/split.py)")

    def look_up(path: Path) -> Any:
        folder = dataset.class_folders[path]
        if key == "subject":
            return lines.get(dataset.split.subject_of(path, folder), {}).get(column)
        below = path.relative_to(folder).as_posix()
        names = (below, below.removesuffix(VOLUME_SUFFIX), path.name, path.name.removesuffix(VOLUME_SUFFIX))
        return next((lines[name][column] for name in names if column in lines.get(name, ())), None)

    return look_up


def _read_table(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The column that its rows are found by, and the rows by it."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"attributes: {path}: cannot be read as a table ({error})") from error
    try:
        if path.suffix.lower() in (".jsonl", ".json"):
            lines = [parse_json(line) for line in text.splitlines() if line.strip()]
        else:
            lines = list(csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
        if not lines or not all(isinstance(line, dict) for line in lines):
            raise ValueError("no rows with named columns")
    except (ValueError, csv.Error) as error:
        raise UserError(f"attributes: {path}: no CSV with a header or JSON lines ({error})") from error
    key = next((key for key in KEYS if all(line.get(key) not in (None, "") for line in lines)), None)
    if key is None:
        raise UserError(f"attributes: {path}: has no column {' or '.join(KEYS)} that each row fills")
    names = [str(line[key]) for line in lines]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"attributes: {path}: {key} {twice} is there twice: keep one row")
    return key, dict(zip(names, lines, strict=True))
