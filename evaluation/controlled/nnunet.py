"""Volumes that follow masks, with these masks, as a raw data set of nnU-Net v2.

Its rules are those of nnU-Net's documentation/dataset_format.md: `DatasetNNN_NAME` with `imagesTr/CASE_0000.nii.gz`,
`labelsTr/CASE.nii.gz` on the same grid, and `dataset.json`, whose labels are 0 (background), 1, 2, … without a gap.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from common.errors import UserError
from common.files import write_atomically
from common.log import get_logger
from dataset.hints import HintReader, MaskHint
from dataset.volumes.index import VOLUME_SUFFIX
from dataset.volumes.volume_io import read_volume, write_volume
from evaluation.controlled.conditions import Condition

ENDINGS = {"imagesTr": f"_0000{VOLUME_SUFFIX}", "labelsTr": VOLUME_SUFFIX}  # of the files in each folder
CHANNEL = "generated"  # no name that nnU-Net has rules for, as CT (Hounsfield units): it takes z-scores
BACKGROUND = "background"

Cases = Mapping[str, tuple[Path, Condition]]  # name -> file of the generated volume, what it was generated for


def plan_nnunet(
    folder: str, hints: Sequence[HintReader], jobs: Sequence[tuple[Path, Condition]], output_dir: str
) -> Cases:
    """The cases by name: their volumes' paths below the output folder, with _ for /.

    Raises:
        UserError: a folder that nnU-Net would not take, or with cases that are not among these; hints without one mask.
    """
    if not re.fullmatch(r"Dataset\d{3}_\w[\w-]*", Path(folder).name):
        raise UserError(f"nnunet: {folder}: nnU-Net takes folders called DatasetNNN_NAME, as Dataset501_Lungs")
    masks = [hint for hint in hints if isinstance(hint, MaskHint)]
    if len(masks) != 1:
        raise UserError(
            f"nnunet: one mask is needed, the ControlNet's hints ({', '.join(hint.name for hint in hints)}) have "
            f"{len(masks)}: leave nnunet out"
        )
    if BACKGROUND in dict(masks[0].labels):
        raise UserError(f"nnunet: hint {masks[0].name} has a label called {BACKGROUND}, nnU-Net's name of 0: rename it")
    cases: dict[str, tuple[Path, Condition]] = {}
    for path, condition in jobs:
        name = "_".join(path.relative_to(output_dir).parts).removesuffix(VOLUME_SUFFIX)
        if name in cases:
            raise UserError(f"nnunet: {path} and {cases[name][0]} would both be case {name}: rename a condition")
        cases[name] = path, condition
    for part, ending in ENDINGS.items():
        names = {f"{name}{ending}" for name in cases}
        if strange := [path for path in sorted((Path(folder) / part).glob("*")) if path.name not in names]:
            raise UserError(f"nnunet: {strange[0]}: not of this run: name another folder, or remove this one")
    return cases


def write_nnunet(folder: str, hints: Sequence[HintReader], cases: Cases) -> None:
    """Write the data set. Labels that aren't 1, 2, 3, … become so, in their order; dataset.json says what they were."""
    hint = next(hint for hint in hints if isinstance(hint, MaskHint))
    output, numbers = Path(folder), {value: number for number, value in enumerate(hint.values, start=1)}
    for name, (volume, condition) in cases.items():
        image, mask = (output / part / f"{name}{ending}" for part, ending in ENDINGS.items())
        write_atomically(image, volume.read_bytes())
        given = read_volume(condition.hints[hint.name]).data.round()
        labels = torch.zeros_like(given)
        for value, number in numbers.items():
            labels[given == value] = number
        write_volume(mask, labels, condition.header.affine)
    content = {
        "channel_names": {"0": CHANNEL},
        "labels": {BACKGROUND: 0} | {name: numbers[value] for name, value in hint.labels},
        "numTraining": len(cases),
        "file_ending": VOLUME_SUFFIX,
    }
    if any(value != number for value, number in numbers.items()):
        content["labels_of_the_masks"] = dict(hint.labels)
        changed = ", ".join(f"{name} {value} -> {numbers[value]}" for name, value in hint.labels)
        get_logger().info("nnunet: labels without gaps are needed, so they are changed: %s", changed)
    write_atomically(output / "dataset.json", (json.dumps(content, indent=2) + "\n").encode())
    get_logger().info("nnunet: %d cases in %s", len(cases), output)
