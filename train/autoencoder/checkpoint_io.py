"""How Lightning reads and writes the autoencoder's checkpoints."""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO

from common.checkpoint_files import load_checkpoint, save_checkpoint
from train.loop.background import BackgroundWork, snapshot


class BackgroundCheckpointIO(CheckpointIO):
    """As everything else here does: no code executed, no half files; and written beside training.

    (Lightning's AsyncCheckpointIO can't be used with another CheckpointIO than Lightning's own: the strategy replaces
    what it wraps.)

    Args:
        work: does the writing; its errors are `save_checkpoint`'s.
    """

    def __init__(self, work: BackgroundWork) -> None:
        self._work = work
        self._outdated: deque[Path] = deque()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self._work.wait()  # of a checkpoint there is one copy at most
        with contextlib.suppress(ValueError):
            self._outdated.remove(Path(path))
        self._work.submit(self._write, snapshot(checkpoint), Path(path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        save_checkpoint(checkpoint, path)
        while self._outdated:
            self._outdated.popleft().unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        self._work.wait()
        return load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removed once a checkpoint is written that takes its place: before that it may be the last good one."""
        self._outdated.append(Path(path))
