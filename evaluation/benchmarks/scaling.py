"""Several processes beside one: samples a second of the real training scripts under torchrun, as a share of the ideal.

Each process has the same batch and, on a CPU, one thread. The rates are those that the runs log, without the interval
that holds their start. Parity of several processes with one is a matter of the tests. On a machine with fewer cores or
GPUs than processes the figures mean nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from config.errors import UserError
from config.loading import CONFIG_FOLDER, load_config
from config.schema import BiFlowNetConfig
from dataset.phantoms import write_phantoms
from dataset.volume_io import write_latent
from evaluation.benchmarks.measuring import Report, Row, in_turn
from train.distributed import choose_device

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"paper": 40, "tiny": 4}  # logged in each interval, of which the second counts
LOOPS = ("biflownet", "autoencoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--loop", choices=LOOPS, default="biflownet", help="(default: %(default)s)")
    parser.add_argument("--config", type=Path, help="of the training script (default: the demo's, small networks)")
    parser.add_argument("--processes", type=int, default=2, help="beside one (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: auto)")


def measure(options: argparse.Namespace) -> Report:
    """Run the script with one process and with several, in turn. UserError where it fails."""
    if options.processes < 2:
        raise UserError(f"--processes {options.processes}: at least 2 are needed")
    device, steps = choose_device(options.device), STEPS[options.size]
    with tempfile.TemporaryDirectory(prefix="benchmark_scaling_") as temporary:
        prepare = _biflownet if options.loop == "biflownet" else _autoencoder
        command, metrics = prepare(Path(temporary), options.config, steps, device)
        ways = {n: partial(_seconds_per_sample, command, metrics, n, steps) for n in (1, options.processes)}
        seconds = in_turn({str(n): way for n, way in ways.items()}, options.repetitions)
    rows = [Row(_name(n), seconds[str(n)], 1) for n in ways]
    report = Report(f"{options.loop}, {device.type}", "samples", _name(1), rows)
    report.notes["share of the ideal"] = round(report.ratio(rows[1]) / options.processes, 3)
    return report


def _name(processes: int) -> str:
    return f"{processes} process" + ("es" if processes > 1 else "")


def _biflownet(folder: Path, config: Path | None, steps: int, device: torch.device) -> tuple[list[str], Path]:
    """The command and the run's metrics, on random latents."""
    config = config or CONFIG_FOLDER / "demo" / "BiFlowNet.yaml"
    cfg = load_config(BiFlowNetConfig, config)
    generator = torch.Generator().manual_seed(0)
    for number in range(2 * cfg.batch_size * 8):
        latent = torch.rand((cfg.volume_channels, *cfg.resolution), generator=generator) * 2 - 1
        write_latent(folder / "latents" / f"{number:03d}.nii.gz", latent)
    (folder / "latents.json").write_text(json.dumps({"0": "latents"}))
    command = ["train/train_BiFlowNet_SingleRes.py", "--config", str(config), "--data-path", f"{folder}/latents.json"]
    command += ["--results-dir", str(folder), "--device", device.type, "--num-workers", "0", "run_name=run"]
    command += [f"max_steps={2 * steps}", f"log_every={steps}", "ckpt_every=1000000", "preview=false", "AE_ckpt=null"]
    return command, folder / "run" / "metrics.jsonl"


def _autoencoder(folder: Path, config: Path | None, steps: int, device: torch.device) -> tuple[list[str], Path]:
    """The command and the run's metrics, on phantoms."""
    config = config or CONFIG_FOLDER / "demo" / "PatchVolume.yaml"
    write_phantoms(folder, 16, 0, 64, seed=0)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    command = [
        "train/train_PatchVolume.py",
        "--config",
        str(config),
        f"dataset.root_dir={folder}/PatchVolume_data.json",
    ]
    command += [f"model.default_root_dir={folder}/run", f"model.accelerator={accelerator}", "model.num_workers=0"]
    command += [f"model.max_steps={2 * steps}", f"model.log_every={steps}", "model.perceptual_weight=0"]
    command += ["model.discriminator_iter_start=0", "model.val_every=1000000", "model.log_volume_every=0"]
    return command, folder / "run" / "metrics.jsonl"


def _seconds_per_sample(command: Sequence[str], metrics: Path, processes: int, steps: int) -> float:
    """Run a fresh training; what its second logged interval says."""
    shutil.rmtree(metrics.parent, ignore_errors=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: failed with {processes} processes: {done.stderr.strip()[-2000:]}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [line for line in lines if line["step"] == 2 * steps]
    rate = next(value for line in found for name, value in line.items() if name.endswith("samples_per_s"))
    return 1 / rate
