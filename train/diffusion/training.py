"""The training loop of the diffusion models, whatever conditions them and whichever of their parts train."""

import math
import signal
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from common.optimiser import clip_gradients, learning_rate_factor
from train.diffusion import run_folder
from train.diffusion.agreement import Agreement
from train.diffusion.batches import LatentBatches, Origin
from train.diffusion.gradients import compute_gradients
from train.diffusion.held_out import HeldOutLoss
from train.diffusion.losses import LossesByKind
from train.diffusion.saving import open_saving
from train.diffusion.state import TrainingState
from train.loop.meter import LoopMeter
from train.loop.metrics_file import RunLog
from train.loop.session import Session


def fit(
    cfg: DictConfig,
    here: Session,
    model: nn.Module,
    batches: LatentBatches,
    process: nn.Module,
    origin: Origin,
    held_out: HeldOutLoss | None,
    base: str | None = None,
    notes: Sequence[str] = (),
) -> dict:
    """Train until `epochs` or `max_steps`, or until a signal asks to stop.

    Args:
        cfg: of one of the training scripts, whose schema is `here.schema`.
        model: the denoiser, `model(x, t, **conditions)`, the same on every rank. What of it trains, is averaged and
            saved is its `part_of` (`ddpm/frozen_base.py`).
        batches: what it trains on, with the conditions that it is given.
        process: a `LatentProcess`: diffusion or flow, its scaling set.
        origin: the autoencoder that made the latents.
        held_out: measured every `val_every` steps and at the end; the checkpoint with the least is kept. None: not.
        base: fingerprint of the frozen part, if there is one.
        notes: lines for the run's log.

    Returns:
        {"folder": the run folder, "step": optimiser steps done in all, "stopped_by": 0 or the signal's number,
        "loss": mean since the last logged step, None if no step was logged}.

    Raises:
        UserError: a checkpoint or run folder that does not fit, or a loss that is not finite.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    device, distributed, logger = here.device, here.distributed, here.logger
    steps_to_do = min(cfg.epochs * batches.steps_per_epoch, cfg.max_steps or math.inf)

    # Model; convolutions' results follow the layout of their weights
    layout = torch.channels_last_3d if cfg.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    process.to(device)
    state = TrainingState.start(cfg, model, device, origin.fingerprint, process.scaling, base)

    # Run folder, and where to go on from
    if cfg.ckpt:
        state.check_fits(cfg.ckpt)  # before a folder is made
    folder, news = distributed.on_main(lambda: run_folder.open_run_folder(here.schema, config, here.closing, cfg.model))
    distributed.on_main(lambda: batches.check_run(folder))
    here.log_to(folder / "log.txt")
    for line in [*news, *notes]:
        logger.info("%s: %s", folder, line)
    resume_from = distributed.on_main(lambda: run_folder.find_checkpoint(folder, cfg.ckpt, cfg.model))
    if resume_from is not None:
        is_own = resume_from.parent == folder / "checkpoints"
        state.load(resume_from, here.schema, config, batches, logger, is_own)
        logger.info("%s: going on from %s, step %d", folder, resume_from, state.step)
    is_finished = state.is_finished(cfg.epochs, cfg.max_steps)
    saving = open_saving(cfg, folder, state.averaged, batches, process, origin, here, base)
    if here.is_main and (is_finished or (state.step and state.step % cfg.ckpt_every == 0)):
        saving.make_up(state.step, state.step // cfg.ckpt_every, state.ema.state_dict())
    if is_finished:
        saving.wait()
        distributed.barrier()
        logger.info(
            "%s is finished: step %d, epoch %d. To train on, give a larger max_steps or --epochs",
            folder, state.step, state.epoch,
        )  # fmt: skip
        return {"folder": folder, "step": state.step, "stopped_by": 0, "loss": None}

    # Cache: as late as that, since reading all latents can take minutes
    batches.build_cache(logger)

    # Loop
    logger.info(
        "training in %s: %s latents, %s a step by %d process(es), %d steps an epoch, %s steps in all, %s",
        folder, batches.num_samples, batches.global_batch, distributed.world_size, batches.steps_per_epoch, steps_to_do,
        device,
    )  # fmt: skip
    run_log = RunLog(folder, config, state.step, steps_to_do, here, batches.remedy_for_waiting)
    here.closing.enter_context(run_log)
    if cfg.compile:
        logger.info("compile: %d graphs, one for each size of a pass", len(batches.pass_shapes(cfg.accumulate)))
        model.compile(dynamic=False)  # in place: names stay as they are, and the averaged weights' copy is plain
    denoiser = here.parallel(model.train())
    optimizer, scaler, parameters = state.optimizer, state.scaler, list(state.model.parameters())
    agreement = Agreement(distributed, here.stop, batches.files, may_overflow=scaler.is_enabled())
    mean_loss = None
    losses = LossesByKind(batches.kinds, device)
    meter = LoopMeter()
    for batch in meter.timed(batches.endless(lambda: (state.epoch, state.samples_seen))):
        # Learning rate; a checkpoint that could not be written ends the run
        saving.check()
        step, epoch = state.step + 1, state.epoch
        learning_rate = cfg.lr * learning_rate_factor(cfg.lr_schedule, step, cfg.lr_warmup, steps_to_do)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # Gradients
        optimizer.zero_grad(set_to_none=True)
        errors = compute_gradients(cfg, here, model, denoiser, process, scaler, batch, step)  # (B,)
        loss = errors.mean()
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(parameters, cfg.grad_clip)

        # Optimiser step, which leaves out what all ranks agree to be bad, and averaged weights
        optimizer.found_inf = agreement.exchange(step, loss, grad_norm, batch.indices)
        scaler.step(optimizer)
        scaler.update()
        state.ema.update(step)
        state.advance(batch.global_size, batches.order.samples_per_epoch)
        is_finished = state.is_finished(cfg.epochs, cfg.max_steps)

        # Nothing is written of a step that may be bad
        is_due = step % cfg.ckpt_every == 0 or is_finished
        is_measured = held_out is not None and (step % cfg.val_every == 0 or is_finished)
        if is_due or is_measured or step % cfg.log_every == 0 or agreement.signal_number:
            agreement.flush()

        # Log
        meter.count(batch.global_size, batch.size)
        losses.add(errors, batch)
        if step % cfg.log_every == 0 or is_finished:
            scalars = losses.read(distributed)
            mean_loss = scalars["loss"]
            scalars |= {"lr": learning_rate, "grad_norm": grad_norm.item()}
            run_log.write(step, epoch, scalars | meter.read(device, distributed.maximum) | state.loss_scale())
        else:
            run_log.tick(step, loss)

        # Held-out loss of the averaged weights
        is_best = False
        if is_measured:
            scalars = held_out.measure(state.averaged)
            least = math.inf if state.best_loss is None else state.best_loss
            is_best = scalars["val_loss"] < least  # never with NaN
            state.best_loss = scalars["val_loss"] if is_best else state.best_loss
            run_log.write_held_out(step, scalars, ", the least so far" if is_best else f", least {least:.4g}")

        # Checkpoint and preview, beside the next steps
        if here.is_main and (is_due or is_best or agreement.signal_number):
            preview_turn = step // cfg.ckpt_every if is_due and not agreement.signal_number else None
            is_kept = is_due or agreement.signal_number
            saving.save(step, state.state_dict(config, batches), preview_turn, is_kept, is_best)
        if is_finished or agreement.signal_number:
            break

    # End
    # No rank leaves before the last checkpoint is written: torchrun would end the others. The wait is short, as the
    # last preview has its time limit too.
    saving.wait()
    distributed.barrier()
    if is_finished:
        distributed.on_main(batches.check_still_there)
        logger.info("finished: %s, step %d", folder, state.step)
    else:
        name = signal.Signals(agreement.signal_number).name
        logger.info("%s: stopped after step %d, checkpoint saved; the same command goes on", name, state.step)
    stopped_by = 0 if is_finished else agreement.signal_number
    return {"folder": folder, "step": state.step, "stopped_by": stopped_by, "loss": mean_loss}
