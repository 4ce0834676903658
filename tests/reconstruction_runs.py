"""Evaluations of tiny random autoencoders on made-up volumes, for the tests of evaluation/reconstruction.py."""

import csv
import json
import re
from pathlib import Path

import torch
from generation_models import save_models

from AutoEncoder.model.lpips import TriplanarLPIPS
from common.checkpoint_files import load_checkpoint, save_checkpoint
from config.loading import load_config
from config.schema.evaluation import ReconstructionConfig
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.volume_io import write_volume
from evaluation.autoencoding.measures import METRICS

NAMES = {metric.title: name for name, metric in METRICS.items()}  # title in results -> name in the table of volumes

PATCH = 16  # of the tiny autoencoders
SIZES = {"Chest": [(32, 24, 24), (24, 16, 32), (24, 24, 24)], "Head": [(24, 24, 24)] * 2}  # (D, H, W)
NUM_SCALES = {"Chest": 1, "Head": 2}  # of MS-SSIM
NUM_VOLUMES = 5


def made_up(size: tuple[int, ...], seed: int) -> torch.Tensor:
    """(1, D, H, W) in [-1, 1]: a textured block in background."""
    coarse = torch.randn(1, 1, 6, 6, 6, generator=torch.Generator().manual_seed(seed))
    texture = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")[0].clamp(-0.9, 1)
    volume = torch.full((1, *size), -1.0)
    inner = (0, *(slice(2, extent - 3) for extent in size))
    volume[inner] = texture[inner]
    return volume


def write(path: Path, volume: torch.Tensor) -> Path:
    write_volume(path, volume, affine_from_spacing((1.0, 1.0, 2.0)))
    return path


def save_lpips(folder: Path) -> Path:
    """Random weights of LPIPS in the published formats."""
    torch.manual_seed(0)
    state = TriplanarLPIPS(pretrained=False).lpips.state_dict()
    backbone = {re.sub(r"^net\.slice\d+", "features", name): v for name, v in state.items() if name.startswith("net.")}
    torch.save(backbone, folder / "vgg16-397923af.pth")
    torch.save({name: v.abs() for name, v in state.items() if name.startswith("lin")}, folder / "vgg.pth")
    return folder


def save_data(folder: Path) -> Path:
    """A dataset JSON of two classes."""
    for name, sizes in SIZES.items():
        for i, size in enumerate(sizes):
            write(folder / name / f"scan_{i}.nii.gz", made_up(size, 10 * len(name) + i))
    (folder / "held_out.json").write_text(json.dumps({name: name for name in SIZES}))
    return folder / "held_out.json"


def save_stages(folder: Path) -> list[str]:
    """Two checkpoints; the second has another decoder. Beside the first lies flow.pt, a BiFlowNet."""
    first, second = folder / "stage1" / "last.ckpt", folder / "stage2" / "checkpoints" / "last.ckpt"
    first.parent.mkdir()
    (save_models(first.parent) / "ae.ckpt").rename(first)
    content = load_checkpoint(first)
    generator = torch.Generator().manual_seed(1)
    for name, value in content["state_dict"].items():
        if name.startswith("decoder.") and value.is_floating_point():
            value.add_(0.02 * torch.randn(value.shape, generator=generator))
    save_checkpoint(content, second)
    return [str(first), str(second)]


QUICK = {"num_workers": 0, "num_resamples": 20, "num_pictures": 0}


def config(data: Path | None, checkpoints: list[str], output_dir: Path | None, **values):
    folders = {"data": data and str(data), "output_dir": output_dir and str(output_dir)}
    given = {**folders, "AE_ckpt": checkpoints, "device": "cpu"}
    return load_config(ReconstructionConfig, None, values={**given, **QUICK, **values})


def content_of(folder: Path) -> dict:
    return json.loads((folder / "reconstruction.json").read_text())


def figures(folder: Path) -> dict[tuple[str, str, str], dict]:
    """By (group, name of the metric in the table of volumes, model)."""
    found = content_of(folder)["figures"]
    return {(figure["group"], NAMES[figure["metric"]], figure["model"]): figure for figure in found}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "reconstruction_volumes.csv").open() as file:
        return list(csv.DictReader(file))
