"""Do the distances see what they should? The harness run on volumes whose faults are known.

    python evaluation/validity.py --real held_out.json --AE-ckpt stage2/checkpoints/last.ckpt --output-dir evaluation

    OUT/validity.json, .csv    distances of real volumes to real, reconstructed, other, noisy and blurred ones; checks

The checks: between random halves of the real set, so that N is the same, another class is farther than reconstructions
and these are farther than real volumes; the more noise or blur, the farther the set is from itself; the order of the
volumes changes nothing; a generator that repeats one volume shows in the diversity gap; copies of training volumes show
in the memorisation check, real volumes that are none don't. A check that fails ends in exit status 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.evaluation import ValidityConfig  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Measure, write the results; 1 where a check fails."""
    cfg = parse_command_line(argv, ValidityConfig, None, __doc__)
    from evaluation.comparison.validity import measure

    return 0 if measure(cfg) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(main))
