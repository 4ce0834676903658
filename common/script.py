"""Runs a script's main function and turns a user's mistake into one line and an exit status."""

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from common.errors import UserError
from common.launched import another_has_left, is_first_to_leave, let_others_leave
from common.text import printable

MISTAKE = 2  # exit status after a user's mistake; 128 + its number after a signal
INTERRUPTED = 128 + signal.SIGINT
# A GPU's memory in pieces that grow, so that what is free lies together; unless the user set something.
ALLOCATOR_OPTIONS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# What the operating system says of a place, and no program can help: it is the user's to choose or change.
OF_PLACES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    *(errno.EIO, errno.ESTALE),
)
OUT_OF_MEMORY = "take a smaller batch_size, or see docs/performance.md, Memory; the same command goes on"
MAIN_MEMORY = "the main memory does not suffice: take fewer processes (num_workers), or smaller batches or volumes"
# The same order comes twice where a terminal or Slurm sends it to all processes, and torchrun passes its own on.
SAME_ORDER_S = 2.0


def run_script(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)` and returns the exit status: what it returns (None: 0), 2 after a UserError, 130 after Ctrl-C.

    A full disk is a user's too, whatever was being written, a log for example, and so is a place that may not be
    entered, read or written. Any other exception is a fault of ours
    and keeps its traceback. What a terminal can't show, such as a file name in Latin-1, is shown as question marks. A
    second Ctrl-C ends the process at once, whatever it still has to close.

    Under torchrun the first to leave says why. The others, with mistakes of their own or because it has left, are
    silent and return 0: torchrun fails by the first, and would report each of the others at length.

    Where a process group is still there, which an error leaves behind (`common/processes.py`), the process ends here:
    taking the group down at the interpreter's end would wait for peers that never come.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not any(name in os.environ for name in ALLOCATOR_OPTIONS):  # read when torch is imported
        os.environ[ALLOCATOR_OPTIONS[0]] = "expandable_segments:True"
    try:
        status = _status_of(main, argv)
    except BaseException as error:
        if not _is_in_group():
            raise
        status = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
            is_first_to_leave()
    if _is_in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _status_of(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None) -> int:
    try:
        with _interrupts():
            return main(argv) or 0
    except UserError as error:
        return _leave(f"error: {' '.join(str(error).splitlines())}", MISTAKE)
    except OSError as error:
        if error.errno in OF_PLACES and error.filename is not None:
            return _leave(f"error: {error.filename}: {error.strerror}: choose another place, or change this", MISTAKE)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        full = f"nothing more can be written ({error.strerror})"
        return _leave(f"error: {where}{full}: make room and start again", MISTAKE)
    except KeyboardInterrupt:
        return _leave("interrupted", INTERRUPTED)
    except MemoryError:
        return _leave(f"error: {MAIN_MEMORY}", MISTAKE)
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            return _leave(f"error: {MAIN_MEMORY}", MISTAKE)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not have been imported
            return _leave(f"error: the GPU's memory does not suffice: {OUT_OF_MEMORY}", MISTAKE)
        if another_has_left():  # as of a collective operation whose partner is gone
            return 0
        raise


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once. Nothing is changed outside the main thread, or where it acts otherwise."""
    since = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - since > SAME_ORDER_S:
            os.write(2, b"interrupted again: ending at once\n")
            os._exit(INTERRUPTED)

    is_ours = threading.current_thread() is threading.main_thread()
    is_ours = is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_in_group() -> bool:
    """Whether this process is in a process group. Without importing torch, which takes seconds."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave(text: str, status: int) -> int:
    if not is_first_to_leave():
        return 0
    sys.stderr.write(f"{printable(text)}\n")
    let_others_leave()
    return status
