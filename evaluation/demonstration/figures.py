"""The demo's figures, measured on phantoms that were not trained on: a table, demo.json and demo.png.

Features of a volume are its means over 8³ blocks, a vector of 512. The distance of two sets of volumes is the unbiased
MMD with an RBF kernel on these; its bandwidth is the median distance within the real set, the same for all sets.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.latents import denormalise_latents
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.errors import UserError
from common.files import write_atomically
from dataset.volumes.index import read_class_json
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.volume_io import read_model_volume
from evaluation.metrics.distances import median_bandwidth, mmd_rbf, nearest_class_mean
from evaluation.metrics.reconstruction import psnr
from evaluation.results.pictures import save_comparison

FEATURE_GRID = 8
MIN_GENERATED = 16  # volumes, for the figures to be judged
PICTURED = 4  # volumes of each kind and class in the picture


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    target: str = ""
    passed: bool = True


def write_report(
    output: Path, *, phantoms: Path, stage_checkpoints: Sequence[Path], generated: Path, judge: bool
) -> bool:
    """Measure, write demo.json and demo.png into `output`, print the table.

    Args:
        output: folder of the demo.
        phantoms: folder of dataset/phantoms.py, with held_out/ in it.
        stage_checkpoints: autoencoder after stage 1 and after stage 2.
        generated: folder of the generated volumes, `CLASS_…nii.gz`.
        judge: False leaves the targets out (a run too short to reach them).

    Returns:
        Whether all targets were reached; True without `judge`.

    Raises:
        UserError: volumes or checkpoints are missing or unreadable.
    """
    names = list(json.loads((phantoms / "PatchVolume_data.json").read_text()))
    real, labels = load_classes(phantoms / "held_out")
    training, _ = load_classes(phantoms)
    made, asked = load_generated(generated, names)
    if judge and len(made) < MIN_GENERATED:
        raise UserError(f"{generated}: {len(made)} generated volumes, at least {MIN_GENERATED} are needed to judge")
    before, after = (load_autoencoder(path) for path in stage_checkpoints)

    reconstructed = reconstruct(after, real)
    figures = reconstruction_figures(real, reconstruct(before, real), reconstructed)
    figures += generation_figures(real, labels, training, made, asked, decoded_noise(after, made))
    if not judge:
        figures = [Figure(figure.name, figure.value) for figure in figures]

    content = {figure.name: {"value": figure.value, "target": figure.target} for figure in figures}
    content["volumes"] = {"real, held out": len(real), "generated": len(made), "training": len(training)}
    write_atomically(output / "demo.json", (json.dumps(content, indent=2) + "\n").encode())
    draw(output / "demo.png", names, (real, labels), reconstructed, (made, asked))
    print_table(figures, judge)
    return all(figure.passed for figure in figures)


def load_classes(folder: Path) -> tuple[Tensor, Tensor]:
    """All phantoms below `folder`: volumes (N, 1, D, H, W) in [-1, 1] and class ids (N,)."""
    classes = read_class_json(folder / "Singleres_dataset.json")
    pairs = [(path, class_id) for class_id, files in classes.items() for path in files]
    volumes = torch.stack([read_model_volume(path, MODEL_RANGE).data for path, _ in pairs])
    return volumes, torch.tensor([class_id for _, class_id in pairs])


def load_generated(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Generated volumes (N, 1, D, H, W) and the class ids that were asked for, (N,)."""
    pairs = [(path, i) for i, name in enumerate(names) for path in sorted(folder.glob(f"{name}_*.nii.gz"))]
    if not pairs:
        raise UserError(f"{folder}: no generated volumes")
    volumes = torch.stack([read_model_volume(path, MODEL_RANGE).data for path, _ in pairs])
    return volumes, torch.tensor([class_id for _, class_id in pairs])


def reconstruct(autoencoder: patchvolumeAE, volumes: Tensor) -> Tensor:
    """Whole-volume reconstructions in [-1, 1], one at a time, (N, 1, D, H, W)."""
    return torch.cat([autoencoder.reconstruct(volume[None]).clamp(*MODEL_RANGE) for volume in volumes])


@torch.no_grad()
def decoded_noise(autoencoder: patchvolumeAE, like: Tensor) -> Tensor:
    """As many volumes as `like` that the decoder makes of standard normal noise: what an untrained model would give."""
    grid = [extent // autoencoder.downsample_factor for extent in like.shape[-3:]]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(like), 1, autoencoder.embedding_dim, *grid, generator=generator)
    vectors = autoencoder.codebook.embeddings
    return torch.cat([autoencoder.decode(denormalise_latents(z, vectors)).clamp(*MODEL_RANGE) for z in noise])


def features(volumes: Tensor) -> Tensor:
    """Means over 8³ blocks, (N, 1, D, H, W) -> (N, 512)."""
    return F.adaptive_avg_pool3d(volumes, FEATURE_GRID).flatten(1)


def distance_to_real(real_features: Tensor, other_features: Tensor) -> float:
    """Unbiased MMD of two sets of features; its bandwidth depends on the real set alone."""
    bandwidth = median_bandwidth(*real_features.chunk(2))  # pooled again: every pair of the real set, once
    return mmd_rbf(real_features, other_features, bandwidth=bandwidth)


def reconstruction_figures(real: Tensor, before: Tensor, after: Tensor) -> list[Figure]:
    """Mean PSNR over the held-out phantoms after both stages."""
    stage1, stage2 = (sum(map(psnr, x_hat, real)) / len(real) for x_hat in (before, after))
    gain = stage2 - stage1
    return [
        Figure("PSNR after stage 1, dB", stage1),
        Figure("PSNR after stage 2, dB", stage2, "at least 26", stage2 >= 26),
        Figure("gain of stage 2, dB", gain, "at least 1", gain >= 1),
    ]


def generation_figures(
    real: Tensor, labels: Tensor, training: Tensor, made: Tensor, asked: Tensor, noise: Tensor
) -> list[Figure]:
    """Whether the class asked for is the class obtained, and distances to the held-out phantoms."""
    real_features = features(real)
    obtained = nearest_class_mean(real_features, labels, features(made))
    accuracy = (obtained == asked).double().mean().item()
    distances = [distance_to_real(real_features, features(x)) for x in (made, noise, training)]
    ratio = distances[0] / distances[1]
    return [
        Figure("class obtained is the class asked for", accuracy, "at least 0.9", accuracy >= 0.9),
        Figure("distance to real: generated", distances[0]),
        Figure("distance to real: decoded noise", distances[1]),
        Figure("distance to real: training phantoms", distances[2]),
        Figure("generated / decoded noise", ratio, "at most 0.333", ratio <= 1 / 3),
    ]


def draw(path: Path, names: Sequence[str], real, reconstructed: Tensor, made) -> None:
    """Central axial and coronal slices: per class a row of real, of reconstructed and of generated volumes."""
    rows = []
    for class_id, name in enumerate(names):
        chosen = (real[1] == class_id).nonzero().flatten()[:PICTURED]
        generated = made[0][made[1] == class_id][:PICTURED]
        rows.append((f"{name} real", list(real[0][chosen])))
        rows.append((f"{name} reconstructed", list(reconstructed[chosen])))
        rows.append((f"{name} generated", list(generated)))
    save_comparison(path, rows, planes=("axial", "coronal"), title="Phantoms: central slices, not trained on")


def print_table(figures: Sequence[Figure], judge: bool) -> None:
    """The figures with their targets on the terminal."""
    table = Table(title="Demo, measured on held-out phantoms")
    for heading in ("figure", "value", "target", ""):
        table.add_column(heading)
    for figure in figures:
        verdict = ("reached" if figure.passed else "MISSED") if figure.target else ""
        table.add_row(figure.name, f"{figure.value:.4g}", figure.target, verdict)
    console = Console()
    console.print(table)
    if not judge:
        console.print("Short run: it shows that every stage works; no target is judged.")
