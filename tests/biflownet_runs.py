"""Tiny BiFlowNet runs for tests: latents on disk, command lines, processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from configs import tiny_autoencoder
from omegaconf import DictConfig

from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_files import load_checkpoint, save_checkpoint
from config.cli import parse_command_line
from config.schema.diffusion import BiFlowNetConfig
from dataset.volumes.volume_io import write_latent
from train.diffusion import run_folder
from train.loop.metrics_file import MetricsWriter

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "train_BiFlowNet_SingleRes.py"
NUM_LATENTS = 10
GRID = (8, 8, 8)
# Every flag of the published command line, word for word, with tiny values.
FLAGS = (
    "--loss-type l1 --volume-channels 4 --timesteps 1000 --model-dim 24 --dim-mults 1 1 2 --use-attn 0 0 1 "
    "--patch-size 1 --num-dit 1 --model BiFlowNet --num-classes 2 --epochs 1000 --global-seed 0 --num-workers 0 "
    "--batch-size 2 --resolution 8 8 8 --log-every 1 --ckpt-every 2 --vq-size 64"
).split()
OVERRIDES = "max_steps=6 resnet_groups=8 dit_num_heads=4 attn_heads=2 preview=false device=cpu".split()


def make_latents(root: Path, grid: tuple[int, int, int] = GRID, channels: int = 4) -> Path:
    """Two classes of random latents below `root`; returns their JSON."""
    generator = torch.Generator().manual_seed(0)
    for index in range(NUM_LATENTS):
        latent = torch.rand((channels, *grid), generator=generator) * 2 - 1
        write_latent(root / f"class{index % 2}_latents" / f"{index}.nii.gz", latent)
    path = root / "latents.json"
    path.write_text(json.dumps({str(label): f"class{label}_latents" for label in range(2)}))
    return path


def write_records(data: Path, fingerprint: str) -> None:
    """Say in each latent folder that the autoencoder of this fingerprint made it."""
    for folder in data.parent.glob("*_latents"):
        (folder / "latents.json").write_text(json.dumps({"autoencoder": fingerprint, "checkpoint": "some.ckpt"}))


def arguments(data: Path, results: Path, *overrides: str) -> list[str]:
    """A command line; later overrides win over earlier ones and flags win over overrides."""
    return ["--data-path", str(data), "--results-dir", str(results), *FLAGS, *OVERRIDES, *overrides]


def config(data: Path, results: Path, **values) -> DictConfig:
    """The configuration of that command line with some values replaced."""
    cfg = parse_command_line(arguments(data, results), BiFlowNetConfig, "BiFlowNet_8x.yaml", "")
    for name, value in values.items():
        cfg[name] = value
    return cfg


def save_autoencoder(path: Path, cfg: DictConfig | None = None) -> Path:
    """An autoencoder, random, in a checkpoint file as Lightning writes it; without a configuration a tiny one of 4x."""
    torch.manual_seed(0)
    cfg = cfg or tiny_autoencoder()
    autoencoder = patchvolumeAE(cfg)
    autoencoder.codebook.N.fill_(1)  # as if started from data
    autoencoder.codebook.embeddings.normal_()
    save_checkpoint({"state_dict": autoencoder.state_dict(), "hyper_parameters": cfg}, path)
    return path


def checkpoint(run: Path, step: int) -> dict:
    return load_checkpoint(run_folder.checkpoint_path(run, step))


def assert_same_training(first: dict, second: dict) -> None:
    """Two checkpoints have weights, averaged weights, optimiser state and position equal bit for bit."""
    for entry in ("model", "ema"):
        assert first[entry].keys() == second[entry].keys()
        for name, value in first[entry].items():
            assert torch.equal(value, second[entry][name]), (entry, name)
    assert first["opt"]["state"].keys() == second["opt"]["state"].keys()
    for index, state in first["opt"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["opt"]["state"][index][name]), (index, name)
    assert torch.equal(first["rng"]["cpu"], second["rng"]["cpu"])
    for entry in ("scaler", "step", "epoch", "samples_seen"):
        assert first[entry] == second[entry], entry


def crash_at(monkeypatch, step: int) -> None:
    """Let training die with a RuntimeError when it logs this step."""

    def write(self, logged: int, scalars: dict) -> None:
        if logged == step:
            raise RuntimeError("power cut")

    monkeypatch.setattr(MetricsWriter, "write", write)


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """Start a training process, with everything it prints in one pipe and one thread for its arithmetic."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def lone(arguments: list[str]) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


def torchrun(arguments: list[str], num_processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_processes), str(SCRIPT), *arguments]


def two_nodes(arguments: list[str], port: int) -> list[subprocess.Popen]:
    """Two agents on this machine, a process each, that meet as those of two nodes do (docs/slurm/train.sbatch)."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    options = ["--nnodes", "2", "--nproc-per-node", "1", *meeting, "--local-addr", "127.0.0.1"]
    command = [sys.executable, str(ROOT / "train" / "launch.py"), *options, str(SCRIPT), *arguments]
    return [start(command) for _ in range(2)]


def logged_steps(run: Path) -> list[int]:
    """The steps in a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]
