"""How far long work is: a bar on a terminal; without one, as under Slurm or nohup, a line every half minute."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from common.log import process_rank, stamped

LINE_EVERY_S = 30.0
DELAY_S = 3.0  # before the bar of a short step appears


class Progress:
    """Tells on stderr how far some work is; to be used in a `with` block.

    Args:
        label: what is done. total: how much there is to do, None where that is not known. unit: what is counted.
        done: how much was done before.
        show: whether anything is shown; None: in the first of several processes.
        transient: a step on the way: its bar comes late and goes away in the end.
        layout: of the bar, as tqdm's `bar_format`.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        done: float = 0,
        show: bool | None = None,
        transient: bool = False,
        layout: str | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        show, on_terminal = process_rank() == 0 if show is None else show, sys.stderr.isatty()
        self._writes_lines = show and not on_terminal
        options = {"leave": not transient, "delay": DELAY_S * transient, "bar_format": layout, "dynamic_ncols": True}
        options["disable"] = not (show and on_terminal)
        self._bar = tqdm(desc=label, total=total, unit=unit, initial=done, **options)
        self._first, self._began = done, time.monotonic()
        self._last_line = self._began

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self.close()

    @property
    def is_due(self) -> bool:
        """Whether the next `reach` writes a line."""
        return self._writes_lines and time.monotonic() - self._last_line >= LINE_EVERY_S

    @property
    def left(self) -> str:
        """The time that the rest takes at the speed so far, in words; empty where that is not known."""
        rate = self._rate
        return f"{tqdm.format_interval((self.total - self.done) / rate)} left" if self.total and rate else ""

    def advance(self, by: float = 1) -> None:
        self.reach(self.done + by)

    def reach(self, done: float, note: str = "", line: bool | None = None) -> None:
        """So much is done in all.

        note: what else is to be told, e.g. losses. line: True: a line now; False: none now, since the log tells it;
        None: if the last one is half a minute old.
        """
        self.done = done
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.n = round(done, 2)
        self._bar.update(0)
        if line is False:
            self._last_line = time.monotonic()
        elif self._writes_lines and line or self.is_due:
            self._write(note, self._speed, self.left)

    def close(self) -> None:
        """The end. Where all was done and it took long enough for a line, a last one says so."""
        self._bar.close()
        if self._last_line > self._began and self._writes_lines and self.done == self.total:
            self._write(f"in {tqdm.format_interval(time.monotonic() - self._began)}")
        self._writes_lines = False

    @property
    def _rate(self) -> float:
        return (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)

    @property
    def _speed(self) -> str:
        rate = self._rate
        if rate == 0:
            return ""
        return f"{rate:.3g} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s a {self.unit}"

    def _write(self, *parts: str) -> None:
        done = f"{self.done:.1f}" if self.done % 1 else f"{self.done:.0f}"
        count = f"{done} {self.unit}s" if self.total is None else f"{done} of {self.total} {self.unit}s"
        sys.stderr.write(stamped(f"{self.label}: {', '.join(filter(None, (count, *parts)))}") + "\n")
        self._last_line = time.monotonic()


def tracked(items: Iterable, label: str, unit: str, total: int | None = None, **options: Any) -> Iterator:
    """The items, while a `Progress` tells how many are done. total: their number, where they have no length."""
    with Progress(label, len(items) if total is None else total, unit, **options) as progress:
        for item in items:
            yield item
            progress.advance()
