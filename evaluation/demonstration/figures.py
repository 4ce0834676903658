"""The demo's figures, measured on phantoms that were not trained on: a table, demo.json and demo.png.

Features of a volume are its means over 8³ blocks, a vector of 512. The distance of two sets of volumes is the unbiased
MMD with an RBF kernel on these; its bandwidth is the median distance within the real set, the same for all sets.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.decoding import decode
from AutoEncoder.model.autoencoder import Autoencoder
from common.errors import UserError
from common.files import write_atomically
from dataset.order.data_split import HELD_OUT, TRAINING, files_of_side
from dataset.preparation.classes import VOLUMES_JSON
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.pictures import save_comparison
from dataset.volumes.volume_io import read_model_volume
from evaluation.metrics.distances import median_bandwidth, mmd_rbf, nearest_class_mean
from evaluation.metrics.reconstruction import psnr

FEATURE_GRID = 8
MIN_GENERATED = 16  # volumes, for the figures to be judged
PICTURED = 3  # volumes of each kind and class in the picture, each in two planes
TARGETS = {  # of some figures: in words, and whether a value reaches it
    "PSNR after stage 2, dB": ("at least 26", lambda value: value >= 26),
    "gain of stage 2, dB": ("at least 1", lambda value: value >= 1),
    "class obtained is the class asked for": ("at least 0.9", lambda value: value >= 0.9),
    "generated / decoded noise": ("at most 0.333", lambda value: value <= 1 / 3),
}


def write_report(output: Path, phantoms: Path, stage_checkpoints: Sequence[Path], generated: Path, judge: bool) -> bool:
    """Measure, write demo.json and demo.png into `output`, print the table; whether all targets were reached.

    phantoms: folder of dataset/phantoms.py, whose split says which are held out. stage_checkpoints: autoencoder after
    each stage. generated: folder of the generated volumes, `CLASS_…nii.gz`. judge: False leaves the targets out (a run
    too short to reach them), and all counts as reached.
    Raises UserError: volumes or checkpoints are missing or unreadable.
    """
    names = list(json.loads((phantoms / "PatchVolume_data.json").read_text()))
    real, labels = load_classes(phantoms, HELD_OUT)
    training, _ = load_classes(phantoms, TRAINING)
    made, asked = load_generated(generated, names)
    if judge and len(made) < MIN_GENERATED:
        raise UserError(f"{generated}: {len(made)} generated volumes, at least {MIN_GENERATED} are needed to judge")
    before, after = (load_autoencoder(path) for path in stage_checkpoints)

    reconstructed = reconstruct(after, real)
    figures = reconstruction_figures(real, reconstruct(before, real), reconstructed)
    figures |= generation_figures(real, labels, training, made, asked, decoded_noise(after, made))
    targets = TARGETS if judge else {}

    words = {name: targets[name][0] if name in targets else "" for name in figures}
    content = {name: {"value": value, "target": words[name]} for name, value in figures.items()}
    content["volumes"] = {"real, held out": len(real), "generated": len(made), "training": len(training)}
    write_atomically(output / "demo.json", (json.dumps(content, indent=2) + "\n").encode())
    draw(output / "demo.png", names, (real, labels), reconstructed, (made, asked))
    passed = {name: is_reached(figures[name]) for name, (_, is_reached) in targets.items()}
    print_table(figures, words, passed)
    return all(passed.values())


def load_classes(folder: Path, side: str) -> tuple[Tensor, Tensor]:
    """The phantoms on a side of the split: volumes (N, 1, D, H, W) in [-1, 1] and class ids (N,)."""
    files = files_of_side(folder / VOLUMES_JSON, side)
    return _load({int(class_id): of_class for class_id, of_class in files.items()})


def load_generated(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Generated volumes (N, 1, D, H, W) and the class ids that were asked for, (N,)."""
    files = {class_id: sorted(folder.glob(f"{name}_*.nii.gz")) for class_id, name in enumerate(names)}
    if not any(files.values()):
        raise UserError(f"{folder}: no generated volumes")
    return _load(files)


def _load(files: Mapping[int, Sequence[Path]]) -> tuple[Tensor, Tensor]:
    volumes = [read_model_volume(path, MODEL_RANGE).data for of_class in files.values() for path in of_class]
    labels = [class_id for class_id, of_class in files.items() for _ in of_class]
    return torch.stack(volumes), torch.tensor(labels)


def reconstruct(autoencoder: Autoencoder, volumes: Tensor) -> Tensor:
    """Whole-volume reconstructions in [-1, 1], one at a time, (N, 1, D, H, W)."""
    return torch.cat([autoencoder.reconstruct(volume[None]).clamp(*MODEL_RANGE) for volume in volumes])


def decoded_noise(autoencoder: Autoencoder, like: Tensor) -> Tensor:
    """As many volumes as `like` that the decoder makes of standard normal noise: what an untrained model would give."""
    grid = [extent // autoencoder.downsample_factor for extent in like.shape[-3:]]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(like), autoencoder.embedding_dim, *grid, generator=generator)
    return torch.stack([decode(autoencoder, z) for z in noise])


def features(volumes: Tensor) -> Tensor:
    """Means over 8³ blocks, (N, 1, D, H, W) -> (N, 512)."""
    return F.adaptive_avg_pool3d(volumes, FEATURE_GRID).flatten(1)


def distance_to_real(real_features: Tensor, other_features: Tensor) -> float:
    """Unbiased MMD of two sets of features; its bandwidth depends on the real set alone."""
    bandwidth = median_bandwidth(*real_features.chunk(2))  # pooled again: every pair of the real set, once
    return mmd_rbf(real_features, other_features, bandwidth=bandwidth)


def reconstruction_figures(real: Tensor, before: Tensor, after: Tensor) -> dict[str, float]:
    """Mean PSNR over the held-out phantoms after both stages."""
    stage1, stage2 = (sum(map(psnr, x_hat, real)) / len(real) for x_hat in (before, after))
    return {"PSNR after stage 1, dB": stage1, "PSNR after stage 2, dB": stage2, "gain of stage 2, dB": stage2 - stage1}


def generation_figures(
    real: Tensor, labels: Tensor, training: Tensor, made: Tensor, asked: Tensor, noise: Tensor
) -> dict[str, float]:
    """Whether the class asked for is the class obtained, and distances to the held-out phantoms."""
    real_features = features(real)
    obtained = nearest_class_mean(real_features, labels, features(made))
    distances = [distance_to_real(real_features, features(x)) for x in (made, noise, training)]
    return {
        "class obtained is the class asked for": (obtained == asked).double().mean().item(),
        "distance to real: generated": distances[0],
        "distance to real: decoded noise": distances[1],
        "distance to real: training phantoms": distances[2],
        "generated / decoded noise": distances[0] / distances[1],
    }


def draw(path: Path, names: Sequence[str], real, reconstructed: Tensor, made) -> None:
    """Central axial and coronal slices: per class a row of real, of reconstructed and of generated volumes."""
    rows = []
    for class_id, name in enumerate(names):
        chosen = (real[1] == class_id).nonzero().flatten()[:PICTURED]
        generated = made[0][made[1] == class_id][:PICTURED]
        shown = {"real": real[0][chosen], "reconstructed": reconstructed[chosen], "generated": generated}
        rows += [(f"{name} {kind}", list(volumes)) for kind, volumes in shown.items()]
    save_comparison(path, rows, planes=("axial", "coronal"), title="Phantoms: central slices, not trained on")


def print_table(figures: Mapping[str, float], targets: Mapping[str, str], passed: Mapping[str, bool]) -> None:
    """The figures with their targets on the terminal; none is judged where `passed` is empty."""
    table = Table("figure", "value", "target", "", title="Demo, measured on held-out phantoms")
    for name, value in figures.items():
        verdict = {True: "reached", False: "MISSED", None: ""}[passed.get(name)]
        table.add_row(name, f"{value:.4g}", targets[name], verdict)
    console = Console()
    console.print(table)
    if not passed:
        console.print("Short run: it shows that every stage works; no target is judged.")
