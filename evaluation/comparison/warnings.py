"""What a reader of the figures has to know before believing them. Pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.comparison.features import SetFeatures
from evaluation.comparison.figures import Memorisation, median
from evaluation.metrics.distances import nearest
from evaluation.results.results import Figure, Warned

COLLAPSE = 0.05  # gap of MS-SSIM beyond which a warning is due, on both sides
SAME = 1e-4  # share of the median distance that rounding may make of none
USUAL = 1000  # real volumes whose distances are looked at for that
FEWEST = 5  # subjects of a set, below which an interval of nearest distances says nothing
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
    found = f"{' and '.join(few)} {unit} are too few for the {width} features of {network}"
    return [Warned(group, found, ": covariances are singular, compare FID with that of the same N alone")]


def diversity_warning(group: str, gap: Figure) -> list[str]:
    """A generator whose volumes are more alike than real ones."""
    if gap.interval is None or gap.interval[0] <= COLLAPSE:
        return []
    shown = f"diversity gap {gap.value:.3f}, at least {gap.interval[0]:.3f}"
    found = f"generated volumes are more alike than real ones ({shown})"
    return [Warned(group, found, ": the generator has collapsed to few images")]


def noise_warning(group: str, gap: Figure) -> list[str]:
    """A generator whose volumes are less alike than real ones."""
    if gap.interval is None or gap.interval[1] >= -COLLAPSE:
        return []
    shown = f"diversity gap {gap.value:.3f}, at most {gap.interval[1]:.3f}"
    found = f"generated volumes are less alike than real ones ({shown})"
    return [Warned(group, found, ": noise and faults make volumes differ, look at the pictures")]


def memorisation_warnings(group: str, network: str, found: Memorisation, figures: Sequence[Figure]) -> list[str]:
    """Generated volumes that are copies; and a whole set that lies too near; and real volumes that were trained on."""
    warnings = []
    trained_on = int((found.held_out <= SAME * median(found.held_out)).sum())
    if trained_on:
        shown = f"{trained_on} of {len(found.held_out)} real volumes are training volumes"
        meaning = ": the memorisation check needs real volumes that were not trained on"
        warnings.append(Warned(group, shown, meaning))
    limit = COPY * found.held_out.min().item()
    copies = int((found.generated <= limit).sum())
    if copies and not trained_on:
        shown = f"{copies} of {len(found.generated)} generated volumes are copies of training volumes on {network}"
        meaning = f", or nearly so (at most {COPY:g} of the smallest distance of a held-out one): see memorisation.csv"
        warnings.append(Warned(group, shown, meaning))
    nearer, ratio = figures
    if min(units.num_subjects for units in found.units) < FEWEST:
        return warnings
    is_nearer = nearer.value == 1 or nearer.interval[0] > 0.5  # of five and five, 1 is one order in 252
    if is_nearer and ratio.interval is not None and ratio.interval[1] < 1:
        shown = (
            "generated volumes lie nearer to training volumes than real ones do that were not trained on "
            f"(on {network}, probability {nearer.value:.2f}, distance ratio {ratio.value:.2f})"
        )
        meaning = ": memorised, or without detail; see the picture of nearest pairs"
        warnings.append(Warned(group, shown, meaning))
    return warnings


def content_warnings(group: str, plane: str, real: SetFeatures, generated: SetFeatures) -> list[str]:
    """Volumes of one value, volumes that are there twice, generated ones that are real, by the features of a plane."""
    warnings = []
    x, y = (found.planes[plane].flatten(1) for found in (real, generated))  # (N, S·F), (M, S·F)
    for role, features, ranges in (("real", x, real.ranges), ("generated", y, generated.ranges)):
        if blank := sum(low == high for low, high in ranges):
            found = f"{blank} of {len(features)} {role} volumes"
            warnings.append(Warned(group, found, " have one value everywhere"))
        if repeated := len(features) - len(features.unique(dim=0)):
            found = f"{repeated} of {len(features)} {role} volumes"
            warnings.append(Warned(group, found, " are copies of others of the set"))
    between = nearest(x, y)[0]  # of each real volume
    usual = median(torch.cdist(x[:USUAL], x[:USUAL]).flatten())
    if same := int((between <= SAME * usual).sum()):
        found = f"{same} of {len(real)} real volumes are among the generated ones"
        warnings.append(Warned(group, found, ": distances mean nothing"))
    return warnings
