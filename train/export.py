"""Writes checkpoints as safetensors for others to use, one file each with its config, and a model card beside them.

    python train/export.py --ckpt AE.ckpt BiFlowNet.pt --output-dir ward-ct --licence cc-by-4.0 \\
        --data "1,200 chest CTs of ..." --results evaluated/generation.json --class-table config/classes_8x.yaml

The files take the place of the checkpoints everywhere, and the folder is what a repository on the Hugging Face hub is.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.publishing import ExportConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, ExportConfig, None, __doc__)
    from train.publishing.exporting import export

    export(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
