r"""Stage 1 of the Patch-Volume autoencoder: patches (Wang et al., IEEE TMI 2025, section III-A).

    python train/train_PatchVolume.py --config config/PatchVolume_8x.yaml \
        dataset.root_dir=config/PatchVolume_data.json model.default_root_dir=results/PatchVolume_8x

The same command again goes on with the last checkpoint in `model.default_root_dir`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.autoencoder import AutoencoderConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, AutoencoderConfig, "PatchVolume_8x.yaml", __doc__)
    from train.autoencoder.training import train

    train(cfg, stage=1)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
