"""The dataset JSONs that lie beside the class folders: which folders are which class, for both training parts."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import UserError
from common.files import write_atomically
from common.places import exists
from dataset.volumes.index import LATENT_SUFFIX, class_folder, read_json_object

AUTOENCODER_JSON = "PatchVolume_data.json"  # name -> folder or folders
VOLUMES_JSON = "Singleres_dataset.json"  # class id -> folder or folders, to make latents from
LATENTS_JSON = "Singleres_latents.json"  # class id -> folder or folders of the latents


def class_ids(folder: str | Path) -> dict[str, int]:
    """The class ids by name that the JSONs of a folder give out; empty where there are none."""
    ids: dict[str, int] = {}
    for key, place in _places(Path(folder) / VOLUMES_JSON):
        ids.setdefault(_class_name(place), int(key))
    return ids


def choose_class_id(folder: str | Path, name: str, wanted: int | None) -> int:
    """The id of class `name` in the JSONs of a folder: what it has there, else the wanted or the next free one.

    UserError: another class has the wanted id, or the class has another id.
    """
    path, known = Path(folder) / VOLUMES_JSON, class_ids(folder)
    given = known.get(name, wanted)
    if given is None:
        return max(known.values(), default=-1) + 1
    if wanted is not None and given != wanted:
        raise UserError(f"{path}: class {name} has the id {given}, not {wanted}: give class_id={given} or another name")
    others = [other for other, class_id in known.items() if class_id == given]
    if others and name not in others:
        raise UserError(f"{path}: class id {given} is {others[0]}: give class {name} another class_id")
    return given


def check_place(folder: str | Path, place: str) -> None:
    """UserError: the JSONs of a folder name a folder around a new `place` or in it: its volumes would count twice."""
    if place in (known for _, known in _places(Path(folder) / VOLUMES_JSON)):
        return  # what else a person wrote is left as it is
    target = Path(os.path.abspath(Path(folder) / place))
    for path in (Path(folder) / VOLUMES_JSON, Path(folder) / AUTOENCODER_JSON):
        for key, other in _places(path):
            found = Path(os.path.abspath(Path(folder) / other))
            if found in target.parents or target in found.parents:
                raise UserError(
                    f'{path}: "{key}" names {other}, and the volumes of this run go into {place}: they would count '
                    f"twice; take {other} out of the dataset JSONs if it is not wanted, else give another name or "
                    "output_dir"
                )


def add_classes(folder: str | Path, places: Mapping[int, str]) -> None:
    """Writes class ids and their folders into the JSONs of a folder, beside what they have already.

    Arguments:
        places: class id -> NAME or NAME/SIZE, relative to the JSONs, so that the data set can be moved. A class that
            has folders already gets one more: one is a text, several are a list.

    What a person changed stays: of a folder that is known nothing is touched but a missing entry. UserError for a class
    id that is another class's.
    """
    folder = Path(folder)
    ids = folder / VOLUMES_JSON
    known = list(_places(ids))
    for class_id, place in places.items():
        names = [_class_name(other) for key, other in known if key == str(class_id)]
        if names and _class_name(place) not in names:
            raise UserError(f"{ids}: class id {class_id} is {names[0]}: give {_class_name(place)} another class_id")
    for file_name in (AUTOENCODER_JSON, LATENTS_JSON, VOLUMES_JSON):  # the last says what the others have, too
        path = folder / file_name
        entries = read_json_object(path) if exists(path) else {}
        before = dict(entries)
        for class_id, place in places.items():
            key = _class_name(place) if file_name == AUTOENCODER_JSON else str(class_id)
            added = place + LATENT_SUFFIX if file_name == LATENTS_JSON else place
            there = _as_list(path, key, entries[key]) if key in entries else []
            if added not in there and (not there or all(other != place for _, other in known)):
                entries[key] = [*there, added] if there else added
        if entries != before:
            ordered = sorted(entries.items(), key=lambda item: (len(item[0]) if item[0].isdigit() else 0, item[0]))
            write_atomically(path, (json.dumps(dict(ordered), indent=2) + "\n").encode())


def _class_name(place: str) -> str:
    """NAME of a folder NAME or NAME/SIZE."""
    return str(class_folder(PurePosixPath(place)))


def _places(path: Path) -> Iterator[tuple[str, str]]:
    """(key, folder) for all folders of a JSON; none where it doesn't exist."""
    for key, value in (read_json_object(path) if exists(path) else {}).items():
        if path.name == VOLUMES_JSON and not (key.isascii() and key.isdigit()):
            raise UserError(f'{path}: entries {{"class id": "folder"}} are needed to add a class: move the file away')
        yield from ((key, folder) for folder in _as_list(path, key, value))


def _as_list(path: Path, key: str, value: Any) -> list[str]:
    folders = [value] if isinstance(value, str) else value
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        raise UserError(f'{path}: "{key}" must be a folder or a list of folders to add one to: move the file away')
    return folders
