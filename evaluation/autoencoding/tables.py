"""What an evaluation of autoencoders found, as files: tables, pictures, warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from AutoEncoder.model.lpips import MIN_EXTENT
from common.log import get_logger
from common.processes import device_name
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.pictures import PLANES, Coloured, central_slices, save_slice_grid, with_square_pixels
from evaluation.autoencoding.measures import METRICS, VOLUME_METRICS, summarise
from evaluation.autoencoding.plan import ROLE, Plan
from evaluation.comparison.pictures import panel
from evaluation.comparison.sets import ALL, Group, units_of
from evaluation.metrics.intervals import FEWEST
from evaluation.metrics.reconstruction import WINDOW_EDGE
from evaluation.report_page.view import VIEW_NAME, write_view
from evaluation.results.results import (
    PICTURES_FOLDER,
    Beside,
    Panel,
    Picture,
    Results,
    TextTable,
    Warned,
    file_names,
    write_csv,
)
from evaluation.results.work import Arrays

FEW_SUBJECTS = 10
DIFFERENCE_SHOWN = 0.5  # end of the scale in pictures, the same in all of them

Measured = dict[str, dict[str, list[Arrays]]]  # group -> model -> arrays of each volume


def write_results(
    cfg: DictConfig,
    plan: Plan,
    groups: Sequence[Group],
    excluded: Mapping[Path, str],
    measured: Measured,
    shown: Mapping[tuple[str, Path], str],
    device: torch.device,
) -> Results:
    """Writes everything into the output folder. shown: reconstructions by checkpoint and original. device: of these."""
    scales = {group.name: plan.num_scales(group) for group in groups}
    settings = OmegaConf.to_container(cfg, resolve=True)
    settings["checkpoints"] = [asdict(checkpoint) for checkpoint in plan.checkpoints]
    settings |= {"device": device_name(device), "lpips_weights": plan.lpips, "num_scales": scales}
    results = Results("reconstruction", settings, {}, warnings=[*plan.warnings, *size_warnings(plan, groups)])
    for group in groups:
        units = units_of(group.sets[ROLE])
        figures, notes = summarise(group.name, measured[group.name], units, cfg.num_resamples, cfg.seed)
        results.figures += figures
        results.warnings += notes
    if len(groups) > 1:
        together, notes = all_classes(plan, groups, measured)
        units = units_of(*(group.sets[ROLE] for group in groups))
        results.figures += summarise(ALL, together, units, cfg.num_resamples, cfg.seed)[0]
        results.warnings += notes
    results.definitions = definitions({figure.metric for figure in results.figures}, scales)
    results.excluded = [{"file": str(path), "reason": reason} for path, reason in excluded.items()]
    columns = ("model", "checkpoint", "SHA-256", "compression", "patch edge", "codes")
    rows = [(c.name, c.path, c.sha256, f"{c.compression}x", c.patch_size, c.n_codes) for c in plan.checkpoints]
    results.tables = [TextTable("Autoencoders", columns, rows)]
    folder = Path(cfg.output_dir)
    write_volumes(folder / "reconstruction_volumes.csv", groups, measured)
    if cfg.num_pictures:
        results.pictures = draw(folder, plan, groups, measured, cfg.num_pictures)
        results.volumes = [
            Beside(
                f"{group.name}: {volume.path.name}",
                [
                    panel(volume, "original"),
                    *(Panel(c.name, shown[c.name, volume.path], MODEL_RANGE) for c in plan.checkpoints),
                ],
            )
            for group in groups
            for volume in group.sets[ROLE][: cfg.num_pictures]
        ]
        write_view(folder / VIEW_NAME, results.volumes, "Reconstruction")
    path = results.write(folder)
    for warning in results.warnings:
        get_logger().warning(warning)
    get_logger().info("%d figures in %s", len(results.figures), path)
    return results


def all_classes(plan: Plan, groups: Sequence[Group], measured: Measured) -> tuple[dict[str, list[Arrays]], list[str]]:
    """The arrays of all classes by model, class after class, and notes.

    MS-SSIM is left out where classes have different numbers of scales: their values don't compare.
    """
    together = {model: [] for model in next(iter(measured.values()))}
    for of_group in measured.values():
        for model, arrays in of_group.items():
            together[model] += arrays
    if len({plan.num_scales(group) for group in groups}) == 1:
        return together, []
    title = METRICS["ms_ssim"].title
    without = {model: [{**one, "ms_ssim": np.asarray(np.nan)} for one in arrays] for model, arrays in together.items()}
    return without, [f"{ALL}: {title} left out: classes differ in the number of its scales, by their smallest volume"]


def size_warnings(plan: Plan, groups: Sequence[Group]) -> list[str]:
    """What the number and the sizes of volumes make of the results."""
    warnings = []
    for group in groups:
        units = units_of(group.sets[ROLE])
        if units.num_subjects < FEW_SUBJECTS:
            meaning = f" are few (below {FEW_SUBJECTS}), intervals are rough, of less than {FEWEST} there are none"
            warnings.append(Warned(group.name, units.said(), meaning))
        side = plan.shortest_side(group)
        for name, needed in (("SSIM and MS-SSIM", WINDOW_EDGE), ("LPIPS", MIN_EXTENT if plan.lpips else 0)):
            if side < needed:
                found = f"{name} left out: a volume has a side of {side} voxels"
                warnings.append(Warned(group.name, found, f", {needed} are needed"))
    return warnings


def definitions(names: set[str], scales: Mapping[str, int | None]) -> dict[str, str]:
    """What the metrics with figures are here."""
    found = {metric.title: metric.definition for metric in METRICS.values() if metric.title in names}
    title = METRICS["ms_ssim"].title
    if title in found:
        shown = ", ".join(f"{group} {count}" for group, count in scales.items() if count is not None)
        found[title] += f"; scales, as the smallest volume of a class allows: {shown}"
    return found


def write_volumes(path: Path, groups: Sequence[Group], measured: Measured) -> None:
    """One line per volume and checkpoint."""
    rows: list[list[object]] = []
    for group in groups:
        for i, volume in enumerate(group.sets[ROLE]):
            for model, arrays in measured[group.name].items():
                rows.append([group.name, volume.path, model, *(float(arrays[i][name]) for name in VOLUME_METRICS)])
    write_csv(path, ("group", "file", "model", *VOLUME_METRICS), rows)


def draw(folder: Path, plan: Plan, groups: Sequence[Group], measured: Measured, count: int) -> list[Picture]:
    """One picture of each group: volume by volume a row of the original and one of each model, with differences."""
    pictures = []
    coloured = Coloured(len(PLANES), (0.0, DIFFERENCE_SHOWN), "absolute difference (volumes in -1 ... 1)")
    columns = [*PLANES, *(f"difference: {plane}" for plane in PLANES)]
    for group, name in zip(groups, file_names([group.name for group in groups]), strict=True):
        rows = []
        for i, volume in enumerate(group.sets[ROLE][:count]):
            spacing_mm = plan.grids[volume.path].spacing_mm
            original = list(central_slices(volume.read(), spacing_mm).values())
            rows.append((f"{volume.path.name.removesuffix('.nii.gz')}\noriginal", original))
            for model, of_model in measured[group.name].items():
                slices = {plane: of_model[i][plane].astype(np.float32) for plane in PLANES}
                found = list(with_square_pixels(slices, spacing_mm).values())
                rows.append((model, [*found, *(np.abs(x - y) for x, y in zip(original, found, strict=True))]))
        file = f"{PICTURES_FOLDER}/reconstruction_{name}.png"
        save_slice_grid(folder / file, rows, columns=columns, coloured=coloured)
        caption = (
            f"{group.name}: {', '.join(PLANES)} slices through the middle of each original, below it the "
            f"reconstructions by {', '.join(measured[group.name])} with their absolute differences from it"
        )
        pictures.append(Picture(file, caption))
    return pictures
