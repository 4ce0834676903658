"""What every training process has from its start to its end: its place among the ranks, signals, the log."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.log import close_logger, get_logger
from common.processes import Distributed, joined
from train.loop.signals import StopRequest


@dataclass(frozen=True)
class Session:
    """One process's training from start to end."""

    distributed: Distributed
    stop: StopRequest  # signals that ask to stop
    logger: logging.Logger
    closing: contextlib.ExitStack  # closes what is given to it when the session ends, whatever happens
    schema: type | None = None  # of the script's options, by which it is told what of a run may change

    @property
    def device(self) -> torch.device:
        return self.distributed.device

    @property
    def is_main(self) -> bool:
        return self.distributed.is_main

    def log_to(self, file: Path) -> None:
        """Append the log to a file too."""
        get_logger(self.distributed.rank, file)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks during backward; a lone process needs no wrapper."""
        if self.distributed.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.closing.callback(_release, wrapped)
        return wrapped

    @staticmethod
    def exchanging(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
        """Around a pass of `parallel`'s model: gradients are averaged over the ranks in the last of a step alone."""
        return contextlib.nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync()


@contextlib.contextmanager
def session(device: str, arithmetic: str = "fast", schema: type | None = None) -> Iterator[Session]:
    """Join the other processes, for as long as the block lasts. Arguments, errors: as `common.processes.joined`."""
    with contextlib.ExitStack() as closing:
        stop = closing.enter_context(StopRequest())
        distributed = closing.enter_context(joined(device, arithmetic=arithmetic, fixed_shapes=True))
        logger = get_logger(distributed.rank)
        closing.callback(close_logger)
        yield Session(distributed, stop, logger, closing, schema)


def _release(wrapped: DistributedDataParallel) -> None:
    """End the reducer of a model before its process group.

    Whoever lets go of the process group last ends its threads. The reducer would do so without letting others into the
    interpreter, for which gloo's thread may be waiting to free the last barrier's tensors: for ever.
    """
    del wrapped.reducer, wrapped.logger
