"""Which files a data set consists of: the dataset JSONs, their folders and the names of latents."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn

from common.documents import read_json
from common.errors import UserError
from common.places import home_expanded, is_folder, missing_folder
from common.text import is_plain, shown

VOLUME_SUFFIX = ".nii.gz"
LATENT_SUFFIX = "_latents"
CACHE_SUFFIX = "_cache"
HIDDEN_STARTS = (".", "@eaDir", "#recycle", "$RECYCLE.BIN")  # the last three: copies that file servers and Windows keep
PAIRS_ONLY = "pairs_only"  # in an entry of a dataset JSON with hints: images without them are left out
NATIVE_SIZES = "native"  # the folder of a class's volumes that keep the sizes they have
# Endings, in lower case, of volumes that neither preparation nor training reads. Of two files that are one volume the
# one with the voxels: FSL's motion parameters are `.par` too, and one volume counts once.
OTHER_IMAGE_SUFFIXES = (
    *(".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip", ".nii.z", ".nii.7z"),
    *(".mgh", ".mgz", ".mgh.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".mnc", ".mnc.gz", ".gipl", ".gipl.gz"),
    *(".img", ".img.gz", ".rec", ".rec.gz", ".brik", ".brik.gz", ".brik.bz2", ".vtk", ".vti", ".mif", ".mif.gz"),
)

logger = logging.getLogger(__name__)


def read_dataset_json(path: str | Path) -> dict[str, list[Path]]:
    """The files of a JSON `{name: folder or [folder, ...]}`: for every name all `*.nii.gz` below, sorted.

    A relative folder is looked for beside the JSON, then in the working directory. UserError: a missing JSON, folder or
    file, or a JSON of another form.
    """
    return {name: _list_all(folders) for name, folders in read_dataset_folders(path).items()}


def read_class_json(path: str | Path) -> dict[int, list[Path]]:
    """As `read_dataset_json` for a JSON whose names are class ids 0, 1, ... (the class labels of BiFlowNet)."""
    return {class_id: _list_all(folders) for class_id, folders in read_class_folders(path).items()}


def read_dataset_folders(path: str | Path) -> dict[str, list[Path]]:
    """The folders of a dataset JSON, each of which exists."""
    path = Path(path)
    entries = read_json_object(path)
    if not entries:
        raise UserError(f'{path}: names no folder: write {{"name": "folder"}}')
    return {name: resolve_folders(path, name, value) for name, value in entries.items()}


def read_hint_folders(path: str | Path) -> tuple[dict[Path, dict[str, Path]], set[Path]]:
    """Of each folder of images of a dataset JSON with hints its folders of hints, by their names.

    An entry is {"images": folder or list, "hints": {name: folder or list}}, lists of one order. UserError otherwise.
    Also the folders of which only the images with hints are wanted ("pairs_only": true).
    """
    path = Path(path)
    found: dict[Path, dict[str, Path]] = {}
    pairs_only: set[Path] = set()
    for name, value in read_json_object(path).items():
        hints = value.get("hints") if isinstance(value, dict) else None
        if not isinstance(hints, dict) or not hints:
            form = '{"images": folder, "hints": {name: folder}}'
            raise UserError(f'{path}: "{name:.80}" must be {form}, found {shown(value)}')
        images = resolve_folders(path, name, value)
        pairs_only |= set(images) if value.get(PAIRS_ONLY) is True else set()
        for hint, folders in hints.items():
            places = resolve_folders(path, f"{name}, {hint}", folders)
            if len(places) != len(images):
                raise UserError(f'{path}: "{name}": {len(images)} folder(s) of images, {len(places)} of {hint}')
            for image, place in zip(images, places, strict=True):
                found.setdefault(image, {})[hint] = place
    return found, pairs_only


def read_class_folders(path: str | Path) -> dict[int, list[Path]]:
    """The folders of a dataset JSON whose names are class ids, in the order of the ids.

    UserError also where a folder is, or lies in, one of another class: a model would learn both labels for its files.
    """
    folders = read_dataset_folders(path)
    for name in folders:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and name == str(int(name))):
            raise UserError(f'{path}: key "{name:.80}" is not a class id: keys are the integers 0, 1, ... as "0", "1"')
    places = {name: {Path(os.path.realpath(folder)): folder for folder in folders[name]} for name in folders}
    owners: dict[Path, str] = {}
    for name, of_class in places.items():
        for place, folder in of_class.items():
            if (first := owners.setdefault(place, name)) != name:
                _refuse_shared(path, first, places[first][place], name, folder)
    for place, name in owners.items():
        for above in place.parents:
            if (other := owners.get(above, name)) != name:
                _refuse_shared(path, other, places[other][above], name, places[name][place])
    return {int(name): folders[name] for name in sorted(folders, key=int)}


def _refuse_shared(path: Path, name: str, folder: Path, other_name: str, other: Path) -> NoReturn:
    raise UserError(
        f"{path}: class {other_name} has the folder {other}, which is or lies in {folder} of class {name}: "
        "its files would be of both; give each folder one class"
    )


class FolderContent(NamedTuple):
    """What lies below a folder, sorted.

    volumes: `*.nii.gz`, links followed, hidden files left out. others: image files that training passes over, of
    another format or named otherwise. closed: errors of the folders that can't be listed or entered.
    """

    volumes: list[Path]
    others: list[Path]
    closed: list[OSError]


def list_volumes(folder: str | Path) -> list[Path]:
    """All `*.nii.gz` below a folder, sorted. Image files that are passed over end in one warning.

    UserError: no such folder, one that can't be listed or entered, or no `*.nii.gz` in it.
    """
    content = look_into(folder)
    if content.closed:
        _refuse_folder(content.closed[0])
    if content.others:
        logger.warning("%s: passed over, only *%s is read", describe_others(content), VOLUME_SUFFIX)
    return content.volumes


def look_into(folder: str | Path) -> FolderContent:
    """What `list_volumes` gives, passes over and refuses. UserError: no such folder, or no `*.nii.gz` in it."""
    folder = Path(folder)
    if not is_folder(folder):
        raise UserError(f"{folder}: {missing_folder(folder)}")
    closed: list[OSError] = []
    files = walk_files(folder, closed.append)
    volumes = [path for path in files if path.name.endswith(VOLUME_SUFFIX)]
    named = (".nii", VOLUME_SUFFIX, *OTHER_IMAGE_SUFFIXES)
    others = [p for p in files if p.name.lower().endswith(named) and not p.name.endswith(VOLUME_SUFFIX)]
    content = FolderContent(volumes, others, closed)
    if not volumes and closed:
        _refuse_folder(closed[0])
    if not volumes:
        found = f", but {describe_others(content)}: prepare them with dataset/preprocess.py" if others else ""
        raise UserError(f"{folder}: the folder has no *{VOLUME_SUFFIX} file{found}")
    return content


def describe_others(content: FolderContent) -> str:
    """How many image files are passed over, with an example."""
    return f"{len(content.others)} image file(s) of another kind or name, e.g. {content.others[0]}"


def walk_files(folder: Path, on_error: Callable[[OSError], None] | None = None) -> list[Path]:
    """All files below a folder, links followed, hidden files and folders left out, sorted.

    Hidden folders hold copies: `.git/annex` of DataLad, whose names are links into it, `.ipynb_checkpoints`, or waste.
    on_error: called for a folder that can't be listed or entered; without, it is a UserError. One is also the whole
    file system.
    """
    if os.path.realpath(folder) == os.path.sep:
        raise UserError(f"{folder}: the whole file system: name the folder in it that holds the files")
    files, seen = [], set()
    for parent, children, names in os.walk(folder, onerror=on_error or _refuse_folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        # A link back to a folder above would be walked for ever.
        children[:] = [
            name
            for name in children
            if not name.startswith(HIDDEN_STARTS) and os.path.realpath(Path(parent) / name) not in seen
        ]
        for name in names:
            path = Path(parent) / name
            try:
                # A pipe would be read for ever; a link to nothing stays, to be named by who reads it.
                if not name.startswith(HIDDEN_STARTS) and (path.is_file() or path.is_symlink()):
                    files.append(path)
            except OSError as error:  # a folder that can be listed, but not entered
                (on_error or _refuse_folder)(error)
                break
    return sorted(files)


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename!s:.300}: cannot be listed or entered ({error.strerror}): its files would be missing; "
        "correct its permissions or move it away"
    ) from error


def size_folder(size: Sequence[int] | None) -> str:
    """Name of the folder of a class's volumes of one size (x, y, z), below the class folder; None: of all sizes."""
    return NATIVE_SIZES if size is None else "x".join(map(str, size))


def is_size_folder(name: str) -> bool:
    return name == NATIVE_SIZES or re.fullmatch(r"\d+x\d+x\d+", name) is not None


def class_folder(folder: PurePath) -> PurePath:
    """CLASS of a folder of volumes CLASS or CLASS/SIZE."""
    return folder.parent if is_size_folder(folder.name) and folder.parent.name else folder


def beside(volume: Path, ending: str) -> Path:
    """The file of a volume's name with another ending, as NAME.json of NAME.nii.gz."""
    return volume.with_name(volume.name.removesuffix(VOLUME_SUFFIX) + ending)


def latent_folder(folder: str | Path) -> Path:
    """The folder of the latents of a class folder: `X_latents` beside `X`."""
    return _folder_beside(folder, LATENT_SUFFIX)


def latent_path(volume: str | Path, folder: str | Path) -> Path:
    """The file of the latent of `volume`, a file below the class folder `folder`: the same name below `X_latents`.

    Only the class folder itself is renamed, not other parts of the path of the same name.
    """
    return latent_folder(folder) / _name_below(volume, folder)


def cache_folder(folder: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The folder of the cached volumes of a class folder: `X_cache` beside `X`, or one of its own below `cache_dir`."""
    if cache_dir is None:
        return _folder_beside(folder, CACHE_SUFFIX)
    place = Path(os.path.abspath(folder))  # folders of the same name differ by where they lie
    return Path(cache_dir) / f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


def cache_path(volume: str | Path, folder: str | Path, settings: str, cache_dir: str | Path | None = None) -> Path:
    """The cached voxels of `volume`, a file below the class folder `folder`: `X_cache/SETTINGS/NAME.npy`."""
    return cache_folder(folder, cache_dir) / settings / beside(_name_below(volume, folder), ".npy")


def _folder_beside(folder: str | Path, suffix: str) -> Path:
    folder = Path(os.path.normpath(folder))
    if folder.name in ("", ".."):  # the current folder and those above have their names only in the full path
        folder = Path(os.path.abspath(folder))
    return folder.with_name(folder.name + suffix)


def _name_below(volume: str | Path, folder: str | Path) -> Path:
    return Path(os.path.normpath(volume)).relative_to(os.path.normpath(folder))


def _list_all(folders: Sequence[Path]) -> list[Path]:
    return sorted({file for folder in folders for file in list_volumes(folder)})


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a dataset JSON. UserError: no such file, no JSON object, a name twice."""
    try:
        entries = read_json(path, unique=True)
    except FileNotFoundError as error:
        raise UserError(f'{path}: no such dataset JSON: give a file like {{"name": "folder"}}') from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a dataset JSON ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 or UTF-16: save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not a JSON file (line {error.lineno}: {error.msg})") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a dataset JSON: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f'{path}: a JSON object {{"name": "folder"}} is needed, found a {type(entries).__name__}')
    return entries


def resolve_folders(path: Path, name: str, value: Any) -> list[Path]:
    """The folders of an entry `name` of the dataset JSON `path`, looked for as by `read_dataset_json`."""
    if not is_plain(name):
        raise UserError(f"{path}: key {shown(name)} has characters that are no text: write another")
    value = value.get("images") if isinstance(value, dict) else value  # beside them hints
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(item, str) and item for item in values):
        raise UserError(f'{path}: "{name:.80}" must be a folder or a list of folders, found {shown(value)}')
    folders = []
    for item in values:
        try:
            places = list(dict.fromkeys([path.parent / home_expanded(item), home_expanded(item)]))
            found = next((place for place in places if is_folder(place)), None)
            reasons = sorted({missing_folder(place) for place in places}) if found is None else []
        except UserError as error:
            raise UserError(f'{path}: "{name:.80}": {error}') from error
        if found is None:
            where = " or ".join(f"{place!s:.300}" for place in places)
            raise UserError(f'{path}: "{name:.80}": {reasons[0]}: {where}')
        folders.append(found)
    return folders
