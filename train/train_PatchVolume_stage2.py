r"""Stage 2 of the Patch-Volume autoencoder: whole volumes (Wang et al., IEEE TMI 2025, section III-A).

    python train/train_PatchVolume_stage2.py --config config/PatchVolume_8x_s2.yaml \
        dataset.root_dir=config/PatchVolume_data.json model.default_root_dir=results/PatchVolume_8x_s2 \
        model.resume_from_checkpoint=results/PatchVolume_8x/checkpoints/last.ckpt

It starts from the weights of that stage-1 checkpoint. The same command again goes on with the last checkpoint in
`model.default_root_dir`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.autoencoder import AutoencoderConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, AutoencoderConfig, "PatchVolume_8x_s2.yaml", __doc__)
    from train.autoencoder.training import train

    train(cfg, stage=2)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
