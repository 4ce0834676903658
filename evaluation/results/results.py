"""What an evaluation found, in one form for all of its scripts: OUT/KIND.json and OUT/KIND.csv, versioned.

KIND is reconstruction, generation or validity; `evaluation/report.py` makes one page of what a folder holds.
docs/evaluation.md lists the keys of the JSON.
"""

import csv
import io
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BeforeValidator

from common.documents import read_json
from common.errors import UserError
from common.files import write_atomically
from common.places import is_folder

KINDS = ("reconstruction", "generation", "paired", "validity")
SCHEMA_VERSION = 1  # rises when a key changes its meaning or goes; new keys don't raise it
PACKAGES = ("torch", "torchvision", "torchmetrics", "monai", "numpy", "nibabel")
PICTURES_FOLDER = "pictures"
VOLUMES_FOLDER = "volumes"

# null in JSON, which has no other word for what is not finite
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class Floor:
    """What real volumes get against real ones, at a number of volumes that the figure can be had for too.

    value: mean over random halvings of the real set, `num` volumes of as many subjects each. comparable: the figure
    itself at `num` volumes a set. A distance depends on the number of volumes, so compare these two with each other.
    """

    value: Number
    comparable: Number
    num: int


@dataclass(frozen=True)
class Figure:
    """One number, with all that is needed to publish it.

    group: class of the volumes. metric: its name. value: NaN and infinity are None in JSON. interval: 95 %, by
    resampling subjects. num: volumes by set, and subjects where these are fewer, e.g. {"real": 100, "real subjects":
    25, "generated": 50}. better: "lower", "higher" or "real" (the nearer to that of real volumes). network: the
    features it is measured on. model: the checkpoint. std: standard deviation over volumes, of means. like_real: what
    "real" means, e.g. "ratio 1". no_interval: why there is none, e.g. "n too small". `evaluation/results/scales.py`
    makes figures of what it says of their metrics.
    """

    group: str
    metric: str
    value: Number
    interval: tuple[Number, Number] | None
    num: Mapping[str, int]
    better: str
    unit: str = ""
    network: str = ""
    model: str = ""
    floor: Floor | None = None
    std: float | None = None
    like_real: str = ""
    no_interval: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG of the results' folder, `file` relative to it."""

    file: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """A volume to look at: what it is, e.g. "real"; its file, absolute or from the results' folder on.

    value_range: shown black and white; None: its lowest and highest value.
    """

    role: str
    file: str
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Beside:
    """Volumes to look at beside each other."""

    name: str
    volumes: Sequence[Panel]


@dataclass(frozen=True)
class Series:
    """One line of a plot; low and high bound a band around it."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()


@dataclass(frozen=True)
class Curves:
    """One plot."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


@dataclass(frozen=True)
class TextTable:
    """A table for reading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | Number]]


class Warned(str):
    """A warning "PLACE: FOUND MEANING", of which those with the same meaning become one line.

    place: the class, and what else it is about; may be empty. found: what was found there. meaning: the end of the
    sentence, the same words for all of a kind, with the space or colon before it.
    """

    def __new__(cls, place: str, found: str, meaning: str) -> "Warned":
        self = super().__new__(cls, f"{place}: {found}{meaning}" if place else found + meaning)
        self.place, self.found, self.meaning = place, found, meaning
        return self

    def __getnewargs__(self) -> tuple[str, str, str]:  # so that it can be sent to other processes
        return self.place, self.found, self.meaning


def one_line_a_kind(warnings: Sequence[str]) -> list[str]:
    """Warnings with the same meaning together, at the place of the first; other texts as they are."""
    kinds: dict[str, dict[str, list[str]]] = {}  # meaning -> what was found -> where
    for warning in warnings:
        text = warning if isinstance(warning, Warned) else Warned("", "", warning)
        kinds.setdefault(text.meaning, {}).setdefault(text.found, []).append(text.place)
    return [
        "; ".join(str(Warned(", ".join(filter(None, places)), found, "")) for found, places in of_kind.items())
        + meaning
        for meaning, of_kind in kinds.items()
    ]


@dataclass
class Results:
    """Everything that a script found. definitions: what a metric is here, name -> one sentence with its settings."""

    kind: str
    settings: dict[str, Any]
    definitions: Mapping[str, str]
    figures: list[Figure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    excluded: list[Mapping[str, str]] = field(default_factory=list)  # {"file": ..., "reason": ...}
    pictures: list[Picture] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)
    volumes: list[Beside] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Writes OUT/KIND.json and OUT/KIND.csv (one line per figure); returns the JSON's path.

        Warnings of a kind become one line, here too.
        """
        self.warnings = one_line_a_kind(self.warnings)
        content = {
            "schema": f"3d-meddiffusion/evaluation/{self.kind}",
            "schema_version": SCHEMA_VERSION,
            "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            **asdict(self),
        }
        write_csv(folder / f"{self.kind}.csv", FIGURE_COLUMNS, [_csv_row(figure) for figure in self.figures])
        path = folder / f"{self.kind}.json"
        write_atomically(path, (json.dumps(_plain(content), indent=2, allow_nan=False) + "\n").encode())
        return path


FIGURE_COLUMNS = (
    *("group", "metric", "network", "model", "value", "low", "high", "std", "unit", "better", "num"),
    *("floor", "comparable", "floor_num"),
)


def read_results(path: Path) -> dict[str, Any]:
    """A KIND.json. UserError: missing, damaged, not of these scripts, or of a newer version of them."""
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: one of the evaluation scripts writes it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): run the script that wrote it again") from error
    schemas = {f"3d-meddiffusion/evaluation/{kind}": kind for kind in KINDS}
    if not isinstance(content, dict) or content.get("schema") not in schemas:
        raise UserError(f"{path}: not a result of the evaluation scripts (schema {', '.join(KINDS)})")
    found = content.get("schema_version")
    if found != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {found}, this code reads {SCHEMA_VERSION}: run the script again")
    if missing := {item.name for item in fields(Results)} - {"volumes"} - content.keys():  # older ones have no volumes
        raise UserError(f"{path}: {', '.join(sorted(missing))} missing: run the script that wrote it again")
    return content


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table with a heading; None, NaN are empty cells, infinity is "inf"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if cell is None or cell != cell else cell for cell in row] for row in rows])  # NaN != NaN
    write_atomically(path, text.getvalue().encode(errors="replace"))


def make_folders(cfg: DictConfig, kind: str) -> None:
    """Makes the folders of results, pictures and cache: a place that can't be written to shows before any work."""
    output = Path(cfg.output_dir)
    folders = [("output_dir", output), ("cache_dir", cache_folder(cfg))]
    if OmegaConf.select(cfg, "num_pictures"):
        folders.append(("output_dir", output / PICTURES_FOLDER))
    for option, folder in folders:
        probe = folder / f".probe-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{option}: {folder} can't be written to ({error.strerror}): choose another") from error
    for file in (output / f"{kind}.json", output / f"{kind}.csv"):
        if is_folder(file):
            raise UserError(f"output_dir: {file} is a folder: remove it, or choose another output_dir")


def cache_folder(cfg: DictConfig) -> Path:
    """Where what was computed of each volume is kept."""
    return Path(cfg.cache_dir or Path(cfg.output_dir) / "cache")


def file_names(groups: Sequence[str]) -> list[str]:
    """A name for the file of each group, however it is called; different ones for all."""
    names: list[str] = []
    for group in groups:
        name = base = re.sub(r"[^\w-]+", "_", group)[:50] or "_"
        number = 2
        while name.casefold() in [other.casefold() for other in names]:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def _csv_row(figure: Figure) -> list[Any]:
    low, high = figure.interval or (None, None)
    num = " ".join(f"{name}={count}" for name, count in figure.num.items())
    floor = (None, None, None) if figure.floor is None else astuple(figure.floor)
    names = (figure.group, figure.metric, figure.network, figure.model)
    return [*names, figure.value, low, high, figure.std, figure.unit, figure.better, num, *floor]


def _plain(value: Any) -> Any:
    """As JSON can hold it: tuples are lists, what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
