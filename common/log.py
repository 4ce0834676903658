"""Logging of a training run: text to the console and log.txt, numbers to TensorBoard and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path

LOGGER_NAME = "train"


def get_logger(rank: int = 0, file: str | Path | None = None) -> logging.Logger:
    """The training logger of this process.

    Rank 0 writes everything to the console (stderr) and, when given, appends to `file`; the other ranks write only
    warnings and errors, marked with their rank. Calling it again replaces the handlers of the call before.
    """
    logger = logging.getLogger(LOGGER_NAME)
    close_logger()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    formatter = _Formatter("" if rank == 0 else f"rank {rank}: ")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file, mode="a", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def close_logger() -> None:
    """Close the training logger's files and take its handlers off."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class _Formatter(logging.Formatter):
    """`[time] message`, with the level where it is not just information."""

    def __init__(self, mark: str) -> None:
        super().__init__("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S")
        self.mark = mark

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        record.message = f"{self.mark}{level}{record.message}"
        return super().formatMessage(record)


class JsonLines:
    """A file with one line of JSON for each logged step.

    Args:
        path: the file; what it holds is kept.
        start_step: the optimiser step the run goes on from. What an interrupted run logged after it is dropped, so
            that each step occurs once.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        _drop_steps_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` of optimiser step `step`; what is not finite becomes null, as JSON has no word for it."""
        known = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Scalars of a run, once as JSON lines (`metrics.jsonl`) and once for TensorBoard. For rank 0 only.

    Args:
        folder: the run folder.
        start_step: as of `JsonLines`.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self.lines = JsonLines(folder / "metrics.jsonl", start_step)
        self.board = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` of optimiser step `step`."""
        self.lines.write(step, scalars)
        for name, value in scalars.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self.lines.close()
        self.board.close()


def _drop_steps_after(path: Path, step: int) -> None:
    """Rewrite a JSON lines file without the steps after `step` and without a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
