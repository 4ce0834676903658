"""Of whom the files of several sets are: by the split of their data set, else by a pattern."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.places import is_file, is_folder
from dataset.order.data_split import HELD_OUT, SPLIT_NAME, TRAINING, DataSplit, dataset_of, split_of
from dataset.order.split import find_subject
from dataset.volumes.index import is_size_folder, read_dataset_folders

# What names of subjects look like where nothing tells them: those of BIDS, and a folder for each.
BIDS_NAME, FOLDER_NAME = r"sub-[A-Za-z0-9]+", r"^[^/]+(?=/)"

OTHER_PATTERN = "leave it out, or draw the split anew (dataset/split.py --anew)"


@dataclass(frozen=True)
class Shared:
    """Files that have a name in common which may be that of a subject.

    pattern: finds the names in `num_files` files; num_names: different ones; example: two files with the same one, of
    two sets where there are such.
    """

    pattern: str
    num_files: int
    num_names: int
    example: tuple[Path, Path]


@dataclass(frozen=True)
class Subjects:
    """option -> file -> its subject; a file that is not listed is of a subject of its own.

    shared: what makes it likely that files without a pattern are several scans of a subject.
    """

    of: Mapping[str, Mapping[Path, str]]
    shared: Shared | None


def find_subjects(sets: Mapping[str, tuple[str, Sequence[Path]]], pattern: str | None) -> Subjects:
    """The subjects of the files of some sets, none of which is in two of them.

    A file of a data set with a split has the subject that it has there, whatever it is given by. Of others the pattern
    finds it in the path below the folder that is given; without one every file is a subject of its own, but for the
    sizes of one scan (CLASS/SIZE).

    sets: option -> (folder, dataset JSON or JSON:SIDE, its files). pattern: as `split_dataset` takes it.
    UserError: the pattern isn't that of a split, or not found in a file; a subject is in two sets.
    """
    splits = {option: split_of(text) for option, (text, _) in sets.items()}
    known = _folders_of_splits(splits.values())
    find = None if pattern is None else find_subject(pattern)
    found: dict[str, dict[Path, str]] = {}
    untold: dict[str, dict[Path, str]] = {}  # option -> file -> below its folder
    for option, (text, files) in sets.items():
        folders, found[option], untold[option] = _folders_of(text), {}, {}
        own = None if is_folder(text) else splits[option]  # what lies near a folder can be another data set's
        for path in files:
            place = path.resolve()
            folder = next((parent for parent in place.parents if parent in known), None)
            split = known.get(folder, own)
            if folder is None:
                place, folder = path, next((f for f in folders if path.is_relative_to(f)), path.parent)
            below = place.relative_to(folder).as_posix()
            if split is not None:
                split.check_pattern(pattern, "subject_pattern", OTHER_PATTERN)
                subject, is_told = split.subject_of(place, folder), split.shares.subject_pattern is not None
            else:
                subject, is_told = (_other_sizes(path), False) if find is None else (find(path, below), True)
            if subject is not None:
                found[option][path] = subject
            if not is_told:
                untold[option][path] = below
    _check_no_subject_twice(found, next((split.path for split in splits.values() if split), Path(SPLIT_NAME)))
    return Subjects(found, _shared_names(untold))


def _folders_of_splits(splits: Iterable[DataSplit | None]) -> dict[Path, DataSplit]:
    """The folders of the data sets that splits were drawn for."""
    known = {}
    for split in splits:
        if split is not None and is_file(json_file := split.path.with_name(split.dataset)):
            folders = read_dataset_folders(json_file).values()
            known |= {folder.resolve(): split for of_name in folders for folder in of_name}
    return known


def _folders_of(text: str) -> list[Path]:
    path = dataset_of(text)
    return [path] if is_folder(path) else [f for folders in read_dataset_folders(path).values() for f in folders]


def _other_sizes(path: Path) -> str | None:
    """What the sizes of a scan have in common, CLASS/NAME of CLASS/SIZE/NAME; None where there are no sizes."""
    parts = path.resolve().parts
    common = [part for part in parts[:-1] if not is_size_folder(part)]
    return "/".join([*common, parts[-1]]) if len(common) < len(parts) - 1 else None


def _shared_names(sets: Mapping[str, Mapping[Path, str]]) -> Shared | None:
    """sets: option -> file -> below its folder."""
    files = [(option, path, below) for option, of_set in sets.items() for path, below in of_set.items()]
    for pattern in (BIDS_NAME, FOLDER_NAME):
        places: dict[str, list[tuple[str, Path]]] = {}
        for option, path, below in files:
            if (match := re.search(pattern, below)) and not is_size_folder(match[0]):
                places.setdefault(match[0], []).append((option, path))
        num_files = sum(map(len, places.values()))
        if pattern == FOLDER_NAME and (num_files < len(files) or len(places) < 2):
            continue  # one folder for all files says nothing
        repeated = [of_name for of_name in places.values() if len(of_name) > 1]
        if repeated:
            (_, first), *others = max(repeated, key=lambda of_name: len({option for option, _ in of_name}))
            return Shared(pattern, num_files, len(places), (first, others[-1][1]))
    return None


def _check_no_subject_twice(found: Mapping[str, Mapping[Path, str]], split: Path) -> None:
    """split: named as what gives sets without common subjects."""
    subjects: dict[str, tuple[str, Path]] = {}
    for option, of_set in found.items():
        own: dict[str, tuple[str, Path]] = {}
        for path, subject in of_set.items():
            own.setdefault(subject, (option, path))
            if subject in subjects:
                other, first = subjects[subject]
                raise UserError(
                    f"{option}: {path} is of subject {subject}, as {first} of {other} is: give sets without common "
                    f"subjects, as {split}:{HELD_OUT} and {split}:{TRAINING} are (dataset/split.py), or another "
                    "subject_pattern if these are two subjects"
                )
        subjects |= own
