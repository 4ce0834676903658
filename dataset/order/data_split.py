"""`split.json` beside the dataset JSONs: on which side each subject is, for every stage from training to evaluation.

    subject_pattern, validation, held_out, seed   what it was drawn with
    dataset        name of the dataset JSON whose files it was drawn for
    files_sha256   of the names of these files
    subjects       subject -> training | validation | held_out
    class          in a copy beside latents, the name of their class

A subject stays where it is: files that come later go to the side of their subject, and new subjects are drawn beside
the old ones. Latents carry a copy in their folder.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically
from common.places import is_file
from common.text import shown
from dataset.order.split import Split, find_subject, is_run_record, split_dataset
from dataset.volumes.index import (
    LATENT_SUFFIX,
    VOLUME_SUFFIX,
    class_folder,
    list_volumes,
    read_dataset_folders,
    read_json_object,
)

SPLIT_NAME = "split.json"
TRAINING, VALIDATION, HELD_OUT = SIDES = ("training", "validation", "held_out")
KEYS = {"subject_pattern", "validation", "held_out", "seed", "dataset", "files_sha256", "subjects"}
NO_SPLIT = "none"


@dataclass(frozen=True)
class Shares:
    """What a split is drawn with. subject_pattern: see `split_dataset`; None: every file is a subject."""

    subject_pattern: str | None
    validation: float
    held_out: float
    seed: int


@dataclass(frozen=True)
class DataSplit:
    """The sides of a data set's subjects.

    path: of its `split.json`; dataset: name of the dataset JSON it was drawn for; class_names: of folders of latents,
    by the copies that lie in them, whatever the folders are called now.
    """

    path: Path
    shares: Shares
    dataset: str
    files_sha256: str
    subjects: Mapping[str, str]
    class_names: Mapping[Path, str] = field(default_factory=dict)

    def side_of(self, path: Path, folder: Path) -> str:
        """Of a volume or latent below its folder in a dataset JSON. UserError: its subject has no side yet."""
        subject = self.subject_of(path, folder)
        if subject not in self.subjects:
            raise UserError(
                f"{path}: its subject {subject} is not in {self.path}: give it a side, which leaves all others where "
                "they are (python dataset/split.py with the dataset JSON of its volumes; then encode again)"
            )
        return self.subjects[subject]

    def subject_of(self, path: Path, folder: Path) -> str:
        """As `subjects` has it. UserError: the pattern is not found."""
        return self._subject_of(path, folder, self.class_names.get(folder))

    @cached_property
    def _subject_of(self) -> Callable[..., str]:
        return subject_finder(self.shares.subject_pattern)

    def check_pattern(self, pattern: str | None, option: str, remedy: str) -> None:
        """UserError: an option asks for another pattern. remedy: what can be done."""
        if pattern is not None and pattern != self.shares.subject_pattern:
            raise UserError(
                f"{option} is {pattern!r}, {self.path} was drawn with {self.shares.subject_pattern!r}: {remedy}"
            )

    def select(self, folder: Path, side: str) -> list[Path]:
        """The files below a folder of a dataset JSON that are on a side, sorted."""
        return [path for path in list_volumes(folder) if self.side_of(path, folder) == side]

    def by_side(self, root_dir: str | Path) -> dict[str, dict[str, list[Path]]]:
        """Side -> name -> files of a dataset JSON, sorted. UserError: as `side_of`."""
        found = {
            name: sorted({(path, self.side_of(path, folder)) for folder in folders for path in list_volumes(folder)})
            for name, folders in read_dataset_folders(root_dir).items()
        }
        return {side: {name: [p for p, of in files if of == side] for name, files in found.items()} for side in SIDES}

    def split(self, root_dir: str | Path) -> Split:
        """Training and validation files of a dataset JSON, by name; those held out are on neither side."""
        sides = self.by_side(root_dir)
        return Split(sides[TRAINING], sides[VALIDATION], self.path)

    def write(self, folder: Path, class_name: str | None = None) -> None:
        """Writes it into a folder. class_name: of the class whose latents lie there."""
        record = {**vars(self.shares), "dataset": self.dataset, "files_sha256": self.files_sha256}
        record |= {} if class_name is None else {"class": class_name}
        record["subjects"] = dict(sorted(self.subjects.items()))
        write_atomically(folder / SPLIT_NAME, (json.dumps(record, indent=1) + "\n").encode())


def class_name_of(folder: Path) -> str:
    """The class whose volumes or latents lie in a folder CLASS or CLASS/SIZE, by its name."""
    return class_folder(Path(str(folder.absolute()).removesuffix(LATENT_SUFFIX))).name


def subject_finder(pattern: str | None) -> Callable[..., str]:
    """A function (file, its folder in a dataset JSON) -> subject, the same for a volume, its other sizes and latents.

    Without a pattern it is the name of the class with the file's path below the folder.
    """
    find = None if pattern is None else find_subject(pattern)

    def subject_of(path: Path, folder: Path, class_name: str | None = None) -> str:
        below = path.relative_to(folder).as_posix()
        if find is not None:
            return find(path, below)
        return f"{class_name or class_name_of(folder)}/{below.removesuffix(VOLUME_SUFFIX)}"

    return subject_of


# Finding and reading


def find_split(root_dir: str | Path, wanted: str | None = None) -> DataSplit | None:
    """The split that the files of a dataset JSON have.

    Arguments:
        wanted: a `split.json`; "none": without one; None: that beside the JSON, else that of its folders, which lies in
            them (latents) or above them (volumes of a data set that the JSON names from elsewhere).

    UserError: a file that is no split, folders with different ones, or some without.
    """
    if wanted == NO_SPLIT:
        return None
    beside = Path(root_dir).parent / SPLIT_NAME
    folders = [folder for folders in read_dataset_folders(root_dir).values() for folder in folders]
    if wanted is not None or is_file(beside):
        split = read_split(beside if wanted is None else wanted)
    else:
        split = _common_split(folders, root_dir)
    return None if split is None else replace(split, class_names=_class_names(folders))


def _common_split(folders: Sequence[Path], root_dir: str | Path) -> DataSplit | None:
    places = {folder: place for folder in folders if (place := split_near(folder)) is not None}
    if not places:
        return None
    first, splits = next(iter(places.values())), {place: read_split(place) for place in places.values()}
    odd = next((folder for folder in folders if folder not in places), None)
    odd = odd or next((place for place, split in splits.items() if split.subjects != splits[first].subjects), None)
    if odd is not None:
        raise UserError(
            f"{odd}: the folders of {root_dir} don't have the same split as {first}: encode again, which brings it up "
            f"to date, or say which one to take, e.g. split={first}, or split=none"
        )
    return splits[first]


def split_near(folder: Path) -> Path | None:
    """The `split.json` of the data set that a folder belongs to: in it, or above CLASS or CLASS/SIZE."""
    place = folder.absolute()
    files = (parent / SPLIT_NAME for parent in (place, *place.parents[:2]))
    return next((file for file in files if is_file(file) and not is_run_record(file)), None)


def _class_names(folders: Iterable[Path]) -> dict[Path, str]:
    copies = {folder: folder / SPLIT_NAME for folder in folders}
    names = {folder: read_json_object(copy).get("class") for folder, copy in copies.items() if is_file(copy)}
    return {folder: name for folder, name in names.items() if isinstance(name, str)}


def read_split(path: str | Path) -> DataSplit:
    """UserError: no such file, or none of this form."""
    path = Path(path)
    if not is_file(path):
        raise UserError(f"{path}: no such file: make it with dataset/split.py")
    record = read_json_object(path)
    try:
        if missing := sorted(KEYS - set(record)):
            raise ValueError("it has no " + ", ".join(missing))
        shares = Shares(*(record[key] for key in ("subject_pattern", "validation", "held_out", "seed")))
        kinds = {"subject_pattern": str | None, "validation": float | int, "held_out": float | int, "seed": int}
        if wrong := [key for key, kind in kinds.items() if not isinstance(record[key], kind)]:
            raise ValueError(f"{wrong[0]} is {shown(record[wrong[0]])}")
        name = record["dataset"]
        if not isinstance(name, str) or name in ("", ".") or Path(name).name != name:
            raise ValueError(f"dataset is {shown(name)}, expected the name of a file beside it")
        if strange := [side for side in record["subjects"].values() if side not in SIDES]:
            raise ValueError(f"a side {shown(strange[0])}, expected {', '.join(SIDES)}")
        return DataSplit(path, shares, record["dataset"], record["files_sha256"], record["subjects"])
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read as the split of a data set ({error}): draw it anew (dataset/split.py --anew)"
        ) from error


# One side


def parse_side(text: str) -> tuple[str, str | None]:
    """("data/split.json", "held_out") of "data/split.json:held_out"; (text, None) where no side is said."""
    path, _, side = text.rpartition(":")
    return (path, side) if side in SIDES else (text, None)


def dataset_of(text: str) -> Path:
    """The dataset JSON, or folder, behind what a set is given by: a folder, JSON, JSON:SIDE or split.json:SIDE."""
    path = Path(parse_side(text)[0])
    return path.with_name(read_split(path).dataset) if path.name == SPLIT_NAME and is_file(path) else path


def files_of_side(json_file: str | Path, side: str) -> dict[str, list[Path]]:
    """Name -> files on a side, of a dataset JSON with a split, or of the one that a `split.json` was drawn for.

    Names without any are left out. UserError: there is no split, or nothing on that side.
    """
    path = dataset_of(str(json_file))
    split = read_split(json_file) if path != Path(json_file) else find_split(path)
    if split is None:
        raise UserError(f"{path}: has no {SPLIT_NAME}, so that {side} is nothing: python dataset/split.py {path}")
    found = split.by_side(path)[side]
    if not any(found.values()):
        raise UserError(f"{split.path}: no subject is on the side {side}")
    return {name: files for name, files in found.items() if files}


def split_of(text: str) -> DataSplit | None:
    """That of a `split.json`, of a dataset JSON, each also with :SIDE, or of the data set that a folder belongs to."""
    path = Path(parse_side(text)[0])
    if path.name == SPLIT_NAME:
        return read_split(path)
    if is_file(path):
        return find_split(path)
    near = split_near(path)
    return read_split(near) if near else None


# One data set


def sides_of(
    root_dir: str | Path, wanted: str | None, val_fraction: float, split_seed: int, subject_pattern: str | None
) -> Split:
    """Training and validation files of a dataset JSON: by its split (`find_split`), else by `split_dataset`.

    UserError: as both, and a pattern that is not the split's.
    """
    split = find_split(root_dir, wanted)
    if split is None:
        return split_dataset(root_dir, val_fraction, split_seed, subject_pattern)
    remedy = "leave it out, draw the split anew (dataset/split.py --anew), or go without it (dataset.split=none)"
    split.check_pattern(subject_pattern, "dataset.subject_pattern", remedy)
    return split.split(root_dir)
