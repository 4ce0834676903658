r"""How well autoencoders reconstruct volumes that they were not trained on: PSNR, SSIM, LPIPS, seams, use of the codes.

    python evaluation/reconstruction.py --data held_out.json --AE-ckpt stage1/last.ckpt stage2/last.ckpt \
        --output-dir OUT

    OUT/reconstruction.json, .csv               every metric of each class and checkpoint, with 95 % intervals; of
                                                several checkpoints also the differences of the later ones to the first
    OUT/reconstruction_volumes.csv              every metric of each volume
    OUT/pictures/reconstruction_CLASS.png       some volumes, their reconstructions and the differences
    OUT/volumes/*.nii.gz, OUT/view.html         the reconstructions of these, and a page to look at them

What is done is kept in OUT/cache, so the same command goes on after an interruption. Under torchrun the volumes are
shared out to the processes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.evaluation import ReconstructionConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    cfg = parse_command_line(argv, ReconstructionConfig, None, __doc__)
    from evaluation.autoencoding.reconstruction import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
