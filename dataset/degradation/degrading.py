"""Condition volumes of a data set, with their measurements and records, and the JSONs that name them."""

import dataclasses
import io
import json
import os
import zlib
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
from dataset.degradation.operators import OPERATORS, Measured, Operator
from dataset.order.data_split import class_name_of, find_split
from dataset.volumes.index import (
    VOLUME_SUFFIX,
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

VOLUMES_JSON, LATENTS_JSON, CONDITIONS_JSON = "volumes.json", "latents.json", "conditions.json"


def degrade(cfg: DictConfig) -> None:
    """Write what is not there yet.

    Raises:
        UserError: options or folders that do not fit; conditions that were made otherwise.
    """
    operator, output = operator_of(cfg), Path(cfg.output_dir)
    folders = read_class_folders(cfg.data_path)
    if strange := set(cfg.classes) - folders.keys():
        raise UserError(f"classes: {cfg.data_path} has no class {min(strange)}, only {', '.join(map(str, folders))}")
    chosen = {label: places for label, places in folders.items() if not cfg.classes or label in cfg.classes}
    split = find_split(cfg.data_path)
    jobs, named = [], {name: {} for name in (VOLUMES_JSON, LATENTS_JSON, CONDITIONS_JSON)}
    for label, places in chosen.items():
        targets = [output / _place_of(place) for place in places]
        for place, target in zip(places, targets, strict=True):
            if split is not None:
                split.write(target, class_name_of(place))
            jobs += [(path, target / path.relative_to(place)) for path in list_volumes(place)]
        images, hints = ([str(p.absolute()) for p in of] for of in (places, targets))
        of_latents = [[str(latent_folder(p)) for p in of] for of in (images, hints)]
        named[VOLUMES_JSON][str(label)] = hints
        named[LATENTS_JSON][str(label)] = {"images": of_latents[0], "hints": {cfg.operator: of_latents[1]}}
        named[CONDITIONS_JSON][str(label)] = {"images": images, "hints": {cfg.operator: hints}}
    record = {"operator": cfg.operator, **dataclasses.asdict(operator), "seed": cfg.seed}
    todo = [job for job in jobs if not _is_done(job[1], record)]
    make = partial(_degrade_one, operator=operator, record=record)
    for _ in map_in_processes(make, todo, cfg.num_workers, "degrading"):
        pass
    for name, content in named.items():
        write_atomically(output / name, (json.dumps(content, indent=2) + "\n").encode())
    get_logger().info("%d conditions in %s, %d were there", len(jobs), output, len(jobs) - len(todo))


def operator_of(cfg: DictConfig) -> Operator:
    """That of the options."""
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
    stem = condition.name.removesuffix(VOLUME_SUFFIX)
    record_file, file = condition.with_name(f"{stem}.json"), condition.with_name(f"{stem}.npz")
    try:
        record = read_json(record_file)
        names = {field.name for field in dataclasses.fields(OPERATORS[record["operator"]])}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items() if name in names}
        with np.load(file, allow_pickle=False) as content:
            return OPERATORS[record["operator"]](**values), {name: content[name] for name in content.files}
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


def _is_done(target: Path, record: dict[str, Any]) -> bool:
    if not is_whole_volume(target):
        return False
    try:
        found = read_json(target.with_name(target.name.removesuffix(VOLUME_SUFFIX) + ".json"))
    except (OSError, ValueError):
        return False
    if found != json.loads(json.dumps(record)):
        raise UserError(f"{target}: was made with {shown(found)}, not {record}: name another output_dir")
    return True


def _degrade_one(job: tuple[Path, Path], operator: Operator, record: dict[str, Any]) -> None:
    source, target = job
    volume = read_model_volume(source, (-1, 1))
    array = tensor_to_nifti(volume.data[0]).numpy()
    rng = np.random.default_rng([record["seed"], zlib.crc32(os.fsencode(source.name))])
    measured = operator.measure(array, volume.header.spacing_mm, rng)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **measured)
    stem = target.name.removesuffix(VOLUME_SUFFIX)
    write_atomically(target.with_name(f"{stem}.npz"), buffer.getvalue())
    write_atomically(target.with_name(f"{stem}.json"), (json.dumps(record, indent=2) + "\n").encode())
    condition = nifti_to_tensor(torch.from_numpy(operator.reconstruct(measured)))[None].contiguous()
    write_volume(target, condition, volume)
