"""Runs another script of this project to its end, and ends it first when this process has to go."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = "train/launch.py"


def run_child(
    command: Sequence[str], processes: int = 1, output: Path | None = None, folder: Path | None = None
) -> int:
    """The exit status of a command, `SCRIPT ARGUMENTS`; the script's path is below the project's folder.

    processes: that it works in; each gets its share of the cores. output: file that what it says is added to; None:
    it says it here. folder: that it works in; None: this one. Whatever ends this process while it waits sends the child
    the same signal, at which trainings save a checkpoint, and waits for its end.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": f"{max(1, (os.cpu_count() or 1) // processes)}"}
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    with contextlib.ExitStack() as closing:
        said = None if output is None else closing.enter_context(output.open("ab"))
        child = closing.enter_context(subprocess.Popen(words, cwd=folder, env=environment, stdout=said, stderr=said))
        try:
            return child.wait()
        except BaseException as error:  # a terminal's Ctrl-C the child may have got as well: twice is once to it
            child.send_signal(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
            child.wait()
            raise


@contextlib.contextmanager
def exit_at_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), so that what has to be closed is closed; outside the main thread nothing."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
