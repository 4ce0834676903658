"""Checks every file of a data set before it costs training time, and shows some for a person to look at.

    python dataset/check.py config/PatchVolume_data.json --intensity-range -1 1 --report check.json

JSON is a dataset JSON of volumes or of latents. All files are read whole. Prints a table for each name, problems with
what to do about them, and notes; writes a picture of central slices. Exit status: 0 without problems, 1 with problems,
2 for a wrong command.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.data import CheckConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_command_line(argv, CheckConfig, None, __doc__)
    from dataset.checking.report import check

    return 0 if check(cfg) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(main))
