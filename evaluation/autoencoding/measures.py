"""One volume against its reconstruction, and what the measurements of a group of volumes come to."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.model.codebook import codebook_usage, perplexity
from AutoEncoder.model.lpips import TriplanarLPIPS
from AutoEncoder.patches import crop_to
from common.errors import UserError
from dataset.volumes.intensity import MODEL_RANGE, foreground
from evaluation.metrics.reconstruction import l1, ms_ssim, psnr, ssim
from evaluation.metrics.seams import seam_index
from evaluation.metrics.units import Units, interval_of_enough
from evaluation.results.results import Figure, Warned
from evaluation.results.scales import make_figure
from evaluation.results.work import Arrays

DATA_RANGE = MODEL_RANGE[1] - MODEL_RANGE[0]
COUNTS = "code_counts"  # name of the codes' counts among the arrays of a volume

Statistic = Callable[[Tensor], float]  # of a resample: indices of volumes, (N,)

NAN = math.nan
_BOTH = f"volume and reconstruction in [-1, 1] (the reconstruction clipped to it), data range {DATA_RANGE:g}"
_FOREGROUND = "over the voxels in which the volume is above the background (-1 and 0.002 above)"
_CODES = "of the codes that hold voxels of a volume, without those of padding alone"


@dataclass(frozen=True)
class Metric:
    """Its title in results, one sentence of definition. network: the features it is measured on."""

    title: str
    definition: str
    unit: str = ""
    network: str = ""


VOLUME_METRICS = {
    "psnr": Metric("PSNR", f"peak signal-to-noise ratio over all voxels; {_BOTH}", "dB"),
    "psnr_foreground": Metric("PSNR, foreground", f"peak signal-to-noise ratio {_FOREGROUND}; {_BOTH}", "dB"),
    "l1": Metric("L1", f"mean absolute difference over all voxels; {_BOTH}"),
    "l1_foreground": Metric("L1, foreground", f"mean absolute difference {_FOREGROUND}; {_BOTH}"),
    "ssim": Metric(
        "SSIM",
        "structural similarity in 3D, Gaussian windows of 11³ voxels, standard deviation 1.5, luminance counted from "
        f"-1; {_BOTH}",
    ),
    "ms_ssim": Metric("MS-SSIM", f"multi-scale structural similarity in 3D, windows as of SSIM; {_BOTH}"),
    "lpips": Metric(
        "LPIPS",
        "LPIPS v0.1 on VGG-16, mean over all slices of a plane, then over the axial, coronal and sagittal plane; "
        f"{_BOTH}",
        network="vgg16",
    ),
    "seam_ratio": Metric(
        "seam index ratio",
        "mean difference of neighbouring voxels across the borders of the autoencoder's patches over that of all "
        "other neighbours, of the reconstruction divided by that of the volume; 1: no seams",
    ),
    "volume_perplexity": Metric("perplexity of a volume", f"perplexity {_CODES}, each volume by itself", "codes"),
}
GROUP_METRICS = {
    "codebook_usage": Metric(
        "codebook usage", f"share of the codebook's vectors that occur {_CODES}, all volumes together"
    ),
    "codebook_perplexity": Metric("codebook perplexity", f"perplexity {_CODES}, all volumes together", "codes"),
}
METRICS = VOLUME_METRICS | GROUP_METRICS


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, volume: Tensor, max_bytes: int) -> tuple[Tensor, Tensor]:
    """`autoencoder.reconstruct` in bounded memory: volume (1, D, H, W) -> reconstruction (1, D, H, W), codes (d, h, w).

    The codes are those of cells that hold voxels of the volume, not of padding alone.
    Raises ValueError: `max_bytes` is too little to decode in.
    """
    codes = autoencoder.patch_encode(volume[None], quantize=True)
    decoded = autoencoder.decode(codes, quantize=False, max_bytes=max_bytes)  # (1, 1, D', H', W')
    factor = autoencoder.downsample_factor
    cells = [math.ceil(extent / factor) for extent in volume.shape[1:]]
    return crop_to(decoded, volume.shape[1:])[0], crop_to(codes, cells)[0]


@torch.inference_mode()
def measure(
    x: Tensor, y: Tensor, code_counts: Tensor, patch_size: int, num_scales: int | None, lpips: TriplanarLPIPS | None
) -> dict[str, float]:
    """The metrics of a volume x (1, D, H, W) and its reconstruction y, by name; NaN for what is left out.

    code_counts: (n_codes,), how often each code occurs. patch_size: of the autoencoder; volumes that are no larger have
    no seams. num_scales: of MS-SSIM; None leaves it and SSIM out. lpips: with all slices; None leaves it out.
    """
    y = y.clamp(*MODEL_RANGE)
    mask = foreground(x)
    return {
        "psnr": psnr(x, y, DATA_RANGE),
        "psnr_foreground": psnr(x[mask], y[mask], DATA_RANGE),
        "l1": l1(x, y),
        "l1_foreground": l1(x[mask], y[mask]),
        "ssim": NAN if num_scales is None else ssim(x, y, DATA_RANGE),
        "ms_ssim": NAN if num_scales is None else ms_ssim(x, y, DATA_RANGE, num_scales),
        "lpips": NAN if lpips is None else lpips_of(x, y, lpips),
        "seam_ratio": _seam_ratio(x, y, patch_size),
        "volume_perplexity": perplexity(code_counts),
    }


def lpips_of(x: Tensor, y: Tensor, lpips: TriplanarLPIPS) -> float:
    """Of volumes (1, D, H, W) in [-1, 1], the mean over planes."""
    return lpips(x[None], y[None], torch.Generator()).item() / 3  # it gives their sum


def _seam_ratio(x: Tensor, y: Tensor, patch_size: int) -> float:
    try:
        of_volume, of_reconstruction = seam_index(x, patch_size), seam_index(y, patch_size)
    except UserError:  # no larger than a patch, or constant but at the borders
        return NAN
    return of_reconstruction / of_volume if of_volume > 0 else NAN


# ---------------------------------------------------------------------------------------------------------- summary


def summarise(
    group: str, results: Mapping[str, Sequence[Arrays]], units: Units, num_resamples: int, seed: int
) -> tuple[list[Figure], list[str]]:
    """The figures of a group, and notes on volumes without some of them.

    results: model -> arrays of each volume, the same volumes in the same order. Later models are also compared with
    the first, volume by volume: a figure of the model "B minus A". units: the subjects and classes of the volumes;
    resamples are of subjects within each class, and what a class has no value of is left out.
    """
    first, *later = results
    num_codes = max(len(arrays[0][COUNTS]) for arrays in results.values())
    make = partial(_figure, group, num_codes, {"num_resamples": num_resamples, "seed": seed})
    figures, notes = volume_figures(group, results, units, num_resamples, seed, VOLUME_METRICS, num_codes)
    for name, of_counts in (("codebook_usage", codebook_usage), ("codebook_perplexity", perplexity)):
        statistics = {
            model: partial(of_counted_codes, of_counts, code_counts_of(arrays)) for model, arrays in results.items()
        }
        for model in later:
            of, to = statistics[model], statistics[first]
            statistics[f"{model} minus {first}"] = lambda chosen, of=of, to=to: of(chosen) - to(chosen)
        for model, statistic in statistics.items():
            figures.append(make(name, model, statistic, units, is_difference=model not in results))
    return figures, notes


def volume_figures(
    group: str,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    units: Units,
    num_resamples: int,
    seed: int,
    names: Iterable[str],
    num_codes: int = 0,
) -> tuple[list[Figure], list[str]]:
    """As `summarise`, of the metrics of single volumes alone. names: of `VOLUME_METRICS`."""
    figures, notes = [], []
    first, *later = results
    make = partial(_figure, group, num_codes, {"num_resamples": num_resamples, "seed": seed})
    for name in names:
        found = {model: [float(of_volume[name]) for of_volume in arrays] for model, arrays in results.items()}
        values = {model: torch.tensor(of_model, dtype=torch.float64) for model, of_model in found.items()}  # (N,) each
        rows = [(model, of_model, ~of_model.isnan()) for model, of_model in values.items()]
        for model in later:
            a, b = values[first], values[model]
            rows.append((f"{model} minus {first}", b - a, ~(a.isnan() | b.isnan())))
        for model, of_model, is_there in rows:
            kept = of_model[is_there]
            if name == "seam_ratio" and model in results and len(kept) < len(of_model) and units.num_classes == 1:
                left_out = f"{len(of_model) - len(kept)} of {len(of_model)} volumes"
                shown = f"{METRICS[name].title} of {model} leaves out {left_out}"
                notes.append(Warned(group, shown, ": no larger than a patch, or constant but at borders"))
            of_kept = units[is_there]
            if all(map(len, of_kept.of_classes)):
                figure = make(name, model, partial(mean_of, kept), of_kept, is_difference=model not in results)
                std = kept.std().item() if math.isfinite(figure.value) and len(kept) > 1 else None
                figures.append(replace(figure, std=std))
    return figures, notes


def code_counts_of(arrays: Sequence[Arrays]) -> Tensor:
    """(N, n_codes) float64."""
    return torch.from_numpy(np.stack([of_volume[COUNTS] for of_volume in arrays])).double()


def mean_of(values: Tensor, chosen: Tensor) -> float:
    """Of the values (N,) of some volumes."""
    return values[chosen].mean().item()


def of_counted_codes(function: Callable[[Tensor], float], counts: Tensor, chosen: Tensor) -> float:
    """A function of code counts (n_codes,), of those of some volumes together, each as often as it is chosen."""
    times = torch.bincount(chosen, minlength=len(counts)).double()  # (N,)
    return function(times @ counts)  # counts: (N, n_codes)


def _figure(
    group: str,
    num_codes: int,
    options: dict[str, int],
    name: str,
    model: str,
    statistic: Statistic,
    units: Units,
    is_difference: bool,
) -> Figure:
    """units: of the volumes. Where one is reproduced exactly, the PSNR is infinite and has no interval."""
    metric = METRICS[name]
    value = statistic(torch.arange(len(units)))
    interval = None
    if math.isfinite(value):
        interval = interval_of_enough(statistic, [units], **options)
    more = {"unit": metric.unit, "network": metric.network, "model": model, "is_difference": is_difference}
    high = num_codes if metric.unit == "codes" else None
    num = {"volumes": len(units)} | ({"subjects": units.num_subjects} if units.shared is not None else {})
    return make_figure(group, metric.title, value, interval, num, high=high, **more)
