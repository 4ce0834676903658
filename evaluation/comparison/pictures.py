"""Slices of generated volumes beside real ones, and beside the training volumes that are nearest to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid
from dataset.volumes.volume_io import read_header
from evaluation.comparison.features import SetFeatures
from evaluation.comparison.figures import Memorisation, median
from evaluation.comparison.sets import SetVolume
from evaluation.results.results import PICTURES_FOLDER, Panel, Picture


def panel(volume: SetVolume, role: str) -> Panel:
    """The file as it is, for view.html."""
    return Panel(role, str(volume.path.absolute()), volume.intensity_range)


def side_by_side(
    cfg: DictConfig, name: str, stem: str, real: Sequence[SetVolume], generated: Sequence[SetVolume]
) -> Picture:
    """Central slices in three planes, a real volume beside a generated one in each row. stem: `name` for a file."""
    count = min(cfg.num_pictures, len(real), len(generated))
    rows = [(f"{i + 1}", [*_slices(real[i]), *_slices(generated[i])]) for i in range(count)]
    return _save_pairs(cfg, f"real_generated_{stem}", rows, ("real", "generated"), f"{name}: real beside generated")


def nearest_picture(
    cfg: DictConfig, name: str, stem: str, network: str, sets: dict[str, SetFeatures], memory: Memorisation
) -> Picture:
    """The generated volumes that are nearest to a training volume, beside it. stem: `name` for a file."""
    usual = median(memory.held_out)
    rows = []
    for i in memory.generated.argsort()[: cfg.num_pictures].tolist():
        ratio = memory.generated[i].item() / usual if usual else float("nan")
        training = sets["training"].volumes[memory.nearest[i]]
        rows.append((f"{ratio:.2f}", [*_slices(sets["generated"].volumes[i]), *_slices(training)]))
    caption = (
        f"{name}: the generated volumes that are nearest to a training volume (on {network}), beside it; in front "
        "their distance over the median one of held-out real volumes"
    )
    return _save_pairs(cfg, f"nearest_{stem}_{network}", rows, ("generated", "training"), caption)


def _slices(volume: SetVolume) -> list[np.ndarray]:
    spacing = read_header(volume.path).spacing_mm if volume.resample is None else volume.resample.spacing_mm
    return list(central_slices(volume.read(), spacing).values())


def _save_pairs(cfg: DictConfig, stem: str, rows: Sequence, roles: tuple[str, str], caption: str) -> Picture:
    columns = [f"{role}: {plane}" if i == 0 else plane for role in roles for i, plane in enumerate(PLANES)]
    file = f"{PICTURES_FOLDER}/{stem}.png"
    save_slice_grid(Path(cfg.output_dir) / file, rows, columns=columns)
    return Picture(file, caption)
