"""The dataset JSONs that lie beside the class folders: which folder is which class, for both training parts."""

import json
from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically
from dataset.volumes.index import LATENT_SUFFIX, read_json_object

AUTOENCODER_JSON = "PatchVolume_data.json"  # name -> folder
VOLUMES_JSON = "Singleres_dataset.json"  # class id -> folder, to make latents from
LATENTS_JSON = "Singleres_latents.json"  # class id -> folder of the latents


def class_ids(folder: str | Path) -> dict[str, int]:
    """The class ids by name that the JSONs of a folder give out; empty where there are none."""
    path = Path(folder) / VOLUMES_JSON
    if not path.exists():
        return {}
    entries = read_json_object(path)
    if not all(key.isdigit() and isinstance(name, str) for key, name in entries.items()):
        raise UserError(f'{path}: entries {{"class id": "folder"}} are needed to add a class: move the file away')
    return {name: int(key) for key, name in entries.items()}


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
    others = [other for other, class_id in known.items() if class_id == given and other != name]
    if others:
        raise UserError(f"{path}: class id {given} is {others[0]}: give class {name} another class_id")
    return given


def add_classes(folder: str | Path, names: Mapping[int, str]) -> None:
    """Writes class ids and names into the JSONs of a folder, beside the classes that they have already.

    Folders are relative to the JSON, so that the data set can be moved. What a person changed stays: entries that are
    there are not touched. UserError for a class id that is another class's.
    """
    folder = Path(folder)
    contents = {
        VOLUMES_JSON: {str(class_id): name for class_id, name in names.items()},
        AUTOENCODER_JSON: {name: name for name in names.values()},
        LATENTS_JSON: {str(class_id): name + LATENT_SUFFIX for class_id, name in names.items()},
    }
    for file_name, added in contents.items():
        path = folder / file_name
        entries = read_json_object(path) if path.exists() else {}
        for key, name in added.items() if file_name == VOLUMES_JSON else ():
            if entries.get(key, name) != name:
                raise UserError(f"{path}: class id {key} is {entries[key]}: give {name} another class_id")
        merged = {**added, **entries}
        if merged != entries:
            ordered = dict(sorted(merged.items(), key=lambda item: (len(item[0]) if item[0].isdigit() else 0, item[0])))
            write_atomically(path, (json.dumps(ordered, indent=2) + "\n").encode())
