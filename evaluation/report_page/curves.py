"""One plot as inline SVG, drawn in the page's own colours; its words are HTML around it, so that they wrap."""

import math
from collections.abc import Sequence
from html import escape

from matplotlib.ticker import MaxNLocator

from evaluation.results.results import Curves, Series

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 8, 26  # room around the axes, for the numbers
NUM_COLOURS = 6  # as in report.css
DASHES = ("none", "7 3", "2 3", "8 3 2 3")  # so that lines can be told apart without colours too
MOST_MARKERS = 40  # points of a line that are marked one by one
TICK_STEPS = (1, 2, 2.5, 5, 10)
HUGE = 1e300  # differences of larger numbers overflow

Point = tuple[float, float]


class Axes:
    """Places of numbers in the picture, over the range of all series with a little room."""

    def __init__(self, series: Sequence[Series]):
        self.x_range = _range([x for line in series for x in line.x], room=0.02)
        self.y_range = _range([y for line in series for values in (line.y, line.low, line.high) for y in values], 0.06)

    def place(self, x: float, y: float) -> Point:
        """In pixels from the picture's upper left corner."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def plot(curves: Curves) -> str:
    """A <figure>: title, legend, axes with their labels, lines with bands."""
    axes = Axes(curves.series)
    lines = "".join(_band(axes, line, i) for i, line in enumerate(curves.series))
    lines += "".join(_line(axes, line, i) for i, line in enumerate(curves.series))
    entries = "".join(f"<li>{_swatch(line, i)}{escape(line.name)}</li>" for i, line in enumerate(curves.series))
    label = escape(f"{curves.title}: {curves.y_label} against {curves.x_label}")
    return (
        f'<figure class="plot"><figcaption>{escape(curves.title)}</figcaption><ul class="legend">{entries}</ul>'
        f'<p class="y-label">{escape(curves.y_label)}</p>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{_grid(axes)}{lines}</svg>'
        f'<p class="x-label">{escape(curves.x_label)}</p></figure>\n'
    )


def _range(values: Sequence[float], room: float) -> tuple[float, float]:
    known = [value for value in values if _is_known(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if low == high:
        return low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    return low - room * (high - low), high + room * (high - low)


def _is_known(*values: float) -> bool:
    return all(math.isfinite(value) and abs(value) < HUGE for value in values)


def _ticks(ends: tuple[float, float], num: int) -> list[float]:
    ticks = MaxNLocator(num, steps=TICK_STEPS).tick_values(*ends).tolist()
    return [tick for tick in ticks if ends[0] <= tick <= ends[1]]


def _grid(axes: Axes) -> str:
    """Numbers and lines at them; the lower left corner is where both ranges begin."""
    left, bottom = axes.place(axes.x_range[0], axes.y_range[0])
    right, top = axes.place(axes.x_range[1], axes.y_range[1])
    parts = []
    for tick in _ticks(axes.y_range, 6):
        y = axes.place(axes.x_range[0], tick)[1]
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in _ticks(axes.x_range, 7):
        x = axes.place(tick, axes.y_range[0])[0]
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    return "".join(parts)


def _runs(series: Series, columns: Sequence[Sequence[float]]) -> list[list[tuple[float, ...]]]:
    """(x, columns...) of the points, cut where a number is missing."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for point in zip(series.x, *columns, strict=True):
        if _is_known(*point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _band(axes: Axes, series: Series, index: int) -> str:
    if not series.low:
        return ""
    parts = []
    for run in _runs(series, (series.low, series.high)):
        outline = [axes.place(x, low) for x, low, _ in run] + [axes.place(x, high) for x, _, high in reversed(run)]
        parts.append(f'<path class="band c{index % NUM_COLOURS}" d="{_path(outline)}Z"/>')
    return "".join(parts)


def _line(axes: Axes, series: Series, index: int) -> str:
    runs = [[axes.place(x, y) for x, y in run] for run in _runs(series, (series.y,))]
    colour, dash = f"c{index % NUM_COLOURS}", DASHES[index % len(DASHES)]
    parts = [f'<path class="line {colour}" stroke-dasharray="{dash}" d="{_path(run)}"/>' for run in runs]
    few = sum(map(len, runs)) <= MOST_MARKERS
    marked = [point for run in runs if few or len(run) == 1 for point in run]
    parts += [f'<circle class="marker {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in marked]
    return "".join(parts)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _swatch(series: Series, index: int) -> str:
    colour, dash = f"c{index % NUM_COLOURS}", DASHES[index % len(DASHES)]
    band = f'<path class="band {colour}" d="M0 1H28V11H0Z"/>' if series.low else ""
    line = f'<path class="line {colour}" stroke-dasharray="{dash}" d="M0 6H28"/>'
    return f'<svg viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{band}{line}</svg>'
