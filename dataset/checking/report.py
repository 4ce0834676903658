"""Examines a whole data set and says what it found: table, problems, notes, report and picture."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.files import check_writable, write_atomically
from common.parallel import map_in_processes
from common.places import is_file
from common.text import printable
from dataset.checking import examine
from dataset.checking.examine import FileFacts, Problem, examine_latent, examine_volume
from dataset.order.split import find_subject
from dataset.volumes.index import describe_others, latent_folder, look_into, read_dataset_folders
from dataset.volumes.latent_record import RECORD_NAME, read_latent_record
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid
from dataset.volumes.volume_io import read_latent, read_model_volume

SHOWN = 5  # files of each kind of problem on the screen
SHOWN_VALUES = 3  # sizes and spacings of each name
PATCH_SIZE = 64  # of the published autoencoders
KIND_SAMPLE = 8  # headers that decide whether files are latents
VOLUME_TITLE = "Patient's right is right, front or head is up; sagittal: front is right"
LATENT_TITLE = "Channel 0 of the latents, -1 black, 1 white"


def check(cfg: DictConfig) -> bool:
    """Checks the data set of a `CheckConfig`. Returns whether it has no problems."""
    json_path = Path(cfg.json)
    folders = read_dataset_folders(json_path)
    if cfg.report is not None:
        check_writable(cfg.report)
    if cfg.picture is not None:
        check_writable(cfg.picture, "the picture ")
    files, problems = list_files(folders)
    is_latents = _is_latents(files, folders)
    subjects, without = find_subjects(folders, cfg.subject_pattern)
    problems += without

    facts = read_all(files, is_latents, list(cfg.intensity_range), cfg.num_workers)
    problems += examine.file_problems(facts)
    warnings = examine.volume_set_warnings(facts)
    if is_latents:
        problems, notes = problems + examine.latent_set_problems(facts), examine.latent_set_notes(facts)
    else:
        problems += examine.volume_set_problems(facts, list(cfg.intensity_range))
        notes = examine.volume_set_notes(facts, *find_patch_size(folders, cfg.patch_size))

    summaries = {name: summarise(of_name, is_latents) for name, of_name in facts.items()}
    for name, count in subjects.items():
        summaries[name]["subjects"] = count
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    show(console, json_path, summaries, problems, notes, warnings)
    if cfg.report is not None:
        write_report(cfg, summaries, problems, notes, warnings)
        _say(console, f"report: {cfg.report}")
    try:
        if picture := draw(cfg, folders, facts, problems, is_latents):
            _say(console, f"picture: {picture}")
    except UserError as error:  # a folder that is for reading only is no problem of the data
        if cfg.picture is not None:
            raise
        _say(console, f"no picture: {error}; --picture FILE.png names another place")
    return not problems


def _is_latents(files: Mapping[str, Sequence[Path]], folders: Mapping[str, Sequence[Path]]) -> bool:
    if any(is_file(folder / RECORD_NAME) for of_name in folders.values() for folder in of_name):
        return True
    return examine.holds_latents([path for _, path in examine.choose_sample(files, KIND_SAMPLE)])


def list_files(folders: Mapping[str, Sequence[Path]]) -> tuple[dict[str, list[Path]], list[Problem]]:
    """The files of each name, and what of its folders training would refuse or pass over."""
    contents = {folder: look_into(folder) for of_name in folders.values() for folder in of_name}
    problems = []
    for folder, content in contents.items():
        for error in content.closed:
            problems.append(Problem(examine.CLOSED, error.strerror or str(error), Path(error.filename)))
        if content.others:
            problems.append(Problem(examine.PASSED_OVER, describe_others(content), folder))
    files = {
        name: sorted({path for folder in of_name for path in contents[folder].volumes})
        for name, of_name in folders.items()
    }
    return files, problems


def find_patch_size(folders: Mapping[str, Sequence[Path]], given: int) -> tuple[int, str]:
    """Edge of a patch, and whose that is: as latents of these volumes say, unless another is given."""
    if given != PATCH_SIZE:
        return given, ""
    for folder in (folder for of_name in folders.values() for folder in of_name):
        if size := (read_latent_record(latent_folder(folder)) or {}).get("patch_size"):
            return size, f" (those of {latent_folder(folder)})"
    return PATCH_SIZE, " (the published size; --patch-size says another)"


def find_subjects(folders: Mapping[str, Sequence[Path]], pattern: str | None) -> tuple[dict[str, int], list[Problem]]:
    """Number of subjects of each name, and the files without one. Without a pattern both are empty."""
    if pattern is None:
        return {}, []
    find = find_subject(pattern)
    subjects: dict[str, set[str]] = {name: set() for name in folders}
    problems = []
    for name, of_name in folders.items():
        below_folder = {path: path.relative_to(folder) for folder in of_name for path in look_into(folder).volumes}
        for path, below in below_folder.items():
            try:
                subjects[name].add(find(path, below.as_posix()))
            except UserError:
                problems.append(Problem(examine.NO_SUBJECT, f"{pattern!r} finds nothing in {below.as_posix()!r}", path))
    return {name: len(found) for name, found in subjects.items()}, problems


def read_all(
    files: Mapping[str, Sequence[Path]], is_latents: bool, intensity_range: Sequence[float], num_workers: int
) -> dict[str, list[FileFacts]]:
    """What every file of each name holds; each file is read once, even if two names have it."""
    paths = sorted({path for of_name in files.values() for path in of_name})
    function = examine_latent if is_latents else partial(examine_volume, intensity_range=intensity_range)
    found = dict(map_in_processes(function, paths, num_workers, "reading", "latent" if is_latents else "volume"))
    by_path = {paths[index]: facts for index, facts in found.items()}
    return {name: [by_path[path] for path in of_name] for name, of_name in files.items()}


# What is shown


def summarise(files: Sequence[FileFacts], is_latents: bool) -> dict[str, Any]:
    """Figures of one name: counts of sizes and spacings, most frequent first, and intensities over its files."""
    headers = [file.header for file in files if file.header]
    sizes = Counter(examine.format_size(header.latent_shape if is_latents else header.shape) for header in headers)
    summary: dict[str, Any] = {"files": len(files), "sizes": dict(sizes.most_common())}
    if not is_latents:
        spacings = Counter(examine.format_numbers(header.spacing_mm) for header in headers)
        summary["spacings_mm"] = dict(spacings.most_common())
    read = [file for file in files if file.low is not None]
    if read:
        summary["lowest"], summary["highest"] = min(file.low for file in read), max(file.high for file in read)
        summary["median_of_means"] = median(file.mean for file in read)
    if shares := [file.foreground for file in files if file.foreground is not None]:
        summary["foreground"] = {"lowest": min(shares), "median": median(shares), "highest": max(shares)}
    return summary


def show(
    console: Console,
    path: Path,
    summaries: Mapping[str, dict],
    problems: Sequence[Problem],
    notes: Sequence[str],
    warnings: Sequence[str],
) -> None:
    """Prints table, problems, warnings and notes."""
    first = next(iter(summaries.values()))
    table = Table(title=printable(str(path)), title_justify="left")
    columns = {"name": "left", "files": "right"}
    columns |= {"subjects": "right"} if "subjects" in first else {}
    columns |= {"size X×Y×Z": "left", "spacing mm": "left"} if "spacings_mm" in first else {"size C×d×h×w": "left"}
    columns |= {"lowest": "right", "highest": "right", "median of means": "right"}
    columns |= {"foreground": "right"} if "spacings_mm" in first else {}
    for heading, side in columns.items():
        table.add_column(heading, justify=side)
    for name, summary in summaries.items():
        cells = [printable(name), str(summary["files"])]
        cells += [str(summary["subjects"])] if "subjects" in summary else []
        cells += [_counts(summary[key]) for key in ("sizes", "spacings_mm") if key in summary]
        cells += [f"{summary[key]:.4g}" if key in summary else "–" for key in ("lowest", "highest", "median_of_means")]
        if "spacings_mm" in summary:
            shares = summary.get("foreground")
            cells.append("–" if shares is None else f"{shares['lowest']:.0%}–{shares['highest']:.0%}")
        table.add_row(*cells)
    console.print(table)

    for kind, found in examine.by_kind(problems).items():
        _say(console, f"PROBLEM {kind}: {len(found)}. What to do: {examine.REMEDIES[kind]}")
        for problem in found[:SHOWN]:
            _say(console, f"    {problem}")
        if len(found) > SHOWN:
            _say(console, f"    … and {len(found) - SHOWN} more; --report FILE.json names all")
    for warning in warnings:
        _say(console, f"warning: {warning}")
    for note in notes:
        _say(console, f"note: {note}")
    _say(console, f"{len(problems)} problems" if problems else "no problems")


def _counts(counts: Mapping[str, int]) -> str:
    shown = [size if len(counts) == 1 else f"{size} ({count})" for size, count in list(counts.items())[:SHOWN_VALUES]]
    return "\n".join([*shown, "…"] if len(counts) > SHOWN_VALUES else shown) or "–"


def _say(console: Console, line: str) -> None:
    console.print(printable(line), soft_wrap=True)


def write_report(
    cfg: DictConfig,
    summaries: Mapping[str, dict],
    problems: Sequence[Problem],
    notes: Sequence[str],
    warnings: Sequence[str],
) -> None:
    """Everything that was found as a JSON file; problems: kind -> what to do and each file."""
    report = {
        "json": cfg.json,
        "intensity_range": list(cfg.intensity_range),
        "names": summaries,
        "problems": {
            kind: {
                "remedy": examine.REMEDIES[kind],
                "found": [{"file": problem.path and str(problem.path), "found": problem.found} for problem in found],
            }
            for kind, found in examine.by_kind(problems).items()
        },
        "warnings": list(warnings),
        "notes": list(notes),
    }
    write_atomically(cfg.report, (json.dumps(report, indent=1) + "\n").encode())


# Picture


def draw(
    cfg: DictConfig,
    folders: Mapping[str, Sequence[Path]],
    facts: Mapping[str, Sequence[FileFacts]],
    problems: Iterable[Problem],
    is_latents: bool,
) -> Path | None:
    """Draws the slices of some files of each name, none of which has a problem. None if there is nothing to draw.

    What seems to be a mask is among them, one of each name.
    """
    unfit = {problem.path for problem in problems}
    sound = {name: [file for file in files if file.path not in unfit] for name, files in facts.items()}
    masks = [next((file for file in files if file.mask), None) for files in sound.values()]
    masks = {file.path: file.mask for file in masks if file is not None}
    rest = {name: [file.path for file in files if file.path not in masks] for name, files in sound.items()}
    first = [(name, file.path) for name, files in sound.items() for file in files if file.path in masks]
    chosen = first[: cfg.num_pictures]
    chosen += choose_pictures(rest, cfg.num_pictures - len(chosen), cfg.seed)
    rows = []
    for name, path in sorted(chosen, key=lambda one: list(facts).index(one[0])):
        if is_latents:
            slices = central_slices(torch.as_tensor(read_latent(path)[0]))
        else:
            volume = read_model_volume(path, list(cfg.intensity_range))
            slices = central_slices(volume.data, volume.header.spacing_mm)
        label = " · ".join([name, *_described(path, folders[name], cfg.subject_pattern)])
        if path in masks:
            label += f"\n{masks[path]}"
        rows.append((label, [slices[plane] for plane in PLANES]))
    if not rows:
        return None
    path = Path(cfg.picture) if cfg.picture else Path(cfg.json).with_name(f"{Path(cfg.json).stem}_check.png")
    columns, title = ((), LATENT_TITLE) if is_latents else (PLANES, VOLUME_TITLE)
    save_slice_grid(path, rows, columns=columns, title=title, labels_above=True)
    return path


def _described(path: Path, folders: Sequence[Path], pattern: str | None) -> list[str]:
    """The subject of a file, where a pattern finds it, and its place below the folder, whose folders often name it."""
    below = path.relative_to(next(folder for folder in folders if folder in path.parents)).as_posix()
    return [below] if pattern is None else [f"subject {find_subject(pattern)(path, below)}", below]


def choose_pictures(files: Mapping[str, Sequence[Path]], count: int, seed: int) -> list[tuple[str, Path]]:
    """`count` files (name, path) at random, by turns of each name; sorted by name as in `files`."""
    rng = np.random.default_rng(seed)
    shuffled = {name: [of_name[i] for i in rng.permutation(len(of_name))] for name, of_name in files.items()}
    turns = [(turn, name) for name, of_name in shuffled.items() for turn in range(len(of_name))]
    chosen = sorted(turns, key=lambda place: place[0])[:count]
    return [(name, shuffled[name][turn]) for name in files for turn, of in sorted(chosen) if of == name]
