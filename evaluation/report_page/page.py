"""The page of a report as one string, from templates/report.html; nothing else is read or written here.

The template escapes all that it is given, so that no words of the results become markup.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.report_page.content import Part
from evaluation.report_page.curves import plot
from evaluation.report_page.tables import by_metric, is_random, notes_of, number
from evaluation.results.results import Figure, Results

NO_GROUP = "All volumes"
TEMPLATES = Path(__file__).with_name("templates")


def page(parts: Sequence[Part], *, title: str, made: str) -> str:
    """One self-contained HTML page. made: date of the page."""
    filters = {
        "number": number,
        "by_metric": by_metric,
        "notes": notes_of,
        "groups": groups_of,
        "sections": sections_of,
    }
    filters |= {"shown": shown, "flat": flat, "svg": lambda curves: as_uri(plot(curves), "svg+xml"), "uri": as_uri}
    return rendered("report.html", filters, parts=parts, title=title, made=made, is_random=is_random)


def rendered(template: str, filters: Mapping[str, Any] | None = None, **values: Any) -> str:
    """A template with all values escaped. Those that it does not have are an error, and so are unknown names."""
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(values)


def groups_of(results: Results) -> dict[str, list[Figure]]:
    groups: dict[str, list[Figure]] = {}
    for figure in results.figures:
        groups.setdefault(figure.group or NO_GROUP, []).append(figure)
    return groups


def sections_of(part: Part) -> list[str]:
    """All that has a heading: groups of figures, then what the part has as a whole; a class may be called so."""
    further = {"Curves": part.results.curves, "Pictures": part.pictures, "Tables": part.results.tables}
    return list(dict.fromkeys([*groups_of(part.results), *(name for name, found in further.items() if found)]))


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """("a.b", value) of nested options."""
    lines = []
    for name, value in settings.items():
        is_nested = isinstance(value, dict) and value
        lines += flat(value, f"{prefix}{name}.") if is_nested else [(f"{prefix}{name}", shown(value))]
    return lines


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"
