"""A preview is not worth a training run: where one fails, that is said, and training goes on."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from common.errors import UserError
from train.loop.deletion import check_not_deleted

Result = TypeVar("Result")


class GivenUp(Exception):
    """A preview that is not made, and why."""


def attempt(make: Callable[[], Result], what: str, run: Path, logger: logging.Logger, instead: str) -> Result | None:
    """The result of `make`; None, with a warning of one line, where it fails in whatever way.

    what: the preview, for the log. instead: how to train without previews.

    Raises:
        UserError: the run folder was deleted meanwhile: that ends the run all the same.
    """
    try:
        return make()
    except Exception as error:
        check_not_deleted(run)
        logger.warning("%s: %s", what, _reason(error, instead))
        logger.debug("%s", what, exc_info=True)
    torch.cuda.empty_cache()  # only here is the error gone, and with it what its frames held
    return None


def _reason(error: Exception, instead: str) -> str:
    if isinstance(error, (GivenUp, UserError)):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"not enough memory; {instead}"
    said = " ".join(str(error).split())
    return f"failed, training goes on ({type(error).__name__}: {said}); {instead}"
