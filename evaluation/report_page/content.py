"""What a report shows, read from OUT/KIND.json and checked: a fault is one line that names the file and the place."""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from common.errors import UserError
from common.places import exists
from evaluation.results.results import KINDS, Picture, Results, read_results

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
BETTER = ("lower", "higher", "real")
NAMES = {str: "a text", int: "a whole number", float: "a number"}


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
    making = typed(content, Making, f"{path}: ")
    results = typed(content, Results, f"{path}: ")
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
    if (size := png_size(data)) is None:
        raise UserError(f"{file}: no PNG, or a damaged one: run the script that wrote it again")
    return Png(picture.caption, data, *size)


def png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG whose chunks are all there with the right checksums, None for anything else."""
    start, size, names = len(PNG_SIGNATURE), (0, 0), []
    if not data.startswith(PNG_SIGNATURE):
        return None
    while start < len(data):
        length, name = struct.unpack(">I4s", data[start : start + 8].ljust(8, b"\0"))
        end = start + 8 + length
        if end + 4 > len(data) or zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return None
        if name == b"IHDR" and length == 13:
            size = struct.unpack(">II", data[start + 8 : start + 16])
        names.append(name)
        start = end + 4
    return size if min(size) > 0 and b"IDAT" in names and names[-1] == b"IEND" else None


def typed(value: Any, hint: Any, place: str) -> Any:
    """A value of JSON as a type hint says it, dataclasses included; UserError: `place` and what is wrong there.

    null is NaN where a number belongs: JSON has no other word for what is not finite. Further keys are passed over.
    """
    args = get_args(hint)
    kind = get_origin(hint) or hint
    if kind is Any:
        return value
    if kind is UnionType and NoneType in args:
        return None if value is None else typed(value, args[0], place)
    if kind in (float, UnionType) and value is None:
        return math.nan
    if kind is UnionType:
        return _expect(value, args, place, "a text or a number")
    if kind is float:
        return float(_expect(value, (int, float), place, NAMES[float]))  # of at most 100 digits
    if kind in NAMES:
        return _expect(value, (kind,), place, NAMES[kind])
    if is_dataclass(kind):
        return _as_dataclass(_expect(value, (dict,), place, "an object"), kind, place)
    if issubclass(kind, Mapping):
        entries = _expect(value, (dict,), place, "an object").items()
        return {key: typed(item, args[1], f"{place}.{key}") for key, item in entries}
    items = _expect(value, (list,), place, "a list")
    if kind is tuple:
        if len(items) != len(args):
            raise UserError(f"{_end(place)} has {len(items)} values, {len(args)} are needed")
        return tuple(typed(item, arg, f"{place}[{i}]") for i, (item, arg) in enumerate(zip(items, args, strict=True)))
    return [typed(item, args[0], f"{place}[{i}]") for i, item in enumerate(items)]


def _as_dataclass(value: dict[str, Any], kind: type, place: str) -> Any:
    needed = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise UserError(f"{_end(place)} lacks {', '.join(missing)}: run the script that wrote it again")
    dot = "" if place.endswith(": ") else "."
    hints = get_type_hints(kind)
    return kind(**{name: typed(value[name], hints[name], f"{place}{dot}{name}") for name in hints if name in value})


def _expect(value: Any, kinds: tuple[type, ...], place: str, name: str) -> Any:
    """true and false are no numbers, except in a cell for reading."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and str not in kinds):
        found = {dict: "an object", list: "a list", NoneType: "null"}.get(type(value), repr(value)[:40])
        raise UserError(f"{_end(place)} is {found}, not {name}: run the script that wrote it again")
    return value


def _end(place: str) -> str:
    return place.removesuffix(": ")
