"""From a seed to a file: noise, denoising steps, decoding in bounded memory and writing as int16, as generation does.

Weights are random, so volumes look like noise and compress less than scans. Plain is float32, eager. What is written
is read back first and lies within half a code of what was decoded. The other parts check that the ways agree; after
many steps of a random network they no longer would.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from omegaconf import DictConfig

from AutoEncoder.decoding import decode
from AutoEncoder.model.autoencoder import Autoencoder
from common.compilation import CompiledDenoiser
from common.errors import UserError
from common.precision import PRECISIONS, clock
from common.processes import choose_device
from dataset.volumes.volume_io import int16_scale, read_volume, write_volume
from ddpm.BiFlowNet import BiFlowNet
from evaluation.benchmarks import decode as decoding
from evaluation.benchmarks import sample as sampling
from evaluation.benchmarks.measuring import Limits, Report, Row, chosen, count_flops, in_turn, with_peak_memory

GRIDS = {"paper": (64, 64, 64), "tiny": (8, 8, 8)}
MAX_MEMORY = {"paper": 16.0, "tiny": 0.5}  # GB
RANGE = (-1.0, 1.0)
STAGES = ("sampling", "decoding", "writing")


@dataclass
class Way:
    """One way of generating. stage_seconds: of every call, filled by `run`."""

    denoiser: BiFlowNet | CompiledDenoiser
    autoencoder: Autoencoder
    precision: str
    grid: tuple[int, ...]
    steps: int
    max_bytes: int
    path: Path
    device: torch.device
    stage_seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})

    def run(self) -> torch.Tensor:
        """The volume (1, D, H, W) that was written."""
        times = [clock(self.device)]
        way = sampling.build_way(self.denoiser, self.grid, self.device, self.precision, steps=self.steps)
        latent = way.sample()[0]  # (C, d, h, w)
        times.append(clock(self.device))
        volume = decode(self.autoencoder, latent, "exact", None, self.max_bytes, self.precision)  # (1, D, H, W)
        times.append(clock(self.device))
        write_volume(self.path, volume, np.eye(4), "int16", RANGE)
        times.append(clock(self.device))
        for stage, begin, end in zip(STAGES, times[:-1], times[1:], strict=True):
            self.stage_seconds[stage].append(end - begin)
        return volume


def measure(cfg: DictConfig) -> Report:
    """Generate once each way and read back, then time. UserError where what is read back is not what was written."""
    device, grid = choose_device(cfg.device), tuple(cfg.grid or GRIDS[cfg.size])
    network = sampling.random_network(sampling.SCALES[cfg.size], device)
    sampling.check_grid(grid, network)
    autoencoder = decoding.random_autoencoder(decoding.SCALES[cfg.size], device)
    compiled = cache(lambda: CompiledDenoiser(network))
    max_bytes = int((cfg.max_memory or MAX_MEMORY[cfg.size]) * 1e9)
    with tempfile.TemporaryDirectory(prefix="benchmark_generate_", dir=cfg.folder) as temporary:
        path = Path(temporary) / "volume.nii.gz"

        def way(precision: str, denoiser: Callable[[], BiFlowNet | CompiledDenoiser] = lambda: network) -> Way:
            return Way(denoiser(), autoencoder, precision, grid, cfg.steps, max_bytes, path, device)

        builders = {"plain": partial(way, "32"), "bf16": partial(way, "bf16")}
        builders |= {f"compile {precision}": partial(way, precision, compiled) for precision in ("32", "bf16")}
        ways = chosen(builders, cfg.ways, cfg.compile)
        peaks = {name: _checked(found) for name, found in ways.items()}
        for found in ways.values():
            found.stage_seconds.update({stage: [] for stage in STAGES})  # the first call chose kernels and compiled
        seconds = in_turn({name: partial(_timed, found) for name, found in ways.items()}, cfg.repetitions)

    flops = cfg.steps * count_flops(sampling.build_way(network, grid, device).predict)
    flops += decoding.decoding_flops(autoencoder, decoding.random_latent(autoencoder, grid, device))
    dtypes = {name: PRECISIONS[found.precision] or torch.float32 for name, found in ways.items()}
    limits = Limits.measured(device, dtypes.values())
    rows = [
        Row(
            *(name, seconds[name], 1, peaks[name]),
            limit_share=limits.seconds(flops, 0, dtypes[name]) / median(seconds[name]),
        )
        for name in ways
    ]
    notes = {"threads": torch.get_num_threads(), "steps": cfg.steps}
    for stage in STAGES:
        times = {name: median(found.stage_seconds[stage]) for name, found in ways.items()}
        notes[f"{stage}, seconds"] = {name: float(f"{value:.3g}") for name, value in times.items()}
    title = f"seed to file, latents of {grid}, {cfg.steps} steps, decoding in {max_bytes / 1e9:g} GB, {device}"
    return Report(title, "volumes", rows[0].name, rows, notes)


def _timed(way: Way) -> float:
    way.run()
    return sum(times[-1] for times in way.stage_seconds.values())


def _checked(way: Way) -> float | None:
    """Its peak memory, after a look at the file."""
    volume, peak_gb = with_peak_memory(way.run, way.device)
    difference = (read_volume(way.path).data - volume).abs().max().item()
    if not difference <= 0.51 * int16_scale(RANGE)[0]:
        raise UserError(f"{way.path.name}: read back, voxels differ by up to {difference:.2g}: nothing was timed")
    return peak_gb
