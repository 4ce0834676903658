"""Class-conditional generation: noise -> normalised latent -> volume on disk, for every request of a config.

    OUT/seed_S/NAME_XxYxZ.nii.gz    in [-1, 1], with `denormalize` in HU (CT) or [0, 1] (MR); float32 or int16; XxYxZ
                                    voxels in NIfTI order, affine from the spacing, the middle at the origin
    OUT/seed_S/NAME_XxYxZ.json      what the volume depends on, and how it was made (evaluation/generation/record.py)
    OUT/seed_S/contact_sheet.png    central slices of the folder's volumes (evaluation/generation/contact_sheet.py)
    OUT/seed_S/view.html            the same volumes, to be sliced and turned in a browser
    OUT/seed_S/config.yaml          the resolved configuration

With `num_samples` above 1 the names are NAME_XxYxZ_I, I = 0, 1, ... The noise of a volume depends on (seed, class,
grid, I) only, so neither batches, order, processes nor the rest of the requests change it.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder
from AutoEncoder.decoding import check_memory, decode
from AutoEncoder.model.autoencoder import Autoencoder
from common.checkpoint_files import load_checkpoint
from common.compilation import CompiledDenoiser
from common.errors import UserError
from common.log import get_logger
from common.places import exists, is_folder
from common.precision import autocast, check_precision, clock
from common.processes import PATIENCE, Distributed, joined
from common.progress import Progress, tracked
from common.shards import shard_of
from config.loading import require, save_config
from dataset.order.batches import batches_of_one_shape
from dataset.volumes.geometry import centred_affine
from dataset.volumes.intensity import from_model_range
from dataset.volumes.volume_io import tensor_to_nifti, write_volume
from ddpm.adapter_files import parse_adapters
from ddpm.adapting import load_adapted
from ddpm.checkpoint import check_options, load_biflownet
from ddpm.latent_process import LatentProcess
from ddpm.process import build_process, take_process
from ddpm.schedule import Progress as StepsDone
from evaluation.generation.attributes import encoded_attributes
from evaluation.generation.contact_sheet import Slices, keep_slices, update_contact_sheet, update_view
from evaluation.generation.record import describe_run, image_settings, is_done, write_record
from evaluation.generation.requests import Request, list_requests, noise_generator, seed_folder

SMALLEST_SHARE = 0.05  # of the voxels' bytes; compressed scans, generated or not, take several times as much


@dataclass(frozen=True)
class Generated:
    """A generated volume. values: (1, D, H, W) float32 on the CPU, in the request's units. affine: (4, 4), in mm.

    Seconds are its share of the batch's.
    """

    request: Request
    values: Tensor
    affine: np.ndarray
    sampling_s: float
    decoding_s: float

    @property
    def array(self) -> np.ndarray:
        """(X, Y, Z), as the file has it."""
        return np.ascontiguousarray(tensor_to_nifti(self.values[0]).numpy())


def generate(cfg: DictConfig) -> list[Path]:
    """Generates every volume of the config, or of its shard, that is not there yet. Returns the files of all of these.

    Under torchrun the volumes are shared out to the processes.
    Raises UserError, before anything is sampled, for whatever is wrong with options, requests, checkpoints or volumes
    that are already there; for wrong options and requests before a checkpoint is read.
    """
    require(cfg, "AE_ckpt", "model_ckpt", "output_dir")
    requests = shard_of(list_requests(cfg), cfg.shard)
    folders = list(dict.fromkeys(seed_folder(cfg, request.seed) for request in requests))
    with joined(cfg.device, PATIENCE, cfg.arithmetic) as place:
        check_precision(place.device, "precision", cfg.precision)
        # What is left to do.
        logger = get_logger(place.rank)
        settings = place.on_main(lambda: image_settings(cfg))  # reads both checkpoints whole, once
        todo = _missing(requests, settings, place)
        there = len(requests) - len(todo)
        logger.info("%d volumes of %d seeds -> %s, %d are there", len(requests), len(folders), cfg.output_dir, there)

        # Sample and decode.
        made: Slices = {}
        if todo:
            place.on_main(lambda: _check_disk(cfg, todo))
            autoencoder, model, process = load_models(cfg, place.device)
            check_requests(cfg, todo, model, autoencoder, place.device)
            same = OmegaConf.merge(cfg, {"shard": None})  # in all shards
            place.on_main(lambda: [save_config(same, folder) for folder in folders], share=False)
            batches = batches_of(cfg, todo)[place.rank :: place.world_size]
            for volume in generated_volumes(cfg, batches, model, process, autoencoder, place.device):
                _write(cfg, volume, settings, place)
                if place.is_main:  # who draws the contact sheets
                    keep_slices(made, volume.request, volume.values, cfg.output_dtype)
            place.barrier()

        # Show what is there.
        if place.is_main and cfg.shard is None:
            for folder in folders:
                update_contact_sheet(folder, made)
                update_view(folder)
        return [request.path for request in requests]


def _missing(requests: Sequence[Request], settings: dict[str, Any], place: Distributed) -> list[Request]:
    """The volumes that are not done, on every rank; each rank reads its share of what is there."""
    mine = range(place.rank, len(requests), place.world_size)
    read = tracked(mine, "reading what is there", "volume", transient=True)
    missing = place.on_all(lambda: [i for i in read if not is_done(requests[i], settings)])
    return [requests[i] for i in sorted(i for part in missing for i in part)]


def _check_disk(cfg: DictConfig, todo: Sequence[Request]) -> None:
    """Refuses what cannot fit by far; a disk that gets full later ends the run in one line and loses nothing."""
    folder = Path(cfg.output_dir).absolute()
    while not exists(folder):
        folder = folder.parent
    if not is_folder(folder):
        raise UserError(f"output_dir: {folder} is a file: choose another folder")
    voxel_bytes = 2 if cfg.output_dtype == "int16" else 4
    needed = SMALLEST_SHARE * voxel_bytes * sum(math.prod(request.voxels) for request in todo)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{cfg.output_dir}: {len(todo)} volumes need at least {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} "
            "GB: free space, or choose another output_dir"
        )


def _write(cfg: DictConfig, volume: Generated, settings: dict[str, Any], place: Distributed) -> None:
    """The record first: a volume is only taken for done beside the record of how it was made."""
    request = volume.request
    write_record(request, settings, describe_run(cfg, place, volume.sampling_s, volume.decoding_s))
    units = (request.intensity_range, request.is_hounsfield)
    write_volume(request.path, volume.values, volume.affine, cfg.output_dtype, *units)


# ----------------------------------------------------------------------------------------------------------- volumes


def batches_of(cfg: DictConfig, requests: Sequence[Request]) -> list[list[Request]]:
    """Requests that are sampled together."""
    return batches_of_one_shape(requests, [request.grid for request in requests], cfg.batch_size)


def generated_volumes(
    cfg: DictConfig,
    batches: Sequence[Sequence[Request]],
    model: nn.Module,
    process: LatentProcess,
    autoencoder: Autoencoder,
    device: torch.device,
) -> Iterator[Generated]:
    """Samples and decodes, and tells how far it is. UserError: NaN."""
    # Volumes are counted, and every sampling step of a batch is a part of them.
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} volumes [{elapsed}<{remaining}{postfix}]"
    with Progress("generating", sum(map(len, batches)), "volume", layout=layout) as progress:
        done = 0
        for batch in batches:

            def show(step: int, num_steps: int, done: int = done, size: int = len(batch)) -> None:
                progress.reach(done + size * step / num_steps, f"step {step}/{num_steps}")

            begin = clock(device)
            latents = sample_latents(cfg, model, process, batch, device, show)  # (B, C, d, h, w)
            sampling_s = (clock(device) - begin) / len(batch)
            for request, latent in zip(batch, latents, strict=True):
                begin = clock(device)
                how = (request.decoding, request.tile, max_bytes(cfg), cfg.precision)
                volume = decode(autoencoder, latent, *how)  # (1, D, H, W)
                decoding_s = clock(device) - begin
                if not volume.isfinite().all():
                    raise UserError(
                        f"{request.path}: {cfg.model_ckpt} and {cfg.AE_ckpt} give NaN: the training of one diverged"
                        + (", or 16 bits overflow: try precision bf16 or 32" if cfg.precision == "16" else "")
                    )
                values = from_model_range(volume, request.intensity_range)
                affine = centred_affine(request.spacing_mm, values.shape[-3:])
                yield Generated(request, values, affine, sampling_s, decoding_s)
            done += len(batch)


def max_bytes(cfg: DictConfig) -> int | None:
    """Bytes that decoding may take; None: what is free."""
    return None if cfg.max_memory is None else int(cfg.max_memory * 1e9)


# ------------------------------------------------------------------------------------------------------------ checks


def load_models(cfg: DictConfig, device: torch.device) -> tuple[Autoencoder, nn.Module, LatentProcess]:
    """Autoencoder, BiFlowNet (EMA weights) and its process, after the checks that they fit the config.

    What the config leaves to the checkpoint (null) is set in it.
    """
    autoencoder = load_autoencoder(cfg.AE_ckpt, device, downsample=cfg.downsample)
    return autoencoder, *load_denoiser(cfg, autoencoder, load_checkpoint(cfg.model_ckpt), device)


def load_denoiser(
    cfg: DictConfig, autoencoder: Autoencoder, checkpoint: dict[str, Any], device: torch.device
) -> tuple[nn.Module, LatentProcess]:
    """BiFlowNet and its process of a checkpoint that has been read, as `load_models`."""
    if autoencoder.embedding_dim != cfg.volume_channels:
        raise UserError(
            f"{cfg.AE_ckpt}: its latents have {autoencoder.embedding_dim} channels, volume_channels is "
            f"{cfg.volume_channels}: give the autoencoder that the model was trained with, or --volume-channels"
        )
    adapters = parse_adapters(cfg.adapters)
    load = partial(load_adapted, adapters=adapters) if adapters else load_biflownet
    model = load(cfg, cfg.model_ckpt, device, checkpoint)
    made_by = checkpoint.get("autoencoder")
    if made_by is not None and made_by != latent_fingerprint(autoencoder):
        raise UserError(
            f"{cfg.AE_ckpt}: not the autoencoder whose latents {cfg.model_ckpt} was trained on: give that one "
            "(either stage of it)"
        )
    take_options(cfg, model, checkpoint)
    if cfg.channels_last:
        autoencoder.to(memory_format=torch.channels_last_3d)
        model = model.to(memory_format=torch.channels_last_3d)
    process = build_process(cfg, checkpoint).to(device)
    return CompiledDenoiser(model) if cfg.compile else model, process


def take_options(cfg: DictConfig, model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """What the config leaves to the checkpoint is set in it. UserError: what doesn't fit the checkpoint."""
    take_process(cfg, cfg.model_ckpt, checkpoint)
    check_options(cfg, cfg.model_ckpt, checkpoint)
    if cfg.guidance_scale != 1 and model.null_label is None and model.attribute_emb is None:
        raise UserError(
            f"guidance_scale is {cfg.guidance_scale}, but {cfg.model_ckpt} has no null label: use 1, or a model that "
            "was trained with label_dropout above 0, or with attributes"
        )


def check_requests(
    cfg: DictConfig, requests: Sequence[Request], model: nn.Module, autoencoder: Autoencoder, device: torch.device
) -> None:
    """UserError: attributes that the model doesn't know, volumes that memory doesn't suffice for."""
    for request in requests:
        attributes_of(cfg, model, request)
    for request in {request.grid: request for request in requests}.values():
        limits = (request.tile, device, max_bytes(cfg), cfg.precision)
        check_memory(autoencoder, request.grid, *limits, f"{request.path}: ")


# ---------------------------------------------------------------------------------------------------------- sampling


def attributes_of(cfg: DictConfig, model: nn.Module, request: Request) -> list[float]:
    """As `encoded_attributes`, for this model."""
    specs = () if model.attribute_emb is None else model.attribute_emb.specs
    return encoded_attributes(specs, request, cfg.extrapolate, cfg.model_ckpt)


def sample_latents(
    cfg: DictConfig,
    model,
    process,
    batch: Sequence[Request],
    device: torch.device,
    progress: StepsDone | None = None,
) -> Tensor:
    """Normalised latents (B, C, d, h, w) of requests that all have the grid (d, h, w)."""
    generators = [noise_generator(request) for request in batch]
    shape = (cfg.volume_channels, *batch[0].grid)
    z = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # (B, C, d, h, w)
    y = torch.tensor([request.class_id for request in batch])  # (B,)
    conditions = {"y": y, "res": torch.tensor(batch[0].grid) / model.vq_size}  # (B,), (3,)
    if model.attribute_emb is not None:
        conditions["attributes"] = torch.tensor([attributes_of(cfg, model, request) for request in batch])  # (B, A)
    layout = torch.channels_last_3d if cfg.channels_last else torch.contiguous_format
    with autocast(device, cfg.precision):  # of the network: z and the steps are float32 and stay so
        return process.sample(
            model,
            z.to(device, memory_format=layout),
            conditions={name: value.to(device) for name, value in conditions.items()},
            cond_scale=cfg.guidance_scale,
            strategy=cfg.sampling_strategy,
            eta=cfg.eta,
            ddim_steps=cfg.ddim_steps,
            generator=generators,  # they go on where z left them
            progress=progress,
        )
