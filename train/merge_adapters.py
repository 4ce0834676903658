"""Merges adapters into the BiFlowNet that they were trained on: one checkpoint that needs no adapter any more.

    python train/merge_adapters.py --model-ckpt BASE.pt --adapter RUN/adapter.safetensors --output NEW.pt

`--adapter FILE:0.7` takes an adapter at 0.7 of its strength; several are added.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.diffusion import MergeConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, MergeConfig, None, __doc__)
    from train.diffusion.merging import merge_adapters

    merge_adapters(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
