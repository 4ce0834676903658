"""Runs a script's main function and turns a user's mistake into one line and an exit status."""

import sys
from collections.abc import Callable, Sequence

from config.errors import UserError


def run_script(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)` and returns the exit status: what it returns (None: 0), 2 after a UserError, 130 after Ctrl-C.

    Any other exception is a fault of ours and keeps its traceback.
    """
    try:
        return main(argv) or 0
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
