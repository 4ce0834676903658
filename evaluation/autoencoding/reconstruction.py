"""Reconstructs and measures held-out volumes by one or more autoencoders, shared out to the processes."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.model.lpips import MIN_EXTENT, TriplanarLPIPS
from common.errors import UserError
from common.log import get_logger
from common.processes import PATIENCE, joined
from config.loading import require
from dataset.volumes.index import VOLUME_SUFFIX
from dataset.volumes.pictures import central_slices
from dataset.volumes.volume_io import read_header, write_volume
from evaluation.autoencoding.measures import COUNTS, measure, reconstruct
from evaluation.autoencoding.plan import ROLE, Checkpoint, Plan, load_lpips, make_plan, max_bytes, read_all, too_little
from evaluation.autoencoding.tables import Measured, write_results
from evaluation.comparison.sets import Group, SetVolume, list_refused
from evaluation.results.results import VOLUMES_FOLDER, Results, cache_folder, file_names, make_folders
from evaluation.results.work import Arrays, ResultCache, Work, do_work

VERSION = 1  # of what is kept of a volume; rises when the same settings give other numbers


def evaluate(cfg: DictConfig) -> Results | None:
    """Reconstructs and measures every volume that is not done yet; rank 0 writes the results and returns them.

    A shard writes none: they are of all volumes.
    Raises UserError, before anything is reconstructed, for whatever is wrong with options, checkpoints and volumes.
    """
    require(cfg, "data", "output_dir")
    if not cfg.AE_ckpt:
        raise UserError("required but not set: AE_ckpt: give one or more checkpoints with --AE-ckpt FILE [FILE ...]")
    with joined(cfg.device, PATIENCE, "exact") as place:
        # What there is to do.
        logger = get_logger(place.rank)
        plan = place.on_main(lambda: make_plan(cfg, place.device))
        place.on_main(lambda: make_folders(cfg, "reconstruction"), share=False)
        groups, excluded = read_all(cfg, plan, place)
        num_volumes = sum(len(group.sets[ROLE]) for group in groups)
        logger.info("%d volumes of %d classes, %d checkpoints", num_volumes, len(groups), len(plan.checkpoints))

        # Reconstruct and measure, one autoencoder after the other.
        networks = Networks(cfg, place.device)
        measured: Measured = {group.name: {} for group in groups}
        shown: dict[tuple[str, Path], str] = {}  # file of the reconstruction, by checkpoint and original
        for checkpoint in plan.checkpoints:
            for group in groups:
                measurement = Measurement(cfg, plan, checkpoint, group, networks)
                arrays, refused = do_work(measurement.work(), group.sets[ROLE], place, cfg.num_workers, cfg.shard)
                if refused:
                    raise UserError(list_refused(refused, "volumes changed meanwhile and"))
                measured[group.name][checkpoint.name] = arrays
                if place.is_main and cfg.shard is None:
                    shown |= measurement.keep_shown()

        # Write what was found.
        if cfg.shard is not None:
            return None
        found = groups, excluded, measured, shown
        return place.on_main(lambda: write_results(cfg, plan, *found, place.device), share=False)


class Networks:
    """Loads networks when the first volume needs them, and holds one autoencoder at a time."""

    def __init__(self, cfg: DictConfig, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self._path: str | None = None
        self._autoencoder: Autoencoder | None = None

    def autoencoder(self, path: str) -> Autoencoder:
        if self._path != path:
            self._autoencoder = None  # before the next one takes its memory
            self._autoencoder, self._path = load_autoencoder(path, self.device), path
        return self._autoencoder

    @cached_property
    def lpips(self) -> TriplanarLPIPS:
        return load_lpips(self.cfg).to(self.device)


@dataclass(frozen=True)
class Measurement:
    """Reconstructs and measures the volumes of a group by one checkpoint.

    MS-SSIM takes as many scales as the smallest volume of the group allows, so that its values can be averaged. What
    that volume is too small for is left out of the whole group.
    """

    cfg: DictConfig
    plan: Plan
    checkpoint: Checkpoint
    group: Group
    networks: Networks

    def work(self) -> Work:
        settings = {"version": VERSION, "checkpoint_sha256": self.checkpoint.sha256}
        settings |= {"lpips": self._lpips_hashes, "num_scales": self.plan.num_scales(self.group)}
        cache = ResultCache(cache_folder(self.cfg), "reconstruction", settings)
        label = f"{self.group.name} by {self.checkpoint.name}"
        return Work(label, SetVolume.key, SetVolume.read, self.compute, cache)

    @property
    def _lpips_hashes(self) -> dict[str, str] | None:
        return self.plan.lpips if self.plan.shortest_side(self.group) >= MIN_EXTENT else None

    def compute(self, volumes: Tensor) -> list[Arrays]:
        """(B, 1, D, H, W) in [-1, 1] -> of each its metrics, the counts of its codes, slices of its reconstruction."""
        return [self._of_volume(volume.to(self.networks.device)) for volume in volumes]

    def keep_shown(self) -> dict[tuple[str, Path], str]:
        """Writes the reconstructions of the volumes that pictures show, where they are not there; their files.

        Names hold what they depend on, so that another checkpoint's or volume's is not taken for them.
        """
        files = {}
        for volume in self.group.sets[ROLE][: self.cfg.num_pictures]:
            digest = sha256(f"{self.checkpoint.sha256} {volume.key()}".encode()).hexdigest()[:8]
            stem = f"{volume.path.name.removesuffix(VOLUME_SUFFIX)}_{file_names([self.checkpoint.name])[0]}"
            file = f"{VOLUMES_FOLDER}/{stem}_{digest}{VOLUME_SUFFIX}"
            path = Path(self.cfg.output_dir) / file
            if not path.is_file():
                found, _ = self._reconstructed(volume.read().to(self.networks.device))
                write_volume(path, found, read_header(volume.path).affine)
            files[self.checkpoint.name, volume.path] = file
        return files

    def _reconstructed(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """As `reconstruct`."""
        checkpoint = self.checkpoint
        autoencoder = self.networks.autoencoder(checkpoint.path)
        try:
            found, codes = reconstruct(autoencoder, volume, max_bytes(self.cfg, volume.device))
        except ValueError as error:  # less is free than when it was checked
            raise too_little(checkpoint.path, error) from error
        if not found.isfinite().all():
            raise UserError(f"{checkpoint.path}: gives NaN: its training diverged, take an earlier checkpoint")
        return found, codes

    def _of_volume(self, volume: Tensor) -> Arrays:
        checkpoint = self.checkpoint
        found, codes = self._reconstructed(volume)
        counts = torch.bincount(codes.flatten(), minlength=checkpoint.n_codes).cpu()
        lpips = None if self._lpips_hashes is None else self.networks.lpips
        num_scales = self.plan.num_scales(self.group)
        metrics = measure(volume, found, counts, checkpoint.patch_size, num_scales, lpips)
        slices = {plane: picture.astype(np.float16) for plane, picture in central_slices(found).items()}
        return {**{name: np.asarray(value) for name, value in metrics.items()}, COUNTS: counts.numpy(), **slices}
