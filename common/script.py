"""Runs a script's main function and turns a user's mistake into one line and an exit status."""

import errno
import io
import sys
from collections.abc import Callable, Sequence

from common.errors import UserError


def run_script(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)` and returns the exit status: what it returns (None: 0), 2 after a UserError, 130 after Ctrl-C.

    A full disk is a user's too, whatever was being written, a log for example. Any other exception is a fault of ours
    and keeps its traceback. What a terminal can't show, such as a file name in Latin-1, is shown as question marks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return main(argv) or 0
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}nothing more can be written ({error.strerror}): make room and start again\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
