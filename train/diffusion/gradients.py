"""The gradients of one training step: random draws, loss and backward pass of a rank's share of the batch."""

import contextlib
import math

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.compilation import compiling
from common.precision import autocast
from train.diffusion.batches import Batch, passes_of
from train.diffusion.draws import draw_dropped, draw_noise, draw_unknown, sample_generators
from train.loop.session import Session


def compute_gradients(
    cfg: DictConfig,
    here: Session,
    model: nn.Module,
    denoiser: nn.Module,
    process: nn.Module,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    step: int,
) -> Tensor:
    """Add the gradients of the mean loss over the global batch, scaled by `scaler`. Returns the samples' losses, (B,).

    denoiser: the model, or what averages its gradients over the ranks (`Session.parallel`). The batch goes through in
    `cfg.accumulate` passes, which give the same gradients as one.
    """
    # Timesteps, noise and dropped conditions depend on each sample's place in the global batch only
    generators = sample_generators(cfg.global_seed, step, batch.positions, here.device)
    timesteps = process.draw_timesteps(generators)  # (B,)
    share = cfg.hint_dropout if "hint_dropout" in cfg else cfg.label_dropout  # of what guidance compares without
    is_dropped = draw_dropped(generators, share)  # (B,)
    noise = draw_noise(generators, batch.latents.shape[1:])  # (B, C, d, h, w)
    latents, conditions = batch.to(here.device)  # (B, C, d, h, w), (B, …) each
    if "attributes" in conditions:
        is_unknown = draw_unknown(generators, conditions["attributes"].shape[1], cfg.attribute_dropout)  # (B, A)
        conditions["attributes"] = conditions["attributes"].masked_fill(is_unknown, math.nan)
    conditions = model.drop_conditions(conditions, is_dropped)

    # Loss and, outside autocast, backward; gradients of several passes add up, and the last one exchanges them
    errors, precision = [], cfg.amp_dtype if cfg.enable_amp else "32"
    for part in passes_of(len(latents), cfg.accumulate):
        given = {"noise": noise[part], "conditions": {name: value[part] for name, value in conditions.items()}}
        is_last = part.stop == len(latents)
        with compiling() if cfg.compile else contextlib.nullcontext(), here.exchanging(denoiser, is_last):
            with autocast(here.device, precision):
                of_part = process.p_losses(denoiser, latents[part], timesteps[part], **given, reduction="none")
            scaler.scale(of_part.sum() / len(latents)).backward()
        errors.append(of_part.detach())
    return torch.cat(errors)
