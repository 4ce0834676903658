"""What a report shows, read from OUT/KIND.json and checked: a fault is one line that names the file and the place."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from common.errors import UserError
from common.places import exists
from common.text import printable
from evaluation.results.results import KINDS, Picture, Results, read_results

BETTER = ("lower", "higher", "real")


@dataclass(frozen=True)
class Png:
    """A picture that can be embedded."""

    caption: str
    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Making:
    """How a KIND.json was made: its keys beside those of Results."""

    created_utc: str
    command: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """One KIND.json: how it was made, what was found, and the pictures it names."""

    making: Making
    results: Results
    pictures: Sequence[Png]


def read_parts(folder: Path) -> list[Part]:
    """Those of the KIND.json that are in the folder. UserError: none is, or one of them is at fault."""
    paths = [path for kind in KINDS if exists(path := folder / f"{kind}.json")]
    if not paths:
        names = ", ".join(f"{kind}.json" for kind in KINDS)
        raise UserError(f"{folder}: none of {names} is there: the evaluation scripts write them")
    return [_read_part(path) for path in paths]


def _read_part(path: Path) -> Part:
    content = read_results(path)
    making = typed(content, Making, path)
    results = typed(content, Results, path)
    if results.kind != path.stem:
        raise UserError(f"{path}: kind is {results.kind!r}, the name says {path.stem!r}: rename the file")
    for i, figure in enumerate(results.figures):
        if figure.better not in BETTER:
            raise UserError(f"{path}: figures[{i}].better is {figure.better!r}, not one of {', '.join(BETTER)}")
    for i, curves in enumerate(results.curves):
        for j, line in enumerate(curves.series):
            lengths = [len(values) for values in (line.x, line.y, line.low, line.high)]
            if lengths[0] != lengths[1] or lengths[2] != lengths[3] or lengths[2] not in (0, lengths[0]):
                where = f"{path}: curves[{i}].series[{j}]"
                raise UserError(f"{where}: x, y, low, high have {lengths} values, all need as many")
    for i, table in enumerate(results.tables):
        if any(len(row) != len(table.columns) for row in table.rows):
            raise UserError(f"{path}: tables[{i}].rows: each needs {len(table.columns)} cells, one for each column")
    return Part(making, results, [_read_picture(path, picture) for picture in results.pictures])


def _read_picture(path: Path, picture: Picture) -> Png:
    """Whole or not at all: nobody should meet half a picture in the page."""
    name = PurePosixPath(picture.file)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: picture {picture.file!r} lies outside of the folder of results")
    file = path.parent / name
    try:
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: picture {picture.file!r} cannot be read: run its script again") from error
    if (size := read_png(data)) is None:
        raise UserError(f"{file}: no PNG, or a damaged one: run the script that wrote it again")
    return Png(picture.caption, data, *size)


def read_png(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG whose chunks are all there with the right checksums, None for anything else."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()
            return image.size
    except (OSError, SyntaxError, ValueError):  # SyntaxError: how Pillow says that a checksum is wrong
        return None


def typed(content: Mapping[str, Any], kind: type, place: Path) -> Any:
    """A JSON object as a dataclass says it; UserError: what is wrong where. Further keys are passed over."""
    try:  # halves of characters, which JSON and command lines can hold, become question marks
        return TypeAdapter(kind).validate_json(printable(json.dumps(content, ensure_ascii=False)), strict=True)
    except ValidationError as errors:
        error = errors.errors()[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
        found = "" if error["type"] == "missing" else f", found {str(error['input'])[:40]!r}"
        raise UserError(
            f"{place}: {where.removeprefix('.')}: {error['msg']}{found}: run the script that wrote it again"
        ) from errors
