"""How good are few sampling steps? Samplers x numbers of steps x seeds, measured on a finished demo.

    python evaluation/sampling_study.py --demo demo --output-dir study
    python evaluation/sampling_study.py --demo demo --output-dir study --strategies ddim unipc --steps 5 25 --seeds 0

The demo's volumes are sampled from the same noise by every sampler, decoded, and compared with the demo's held-out
phantoms. OUT/sampling.json gets each result as soon as it is there, the same command again goes on where it stopped,
and another one adds to it. OUT/sampling_table.md and OUT/sampling.png show what is there so far.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.loading import require  # noqa: E402
from config.schema.evaluation import SamplingStudyConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, SamplingStudyConfig, None, __doc__)
    require(cfg, "output_dir")
    from evaluation.generation.sampling_study import run_study

    run_study(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
