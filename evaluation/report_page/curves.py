"""One plot as SVG, drawn by matplotlib on white; its title is HTML, so that it wraps."""

import io
import textwrap
from itertools import cycle

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from common.text import printable
from evaluation.results.results import Curves

COLOURS = ("#0b66b2", "#c2410c", "#12805c", "#8a3ab0", "#8a6d00", "#5b6470")
DASHES = ("-", "--", ":", "-.")  # so that lines can be told apart without colours too
MOST_MARKERS = 40  # points of a line that are marked one by one
HUGE = 1e300  # differences of larger numbers overflow


def plot(curves: Curves) -> bytes:
    """Axes with their labels, lines with bands; cut where a number is missing. Words are no formulas."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 10}
    with rc_context(settings):
        figure = Figure(figsize=(6.2, 3.7), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for line, colour, dash in zip(curves.series, cycle(COLOURS), cycle(DASHES), strict=False):
            x, y, low, high = (_known(values) for values in (line.x, line.y, line.low, line.high))
            if len(low):
                axes.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
            there = np.isfinite(x + y)
            joined = np.concatenate([[False], there[1:] & there[:-1], [False]])  # each point's with the one before
            alone = there & ~joined[: len(y)] & ~joined[1 : len(y) + 1]
            marked = there if there.sum() <= MOST_MARKERS else alone
            name = _wrapped(line.name)
            # A name may begin with "_", which would keep it out of the legend.
            axes.plot(x, y, dash, color=colour, label=f"\u200b{name}", marker="o", mfc="white", ms=4, markevery=marked)
        axes.set_xlabel(_wrapped(curves.x_label))
        axes.set_ylabel(_wrapped(curves.y_label, 30))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#d9dde3")
        if curves.series:
            figure.legend(loc="outside upper left", frameon=False)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _known(values: list[float]) -> np.ndarray:
    values = np.array(values, dtype=np.float64)
    return np.where(np.abs(values) < HUGE, values, np.nan)


def _wrapped(text: str, letters: int = 60) -> str:
    return textwrap.fill(printable(text), letters)
