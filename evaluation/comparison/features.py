"""Features of sets of volumes: computed in batches, shared out to processes, kept in the cache (`results/work.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from common.errors import UserError
from common.processes import Distributed
from evaluation.comparison.networks import FeatureNetwork
from evaluation.comparison.sets import check_refused
from evaluation.results.results import cache_folder
from evaluation.results.work import Arrays, ResultCache, Work, do_work

VERSION = 1  # rises when the same network and volume give other features
RANGE = "range"  # lowest and highest voxel, kept beside the features


@dataclass(frozen=True)
class SetFeatures:
    """Features of the volumes of a set that could be read.

    volumes: N of them. planes: {plane: (N, S, F)}, S slices each (1 for whole volumes). ranges: of their voxels.
    """

    volumes: tuple[Any, ...]
    planes: dict[str, Tensor]
    ranges: tuple[tuple[float, float], ...]

    def __len__(self) -> int:
        return len(self.volumes)


def extract(
    cfg: DictConfig,
    network: FeatureNetwork,
    volumes: Sequence,
    label: str,
    excluded: dict[Path, str],
    place: Distributed,
) -> SetFeatures | None:
    """The features of all volumes, on rank 0 (None on others, and for a shard). To be called on every rank.

    volumes: each with `path`, `key()` and `read()`, as `SetVolume` has them. excluded: gets those that are left out.
    Raises UserError: volumes that can't be read, all in one, unless `exclude_unreadable`; or fewer than two are left.
    """
    work = Work(
        label=f"{network.name}: {label}",
        key=methodcaller("key"),
        read=methodcaller("read"),
        compute=partial(compute_features, network, place.device),
        cache=ResultCache(cache_folder(cfg), network.name, {**network.settings, "version": VERSION}),
        batch_size=cfg.batch_size,
    )
    results, refused = do_work(work, volumes, place, cfg.num_workers, cfg.shard)
    reasons = {volume.path: reason for volume, reason in refused.items()}
    check_refused(reasons, len(volumes), label, cfg.exclude_unreadable)
    excluded.update(reasons)
    if not place.is_main or cfg.shard is not None:
        return None
    kept = [(volume, result) for volume, result in zip(volumes, results, strict=True) if result is not None]
    planes = {}
    for plane in network.planes:
        features = [torch.from_numpy(result[plane]) for _, result in kept]
        if len({tuple(one.shape) for one in features}) > 1:
            raise UserError(
                f"{label}: volumes of different sizes have different numbers of slices: --resample, or take "
                "fewer --slices"
            )
        planes[plane] = torch.stack(features)  # (N, S, F)
    ranges = tuple((float(result[RANGE][0]), float(result[RANGE][1])) for _, result in kept)
    return SetFeatures(tuple(volume for volume, _ in kept), planes, ranges)


def compute_features(network: FeatureNetwork, device: torch.device, volumes: Tensor) -> list[Arrays]:
    """Features and ranges of volumes (B, 1, D, H, W)."""
    with torch.inference_mode():
        features = network(volumes.to(device))
    arrays = {plane: of_plane.float().cpu().numpy() for plane, of_plane in features.items()}
    arrays[RANGE] = np.array([[volume.min().item(), volume.max().item()] for volume in volumes])
    return [{name: array[i] for name, array in arrays.items()} for i in range(len(volumes))]
