"""Figures and other tables as HTML. Whatever comes from the results is escaped."""

import math
from collections.abc import Sequence
from html import escape

from evaluation.results.results import Figure, TextTable

MISSING = "–"
ARROWS = {"lower": "↓ lower", "higher": "↑ higher", "real": "≈ like real"}
RANDOM = "random features"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
RANDOM_NOTE = "Distances on random features can't be compared with published ones."
DEVIATION_NOTE = "±: standard deviation over volumes."
INTERVAL_NOTE = "In brackets: 95 % interval, by resampling subjects (see the definitions)."
REASON_NOTE = "n too small: resamples of so few subjects or pairs say nothing of others, so there is no interval."
REAL_NOTE = "Like real: what real volumes have is best, and both less and more are worse."
DIFFERENCE_NOTE = (
    "B minus A: the difference, volume by volume where a figure has one for each; 0 where both do the same."
)
FLOOR_NOTE = (
    "A distance depends on the number of volumes: at the same number N, compare this set with real against real, "
    "the mean over random halvings of the real set, a volume of each subject."
)

Row = dict[str, Figure]  # one line of a table: figures of checkpoints that have all else in common, by checkpoint


def number(value: float | int) -> str:
    """Four significant digits; whole numbers as they are; "–" for what is not finite."""
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


def figure_table(figures: Sequence[Figure]) -> str:
    """The figures of one group: a line for each metric and network, checkpoints side by side.

    Where a figure has a floor, real against real stands beside this set at the same number of volumes.
    """
    models = list(dict.fromkeys(figure.model for figure in figures))
    has_network = any(figure.network for figure in figures)
    has_floor = any(figure.floor for figure in figures)
    notes = [DEVIATION_NOTE] * any(figure.std is not None for figure in figures)
    notes += [INTERVAL_NOTE] * any(figure.interval for figure in figures)
    notes += [DIFFERENCE_NOTE] * any(" minus " in model for model in models)
    notes += [REASON_NOTE] * any(figure.no_interval for figure in figures)
    notes += [REAL_NOTE] * any(figure.better == "real" for figure in figures) + [FLOOR_NOTE] * has_floor
    notes += [RANDOM_NOTE] * any(_is_random(figure.network) for figure in figures)
    note = f'<p class="note">{" ".join(notes)}</p>\n' if notes else ""
    bodies = []
    for rows in _by_metric(figures):
        lines = [_cells(row, models, has_network, has_floor) for row in rows]
        lines[0] = _metric_cells(_first(rows[0]), len(rows)) + lines[0]
        bodies.append("<tbody>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</tbody>")
    head = _head(models, has_network, has_floor)
    return scrolled(f'<table class="figures">{head}{"".join(bodies)}</table>', "figures") + note


def text_table(table: TextTable) -> str:
    """A table for reading; columns of numbers are on the right."""
    numeric = [all(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]
    classes = [' class="num"' if is_num else "" for is_num in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{escape(str(cell))}</th>' for cell, kind in zip(table.columns, classes, strict=True)
    )
    lines = []
    for row in table.rows:
        cells = [cell if isinstance(cell, str) else number(cell) for cell in row]
        lines.append("".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(cells, classes, strict=True)))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return scrolled(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", table.title)


def scrolled(table: str, label: str) -> str:
    """A box of its own that a wide table scrolls in, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>\n'


def _by_metric(figures: Sequence[Figure]) -> list[list[Row]]:
    """Rows in the order that their metrics first appear in. No figure takes the place of another."""
    metrics: dict[tuple[str, ...], list[Row]] = {}
    for figure in figures:
        rows = metrics.setdefault((figure.metric, figure.unit, figure.better), [])
        fitting = (row for row in rows if _shared(_first(row)) == _shared(figure) and figure.model not in row)
        if (row := next(fitting, None)) is None:
            rows.append(row := {})
        row[figure.model] = figure
    return list(metrics.values())


def _first(row: Row) -> Figure:
    return next(iter(row.values()))


def _shared(figure: Figure) -> tuple:
    floor = figure.floor
    return (figure.network, tuple(figure.num.items()), None if floor is None else (floor.value, floor.num))


def _head(models: Sequence[str], has_network: bool, has_floor: bool) -> str:
    span = ' rowspan="2"' if has_floor else ""
    names = ["Metric", "Better", *(["Network"] * has_network), "N"]
    first = "".join(f'<th scope="col"{span}>{name}</th>' for name in names)
    first += "".join(f'<th scope="col" class="num"{span}>{escape(model) or "Value"}</th>' for model in models)
    if not has_floor:
        return f"<thead><tr>{first}</tr></thead>"
    first += f'<th scope="colgroup" class="floor" colspan="{2 + len(models)}">At the same number of volumes</th>'
    this = [f"This set: {escape(model)}" if len(models) > 1 else "This set" for model in models]
    second = "".join(f'<th scope="col" class="num">{name}</th>' for name in ("N", "Real against real", *this))
    return f"<thead><tr>{first}</tr><tr>{second}</tr></thead>"


def _metric_cells(figure: Figure, num_rows: int) -> str:
    span = f' rowspan="{num_rows}"' if num_rows > 1 else ""
    scope = "rowgroup" if num_rows > 1 else "row"
    unit = f' <span class="unit">{escape(figure.unit)}</span>' if figure.unit else ""
    name = f'<th scope="{scope}" class="metric"{span}>{escape(figure.metric)}{unit}</th>'
    meant = f'<span class="like-real">{escape(figure.like_real)}</span>' if figure.like_real else ""
    return f'{name}<td class="better"{span}>{ARROWS[figure.better]}{meant}</td>'


def _cells(row: Row, models: Sequence[str], has_network: bool, has_floor: bool) -> str:
    figure = _first(row)
    mark = f' <strong class="random">{RANDOM}</strong>' if _is_random(figure.network) else ""
    cells = [f'<td class="network">{escape(figure.network)}{mark}</td>'] * has_network
    counts = "".join(f"<li>{escape(name)} {number(count)}</li>" for name, count in figure.num.items())
    cells.append(f'<td><ul class="counts">{counts}</ul></td>')
    cells += [_value_cell(row.get(model)) for model in models]
    if has_floor:
        floors = [found.floor if (found := row.get(model)) else None for model in models]
        known = figure.floor
        cells += [_num_cell(known and known.num), _num_cell(known and known.value)]
        cells += [_num_cell(floor and floor.comparable) for floor in floors]
    return "".join(cells)


def _is_random(network: str) -> bool:
    return network.lower().startswith("random")


def _value_cell(figure: Figure | None) -> str:
    """Empty where a checkpoint was not measured, "–" where the measure has no value."""
    if figure is None:
        return "<td></td>"
    ends = escape(figure.no_interval) if figure.interval is None else f"[{', '.join(map(number, figure.interval))}]"
    interval = f' <span class="interval">{ends}</span>' if ends else ""
    deviation = "" if figure.std is None else f' <span class="std">± {number(figure.std)}</span>'
    return f'<td class="num"><span class="value">{number(figure.value)}</span>{deviation}{interval}</td>'


def _num_cell(value: float | None) -> str:
    return f'<td class="num">{"" if value is None else number(value)}</td>'
