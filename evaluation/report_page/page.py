"""The page of a report as one string; nothing is read or written here. What comes from the results is escaped."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluation.report_page.content import Part, Png
from evaluation.report_page.curves import plot
from evaluation.report_page.tables import figure_table, scrolled, text_table

NO_GROUP = "All volumes"


def page(parts: Sequence[Part], *, title: str, made: str, style: str) -> str:
    """One self-contained HTML page. made: date of the page. style: its CSS."""
    header = f"<header><h1>{escape(title)}</h1><p class='made'>Made {escape(made)}</p></header>\n"
    main = "".join([_warnings(parts), _contents(parts), _making(parts), _excluded(parts), *map(_part, parts)])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{header}<main>\n{main}</main>\n</body>\n</html>\n"
    )


def _warnings(parts: Sequence[Part]) -> str:
    items = [
        f"<li><b>{_heading(part)}:</b> {escape(warning)}</li>" for part in parts for warning in part.results.warnings
    ]
    if not items:
        return ""
    title = f"{len(items)} warning{'s' * (len(items) > 1)}"
    return f'<aside class="warnings" aria-label="{title}"><p>{title}</p><ul>{"".join(items)}</ul></aside>\n'


def _contents(parts: Sequence[Part]) -> str:
    """Links to all parts and their groups."""
    items = []
    for part in parts:
        kind = part.results.kind
        links = "".join(f'<li><a href="#{kind}-{i}">{escape(name)}</a></li>' for i, name in enumerate(_sections(part)))
        inner = f"<ul>{links}</ul>" if links else ""
        items.append(f'<li><a href="#{kind}">{_heading(part)}</a>{inner}</li>')
    return f'<nav aria-label="Contents"><ul>{"".join(items)}</ul></nav>\n'


def _making(parts: Sequence[Part]) -> str:
    """Date, command, device and versions of every part."""
    blocks = []
    for part in parts:
        making, device = part.making, part.results.settings.get("device")
        entries = {
            "Measured": escape(making.created_utc.replace("T", " ").replace("+00:00", " UTC")),
            "Command": f"<code>{escape(making.command)}</code>",
            **({"Device": escape(_shown(device))} if device is not None else {}),
            "Versions": ", ".join(f"{escape(name)}&nbsp;{escape(found)}" for name, found in making.versions.items()),
        }
        lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries.items())
        blocks.append(f'<div class="making"><p>{_heading(part)}</p><dl>{lines}</dl></div>')
    return f'<div class="makings">{"".join(blocks)}</div>\n'


def _excluded(parts: Sequence[Part]) -> str:
    rows = [
        f"<tr><td>{_heading(part)}</td><td><code>{escape(entry.get('file', ''))}</code></td>"
        f"<td>{escape(entry.get('reason', ''))}</td></tr>"
        for part in parts
        for entry in part.results.excluded
    ]
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Part", "File", "Reason"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    title = f"{len(rows)} excluded file{'s' * (len(rows) > 1)}"
    return f'<details class="excluded" open><summary>{title}</summary>{scrolled(table, "excluded files")}</details>\n'


def _part(part: Part) -> str:
    kind = part.results.kind
    sections = "".join(
        f'<section id="{kind}-{i}"><h3>{escape(name)}</h3>\n{content}</section>\n'
        for i, (name, content) in enumerate(_sections(part).items())
    )
    sections += _definitions(part) + _settings(part)
    return f'<section id="{kind}"><h2>{_heading(part)}</h2>\n{sections}</section>\n'


def _sections(part: Part) -> dict[str, str]:
    """Heading -> HTML of all that has an h3: groups of figures, then what is shown for the part as a whole."""
    results = part.results
    groups: dict[str, list] = {}
    for figure in results.figures:
        groups.setdefault(figure.group or NO_GROUP, []).append(figure)
    sections = {name: figure_table(figures) for name, figures in groups.items()}
    further = {
        "Curves": f'<div class="plots">{"".join(map(plot, results.curves))}</div>' if results.curves else "",
        "Pictures": "".join(map(_picture, part.pictures)),
        "Tables": "".join(f"<h4>{escape(table.title)}</h4>{text_table(table)}" for table in results.tables),
    }
    for name, content in further.items():
        if content:
            sections[name] = sections.get(name, "") + content  # a class may be called so
    return sections


def _picture(png: Png) -> str:
    data = base64.b64encode(png.data).decode()
    caption = escape(png.caption)
    return (
        f'<figure class="picture"><img src="data:image/png;base64,{data}" alt="{caption}" '
        f'width="{png.width}" height="{png.height}"><figcaption>{caption}</figcaption></figure>\n'
    )


def _definitions(part: Part) -> str:
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in part.results.definitions.items())
    if not entries:
        return ""
    return f"<details><summary>What the metrics are</summary><dl>{entries}</dl></details>\n"


def _settings(part: Part) -> str:
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td><code>{escape(value)}</code></td></tr>'
        for name, value in _flat(part.results.settings)
    )
    if not lines:
        return ""
    head = '<thead><tr><th scope="col">Option</th><th scope="col">Value</th></tr></thead>'
    table = scrolled(f'<table class="settings">{head}<tbody>{lines}</tbody></table>', "settings")
    return f"<details><summary>All settings</summary>{table}</details>\n"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """("a.b", value) of nested options."""
    lines = []
    for name, value in settings.items():
        is_nested = isinstance(value, dict) and value
        lines += _flat(value, f"{prefix}{name}.") if is_nested else [(f"{prefix}{name}", _shown(value))]
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _heading(part: Part) -> str:
    return part.results.kind.capitalize()
