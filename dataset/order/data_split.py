"""`split.json` beside the dataset JSONs: on which side each subject is, for every stage from training to evaluation.

    subject_pattern, validation, held_out, seed   what it was drawn with
    dataset        name of the dataset JSON whose files it was drawn for
    files_sha256   of the names of these files
    subjects       subject -> training | validation | held_out

A subject stays where it is: files that come later go to the side of their subject, and new subjects are drawn beside
the old ones. Latents carry a copy in their folder.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import UserError
from common.files import write_atomically
from dataset.order.split import Split, SplitFile, choose_subjects, find_subject, split_dataset
from dataset.volumes.index import LATENT_SUFFIX, VOLUME_SUFFIX, is_size_folder, list_volumes, read_dataset_folders

SPLIT_NAME = "split.json"
TRAINING, VALIDATION, HELD_OUT = SIDES = ("training", "validation", "held_out")
KEYS = {"subject_pattern", "validation", "held_out", "seed", "dataset", "files_sha256", "subjects"}
NO_SPLIT = "none"
DEFAULTS = {"subject_pattern": None, "validation": 0.1, "held_out": 0.1, "seed": 0}


@dataclass(frozen=True)
class Shares:
    """What a split is drawn with. subject_pattern: see `split_dataset`; None: every file is a subject."""

    subject_pattern: str | None
    validation: float
    held_out: float
    seed: int


@dataclass(frozen=True)
class DataSplit:
    """The sides of a data set's subjects. path: of its `split.json`; dataset: of the dataset JSON it was drawn for."""

    path: Path
    shares: Shares
    dataset: str
    files_sha256: str
    subjects: Mapping[str, str]

    def side_of(self, path: Path, folder: Path) -> str:
        """Of a volume or latent below its folder in a dataset JSON. UserError: its subject has no side yet."""
        subject = self.subject_of(path, folder)
        if subject not in self.subjects:
            raise UserError(
                f"{path}: its subject {subject} is not in {self.path}: give it a side, which leaves all others where "
                f"they are, by python dataset/split.py {self.path.with_name(self.dataset)}"
            )
        return self.subjects[subject]

    def subject_of(self, path: Path, folder: Path) -> str:
        """As `subjects` has it. UserError: the pattern is not found."""
        return self._subject_of(path, folder)

    @cached_property
    def _subject_of(self) -> Callable[[Path, Path], str]:
        return subject_finder(self.shares.subject_pattern)

    def select(self, folder: Path, side: str) -> list[Path]:
        """The files below a folder of a dataset JSON that are on a side, sorted."""
        return [path for path in list_volumes(folder) if self.side_of(path, folder) == side]

    def split(self, root_dir: str | Path) -> Split:
        """Training and validation files of a dataset JSON, by name; those held out are on neither side."""
        folders = read_dataset_folders(root_dir)
        return Split(
            *(
                {name: sorted({path for one in of for path in self.select(one, side)}) for name, of in folders.items()}
                for side in (TRAINING, VALIDATION)
            ),
            self.path,
        )

    def write(self, folder: Path) -> None:
        record = {**vars(self.shares), "dataset": self.dataset, "files_sha256": self.files_sha256}
        record["subjects"] = dict(sorted(self.subjects.items()))
        write_atomically(folder / SPLIT_NAME, (json.dumps(record, indent=1) + "\n").encode())


def subject_finder(pattern: str | None) -> Callable[[Path, Path], str]:
    """A function (file, its folder in a dataset JSON) -> subject, the same for a volume, its other sizes and latents.

    Without a pattern it is the name of the class folder with the file's path below it.
    """
    find = None if pattern is None else find_subject(pattern)

    def subject_of(path: Path, folder: Path) -> str:
        below = path.relative_to(folder).as_posix()
        if find is not None:
            return find(path, below)
        place = folder.absolute()
        name = place.name.removesuffix(LATENT_SUFFIX)
        return f"{place.parent.name if is_size_folder(name) else name}/{below.removesuffix(VOLUME_SUFFIX)}"

    return subject_of


# Finding and reading


def find_split(root_dir: str | Path, wanted: str | None = None) -> DataSplit | None:
    """The split that the files of a dataset JSON have.

    Arguments:
        wanted: a `split.json`; "none": without one; None: that beside the JSON, else the copies in all its folders.

    UserError: a file that is no split, folders with copies of different splits, or some without.
    """
    if wanted is not None:
        return None if wanted == NO_SPLIT else read_split(wanted)
    beside = Path(root_dir).parent / SPLIT_NAME
    if beside.is_file():
        return read_split(beside)
    folders = [folder for folders in read_dataset_folders(root_dir).values() for folder in folders]
    return _common_split(folders, root_dir)


def _common_split(folders: Sequence[Path], root_dir: str | Path) -> DataSplit | None:
    copies = {folder: folder / SPLIT_NAME for folder in folders}
    found = [path for path in copies.values() if path.is_file()]
    if not found:
        return None
    splits = [read_split(path) for path in found]
    if len(found) < len(folders) or any(split.subjects != splits[0].subjects for split in splits):
        odd = next((path for path in copies.values() if path not in found), found[-1])
        raise UserError(
            f"{odd}: the folders of {root_dir} don't have the same split as {found[0]}: encode again, which brings it "
            f"up to date, or give the split to take, e.g. split={found[0]}"
        )
    return splits[0]


def read_split(path: str | Path) -> DataSplit:
    """UserError: no such file, or none of this form."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not record.keys() >= KEYS:
            raise ValueError("it has no " + ", ".join(sorted(KEYS - set(record))))
        if strange := set(record["subjects"].values()) - set(SIDES):
            raise ValueError(f"a side {strange.pop()!r}, expected {', '.join(SIDES)}")
        shares = Shares(*(record[key] for key in ("subject_pattern", "validation", "held_out", "seed")))
        return DataSplit(path, shares, record["dataset"], record["files_sha256"], record["subjects"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: make it with dataset/split.py") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as the split of a data set ({error}): make it anew") from error


# One side


def parse_side(text: str) -> tuple[str, str | None]:
    """("data/split.json", "held_out") of "data/split.json:held_out"; (text, None) where no side is said."""
    path, _, side = text.rpartition(":")
    return (path, side) if side in SIDES else (text, None)


def files_of_side(json_file: str | Path, side: str) -> dict[str, list[Path]]:
    """Name -> files on a side, of a dataset JSON with a split, or of the one that a `split.json` was drawn for.

    Names without any are left out. UserError: there is no split, or nothing on that side.
    """
    path = Path(json_file)
    if path.name == SPLIT_NAME:
        split = read_split(path)
        path = path.with_name(split.dataset)
    elif (split := find_split(path)) is None:
        raise UserError(
            f"{path}: has no {SPLIT_NAME} beside it, so that {side} is nothing: python dataset/split.py {path}"
        )
    found = {
        name: sorted({file for folder in folders for file in split.select(folder, side)})
        for name, folders in read_dataset_folders(path).items()
    }
    if not any(found.values()):
        raise UserError(f"{split.path}: no subject is on the side {side}")
    return {name: files for name, files in found.items() if files}


def check_no_subject_twice(sets: Mapping[str, tuple[str, Iterable[Path]]]) -> None:
    """UserError: a subject is in two sets, as far as there is a split that tells subjects.

    sets: option -> (folder, dataset JSON or JSON:SIDE, its files).
    """
    subjects: dict[str, tuple[str, Path]] = {}
    for option, (text, files) in sets.items():
        split = _split_of(Path(parse_side(text)[0]))
        own = {}
        for path, subject in _subjects(split, files) if split else ():
            if subject in subjects:
                other, first = subjects[subject]
                raise UserError(
                    f"{option}: {path} is of subject {subject}, as {first} of {other} is: give sets without common "
                    f"subjects, e.g. {split.path}:{HELD_OUT} and {split.path}:{TRAINING}"
                )
            own[subject] = (option, path)
        subjects |= own


def _split_of(path: Path) -> DataSplit | None:
    """That of a `split.json`, of a dataset JSON, or of the data set that a folder belongs to."""
    if path.name == SPLIT_NAME:
        return read_split(path)
    if path.is_file():
        return find_split(path)
    place = path.absolute()  # CLASS/SIZE, CLASS, or the folder of the JSONs
    beside = next((p / SPLIT_NAME for p in (place, *place.parents[:2]) if (p / SPLIT_NAME).is_file()), None)
    return read_split(beside) if beside else None


def _subjects(split: DataSplit, files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """The files that the split's data set knows, each with its subject."""
    json_file = split.path.with_name(split.dataset)
    if json_file.is_file():
        named = {folder.absolute() for folders in read_dataset_folders(json_file).values() for folder in folders}
        for path in files:
            folder = next((parent for parent in path.absolute().parents if parent in named), None)
            if folder is not None:
                yield path, split.subject_of(path.absolute(), folder)


# Drawing


def draw_split(root_dir: str | Path, shares: Shares, before: DataSplit | None = None) -> DataSplit:
    """Draws a side for each subject in the files of a dataset JSON; those in `before` keep theirs.

    First the share that is held out, then that of validation, each as `split_dataset` does: of every name at least one
    subject, and never its last one in training.

    UserError: shares that leave nothing to train on, a file without subject.
    """
    if not 0 <= shares.validation + shares.held_out < 1 or min(shares.validation, shares.held_out) < 0:
        raise UserError(
            f"validation {shares.validation:g} and held-out {shares.held_out:g}: shares from 0 on are needed that "
            "leave something to train on"
        )
    subject_of = subject_finder(shares.subject_pattern)
    files = []
    for name, folders in read_dataset_folders(root_dir).items():
        for folder in folders:
            for path in list_volumes(folder):
                subject = subject_of(path, folder)
                files.append(SplitFile(name, path, subject, subject))
    known = dict(before.subjects) if before else {}
    sides = {file.subject: known.get(file.subject) for file in files}
    for side in (HELD_OUT, VALIDATION):
        share = getattr(shares, side)
        # A share of what is left once the larger side has gone.
        left = [file for file in files if side == HELD_OUT or sides[file.subject] != HELD_OUT]
        fraction = share if side == HELD_OUT else share / (1 - shares.held_out)
        chosen = {subject for subject, of in sides.items() if of == side}
        others = {subject for subject, of in sides.items() if of not in (None, side)}
        if fraction > 0:
            chosen = choose_subjects(left, fraction, shares.seed, chosen, others)
        sides |= dict.fromkeys(chosen, side)
    subjects = known | {subject: side or TRAINING for subject, side in sides.items()}
    return _split_for(root_dir, shares, [file.path for file in files], subjects)


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


def sides_of(
    root_dir: str | Path, wanted: str | None, val_fraction: float, split_seed: int, subject_pattern: str | None
) -> Split:
    """Training and validation files of a dataset JSON: by its split (`find_split`), else by `split_dataset`.

    UserError: as both, and a pattern that is not the split's.
    """
    split = find_split(root_dir, wanted)
    if split is None:
        return split_dataset(root_dir, val_fraction, split_seed, subject_pattern)
    if subject_pattern is not None and subject_pattern != split.shares.subject_pattern:
        raise UserError(
            f"dataset.subject_pattern is {subject_pattern!r}, {split.path} was drawn with "
            f"{split.shares.subject_pattern!r}: leave it out, draw the split anew (dataset/split.py --anew), or go "
            "without it (dataset.split=none)"
        )
    return split.split(root_dir)


def agreed_shares(root_dir: str | Path, wanted: Mapping[str, Any], anew: bool = False) -> Shares:
    """What the split beside a dataset JSON has, or is to be drawn with.

    wanted: the fields of `Shares` that are asked for; None: what the split has, else the default.

    UserError: the split was drawn with other values, and `anew` is not said.
    """
    path = Path(root_dir).with_name(SPLIT_NAME)
    asked = {key: value for key, value in wanted.items() if value is not None}
    shares = read_split(path).shares if path.is_file() else Shares(**DEFAULTS)
    if anew or not path.is_file():
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
    before = read_split(path) if path.is_file() and not anew else None
    split = draw_split(root_dir, agreed_shares(root_dir, wanted, anew), before)
    split.write(path.parent)
    return split


def show_split(split: DataSplit, root_dir: str | Path) -> None:
    """Prints how many subjects and volumes of each name of a dataset JSON are on each side."""
    console = Console(stderr=True)
    pattern = split.shares.subject_pattern
    console.print(
        f"{split.path}: {'every file is a subject' if pattern is None else f'subjects by {pattern}'}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table("name", *(f"{side.replace('_', ' ')}: subjects, volumes" for side in SIDES))
    for name, folders in read_dataset_folders(root_dir).items():
        found = [(split.subject_of(p, f), split.side_of(p, f)) for f in folders for p in list_volumes(f)]
        files, subjects = Counter(side for _, side in found), Counter(side for _, side in set(found))
        table.add_row(Text(name), *(f"{subjects[side]}, {files[side]}" for side in SIDES))
    console.print(table)
