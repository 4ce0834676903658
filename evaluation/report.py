"""One page of what an evaluation found: a self-contained HTML file to read, print or send.

    python evaluation/report.py --input-dir results/evaluation

reads whichever of OUT/reconstruction.json, OUT/generation.json and OUT/validity.json are there, with the pictures that
they name, and writes OUT/report.html. The page needs no network, no other file and no script.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.files import write_atomically  # noqa: E402
from common.log import get_logger  # noqa: E402
from common.script import run_script  # noqa: E402
from evaluation.report_page.content import read_parts  # noqa: E402
from evaluation.report_page.page import page  # noqa: E402

REPORT_NAME = "report.html"
TITLE = "3D MedDiffusion: evaluation"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--output", type=Path, help=f"the page (default: {REPORT_NAME} in the folder)")
    parser.add_argument("--title", default=TITLE, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    output = options.output or options.input_dir / REPORT_NAME
    write_report(options.input_dir, output, options.title)
    get_logger().info("wrote %s", output)


def write_report(folder: Path, output: Path, title: str = TITLE) -> None:
    """The page of a folder of results. UserError: there are none, they or their pictures are damaged."""
    parts = read_parts(folder)
    style = (ROOT / "evaluation" / "report_page" / "report.css").read_text(encoding="utf-8")
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    text = page(parts, title=title, made=made, style=style)
    write_atomically(output, text.encode(errors="replace"))  # JSON and command lines can hold halves of characters


if __name__ == "__main__":
    raise SystemExit(run_script(main))
