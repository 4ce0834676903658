"""Which training recipe is better at equal cost? Variants x seeds, judged on held-out volumes, with intervals.

    python evaluation/recipe_study.py --config config/studies/diffusion_demo.yaml --output-dir recipes

The configuration names what variants change of a training, and what each run may cost. Every run is the real training,
and generation where it is a diffusion model's. OUT/study.json gets each result as soon as it is there, and the same
command goes on where it stopped. OUT/study.md and pictures show what is there so far (docs/recipes.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.loading import require  # noqa: E402
from config.schema.evaluation import RecipeStudyConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, RecipeStudyConfig, None, __doc__)
    require(cfg, "base", "data", "output_dir", *(["generation", "autoencoder"] if cfg.stage == "diffusion" else []))
    from evaluation.study.study import run_study

    run_study(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
