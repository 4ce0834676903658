"""A folder held against a second process that would write the same files."""

import fcntl
import os
from pathlib import Path
from typing import IO

from common.errors import UserError


def lock_folder(folder: Path, doing: str) -> IO:
    """Hold a folder, which exists, until the returned file is closed; the lock also ends with the process.

    doing: what a process that holds it does there, for the message.

    Raises:
        UserError: another process holds it, for instance one that a killed launcher left behind.
    """
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{folder}: another process ({owner}) is {doing} in this folder; wait for it or end it"
        ) from None
    except OSError:  # a file system without locks: go on without
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file
