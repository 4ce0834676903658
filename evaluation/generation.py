"""Class-conditional generation: noise -> normalised latent -> volume on disk, for every class and grid of a config.

    OUT/seed_S/NAME_XxYxZ.nii.gz    float32 in [-1, 1], with `denormalize` in HU (CT) or [0, 1] (MR); XxYxZ voxels in
                                    NIfTI order, affine from the spacing
    OUT/seed_S/NAME_XxYxZ.json      what the volume depends on: class, grid, seed, sampler, checkpoints
    OUT/seed_S/config.yaml          the resolved configuration

With `num_samples` above 1 the names are NAME_XxYxZ_I, I = 0, 1, ... The noise of a volume depends on (seed, class,
grid, I) only, so neither batches, order, processes nor the rest of the class table change it.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from AutoEncoder.latents import denormalise_latents
from config.cli import GENERATION_FLAGS, parse_command_line
from config.errors import UserError
from config.loading import require, save_config
from config.schema import GenerationConfig
from dataset.geometry import affine_from_spacing
from dataset.intensity import from_model_range
from dataset.volume_io import write_atomically, write_volume
from ddpm.diffusion import GaussianDiffusion
from ddpm.samplers import Progress, get_sampler
from evaluation.volume_requests import (
    Request,
    batches_of_one_grid,
    is_done,
    list_requests,
    noise_generator,
    record_path,
    seed_folder,
)
from train.checkpoints import latent_fingerprint, load_autoencoder, load_biflownet, load_checkpoint
from train.distributed import Distributed, cleanup, setup
from train.logger import get_logger


def run(argv: Sequence[str] | None, default_config: str, description: str) -> None:
    """The generation scripts, which differ only in the config they start from."""
    generate(parse_command_line(argv, GenerationConfig, default_config, description, GENERATION_FLAGS))


def generate(cfg: DictConfig) -> list[Path]:
    """Generates every volume of the config that is not there yet. Returns the files of all of them.

    Under torchrun the volumes are shared out to the processes.
    Raises UserError, before anything is sampled, for whatever is wrong with options, checkpoints, grids or volumes that
    are already there.
    """
    require(cfg, "AE_ckpt", "model_ckpt", "output_dir")
    requests = list_requests(cfg)
    if cfg.tile % cfg.downsample:
        raise UserError(f"tile is {cfg.tile}: it has to be a multiple of downsample {cfg.downsample}")
    distributed = setup(cfg.device)
    try:
        # Models, and what they allow.
        logger = get_logger(distributed.rank)
        autoencoder, model = load_models(cfg, distributed.device)
        check_grids(model, requests)

        # What is left to do, decided by one process.
        settings = image_settings(cfg)
        todo = distributed.on_main(lambda: [request for request in requests if not is_done(request, settings)])
        distributed.on_main(lambda: save_config(cfg, seed_folder(cfg)))
        logger.info(
            "%d volumes -> %s, %d of them are there", len(requests), seed_folder(cfg), len(requests) - len(todo)
        )

        # Sample and decode.
        batches = batches_of_one_grid(todo, cfg.batch_size)[distributed.rank :: distributed.world_size]
        _generate_batches(cfg, model, autoencoder, batches, settings, distributed)
        distributed.barrier()
        return [request.path for request in requests]
    finally:
        cleanup()


def _generate_batches(
    cfg: DictConfig,
    model: nn.Module,
    autoencoder: nn.Module,
    batches: list[list[Request]],
    settings: dict[str, Any],
    place: Distributed,
) -> None:
    """Samples, decodes and writes this process's volumes."""
    diffusion = GaussianDiffusion(cfg.volume_channels, cfg.timesteps, cfg.loss_type).to(place.device)
    # The bar counts volumes, and moves with every sampling step of a batch.
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} volumes [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=sum(map(len, batches)), desc="generating", bar_format=layout, disable=not place.is_main)
    with bar:
        done = 0
        for batch in batches:

            def show(step: int, num_steps: int, done: int = done, size: int = len(batch)) -> None:
                bar.set_postfix_str(f"step {step}/{num_steps}", refresh=False)
                bar.update(done + size * step / num_steps - bar.n)

            latents = sample_latents(cfg, model, diffusion, batch, place.device, show)  # (B, C, d, h, w)
            for request, latent in zip(batch, latents, strict=True):
                volume = decode(autoencoder, latent, request.tile)  # (1, D, H, W)
                if not volume.isfinite().all():
                    raise UserError(
                        f"{request.path}: {cfg.model_ckpt} and {cfg.AE_ckpt} give NaN: the training of one diverged"
                    )
                # The record first: a volume is only taken for done beside the record of how it was made.
                record = json.dumps(request.record(settings), indent=2) + "\n"
                write_atomically(record_path(request.path), record.encode())
                volume = from_model_range(volume, request.intensity_range)
                write_volume(request.path, volume, affine_from_spacing(request.spacing_mm))
            done += len(batch)


# ------------------------------------------------------------------------------------------------------------ checks


def load_models(cfg: DictConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Autoencoder and BiFlowNet (EMA weights), after the checks that they fit the config."""
    autoencoder = load_autoencoder(cfg.AE_ckpt, device, downsample=cfg.downsample)
    if autoencoder.embedding_dim != cfg.volume_channels:
        raise UserError(
            f"{cfg.AE_ckpt}: its latents have {autoencoder.embedding_dim} channels, volume_channels is "
            f"{cfg.volume_channels}: give the autoencoder that the model was trained with, or --volume-channels"
        )
    model = load_biflownet(cfg, cfg.model_ckpt, device)
    checkpoint = load_checkpoint(cfg.model_ckpt, mmap=True)
    made_by = checkpoint.get("autoencoder")
    if made_by is not None and made_by != latent_fingerprint(autoencoder):
        raise UserError(
            f"{cfg.AE_ckpt}: not the autoencoder whose latents {cfg.model_ckpt} was trained on: give that one "
            "(either stage of it)"
        )
    trained = getattr(checkpoint.get("args"), "timesteps", cfg.timesteps)
    if trained != cfg.timesteps:
        raise UserError(f"timesteps is {cfg.timesteps}, but {cfg.model_ckpt} was trained with {trained}: give that")
    if cfg.guidance_scale != 1 and model.null_label is None:
        raise UserError(
            f"guidance_scale is {cfg.guidance_scale}, but {cfg.model_ckpt} has no null label: use 1, or a model that "
            "was trained with label_dropout above 0"
        )
    return autoencoder, model


def check_grids(model: nn.Module, requests: Sequence[Request]) -> None:
    """The network can do every latent grid: it is cut into whole sub-volumes, and the U-Net halves it several times."""
    multiple = [math.lcm(edge, model.down_factor) for edge in model.sub_volume_size]
    for request in requests:
        sizes = zip(request.grid, multiple, strict=True)
        nearest = tuple(max(1, round(extent / factor)) * factor for extent, factor in sizes)
        if nearest != request.grid:
            raise UserError(
                f"classes: {request.class_name}: the network cannot do the latent grid {list(request.grid)}, only "
                f"multiples of {multiple}: the nearest is {list(nearest)}"
            )


def image_settings(cfg: DictConfig) -> dict[str, Any]:
    """What all volumes of a run depend on besides their request: seed, sampler, guidance, checkpoints."""
    return {
        "seed": cfg.seed,
        "timesteps": cfg.timesteps,
        "sampling_strategy": cfg.sampling_strategy,
        **{name: cfg[name] for name in get_sampler(cfg.sampling_strategy).options},
        "guidance_scale": cfg.guidance_scale,
        "AE_sha256": file_sha256(cfg.AE_ckpt),
        "model_sha256": file_sha256(cfg.model_ckpt),
    }


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- sampling and decoding


def sample_latents(
    cfg: DictConfig,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    batch: Sequence[Request],
    device: torch.device,
    progress: Progress | None = None,
) -> Tensor:
    """Normalised latents (B, C, d, h, w) of requests that all have the grid (d, h, w)."""
    generators = [noise_generator(cfg.seed, request) for request in batch]
    shape = (cfg.volume_channels, *batch[0].grid)
    z = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # (B, C, d, h, w)
    y = torch.tensor([request.class_id for request in batch])  # (B,)
    res = torch.tensor(batch[0].grid) / model.vq_size  # (3,)
    return diffusion.sample(
        model,
        z.to(device),
        y=y.to(device),
        res=res.to(device),
        cond_scale=cfg.guidance_scale,
        strategy=cfg.sampling_strategy,
        eta=cfg.eta,
        ddim_steps=cfg.ddim_steps,
        generator=generators,  # they go on where z left them
        progress=progress,
    )


@torch.inference_mode()
def decode(autoencoder: nn.Module, latent: Tensor, tile: int | None) -> Tensor:
    """Normalised latent (C, d, h, w) -> volume (1, D, H, W) in [-1, 1] on the CPU, in tiles of this edge in voxels."""
    raw = denormalise_latents(latent[None], autoencoder.codebook.embeddings)  # (1, C, d, h, w)
    if tile is None:
        volume = autoencoder.decode(raw, quantize=True)  # (1, 1, D, H, W)
    else:
        volume = autoencoder.decode_sliding(raw, quantize=True, patch_size=tile)
    return volume[0].float().clamp(-1, 1).cpu()
