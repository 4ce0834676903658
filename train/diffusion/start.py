"""From the options of a training script to the training loop: checks, data, networks; the same for all resolutions."""

from collections.abc import Callable, Mapping

import torch
from omegaconf import DictConfig

from common.errors import UserError
from dataset.Multires_dataset import Grid, Multires_dataset
from dataset.order.data_split import VALIDATION, DataSplit
from dataset.volumes.geometry import size_text
from ddpm.checkpoint import build_biflownet
from ddpm.process import LatentProcess, build_process
from train.diffusion import checks
from train.diffusion.attributes import read_attributes
from train.diffusion.batches import LatentBatches, Origin, make_cache
from train.diffusion.held_out import HeldOutLoss
from train.diffusion.training import fit
from train.loop.session import Session, session

REFERENCE_VOXELS = 32**3  # of the latents that `batch_size` counts where there are several sizes


def start_training(
    cfg: DictConfig,
    schema: type,
    open_dataset: Callable[..., Multires_dataset],
    find_batch_sizes: Callable[[Multires_dataset], Mapping[Grid, int]],
    **order: object,
) -> dict:
    """Train on the latents of `cfg` until they are done or a signal asks to stop; returns and raises as `fit`.

    Args:
        schema: of `cfg`.
        open_dataset: called with keyword arguments of `Multires_dataset`.
        find_batch_sizes: latents per process and step, of each size of a data set.
        order: keyword arguments of `LatentBatches` on which latents come when.
    """
    with session(cfg.device, cfg.arithmetic, schema) as here:
        checks.check_options(cfg, here)
        process = build_process(cfg)
        cache = make_cache(cfg, here.logger)
        split = checks.find_training_split(cfg)
        dataset = open_dataset(vq_size=cfg.vq_size, split=split, cache=cache)
        sizes = find_batch_sizes(dataset)
        checks.check_data(cfg, dataset, sizes, here)
        if cfg.attributes:
            dataset.attributes = here.distributed.on_main(lambda: read_attributes(cfg.attributes, dataset, here.logger))
        if process.scaling is not None:
            checks.set_scaling(process.scaling, dataset, here)
        weights = dict(enumerate(cfg.class_weights))
        batches = LatentBatches(dataset, sizes, cfg.global_seed, cfg.num_workers, here, class_weights=weights, **order)
        origin = here.distributed.on_main(lambda: checks.find_autoencoder(cfg, dataset, here.logger), share=False)
        held_out = _open_held_out(cfg, open_dataset, split, process, here)
        torch.manual_seed(cfg.global_seed)  # the same weights on every rank
        model = build_biflownet(cfg)
        checks.check_grids(cfg, model, dataset)
        return fit(cfg, here, model, model, batches, process, origin or Origin(), held_out)


def _open_held_out(
    cfg: DictConfig,
    open_dataset: Callable[..., Multires_dataset],
    split: DataSplit | None,
    process: LatentProcess,
    here: Session,
) -> HeldOutLoss | None:
    """None where nothing is held out for it; the log says why."""
    if not cfg.val_every:
        return None
    dataset = None if split is None else open_dataset(vq_size=cfg.vq_size, split=split, side=VALIDATION)
    if not dataset:
        why = f"no subject of {split.path} is on the side {VALIDATION}" if split else f"{cfg.data_path} has no split"
        here.logger.info("no held-out loss: %s", why)
        return None
    if dataset.num_channels != cfg.volume_channels:
        found = f"{dataset.files[0]}: {dataset.num_channels} channels"
        raise UserError(f"{found}, volume_channels is {cfg.volume_channels}: encode all latents with one autoencoder")
    if cfg.attributes:
        asked = (cfg.attributes, dataset, here.logger, False)
        dataset.attributes = here.distributed.on_main(lambda: read_attributes(*asked))
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
