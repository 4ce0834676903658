r"""How near generated volumes are to real ones: FID, MMD, precision, diversity and a memorisation check, by class.

    python evaluation/generation_metrics.py --real held_out.json --generated generated --training training.json \
        --output-dir evaluation

    OUT/generation.json, .csv     figures with N, 95 % interval and a real-against-real floor; settings; warnings
    OUT/memorisation.csv          the nearest training volume of each generated one
    OUT/pictures/*.png            real beside generated volumes, generated ones beside their nearest training volumes
    OUT/cache/                    features of each volume, under the hash of its file: a killed run goes on

Sets are folders or dataset JSONs (`volume_sets.py`). Under torchrun the volumes are shared out to the processes.
evaluation/report.py makes a page of the results; docs/evaluation.md says what each number means.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.evaluation import GenerationMetricsConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, GenerationMetricsConfig, None, __doc__)
    from evaluation.comparison.generation_metrics import measure

    measure(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
