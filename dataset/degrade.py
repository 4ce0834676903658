"""Makes condition volumes from prepared ones: what a scanner with fewer measurements gives, and the measurements.

    python dataset/degrade.py --operator ct --views 16 --data-path prepared/Singleres_dataset.json --output-dir ct16

| operator | what it is |
|---|---|
| ct | parallel beams, few views or a limited arc, photon noise; filtered back-projection |
| mri | undersampled k-space of each axial slice, single coil; zero-filled |
| thick | thick slices along an axis, linearly interpolated |
| inpaint | a box is missing |
| contrast | no operator: the volume of `others` of the same study, on the grid of each volume |

Writes OUT/CLASS/NAME.nii.gz (the condition, in [-1, 1]), NAME.npz (what was measured), NAME.json (operator, parameters,
seed), and OUT/volumes.json (to be encoded), OUT/latents.json (for train_ControlNet.py) and OUT/conditions.json (for
evaluation/controlled_generation.py), whose hint is called as the operator. What is there already stays.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.loading import require  # noqa: E402
from config.schema.data import DegradeConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, DegradeConfig, None, __doc__)
    from dataset.degradation.degrading import degrade

    require(cfg, "data_path", "output_dir", "operator")
    degrade(cfg)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
