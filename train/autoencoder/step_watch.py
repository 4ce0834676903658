"""What ends the autoencoder's training after a step, on all ranks at once: a signal, or a loss that is not finite."""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as torch_distributed
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from train.loop.background import BackgroundWork
from train.loop.signals import StopRequest
from train.loop.step_flags import StepFlags


class TrainingStopped(Exception):
    """Training ended between two steps because of `signal_number`; a checkpoint is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


class NotFinite(Exception):
    """The loss or the gradient of optimiser step `step` was not finite, on some rank; its step was left out.

    `is_mine`: whether it can be this rank's doing. Gradients are averaged, so a bad one can be anybody's.
    """

    def __init__(self, step: int, what: str, value: float, is_mine: bool) -> None:
        super().__init__(f"the {what} is {value:g} at step {step}")
        self.step = step
        self.is_mine = is_mine


class StepWatch(Callback):
    """After each step: raises NotFinite; at SIGTERM or Ctrl-C `stop_if_asked` saves and raises TrainingStopped.

    All ranks do so after the same step. A GPU is not waited for: there the news of a step are read after the next one,
    and before anything is saved or validated, so that no checkpoint holds what a bad step has left behind.
    TrainingStopped is an exception since Lightning's own way to stop runs a validation first, for which there may be
    no time.

    Args:
        checkpoint: file that is saved at a signal.
        work: writes checkpoints and previews; what went wrong with it ends the training here.
        is_late: as of `StepFlags`.
    """

    def __init__(self, checkpoint: Path, work: BackgroundWork, is_late: bool | None = None) -> None:
        self._checkpoint, self._work, self._is_late = checkpoint, work, is_late
        self._request = StopRequest()
        self._flags: StepFlags | None = None
        self._received = 0  # signal that some rank has received

    def on_train_start(self, trainer: pl.Trainer, pl_module) -> None:
        self._flags = StepFlags(trainer.strategy.root_device, self._is_late)
        # Signals: not earlier, as Lightning has put its own handlers in place by now, which save nothing. What these
        # would tell the other ranks it asks for before every step, and makes a GPU wait for the answer.
        self._request.__enter__()
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self._work.check()
        news = _news(pl_module.watched, self._request.received, trainer)
        self._read(self._flags.exchange(trainer.global_step - 1, news))

    def on_validation_start(self, trainer: pl.Trainer, pl_module) -> None:
        self._read_last()
        self.stop_if_asked(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module, checkpoint: dict) -> None:
        self._read_last()

    def on_train_end(self, trainer: pl.Trainer, pl_module) -> None:
        self._read_last()
        self._request.__exit__(None, None, None)

    def on_exception(self, trainer: pl.Trainer, pl_module, exception: BaseException) -> None:
        self._request.__exit__(None, None, None)

    def _read_last(self) -> None:
        if self._flags is not None:
            self._read(self._flags.flush())

    def _read(self, news: tuple[int, list[float]] | None) -> None:
        if news is None:
            return
        step, (signal_number, bad_loss, bad_gradient, loss, gradient) = news
        if bad_loss:
            raise NotFinite(step, "loss", loss, is_mine=not -torch.inf < loss < torch.inf)
        if bad_gradient:
            raise NotFinite(step, "gradient", gradient, is_mine=True)
        self._received = self._received or int(signal_number)

    def stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self._received:
            trainer.save_checkpoint(self._checkpoint, weights_only=False)
            self._work.wait()
            trainer.strategy.barrier()  # where one process leaves, the launcher ends the one that still writes
            raise TrainingStopped(self._received)


class StopWhenAsked(Callback):
    """After a step `watch.stop_if_asked`, when what else was due then has been logged; so it comes last."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = watch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self._watch.stop_if_asked(trainer)


def _news(watched: dict[str, Tensor], signal_number: int, trainer: pl.Trainer) -> Tensor:
    """(5,) on the device: of all ranks the signal and whether loss, gradient are not finite; this rank's two values."""
    loss = watched["loss"].float()
    values = torch.stack([loss, watched.get("gradient", torch.zeros_like(loss))])  # no gradient under fp16
    signals = torch.full((1,), float(signal_number), device=loss.device)
    shared = torch.cat([signals, 1 - values.isfinite().float()])  # (3,)
    if trainer.world_size > 1:
        torch_distributed.all_reduce(shared, op=torch_distributed.ReduceOp.MAX)
    return torch.cat([shared, values])
