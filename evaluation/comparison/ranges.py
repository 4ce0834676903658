"""Whether sets of volumes can have the intensity ranges that were stated or assumed for them."""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.errors import UserError
from dataset.volumes.intensity import MODEL_RANGE, RANGE_TOLERANCE
from evaluation.comparison.sets import Group
from evaluation.results.results import Warned

SAMPLED = 4  # volumes of a set whose range is looked at before any work


def sample_ranges(group: Group) -> dict[str, list[tuple[float, float]]]:
    """Lowest and highest value, after conversion to [-1, 1], of a few volumes of each set that can be read."""
    ranges: dict[str, list[tuple[float, float]]] = {role: [] for role in group.sets}
    for role, volumes in group.sets.items():
        for volume in volumes[:: max(1, len(volumes) // SAMPLED)][:SAMPLED]:
            with contextlib.suppress(UserError):  # all of those are listed when all are read
                data = replace(volume, resample=None).read()
                ranges[role].append((float(data.min()), float(data.max())))
    return {role: found for role, found in ranges.items() if found}


def check_ranges(group: Group, ranges: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """Warnings where the darkest or brightest values of two sets differ by more than a quarter of the range.

    ranges: role -> lowest and highest value of volumes after conversion to [-1, 1], as `sample_ranges` gives.
    UserError where a set must have another scale than was assumed: it is brighter than others at its darkest, or has
    nothing in the lower half of the range.
    """
    assumed = [role for role in ranges if not all(volume.is_range_stated for volume in group.sets[role])]
    warnings = []
    for i, which in enumerate(("darkest", "brightest")):
        ends = {role: statistics.median(values[i] for values in found) for role, found in ranges.items()}
        role, other = max(ends, key=ends.get), min(ends, key=ends.get)
        if ends[role] - ends[other] <= (MODEL_RANGE[1] - MODEL_RANGE[0]) / 4:
            continue
        found = (
            f"the {which} voxels of {role} volumes are {ends[role]:.3g}, those of {other} ones {ends[other]:.3g} "
            "(of -1 ... 1)"
        )
        if which == "darkest" and role in assumed:
            raise UserError(f"{group.name}: {found}: their scales differ, {_range_advice(role, ranges)}")
        meaning = ": sets of other content, or a range that is not the one that was stated"
        warnings.append(Warned(group.name, found, meaning))
    middle = sum(MODEL_RANGE) / 2
    for role in assumed:
        if min(low for low, _ in ranges[role]) > middle - RANGE_TOLERANCE < max(high for _, high in ranges[role]):
            raise UserError(
                f"{group.name}: the {role} volumes have nothing in the lower half of the range -1 ... 1: "
                f"{_range_advice(role, ranges)}"
            )
    return warnings


def _range_advice(role: str, ranges: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    option = "generated_range" if role == "generated" else "real_range"
    highest = max(high for _, high in ranges[role])
    return f"give the range that the {role} files have, e.g. {option}=[0,1] (highest found {highest:.3g})"
