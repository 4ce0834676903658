"""Generates volumes of every class with the 8x models; the sizes are those of config/generation_8x.yaml.

    python evaluation/class_conditional_generation.py --AE-ckpt AE_8x.ckpt --model-ckpt B_8x.pt --output-dir OUT

Writes OUT/seed_S/NAME_XxYxZ.nii.gz, float32 intensities in [-1, 1]. The same command goes on after an interruption.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.diffusion import GenerationConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, GenerationConfig, "generation_8x.yaml", __doc__)
    from evaluation.generation.run import generate

    generate(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
