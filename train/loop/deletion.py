"""A run folder that is deleted during training ends it in one line."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


def check_not_deleted(folder: Path, witness: Path | None = None) -> None:
    """UserError where a run folder, or a file that it had, is gone; before something is written that makes it again."""
    if not (witness or folder).exists():
        raise _deleted(folder)


@contextmanager
def deletion_explained(folder: Path) -> Iterator[None]:
    """Inside, a file of the run folder that is not found is taken for its deletion, also by TensorBoard's thread."""
    place = os.path.abspath(folder)

    def is_deletion(error: BaseException | None) -> bool:
        path = error.filename if isinstance(error, FileNotFoundError) else None
        return path is not None and Path(os.path.abspath(os.fsdecode(path))).is_relative_to(place)

    hook = threading.excepthook
    threading.excepthook = lambda args: None if is_deletion(args.exc_value) else hook(args)
    try:
        yield
    except (FileNotFoundError, UserError) as error:  # the latter of a file that could not be written
        if not is_deletion(error) and not is_deletion(error.__cause__):
            raise
        raise _deleted(folder) from error
    finally:
        threading.excepthook = hook


def _deleted(folder: Path) -> UserError:
    return UserError(f"{folder}: the run folder was deleted during training, which ends here: start anew")
