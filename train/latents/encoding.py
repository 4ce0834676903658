"""Encodes the volumes of a data set that have no whole latent yet, shared out to the processes."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder
from AutoEncoder.encoding import encode
from AutoEncoder.latents import codebook_range
from AutoEncoder.patches import padded_size
from common.errors import UserError
from common.files import check_still_there
from common.hub import is_on_hub
from common.log import get_logger
from common.parallel import num_cores
from common.processes import PATIENCE, Distributed, joined
from common.progress import Progress, tracked
from common.shards import folder_shared_out, shard_of
from config.loading import require
from dataset.order.batches import batches_of_one_shape
from dataset.order.data_split import SIDES, class_name_of, find_split
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.index import latent_folder
from dataset.volumes.latent_record import start_folder
from dataset.volumes.volume_io import read_latent, write_latent


def generate_latents(cfg: DictConfig) -> list[Path]:
    """Encodes all volumes of the shard that have no whole latent yet. Returns the latent files of all of these.

    Raises UserError, before anything is encoded, for whatever is wrong with options, data set, headers, checkpoint or
    latents that are already there, and where another process is encoding into the same folder; later only for a volume
    whose voxels are wrong, a latent that cannot be written, and files that vanish meanwhile.
    """
    require(cfg, "data_path", "AE_ckpt")
    with ExitStack() as closing:
        distributed = closing.enter_context(joined(cfg.device, PATIENCE, cfg.arithmetic))
        logger = get_logger(distributed.rank)
        autoencoder = load_autoencoder(cfg.AE_ckpt, distributed.device)
        channels = autoencoder.cfg.dataset.image_channels
        if channels != 1:
            raise UserError(f"{cfg.AE_ckpt}: an autoencoder of images with {channels} channels, volumes have 1")
        intensity_range = list(cfg.intensity_range or autoencoder.cfg.dataset.get("intensity_range") or (-1.0, 1.0))
        dataset = Singleres_dataset(cfg.data_path, generate_latents=True, intensity_range=intensity_range, check=False)
        folders = latent_folders(dataset)
        distributed.on_main(lambda: dataset.check_sample(logger), share=False)
        record = make_record(autoencoder, cfg.AE_ckpt, intensity_range)
        distributed.on_main(lambda: [_take_folder(folder, record, cfg.shard, closing) for folder in folders])
        distributed.on_main(lambda: copy_split(cfg.data_path, dataset, logger), share=False)
        _log_plan(logger, dataset, folders, autoencoder.patch_size)

        batches = shard_of(batches_of_one_shape(range(len(dataset)), dataset.shapes, cfg.batch_size), cfg.shard)
        wanted = sorted(index for batch in batches for index in batch)
        missing = _missing(wanted, dataset, autoencoder, distributed)
        _encode_missing(cfg, autoencoder, dataset, batches, missing, distributed)
        distributed.barrier()
        latents = [dataset.latent_paths[index] for index in wanted]
        distributed.on_main(lambda: _check_still_there(dataset, latents))
        return latents


def _take_folder(folder: Path, record: dict[str, Any], shard: str | None, closing: ExitStack) -> None:
    """As `start_folder`, with the folder held against others than further shards until `closing` closes."""
    begin = partial(start_folder, folder, record, tidy=shard is None)
    closing.enter_context(folder_shared_out(folder, shard, "encoding volumes", begin))


def _check_still_there(dataset: Singleres_dataset, latents: Sequence[Path]) -> None:
    check_still_there(dataset.files, "volumes", "start again with the data set as it is to be")
    check_still_there(latents, "latents", "start again to make them anew")


def copy_split(data_path: str, dataset: Singleres_dataset, logger: Logger) -> None:
    """Copies the data set's split into the folders of latents, so that they say wherever they go who is held out."""
    split = find_split(data_path)
    if split is None:
        logger.info("%s has no split.json (dataset/split.py): nobody is held out from training", data_path)
    else:
        sides = Counter(split.side_of(path, folder) for path, folder in dataset.class_folders.items())
        logger.info(
            "%s: %s", split.path, ", ".join(f"{sides[side]} volumes {side.replace('_', ' ')}" for side in SIDES)
        )
        for volumes in {folder for of_class in dataset.folders.values() for folder in of_class}:
            split.write(latent_folder(volumes), class_name_of(volumes))


def make_record(autoencoder: nn.Module, checkpoint: str | Path, intensity_range: Sequence[float]) -> dict[str, Any]:
    """What `latents.json` says of an autoencoder; `dataset/volumes/latent_record.py` reads, compares and writes it.

    intensity_range: range of the files on disk that was mapped to [-1, 1].
    """
    try:
        low, high = codebook_range(autoencoder.codebook.embeddings)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    return {
        "autoencoder": latent_fingerprint(autoencoder),
        "checkpoint": str(checkpoint) if is_on_hub(checkpoint) else Path(checkpoint).name,
        "downsample": autoencoder.downsample_factor,
        "embedding_dim": autoencoder.embedding_dim,
        "codebook_min": low.item(),
        "codebook_max": high.item(),
        "patch_size": autoencoder.patch_size,
        "intensity_range": [float(value) for value in intensity_range],
    }


def _log_plan(logger: Logger, dataset: Singleres_dataset, folders: Sequence[Path], patch_size: int) -> None:
    low, high = dataset.intensity_range
    logger.info("%d volumes, intensities in [%g, %g] -> %s", len(dataset), low, high, ", ".join(map(str, folders)))
    shapes = zip(dataset.files, dataset.shapes, strict=True)
    padded = [path for path, shape in shapes if padded_size(shape, patch_size) != tuple(shape)]
    if padded:
        logger.info(
            "%d volumes do not divide into patches of %d and are padded with background at the far ends; their latents "
            "are those of the padded volumes, e.g. %s",
            *(len(padded), patch_size, padded[0]),
        )


def _missing(wanted: Sequence[int], dataset: Singleres_dataset, autoencoder: nn.Module, place: Distributed) -> set[int]:
    """Which of these volumes have no whole latent, on every rank; each rank looks at its share."""
    mine = wanted[place.rank :: place.world_size]
    checked = tracked(mine, "checking", "latent", transient=True)
    found = place.on_all(lambda: [index for index in checked if not has_latent(index, dataset, autoencoder)])
    return {index for part in found for index in part}


def _encode_missing(
    cfg: DictConfig,
    autoencoder: nn.Module,
    dataset: Singleres_dataset,
    batches: Sequence[Sequence[int]],
    missing: set[int],
    place: Distributed,
) -> None:
    """Encodes this rank's share of the batches of which something is missing."""
    # A batch of which a part is there is encoded as a whole, so that its rounding is that of an uninterrupted run.
    todo = [batch for batch in batches if not missing.isdisjoint(batch)]
    there = sum(map(len, batches)) - sum(map(len, todo))
    mine = todo[place.rank :: place.world_size]
    volumes = volumes_in_order([index for batch in mine for index in batch], dataset, cfg.num_workers)
    share = there // place.world_size  # of what is there, so that the bar shows the whole
    with Progress("encoding", share + sum(map(len, mine)), "volume", done=share) as progress:
        for batch in mine:
            x = torch.stack([next(volumes) for _ in batch])  # (B, 1, D, H, W)
            latents = encode(autoencoder, x, cfg.sliding_window)  # (B, E, d, h, w)
            for index, latent in zip(batch, latents, strict=True):
                if index not in missing:
                    continue
                if not latent.isfinite().all():
                    raise UserError(f"{dataset.files[index]}: {cfg.AE_ckpt} gives NaN or infinite latents: it diverged")
                write_latent(dataset.latent_paths[index], latent)
            progress.advance(len(batch))


def latent_folders(dataset: Singleres_dataset) -> list[Path]:
    """The folders of the latents, after the check that no latent lands among the images or upon another latent."""
    sources = [folder for folders in dataset.folders.values() for folder in folders]
    targets = [latent_folder(folder) for folder in sources]
    for target in targets:
        real = Path(os.path.realpath(target))
        for source in sources:
            if Path(os.path.realpath(source)) in (real, *real.parents):
                raise UserError(
                    f"{dataset.root_dir}: the latents {target} would lie among the images of {source}: "
                    "name folders that do not lie within each other"
                )
        if targets.count(target) > 1:
            raise UserError(f"{dataset.root_dir}: a folder is named twice, its latents are {target}: name it once")
    return targets


def has_latent(index: int, dataset: Singleres_dataset, autoencoder: nn.Module) -> bool:
    """Whether a volume's latent is there, readable to its end, finite and of the right shape."""
    padded = padded_size(dataset.shapes[index], autoencoder.patch_size)
    shape = (autoencoder.embedding_dim, *(extent // autoencoder.downsample_factor for extent in padded))
    try:
        return tuple(read_latent(dataset.latent_paths[index]).shape) == shape  # (E, d, h, w)
    except UserError:
        return False


def volumes_in_order(indices: list[int], dataset: Singleres_dataset, num_workers: int) -> Iterator[Tensor]:
    """Volumes (1, D, H, W) of these indices, read ahead by worker processes, one each."""
    options = {"prefetch_factor": 1} if num_workers else {}  # more would only cost memory
    options["num_workers"] = min(num_workers, len(indices), num_cores())
    for volume, _ in DataLoader(dataset, batch_size=None, sampler=indices, **options):
        yield volume
