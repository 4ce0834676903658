"""torch.compile, and what users are told where it can't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import UserError

MOST_SHAPES = 64  # different shapes that are compiled, each for itself; torch runs further ones uncompiled


@contextmanager
def compiling(option: str = "compile", remedy: str = "leave --compile out") -> Iterator[None]:
    """Around calls of compiled modules: the first call with each shape compiles.

    Args:
        option, remedy: what compiling was asked for by and how to go without, for the message.

    Raises:
        UserError: this machine can't compile.
    """
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{option}: torch cannot compile on this machine ({reason}): {remedy}") from error
