"""What processes that one torchrun started know of each other's end: why a run ends is said once, not once per rank."""

import os
import threading
import time
from pathlib import Path

PATIENCE_S = 3.0  # that a process has to say why it left
LINGER_S = 1.0
# That a process has to end by itself when another has left, to write a checkpoint for instance. torchrun kills it after
# 30 s, and would report that at length.
GRACE_S = 20.0


def is_first_to_leave() -> bool:
    """Whether no other process of this launch and node has left early; this one counts as such from now on."""
    note = _note()
    if note is not None:
        try:
            note.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # better said twice than never
            return True
    return True


def another_has_left(wait: bool = True) -> bool:
    """Whether a process of this launch and node has said why it leaves.

    wait: for it, as its connections end first.
    """
    note = _note()
    end = time.monotonic() + PATIENCE_S * wait
    while note is not None and not note.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return note is not None and note.exists()


def let_others_leave() -> None:
    """To be called by a process that ends with an error: torchrun kills the others then, and reports each of them."""
    if _note() is not None:
        time.sleep(LINGER_S)


def leave_after_another() -> None:
    """End this process, silently and with status 0, some time after another has left with an error.

    One that waits on a GPU for a rank that is gone (nccl) learns nothing of it, and handles no signal either.
    """

    def watch() -> None:
        while not another_has_left(wait=False):
            time.sleep(LINGER_S)
        time.sleep(GRACE_S)
        os._exit(0)

    if _note() is not None:
        threading.Thread(target=watch, name="leave_after_another", daemon=True).start()


def _note() -> Path | None:
    """The file that the first to leave makes, where torchrun started this process."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # .../attempt_0/RANK/error.json
    return file.parents[1] / "left" if file.name == "error.json" and len(file.parents) > 2 else None
