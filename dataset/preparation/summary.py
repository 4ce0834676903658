"""What became of all sources, over all runs and sizes of a class: the table at the end, and `problems.jsonl`.

`problems.jsonl` lies in the class folder, one JSON object a line: source, input (its folder), size (which
its volume was to have) and reason. A problem stays until its source was prepared or is gone from the input.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.files import write_atomically
from common.places import is_folder
from common.text import printable
from dataset.preparation.manifest import read_manifest
from dataset.preparation.prepared_folder import Outcome, PreparedFolder
from dataset.preparation.sources import Source
from dataset.volumes.index import is_size_folder

PROBLEMS_NAME = "problems.jsonl"
MAX_SHOWN = 20  # problems on the console; all are in problems.jsonl
NOTABLE_LOSS = 0.02  # share of the foreground cut off from which a volume is mentioned


@dataclass(frozen=True)
class Run:
    """What a run found in its input, and what it did.

    size: folder name of the size of its volumes. selected: sources that it wanted. passed_over: those that its options
    left out. outcomes: what became of files and of selected sources, but of those that were done.
    """

    size: str
    input: Path
    selected: Sequence[Source]
    passed_over: Sequence[Outcome]
    outcomes: Sequence[Outcome]


def count_other_sizes(class_folder: Path, folder: Path) -> dict[str, int]:
    """Size -> number of prepared volumes, of all sizes of a class but that in `folder`."""
    places = sorted(class_folder.iterdir()) if is_folder(class_folder) else []
    counts = {place.name: len(read_manifest(place)) for place in places if is_size_folder(place.name)}
    return {size: count for size, count in counts.items() if count and class_folder / size != folder}


def report(
    console: Console, class_folder: Path, prepared: PreparedFolder, run: Run, other_sizes: dict[str, int]
) -> None:
    """Prints what became of everything, and brings the problems beside the volumes up to date."""
    problems = _update_problems(class_folder / PROBLEMS_NAME, run)
    table = Table()
    for column in ("status", "volumes", "size, or why"):
        table.add_column(column, overflow="fold")
    new = [outcome for outcome in run.outcomes if outcome.status == "prepared"]
    add_row(table, "prepared", str(len(new)), run.size)
    add_row(table, "were there", str(len(prepared.entries) - len(new)), run.size)
    for size, count in other_sizes.items():
        add_row(table, "were there", str(count), size)
    for reason, count in Counter(outcome.reason for outcome in run.passed_over).most_common():
        add_row(table, "left out", str(count), reason)
    left_out = [(outcome.reason, outcome.source.name) for outcome in run.outcomes if outcome.status == "left out"]
    for found in _by_kind(left_out):
        add_row(table, "left out", str(len(found)), f"{found[0][0]}, e.g. {found[0][1]}")
    for problem in problems[:MAX_SHOWN]:
        of_size = "" if problem["size"] == run.size else f" ({problem['size']})"
        add_row(table, "failed", "1", f"{problem['source']}: {problem['reason']}{of_size}")
    if len(problems) > MAX_SHOWN:
        add_row(table, "failed", str(len(problems) - MAX_SHOWN), f"more, see {class_folder / PROBLEMS_NAME}")
    say(console, f"{class_folder}: {len(prepared.entries) + sum(other_sizes.values())} volumes")
    console.print(table)
    for line in [*_notes(new), *_losses(prepared)]:
        say(console, line)


def say(console: Console, line: str) -> None:
    """A line of plain text, as `add_row`."""
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def add_row(table: Table, *cells: str) -> None:
    """A row of plain text: a name in square brackets is no markup, and nothing in it is obeyed by a terminal."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style="red" if cells[0] == "failed" else None)


def _by_kind(texts: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """(text, file) by kind, the most frequent first; texts that differ in numbers alone are of one kind."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for text, file in texts:
        kinds.setdefault(re.sub(r"-?\d+(\.\d+)?", "#", text), []).append((text, file))
    return sorted(kinds.values(), key=len, reverse=True)


def _notes(new: Sequence[Outcome]) -> Iterator[str]:
    """One line for each kind of what was handled on reading."""
    for found in _by_kind((note, outcome.entry["file"]) for outcome in new for note in outcome.entry["notes"]):
        yield f"note: {found[0][0]}: {len({file for _, file in found})} new volume(s), e.g. {found[0][1]}"


def _losses(prepared: PreparedFolder) -> Iterator[str]:
    cut = {file: e["foreground_lost"] for file, e in prepared.entries.items() if e["foreground_lost"] > NOTABLE_LOSS}
    if cut:
        worst = max(cut, key=cut.get)
        yield (
            f"cropping cut off more than {NOTABLE_LOSS:.0%} of the foreground of {len(cut)} volumes, at most "
            f"{cut[worst]:.0%} ({worst}): foreground_lost in the manifest has all"
        )


# Problems


def _update_problems(path: Path, run: Run) -> list[dict[str, str]]:
    """Writes what failed now and what an earlier run found and this one has not settled; these, the new ones first."""
    place, passed_over = str(run.input), {_place(outcome.source) for outcome in run.passed_over}
    there = {*passed_over, *map(_place, run.selected), *(_place(outcome.source) for outcome in run.outcomes)}

    def is_open(problem: dict[str, str]) -> bool:
        if problem["input"] != place:
            return is_folder(problem["input"])
        source, is_same_size = problem["source"], problem["size"] == run.size
        return source in passed_over if is_same_size else source in there

    failed = [
        {"source": _place(outcome.source), "input": place, "size": run.size, "reason": outcome.reason}
        for outcome in run.outcomes
        if outcome.status == "failed"
    ]
    problems = failed + [problem for problem in _read_problems(path) if is_open(problem)]
    if problems:
        write_atomically(path, "".join(json.dumps(problem) + "\n" for problem in problems).encode())
    else:
        path.unlink(missing_ok=True)
    return problems


def _read_problems(path: Path) -> Iterator[dict[str, str]]:
    """Those of earlier runs, but of versions that didn't say where they looked."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError, AttributeError):  # a line that a person broke
            problem = json.loads(line)
            if problem.keys() >= {"source", "input", "size", "reason"}:
                yield problem


def _place(source: Source) -> str:
    """A source's label as it is from any working directory."""
    return os.path.abspath(source.label)
