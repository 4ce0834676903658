"""What all ranks agree on in each step: whether it is sound, and whether to stop."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.processes import Distributed
from train.loop.signals import StopRequest
from train.loop.step_flags import StepFlags


class Agreement:
    """The same decisions on every rank at the same step, without making a GPU wait for the host.

    On a GPU what a step brought is known in the next one (`StepFlags`). So the optimiser has to leave a bad step out on
    the device, by `exchange`'s result as its `found_inf`, and a signal stops one step later.

    files: of the data set, by index.
    may_overflow: gradients may be infinite: a gradient scaler leaves those steps out by itself.
    """

    def __init__(self, distributed: Distributed, stop: StopRequest, files: Sequence[Path], may_overflow: bool) -> None:
        self.signal_number = 0  # or the signal that all ranks stop for
        self._distributed, self._stop = distributed, stop
        self._files, self._may_overflow = files, may_overflow
        self._flags = StepFlags(distributed.device)
        self._batches: dict[int, tuple[Tensor, Tensor]] = {}  # of steps whose flags are to come: loss, indices

    def exchange(self, step: int, loss: Tensor, grad_norm: Tensor, indices: Tensor) -> Tensor:
        """To be called by all ranks between the backward pass and the optimiser step; indices (B,) are the batch's.

        Returns:
            1.0 if this step is bad on any rank, else 0.0: float32, a scalar on the device.

        Raises:
            UserError: the last step whose flags are known was bad; on all ranks, naming those concerned.
        """
        is_bad = [~loss.isfinite(), ~grad_norm.isfinite() & (not self._may_overflow)]
        stop = torch.full((1,), self._stop.received, device=loss.device)  # unlike a copy this doesn't wait
        flags = self._distributed.maximum(torch.cat([torch.stack(is_bad).long(), stop]))
        self._batches[step] = loss.detach(), indices
        self._read(self._flags.exchange(step, flags))
        return flags[:2].any().float()

    def flush(self) -> None:
        """Wait for the flags of the last step, before anything of it is written. Errors as `exchange`."""
        self._read(self._flags.flush())

    def _read(self, known: tuple[int, list[int]] | None) -> None:
        if known is None:
            return
        step, (loss_is_bad, gradient_is_bad, self.signal_number) = known
        loss, indices = self._batches.pop(step)
        if loss_is_bad or gradient_is_bad:
            raise UserError(self._describe_non_finite(step, loss, indices))

    def _describe_non_finite(self, step: int, loss: Tensor, indices: Tensor) -> str:
        """What each concerned rank's batch was. To be called on all ranks."""
        files = ", ".join(str(self._files[index]) for index in indices.tolist())
        own = f"rank {self._distributed.rank}: loss {loss.item():g}, files {files}"
        ranks = self._distributed.gather((loss.isfinite().item(), own))
        # With finite losses and a gradient that is not, the average no longer tells whose it was.
        guilty = [text for is_finite, text in ranks if not is_finite] or [text for _, text in ranks]
        what = "gradient" if all(is_finite for is_finite, _ in ranks) else "loss"
        return (
            f"step {step}: the {what} is not finite, stopped before the optimiser step; {'; '.join(guilty)}; look at "
            "these files, or lower the learning rate, clip gradients (grad_clip=1) or use amp_dtype=bf16"
        )
