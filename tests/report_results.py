"""Made-up results of all three kinds, with names that are no markup, for the tests of the report."""

import json
import math
import re
from pathlib import Path

import numpy as np

from dataset.volumes.pictures import save_slice_grid
from evaluation.results.results import Curves, Figure, Floor, Picture, Results, Series, TextTable


def shown_in(folder: Path) -> list[dict]:
    """What can be chosen in a folder's view.html."""
    text = (folder / "view.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="entries">(.*?)</script>', text)[1])


EVIL = "<b>$x</b> & \"quoted\" 'class'"

STAGES = ("stage <i>1", "results/PatchVolume_8x_s2/checkpoints/a_long_name_of_a_checkpoint.ckpt")
RECONSTRUCTION = [
    Figure(group, metric, value, interval, {"real": 100}, better, unit, model=model)
    for group in ("CTChest", EVIL)
    for metric, value, interval, better, unit in (
        ("PSNR", 31.2043, (30.5, 31.9), "higher", "dB"),
        ("SSIM", 0.93127, None, "higher", ""),
        ("MAE", math.nan, (math.nan, 3.0), "lower", "HU"),
    )
    for model in STAGES
]
GENERATION = [
    Figure("CTChest", "FID", 12.345, (11, 14.5), {"real": 100, "generated": 200}, "lower", network="InceptionV3"),
    Figure(
        *("CTChest", "FID", 14.25, (11, 14.5), {"real": 100, "generated": 200}, "lower", "", "random 3D CNN", ""),
        Floor(3.5, 15.75, 50),
    ),
    Figure("CTChest", "MS-SSIM", 0.000012345, None, {"real": 100}, "real", std=0.25),
]


def write_all(folder: Path) -> None:
    """All three parts, two pictures."""
    save_slice_grid(folder / "pictures" / "a.png", [("row", [np.eye(32)] * 3)])
    save_slice_grid(folder / "pictures" / "wide.png", [("row", [np.eye(32)] * 9)])
    Results(
        "reconstruction",
        {"device": "a device", "data": {"json": EVIL, "spacing_mm": [1.0, 2.0]}, "nothing": None},
        {"PSNR": f"Peak signal {EVIL}."},
        RECONSTRUCTION,
        [f"A warning {EVIL}"],
        [{"file": f"a/{EVIL}.nii.gz", "reason": "not finite"}],
        [Picture("pictures/a.png", f"Slices {EVIL}"), Picture("pictures/wide.png", "Wide")],
        [
            Curves(f"PSNR {EVIL}", "slice", "dB", [Series(EVIL, [0, 1, 2], [1, 2, 3], [0, 1, 2], [2, 3, 4])]),
            Curves("Spectrum", "1/mm", "power", [Series("real", [0, 1, 2, 3], [5, math.nan, 4, 3])]),
        ],
    ).write(folder)
    table = TextTable(f"Nearest {EVIL}", ["volume", "correlation", "rank"], [[EVIL, 0.812345, 1], ["b", math.nan, 2]])
    Results("generation", {}, {}, GENERATION, ["Few volumes"], tables=[table]).write(folder)
    Results("validity", {}, {}, [Figure("", "FID", 1234.56, None, {"real": 8}, "lower")]).write(folder)
