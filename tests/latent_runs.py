"""Small data sets to encode, tiny autoencoders for it, and the latents of a run, as tests share them."""

import json
from pathlib import Path

import numpy as np
import torch
from configs import tiny_autoencoder
from omegaconf import OmegaConf

from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_files import save_checkpoint
from config.loading import load_config
from config.schema.autoencoder import LatentConfig
from dataset.volumes.volume_io import write_volume


def save_autoencoder(path: Path, seed: int = 0, **dataset) -> Path:
    """A tiny 4x autoencoder with random weights, as a Lightning checkpoint."""
    torch.manual_seed(seed)
    cfg = OmegaConf.merge(tiny_autoencoder(), {"dataset": dataset})
    model = patchvolumeAE(cfg)
    model.codebook.embeddings.normal_()
    model.codebook.N.fill_(1)
    save_checkpoint({"state_dict": model.state_dict(), "hyper_parameters": {"cfg": cfg}}, path)
    return path


def save_volume(path: Path, shape=(16, 16, 16), seed: int = 0, low: float = -1.0) -> Path:
    """A random volume (D, H, W) = `shape` with intensities from `low` to 1."""
    data = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (1 - low) + low
    write_volume(path, data, np.eye(4))
    return path


def save_json(folder: Path, entries: dict) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def make_dataset(folder: Path) -> Path:
    """Two classes of five volumes of three shapes, one of them in a sub-folder, one that has to be padded."""
    save_volume(folder / "CT" / "a.nii.gz", seed=1)
    save_volume(folder / "CT" / "b.nii.gz", (16, 32, 16), seed=2)
    save_volume(folder / "CT" / "late" / "a.nii.gz", seed=3)
    save_volume(folder / "MR" / "a.nii.gz", (16, 20, 16), seed=4)
    save_volume(folder / "MR" / "b.nii.gz", seed=5)
    return save_json(folder, {"0": "CT", "1": "MR"})


def config(data_path, ckpt, **values):
    values = {"num_workers": 0, "device": "cpu", "batch_size": 2, **values}
    return load_config(LatentConfig, None, values={"data_path": str(data_path), "AE_ckpt": str(ckpt), **values})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the latent folders below `folder`, hidden ones included."""
    files = [file for top in folder.rglob("*_latents") for file in top.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
