"""What the tables of a report say: numbers in words, the lines of a table of figures, the notes below it."""

import math
from collections.abc import Sequence

from evaluation.results.results import Figure

MISSING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Row = dict[str, Figure]  # one line of a table: figures of checkpoints that have all else in common, by checkpoint


def number(value: float | int | None) -> str:
    """Four significant digits; whole numbers as they are; "–" for what is not finite, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value).replace("-", "−")
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, power = f"{value:.3e}".split("e")
    exponent = int(power)
    if -4 <= exponent < 6:
        text = f"{float(f'{value:.3e}'):.{max(0, 3 - exponent)}f}"
    else:
        text = f"{mantissa} × 10{str(exponent).translate(SUPERSCRIPTS)}"
    return text.replace("-", "−")


def notes_of(figures: Sequence[Figure]) -> list[str]:
    """What has to be known to read these figures."""
    notes = {
        "±: standard deviation over volumes.": any(figure.std is not None for figure in figures),
        "In brackets: 95 % interval, by resampling subjects (see the definitions).": any(f.interval for f in figures),
        "B minus A: the difference, volume by volume where a figure has one for each; 0 where both do the same.": any(
            " minus " in figure.model for figure in figures
        ),
        "n too small: resamples of so few subjects or pairs say nothing of others, so there is no interval.": any(
            figure.no_interval for figure in figures
        ),
        "Like real: what real volumes have is best, and both less and more are worse.": any(
            figure.better == "real" for figure in figures
        ),
        "A distance depends on the number of volumes: at the same number N, compare this set with real against real, "
        "the mean over random halvings of the real set, a volume of each subject.": any(f.floor for f in figures),
        "Distances on random features can't be compared with published ones.": any(map(is_random, figures)),
    }
    return [note for note, holds in notes.items() if holds]


def is_random(figure: Figure) -> bool:
    return figure.network.lower().startswith("random")


def by_metric(figures: Sequence[Figure]) -> list[list[Row]]:
    """Rows in the order that their metrics first appear in. No figure takes the place of another."""
    metrics: dict[tuple[str, ...], list[Row]] = {}
    for figure in figures:
        rows = metrics.setdefault((figure.metric, figure.unit, figure.better), [])
        fitting = (row for row in rows if _shared(*row.values()) == _shared(figure) and figure.model not in row)
        if (row := next(fitting, None)) is None:
            rows.append(row := {})
        row[figure.model] = figure
    return list(metrics.values())


def _shared(figure: Figure, *others: Figure) -> tuple:
    floor = figure.floor
    return (figure.network, tuple(figure.num.items()), None if floor is None else (floor.value, floor.num))
