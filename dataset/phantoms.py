"""Digital phantoms: small volumes of two classes, a chest as CT shows it and a head as MR shows it.

They let the whole pipeline run without patient data. Anatomy, intensities, texture and spacing are random, and each
phantom depends on (seed, class, index) only.

    python dataset/phantoms.py --output-dir data/phantoms --num-per-class 40 --size 64 --seed 0

writes OUT/CTChest/*.nii.gz and OUT/MRBrain/*.nii.gz, OUT/split.json, which says which of them train, validate or are
held out for evaluation, and beside each pair of folders the dataset JSONs PatchVolume_data.json and
Singleres_dataset.json (volumes) and Singleres_latents.json (the folders that train/generate_training_latent.py writes).
With `--slabs` there are chests of two sizes, in OUT/CTChest/64x64x64 and OUT/CTChest/64x64x32.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.loading import require  # noqa: E402
from config.schema.data import PhantomConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, PhantomConfig, None, __doc__)
    require(cfg, "output_dir")
    from dataset.order.data_split import HELD_OUT, TRAINING, VALIDATION
    from dataset.preparation.phantoms import write_phantoms

    counts = {TRAINING: cfg.num_per_class, VALIDATION: cfg.num_validation, HELD_OUT: cfg.num_held_out}
    write_phantoms(Path(cfg.output_dir), counts, cfg.size, cfg.seed, cfg.slabs, cfg.num_workers, show=True)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
