"""When the autoencoder's training validates, and with which random numbers."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from train.loop.rng import random_state, restore_random_state


class Validations(Callback):
    """Validates after every `every`-th optimiser step and after step `end`, once, wherever a run was stopped.

    Lightning counts batches of its own, and forgets a validation that was due where it was stopped. Here the steps
    count, and what was missed comes first when the run goes on.

    All validations draw the same random numbers (slices that the perceptual loss looks at), so that their figures tell
    the weights apart alone, and none changes those of the training.

    Args:
        every: optimiser steps.
        done_at: step of the last validation.
    """

    def __init__(self, every: int, done_at: int) -> None:
        self.every, self.done_at = every, done_at
        self.end = -1  # of the training; -1: never
        self._state_of_training: dict = {}
        self.is_all = False  # nothing is to be trained, only what was missed made up for

    @staticmethod
    def last_of(checkpoint: dict) -> int:
        """The step of the last validation before a checkpoint. Older ones don't say: none is made up for."""
        callbacks = checkpoint.get("callbacks")
        own = callbacks.get(Validations.__qualname__) if isinstance(callbacks, dict) else None
        done_at = own.get("done_at") if isinstance(own, dict) else None
        return done_at if isinstance(done_at, int) else checkpoint.get("global_step", 0)

    def state_dict(self) -> dict:
        return {"done_at": self.done_at}

    def is_due(self, step: int) -> bool:
        return step > self.done_at and (step % self.every == 0 or step == self.end)

    def on_train_start(self, trainer: pl.Trainer, pl_module) -> None:
        loop = trainer.fit_loop.epoch_loop
        loop._should_check_val_fx = lambda data_fetcher: self._is_due_now(trainer)
        if self._is_due_now(trainer):
            loop._batches_that_stepped = trainer.global_step - 1  # the step that it is logged at
            loop.val_loop.restarting = False  # from its first volume
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
        if self.is_all:
            loop.max_steps = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module) -> None:
        self._state_of_training = random_state()
        torch.manual_seed(trainer.global_rank)

    def on_validation_end(self, trainer: pl.Trainer, pl_module) -> None:
        restore_random_state(self._state_of_training)  # before a checkpoint holds it
        self.done_at = trainer.global_step

    def _is_due_now(self, trainer: pl.Trainer) -> bool:
        return trainer.enable_validation and self.is_due(trainer.global_step)
