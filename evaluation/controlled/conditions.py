"""The conditions that volumes are generated for: files of hints, matched by name, and the true volumes if known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.places import is_file
from dataset.Control_dataset import check_same_place
from dataset.order.data_split import find_split, parse_side
from dataset.volumes.index import VOLUME_SUFFIX, list_volumes, read_json_object, resolve_folders
from dataset.volumes.volume_io import Header, read_header


@dataclass(frozen=True)
class Condition:
    """hints: file of each, by its name. truth: the volume that was degraded; None: not known."""

    class_id: int
    name: str  # path below its folder, without ending
    hints: dict[str, Path]
    truth: Path | None
    header: Header  # of the first hint, whose place the result takes

    @property
    def first(self) -> Path:
        return next(iter(self.hints.values()))


def list_conditions(data: str, names: Sequence[str]) -> list[Condition]:
    """Those of a JSON, or with JSON:SIDE of the subjects on one side of the split that its folders have.

    names: of the hints. UserError: a JSON of another form, a hint that is missing, hints of one condition on two grids.
    """
    path, side = parse_side(data)
    path = Path(path)
    split = None if side is None else find_split(path)
    if side is not None and split is None:
        raise UserError(f"data: {path} has no split, so that {side} is nothing: leave :{side} out")
    found = []
    for key, value in read_json_object(path).items():
        if not (key.isascii() and key.isdigit() and isinstance(value, dict) and isinstance(value.get("hints"), dict)):
            form = '{"0": {"hints": {name: folder}, "images": folder}}'
            raise UserError(f'{path}: "{key}": entries like {form} are needed')
        if missing := [name for name in names if name not in value["hints"]]:
            raise UserError(f'{path}: "{key}" has no hint {missing[0]}, which the ControlNet was trained with')
        folders = {name: resolve_folders(path, f"{key}, {name}", value["hints"][name]) for name in names}
        truths = resolve_folders(path, key, value) if "images" in value else [None] * len(folders[names[0]])
        for place, folder in enumerate(folders[names[0]]):
            files = list_volumes(folder) if split is None else split.select(folder, side)
            of_names = {name: of[place] for name, of in folders.items()}
            found += [_condition(int(key), file, folder, of_names, truths[place]) for file in files]
    if not found:
        raise UserError(f"data: {data}: there are no conditions")
    return found


def _condition(class_id: int, file: Path, folder: Path, folders: dict[str, Path], truths: Path | None) -> Condition:
    below = file.relative_to(folder)
    hints = {name: place / below for name, place in folders.items()}
    for name, hint in hints.items():
        if not is_file(hint):
            raise UserError(f"{hint}: hint {name} of {file} is missing: a hint has the name of the others")
        check_same_place(file, hint)
    truth = None if truths is None else truths / below
    if truth is not None and not is_file(truth):
        raise UserError(f"{truth}: the true volume of {file} is missing: leave images out where they are not known")
    name = str(below).removesuffix(VOLUME_SUFFIX)
    return Condition(class_id, name, hints, truth, read_header(file))
