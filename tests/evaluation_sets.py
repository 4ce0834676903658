"""Small sets of volumes for tests of evaluation: folders and dataset JSONs of random blobs, and configs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.processes import Distributed, choose_device
from config.loading import load_config
from config.schema.evaluation import ValidityConfig
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.volume_io import write_volume
from evaluation.comparison import features as feature_extraction
from evaluation.comparison import pairs as pair_similarity
from evaluation.generation_metrics import main
from evaluation.metrics.units import Units
from evaluation.results.results import read_results

PLACE = Distributed(0, 0, 1, choose_device("cpu"))


def blob(seed: int, size: int = 16, blur: float = 0.0) -> np.ndarray:
    """(D, H, W) in [-1, 1]: an ellipsoid with texture on background -1; every seed another one."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij")
    centre, radii = rng.uniform(-0.15, 0.15, 3), rng.uniform(0.6, 0.85, 3)
    inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) < 1
    texture = rng.uniform(0.2, 0.4) + 0.2 * rng.standard_normal(inside.shape) * (1 - blur)
    return np.where(inside, texture, -1).clip(-1, 1).astype(np.float32)


def write_set(folder: Path, seeds, spacing=(1.0, 1.0, 1.0), size: int = 16, blur: float = 0.0) -> Path:
    """One file for each seed."""
    for seed in seeds:
        write_volume(folder / f"v{seed:03d}.nii.gz", blob(seed, size, blur), affine_from_spacing(spacing))
    return folder


def write_three(folder: Path) -> Path:
    """Folders real, generated and training, of 8, 6 and 7 volumes."""
    for name, seeds in (("real", range(8)), ("generated", range(20, 26)), ("training", range(40, 47))):
        write_set(folder / name, seeds)
    return folder


def own(real: Sequence[int], generated: Sequence[int]) -> tuple[Units, Units]:
    """Units of sets of so many volumes of each class, each of a subject of its own."""
    return Units.own(*real), Units.own(*generated)


def write_json(path: Path, **folders: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: str(folder) for name, folder in folders.items()}))
    return path


def write_record(volume: Path, class_id: int, class_name: str, **more) -> None:
    """The JSON beside a generated volume, as far as evaluation reads it."""
    path = volume.with_name(volume.name.removesuffix(".nii.gz") + ".json")
    path.write_text(json.dumps({"class_id": class_id, "class_name": class_name, **more}))


FAST_VALUES = {"num_workers": 0, "device": "cpu", "num_resamples": 20, "num_halvings": 2, "slices": 2, "num_pairs": 6}


def validity_config(tmp_path: Path, **values):
    values = {"output_dir": tmp_path / "out", **values}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return load_config(ValidityConfig, None, values={**FAST_VALUES, **plain})


FAST = "--num-workers 0 --device cpu --num-resamples 20 --num-halvings 2 --slices 2 --num-pairs 6".split()


def run_metrics(tmp_path: Path, *more: str) -> dict:
    words = ["--real", tmp_path / "real", "--generated", tmp_path / "generated", "--output-dir", tmp_path / "out"]
    main([*map(str, words), *FAST, *map(str, more)])
    return read_results(tmp_path / "out" / "generation.json")


def counted(monkeypatch) -> list[int]:
    """Numbers of volumes or pairs that networks and MS-SSIM were given."""
    sizes = []
    for module, name in ((feature_extraction, "compute_features"), (pair_similarity, "_compare_pairs")):
        original = getattr(module, name)

        def count(*args, original=original):
            sizes.append(len(args[-1]))
            return original(*args)

        monkeypatch.setattr(module, name, count)
    return sizes
