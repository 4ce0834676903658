"""Prepares a hospital's files for training: NIfTI or DICOM in, `.nii.gz` in [-1, 1], RAS, of one spacing and size out.

    python dataset/preprocess.py --input raw/ct --output-dir data --preset CTChestAbdomen
    python dataset/preprocess.py --input raw/mr --output-dir data --name MRPelvis --modality MR --spacing 1 1 2

writes data/NAME/SIZE/ (256x256x256, or native without a size), in it one volume per source and manifest.jsonl, and
enters class and size into the dataset JSONs of both training parts in data/. The same command again goes on: what is
done with the same options is kept. Files that can't be used are listed, in NAME/problems.jsonl too, and make the exit
status 1. docs/data.md has worked examples.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.loading import require  # noqa: E402
from config.schema.data import SUB_VOLUME, PreprocessConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_command_line(argv, PreprocessConfig, "preprocess.yaml", __doc__)
    require(cfg, "input", *([] if cfg.dry_run else ["output_dir"]))
    from dataset.preparation.preprocessing import preprocess

    return 0 if preprocess(cfg, cfg.downsample * SUB_VOLUME) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(main))
