"""The programs' log: text to the console and, in training, to log.txt."""

import logging
import os
import sys
import time
from pathlib import Path

from common.text import printable

LOGGER_NAME = "train"
# Modules that warn on their own have loggers named after themselves; their warnings go where the program's log goes.
PACKAGES = ("AutoEncoder", "common", "config", "dataset", "ddpm", "evaluation")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def process_rank() -> int:
    """This process's place among all that a launcher started, before anything else knows it; 0 for a lone process."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def stamped(text: str) -> str:
    """A line as the log has it, for what is shown and not kept."""
    return f"[{time.strftime(TIME_FORMAT)}] {text}"


def get_logger(rank: int = 0, file: str | Path | None = None) -> logging.Logger:
    """The log of this process.

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
        handlers.append(logging.FileHandler(file, mode="a", encoding="utf-8", errors="replace"))
    for handler in handlers:
        handler.setFormatter(formatter)
    for own in _loggers():
        own.handlers.extend(handlers)
    return logger


def close_logger() -> None:
    """Close the log's files and take its handlers off."""
    for own in _loggers():
        for handler in list(own.handlers):
            own.removeHandler(handler)
            handler.close()


def _loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in (LOGGER_NAME, *PACKAGES)]


class _Formatter(logging.Formatter):
    """`[time] message`, with the level where it is not just information."""

    def __init__(self, mark: str) -> None:
        super().__init__("[%(asctime)s] %(message)s", TIME_FORMAT)
        self.mark = mark

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        record.message = f"{self.mark}{level}{printable(record.message)}"
        return super().formatMessage(record)
