"""Generates volumes that follow conditions: images such as sparse-view CT, masks, latents (docs/controlled.md).

    python evaluation/controlled_generation.py --data ct16/conditions.json:held_out --AE-ckpt AE.ckpt \
        --base-ckpt BiFlowNet.pt --model-ckpt ControlNet.pt --output-dir OUT --data-consistency

The JSON names for each class {"hints": {NAME: FOLDER}, "images": FOLDER of the true volumes, where they are known}.
Writes OUT/CLASS_ID/NAME.nii.gz in [-1, 1], where the condition lies in the patient, with NAME.json beside it, and
OUT/contact_sheet.png, OUT/view.html. With `--num-samples` above 1 NAME_I.nii.gz, and of them NAME_mean.nii.gz and
NAME_std.nii.gz.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.control import ControlledGenerationConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, ControlledGenerationConfig, "controlled_8x.yaml", __doc__)
    from evaluation.controlled.run import generate

    generate(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
