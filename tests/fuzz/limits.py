"""A process of its own for what may go wrong, which the operating system holds to 5 s of CPU time and 500 MB."""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError

CPU_S, MEMORY_BYTES = 5, 500 * 2**20
WALL_S = 60  # other processes may need the core
LONGEST_MESSAGE = 2000


class Limited:
    """Calls `door(folder, example)` in a forked process, which everything is imported into already.

    A UserError of one readable line is as good as a result. Any other end of an example fails the test with its
    traceback, or with the signal that ended the process; then a new one is forked.
    """

    def __init__(self, door: Callable[[Path, Any], None]) -> None:
        self.door = door
        self._process: Any = None

    def __call__(self, example: Any) -> None:
        if self._process is None:
            self._start()
        self._here.send(example)
        if not self._here.poll(WALL_S):
            self.close()
            raise AssertionError(f"still at work after {WALL_S} s")
        try:
            problem = self._here.recv()
        except EOFError:
            self._process.join()
            status, self._process = self._process.exitcode, None
            what = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise AssertionError(f"the process ended: {what}") from None
        assert problem is None, problem

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self._process = context.Process(target=self._serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def _serve(self, connection: Any) -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
        while True:
            try:
                example = connection.recv()
            except EOFError:
                return
            with tempfile.TemporaryDirectory() as folder:
                resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S + 1, resource.RLIM_INFINITY))
                problem = _problem(self.door, Path(folder), example)
            connection.send(problem)


def _problem(door: Callable[[Path, Any], None], folder: Path, example: Any) -> str | None:
    try:
        door(folder, example)
    except UserError as error:
        message = str(error)
        if not 0 < len(message) <= LONGEST_MESSAGE:
            return f"not a readable line, but {len(message)} characters: {message[:500]!r}"
    except BaseException:
        return traceback.format_exc()[-4000:]
    return None
