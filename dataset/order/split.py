"""The split of a data set into training and validation files, by subject, and its record in a run folder."""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError
from common.files import write_atomically
from common.places import is_file
from dataset.volumes.index import is_size_folder, list_volumes, read_dataset_folders

RECORD_NAME = "split.json"  # in a run folder
BY_DATA_SPLIT = "by_data_split"  # in the record of a run that keeps to the split of its data set


@dataclass(frozen=True)
class Split:
    """Both sides of a split: name of the dataset JSON -> its files, sorted.

    source: the split of the data set that they are by; None: drawn for the run.
    """

    training: dict[str, list[Path]]
    validation: dict[str, list[Path]]
    source: Path | None = None


@dataclass(frozen=True)
class SplitFile:
    """A file as the split sees it."""

    name: str  # of the dataset JSON
    path: Path
    subject: Any  # files of one subject are never parted
    order: str  # its hash with the seed decides; subjects of different classes may have the same


def split_dataset(root_dir: str | Path, fraction: float, seed: int, subject_pattern: str | None = None) -> Split:
    """Splits all names of a dataset JSON at once; the same for every rank, run and machine.

    A subject is on one side only, in all names. As near as that allows, each name gives the share `fraction` of its
    files to validation, and one of two or more subjects at least one to each side.

    Arguments:
        fraction: share for validation, 0 <= fraction < 1; 0 leaves validation empty.
        seed: with the subjects it decides the choice; where the folders lie does not matter.
        subject_pattern: regular expression, searched in a file's path below its class folder ("/" between folders). The
            subject is its first group, or the whole match if it has none. None: every file is a subject, and the same
            path in the folders of a class's sizes is the same one.

    Raises:
        UserError: a share or pattern that does not fit, a file in which the pattern is not found, or as
            `read_dataset_folders`.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"dataset.val_fraction is {fraction}: a share from 0 to less than 1 is needed")
    subject_of = find_subject(subject_pattern) if subject_pattern is not None else None
    files = []
    for name, folders in read_dataset_folders(root_dir).items():
        below = files_below(folders)
        if subject_of is None:
            is_sized = all(is_size_folder(folder.name) for folder in folders)  # one source has a file in each size
            orders = below if is_sized else _below_common(sorted(below))
            files += [SplitFile(name, p, (name, orders[p] if is_sized else p), orders[p]) for p in sorted(below)]
        else:
            subjects = [(path, subject_of(path, below[path])) for path in sorted(below)]
            files += [SplitFile(name, path, subject, subject) for path, subject in subjects]
    held_out = choose_subjects(files, fraction, seed) if fraction > 0 else set()
    names = list(dict.fromkeys(file.name for file in files))
    sides = [
        {name: [f.path for f in files if f.name == name and (f.subject in held_out) == side] for name in names}
        for side in (False, True)
    ]
    return Split(*sides)


def spread_evenly(files: Mapping[str, Sequence[Path]], count: int, seed: int) -> list[Path]:
    """`count` of the files of all names, in their order, or all where there are no more.

    Each name gives one in turn, as long as it has any, in an order of seed and file names: the same files for every
    rank, run and machine.
    """

    def draw(path: Path) -> bytes:
        return hashlib.sha256(f"{seed}/{path.name}".encode(errors="surrogateescape")).digest()

    turns = zip_longest(*(sorted(paths, key=draw) for paths in files.values()))
    chosen = set(islice(dict.fromkeys(path for turn in turns for path in turn if path is not None), count))
    return list(dict.fromkeys(path for paths in files.values() for path in paths if path in chosen))


def files_below(folders: Sequence[Path]) -> dict[Path, str]:
    """All volumes of some class folders, each with its path below its folder, "/" between folders."""
    return {path: path.relative_to(folder).as_posix() for folder in folders for path in list_volumes(folder)}


def find_subject(pattern: str, option: str = "subject_pattern", what: str = "subject") -> Callable[[Path, str], str]:
    """A function (path, path below the class folder) -> subject. UserError: see `split_dataset`."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option} {pattern!r}: not a regular expression ({error})") from error

    def find(path: Path, below: str) -> str:
        match = compiled.search(below)
        subject = match and match[1 if compiled.groups else 0]
        if not subject:
            raise UserError(
                f"{path}: {option} {pattern!r} finds no {what} in {below!r}: "
                "give a pattern that fits every file, or rename the file"
            )
        return subject

    return find


def _below_common(paths: Sequence[Path]) -> dict[Path, str]:
    """Each path below the deepest folder that all lie in."""
    places = list(paths)
    if len({path.is_absolute() for path in paths}) > 1:
        places = [Path(os.path.abspath(path)) for path in paths]
    common = Path(os.path.commonpath([place.parent for place in places]))
    return {path: place.relative_to(common).as_posix() for path, place in zip(paths, places, strict=True)}


def choose_subjects(
    files: Sequence[SplitFile], fraction: float, seed: int, chosen: Collection[Any] = (), others: Collection[Any] = ()
) -> set[Any]:
    """The subjects of the smaller side of a split in two.

    In the order of their hashes, those are taken that bring the numbers of files nearer to the share; then, for each
    name that got none, the one that takes them least away from it.

    chosen, others: subjects whose side is known already.
    """
    sides = _Sides(files, fraction, set(others))
    orders = {file.subject: file.order for file in files}

    def draw(subject: Any) -> bytes:
        return hashlib.sha256(f"{seed}/{orders[subject]}".encode(errors="surrogateescape")).digest()

    subjects = sorted(orders, key=draw)
    for subject in subjects:
        if subject in chosen:
            sides.hold_out(subject)
    for subject in subjects:
        if sides.is_free(subject) and sides.cost(subject) < 0:
            sides.hold_out(subject)
    for name in sides.missing:
        if not any(name in sides.counts[subject] for subject in sides.held_out):
            candidates = [s for s in subjects if name in sides.counts[s] and sides.is_free(s)]
            if candidates:
                sides.hold_out(min(candidates, key=sides.cost))
    return sides.held_out


class _Sides:
    """Which subjects are held out, and how far each name is from its share.

    counts: subject -> name -> its files. missing: name -> files still to be held out, negative where there are too
    many. in_training: name -> subjects on the training side.
    """

    def __init__(self, files: Sequence[SplitFile], fraction: float, others: set[Any]) -> None:
        self.held_out: set[Any] = set()
        self.others = others
        self.counts: dict[Any, Counter] = defaultdict(Counter)
        for file in files:
            self.counts[file.subject][file.name] += 1
        self.in_training = Counter(name for by_name in self.counts.values() for name in by_name)
        totals = Counter(file.name for file in files)
        self.missing = {name: min(n - 1, max(1, round(fraction * n))) for name, n in totals.items()}

    def cost(self, subject: Any) -> int:
        """By how many files holding it out takes the names away from their shares; negative: brings them nearer."""
        changes = self.counts[subject].items()
        return sum(abs(self.missing[name] - count) - abs(self.missing[name]) for name, count in changes)

    def is_free(self, subject: Any) -> bool:
        """Whether it can be held out: no name may lose its last training subject."""
        is_open = subject not in self.held_out and subject not in self.others
        return is_open and all(self.in_training[name] > 1 for name in self.counts[subject])

    def hold_out(self, subject: Any) -> None:
        self.held_out.add(subject)
        for name, count in self.counts[subject].items():
            self.missing[name] -= count
            self.in_training[name] -= 1


# Record


def keep_split(
    folder: str | Path, root_dir: str | Path, split: Split, options: Mapping[str, Any], is_resumed: bool
) -> None:
    """Writes the split into a run folder as `split.json`, or compares it with the one that the run began with.

    options: what the split was made with, for the record. is_resumed: whether the run has checkpoints; without any, its
    record is replaced. To be called on rank 0.
    Raises UserError for a resumed run whose files or sides are others now.
    """
    path = Path(folder) / RECORD_NAME
    by = {} if split.source is None else {BY_DATA_SPLIT: True}
    record = {**options, **by, "files": _named_files(root_dir, split)}
    if is_resumed and is_file(path):
        _check_same(path, root_dir, record["files"])
    else:
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
        _sides(record["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read as the record of a split ({error}): remove it to go on with the split of now"
        ) from error
    return record


def is_run_record(path: Path) -> bool:
    """Whether a `split.json` is the record of a run, not the split of a data set."""
    try:
        return "files" in read_json(path)
    except (OSError, ValueError, TypeError):
        return False


def began_by_itself(folder: str | Path) -> bool:
    """Whether a run with checkpoints in this folder drew its split itself, as all did before there was one for all."""
    path = Path(folder) / RECORD_NAME
    if not is_file(path) or not any((Path(folder) / "checkpoints").glob("*.ckpt")):
        return False
    return _read_record(path).get(BY_DATA_SPLIT) is not True


def _named_files(root_dir: str | Path, split: Split) -> dict[str, dict[str, list[str]]]:
    """Name -> side -> files below the class folder, or below what several class folders have in common."""
    files = {}
    for name, folders in read_dataset_folders(root_dir).items():
        common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
        sides = {"training": split.training[name], "validation": split.validation[name]}
        files[name] = {
            side: sorted(Path(os.path.abspath(path)).relative_to(common).as_posix() for path in paths)
            for side, paths in sides.items()
        }
    return files


def _check_same(path: Path, root_dir: str | Path, files: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
    before, now = _sides(_read_record(path)["files"]), _sides(files)
    changes = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "moved to the other side": sorted(file for file in now.keys() & before.keys() if now[file] != before[file]),
    }
    found = [f"{len(named)} {what} (e.g. {'/'.join(named[0])})" for what, named in changes.items() if named]
    if found:
        raise UserError(
            f"{path}: the run began with another split of {root_dir}, files are now: {', '.join(found)}; "
            "give the data as it was, or start anew in another model.default_root_dir"
        )


def _sides(files: Mapping[str, Mapping[str, Iterable[str]]]) -> dict[tuple[str, str], str]:
    return {(name, file): side for name, sides in files.items() for side, named in sides.items() for file in named}
