"""Replay: latents of what a model could do before, in every batch beside the new ones, against forgetting."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.errors import UserError
from common.files import folder_locked, write_atomically
from common.progress import tracked
from dataset.Multires_dataset import Grid, Multires_dataset
from dataset.order.batches import batches_of_one_shape
from dataset.volumes.geometry import size_text
from dataset.volumes.index import LATENT_SUFFIX
from dataset.volumes.latent_record import RECORD_NAME
from dataset.volumes.volume_io import read_latent, write_latent
from ddpm.latent_process import LatentProcess
from train.diffusion.beginning import Beginning
from train.loop.session import Session

STEPS, BATCH = 50, 4  # of sampling: steps of a diffusion's or flow's fast sampler, latents at a time

Job = tuple[int, Grid, int, Path]  # class id, size, number and file of a sample


def check_replay(cfg: DictConfig, dataset: Multires_dataset, replayed: Multires_dataset) -> None:
    """UserError for latents to replay that the training can't take beside its own."""
    if shared := set(dataset.files) & set(replayed.files):
        raise UserError(f"replay.data_path: {sorted(shared)[0]} is among the new latents too: name it in one JSON")
    made_by = {r.get("autoencoder"): f for data in (dataset, replayed) for f, r in data.latent_records.items() if r}
    if len(made_by.keys() - {None}) > 1:
        raise UserError(
            f"replay.data_path: {made_by.popitem()[1]}: latents of another autoencoder than the new ones: encode all "
            "with one"
        )
    if max(replayed.labels) >= cfg.num_classes:
        raise UserError(
            f"{replayed.root_dir}: class id {max(replayed.labels)} is too high for num_classes {cfg.num_classes}: ids "
            "are those of this run"
        )
    if strange := sorted(set(replayed.buckets) - set(dataset.buckets)):
        example = replayed.files[replayed.buckets[strange[0]][0]]
        raise UserError(
            f"replay: {example} has size {size_text(strange[0])}, {cfg.data_path} has none of it: the share that is "
            "replayed holds within each size, so take these latents out"
        )


def sample_weights(cfg: DictConfig, dataset: Multires_dataset, num_new: int) -> list[float] | None:
    """How often each latent is taken: by `class_weights`, and so that the share of those from `num_new` on is right.

    None: all alike.
    """
    if not cfg.class_weights and num_new == len(dataset):
        return None
    of_class = dict(enumerate(cfg.class_weights))
    weights = np.array([of_class.get(label, 1.0) for label in dataset.labels])
    is_replayed = np.arange(len(dataset)) >= num_new
    for indices in dataset.buckets.values():
        here = np.zeros(len(dataset), dtype=bool)
        here[indices] = True
        old, new = here & is_replayed, here & ~is_replayed
        if old.any():
            weights[old] *= cfg.replay.share / (1 - cfg.replay.share) * weights[new].sum() / weights[old].sum()
    return weights.tolist()


def make_samples(
    cfg: DictConfig,
    dataset: Multires_dataset,
    model: nn.Module,
    process: LatentProcess,
    beginning: Beginning,
    here: Session,
) -> Path:
    """The JSON of latents that the model makes of the classes that it knows, in the sizes of a data set.

    They lie in `results_dir`, by the checkpoint and their number; those that are there are kept. On all ranks.
    """
    folder = Path(cfg.results_dir).absolute() / f"replay-{beginning.base[:12]}-{cfg.replay.samples}"
    known = beginning.known_classes
    places = {
        (class_id, grid): folder / f"class_{source}" / f"{size_text(grid)}{LATENT_SUFFIX}"
        for class_id, source in known.items()
        for grid in dataset.buckets
    }
    if not places:
        raise UserError(f"replay.samples: no class of this run is one of {beginning.path}: give replay.data_path")
    path = folder / f"latents_{'_'.join(f'{new}-{old}' for new, old in known.items())}.json"

    def begin() -> list[Job]:
        record = next(filter(None, dataset.latent_records.values()), None)
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
            if record is not None:
                write_atomically(place / RECORD_NAME, json.dumps(record, indent=2).encode())
        jobs = [
            (class_id, grid, number, place / f"{number:04d}.nii.gz")
            for (class_id, grid), place in places.items()
            for number in range(cfg.replay.samples)
        ]
        of_class = {str(c): [str(place) for (of, _), place in places.items() if of == c] for c in known}
        write_atomically(path, (json.dumps(of_class, indent=2) + "\n").encode())
        return [job for job in jobs if not _is_there(job[3])]

    ranks = here.distributed
    with folder_locked(folder, "sampling what is replayed") if here.is_main else contextlib.nullcontext():
        missing = ranks.on_main(begin)
        batches = batches_of_one_shape(missing, [job[1] for job in missing], BATCH)[ranks.rank :: ranks.world_size]
        model.to(here.device).eval()
        process.to(here.device)
        for batch in tracked(batches, "sampling what is replayed", "batch", transient=True):
            for job, latent in zip(batch, _sample(batch, known, model, process, here.device), strict=True):
                write_latent(job[3], latent)
        ranks.barrier()
    return path


def _sample(
    batch: list[Job], known: Mapping[int, int], model: nn.Module, process: LatentProcess, device: torch.device
) -> Tensor:
    """Latents (B, C, d, h, w) of one size; their noise depends on the checkpoint's class, size and number."""
    grid = batch[0][1]
    seeds = [np.random.SeedSequence((known[class_id], *grid, number)) for class_id, _, number, _ in batch]
    generators = [torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0])) for seed in seeds]
    z = torch.stack([torch.randn((process.channels, *grid), generator=generator) for generator in generators])
    conditions = {"y": torch.tensor([job[0] for job in batch]), "res": torch.tensor(grid) / model.vq_size}
    return process.sample(
        model,
        z.to(device),
        conditions={name: value.to(device) for name, value in conditions.items()},
        strategy=process.fast_strategy,
        ddim_steps=min(STEPS, process.num_timesteps),
        generator=generators,
    ).cpu()


def _is_there(path: Path) -> bool:
    try:
        read_latent(path)
    except UserError:
        return False
    return True
