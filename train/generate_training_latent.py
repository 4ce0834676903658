"""Encodes a data set with a trained autoencoder: the latents of class folder X go to X_latents beside it.

    python train/generate_training_latent.py --data-path config/Singleres_dataset.json --AE-ckpt AE.ckpt --batch-size 4

Each image gives one normalised latent under the same name; sub-folders are kept, and latents.json records the
autoencoder. The same command goes on after an interruption: whole latents are kept, all others are made.
`torchrun --nproc-per-node N` shares the images out to N processes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.autoencoder import LatentConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, LatentConfig, None, __doc__)
    from train.latents.encoding import generate_latents

    generate_latents(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
