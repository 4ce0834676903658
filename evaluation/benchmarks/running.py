"""Runs a part of the benchmark, shows its table and writes its figures with the circumstances."""

import json
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from common.files import write_atomically
from common.parallel import num_cores
from common.precision import configure_backend
from common.processes import choose_device
from evaluation.benchmarks.measuring import Report

PACKAGES = ("torch", "numpy", "nibabel", "isal", "SimpleITK")


def run(cfg: DictConfig, command: str) -> None:
    """Measure the part of a config; `command` is noted among the circumstances."""
    if "device" in cfg:
        configure_backend(choose_device(cfg.device), fixed_shapes=True)
    report: Report = import_module(f"evaluation.benchmarks.{cfg.part}").measure(cfg)
    _show(report)
    if cfg.json is not None:
        circumstances = {"part": cfg.part, "size": cfg.size, "command": command, "cpu": _cpu_name()}
        versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
        content = {**circumstances, "cores": num_cores(), "versions": versions, **_figures(report)}
        write_atomically(cfg.json, (json.dumps(content, indent=2) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # some parts go without the imaging libraries
        return None


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _figures(report: Report) -> dict[str, Any]:
    rows = [
        {
            "name": row.name,
            report.unit: row.count,
            "seconds": row.seconds,
            "median_seconds": median(row.seconds),
            "per_second": row.rate,
            "ratio": report.ratio(row),
            "peak_gb": row.peak_gb,
            "difference": row.difference,
            "limit_share": row.limit_share,
        }
        for row in report.rows
    ]
    return {"unit": report.unit, "baseline": report.baseline, "rows": rows, **report.notes}


def _show(report: Report) -> None:
    columns = {"peak GB": "peak_gb", "difference": "difference", "of limit": "limit_share"}
    filled = {name for name in columns.values() if any(getattr(row, name) is not None for row in report.rows)}
    further = {title: name for title, name in columns.items() if name in filled}
    header = ("", report.unit, "seconds", f"{report.unit}/s", f"x {report.baseline}", *further)
    lines = []
    for row in report.rows:
        figures = (f"{row.count}", f"{median(row.seconds):.3g}", f"{row.rate:.4g}", f"{report.ratio(row):.3g}")
        values = (getattr(row, name) for name in further.values())
        lines.append([row.name, *figures, *("-" if value is None else f"{value:.2g}" for value in values)])
    notes = "".join(f"{name}: {value}\n" for name, value in report.notes.items())
    sys.stdout.write(f"{report.title}\n\n{markdown_table(header, lines)}\n{notes}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that can be read as it is and put into a document, all columns of even width."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    ruled = [header, ["-" * width for width in widths], *rows]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in ruled)
    return "".join(f"| {line} |\n" for line in lines)
