"""JSON and YAML as strangers may have written them: read within bounds, or a ValueError whose one line says why not.

A hundred bytes of YAML can stand for 10⁹ values (aliases of aliases), and brackets within brackets or numbers of
thousands of digits end libraries in errors of their own. So bytes, values, levels and digits are counted before
anything is made of them. No text comes back that neither a file nor a file's name can hold.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from common.text import decode, shown

MOST_BYTES = 32 * 2**20  # the split of 200,000 files has 20 MB
MOST_VALUES = 1_000_000  # of a JSON; with the text at most 0.5 GB of memory
MOST_YAML_VALUES = 200_000  # reading takes 20 times as long as that of JSON
MOST_LEVELS = 100
MOST_DIGITS = 100
_NUMERAL = re.compile(r"[-+.\d][-+.:_\da-fA-FxXo]*")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
# Scalars as text; ten times as fast where PyYAML has libyaml, which refuses file names that are no UTF-8.
TextLoader: type = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    """A file's text, as `decode`. OSError where it can't be read; ValueError, UnicodeDecodeError for its encoding."""
    with Path(path).open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"more than {most_bytes >> 20} MB")
    return decode(content)


def read_json(path: str | Path, unique: bool = False) -> Any:
    """What a JSON file holds; errors as of `read_text` and `parse_json`."""
    return parse_json(read_text(path), unique)


def parse_json(text: str, unique: bool = False) -> Any:
    """What a JSON text says. unique: no name may be twice in an object. ValueError: no JSON, or beyond the bounds."""
    openings = text.count("[") + text.count("{")
    if openings + text.count(",") >= MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    try:
        value = json.loads(text, parse_int=_whole_number, object_pairs_hook=_without_duplicates if unique else None)
    except RecursionError as error:
        raise ValueError(f"more than {MOST_LEVELS} levels of brackets") from error
    if openings > MOST_LEVELS or _HALF_CHARACTER.search(text):
        _check_levels_and_texts(value)
    return value


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Each line of a file that lines of JSON are added to, with what it says; a last one half written is passed over.

    Errors as of `read_json`, ValueError with the line's number.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), start=1):
            try:
                text = line.decode()
                value = parse_json(text) if text.strip() else None
            except ValueError as error:
                if file.read(1):
                    raise ValueError(f"line {number}: {error}") from error
                return
            if value is not None:
                yield text, value


def check_yaml(text: str, loader: type, most_values: int = MOST_YAML_VALUES, most_characters: int = MOST_BYTES) -> None:
    """Counts what a YAML text stands for without making it; aliases count as often as they are used.

    loader: PyYAML's that is to read it. most_characters: of a single value.
    ValueError: no YAML, an alias within what it stands for, or beyond the bounds.
    """
    known: dict[str, tuple[int, int]] = {}  # anchor -> values and levels that it stands for
    begun: list[list[Any]] = [[None, 0, 0]]  # anchor, values before it, levels in it; of what is not ended yet
    values = 0
    try:
        for event in yaml.parse(text, loader):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in known:
                    raise ValueError(f"the alias *{event.anchor:.60} stands for nothing that ends before it")
                more, levels = known[event.anchor]
                values += more
            elif isinstance(event, yaml.ScalarEvent):
                _check_scalar(event, most_characters)
                values, levels = values + 1, 0
                known[event.anchor] = (1, 0)
            elif isinstance(event, yaml.CollectionStartEvent):
                values, levels = values + 1, 0
                begun.append([event.anchor, values - 1, 0])
                known.pop(event.anchor, None)  # from here on it means this one
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before, levels = begun.pop()
                levels += 1
                known[anchor] = (values - before, levels)
            else:
                continue
            begun[-1][2] = max(begun[-1][2], levels)
            if len(begun) + levels > MOST_LEVELS:
                raise ValueError(f"more than {MOST_LEVELS} levels")
            if values > most_values:
                raise ValueError(f"more than {most_values:,} values, its aliases written out")
    except yaml.YAMLError as error:
        raise ValueError(reason(error)) from error


def parse_yaml(text: str, loader: type) -> Any:
    """What PyYAML's `loader` makes of a YAML text. ValueError: as of `check_yaml`, or the loader refuses it."""
    check_yaml(text, loader)
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(reason(error)) from error


def reason(error: Exception | str) -> str:
    """What a library says of a text, in one line of a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _check_scalar(event: yaml.ScalarEvent, most_characters: int) -> None:
    text = event.value
    if len(text) > most_characters:
        raise ValueError(f"a value of {len(text):,} characters, expected at most {most_characters:,}: {shown(text)}")
    if len(text) > MOST_DIGITS and _NUMERAL.fullmatch(text):
        raise ValueError(f"a number of more than {MOST_DIGITS} digits")
    _check_text(text)


def _check_levels_and_texts(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        for text in (item for item in level if isinstance(item, str)):
            _check_text(text)
        brackets = [item for item in level if isinstance(item, dict | list)]
        if not brackets:
            return
        level = [part for item in brackets if isinstance(item, list) for part in item]
        level += [part for item in brackets if isinstance(item, dict) for pair in item.items() for part in pair]
    raise ValueError(f"more than {MOST_LEVELS} levels of brackets")


def _check_text(text: str) -> None:
    """Bytes of file names that are no UTF-8 are halves of characters to Python (PEP 383), and may be; others not."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character in {shown(text)}") from error


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of more than {MOST_DIGITS} digits")
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f'key "{name:.80}" occurs twice')
    return found
