"""MS-SSIM of random pairs of a set's volumes: how alike they are (HA-GAN's measure of diversity)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from common.errors import UserError
from common.processes import Distributed
from evaluation.comparison.sets import SetVolume, list_refused
from evaluation.metrics.reconstruction import ms_ssim
from evaluation.metrics.units import Units
from evaluation.results.results import cache_folder
from evaluation.results.work import Arrays, ResultCache, Work, do_work

VERSION = 1  # rises when the same two volumes give another value


@dataclass(frozen=True)
class Pair:
    """Two volumes of a set, compared with each other; the order makes no difference."""

    first: SetVolume
    second: SetVolume

    @property
    def path(self) -> Path:
        return self.first.path

    def key(self) -> str:
        """Equal for equal pairs."""
        return "-".join(sorted(volume.key()[:32] for volume in (self.first, self.second)))

    def read(self) -> Tensor:
        """(2, 1, D, H, W)."""
        return torch.stack([self.first.read(), self.second.read()])


@dataclass(frozen=True)
class PairScores:
    """pairs: (P, 2), indices into the volumes of `units`, each of two subjects. scores: (P,) float64, empty on ranks
    other than 0 and for a shard.
    """

    pairs: Tensor
    scores: Tensor
    units: Units

    @property
    def are_independent(self) -> bool:
        """Whether no subject is in two pairs."""
        subjects = self.units.subjects[self.pairs]
        return len(self.pairs) > 1 and len(subjects.unique()) == subjects.numel()

    @property
    def num_units(self) -> int:
        """How many things there are to resample: independent pairs, or the subjects that pairs share."""
        return len(self.pairs) if self.are_independent else self.units.num_subjects

    def mean_of(self, chosen: Tensor) -> float:
        """The mean score of a resample of these; there are no pairs of a subject with itself."""
        times = torch.bincount(chosen, minlength=self.num_units).double()
        weights = times if self.are_independent else times[self.units.subjects[self.pairs]].prod(dim=1)
        total = weights.sum().item()
        return (weights * self.scores).sum().item() / total if total > 0 else self.scores.mean().item()


def pair_scores(
    cfg: DictConfig, volumes: Sequence[SetVolume], units: Units, label: str, place: Distributed
) -> PairScores:
    """MS-SSIM of random pairs of readable volumes, each of two subjects. To be called on every rank."""
    pairs = choose_pairs(units, cfg.num_pairs, cfg.seed)
    items = [Pair(volumes[i], volumes[j]) for i, j in pairs.tolist()]
    work = Work(
        label=f"MS-SSIM: pairs of {label}",
        key=Pair.key,
        read=Pair.read,
        compute=partial(_compare_pairs, place.device),
        cache=ResultCache(cache_folder(cfg), "ms_ssim", {"version": VERSION}),
    )
    found, refused = do_work(work, items, place, cfg.num_workers, cfg.shard)
    if refused and cfg.shard is None:  # they could be read for their features
        raise UserError(list_refused({pair.path: reason for pair, reason in refused.items()}, f"pairs of {label}"))
    scores = [float(arrays["ms_ssim"]) for arrays in found if arrays is not None]
    return PairScores(pairs, torch.tensor(scores, dtype=torch.float64), units)


def choose_pairs(units: Units, num_pairs: int, seed: int) -> Tensor:
    """`num_pairs` different pairs of volumes of two subjects, drawn at random, (P, 2); all where there are fewer.

    No subject is in two pairs where there are enough: such pairs tell most, and are independent of each other.
    """
    subjects, count = units.subjects.numpy(), len(units)
    num_same = sum(of_subject * (of_subject - 1) // 2 for of_subject in np.bincount(subjects))
    if count * (count - 1) // 2 - num_same <= num_pairs:
        pairs = torch.triu_indices(count, count, offset=1).T
        return pairs[units.subjects[pairs[:, 0]] != units.subjects[pairs[:, 1]]]
    rng = np.random.default_rng(seed)
    if num_pairs <= units.num_subjects // 2:
        drawn = rng.permutation(units.num_subjects)[: 2 * num_pairs]
        scans = [rng.choice(np.flatnonzero(subjects == subject)) for subject in drawn]
        return torch.from_numpy(np.sort(np.reshape(scans, (-1, 2)), axis=1))
    chosen: set[tuple[int, int]] = set()
    while len(chosen) < num_pairs:
        first, second = sorted(rng.integers(count, size=2).tolist())
        if subjects[first] != subjects[second]:
            chosen.add((first, second))
    return torch.tensor(sorted(chosen))


def _compare_pairs(device: torch.device, pairs: Tensor) -> list[Arrays]:
    """(B, 2, 1, D, H, W) -> MS-SSIM of each."""
    return [{"ms_ssim": np.array(ms_ssim(*pair.to(device)))} for pair in pairs]
