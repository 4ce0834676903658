"""The programs' log: text to the console and, in training, to log.txt."""

from __future__ import annotations

import logging
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
