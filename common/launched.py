"""What processes that one torchrun started know of each other's end: why a run ends is said once, not once per rank."""

import os
import time
from pathlib import Path

PATIENCE_S = 3.0  # that a process has to say why it left
LINGER_S = 1.0


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


def _note() -> Path | None:
    """The file that the first to leave makes, where torchrun started this process."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # .../attempt_0/RANK/error.json
    return file.parents[1] / "left" if file.name == "error.json" and len(file.parents) > 2 else None
