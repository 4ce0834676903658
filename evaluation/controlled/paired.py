"""Figures of generated volumes against their truths, volume by volume.

Models are "condition" (the baseline); "condition, agreeing" (where something was measured: the condition made to agree
with it, as `data_consistency` does, without any network); "generated"; and "autoencoder" (the truth encoded and
decoded, the best to expect of these latents without data consistency). Differences are from the condition.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.model.lpips import MIN_EXTENT, TriplanarLPIPS
from common.errors import UserError
from common.files import check_writable
from common.log import get_logger
from common.places import is_file
from common.processes import device_name, joined
from common.progress import tracked
from config.loading import SAVED_CONFIG, read_config_file, require
from dataset.degradation.degrading import read_measurement
from dataset.order.data_split import parse_side
from dataset.volumes.index import VOLUME_SUFFIX, read_json_object
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.volume_io import read_model_volume, tensor_to_nifti
from evaluation.autoencoding.measures import METRICS, lpips_of, volume_figures
from evaluation.autoencoding.plan import find_lpips, load_lpips
from evaluation.controlled.conditions import Condition, list_conditions
from evaluation.controlled.consistency import agreeing
from evaluation.metrics.reconstruction import WINDOW_EDGE, l1, ms_ssim, num_scales_of, psnr, ssim
from evaluation.metrics.units import Units
from evaluation.results.results import Beside, Panel, Results, Warned, write_csv
from evaluation.results.scales import make_figure

KIND = "paired"
SHOWN = 4  # volumes of each class in view.html
NAMES = ("psnr", "l1", "ssim", "ms_ssim", "lpips")
BASELINE, AGREEING, GENERATED, CEILING = "condition", "condition, agreeing", "generated", "autoencoder"
RESIDUAL, IDENTIFIED = "residual of the measurements", "own truth is the nearest"
DEFINITIONS = {
    RESIDUAL: "norm of what the operator measures of the volume less what was measured, over the norm of that; mean",
    IDENTIFIED: "share of generated volumes to which no other truth of their class and size is nearer than their own",
}


def measure(cfg: DictConfig) -> Results:
    """Measure and write; returns the results.

    Raises:
        UserError: no truths, generated volumes that are missing or of another size.
    """
    require(cfg, "data", "generated", "AE_ckpt", "output_dir")
    with joined(cfg.device, arithmetic="exact") as place:
        path = parse_side(cfg.data)[0]
        first = next(iter(read_json_object(Path(path)).values()))
        names = list(first.get("hints", {})) if isinstance(first, dict) else []
        conditions = list_conditions(cfg.data, names)
        if missing := [c for c in conditions if c.truth is None]:
            raise UserError(f"data: {missing[0].first}: its truth is not known: name the folder of the true images")
        generated = {c.name: generated_of(cfg, c) for c in conditions}
        is_image = first_hint_of(cfg)["kind"] == "image"
        check_writable(Path(cfg.output_dir) / f"{KIND}.json")
        autoencoder = load_autoencoder(cfg.AE_ckpt, place.device)
        weights, notes = find_lpips(cfg)
        lpips = None if weights is None else load_lpips(cfg).to(place.device)
        settings = {**OmegaConf.to_container(cfg, resolve=True), "device": device_name(place.device)}
        results = Results(KIND, settings | {"lpips_weights": weights}, {}, warnings=list(notes))
        rows = []
        for class_id in sorted({c.class_id for c in conditions}):
            of_class = [c for c in conditions if c.class_id == class_id]
            group = f"class {class_id}"
            found, residuals, volumes = {kind: [] for kind in (BASELINE, AGREEING, GENERATED, CEILING)}, {}, []
            for condition in tracked(of_class, f"measuring {group}", "volume"):
                truth = read_model_volume(condition.truth, MODEL_RANGE).data
                made = read_model_volume(generated[condition.name], MODEL_RANGE).data
                kinds = {GENERATED: made, CEILING: autoencoder.reconstruct(truth[None].to(place.device))[0].cpu()}
                if is_image:
                    kinds |= baselines_of(condition)
                for kind, volume in kinds.items():
                    values = compared(truth, volume.clamp(*MODEL_RANGE), lpips, place.device)
                    found[kind].append(values)
                    rows.append([group, condition.name, kind, *values.values()])
                for kind, value in residuals_of(condition, {"truth": truth, **kinds}).items():
                    residuals.setdefault(kind, []).append(value)
                volumes.append((truth, made))
                if len(volumes) <= SHOWN:
                    files = {"truth": condition.truth, "generated": generated[condition.name]}
                    files |= {"condition": condition.first} if is_image else {}
                    panels = [Panel(role, str(file.absolute()), MODEL_RANGE) for role, file in files.items()]
                    results.volumes.append(Beside(f"{group}: {condition.name}", panels))
            models = {kind: values for kind, values in found.items() if len(values) == len(of_class)}
            units = Units.own(len(of_class))
            figures, notes = volume_figures(group, models, units, cfg.num_resamples, cfg.seed, NAMES)
            results.figures += figures
            results.warnings += notes
            count = {"volumes": len(of_class)}
            for kind, values in residuals.items():
                mean = sum(values) / len(values)
                results.figures.append(make_figure(group, RESIDUAL, mean, "not resampled", count, model=kind))
            share = identified(volumes)
            results.figures.append(make_figure(group, IDENTIFIED, share, "not resampled", count, model=GENERATED))
            if BASELINE not in models:
                results.warnings.append(Warned(group, "the condition is no image", ", so there is no baseline"))
        results.definitions = {METRICS[name].title: METRICS[name].definition for name in NAMES} | DEFINITIONS
        output = Path(cfg.output_dir)
        write_csv(output / "paired_volumes.csv", ("group", "condition", "model", *NAMES), rows)
        get_logger().info("%d figures in %s", len(results.figures), results.write(output))
        return results


def generated_of(cfg: DictConfig, condition: Condition) -> Path:
    """The volume of a condition: the only one, or the mean of several. UserError: there is none."""
    folder = Path(cfg.generated) / str(condition.class_id)
    single, mean = (folder / f"{condition.name}{ending}{VOLUME_SUFFIX}" for ending in ("", "_mean"))
    if not is_file(single) and not is_file(mean):
        raise UserError(f"{single}: not generated: run evaluation/controlled_generation.py for all of {cfg.data}")
    return single if is_file(single) else mean


def first_hint_of(cfg: DictConfig) -> Mapping[str, Any]:
    """What the volumes were told first, by the configuration beside them. UserError: it is not there."""
    path = Path(cfg.generated) / SAVED_CONFIG
    try:
        return read_config_file(path)["hints"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not the configuration of a controlled generation: name its folder") from error


def baselines_of(condition: Condition) -> dict[str, Tensor]:
    """The condition, and where something was measured what agrees with it, (1, D, H, W) each."""
    volume = read_model_volume(condition.first, MODEL_RANGE).data
    try:
        return {BASELINE: volume, AGREEING: agreeing(volume, read_measurement(condition.first))}
    except UserError:
        return {BASELINE: volume}


def compared(truth: Tensor, volume: Tensor, lpips: TriplanarLPIPS | None, device: torch.device) -> dict[str, float]:
    """The metrics of a volume (1, D, H, W) against its truth, by name; NaN for what it is too small for.

    lpips: on that device; None: left out.
    """
    if volume.shape != truth.shape:
        raise UserError(f"a generated volume has {tuple(volume.shape)} voxels, its truth {tuple(truth.shape)}")
    is_small = min(truth.shape[1:]) < WINDOW_EDGE
    has_no_lpips = lpips is None or min(truth.shape[1:]) < MIN_EXTENT
    return {
        "psnr": psnr(truth, volume),
        "l1": l1(truth, volume),
        "ssim": torch.nan if is_small else ssim(truth, volume),
        "ms_ssim": torch.nan if is_small else ms_ssim(truth, volume, num_scales=num_scales_of(truth.shape)),
        "lpips": torch.nan if has_no_lpips else lpips_of(truth.to(device), volume.to(device), lpips),
    }


def residuals_of(condition: Condition, volumes: dict[str, Tensor]) -> dict[str, float]:
    """Of each volume, where something was measured."""
    try:
        operator, measured = read_measurement(condition.first)
    except UserError:
        return {}
    of = partial(operator.residual, measured=measured)
    return {kind: of(tensor_to_nifti(volume[0]).numpy()) for kind, volume in volumes.items()}


def identified(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The share of generated volumes whose own truth is the nearest of those of their size."""
    right: list[Any] = []
    for place, (truth, made) in enumerate(pairs):
        same = [other for other, _ in pairs if other.shape == truth.shape]
        errors = torch.stack([(made - other).square().mean() for other in same])
        own = sum(other.shape == truth.shape for other, _ in pairs[:place])
        right.append(int(errors.argmin()) == own)
    return sum(right) / len(right)
