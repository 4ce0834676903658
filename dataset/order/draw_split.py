"""Drawing the split of a data set: who trains, who validates, who is held out (`dataset/order/data_split.py`)."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import UserError
from common.places import is_file
from common.text import printable
from dataset.order.data_split import (
    HELD_OUT,
    SIDES,
    SPLIT_NAME,
    TRAINING,
    VALIDATION,
    DataSplit,
    Shares,
    read_split,
    subject_finder,
)
from dataset.order.split import SplitFile, choose_subjects
from dataset.volumes.index import list_volumes, read_dataset_folders

DEFAULTS = Shares(None, validation=0.1, held_out=0.1, seed=0)


def draw_split(root_dir: str | Path, shares: Shares, before: DataSplit | None = None) -> DataSplit:
    """Draws a side for each subject in the files of a dataset JSON; those in `before` keep theirs.

    First the share that is held out, then that of validation, each as `split_dataset` does: of every name at least one
    subject, and never its last one in training.

    UserError: shares that leave nothing to train on, a file without subject.
    """
    files = subjects_of(root_dir, shares)
    known = dict(before.subjects) if before else {}
    sides = {file.subject: known.get(file.subject) for file in files}
    for side in (HELD_OUT, VALIDATION):
        # Between this side and training alone, so that no name loses its last training subject.
        left = [file for file in files if sides[file.subject] in (None, TRAINING, side)]
        chosen = {subject for subject, of in sides.items() if of == side}
        fraction = getattr(shares, side) * len(files) / max(1, len(left))
        if 0 < fraction < 1:
            others = {subject for subject, of in sides.items() if of == TRAINING}
            chosen = choose_subjects(left, fraction, shares.seed, chosen, others)
        sides |= dict.fromkeys(chosen, side)
    subjects = known | {subject: side or TRAINING for subject, side in sides.items()}
    split = _split_for(root_dir, shares, [file.path for file in files], subjects)
    return replace(split, dataset=before.dataset) if before else split


def check_shares(shares: Shares) -> None:
    """UserError: shares that leave nothing to train on."""
    if not 0 <= shares.validation + shares.held_out < 1 or min(shares.validation, shares.held_out) < 0:
        raise UserError(
            f"validation {shares.validation:g} and held-out {shares.held_out:g}: shares from 0 on are needed that "
            "leave something to train on"
        )


def subjects_of(root_dir: str | Path, shares: Shares) -> list[SplitFile]:
    """The files of a dataset JSON with their subjects. UserError: as `draw_split`."""
    check_shares(shares)
    subject_of = subject_finder(shares.subject_pattern)
    files = []
    for name, folders in read_dataset_folders(root_dir).items():
        for folder in folders:
            for path in list_volumes(folder):
                subject = subject_of(path, folder)
                files.append(SplitFile(name, path, subject, subject))
    return files


def given_split(root_dir: str | Path, shares: Shares, sides: Mapping[Path, str]) -> DataSplit:
    """The split of a data set each of whose files has its side by what it is. sides: file below CLASS -> side."""
    subject_of = subject_finder(shares.subject_pattern)
    return _split_for(root_dir, shares, sides, {subject_of(path, path.parent): side for path, side in sides.items()})


def _split_for(root_dir: str | Path, shares: Shares, files: Iterable[Path], subjects: Mapping[str, str]) -> DataSplit:
    path = Path(root_dir)
    place = path.absolute().parent
    names = sorted(os.path.relpath(file.absolute(), place) + "\n" for file in files)
    digest = hashlib.sha256(os.fsencode("".join(names))).hexdigest()
    return DataSplit(path.with_name(SPLIT_NAME), shares, path.name, digest, subjects)


def agreed_shares(root_dir: str | Path, wanted: Mapping[str, Any], anew: bool = False) -> Shares:
    """What the split beside a dataset JSON has, or is to be drawn with.

    wanted: the fields of `Shares` that are asked for; None: what the split has, else the default.

    UserError: the split was drawn with other values, and `anew` is not said.
    """
    path = Path(root_dir).with_name(SPLIT_NAME)
    asked = {key: value for key, value in wanted.items() if value is not None}
    shares = DEFAULTS
    if is_file(path):
        with suppress(UserError) if anew else nullcontext():  # what can't be read is replaced
            shares = read_split(path).shares
    if anew or not is_file(path):
        return replace(shares, **asked)
    for key, value in asked.items():
        if getattr(shares, key) != value:
            raise UserError(
                f"{path}: was drawn with {key} {getattr(shares, key)!r}, not {value!r}: leave it out, or draw anew "
                f"(python dataset/split.py {root_dir} --anew ...), after which models that are there have seen "
                "subjects that are held out then"
            )
    return shares


def keep_or_draw(root_dir: str | Path, wanted: Mapping[str, Any], anew: bool = False) -> DataSplit:
    """The split beside a dataset JSON, with a side for every file; drawn and written as far as it is missing.

    Arguments and UserError as `agreed_shares`.
    """
    path = Path(root_dir).with_name(SPLIT_NAME)
    before = read_split(path) if is_file(path) and not anew else None
    split = draw_split(root_dir, agreed_shares(root_dir, wanted, anew), before)
    split.write(path.parent)
    return split


def show_split(split: DataSplit, root_dir: str | Path) -> None:
    """Prints how many subjects and volumes of each name of a dataset JSON are on each side."""
    console = Console(stderr=True)
    pattern = split.shares.subject_pattern
    console.print(
        printable(f"{split.path}: {'every file is a subject' if pattern is None else f'subjects by {pattern}'}"),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table("name", *(f"{side.replace('_', ' ')}: subjects, volumes" for side in SIDES))
    for name, folders in read_dataset_folders(root_dir).items():
        found = [(split.subject_of(p, f), split.side_of(p, f)) for f in folders for p in list_volumes(f)]
        files, subjects = Counter(side for _, side in found), Counter(side for _, side in set(found))
        table.add_row(Text(printable(name)), *(f"{subjects[side]}, {files[side]}" for side in SIDES))
    console.print(table)
