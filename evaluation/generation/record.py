"""The JSON beside each generated volume: what the volume depends on, and how the run went that made it.

OUT/seed_S/NAME_XxYxZ.json      request (class, seed, grid, spacing, ...), sampler, guidance, checkpoints, output type;
                                under "run" versions, device, times, memory and command

A volume is done when it is whole and its record says what the request and the settings of the run say now. "run" is not
compared. The record is written before the volume, so that no volume is ever there without one.
"""

import json
import platform
import resource
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common.documents import read_json
from common.errors import UserError
from common.files import file_sha256, write_atomically
from common.places import is_folder
from common.processes import Distributed, device_name
from common.text import shown
from dataset.volumes.index import beside
from dataset.volumes.volume_io import is_whole_volume, read_header
from ddpm.adapter_files import parse_adapters
from ddpm.checkpoint import WITHOUT_SHAPE
from ddpm.process import OFFICIAL, find_sampler
from evaluation.generation.requests import Request


def image_settings(cfg: DictConfig) -> dict[str, Any]:
    """What all volumes of a run depend on besides their request: sampler, guidance, output type, checkpoints."""
    adapters = [[file_sha256(path), weight] for path, weight in parse_adapters(cfg.adapters)]
    return {
        "timesteps": cfg.timesteps,
        "sampling_strategy": cfg.sampling_strategy,
        **{name: cfg[name] for name in find_sampler(cfg.sampling_strategy).options},
        "guidance_scale": cfg.guidance_scale,
        **{name: cfg[name] for name in WITHOUT_SHAPE},
        "precision": cfg.precision,
        "output_dtype": cfg.output_dtype,
        "AE_sha256": file_sha256(cfg.AE_ckpt),
        "model_sha256": file_sha256(cfg.model_ckpt),
        **({"adapters": adapters} if adapters else {}),  # as records of before have none
    }


def record_path(volume: Path) -> Path:
    return beside(volume, ".json")


def make_record(request: Request, settings: dict[str, Any]) -> dict[str, Any]:
    """What a volume depends on, as it is compared; `settings` are what the whole run has in common."""
    record = {**asdict(request), **settings}
    del record["path"]
    if not request.attributes:  # as records of before have none
        del record["attributes"]
    return json.loads(json.dumps(record))  # tuples become lists, as in a record that is read back


def write_record(request: Request, settings: dict[str, Any], run: dict[str, Any]) -> None:
    content = json.dumps({**make_record(request, settings), "run": run}, indent=2) + "\n"
    write_atomically(record_path(request.path), content.encode())


def read_record(volume: Path) -> dict[str, Any] | None:
    """The JSON beside a volume; None where there is none that can be read."""
    try:
        found = read_json(record_path(volume))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_done(request: Request, settings: dict[str, Any]) -> bool:
    """Whether the volume is there, whole and made by the same settings. UserError: by others, or by unknown ones."""
    if is_folder(request.path):
        raise UserError(f"{request.path}: a folder is in the volume's place: remove it, or choose another output_dir")
    if not is_whole_volume(request.path):
        return False
    shape = read_header(request.path).shape
    if shape != request.voxels:
        raise UserError(
            f"{request.path}: another volume is there, of {shape} voxels: remove it, or choose another output_dir"
        )
    record = make_record(request, settings)
    found = read_record(request.path)
    if found is None:
        raise UserError(
            f"{request.path}: how this volume was made is not known, {record_path(request.path).name} is not there or "
            "damaged: remove the volume, or choose another output_dir"
        )
    found.pop("run", None)
    different = sorted(key for key in record.keys() | found.keys() if found.get(key) != record.get(key))
    if different:
        key = different[0]
        was, now = shown(found.get(key)), shown(record.get(key))
        raise UserError(
            f"{request.path}: this volume was made with other settings ({', '.join(different)}: {key} was "
            f"{was}, is {now}): choose another output_dir or seed, or remove the volume"
        )
    return True


def describe_run(cfg: DictConfig, place: Distributed, sampling_s: float, decoding_s: float) -> dict[str, Any]:
    """How a volume was made, for people to read: its share of the batch's time, device, memory, versions, command."""
    return {
        "finished_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "sampling_s": round(sampling_s, 3),
        "decoding_s": round(decoding_s, 3),
        "peak_memory_gb": round(_peak_memory_bytes(place.device) / 1e9, 3),
        **{name: cfg[name] for name in OFFICIAL},  # a matter of the checkpoint, whose hash is compared
        "device": device_name(place.device),
        "batch_size": cfg.batch_size,
        "compile": cfg.compile,
        "channels_last": cfg.channels_last,
        "arithmetic": cfg.arithmetic,
        "world_size": place.world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "command": shlex.join(sys.argv),
    }


def _peak_memory_bytes(device: torch.device) -> int:
    """On a GPU what the tensors of this process needed at most, otherwise its memory; since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
