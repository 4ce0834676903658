"""Lists of what to generate, in a YAML or CSV file: one entry for each class, size and range of seeds.

    - {class: CTLegs, seed: 0-9, resolution: 512 256 256, spacing: 1.25 1.25 1.25}        class,seed,num_samples
    - {class: 3, num_samples: 20}                                                         MRT1Brain,0-9,2

`class` (name or id) is needed; `seed` (or several, as 0-9 or 0-3,7), `num_samples`, `resolution` (voxels z y x),
`spacing` (mm, x y z) and `attributes` ({age: 63}; in a CSV age=63 sex=F) come from the options where they aren't given.
In a CSV the numbers of a cell are separated by spaces or x; files as Excel writes them (semicolons, tabs, byte order
mark, UTF-16) are read too.
"""

import csv
import difflib
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.documents import TextLoader, parse_yaml, read_text
from common.errors import UserError
from common.text import shown
from config.schema.option import LARGEST_NUMBER
from evaluation.generation.attributes import Attributes, parse_attributes

FIELDS = ("class", "seed", "num_samples", "resolution", "spacing", "attributes")
NOTHING = ("", "~", "null")  # how YAML writes a field without value
MOST_VOLUMES = 100_000  # of one run; more is a slip of the keyboard, or should be several runs
MOST_BYTES = 4 * 2**20  # of a list of them
LONGEST = 1000  # characters of a field, but of seeds


@dataclass(frozen=True)
class Entry:
    """What is asked for at one place; None: as the options say."""

    where: str  # what messages begin with, e.g. "FILE: line 3: "
    class_key: str  # name or id of the class
    seeds: tuple[int, ...] | None = None
    num_samples: int | None = None
    resolution: tuple[int, int, int] | None = None  # voxels (z, y, x)
    spacing_mm: tuple[float, float, float] | None = None  # (x, y, z)
    attributes: Attributes | None = None


def read_request_file(path: str | Path) -> list[Entry]:
    """The entries of a list, in its order. UserError, naming line or entry, for whatever can't be read in it."""
    path = Path(path)
    read = {".yaml": _yaml_entries, ".yml": _yaml_entries, ".csv": _csv_entries}.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: a list of requests has to be named *.yaml, *.yml or *.csv")
    entries, num_volumes = [], 0
    for where, fields in read(path, _text(path)):
        entry = _entry(where, fields)
        num_volumes += len(entry.seeds or (0,)) * (entry.num_samples or 1)
        check_number(num_volumes, where)
        entries.append(entry)
    if not entries:
        raise UserError(f"{path}: the list of requests is empty: write an entry with a class for each thing to make")
    return entries


def check_number(num_volumes: int, where: str) -> None:
    """UserError, which begins with `where`, for more volumes than one run may make."""
    if num_volumes > MOST_VOLUMES:
        raise UserError(f"{where}more than {MOST_VOLUMES:,} volumes are asked for: do it in several runs")


def parse_seeds(text: str, where: str = "") -> tuple[int, ...]:
    """Seeds as 7, 0-9 (both ends included) or 0-3,7. UserError for anything else; `where`: what it begins with."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, flags=re.ASCII)
        if match is None:
            form = "whole numbers or ranges such as 7, 0-9 or 0-3,7"
            raise UserError(f"{where}seeds have to be {form}, got {shown(text)}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > LARGEST_NUMBER:
            raise UserError(f"{where}seeds are whole numbers up to {LARGEST_NUMBER:,}, got {shown(text)}")
        if last < first:
            raise UserError(f"{where}the range of seeds {part.strip()} runs backwards: write {last}-{first}")
        if last - first + len(seeds) >= MOST_VOLUMES:
            raise UserError(f"{where}{shown(text)} are more than {MOST_VOLUMES:,} seeds: ask for fewer in a run")
        seeds += range(first, last + 1)
    return tuple(seeds)


# Files


def _text(path: Path) -> str:
    try:
        return read_text(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such list of requests") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}): save it as CSV UTF-8 or YAML in UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a list of requests: {error}: ask for ranges of seeds") from error


def _yaml_entries(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        items = parse_yaml(text, _TextLoader)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if items in (None, ""):
        return
    if not isinstance(items, list):
        raise UserError(f"{path}: a list of entries is needed, each beginning with '- class:', got {shown(items)}")
    for number, fields in enumerate(items, start=1):
        where = f"{path}: entry {number}: "
        if not isinstance(fields, dict):
            raise UserError(f"{where}has to be fields such as {{class: NAME, seed: 0-9}}, got {shown(fields)}")
        yield where, {str(name): None if value in NOTHING else value for name, value in fields.items()}


class _TextLoader(TextLoader):
    """Scalars stay the text they are, as in a CSV (YAML would read 010 as 8), and no field may be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the field {name} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _csv_entries(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    header_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=header_line.count)  # a tie, as with one column, gives the comma
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            where = f"{path}: line {reader.line_num}: "
            if not any(cells):
                continue
            if header is None:
                header = [cell.lower() for cell in cells]
                _check_fields(where, header)
            elif len(cells) > len(header):
                raise UserError(
                    f"{where}{len(cells)} cells under {len(header)} columns: separate the numbers of a cell by spaces "
                    "or x, and put a name with a comma into quotes"
                )
            else:  # the last cells may be missing, as Excel leaves empty ones away
                yield where, {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: cannot be read as CSV: {error}") from error


# Fields


def _check_fields(where: str, names: list[str]) -> None:
    for name in names:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f", did you mean {close[0]}?" if close else ";"
            raise UserError(f"{where}unknown field {shown(name)}{hint} the fields are {', '.join(FIELDS)}")
        if names.count(name) > 1:
            raise UserError(f"{where}the field {name} is there twice")
    if "class" not in names:
        raise UserError(f"{where}the field class is missing: name or id of the class to generate")


def _entry(where: str, fields: dict[str, Any]) -> Entry:
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name != "seed" and len(str(value)) > LONGEST:
            raise UserError(f"{where}{name:.60} has more than {LONGEST:,} characters: {shown(value)}")
    _check_fields(where, [*fields] if "class" in given else [name for name in fields if name != "class"])
    if not isinstance(given["class"], str):
        raise UserError(f"{where}class has to be a name or an id, got {shown(given['class'])}")
    return Entry(
        where,
        given["class"].strip(),
        parse_seeds(str(given["seed"]), where) if "seed" in given else None,
        _numbers(where, given, "num_samples", 1, is_whole=True)[0] if "num_samples" in given else None,
        _numbers(where, given, "resolution", 3, is_whole=True) if "resolution" in given else None,
        _numbers(where, given, "spacing", 3, is_whole=False) if "spacing" in given else None,
        _attributes(where, given["attributes"]) if "attributes" in given else None,
    )


def _attributes(where: str, value: Any) -> Attributes:
    """Of {age: 63, sex: F} in YAML, or of the text age=63 sex=F."""
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return parse_attributes([f"{name}={item}" for name, item in value.items()], where)
    if not isinstance(value, str):
        raise UserError(f"{where}attributes are given as {{age: 63, sex: F}} or age=63 sex=F, got {shown(value)}")
    return parse_attributes(re.split(r"\s+(?=\w+=)", value.strip()), where)


def _numbers(where: str, fields: dict[str, Any], name: str, count: int, is_whole: bool) -> tuple[Any, ...]:
    """A field's numbers above 0, from a number, a list of them, or text with spaces, x or × between them."""
    value = fields[name]
    words = value if isinstance(value, list) else re.split(r"\s*[x×]\s*|\s+", str(value).strip())
    pattern = r"\d{1,9}" if is_whole else r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?"
    words = [str(word) for word in words]
    fits = len(words) == count and all(re.fullmatch(pattern, word, flags=re.ASCII | re.IGNORECASE) for word in words)
    numbers = tuple(int(word) if is_whole else float(word) for word in words) if fits else ()
    if not fits or not all(0 < number < math.inf for number in numbers):
        kind = {
            "num_samples": "a whole number above 0",
            "resolution": "three whole numbers above 0, voxels z y x, e.g. 128 256 256",
            "spacing": "three numbers above 0, mm in x y z with decimal points, e.g. 0.7 0.7 1",
        }[name]
        raise UserError(f"{where}{name} has to be {kind}, got {shown(value)}")
    return numbers
