"""What a BiFlowNet run has to remember: weights, averaged weights, optimiser, scaler, position in the data and RNG."""

import argparse
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from common.checkpoint_contents import count_in
from common.checkpoint_files import load_checkpoint
from common.errors import UserError
from common.optimiser import build_adam
from config.schema.option import BEGINNING
from ddpm.checkpoint import load_biflownet_weights, load_part_weights
from ddpm.frozen_base import part_of, with_part
from ddpm.latent_scaling import LatentScaling
from ddpm.process import OFFICIAL, SCALING, take_scaling
from train.diffusion.batches import LatentBatches
from train.diffusion.ema import EMA
from train.diffusion.run_folder import step_of
from train.loop.averages import is_optimizer_state
from train.loop.continuing import changes, news_of
from train.loop.rng import random_state, restore_random_state

# Scale of the fp16 loss below which halving it further cannot help: the gradients themselves are not finite.
SMALLEST_LOSS_SCALE = 2.0**-10


@dataclass
class TrainingState:
    """One run's state between two optimiser steps, and its form in a checkpoint file."""

    model: nn.Module  # what trains, `part_of` the denoiser; not wrapped in DistributedDataParallel
    ema: EMA
    optimizer: torch.optim.Optimizer  # of `build_adam`, which brings loaded averages into the parameters' layout
    scaler: torch.amp.GradScaler
    step: int = 0  # optimiser steps done
    epoch: int = 0  # the epoch that the next step belongs to
    samples_seen: int = 0  # of this epoch, over all ranks
    best_loss: float | None = None  # least held-out loss so far (train/diffusion/held_out.py)
    autoencoder: str | None = None  # fingerprint of the autoencoder that made the latents, if known
    base: str | None = None  # fingerprint of the frozen network beside which the model trains, if it is a part
    scaling: LatentScaling | None = None  # of the process, where it has one
    averaged: nn.Module | None = None  # the denoiser with averaged weights
    _read: tuple[Path | None, dict | None] = (None, None)  # a checkpoint file's content, by its path

    @classmethod
    def start(
        cls,
        cfg: DictConfig,
        denoiser: nn.Module,
        device: torch.device,
        autoencoder: str | None,
        scaling: LatentScaling | None = None,
        base: str | None = None,
    ) -> "TrainingState":
        """That of a new run; `denoiser` is on its device."""
        model = part_of(denoiser)
        ema = EMA(model, cfg.ema_decay, cfg.ema_every, cfg.ema_start)
        averaged = with_part(denoiser, ema.model).eval()
        optimizer = build_adam(model.parameters(), cfg.lr, tuple(cfg.adam_betas), fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=cfg.enable_amp and cfg.amp_dtype == "fp16")
        return cls(
            model, ema, optimizer, scaler, autoencoder=autoencoder, base=base, scaling=scaling, averaged=averaged
        )

    def is_finished(self, epochs: int, max_steps: int | None) -> bool:
        return self.epoch >= epochs or (max_steps is not None and self.step >= max_steps)

    def advance(self, samples: int, samples_per_epoch: int) -> None:
        """One optimiser step of so many samples is done, which may end the epoch."""
        self.step += 1
        self.samples_seen += samples
        if self.samples_seen >= samples_per_epoch:
            self.epoch, self.samples_seen = self.epoch + 1, 0

    def loss_scale(self) -> dict[str, float]:
        """The fp16 loss scale, to be logged; nothing without one.

        Raises:
            UserError: it is so small that every step is skipped for gradients without end.
        """
        if not self.scaler.is_enabled():
            return {}
        scale = self.scaler.get_scale()
        if scale < SMALLEST_LOSS_SCALE:
            raise UserError(
                f"step {self.step}: gradients overflow fp16 whatever the loss scale (now {scale:g}); use "
                "amp_dtype=bf16, a lower lr or grad_clip=1"
            )
        return {"loss_scale": scale}

    def state_dict(self, config: dict, batches: LatentBatches) -> dict:
        """The content of a checkpoint file: the published keys, and what an exact resume needs besides."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "opt": self.optimizer.state_dict(),
            "args": argparse.Namespace(**config),
            "epoch": self.epoch,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "num_samples": batches.num_samples,
            "global_batch": batches.global_batch,
            "best_loss": self.best_loss,
            "rng": random_state(),
            "autoencoder": self.autoencoder,
            "base": self.base,
            SCALING: None if self.scaling is None else self.scaling.state_dict(),
        }

    def check_fits(self, path: str | Path) -> None:
        """Errors as `load`, before anything is loaded. What was read is kept for `load`: it may be gigabytes."""
        self._read = Path(path), load_checkpoint(path)
        self._load_weights(path, self._read[1])

    def load(
        self, path: Path, schema: type, config: dict, batches: LatentBatches, logger: logging.Logger, is_own: bool
    ) -> None:
        """Take over a checkpoint file: one of ours exactly, an official one as far as it goes.

        is_own: it is the run's. Of another run's the options that differ are listed.

        Raises:
            UserError: the file is no BiFlowNet checkpoint, or one of another architecture; its run's latents are now
                those of another autoencoder.
        """
        (known, checkpoint), self._read = self._read, (None, None)
        if known != path:
            checkpoint = load_checkpoint(path)
        self._load_weights(path, checkpoint)
        self._load_optimizer(checkpoint, path, logger)
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self._load_scaler(checkpoint["scaler"], path)
        elif self.scaler.is_enabled():
            logger.warning("%s has no gradient scaler state: the scale starts anew", path)
        self._load_position(checkpoint, path, batches, logger)
        best_loss = checkpoint.get("best_loss") if is_own else None
        self.best_loss = float(best_loss) if isinstance(best_loss, int | float) else None
        self._check_latents(checkpoint, path, logger, is_own)
        if self.scaling is not None and checkpoint.get(SCALING):
            take_scaling(self.scaling, path, checkpoint)  # what the weights know, though data may have come since
        if not is_own:
            _warn_of_other_values(schema, checkpoint.get("args"), config, path, logger)
        if "rng" in checkpoint:
            restore_random_state(checkpoint["rng"], path)

    def _load_weights(self, path: str | Path, checkpoint: dict) -> None:
        load = load_biflownet_weights if self.base is None else partial(load_part_weights, base=self.base)
        load(self.model, path, use_ema=False, checkpoint=checkpoint)
        load(self.ema.model, path, use_ema=True, checkpoint=checkpoint)

    def _load_scaler(self, saved: Any, path: Path) -> None:
        numbers = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        if not isinstance(saved, dict) or not all(isinstance(saved.get(name), int | float) for name in numbers):
            raise UserError(f"{path}: its state of the loss scale (scaler) is damaged: go on from another one")
        self.scaler.load_state_dict(saved)

    def _load_position(self, checkpoint: dict, path: Path, batches: LatentBatches, logger: logging.Logger) -> None:
        self.epoch = count_in(path, checkpoint, "epoch")
        self.samples_seen = count_in(path, checkpoint, "samples_seen")
        step = count_in(path, checkpoint, "step", step_of(path))
        if step is None:
            logger.warning("%s: no step in the file or its name: counting starts at step 0", path)
        self.step = step or 0
        before = checkpoint.get("global_batch", batches.global_batch)
        if before != batches.global_batch:
            message = "%s was trained with %s latents a step over all processes, now there are %s: not an exact resume"
            logger.warning(message, path, before, batches.global_batch)
        before = checkpoint.get("num_samples", batches.num_samples)
        if before != batches.num_samples:
            message = "%s was trained on %s latents, now there are %s: epoch %d starts again from its first sample"
            logger.warning(message, path, before, batches.num_samples, self.epoch)
            self.samples_seen = 0
        order = batches.order
        steps = order.steps_done(self.epoch, self.samples_seen)  # whole ones of now, where batches had another size
        self.samples_seen = order.samples_of(self.epoch, steps)
        if steps == order.steps_per_epoch:
            self.epoch, self.samples_seen = self.epoch + 1, 0

    def _check_latents(self, checkpoint: dict, path: Path, logger: logging.Logger, is_own: bool) -> None:
        """Latents of another autoencoder are other data."""
        if self.autoencoder is None or checkpoint.get("autoencoder") in (None, self.autoencoder):
            return
        message = f"{path} was trained on latents of another autoencoder than those of now"
        if is_own:
            raise UserError(f"{message}: give the latents as they were, or choose another run_name for a new run")
        logger.warning("%s", message)

    def _load_optimizer(self, checkpoint: dict, path: Path, logger: logging.Logger) -> None:
        """Adam's averages, matched by name: files number parameters in the order of their model's weights."""
        own = dict(self.model.named_parameters())
        saved = checkpoint.get("opt") or {"state": {}, "param_groups": []}
        if not is_optimizer_state(saved):
            raise UserError(f"{path}: its optimiser state (opt) is damaged: go on from another one, or give init_from")
        order = [name for name in checkpoint["model"] if name in own]
        indices = [i for group in saved["param_groups"] for i in group["params"]]
        if len(indices) != len(order):  # some trainers hand only the trainable parameters to the optimiser
            order = [name for name in order if own[name].requires_grad]
        averages = {}
        if len(indices) == len(order):
            averages = {name: saved["state"][i] for i, name in zip(indices, order, strict=True) if i in saved["state"]}
            averages = {name: item for name, item in averages.items() if item["exp_avg"].shape == own[name].shape}
        if missing := sum(parameter.requires_grad and name not in averages for name, parameter in own.items()):
            logger.warning(
                "%s: no optimiser state for %d of %d parameters: theirs starts anew", path, missing, len(own)
            )
        state = self.optimizer.state_dict()
        state["state"] = {i: averages[name] for i, name in enumerate(own) if name in averages}
        self.optimizer.load_state_dict(state)


def _warn_of_other_values(
    schema: type, args: argparse.Namespace | None, config: dict, path: Path, logger: logging.Logger
) -> None:
    saved = vars(args) if isinstance(args, argparse.Namespace) else {}
    # Official files lack many keys, and those of before the latents' scale have none of it.
    found = changes(schema, {**config, **OFFICIAL, SCALING: "range", **saved}, config)
    for line in news_of([change for change in found if change.resume is not BEGINNING], config):
        logger.warning("%s was trained with other values; %s", path, line)
