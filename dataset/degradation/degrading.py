"""Condition volumes of a data set, with their measurements and records, and the JSONs that name them."""

import dataclasses
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from common.documents import read_json
from common.errors import UserError
from common.files import write_atomically
from common.log import get_logger
from common.parallel import map_in_processes
from common.text import shown
from dataset.degradation.contrast import onto_grid_of, pair_up
from dataset.degradation.operators import OPERATORS, Measured, Operator
from dataset.order.data_split import class_name_of, find_split
from dataset.volumes.index import (
    PAIRS_ONLY,
    beside,
    class_folder,
    is_size_folder,
    latent_folder,
    list_volumes,
    read_class_folders,
)
from dataset.volumes.volume_io import (
    is_whole_volume,
    nifti_to_tensor,
    read_model_volume,
    tensor_to_nifti,
    write_volume,
)

CONTRAST = "contrast"  # in place of an operator: the condition is another scan of the same study
LEAST_POISSON = 1.3  # acceleration: 4 / pi, the whole disc of the highest frequencies
VOLUMES_JSON, LATENTS_JSON, CONDITIONS_JSON = "volumes.json", "latents.json", "conditions.json"


@dataclass(frozen=True)
class Job:
    """A condition to be made. other: the volume of the other contrast, where that is what is asked for."""

    source: Path
    target: Path
    record: dict[str, Any]
    other: Path | None = None


def degrade(cfg: DictConfig) -> None:
    """Write what is not there yet.

    Raises:
        UserError: options or folders that do not fit; conditions that were made otherwise.
    """
    output, folders = Path(cfg.output_dir), read_class_folders(cfg.data_path)
    if strange := set(cfg.classes) - folders.keys():
        raise UserError(f"classes: {cfg.data_path} has no class {min(strange)}, only {', '.join(map(str, folders))}")
    chosen = {label: places for label, places in folders.items() if not cfg.classes or label in cfg.classes}
    targets = {place: output / _place_of(place) for places in chosen.values() for place in places}
    images = {path: place for place in targets for path in list_volumes(place)}
    operator = None if cfg.operator == CONTRAST else operator_of(cfg)
    if operator is None:
        others = pair_up(images, cfg.others, cfg.pattern)
        records = {path: {"operator": CONTRAST, "other": str(other.absolute())} for path, other in others.items()}
    else:
        others, record = {}, {"operator": cfg.operator, **dataclasses.asdict(operator), "seed": cfg.seed}
        records = dict.fromkeys(images, record)
    jobs = []
    for path, record in records.items():
        target = targets[images[path]] / path.relative_to(images[path])
        jobs.append(Job(path, target, record, others.get(path)))
    todo = [job for job in jobs if not _is_done(job)]
    used = {images[job.source] for job in jobs}
    if (split := find_split(cfg.data_path)) is not None:
        for place in used:
            split.write(targets[place], class_name_of(place))
    for _ in map_in_processes(partial(_make, operator=operator), todo, cfg.num_workers, "degrading"):
        pass
    pairs = {label: [(place, targets[place]) for place in places if place in used] for label, places in chosen.items()}
    _name_all(output, cfg.operator, {label: found for label, found in pairs.items() if found})
    if left := len(images) - len(jobs):
        get_logger().warning("%d of %d volumes have no other contrast and no condition", left, len(images))
    get_logger().info("%d conditions in %s, %d were there", len(jobs), output, len(jobs) - len(todo))


def _name_all(output: Path, hint: str, classes: Mapping[int, Sequence[tuple[Path, Path]]]) -> None:
    """Write the JSONs that name the conditions: to be encoded, to train on, to generate for.

    classes: id -> (folder of images, folder of conditions).
    """
    named: dict[str, dict[str, Any]] = {name: {} for name in (VOLUMES_JSON, LATENTS_JSON, CONDITIONS_JSON)}
    only = {PAIRS_ONLY: True} if hint == CONTRAST else {}
    for label, places in classes.items():
        images, hints = ([str(place.absolute()) for place in of] for of in zip(*places, strict=True))
        of_latents = [[str(latent_folder(place)) for place in of] for of in (images, hints)]
        named[VOLUMES_JSON][str(label)] = hints
        named[LATENTS_JSON][str(label)] = {"images": of_latents[0], "hints": {hint: of_latents[1]}, **only}
        named[CONDITIONS_JSON][str(label)] = {"images": images, "hints": {hint: hints}}
    for name, content in named.items():
        write_atomically(output / name, (json.dumps(content, indent=2) + "\n").encode())


def operator_of(cfg: DictConfig) -> Operator:
    """That of the options. UserError: options that do not fit together."""
    if cfg.operator == "mri" and cfg.mask == "poisson" and cfg.acceleration < LEAST_POISSON:
        raise UserError(
            f"acceleration {cfg.acceleration:g} is out of reach of mask poisson, whose points lie in a disc: give at "
            f"least {LEAST_POISSON}"
        )
    options = {
        "ct": {"views": cfg.views, "arc": cfg.arc, "photons": cfg.photons, "window": tuple(cfg.window)},
        "mri": {"acceleration": cfg.acceleration, "mask": cfg.mask, "noise": cfg.noise},
        "thick": {"factor": cfg.factor, "axis": "xyz".index(cfg.axis)},
        "inpaint": {"size": cfg.box},
    }
    return OPERATORS[cfg.operator](**options[cfg.operator])


def read_measurement(condition: Path) -> tuple[Operator, Measured]:
    """The operator and the measurements of a condition, from the files beside it.

    Raises:
        UserError: there are none, or they are damaged.
    """
    record_file, file = beside(condition, ".json"), beside(condition, ".npz")
    try:
        record = read_json(record_file)
        if record["operator"] == CONTRAST:
            raise UserError(f"{condition}: another contrast, of which nothing was measured: leave data_consistency out")
        names = {field.name for field in dataclasses.fields(OPERATORS[record["operator"]])}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items() if name in names}
        with np.load(file, allow_pickle=False) as content:
            return OPERATORS[record["operator"]](**values), {name: content[name] for name in content.files}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise UserError(
            f"{condition}: what was measured is not known, {record_file.name} and {file.name} have to lie beside it, "
            f"as dataset/degrade.py writes them ({type(error).__name__})"
        ) from error


def _place_of(folder: Path) -> Path:
    """CLASS, or CLASS/SIZE."""
    folder = folder.resolve()
    name = Path(class_folder(folder).name)
    return name / folder.name if is_size_folder(folder.name) else name


def _is_done(job: Job) -> bool:
    if not is_whole_volume(job.target):
        return False
    try:
        found = read_json(beside(job.target, ".json"))
    except (OSError, ValueError):
        return False
    if found != json.loads(json.dumps(job.record)):
        raise UserError(f"{job.target}: was made with {shown(found)}, not {job.record}: name another output_dir")
    return True


def _make(job: Job, operator: Operator | None) -> None:
    if operator is None:
        condition, volume = onto_grid_of(job.source, job.other)
    else:
        volume = read_model_volume(job.source, (-1, 1))
        array = tensor_to_nifti(volume.data[0]).numpy()
        rng = np.random.default_rng([job.record["seed"], zlib.crc32(os.fsencode(job.source.name))])
        measured = operator.measure(array, volume.header.spacing_mm, rng)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **measured)
        write_atomically(beside(job.target, ".npz"), buffer.getvalue())
        condition = operator.reconstruct(measured)
    write_atomically(beside(job.target, ".json"), (json.dumps(job.record, indent=2) + "\n").encode())
    write_volume(job.target, nifti_to_tensor(torch.from_numpy(condition))[None].contiguous(), volume)
