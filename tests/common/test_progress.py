"""How far long work is: lines of text without a terminal, a bar with one."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from common import progress as module
from common.progress import Progress, tracked

STAMP = r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time that passes when `clock.now` is set."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def lines(capsys) -> list[str]:
    """What was written to stderr, without the times of day."""
    text = capsys.readouterr().err
    assert "\r" not in text
    assert all(re.match(STAMP, line) for line in text.splitlines()), text
    return [re.sub(STAMP, "", line) for line in text.splitlines()]


def test_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    with Progress("encoding", 200, "volume", done=20) as progress:
        for second in range(1, 91):
            clock.now = second
            progress.advance(2)
    assert lines(capsys) == [
        "encoding: 80 of 200 volumes, 2 volumes/s, 01:00 left",
        "encoding: 140 of 200 volumes, 2 volumes/s, 00:30 left",
        "encoding: 200 of 200 volumes, 2 volumes/s, 00:00 left",
        "encoding: 200 of 200 volumes, in 01:30",
    ]


def test_slow_steps_have_a_line_each_with_what_is_noted(clock, capsys):
    progress = Progress("stage 1", 4000, "step", done=1000)
    for step in (1, 2):
        clock.now = 90.0 * step
        assert progress.is_due
        progress.reach(1000 + step, "train/recon_loss 0.25")
        assert not progress.is_due
    progress.close()
    assert lines(capsys) == [
        "stage 1: 1001 of 4000 steps, train/recon_loss 0.25, 90 s a step, 74:58:30 left",
        "stage 1: 1002 of 4000 steps, train/recon_loss 0.25, 90 s a step, 74:57:00 left",
    ]


def test_a_line_is_written_when_asked_for_and_not_when_the_log_tells_it(clock, capsys):
    progress = Progress("stage 1", None, "step")
    clock.now = 2.0
    progress.reach(4, "loss 1", line=True)
    clock.now = 33.0
    progress.reach(66, line=False)
    assert not progress.is_due
    progress.reach(67)
    progress.close()
    assert lines(capsys) == ["stage 1: 4 steps, loss 1, 2 steps/s"]


def test_parts_of_a_volume_count(clock, capsys):
    with Progress("generating", 2, "volume") as progress:
        clock.now = 60.0
        progress.reach(0.5, "step 5/10")
    assert lines(capsys) == ["generating: 0.5 of 2 volumes, step 5/10, 120 s a volume, 03:00 left"]


@pytest.mark.parametrize(
    ("options", "rank", "expected"),
    [
        ({}, "0", ["reading: 2 of 3 files, 20 s a file, 00:20 left", "reading: 3 of 3 files, in 01:00"]),
        ({}, "1", []),
        ({"show": True}, "1", ["reading: 2 of 3 files, 20 s a file, 00:20 left", "reading: 3 of 3 files, in 01:00"]),
        ({"show": False}, "0", []),
    ],
)
def test_items_are_counted_in_the_first_process(clock, capsys, monkeypatch, options, rank, expected):
    monkeypatch.setenv("RANK", rank)
    for item in tracked("abc", "reading", "file", **options):
        clock.now += 20.0
        assert item in "abc"
    assert lines(capsys) == expected


def test_short_work_is_done_in_silence(clock, capsys):
    for _ in tracked("abc", "reading", "file"):
        clock.now += 9.0
    assert lines(capsys) == []


def test_work_that_breaks_off_is_not_said_to_be_done(clock, capsys):
    def break_off() -> None:
        with Progress("encoding", 6, "volume") as progress:
            clock.now = 40.0
            progress.advance(5)
            raise RuntimeError

    pytest.raises(RuntimeError, break_off)
    assert lines(capsys) == ["encoding: 5 of 6 volumes, 8 s a volume, 00:08 left"]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with Progress("encoding", 6, "volume") as progress:
        progress.reach(6, "loss 1", line=True)
    assert re.search(r"\rencoding: 100%\|.*\| 6/6 \[.*volume/s, loss 1\]", terminal.getvalue())
    assert " of 6 volumes" not in terminal.getvalue()
