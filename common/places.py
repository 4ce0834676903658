"""What lies at a place that a user names, on the command line or in a file: the only place that asks the disk for it.

`Path.exists` and its relatives raise for a folder that may not be entered and for names that are too long, and
`Path.expanduser` for users that there are not. Here that is a UserError with the place and the reason.
"""

import os
import stat
from pathlib import Path

from common.errors import UserError


def exists(path: str | Path) -> bool:
    """Whether there is something. UserError where that can't be known."""
    return _mode(path) is not None


def is_file(path: str | Path) -> bool:
    """As `exists`: whether it is a file, or a link to one."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: str | Path) -> bool:
    """As `exists`: whether it is a folder, or a link to one."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def missing_folder(path: str | Path) -> str:
    """Why `is_folder` is false, in words."""
    return "a file, a folder is needed" if exists(path) else "no such folder"


def home_expanded(path: str | Path) -> Path:
    """With the home folder for `~` and `~user`. UserError: there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such user, or no home folder of theirs: write the whole path") from error


def _mode(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be looked at ({error.strerror}): correct the place or its rights") from error
    except ValueError as error:  # a NUL, which ends names, or half a character
        raise UserError(f"{path}: has a character that no file name can have: write another name") from error
