"""Writing a volume as .nii.gz, as generation and previews do: float32 and int16, beside float32 through SimpleITK.

The volume is a phantom with noise, so that it compresses about as well as a scan. Compared first, read back: float32
equals the volume bit for bit, int16 is within half a code. A write ends when the file is on the disk (fsync).
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from omegaconf import DictConfig
from torch import Tensor

from common.errors import UserError
from dataset.preparation.phantoms import only_training, write_phantoms
from dataset.volumes.volume_io import int16_scale, read_volume, write_volume
from evaluation.benchmarks.measuring import Report, Row, in_turn, timed

EDGES = {"paper": 256, "tiny": 32}
NOISE = 0.01  # standard deviation, of a range of 2
RANGE = (-1.0, 1.0)


def measure(cfg: DictConfig) -> Report:
    """Write once each way and read back, then time. UserError where what is read back is not what was written."""
    with tempfile.TemporaryDirectory(prefix="benchmark_write_", dir=cfg.folder) as temporary:
        folder = Path(temporary)
        volume = _volume(folder, EDGES[cfg.size])  # (1, D, H, W)
        affine = np.eye(4)
        paths = {name: folder / f"{name.replace(' ', '_')}.nii.gz" for name in ("plain", "float32", "int16")}
        ways: dict[str, Callable[[], None]] = {
            "plain": partial(_write_plainly, paths["plain"], volume),
            "float32": partial(write_volume, paths["float32"], volume, affine, "float32"),
            "int16": partial(write_volume, paths["int16"], volume, affine, "int16", RANGE),
        }
        differences = {name: _written(way, paths[name], volume) for name, way in ways.items()}
        cpu = torch.device("cpu")
        seconds = in_turn({name: partial(timed, way, cpu) for name, way in ways.items()}, cfg.repetitions)
        megabytes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
    rows = [Row(name, seconds[name], 1, difference=differences[name]) for name in ways]
    title = f"one volume of {tuple(volume.shape[1:])}, difference in intensity"
    return Report(title, "volumes", "plain", rows, {"megabytes": megabytes})


def _volume(folder: Path, edge: int) -> Tensor:
    write_phantoms(folder, only_training(1), edge, seed=0)
    phantom = read_volume(sorted(folder.rglob("*.nii.gz"))[0]).data
    noise = NOISE * torch.randn(phantom.shape, generator=torch.Generator().manual_seed(0))
    return (phantom + noise).clamp(*RANGE)


def _write_plainly(path: Path, volume: Tensor) -> None:
    """The straightforward way: the whole volume turned to (z, y, x), SimpleITK's own compression."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume[0].numpy().swapaxes(1, 2)))
    sitk.WriteImage(image, str(path), useCompression=True)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _written(way: Callable[[], None], path: Path, volume: Tensor) -> float:
    """The largest difference of what is read back."""
    way()
    difference = (read_volume(path).data - volume).abs().max().item()
    allowed = 0.51 * int16_scale(RANGE)[0] if path.name.startswith("int16") else 0.0
    if difference > allowed:
        raise UserError(f"{path.name}: read back, voxels differ by up to {difference:.2g}: nothing was timed")
    return difference
