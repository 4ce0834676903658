"""How Lightning reads and writes the autoencoder's checkpoints, and the random state in them."""

import contextlib
from collections import deque
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as torch_distributed
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import CheckpointIO

from common.checkpoint_files import load_checkpoint, remove_older, save_checkpoint
from train.loop.background import BackgroundWork, snapshot
from train.loop.deletion import check_not_deleted
from train.loop.rng import random_state, restore_random_state

PREFIX = "step-"  # of the regular checkpoints, before their step


class BackgroundCheckpointIO(CheckpointIO):
    """As everything else here does: no code executed, no half files; and written beside training.

    Of the regular ones the newest `keep` are kept (0: all), which Lightning would do by its own memory alone.
    read: content of checkpoints that have been read already, by their paths; it is handed on once and let go.

    (Lightning's AsyncCheckpointIO can't be used with another CheckpointIO than Lightning's own: the strategy replaces
    what it wraps.)
    """

    def __init__(self, work: BackgroundWork, keep: int, read: dict[Path, dict[str, Any]]) -> None:
        self._work, self._keep, self._read = work, keep, read
        self._outdated: deque[Path] = deque()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self._work.wait()  # of a checkpoint there is one copy at most
        with contextlib.suppress(ValueError):
            self._outdated.remove(Path(path))
        self._work.submit(self._write, snapshot(checkpoint), Path(path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        check_not_deleted(path.parent.parent)
        save_checkpoint(checkpoint, path)
        remove_older(path, PREFIX, self._keep)
        while self._outdated:
            self._outdated.popleft().unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        self._work.wait()
        return self._read.pop(Path(path), None) or load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removed once a checkpoint is written that takes its place: before that it may be the last good one."""
        self._outdated.append(Path(path))


class RandomState(Callback):
    """Keeps torch's global generators in the checkpoint: codebook restarts and random slices draw from them.

    Those of all ranks: volumes of several sizes have several numbers of slices, and the ranks' generators drift apart.
    """

    def __init__(self) -> None:
        self._loaded: dict | None = None

    def state_dict(self) -> dict:
        own = random_state()
        if not (torch_distributed.is_available() and torch_distributed.is_initialized()):
            return own
        ranks = [own] * torch_distributed.get_world_size()
        torch_distributed.all_gather_object(ranks, own)  # a checkpoint is made by all ranks at once
        return {**ranks[0], "ranks": ranks}

    def load_state_dict(self, state_dict: dict) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module) -> None:
        # as late as possible, since setting up the training draws numbers too
        if self._loaded is not None:
            ranks = self._loaded.get("ranks") if isinstance(self._loaded, dict) else None
            is_of_all = isinstance(ranks, list) and len(ranks) == trainer.world_size
            own = ranks[trainer.global_rank] if is_of_all else self._loaded
            restore_random_state(own)
            self._loaded = None
