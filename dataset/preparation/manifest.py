"""`manifest.jsonl` in each folder of prepared volumes: where each one comes from and how to undo its intensities.

One JSON object a line, with the keys
    file, file_bytes    path of the volume below the folder, and its size
    source, input   name of the source (dataset/preparation/sources.py) and the folder that it was found in
    sha256, num_files, bytes, mtime_ns    the source's content, and what tells cheaply that it hasn't changed
    original        size, spacing_mm, orientation and range before preprocessing
    size, spacing_mm                      after it
    notes           what was handled on reading, in words
    steps           what was done, in words
    foreground_lost share of the foreground that cropping cut off
    intensity       how intensities were mapped to [-1, 1]: the fields of `Intensity`
    recipe          the options (dataset/preparation/recipe.py); equal recipes mean the same preparation
    versions        of the libraries
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.documents import parse_json
from common.errors import UserError
from common.files import write_atomically

MANIFEST_NAME = "manifest.jsonl"
KEYS = set("file file_bytes source input sha256 num_files bytes mtime_ns intensity recipe foreground_lost".split())
AGAIN = "prepare the volumes with dataset/preprocess.py"


@dataclass(frozen=True)
class Intensity:
    """A linear map of measured intensities to [-1, 1].

    method: "window" (fixed values) or "percentiles" (of each volume); low, high: the values that became -1 and 1;
    unit: "HU" where the values are absolute, None for arbitrary units.
    """

    method: str
    low: float
    high: float
    unit: str | None = None

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.method} {self.low:g} to {self.high:g}{unit}"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def read_manifest(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder's manifest by their `file`, the last one of each; empty where there is no manifest.

    A half-written last line, which a killed run leaves, is passed over. UserError for any other line that is no entry.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {AGAIN} into a new folder") from error
    entries = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            if not KEYS <= entry.keys():
                raise KeyError(min(KEYS - entry.keys()))
            Intensity(**entry["intensity"])
            entries[entry["file"]] = entry
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is no entry: {AGAIN} into a new folder") from error
    return entries


def append_entry(folder: str | Path, entry: dict[str, Any]) -> None:
    """Adds the entry of a volume that was just written."""
    path = Path(folder) / MANIFEST_NAME
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_manifest(folder: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Replaces the manifest: one line for each volume, sorted by file."""
    lines = [json.dumps(entry) + "\n" for entry in sorted(entries, key=lambda entry: entry["file"])]
    write_atomically(Path(folder) / MANIFEST_NAME, "".join(lines).encode())


def common_intensity(folders: Sequence[Path]) -> Intensity:
    """How to write generated volumes of a class in the units of its data, from the manifests of its folders.

    A window that all volumes share gives back its units, HU for CT. Percentiles differ from volume to volume, so what
    was mapped by them has no absolute units: [0, 1].
    UserError: a folder without manifest, several windows or methods.
    """
    found = set()
    for folder in folders:
        entries = read_manifest(folder)
        if not entries:
            raise UserError(f"{folder}: no {MANIFEST_NAME}, so its units are not known: {AGAIN}")
        for entry in entries.values():
            intensity = Intensity(**entry["intensity"])
            found.add(intensity if intensity.method == "window" else Intensity("percentiles", 0.0, 1.0))
    if len(found) > 1:
        shown = "; ".join(sorted(map(str, found))[:3])
        raise UserError(
            f"{folders[0]}: volumes of one class were prepared in different ways ({shown}), so generated ones have no "
            "common units: prepare all of them with the same window"
        )
    return found.pop()
