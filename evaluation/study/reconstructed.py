"""The figures of a run's autoencoder on held-out volumes, with what they would be of other volumes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from AutoEncoder.model.codebook import codebook_usage, perplexity
from common.files import file_sha256
from common.processes import Distributed
from config.loading import load_config
from config.schema.evaluation import ReconstructionConfig
from dataset.order.data_split import HELD_OUT
from dataset.volumes.pictures import central_slices
from evaluation.autoencoding.measures import METRICS, code_counts_of, mean_of, of_counted_codes
from evaluation.autoencoding.plan import ROLE, Plan, make_plan, read_all
from evaluation.autoencoding.reconstruction import Measurement, Networks
from evaluation.comparison.sets import Group, list_set, units_of
from evaluation.metrics.intervals import bootstrap_spread
from evaluation.metrics.units import by_subject
from evaluation.results.work import Arrays, do_work
from evaluation.study.statistics import Measured

OF_VOLUMES = ("psnr", "ms_ssim", "lpips", "seam_ratio")  # means over all volumes
OF_CODES = {"codebook_usage": codebook_usage, "codebook_perplexity": perplexity}  # of all volumes together
FIGURES = tuple(METRICS[name].title for name in (*OF_VOLUMES, *OF_CODES))
PLANE, PICTURED = "axial", 4  # volumes of each class
VERSION = 1  # rises when the same volumes give other figures


class ReconstructedJudge:
    """Measures autoencoders on the held-out volumes of a study."""

    names = FIGURES

    def __init__(self, study: DictConfig, place: Distributed) -> None:
        self.study, self.place = study, place
        self.data = f"{study.volumes or study.data}:{HELD_OUT}"
        files = [file for files in list_set(self.data, "volumes").values() for file in files]
        self.settings = {"version": VERSION, "real_range": list(study.real_range), "lpips": study.lpips}
        self.settings |= {"num_resamples": study.num_resamples, "held_out": [file_sha256(file) for file in files]}

    def of_run(self, checkpoint: Path) -> dict[str, Measured]:
        """The figures of a checkpoint; what no volume has, such as seams within one patch, is left out."""
        groups, arrays = self.measured(checkpoint)
        units = units_of(*(group.sets[ROLE] for group in groups))
        together = [of_volume for of_group in arrays for of_volume in of_group]
        statistics = {}
        for name in OF_VOLUMES:
            values = torch.tensor([float(of_volume[name]) for of_volume in together], dtype=torch.float64)  # (N,)
            if values.isfinite().all():
                statistics[name] = partial(mean_of, values)
        counts = code_counts_of(together)
        statistics |= {name: partial(of_counted_codes, function, counts) for name, function in OF_CODES.items()}
        found = {}
        for name, statistic in statistics.items():
            of_subjects, sizes = by_subject(statistic, [units])
            spread = bootstrap_spread(of_subjects, sizes, num_resamples=self.study.num_resamples, seed=0)
            found[METRICS[name].title] = Measured(statistic(torch.arange(len(units))), spread)
        return found

    def slices(self, shown: Mapping[str, Path], output: Path) -> list[tuple[str, list[np.ndarray]]]:
        """Rows of the picture: held-out volumes, and what each variant makes of them."""
        rows = []
        for variant, checkpoint in shown.items():
            groups, arrays = self.measured(checkpoint)
            if not rows:
                volumes = [volume for group in groups for volume in group.sets[ROLE][:PICTURED]]
                rows.append(("held-out", [central_slices(volume.read())[PLANE] for volume in volumes]))
            chosen = [of_volume for of_group in arrays for of_volume in of_group[:PICTURED]]
            rows.append((variant, [of_volume[PLANE].astype(np.float32) for of_volume in chosen]))
        return rows

    def measured(self, checkpoint: Path) -> tuple[Sequence[Group], list[list[Arrays]]]:
        """The held-out volumes by class, and what was measured of each; kept in the cache."""
        study, device = self.study, self.place.device
        values = {name: study[name] for name in ("real_range", "lpips", "device", "output_dir")}
        values |= {"data": self.data, "AE_ckpt": [str(checkpoint)], "num_workers": 0}
        cfg = load_config(ReconstructionConfig, None, values=values)
        plan: Plan = make_plan(cfg, device)
        groups, _ = read_all(cfg, plan, self.place)
        networks = Networks(cfg, device)
        works = [Measurement(cfg, plan, plan.checkpoints[0], group, networks).work() for group in groups]
        found = [do_work(work, g.sets[ROLE], self.place, 0)[0] for work, g in zip(works, groups, strict=True)]
        return groups, found
