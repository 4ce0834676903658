"""Several processes beside one: samples a second of the real training scripts under torchrun, as a share of the ideal.

Each process has the same batch and, on a CPU, one thread. The rates are those that the runs log, without the interval
that holds their start. Beside them as many runs of one process each at the same time, which exchange nothing: what they
lose is the machine's (memory that cores share), not the exchange's. Parity of several processes with one is a matter of
the tests. On a machine with fewer cores or GPUs than processes the figures mean nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from common.errors import UserError
from common.processes import choose_device
from config.loading import CONFIG_FOLDER, load_config
from config.schema.autoencoder import AutoencoderConfig
from config.schema.diffusion import BiFlowNetConfig
from dataset.preparation.phantoms import only_training, write_phantoms
from dataset.volumes.volume_io import write_latent
from evaluation.benchmarks.measuring import Report, Row, in_turn

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"paper": 15, "tiny": 4}  # logged in each interval, of which the second counts


def measure(cfg: DictConfig) -> Report:
    """Run the script with one process, with several, and several times, in turn. UserError where it fails."""
    device, steps, count = choose_device(cfg.device), STEPS[cfg.size], cfg.processes
    with tempfile.TemporaryDirectory(prefix="benchmark_scaling_") as temporary:
        prepare = _biflownet if cfg.loop == "biflownet" else _autoencoder
        command = prepare(Path(temporary), cfg.config, steps, device, count)
        train = partial(_seconds_per_sample, command, Path(temporary), steps)
        ways = {"1 process": partial(train, 1, 1), f"{count} processes": partial(train, 1, count)}
        if device.type == "cpu":  # on a GPU they would all take the first
            ways[f"{count} runs"] = partial(train, count, 1)
        seconds = in_turn(ways, cfg.repetitions)
    rows = [Row(name, seconds[name], 1) for name in ways]
    report = Report(f"{cfg.loop}, {device.type}", "samples", "1 process", rows)
    report.notes["share of the ideal"] = round(report.ratio(rows[1]) / count, 3)
    if len(rows) > 2:
        report.notes["share of runs that exchange nothing"] = round(rows[1].rate / rows[2].rate, 3)
    return report


def _biflownet(folder: Path, config: str | None, steps: int, device: torch.device, processes: int) -> list[str]:
    """The command without its run folder, on random latents."""
    config = config or CONFIG_FOLDER / "demo" / "BiFlowNet.yaml"
    cfg = load_config(BiFlowNetConfig, config)
    generator = torch.Generator().manual_seed(0)
    for number in range(4 * cfg.batch_size * processes):
        latent = torch.rand((cfg.volume_channels, *cfg.resolution), generator=generator) * 2 - 1
        write_latent(folder / "latents" / f"{number:03d}.nii.gz", latent)
    (folder / "latents.json").write_text(json.dumps({"0": "latents"}))
    command = ["train/train_BiFlowNet_SingleRes.py", "--config", str(config), "--data-path", f"{folder}/latents.json"]
    command += ["--results-dir", str(folder), "--device", device.type, "--num-workers", "0", "AE_ckpt=null"]
    return command + [f"max_steps={2 * steps}", f"log_every={steps}", "ckpt_every=1000000", "run_name={run}"]


def _autoencoder(folder: Path, config: str | None, steps: int, device: torch.device, processes: int) -> list[str]:
    """The command without its run folder, on phantoms."""
    config = config or CONFIG_FOLDER / "demo" / "PatchVolume.yaml"
    batch_size = load_config(AutoencoderConfig, config).model.batch_size
    counts = only_training(batch_size * processes)  # of each of two classes: whole batches everywhere
    write_phantoms(folder, counts, 64, seed=0)
    data = f"dataset.root_dir={folder}/PatchVolume_data.json"
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    command = ["train/train_PatchVolume.py", "--config", str(config), data, f"model.accelerator={accelerator}"]
    command += [f"model.max_steps={2 * steps}", f"model.log_every={steps}", "model.perceptual_weight=0"]
    command += ["model.discriminator_iter_start=0", "model.val_every=1000000", "model.log_volume_every=0"]
    return [*command, "dataset.val_fraction=0", "model.num_workers=0", f"model.default_root_dir={folder}/{{run}}"]


def _seconds_per_sample(command: Sequence[str], folder: Path, steps: int, num_runs: int, processes: int) -> float:
    """What the second logged interval of fresh trainings says that run at the same time, of all their samples."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [folder / f"run{number}" for number in range(num_runs)]

    def train(run: Path) -> subprocess.CompletedProcess:
        shutil.rmtree(run, ignore_errors=True)
        words = [*launcher, *(word.replace("{run}", run.name) for word in command)]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(num_runs) as threads:
        for done in threads.map(train, runs):
            if done.returncode:
                said = done.stderr.strip()[-2000:]
                raise UserError(f"{' '.join(command)}: failed with {processes} processes: {said}")
    return 1 / sum(_rate(run / "metrics.jsonl", 2 * steps) for run in runs)


def _rate(metrics: Path, step: int) -> float:
    """Samples a second logged at a step."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = (line for line in lines if line["step"] == step)
    return next(value for line in found for name, value in line.items() if name.endswith("samples_per_s"))
