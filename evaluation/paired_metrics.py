"""How near controlled generation comes to the truth: beside the condition itself and the autoencoder's reconstruction.

    python evaluation/paired_metrics.py --data ct16/conditions.json:held_out --generated OUT --AE-ckpt AE.ckpt \
        --output-dir evaluation

Writes OUTPUT/paired.json and .csv, which evaluation/report.py shows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.evaluation import PairedMetricsConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, PairedMetricsConfig, None, __doc__)
    from evaluation.controlled.paired import measure

    measure(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
