"""Speed of the parts that were made for it, each beside the straightforward way and only after both agree.

python evaluation/benchmark.py data                 at the paper's size
python evaluation/benchmark.py codebook             a training step of the codebook
python evaluation/benchmark.py sample               sampling steps of BiFlowNet
python evaluation/benchmark.py decode               latents to volumes
python evaluation/benchmark.py write                volumes to files
python evaluation/benchmark.py data --size tiny     in seconds: shows that it runs, not what it reaches
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.files import write_atomically  # noqa: E402
from common.parallel import num_cores  # noqa: E402
from common.script import run_script  # noqa: E402
from evaluation.benchmarks import autoencoder, biflownet, codebook, data, decode, sample, scaling, write  # noqa: E402
from evaluation.benchmarks.measuring import Report  # noqa: E402

PARTS = {
    "data": data,
    "codebook": codebook,
    "autoencoder": autoencoder,
    "biflownet": biflownet,
    "sample": sample,
    "decode": decode,
    "write": write,
    "scaling": scaling,
}  # each: a docstring, add_arguments(parser), measure(options) -> Report
FILE_WIDTH = 120  # characters of a table that does not go to a terminal
PACKAGES = ("torch", "numpy", "nibabel", "isal", "SimpleITK")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one part, show its table and write its JSON."""
    options = _parse(argv)
    report = PARTS[options.part].measure(options)
    _show(report)
    if options.json is not None:
        content = {**_circumstances(options, argv), **_figures(report)}
        write_atomically(options.json, (json.dumps(content, indent=2) + "\n").encode())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, part in PARTS.items():
        summary = part.__doc__.splitlines()[0]
        own = parts.add_parser(
            name, help=summary, description=part.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        own.add_argument("--size", choices=("paper", "tiny"), default="paper", help="(default: %(default)s)")
        own.add_argument("--repetitions", type=int, default=5, help="of which the median counts (default: %(default)s)")
        own.add_argument("--json", type=Path, help="file for the figures")
        part.add_arguments(own)
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: at least 1 is needed")
    return options


def _circumstances(options: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    words = sys.argv[1:] if argv is None else argv
    return {
        "part": options.part,
        "size": options.size,
        "command": shlex.join(["python", "evaluation/benchmark.py", *map(str, words)]),
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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
    further = {"peak GB": "peak_gb", "difference": "difference", "of limit": "limit_share"}
    further = {
        title: name for title, name in further.items() if any(getattr(row, name) is not None for row in report.rows)
    }
    table = Table("", report.unit, "seconds", f"{report.unit}/s", f"x {report.baseline}", *further, title=report.title)
    for row in report.rows:
        figures = (f"{row.count}", f"{median(row.seconds):.3g}", f"{row.rate:.4g}", f"{report.ratio(row):.3g}")
        values = (getattr(row, name) for name in further.values())
        table.add_row(row.name, *figures, *("-" if value is None else f"{value:.2g}" for value in values))
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    console.print(table)
    for name, value in report.notes.items():
        console.print(f"{name}: {value}", highlight=False)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
