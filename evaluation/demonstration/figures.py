"""The demo's figures, measured on phantoms that were not trained on: a table, demo.json and demo.png.

Features of a volume are those of the fixed random network of volumes (`evaluation/comparison/networks.py`), which sees
texture. Each figure of generated volumes stands beside what as many training phantoms get, as they are (the floor) and
after encoding and decoding (no diffusion model on these latents can be expected to do better).
"""

import json
import math
from collections import defaultdict
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
from dataset.preparation.classes import AUTOENCODER_JSON
from dataset.volumes.geometry import size_text
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
PICTURED = 3  # volumes of each kind in the picture, each in two planes


@dataclass(frozen=True)
class Target:
    """What a figure has to reach: in words, and whether a value does."""

    words: str
    is_reached: Callable[[float], bool]


AT_LEAST_27 = Target("at least 27", lambda value: value >= 27)
AT_LEAST_1 = Target("at least 1", lambda value: value >= 1)
MOSTLY = Target("at least 0.9", lambda value: value >= 0.9)
NEAR = Target("at most 1.4", lambda value: value <= 1.4)
AT_LEAST_95 = Target("at least 0.95", lambda value: value >= 0.95)
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


Kind = tuple[str, str]  # class name and size in voxels, XxYxZ
Volumes = dict[Kind, Tensor]  # (N, 1, D, H, W) in [-1, 1] of each kind


def write_report(paths: DemoPaths, judge: bool) -> bool:
    """Measure, write demo.json and demo.png, print the table; whether all targets were reached.

    judge: False leaves the targets out (a run too short to reach them), and all counts as reached.
    Raises UserError: volumes or checkpoints are missing or unreadable.
    """
    held_out, training = (load_side(paths.phantoms / AUTOENCODER_JSON, side) for side in (HELD_OUT, TRAINING))
    generated = load_generated(paths.generated / "seed_0", list(dict.fromkeys(name for name, _ in held_out)))
    for kind in held_out:
        found = len(generated.get(kind, ()))
        if found == 0 or (judge and found < MIN_GENERATED):
            raise UserError(
                f"{paths.generated}: {found} generated volumes of {' '.join(kind)}, at least "
                f"{MIN_GENERATED if judge else 1} are needed"
            )
    autoencoder = load_autoencoder(paths.stage2_ckpt)

    figures = reconstruction_figures(paths.evaluation / "reconstruction.json")
    drawn = {kind: volumes[: len(generated[kind])] for kind, volumes in training.items()}
    reconstructed = {kind: reconstruct(autoencoder, volumes) for kind, volumes in drawn.items()}
    sets = {"training phantoms": drawn, "their reconstructions": reconstructed, "generated": generated}
    figures += generation_figures(held_out, sets)

    content: dict = {f.name: {"value": f.value, "target": f.target.words if f.target else ""} for f in figures}
    counts = {"real, held out": held_out, "generated": generated, "training": training}
    content["volumes"] = {what: sum(map(len, volumes.values())) for what, volumes in counts.items()}
    write_atomically(paths.output / "demo.json", (json.dumps(content, indent=2) + "\n").encode())
    draw(paths.output / "demo.png", held_out, autoencoder, generated)
    print_table(figures, judge)
    return not judge or all(figure.is_reached for figure in figures)


def load_side(dataset_json: Path, side: str) -> Volumes:
    """The phantoms on a side of the split."""
    return _load(files_of_side(dataset_json, side))


def load_generated(folder: Path, names: Sequence[str]) -> Volumes:
    """Generated volumes, by the classes that were asked for."""
    files = {name: sorted(folder.glob(f"{name}_*.nii.gz")) for name in names}
    if not any(files.values()):
        raise UserError(f"{folder}: no generated volumes")
    return _load(files)


def _load(files: Mapping[str, Sequence[Path]]) -> Volumes:
    found: dict[Kind, list[Tensor]] = defaultdict(list)
    for name, of_class in files.items():
        for path in of_class:
            volume = read_model_volume(path, MODEL_RANGE)
            found[name, size_text(volume.header.shape)].append(volume.data)
    return {kind: torch.stack(volumes) for kind, volumes in found.items()}


def reconstruct(autoencoder: Autoencoder, volumes: Tensor) -> Tensor:
    """Whole-volume reconstructions in [-1, 1], one at a time, (N, 1, D, H, W)."""
    return torch.cat([autoencoder.reconstruct(volume[None]).clamp(*MODEL_RANGE) for volume in volumes])


def features(volumes: Volumes) -> dict[Kind, Tensor]:
    """Of the random network of volumes, (N, F) of each kind."""
    (network,) = build_networks(["random_3d"], None, 1, torch.device("cpu"))
    with torch.no_grad():
        return {
            kind: torch.cat([network(volume[None])[VOLUME][:, 0] for volume in of_kind])
            for kind, of_kind in volumes.items()
        }


def reconstruction_figures(results: Path) -> list[DemoFigure]:
    """Mean PSNR over the held-out phantoms after both stages, as evaluation found it."""
    found = json.loads(results.read_text(encoding="utf-8"))["figures"]
    psnr = {row["model"]: row["value"] for row in found if (row["metric"], row["group"]) == ("PSNR", ALL)}
    return [
        DemoFigure("PSNR after stage 1, dB", psnr["stage1"]),
        DemoFigure("PSNR after stage 2, dB", psnr["stage2"], AT_LEAST_27),
        DemoFigure("gain of stage 2, dB", psnr["stage2"] - psnr["stage1"], AT_LEAST_1),
    ]


def generation_figures(real: Volumes, sets: Mapping[str, Volumes]) -> list[DemoFigure]:
    """Of each kind what sets of volumes get against the held-out phantoms.

    sets: by what they are; the last, "generated", is judged by "their reconstructions".
    """
    of_real, found = features(real), {what: features(volumes) for what, volumes in sets.items()}
    right = classes_obtained(of_real, found["generated"])
    figures = [DemoFigure("class obtained is the class asked for", right, MOSTLY)]
    for kind, reals in of_real.items():
        title, of_sets = " ".join(kind), {what: of_kind[kind] for what, of_kind in found.items()}
        distances = {what: frechet_distance(reals, values) for what, values in of_sets.items()}
        figures += [DemoFigure(f"{title}, FID-3D: {what}", value) for what, value in distances.items()]
        ratio = distances["generated"] / distances["their reconstructions"]
        figures.append(DemoFigure(f"{title}, FID-3D: generated / reconstructions", ratio, NEAR))
        shares = {what: manifold_shares(reals, values) for what, values in of_sets.items()}
        figures += [
            DemoFigure(f"{title}, {metric}: {what}", values[metric], judged if what == "generated" else None)
            for metric, judged in (("precision", ABOVE_0), ("recall", None))
            for what, values in shares.items()
        ]
    return figures


def classes_obtained(real: Mapping[Kind, Tensor], generated: Mapping[Kind, Tensor]) -> float:
    """The share of generated volumes that are nearest to the mean of a kind of their class."""
    kinds = list(real)
    labels = torch.cat([torch.full((len(real[kind]),), place) for place, kind in enumerate(kinds)])
    right = []
    for (name, _), values in generated.items():
        nearest = nearest_class_mean(torch.cat(list(real.values())), labels, values)
        right += [kinds[place][0] == name for place in nearest.tolist()]
    return sum(right) / len(right)


def manifold_shares(real: Tensor, other: Tensor) -> dict[str, float]:
    """Precision and recall of features (N, F) and (M, F); NaN where a set is too small."""
    if min(len(real), len(other)) <= NEIGHBOURS:
        return {"precision": math.nan, "recall": math.nan}
    found = precision_recall_density_coverage(real, other, NEIGHBOURS)
    return {metric: found[metric].mean().item() for metric in ("precision", "recall")}


def draw(path: Path, real: Volumes, autoencoder: Autoencoder, made: Volumes) -> None:
    """Central axial and coronal slices: per kind a row of real, of reconstructed and of generated volumes."""
    rows = []
    for kind, volumes in real.items():
        originals = volumes[:PICTURED]
        shown = {"real": originals, "reconstructed": reconstruct(autoencoder, originals)}
        shown["generated"] = made[kind][:PICTURED]
        rows += [(f"{' '.join(kind)} {what}", list(of_row)) for what, of_row in shown.items()]
    save_comparison(path, rows, planes=("axial", "coronal"), title="Phantoms: central slices, not trained on")


def print_table(figures: Sequence[DemoFigure], judge: bool, title: str = "Demo, measured on held-out phantoms") -> None:
    """The figures on the terminal, with targets where they are judged."""
    table = Table("figure", "value", "target", "", title=title)
    for figure in figures:
        target = figure.target if judge else None
        verdict = "" if target is None else "reached" if figure.is_reached else "MISSED"
        table.add_row(figure.name, f"{figure.value:.4g}", target.words if target else "", verdict)
    console = Console()
    console.print(table)
    if not judge:
        console.print("Short run: it shows that every stage works; no target is judged.")
