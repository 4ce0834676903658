"""What a reader of the figures has to know before believing them. Pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.comparison.features import SetFeatures
from evaluation.comparison.figures import Memorisation, median
from evaluation.metrics.distances import nearest
from evaluation.results.results import Figure

COLLAPSE = 0.05  # gap of MS-SSIM beyond which a warning is due
SAME = 1e-4  # share of the median distance that rounding may make of none
USUAL = 1000  # real volumes whose distances are looked at for that
FEWEST = 5  # volumes of a set, below which an interval of nearest distances says nothing
COPY = 0.5  # share of the nearest held-out distance below which a volume counts as a copy


def distance_warnings(group: str, network: str, real: dict[str, Tensor], generated: dict[str, Tensor]) -> list[str]:
    """Too few volumes for the features."""
    plane = next(iter(real))
    num = {"real": real[plane].shape[:2].numel(), "generated": generated[plane].shape[:2].numel()}
    width = real[plane].shape[2]
    few = [f"{count} {role}" for role, count in num.items() if count <= width]
    if not few:
        return []
    unit = "volumes" if len(real) == 1 else "slices"
    return [
        f"{group}: {' and '.join(few)} {unit} are too few for the {width} features of {network}: covariances are "
        "singular, compare FID with that of the same N alone"
    ]


def diversity_warning(group: str, gap: Figure) -> list[str]:
    """A generator whose volumes are more alike than real ones."""
    if gap.interval[0] <= COLLAPSE:
        return []
    return [
        f"{group}: generated volumes are more alike than real ones (diversity gap {gap.value:.3f}, at least "
        f"{gap.interval[0]:.3f}): the generator has collapsed to few images"
    ]


def memorisation_warnings(group: str, network: str, found: Memorisation, figures: Sequence[Figure]) -> list[str]:
    """Generated volumes that are copies; and a whole set that lies too near; and real volumes that were trained on."""
    warnings = []
    trained_on = int((found.held_out <= SAME * median(found.held_out)).sum())
    if trained_on:
        warnings.append(
            f"{group}: {trained_on} of {len(found.held_out)} real volumes are training volumes: the memorisation check "
            "needs real volumes that were not trained on"
        )
    limit = COPY * found.held_out.min().item()
    copies = int((found.generated <= limit).sum())
    if copies and not trained_on:
        warnings.append(
            f"{group}: {copies} of {len(found.generated)} generated volumes are copies of training volumes or nearly "
            f"so (on {network}, at most {COPY:g} of the smallest distance of a held-out one): see memorisation.csv"
        )
    nearer, ratio = figures
    if min(len(found.generated), len(found.held_out)) < FEWEST:
        return warnings
    if nearer.interval[0] > 0.5 and ratio.interval is not None and ratio.interval[1] < 1:
        warnings.append(
            f"{group}: generated volumes lie nearer to training volumes than real ones do that were not trained on "
            f"(on {network}, probability {nearer.value:.2f}, distance ratio {ratio.value:.2f}): memorised, or without "
            "detail; see the picture of nearest pairs"
        )
    return warnings


def content_warnings(group: str, plane: str, real: SetFeatures, generated: SetFeatures) -> list[str]:
    """Volumes of one value, volumes that are there twice, generated ones that are real, by the features of a plane."""
    warnings = []
    x, y = (found.planes[plane].flatten(1) for found in (real, generated))  # (N, S·F), (M, S·F)
    for role, features, ranges in (("real", x, real.ranges), ("generated", y, generated.ranges)):
        if blank := sum(low == high for low, high in ranges):
            warnings.append(f"{group}: {blank} of {len(features)} {role} volumes have one value everywhere")
        if repeated := len(features) - len(features.unique(dim=0)):
            warnings.append(f"{group}: {repeated} of {len(features)} {role} volumes are copies of others of the set")
    between = nearest(x, y)[0]  # of each real volume
    usual = median(torch.cdist(x[:USUAL], x[:USUAL]).flatten())
    if same := int((between <= SAME * usual).sum()):
        warnings.append(
            f"{group}: {same} of {len(real)} real volumes are among the generated ones: distances mean nothing"
        )
    return warnings
