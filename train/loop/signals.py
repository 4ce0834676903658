"""Signals (SIGTERM, SIGINT, SIGUSR1): a request to stop between two steps, and loading processes that outlive one."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from common.launched import another_has_left
from common.log import process_rank, stamped
from common.script import SAME_ORDER_S


class StopRequest:
    """Notes these signals instead of dying of them, within a `with` block, and says so on rank 0.

    `received` is 0 or the signal's number; the process should then end with exit status 128 + that number. A second
    signal ends it at once, by SystemExit with that status, and a third acts as usual. Only a program's main thread may
    handle signals: in another one nothing is changed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last one as Slurm's --signal sends it

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.received:
            self.received, self._since = number, time.monotonic()
            _say(f"{name}: stopping after the next step, with a checkpoint; a second one stops at once, without")
        elif time.monotonic() - self._since > SAME_ORDER_S:
            self.__exit__(None, None, None)
            _say(f"{name} again: stopping at once; the same command goes on from the last checkpoint")
            raise SystemExit(128 + number)


def _say(text: str) -> None:
    """On stderr from within a signal handler, where streams may be in use; nothing where an error ends the run."""
    if process_rank() == 0 and not another_has_left(wait=False):
        os.write(2, f"{stamped(text)}\n".encode())


def ignore_signals(worker_id: int) -> None:
    """Make a DataLoader worker outlive a signal sent to the whole process group; its parent ends it in order."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def close_loader(loader) -> None:
    """End what a DataLoader loads with. Processes ignore signals, so leaving that to the interpreter's exit would hang.

    A loader of another kind has a `close` of its own.
    """
    if hasattr(loader, "close"):
        loader.close()
    elif loader._iterator is not None:  # only set with persistent workers; there is no public way
        loader._iterator._shutdown_workers()
