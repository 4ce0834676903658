"""Trains the latent diffusion model BiFlowNet on latents of one size (Wang et al., IEEE TMI 2025, section III-B).

    torchrun --nproc-per-node 8 train/train_BiFlowNet_SingleRes.py --config config/BiFlowNet_8x.yaml \
        --data-path config/Singleres_latents.json --AE-ckpt autoencoder.ckpt --results-dir results

Without torchrun it is a single process. The same command again goes on with its run folder where it stopped; SIGTERM or
Ctrl-C saves a checkpoint first. Several nodes need `--results-dir` on a file system they share.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402
from tqdm.contrib.logging import logging_redirect_tqdm  # noqa: E402

from common.checkpoint_files import newest_checkpoint  # noqa: E402
from common.compilation import compiling  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.files import lock_folder  # noqa: E402
from common.log import close_logger, get_logger  # noqa: E402
from common.optimiser import build_adam, learning_rate_factor  # noqa: E402
from common.processes import Distributed, cleanup, setup  # noqa: E402
from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.diffusion import BiFlowNetConfig  # noqa: E402
from dataset.checking.before_training import check_latents  # noqa: E402
from dataset.order.epochs import EpochSampler  # noqa: E402
from dataset.Singleres_dataset import RESOLUTION_UNIT, Singleres_dataset  # noqa: E402
from ddpm.checkpoint import build_biflownet, load_biflownet_weights  # noqa: E402
from ddpm.diffusion import GaussianDiffusion  # noqa: E402
from train.diffusion import run_folder  # noqa: E402
from train.diffusion.agreement import Agreement  # noqa: E402
from train.diffusion.batches import GlobalBatchSampler, close_loader, endless, make_cache, make_loader  # noqa: E402
from train.diffusion.checks import check_data, check_grid, check_options, known_autoencoder, load_matching_autoencoder  # noqa: E402
from train.diffusion.draws import draw  # noqa: E402
from train.diffusion.ema import EMA  # noqa: E402
from train.diffusion.preview import Previews  # noqa: E402
from train.diffusion.saving import Saving  # noqa: E402
from train.diffusion.state import TrainingState  # noqa: E402
from train.loop.background import BackgroundWork  # noqa: E402
from train.loop.early_warnings import DataBound  # noqa: E402
from train.loop.meter import LoopMeter  # noqa: E402
from train.loop.metrics_file import MetricsWriter  # noqa: E402
from train.loop.signals import StopRequest  # noqa: E402

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Scale of the fp16 loss below which halving it further cannot help: the gradients themselves are not finite.
SMALLEST_LOSS_SCALE = 2.0**-10


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, BiFlowNetConfig, "BiFlowNet_8x.yaml", __doc__)
    stopped_by = train(cfg)["stopped_by"]
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def train(cfg: DictConfig) -> dict:
    """Train until `epochs` or `max_steps`, or until a signal asks to stop.

    Returns:
        {"folder": the run folder, "step": optimiser steps done in all, "stopped_by": 0 or the signal's number,
        "loss": mean since the last logged step, None if no step was logged}.

    Raises:
        UserError: options, latents, autoencoder or checkpoint that do not fit, or a loss that is not finite.
    """
    with contextlib.ExitStack() as closing:  # closes everything in reverse order, whatever happens
        # Processes and devices
        stop = closing.enter_context(StopRequest())
        distributed = setup(cfg.device)
        closing.callback(cleanup)
        logger = get_logger(distributed.rank)
        closing.callback(close_logger)
        config = OmegaConf.to_container(cfg, resolve=True)
        device, is_main = distributed.device, distributed.is_main

        # Data
        check_options(cfg, logger)
        dataset = Singleres_dataset(cfg.data_path, cfg.resolution, cache=make_cache(cfg, logger))
        check_data(cfg, dataset, distributed)
        distributed.on_main(lambda: check_latents(cfg.data_path, dataset.files_by_label(), logger), share=False)
        place = {"rank": distributed.rank, "world_size": distributed.world_size}
        batches = GlobalBatchSampler(
            EpochSampler(len(dataset), seed=cfg.global_seed, drop_last=True, **place), cfg.batch_size
        )
        loader = make_loader(dataset, batches, cfg.num_workers, pin_memory=device.type == "cuda")
        closing.callback(close_loader, loader)
        global_batch = cfg.batch_size * distributed.world_size
        steps_to_do = min(cfg.epochs * batches.steps_per_epoch, cfg.max_steps or math.inf)
        autoencoder = distributed.on_main(lambda: load_matching_autoencoder(cfg, dataset, logger), share=False)

        # Model, the same on every rank
        torch.manual_seed(cfg.global_seed)
        layout = torch.channels_last_3d if cfg.channels_last else torch.contiguous_format
        model = build_biflownet(cfg).to(device, memory_format=layout)  # convolutions' results follow their weights
        model.gradient_checkpointing = cfg.gradient_checkpointing
        check_grid(cfg, model)
        if cfg.ckpt:
            load_biflownet_weights(model, cfg.ckpt, use_ema=False)  # refuses what does not fit before a folder is made
        diffusion = GaussianDiffusion(cfg.volume_channels, cfg.timesteps, cfg.loss_type).to(device)
        optimizer = build_adam(model.parameters(), cfg.lr, tuple(cfg.adam_betas), fused=True)
        use_scaler = cfg.enable_amp and cfg.amp_dtype == "fp16"
        state = TrainingState(
            model=model,
            ema=EMA(model, cfg.ema_decay, cfg.ema_every, cfg.ema_start),
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(device.type, enabled=use_scaler),
            autoencoder=known_autoencoder(dataset, autoencoder),
        )

        # Run folder, and where to go on from
        folder = distributed.on_main(lambda: open_run_folder(config, closing))
        logger = get_logger(distributed.rank, folder / "log.txt")
        resume_from = distributed.on_main(lambda: find_checkpoint(folder, cfg.ckpt))
        if resume_from is not None:
            state.load(resume_from, config, len(dataset), global_batch, logger)
            logger.info("%s: going on from %s, step %d", folder, resume_from, state.step)
        if state.is_finished(cfg.epochs, cfg.max_steps):
            logger.info(
                "%s is finished: step %d, epoch %d. To train on, give a larger max_steps or --epochs and --ckpt %s",
                folder, state.step, state.epoch, resume_from,
            )  # fmt: skip
            return {"folder": folder, "step": state.step, "stopped_by": 0, "loss": None}

        # Cache: as late as that, since reading all latents can take minutes
        if dataset.cache is not None:
            dataset.cache.build(dataset.class_folders, cfg.num_workers, logger)

        # Loop
        logger.info(
            "training in %s: %d latents, %d process(es) x %d, %d steps an epoch, %s steps in all, %s",
            folder, len(dataset), distributed.world_size, cfg.batch_size, batches.steps_per_epoch, steps_to_do, device,
        )  # fmt: skip
        writer = closing.enter_context(contextlib.closing(MetricsWriter(folder, state.step))) if is_main else None
        closing.enter_context(logging_redirect_tqdm([logger]))
        background = closing.enter_context(BackgroundWork())
        previews = None
        if cfg.preview and autoencoder is not None:  # rank 0 alone has one
            previews = Previews(
                folder / "samples", sorted(set(dataset.labels)), tuple(cfg.resolution), cfg.preview_steps,
                state.ema.model, diffusion, autoencoder, device, logger, is_stopping=lambda: stop.received > 0,
            )  # fmt: skip
        saving = Saving(background, folder, cfg.keep_checkpoints, previews, logger)
        hidden = None if is_main else True  # None: shown where stderr is a terminal
        progress = closing.enter_context(tqdm(total=steps_to_do, initial=state.step, disable=hidden, unit="step"))
        if cfg.compile:
            model.compile(dynamic=False)  # in place: names stay as they are, and the averaged weights' copy is plain
        denoiser = closing.enter_context(wrapped(model.train(), distributed))
        start_epoch = lambda: batches.start_at(state.epoch, state.samples_seen)  # noqa: E731
        agreement = Agreement(distributed, stop, dataset.files, may_overflow=use_scaler)
        mean_loss = None
        losses, steps_logged = torch.zeros((), device=device), 0
        data_bound = DataBound(
            f"raise num_workers (now {cfg.num_workers}), or set cache=float32 (now {cfg.cache}) with a fast cache_dir"
        )
        meter = LoopMeter()
        for indices, latents, labels, resolution in meter.timed(endless(loader, start_epoch)):
            # Learning rate; a checkpoint that could not be written ends the run
            background.check()
            step, epoch = state.step + 1, state.epoch
            learning_rate = cfg.lr * learning_rate_factor(cfg.lr_schedule, step, cfg.lr_warmup, steps_to_do)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            # Batch: timesteps, noise and dropped labels depend on each sample's place in the global batch only
            draws = draw(
                cfg.global_seed, step, batches.positions, latents.shape[1:], cfg.timesteps, cfg.label_dropout, device
            )
            latents = latents.to(device, non_blocking=True)  # (B, C, d, h, w)
            labels = labels.to(device, non_blocking=True)  # (B,)
            if model.null_label is not None:
                labels = labels.masked_fill(draws.is_dropped, model.null_label)
            res = resolution.to(device, non_blocking=True) * (RESOLUTION_UNIT / cfg.vq_size)  # (B, 3)

            # Loss and, outside autocast, backward
            optimizer.zero_grad(set_to_none=True)
            with compiling() if cfg.compile else contextlib.nullcontext():
                with torch.autocast(device.type, AMP_DTYPES[cfg.amp_dtype], enabled=cfg.enable_amp):
                    loss = diffusion.p_losses(denoiser, latents, draws.timesteps, y=labels, res=res, noise=draws.noise)
                state.scaler.scale(loss).backward()
            state.scaler.unscale_(optimizer)
            grad_norm = clip_gradients(model, cfg.grad_clip)

            # Optimiser step, which leaves out what all ranks agree to be bad, and averaged weights
            optimizer.found_inf = agreement.exchange(step, loss, grad_norm, indices)
            state.scaler.step(optimizer)
            state.scaler.update()
            state.ema.update(step)
            state.advance(global_batch, len(dataset))
            is_finished = state.is_finished(cfg.epochs, cfg.max_steps)
            progress.update()

            # Nothing is written of a step that may be bad
            is_due = step % cfg.ckpt_every == 0 or is_finished
            if is_due or step % cfg.log_every == 0 or agreement.signal_number:
                agreement.flush()

            # Log
            meter.count(global_batch)
            losses, steps_logged = losses + loss.detach(), steps_logged + 1
            if step % cfg.log_every == 0 or is_finished:
                mean_loss = distributed.mean(losses / steps_logged).item()
                scalars = {"loss": mean_loss, "lr": learning_rate, "grad_norm": grad_norm.item()}
                scalars |= meter.read(device, distributed.maximum)
                if use_scaler:
                    scalars["loss_scale"] = check_loss_scale(state.scaler, step)
                if is_main:
                    writer.write(step, scalars)
                    logger.info("step %07d epoch %d %s", step, epoch, format_scalars(scalars))
                    if warning := data_bound.check(scalars["data_wait"]):
                        logger.warning("step %d: %s", step, warning)
                losses, steps_logged = torch.zeros_like(losses), 0

            # Checkpoint and preview, beside the next steps
            if is_main and (is_due or agreement.signal_number):
                preview_turn = step // cfg.ckpt_every if is_due and not agreement.signal_number else None
                saving.save(step, state.state_dict(config, len(dataset), global_batch), preview_turn)
            if is_finished or agreement.signal_number:
                break

        # End
        # No rank leaves before the last checkpoint is written: torchrun would end the others. The wait is short, as the
        # last preview has its time limit too.
        background.wait()
        distributed.barrier()
        if is_finished:
            logger.info("finished: %s, step %d", folder, state.step)
        else:
            name = signal.Signals(agreement.signal_number).name
            logger.info("%s: stopped after step %d, checkpoint saved; the same command goes on", name, state.step)
        stopped_by = 0 if is_finished else agreement.signal_number
        return {"folder": folder, "step": state.step, "stopped_by": stopped_by, "loss": mean_loss}


def open_run_folder(config: dict, closing: contextlib.ExitStack) -> Path:
    """The run folder for this configuration, locked until `closing` closes, without half-written files."""
    folder = run_folder.open_run_folder(config, config["model"])
    closing.enter_context(lock_folder(folder, "training"))
    run_folder.remove_partial_files(folder)
    return folder


def find_checkpoint(folder: Path, given: str | None) -> Path | None:
    """The run folder's newest whole checkpoint, else the one that the user gave, else None."""
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is None:
        return None if given is None else Path(given)
    run_folder.set_aside_checkpoints_after(folder, run_folder.step_of(newest))
    return newest


@contextlib.contextmanager
def wrapped(model: nn.Module, distributed: Distributed) -> Iterator[nn.Module]:
    """The model with its gradients averaged over the ranks during backward; a lone process needs no wrapper."""
    if distributed.world_size == 1:
        yield model
        return
    devices = [distributed.device] if distributed.device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        yield parallel
    finally:
        # Whoever lets go of the process group last ends its threads. The reducer would do so without letting others
        # into the interpreter, for which gloo's thread may be waiting to free the last barrier's tensors: for ever.
        del parallel.reducer, parallel.logger


def clip_gradients(model: nn.Module, largest_norm: float) -> Tensor:
    """Norm of all gradients before they are scaled down to `largest_norm`; 0: they stay as they are."""
    if largest_norm:
        return nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def check_loss_scale(scaler: torch.amp.GradScaler, step: int) -> float:
    """The fp16 loss scale; UserError once it is so small that every step is skipped for gradients without end."""
    scale = scaler.get_scale()
    if scale < SMALLEST_LOSS_SCALE:
        raise UserError(
            f"step {step}: gradients overflow fp16 whatever the loss scale (now {scale:g}); use amp_dtype=bf16, a "
            "lower lr or grad_clip=1"
        )
    return scale


def format_scalars(scalars: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in scalars.items())


if __name__ == "__main__":
    raise SystemExit(run_script(main))
