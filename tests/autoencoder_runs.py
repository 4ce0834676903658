"""Tiny training runs of the autoencoder that tests share."""

import json
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from common.checkpoint_files import load_checkpoint
from config.loading import load_config
from config.schema.autoencoder import AutoencoderConfig
from dataset.volumes.volume_io import write_volume

ROOT = Path(__file__).parents[1]
TINY = [
    "model.n_codes=32",
    "model.lr_schedule=constant",
    "model.disc_channels=4",
    "model.batch_size=2",
    "model.num_workers=0",
    "model.codebook_init_step=0",
    "model.discriminator_iter_start=2",
    "model.log_every=1",
    "model.checkpoint_every=2",
    "model.val_every=3",
    "model.log_volume_every=0",
    "dataset.patch_size=8",
]


def make_data(root: Path) -> Path:
    """Five volumes of 16³ with a bright box, as a dataset JSON."""
    for i in range(5):
        volume = torch.full((1, 16, 16, 16), -1.0)
        volume[:, 2 : 10 + i, 3:14, 2:15] = torch.linspace(-0.5, 0.9, 13)
        write_volume(root / "box" / f"{i}.nii.gz", volume, np.diag([2.0, 2.0, 3.0, 1.0]))
    (root / "data.json").write_text(json.dumps({"box": "box"}))
    return root / "data.json"


def config(data: Path, folder: Path, *overrides: str, stage: int = 1):
    file = ROOT / "config" / "demo" / ("PatchVolume.yaml" if stage == 1 else "PatchVolume_s2.yaml")
    paths = [f"dataset.root_dir={data}", f"model.default_root_dir={folder}"]
    return load_config(AutoencoderConfig, file, [*TINY, *paths, *overrides])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def assert_same_weights(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def with_callback(trainer: pl.Trainer, callback: pl.Callback) -> pl.Trainer:
    trainer.callbacks.append(callback)
    return trainer
