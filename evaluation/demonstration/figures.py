"""The demo's figures, measured on phantoms that were not trained on: a table, demo.json and demo.png.

Features of a volume are those of the fixed random network of volumes (`evaluation/comparison/networks.py`), which sees
texture. Each figure of generated volumes stands beside what as many training phantoms get, as they are (the floor) and
after encoding and decoding (no diffusion model on these latents can be expected to do better).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.model.autoencoder import Autoencoder
from common.errors import UserError
from common.files import write_atomically
from dataset.order.data_split import HELD_OUT, TRAINING, files_of_side
from dataset.preparation.classes import VOLUMES_JSON
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.pictures import save_comparison
from dataset.volumes.volume_io import read_model_volume
from evaluation.comparison.networks import VOLUME, build_networks
from evaluation.comparison.sets import ALL
from evaluation.demonstration.stages import DemoPaths
from evaluation.metrics.distances import frechet_distance, nearest_class_mean
from evaluation.metrics.manifolds import precision_recall_density_coverage

MIN_GENERATED = 16  # volumes, for the figures to be judged
NEIGHBOURS = 5  # of the manifolds of precision and recall, as in evaluation
PICTURED = 3  # volumes of each kind and class in the picture, each in two planes


@dataclass(frozen=True)
class Target:
    """What a figure has to reach: in words, and whether a value does."""

    words: str
    is_reached: Callable[[float], bool]


AT_LEAST_27 = Target("at least 27", lambda value: value >= 27)
AT_LEAST_1 = Target("at least 1", lambda value: value >= 1)
MOSTLY = Target("at least 0.9", lambda value: value >= 0.9)
NEAR = Target("at most 1.4", lambda value: value <= 1.4)
ABOVE_0 = Target("above 0", lambda value: value > 0)


@dataclass(frozen=True)
class DemoFigure:
    """target: None where none is judged."""

    name: str
    value: float
    target: Target | None = None

    @property
    def is_reached(self) -> bool:
        return self.target is None or self.target.is_reached(self.value)


def write_report(paths: DemoPaths, judge: bool) -> bool:
    """Measure, write demo.json and demo.png, print the table; whether all targets were reached.

    judge: False leaves the targets out (a run too short to reach them), and all counts as reached.
    Raises UserError: volumes or checkpoints are missing or unreadable.
    """
    names = list(json.loads((paths.phantoms / "PatchVolume_data.json").read_text()))
    held_out, training = (load_classes(paths.phantoms, side) for side in (HELD_OUT, TRAINING))
    generated = load_generated(paths.generated / "seed_0", names)
    if judge and len(generated[0]) < MIN_GENERATED:
        found = f"{paths.generated}: {len(generated[0])} generated volumes"
        raise UserError(f"{found}, at least {MIN_GENERATED} are needed to judge")
    autoencoder = load_autoencoder(paths.stage2_ckpt)

    figures = reconstruction_figures(paths.evaluation / "reconstruction.json")
    drawn = as_many(training, generated[1])
    sets = {"training phantoms": drawn, "their reconstructions": (reconstruct(autoencoder, drawn[0]), drawn[1])}
    figures += generation_figures(names, held_out, {**sets, "generated": generated})

    content: dict = {f.name: {"value": f.value, "target": f.target.words if f.target else ""} for f in figures}
    counts = {"real, held out": held_out, "generated": generated, "training": training}
    content["volumes"] = {kind: len(volumes) for kind, (volumes, _) in counts.items()}
    write_atomically(paths.output / "demo.json", (json.dumps(content, indent=2) + "\n").encode())
    draw(paths.output / "demo.png", names, held_out, autoencoder, generated)
    print_table(figures, judge)
    return not judge or all(figure.is_reached for figure in figures)


Volumes = tuple[Tensor, Tensor]  # (N, 1, D, H, W) and class ids (N,)


def load_classes(folder: Path, side: str) -> Volumes:
    """The phantoms on a side of the split: volumes (N, 1, D, H, W) in [-1, 1] and class ids (N,)."""
    files = files_of_side(folder / VOLUMES_JSON, side)
    return _load({int(class_id): of_class for class_id, of_class in files.items()})


def load_generated(folder: Path, names: Sequence[str]) -> Volumes:
    """Generated volumes (N, 1, D, H, W) and the class ids that were asked for, (N,)."""
    files = {class_id: sorted(folder.glob(f"{name}_*.nii.gz")) for class_id, name in enumerate(names)}
    if not any(files.values()):
        raise UserError(f"{folder}: no generated volumes")
    return _load(files)


def _load(files: Mapping[int, Sequence[Path]]) -> Volumes:
    volumes = [read_model_volume(path, MODEL_RANGE).data for of_class in files.values() for path in of_class]
    labels = [class_id for class_id, of_class in files.items() for _ in of_class]
    return torch.stack(volumes), torch.tensor(labels)


def reconstruct(autoencoder: Autoencoder, volumes: Tensor) -> Tensor:
    """Whole-volume reconstructions in [-1, 1], one at a time, (N, 1, D, H, W)."""
    return torch.cat([autoencoder.reconstruct(volume[None]).clamp(*MODEL_RANGE) for volume in volumes])


def as_many(volumes: Volumes, like: Tensor) -> Volumes:
    """The first volumes of each class, as many as the class has in `like`, class ids (M,)."""
    data, labels = volumes
    chosen = torch.cat([(labels == label).nonzero().flatten()[: int((like == label).sum())] for label in like.unique()])
    return data[chosen], labels[chosen]


def features(volumes: Tensor) -> Tensor:
    """Of the random network of volumes, (N, 1, D, H, W) -> (N, F)."""
    (network,) = build_networks(["random_3d"], None, 1, torch.device("cpu"))
    with torch.no_grad():
        return torch.cat([network(volume[None])[VOLUME][:, 0] for volume in volumes])


def reconstruction_figures(results: Path) -> list[DemoFigure]:
    """Mean PSNR over the held-out phantoms after both stages, as evaluation found it."""
    found = json.loads(results.read_text(encoding="utf-8"))["figures"]
    psnr = {row["model"]: row["value"] for row in found if (row["metric"], row["group"]) == ("PSNR", ALL)}
    return [
        DemoFigure("PSNR after stage 1, dB", psnr["stage1"]),
        DemoFigure("PSNR after stage 2, dB", psnr["stage2"], AT_LEAST_27),
        DemoFigure("gain of stage 2, dB", psnr["stage2"] - psnr["stage1"], AT_LEAST_1),
    ]


def generation_figures(names: Sequence[str], real: Volumes, sets: Mapping[str, Volumes]) -> list[DemoFigure]:
    """Of each class what sets of as many volumes get against the held-out phantoms.

    names: of the classes. sets: by what they are; the last, "generated", is judged by "their reconstructions".
    """
    real_features, labels = features(real[0]), real[1]
    found = {kind: (features(volumes), of) for kind, (volumes, of) in sets.items()}
    made, asked = found["generated"]
    obtained = nearest_class_mean(real_features, labels, made)
    figures = [DemoFigure("class obtained is the class asked for", (obtained == asked).double().mean().item(), MOSTLY)]
    for label, name in enumerate(names):
        of_real = real_features[labels == label]
        of_kinds = {kind: values[of == label] for kind, (values, of) in found.items()}
        distances = {kind: frechet_distance(of_real, values) for kind, values in of_kinds.items()}
        figures += [DemoFigure(f"{name}, FID-3D: {kind}", value) for kind, value in distances.items()]
        ratio = distances["generated"] / distances["their reconstructions"]
        figures.append(DemoFigure(f"{name}, FID-3D: generated / reconstructions", ratio, NEAR))
        shares = {kind: manifold_shares(of_real, values) for kind, values in of_kinds.items()}
        figures += [
            DemoFigure(f"{name}, {metric}: {kind}", values[metric], judged if kind == "generated" else None)
            for metric, judged in (("precision", ABOVE_0), ("recall", None))
            for kind, values in shares.items()
        ]
    return figures


def manifold_shares(real: Tensor, other: Tensor) -> dict[str, float]:
    """Precision and recall of features (N, F) and (M, F); NaN where a set is too small."""
    if min(len(real), len(other)) <= NEIGHBOURS:
        return {"precision": math.nan, "recall": math.nan}
    found = precision_recall_density_coverage(real, other, NEIGHBOURS)
    return {metric: found[metric].mean().item() for metric in ("precision", "recall")}


def draw(path: Path, names: Sequence[str], real: Volumes, autoencoder: Autoencoder, made: Volumes) -> None:
    """Central axial and coronal slices: per class a row of real, of reconstructed and of generated volumes."""
    rows = []
    for class_id, name in enumerate(names):
        originals = real[0][real[1] == class_id][:PICTURED]
        shown = {"real": originals, "reconstructed": reconstruct(autoencoder, originals)}
        shown["generated"] = made[0][made[1] == class_id][:PICTURED]
        rows += [(f"{name} {kind}", list(volumes)) for kind, volumes in shown.items()]
    save_comparison(path, rows, planes=("axial", "coronal"), title="Phantoms: central slices, not trained on")


def print_table(figures: Sequence[DemoFigure], judge: bool) -> None:
    """The figures on the terminal, with targets where they are judged."""
    table = Table("figure", "value", "target", "", title="Demo, measured on held-out phantoms")
    for figure in figures:
        target = figure.target if judge else None
        verdict = "" if target is None else "reached" if figure.is_reached else "MISSED"
        table.add_row(figure.name, f"{figure.value:.4g}", target.words if target else "", verdict)
    console = Console()
    console.print(table)
    if not judge:
        console.print("Short run: it shows that every stage works; no target is judged.")
