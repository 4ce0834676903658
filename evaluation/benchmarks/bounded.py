"""A command with a time limit, ended with all that it started."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 3.0  # between SIGTERM and SIGKILL
PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Ended:
    """How a command ended. status: None where it was killed at its limit."""

    status: int | None
    seconds: float
    output: str
    errors: str


def run_bounded(command: Sequence[str], limit_s: float, folder: Path) -> Ended:
    """Runs a command in `folder` for at most so many seconds; whatever ends this call ends the command too.

    It leads a process group of its own, so a Ctrl-C on the terminal reaches this process alone. What it says goes to
    files: a pipe would be waited for as long as a grandchild holds it.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        begin = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=errors, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        said = []
        for file in (output, errors):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
        return Ended(status, time.monotonic() - begin, *said)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that comes from it, in sessions of their own too (as torchrun's), if it runs; if it has
    ended, what is left in its group."""
    if process.poll() is None:
        family = {process.pid, *_descendants(process.pid)}
        _signal(family, signal.SIGTERM)
        _wait(process, family, GRACE_S)
        _signal(family | _descendants(process.pid), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _signal(family: set[int], number: int) -> None:
    for pid in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _wait(process: subprocess.Popen, family: set[int], seconds: float) -> None:
    """Until all have ended, at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended = process.poll() is not None
        if ended and not any(_parent(pid) is not None for pid in family - {process.pid}):
            return
        time.sleep(0.05)


def _descendants(pid: int) -> set[int]:
    """Children, their children and so on; none where the system has no /proc."""
    parents = {int(entry.name): _parent(int(entry.name)) for entry in PROCESSES.glob("[0-9]*")}
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def _parent(pid: int) -> int | None:
    """The process that started this one; None where it has ended, also as a zombie."""
    try:
        state, parent = (PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(parent)
