"""Tiny random models, class tables and configs for tests of generation."""

import argparse
from pathlib import Path

import torch
from configs import tiny_autoencoder

from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_files import save_checkpoint
from config.loading import load_config
from config.schema.diffusion import GenerationConfig
from dataset.preparation.classes import add_classes
from dataset.preparation.manifest import KEYS, Intensity, write_manifest
from dataset.volumes.volume_io import read_volume
from ddpm.checkpoint import build_biflownet

CUBE, WIDE = [8, 8, 8], [8, 16, 24]  # latent grids (z, x, y)
TIMESTEPS = 12
MODEL = {
    "volume_channels": 4,
    "model_dim": 24,
    "dim_mults": [1, 1, 2],
    "use_attn": [0, 0, 1],
    "patch_size": 2,
    "num_classes": 2,
    "resnet_groups": 8,
    "dit_num_heads": 4,
    "attn_heads": 2,
    "timesteps": TIMESTEPS,
}


def row(class_id: int, name: str, *grids: list[int], spacing=(1.0, 1.0, 1.0)) -> dict:
    return {"id": class_id, "name": name, "grids": list(grids), "spacings_mm": [list(spacing)] * len(grids)}


def config(models: Path, output_dir: Path, classes: list[dict] | None = None, **values):
    files = {"AE_ckpt": str(models / "ae.ckpt"), "model_ckpt": str(models / "flow.pt"), "output_dir": str(output_dir)}
    sampling = {"sampling_strategy": "ddim", "ddim_steps": 3, "downsample": 4, "tile": 32, "device": "cpu"}
    classes = [row(0, "Chest", CUBE), row(1, "Head", CUBE)] if classes is None else classes
    return load_config(GenerationConfig, None, values={**files, **MODEL, **sampling, "classes": classes, **values})


def save_models(folder: Path, null_label: bool = False, **autoencoder) -> Path:
    """A tiny 4x autoencoder and a BiFlowNet of two classes with random weights; plain and EMA weights differ."""
    torch.manual_seed(0)
    cfg = tiny_autoencoder(**autoencoder)
    model = patchvolumeAE(cfg)
    model.codebook.embeddings.normal_()
    model.codebook.N.fill_(1)
    save_checkpoint({"state_dict": model.state_dict(), "hyper_parameters": {"cfg": cfg}}, folder / "ae.ckpt")
    flow = build_biflownet(config(folder, folder), null_label)
    with torch.no_grad():
        for parameter in flow.parameters():  # adaLN starts at zero: without this no condition would have an effect
            parameter.add_(0.05 * torch.randn_like(parameter))
    ema = {name: value.clone() for name, value in flow.state_dict().items()}
    plain = {name: value + 0.1 for name, value in ema.items()}
    args = argparse.Namespace(timesteps=TIMESTEPS)
    save_checkpoint({"model": plain, "ema": ema, "args": args, "epoch": 1, "step": 10}, folder / "flow.pt")
    return folder


def voxels(path: Path) -> torch.Tensor:
    return read_volume(path).data


def prepared(folder: Path, **classes: list[Intensity]) -> Path:
    """A dataset JSON of classes 0, 1, ... whose manifests have these intensities."""
    for name, intensities in classes.items():
        (folder / name).mkdir(parents=True)
        entries = [
            {**dict.fromkeys(KEYS, 0), "file": f"{i}", "intensity": one.record()} for i, one in enumerate(intensities)
        ]
        write_manifest(folder / name, entries)
    add_classes(folder, dict(enumerate(classes)))
    return folder / "Singleres_dataset.json"
