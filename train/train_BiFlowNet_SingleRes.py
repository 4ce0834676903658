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
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402
from tqdm.contrib.logging import logging_redirect_tqdm  # noqa: E402

from config.cli import BIFLOWNET_FLAGS, parse_command_line  # noqa: E402
from config.errors import UserError  # noqa: E402
from config.schema import BiFlowNetConfig  # noqa: E402
from config.script import run_script  # noqa: E402
from dataset.locks import lock_folder  # noqa: E402
from dataset.sampling import EpochSampler  # noqa: E402
from dataset.Singleres_dataset import RESOLUTION_UNIT, Singleres_dataset  # noqa: E402
from ddpm.diffusion import GaussianDiffusion  # noqa: E402
from train import run_folder  # noqa: E402
from train.batches import GlobalBatchSampler, close_loader, endless, make_cache, make_loader  # noqa: E402
from train.checkpoints import (  # noqa: E402
    build_biflownet,
    load_biflownet_weights,
    newest_checkpoint,
    save_checkpoint,
)
from train.checks import check_data, check_grid, check_options, known_autoencoder, load_matching_autoencoder  # noqa: E402
from train.distributed import Distributed, cleanup, setup  # noqa: E402
from train.ema import EMA  # noqa: E402
from train.logger import MetricsWriter, close_logger, get_logger  # noqa: E402
from train.noise import draw  # noqa: E402
from train.preview import write_preview  # noqa: E402
from train.sample_check import check_latents  # noqa: E402
from train.signals import StopRequest  # noqa: E402
from train.state import TrainingState  # noqa: E402

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Scale of the fp16 loss below which halving it further cannot help: the gradients themselves are not finite.
SMALLEST_LOSS_SCALE = 2.0**-10


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, BiFlowNetConfig, "BiFlowNet_8x.yaml", __doc__, BIFLOWNET_FLAGS)
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
        model = build_biflownet(cfg).to(device)
        check_grid(cfg, model)
        if cfg.ckpt:
            load_biflownet_weights(model, cfg.ckpt, use_ema=False)  # refuses what does not fit before a folder is made
        diffusion = GaussianDiffusion(cfg.volume_channels, cfg.timesteps, cfg.loss_type).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, betas=tuple(cfg.adam_betas))
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
        hidden = None if is_main else True  # None: shown where stderr is a terminal
        progress = closing.enter_context(tqdm(total=steps_to_do, initial=state.step, disable=hidden, unit="step"))
        denoiser = wrap(model.train(), distributed)
        start_epoch = lambda: batches.start_at(state.epoch, state.samples_seen)  # noqa: E731
        signal_number, mean_loss = 0, None
        losses, steps_logged, logged_at = torch.zeros((), device=device), 0, time.perf_counter()
        for indices, latents, labels, resolution in endless(loader, start_epoch):
            # Learning rate
            step, epoch = state.step + 1, state.epoch
            learning_rate = scheduled_learning_rate(cfg, step, steps_to_do)
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

            # Loss
            with torch.autocast(device.type, AMP_DTYPES[cfg.amp_dtype], enabled=cfg.enable_amp):
                loss = diffusion.p_losses(denoiser, latents, draws.timesteps, y=labels, res=res, noise=draws.noise)

            # Backward, outside autocast
            optimizer.zero_grad(set_to_none=True)
            state.scaler.scale(loss).backward()
            state.scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)

            # Agreement of all ranks, before the optimiser step: is everything finite, shall we stop
            flags = torch.stack([~loss.isfinite(), ~grad_norm.isfinite() & (not use_scaler)]).long()
            flags = distributed.maximum(torch.cat([flags, flags.new_tensor([stop.received])]))
            loss_is_bad, gradient_is_bad, signal_number = flags.tolist()
            if loss_is_bad or gradient_is_bad:
                raise UserError(describe_non_finite(step, loss, dataset, indices, distributed))

            # Optimiser step and averaged weights
            state.scaler.step(optimizer)
            state.scaler.update()
            state.ema.update(step)
            state.advance(global_batch, len(dataset))
            is_finished = state.is_finished(cfg.epochs, cfg.max_steps)
            progress.update()

            # Log
            losses, steps_logged = losses + loss.detach(), steps_logged + 1
            if step % cfg.log_every == 0 or is_finished:
                mean_loss = distributed.mean(losses / steps_logged).item()
                speed = steps_logged / (time.perf_counter() - logged_at)
                scalars = {"loss": mean_loss, "lr": learning_rate, "grad_norm": grad_norm.item(), "steps_per_s": speed}
                if use_scaler:
                    scalars["loss_scale"] = check_loss_scale(state.scaler, step)
                if is_main:
                    writer.write(step, scalars)
                    logger.info("step %07d epoch %d %s", step, epoch, format_scalars(scalars))
                losses, steps_logged, logged_at = torch.zeros_like(losses), 0, time.perf_counter()

            # Checkpoint and preview; the other ranks go ahead and wait for rank 0 in their next step
            is_due = step % cfg.ckpt_every == 0 or is_finished
            if is_main and (is_due or signal_number):
                path = run_folder.checkpoint_path(folder, step)
                save_checkpoint(state.state_dict(config, len(dataset), global_batch), path)
                run_folder.remove_old_checkpoints(folder, cfg.keep_checkpoints)
                logger.info("saved %s", path)
                if is_due and not signal_number and cfg.preview and autoencoder is not None:
                    classes = sorted(set(dataset.labels))
                    class_id = classes[step // cfg.ckpt_every % len(classes)]
                    write_preview(
                        folder / "samples", step, class_id, tuple(cfg.resolution), cfg.preview_steps,
                        state.ema.model, diffusion, autoencoder, logger,
                    )  # fmt: skip
            if is_finished or signal_number:
                break

        # End
        # No rank leaves before the last checkpoint is written: torchrun would end the others. The wait is short, as the
        # last preview has its time limit too.
        distributed.barrier()
        if is_finished:
            logger.info("finished: %s, step %d", folder, state.step)
            signal_number = 0
        else:
            name = signal.Signals(signal_number).name
            logger.info("%s: stopped after step %d, checkpoint saved; the same command goes on", name, state.step)
        return {"folder": folder, "step": state.step, "stopped_by": signal_number, "loss": mean_loss}


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


def wrap(model: nn.Module, distributed: Distributed) -> nn.Module:
    """The model with its gradients averaged over the ranks during backward; a lone process needs no wrapper."""
    if distributed.world_size == 1:
        return model
    devices = [distributed.device] if distributed.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def scheduled_learning_rate(cfg: DictConfig, step: int, steps_to_do: int) -> float:
    """Learning rate of optimiser step `step`, counted from 1: linear warm-up, then constant or a cosine to 0."""
    warm_up = min(1.0, step / cfg.lr_warmup) if cfg.lr_warmup else 1.0
    if cfg.lr_schedule == "constant":
        return cfg.lr * warm_up
    return cfg.lr * warm_up * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps_to_do))


def describe_non_finite(
    step: int, loss: Tensor, dataset: Singleres_dataset, indices: Tensor, distributed: Distributed
) -> str:
    """What each concerned rank's batch was. To be called on all ranks."""
    files = ", ".join(str(dataset.files[index]) for index in indices.tolist())
    ranks = distributed.gather(
        (loss.isfinite().item(), f"rank {distributed.rank}: loss {loss.item():g}, files {files}")
    )
    # With finite losses and a gradient that is not, the average no longer tells whose it was.
    guilty = [text for is_finite, text in ranks if not is_finite] or [text for _, text in ranks]
    what = "gradient" if all(is_finite for is_finite, _ in ranks) else "loss"
    return (
        f"step {step}: the {what} is not finite, stopped before the optimiser step; {'; '.join(guilty)}; look at these "
        "files, or lower the learning rate, clip gradients (grad_clip=1) or use amp_dtype=bf16"
    )


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
