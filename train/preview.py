"""A short look at what the diffusion model makes of one class, during training.

Rank 0 samples one latent with a few DDIM steps while the other ranks run ahead into the next step and wait there for
its gradients. So a preview has a time limit, far below the process groups' time-outs (nccl: 10 minutes, gloo: 30).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from AutoEncoder.latents import denormalise_latents
from config.errors import UserError
from dataset.geometry import affine_from_spacing
from dataset.pictures import central_slices, save_slice_grid
from dataset.volume_io import write_volume

TIME_LIMIT_S = 120.0  # for sampling; decoding one volume comes on top
SINGLE_PASS_EDGE = 256  # edge in voxels of a volume that is decoded in one pass; larger ones go tile by tile


class PreviewTimeout(Exception):
    """Sampling took longer than the limit."""


@torch.no_grad()
def write_preview(
    folder: Path,
    step: int,
    class_id: int,
    grid: tuple[int, int, int],
    steps: int,
    model: nn.Module,
    diffusion: nn.Module,
    autoencoder: nn.Module,
    logger: logging.Logger,
    time_limit_s: float = TIME_LIMIT_S,
) -> Path | None:
    """Sample one latent, decode it and write NIfTI and a PNG of its central slices. No global generator is used.

    Args:
        folder: gets `step_SSSSSSS_class_C.nii.gz` and `.png`.
        class_id: the class to sample.
        grid: latent grid (d, h, w).
        steps: DDIM steps.
        model: the denoiser, with averaged weights, in eval mode.
        autoencoder: decodes; it is moved to the model's device for this and back again.

    Returns:
        The NIfTI file, or None, with a warning, where the time limit was hit, memory ran out or the disk is full.
    """
    device = next(model.parameters()).device
    try:
        latent = _sample(model, diffusion, class_id, grid, steps, device, time.monotonic() + time_limit_s)
        volume = _decode(autoencoder, latent, device)
    except PreviewTimeout:
        logger.warning("preview of step %d: given up after %g s; lower preview_steps", step, time_limit_s)
        return None
    except torch.OutOfMemoryError:
        logger.warning("preview of step %d: not enough GPU memory; say preview=false", step)
        return None
    path = folder / f"step_{step:07d}_class_{class_id}.nii.gz"
    picture = path.with_name(path.name.replace(".nii.gz", ".png"))
    try:
        write_volume(path, volume, affine_from_spacing((1.0, 1.0, 1.0)))
        save_slice_grid(picture, [(f"class {class_id}", list(central_slices(volume).values()))])
    except UserError as error:  # a preview is not worth a training run
        logger.warning("preview of step %d: %s", step, error)
        return None
    return path


def _sample(
    model: nn.Module,
    diffusion: nn.Module,
    class_id: int,
    grid: tuple[int, int, int],
    steps: int,
    device: torch.device,
    deadline: float,
) -> Tensor:
    def check_deadline(done: int, total: int) -> None:
        if time.monotonic() > deadline:
            raise PreviewTimeout

    generator = torch.Generator().manual_seed(class_id)  # the same noise each time, so that previews can be compared
    z = torch.randn((1, diffusion.channels, *grid), generator=generator).to(device)  # (1, C, d, h, w)
    y = torch.tensor([class_id], device=device)
    res = torch.tensor([grid], device=device) / model.vq_size  # (1, 3)
    return diffusion.sample(
        model, z, y=y, res=res, strategy="ddim", ddim_steps=steps, generator=generator, progress=check_deadline
    )


def _decode(autoencoder: nn.Module, latent: Tensor, device: torch.device) -> Tensor:
    """Normalised latent (1, C, d, h, w) -> volume (1, D, H, W) on the CPU."""
    home = next(autoencoder.parameters()).device
    try:
        autoencoder.to(device)
        factor = autoencoder.downsample_factor
        raw = denormalise_latents(latent, autoencoder.codebook.embeddings)
        if max(latent.shape[2:]) * factor <= SINGLE_PASS_EDGE:
            volume = autoencoder.decode(raw, quantize=True)  # (1, 1, D, H, W)
        else:
            volume = autoencoder.decode_sliding(
                raw, quantize=True, patch_size=SINGLE_PASS_EDGE, sliding_window=1, compress_ratio=factor
            )
        return volume[0].float().clamp(-1, 1).cpu()
    finally:
        autoencoder.to(home)
