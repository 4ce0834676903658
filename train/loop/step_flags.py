"""What went wrong in a step, read without making a GPU wait."""

import torch
from torch import Tensor


class StepFlags:
    """Small integers of each step, handed back as Python numbers.

    Reading a GPU's tensor waits until all work given so far is done, and then the GPU waits for new work. So on a GPU
    the flags of a step are copied beside its work, and come back at the next call, when the copy is long done. On a CPU
    there is nothing to wait for, and they come back at once.

    Args:
        device: where the flags are computed.
        is_late: whether they come one step late; None: on a GPU.
    """

    def __init__(self, device: torch.device, is_late: bool | None = None) -> None:
        self.is_late = device.type == "cuda" if is_late is None else is_late
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, step: int, flags: Tensor) -> tuple[int, list[int]] | None:
        """Give this step's flags (n,); get back a step and its flags, or None if there are none yet."""
        before, self._pending = self._pending, self._copy(step, flags)
        return _read(before) if self.is_late else self.flush()

    def flush(self) -> tuple[int, list[int]] | None:
        """The flags that are still to come, waiting for them, e.g. before a checkpoint."""
        pending, self._pending = self._pending, None
        return _read(pending)

    def _copy(self, step: int, flags: Tensor) -> tuple[int, Tensor, torch.cuda.Event | None]:
        if flags.device.type != "cuda":
            return step, flags.clone(), None
        copied = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True).copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return step, copied, event


def _read(pending: tuple[int, Tensor, torch.cuda.Event | None] | None) -> tuple[int, list[int]] | None:
    if pending is None:
        return None
    step, flags, event = pending
    if event is not None:
        event.synchronize()
    return step, flags.tolist()
