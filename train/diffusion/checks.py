"""What is checked before a BiFlowNet run costs time: options, latents on disk and the autoencoder that made them."""

import logging
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor, nn

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder
from common.errors import UserError
from common.places import is_file
from common.precision import check_precision
from common.progress import tracked
from config.loading import require
from config.schema.option import TENSORBOARD
from dataset.checking.before_training import check_latents
from dataset.Multires_dataset import Grid, Multires_dataset
from dataset.order.data_split import NO_SPLIT, DataSplit, find_split
from dataset.volumes.geometry import size_text
from dataset.volumes.volume_io import read_latent
from ddpm.latent_scaling import LatentScaling
from train.diffusion.batches import Origin
from train.loop.continuing import is_run_folder, read_config
from train.loop.session import Session

MOST_MEASURED = 1000  # latents whose mean and standard deviation are taken for those of all


def check_options(cfg: DictConfig, here: Session) -> None:
    """The options that the schema leaves open, and a warning for each that has no effect.

    A checkpoint file as `continue_from` becomes `ckpt`: a run of its own goes on from it.
    """
    require(cfg, "data_path")
    if cfg.continue_from and not is_run_folder(cfg.continue_from):
        cfg.ckpt, cfg.continue_from = cfg.continue_from, None
    expected = "ControlNet" if "base_ckpt" in cfg else "BiFlowNet"
    if cfg.model != expected:
        raise UserError(f"model={cfg.model}: there is no such model, expected {expected}; give --model")
    if cfg.ckpt and not is_file(cfg.ckpt):
        raise UserError(f"ckpt: {cfg.ckpt}: no such checkpoint file; give an existing one with --ckpt, or leave it out")
    if cfg.enable_amp:
        check_precision(here.device, "amp_dtype", cfg.amp_dtype)
    if cfg.logger != TENSORBOARD:
        from train.loop.tracker import check_installed  # brings Lightning

        check_installed(cfg.logger)
    if here.is_main and cfg.preview and not cfg.AE_ckpt:
        here.logger.warning("preview has no effect: it needs the autoencoder, give --AE-ckpt (or say preview=false)")


def find_training_split(cfg: DictConfig) -> DataSplit | None:
    """The split of the data, which `cfg.split` names from now on, as the run's record does; null without one.

    A run that is named keeps what it began with where nothing else is said.
    """
    run = cfg.continue_from or (cfg.run_name and Path(cfg.results_dir) / cfg.run_name)
    began = read_config(Path(run)) if run else None
    wanted = cfg.split or (None if began is None else began.get("split") or NO_SPLIT)
    split = find_split(cfg.data_path, wanted)
    cfg.split = None if split is None else str(split.path)
    return split


def check_data(cfg: DictConfig, dataset: Multires_dataset, batch_sizes: Mapping[Grid, int], here: Session) -> None:
    """Channels, class ids and number of latents fit the configuration, and a few are sound; else UserError.

    batch_sizes: latents per process and step, of each size.
    """
    if dataset.num_channels != cfg.volume_channels:
        raise UserError(
            f"{dataset.files[0]}: a latent of {dataset.num_channels} channels, volume_channels is "
            f"{cfg.volume_channels}; give --volume-channels {dataset.num_channels}, or latents of the right autoencoder"
        )
    if max(dataset.labels) >= cfg.num_classes:
        raise UserError(
            f"{cfg.data_path}: class id {max(dataset.labels)} is too high for num_classes {cfg.num_classes}; "
            f"give --num-classes {max(dataset.labels) + 1} or more"
        )
    world_size = here.distributed.world_size
    for grid, indices in dataset.buckets.items():
        needed = batch_sizes[grid] * world_size
        if len(indices) < needed:
            of_size = f" of size {size_text(grid)}" if len(dataset.buckets) > 1 else ""
            raise UserError(
                f"world size that doesn't fit: {world_size} process(es) with batch_size {batch_sizes[grid]} take "
                f"{needed} latents{of_size} a step, {cfg.data_path} has {len(indices)}; use fewer processes or a lower "
                f"{'batch_size of them in buckets' if of_size else '--batch-size'}"
            )
    if cfg.split:
        here.logger.info("%s: %d latents are on the training side", cfg.split, len(dataset))
    here.distributed.on_main(lambda: check_latents(cfg.data_path, dataset.files_by_label(), here.logger), share=False)


def check_grids(cfg: DictConfig, model: nn.Module, dataset: Multires_dataset) -> None:
    """The latent grids divide into sub-volumes and by the U-Net's down-sampling."""
    multiples = list(model.grid_multiple)
    for grid, indices in dataset.buckets.items():
        if any(size % multiple for size, multiple in zip(grid, multiples, strict=True)):
            raise UserError(
                f"resolution {list(grid)} has to be divisible by {multiples} (sub-volumes and down-sampling of "
                f"dim_mults {list(cfg.dim_mults)}), {dataset.files[indices[0]]} has it; use latents of another size or "
                "fewer levels"
            )


def find_autoencoder(cfg: DictConfig, dataset: Multires_dataset, logger: logging.Logger) -> Origin:
    """The autoencoder that made the latents: by their records, and `AE_ckpt` if it is that one.

    Each latent folder's `latents.json` says which autoencoder made it. Folders without one (made by other software)
    pass with a warning.

    Raises:
        UserError: folders of different autoencoders, another autoencoder than `AE_ckpt`, other channels.
    """
    records = {folder: record or {} for folder, record in dataset.latent_records.items()}
    made_by = {folder: record.get("autoencoder") for folder, record in records.items()}
    known = [folder for folder, fingerprint in made_by.items() if fingerprint]
    for folder in known:
        if made_by[folder] != made_by[known[0]]:
            raise UserError(
                f"{folder}: latents of another autoencoder ({records[folder].get('checkpoint')}) than those in "
                f"{known[0]} ({records[known[0]].get('checkpoint')}); encode all classes with one autoencoder"
            )
    recorded = made_by[known[0]] if known else None
    if not cfg.AE_ckpt:
        return Origin(fingerprint=recorded)
    autoencoder = load_autoencoder(cfg.AE_ckpt)
    if autoencoder.embedding_dim != cfg.volume_channels:
        raise UserError(
            f"{cfg.AE_ckpt}: its latents have {autoencoder.embedding_dim} channels, volume_channels is "
            f"{cfg.volume_channels}; give the --AE-ckpt that made the latents"
        )
    for folder in set(made_by) - set(known):
        logger.warning("%s has no record of its autoencoder: whether --AE-ckpt made it is not checked", folder)
    fingerprint = latent_fingerprint(autoencoder)
    if recorded not in (None, fingerprint):
        raise UserError(
            f"{cfg.AE_ckpt}: not the autoencoder that made the latents in {known[0]} "
            f"({records[known[0]].get('checkpoint')}); give that one, or encode again with "
            "train/generate_training_latent.py"
        )
    return Origin(autoencoder, fingerprint)


def set_scaling(scaling: LatentScaling, dataset: Multires_dataset, here: Session) -> None:
    """Measure the latents' mean and standard deviation; of thousands of files an even share tells as much as all."""

    def measure() -> dict[str, Tensor]:
        step = -(-len(dataset) // MOST_MEASURED)
        scaling.measure(read_latent(path) for path in tracked(dataset.files[::step], "measuring", "latent"))
        return scaling.state_dict()

    scaling.load_state_dict(here.distributed.on_main(measure))
    stds = ", ".join(f"{value:.3g}" for value in scaling.std.tolist())
    here.logger.info("latent_scaling unit: channels with standard deviations %s are scaled to 1", stds)
