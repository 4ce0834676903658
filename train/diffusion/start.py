"""From the options of a training script to the training loop: checks, data, networks; the same for all resolutions."""

from collections.abc import Callable, Mapping

import torch
from omegaconf import DictConfig
from torch import nn

from common.errors import UserError
from dataset.cache.latents import LatentCache
from dataset.Multires_dataset import Grid, Multires_dataset
from dataset.order.data_split import VALIDATION, DataSplit, find_split
from dataset.volumes.geometry import size_text
from ddpm.frozen_base import WithFrozenBase
from ddpm.latent_process import LatentProcess
from ddpm.process import build_process
from train.diffusion import checks
from train.diffusion.attributes import read_attributes
from train.diffusion.batches import LatentBatches, Origin, make_cache
from train.diffusion.beginning import Beginning, begin_biflownet
from train.diffusion.held_out import HeldOutLoss
from train.diffusion.replay import check_replay, make_samples, sample_weights
from train.diffusion.training import fit
from train.loop.session import Session, session

Begin = Callable[[DictConfig, LatentProcess], tuple[nn.Module, Beginning | None]]

REFERENCE_VOXELS = 32**3  # of the latents that `batch_size` counts where there are several sizes


def start_training(
    cfg: DictConfig,
    schema: type,
    open_dataset: Callable[..., Multires_dataset],
    find_batch_sizes: Callable[[Multires_dataset], Mapping[Grid, int]],
    begin: Begin = begin_biflownet,
    **order: object,
) -> dict:
    """Train on the latents of `cfg` until they are done or a signal asks to stop; returns and raises as `fit`.

    Args:
        schema: of `cfg`.
        open_dataset: called with a JSON and keyword arguments of `Multires_dataset`.
        find_batch_sizes: latents per process and step, of each size of a data set.
        begin: gives the denoiser, and where it begins.
        order: keyword arguments of `LatentBatches` on which latents come when.
    """
    with session(cfg.device, cfg.arithmetic, schema) as here:
        # Data and network, each checked before what takes time
        checks.check_options(cfg, here)
        process = build_process(cfg)
        cache = make_cache(cfg, here.logger)
        split = checks.find_training_split(cfg)
        dataset = open_dataset(cfg.data_path, vq_size=cfg.vq_size, split=split, cache=cache)
        sizes = find_batch_sizes(dataset)
        checks.check_data(cfg, dataset, sizes, here)
        origin = here.distributed.on_main(lambda: checks.find_autoencoder(cfg, dataset, here.logger), share=False)
        origin = origin or Origin()
        model, beginning = begin(cfg, process)
        checks.check_grids(cfg, model, dataset)
        _read_attributes(cfg, dataset, here)
        num_new, notes = len(dataset), [] if beginning is None else beginning.notes
        if "replay" in cfg and (cfg.replay.data_path or cfg.replay.samples):
            notes.append(_add_replay(cfg, dataset, open_dataset, cache, model, process, beginning, here))
        if beginning is not None:
            here.distributed.on_main(lambda: beginning.check_latents(origin, here), share=False)
        elif process.scaling is not None:
            checks.set_scaling(process.scaling, dataset, here)
        held_out = _open_held_out(cfg, open_dataset, split, process, here)

        # Order of the data, and the training
        weights = sample_weights(cfg, dataset, num_new)
        batches = LatentBatches(dataset, sizes, cfg.global_seed, cfg.num_workers, here, weights=weights, **order)
        base = beginning.base if isinstance(model, WithFrozenBase) else None
        return fit(cfg, here, model, batches, process, origin, held_out, base, notes)


def _read_attributes(cfg: DictConfig, dataset: Multires_dataset, here: Session, is_trained: bool = True) -> None:
    if cfg.attributes:
        asked = (cfg.attributes, dataset, here.logger, is_trained)
        dataset.attributes = here.distributed.on_main(lambda: read_attributes(*asked))


def _add_replay(
    cfg: DictConfig,
    dataset: Multires_dataset,
    open_dataset: Callable[..., Multires_dataset],
    cache: LatentCache | None,
    model: nn.Module,
    process: LatentProcess,
    beginning: Beginning | None,
    here: Session,
) -> str:
    """Put what is replayed behind the data set's own latents. Returns a line for the run's log."""
    if cfg.replay.data_path:
        path = cfg.replay.data_path
        replayed = open_dataset(path, vq_size=cfg.vq_size, split=find_split(path), cache=cache)
        check_replay(cfg, dataset, replayed)
        _read_attributes(cfg, replayed, here, is_trained=False)
    else:
        path = make_samples(cfg, dataset, model, process, beginning, here)
        replayed = open_dataset(path, vq_size=cfg.vq_size, cache=cache)
        if cfg.attributes:  # nothing is known of them
            replayed.attributes = torch.full((len(replayed), len(cfg.attributes)), torch.nan)
    dataset.extend(replayed)
    return f"{path}: {len(replayed)} latents are replayed, {cfg.replay.share:g} of every batch"


def _open_held_out(
    cfg: DictConfig,
    open_dataset: Callable[..., Multires_dataset],
    split: DataSplit | None,
    process: LatentProcess,
    here: Session,
) -> HeldOutLoss | None:
    """None where nothing is held out for it; the log says why. What is replayed has a part in it too."""
    if not cfg.val_every:
        return None

    def open_side(path: str, split: DataSplit) -> Multires_dataset:
        dataset = open_dataset(path, vq_size=cfg.vq_size, split=split, side=VALIDATION)
        if dataset and dataset.num_channels != cfg.volume_channels:
            raise UserError(
                f"{dataset.files[0]}: {dataset.num_channels} channels, volume_channels is {cfg.volume_channels}: "
                "encode all latents with one autoencoder"
            )
        _read_attributes(cfg, dataset, here, is_trained=False)
        return dataset

    dataset = None if split is None else open_side(cfg.data_path, split)
    if not dataset:
        why = f"no subject of {split.path} is on the side {VALIDATION}" if split else f"{cfg.data_path} has no split"
        here.logger.info("no held-out loss: %s", why)
        return None
    if "replay" in cfg and cfg.replay.data_path and (replayed_split := find_split(cfg.replay.data_path)):
        dataset.extend(open_side(cfg.replay.data_path, replayed_split))
    held_out = HeldOutLoss(dataset, process, cfg.val_latents, cfg.amp_dtype if cfg.enable_amp else "32", here)
    here.logger.info("held-out loss on %d latents every %d steps", len(held_out.indices), cfg.val_every)
    return held_out


def batch_sizes_by_voxels(cfg: DictConfig, dataset: Multires_dataset) -> dict[Grid, int]:
    """Of each size: that of its row in `buckets`, or as many latents as have the voxels of `batch_size` ones of 32³.

    UserError: a size without its row.
    """
    if not cfg.buckets and cfg.batch_size is None:
        raise UserError("batch_size: none is given, nor buckets: give --batch-size, latents of 32x32x32 a process")
    if not cfg.buckets:
        voxels = {grid: grid[0] * grid[1] * grid[2] for grid in dataset.buckets}
        return {grid: max(1, cfg.batch_size * REFERENCE_VOXELS // count) for grid, count in voxels.items()}
    given = {tuple(row.grid): row.batch_size for row in cfg.buckets}
    if missing := [grid for grid in dataset.buckets if grid not in given]:
        example = dataset.files[dataset.buckets[missing[0]][0]]
        raise UserError(
            f"{example}: a latent of size {size_text(missing[0])}, for which buckets has no row; it has "
            f"{', '.join(map(size_text, given))}: add one, or leave buckets empty for batch sizes by voxels"
        )
    return {grid: given[grid] for grid in dataset.buckets}
