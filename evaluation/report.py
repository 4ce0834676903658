"""One page of what an evaluation found: a self-contained HTML file to read, print or send.

    python evaluation/report.py --input-dir results/evaluation

reads whichever of OUT/reconstruction.json, OUT/generation.json and OUT/validity.json are there, with the pictures that
they name, and writes OUT/report.html. The page needs no network, no other file and no script. Where results
name volumes, OUT/view.html shows them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.loading import require  # noqa: E402
from config.schema.evaluation import ReportConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, ReportConfig, None, __doc__)
    require(cfg, "input_dir")
    from evaluation.report_page.report import write_report

    write_report(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
