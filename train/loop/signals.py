"""Signals (SIGTERM, SIGINT): a request to stop between two steps, and loading processes that outlive one."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them, within a `with` block. A second signal acts as usual.

    `received` is 0 or the signal's number; the process should then end with exit status 128 + that number. Only a
    program's main thread may handle signals: in another one nothing is changed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
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
        self.received = number
        self.__exit__(None, None, None)


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
