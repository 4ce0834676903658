"""Modes of modules that hold for a while and are restored exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every sub-module has the very mode that it had before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def requires_grad(module: nn.Module, value: bool) -> Iterator[None]:
    """The module's parameters have `requires_grad == value` inside, and what they had before afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(value)
    try:
        yield
    finally:
        for parameter, had in before:
            parameter.requires_grad_(had)
