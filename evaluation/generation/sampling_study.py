"""Samples a demo's volumes by several samplers and numbers of steps, and measures how near to real ones they are."""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from AutoEncoder.decoding import decode
from common.checkpoint_files import newest_checkpoint
from common.documents import read_json
from common.errors import UserError
from common.files import file_sha256, write_atomically
from common.precision import configure_backend
from common.processes import choose_device
from common.progress import Progress
from config.loading import SAVED_CONFIG, load_config
from config.schema.diffusion import GenerationConfig
from dataset.order.batches import batches_of_one_shape
from dataset.order.data_split import HELD_OUT, TRAINING
from dataset.preparation.classes import AUTOENCODER_JSON
from dataset.volumes.geometry import size_text
from dataset.volumes.pictures import png_of
from ddpm.process import SAMPLERS_OF
from evaluation.demonstration.figures import Kind, features, load_side
from evaluation.demonstration.stages import DemoPaths
from evaluation.generation.requests import Request, list_requests
from evaluation.generation.run import load_models, sample_latents
from evaluation.metrics.distances import frechet_distance, median_bandwidth, mmd_rbf

ALL_TIMESTEPS = "ddpm"  # takes every timestep, whatever --steps says: the reference
_ALL = [name for samplers in SAMPLERS_OF.values() for name in samplers]
BATCH_SIZE = 16  # latents sampled together; results do not depend on it
MEASURES = {
    "fid": "FID-3D on random features, mean over classes and sizes, as in demo.json",
    "mmd": "unbiased MMD on the same features, all classes together",
}


@dataclass(frozen=True, order=True)
class Run:
    """One sampler with one number of steps from one seed."""

    steps: int  # first, so that sorting puts the cheapest runs first and partial results are useful
    seed: int
    strategy: str


Found = dict[Run, dict[str, float]]  # measures of each run


def run_study(cfg: DictConfig) -> None:
    """Do the runs of a `SamplingStudyConfig` that are not there yet; write results, table and picture after each."""
    device = choose_device(cfg.device)
    configure_backend(device)
    study = Study(Path(cfg.demo), Path(cfg.output_dir), cfg.num_samples, device)
    runs = planned_runs(study.strategies(cfg.strategies), cfg.steps, cfg.seeds, study.cfg.timesteps)

    todo = [run for run in runs if run not in study.results]
    study.write()
    with Progress("sampling", sum(run.steps for run in todo), "step") as progress:
        for run in todo:
            study.results[run] = study.measure(run, progress)
            study.write()


def planned_runs(strategies: Sequence[str], steps: Sequence[int], seeds: Sequence[int], timesteps: int) -> list[Run]:
    """Every combination once, the cheapest first; ddpm with all timesteps only."""
    if min(steps) < 1 or max(steps) > timesteps:
        raise UserError(f"--steps {' '.join(map(str, steps))}: each has to lie between 1 and the {timesteps} timesteps")
    counts = {strategy: [timesteps] if strategy == ALL_TIMESTEPS else steps for strategy in strategies}
    return sorted({Run(count, seed, strategy) for strategy in counts for count in counts[strategy] for seed in seeds})


class Study:
    """The models and the real volumes of a demo, and the results so far.

    demo: folder of evaluation/demo.py, finished. num_samples: volumes per class in each run.
    Raises UserError: no finished demo there; results of other models, phantoms or settings in `output`.
    """

    def __init__(self, demo: Path, output: Path, num_samples: int, device: torch.device):
        self.output, self.device = output, device
        self.cfg = demo_config(demo, output, num_samples)
        dataset_json = DemoPaths(demo).phantoms / AUTOENCODER_JSON
        real, training = (load_side(dataset_json, side) for side in (HELD_OUT, TRAINING))
        self.real = features(real)
        of_real = b"".join(of_kind.numpy().tobytes() for of_kind in real.values())
        self.settings = {
            "AE_sha256": file_sha256(self.cfg.AE_ckpt),
            "model_sha256": file_sha256(self.cfg.model_ckpt),
            "held_out_sha256": hashlib.sha256(of_real).hexdigest(),
            "num_samples": num_samples,
            "timesteps": self.cfg.timesteps,
            "guidance_scale": self.cfg.guidance_scale,
            "measures": list(MEASURES),
        }
        self.results = self._read()
        self.floor = self._floor(features(training), num_samples)
        self.autoencoder, self.model, self.process = load_models(self.cfg, device)

    def strategies(self, asked: Sequence[str] | None) -> list[str]:
        """Those of the model's process; all where none are asked for. UserError for one of another process."""
        known = list(SAMPLERS_OF[self.cfg.process])
        if strange := [name for name in asked or () if name not in known]:
            raise UserError(
                f"--strategies {strange[0]}: the demo's model was trained with process {self.cfg.process}: choose "
                f"among {' '.join(known)}"
            )
        return list(asked or known)

    def measure(self, run: Run, progress: Progress) -> dict[str, float]:
        """Sample, decode and compare one set of volumes."""
        values = {"sampling_strategy": run.strategy, "ddim_steps": run.steps, "seed": run.seed, "eta": 0.0}
        cfg = load_config(GenerationConfig, None, values={**OmegaConf.to_container(self.cfg), **values})
        requests = list_requests(cfg)
        found: dict[Request, Tensor] = {}
        begin, start, name = time.monotonic(), progress.done, f"{run.strategy} {run.steps}, seed {run.seed}"
        for batch in batches_of_one_shape(requests, [request.grid for request in requests], BATCH_SIZE):
            done = len(found)

            def show(step: int, num_steps: int, done: int = done, size: int = len(batch)) -> None:
                progress.reach(start + round(run.steps * (done + size * step / num_steps) / len(requests)), name)

            latents = sample_latents(cfg, self.model, self.process, batch, self.device, show)  # (B, C, d, h, w)
            found |= dict(zip(batch, latents, strict=True))
        seconds = time.monotonic() - begin
        volumes: dict[Kind, list[Tensor]] = {kind: [] for kind in self.real}
        for request in requests:
            volume = decode(self.autoencoder, found[request], request.decoding, request.tile)  # (1, D, H, W)
            if not volume.isfinite().all():
                raise UserError(f"{run.strategy} with {run.steps} steps gives NaN: the training of a model diverged")
            volumes[request.class_name, size_text(request.voxels)].append(volume)
        made = features({kind: torch.stack(of_kind) for kind, of_kind in volumes.items()})
        return {**self._compare(made), "sampling_seconds": seconds}

    def _compare(self, made: Mapping[Kind, Tensor]) -> dict[str, float]:
        """Both measures of features (N, F) of each kind against the held-out phantoms."""
        distances = [frechet_distance(real, made[kind]) for kind, real in self.real.items()]
        real, other = (torch.cat([of[kind] for kind in self.real]) for of in (self.real, made))
        bandwidth = median_bandwidth(*real.chunk(2))  # of every pair of the real set, whatever it is compared with
        return {"fid": statistics.fmean(distances), "mmd": mmd_rbf(real, other, bandwidth=bandwidth)}

    def _floor(self, training: Mapping[Kind, Tensor], num_samples: int) -> list[dict[str, float]]:
        """What real volumes get: disjoint sets of training phantoms, each as large as a run."""
        by_kind = [training[kind].split(num_samples) for kind in self.real]
        sets = [chunks for chunks in zip(*by_kind, strict=False) if all(len(c) == num_samples for c in chunks)]
        if not sets:
            raise UserError(f"--num-samples {num_samples}: the demo has fewer training phantoms of a kind: take fewer")
        return [self._compare(dict(zip(self.real, chunks, strict=True))) for chunks in sets]

    def _read(self) -> Found:
        path = self.output / "sampling.json"
        if not path.exists():
            return {}
        try:
            content = read_json(path)
            settings, runs = content["settings"], content["runs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a result of this script: remove it or choose another --output-dir") from error
        different = sorted(key for key in self.settings if settings.get(key) != self.settings[key])
        if different:
            raise UserError(
                f"{path}: these results were made with other settings ({', '.join(different)}): choose another "
                "--output-dir"
            )
        names = [item.name for item in fields(Run)]
        return {Run(*(run.pop(name) for name in names)): run for run in runs}

    def write(self) -> None:
        """Results, table and picture of what is there so far."""
        runs = [{**asdict(run), **self.results[run]} for run in sorted(self.results)]
        content = {"settings": self.settings, "real": self.floor, "runs": runs}
        write_atomically(self.output / "sampling.json", (json.dumps(content, indent=2) + "\n").encode())
        write_atomically(self.output / "sampling_table.md", table(self.results, self.floor).encode())
        write_atomically(self.output / "sampling.png", picture(self.results, self.floor))


def demo_config(demo: Path, output: Path, num_samples: int) -> DictConfig:
    """How the demo generated its volumes, with its models where they are now."""
    paths = DemoPaths(demo)
    saved = paths.generated / "seed_0" / SAVED_CONFIG
    model_ckpt = newest_checkpoint(paths.biflownet / "checkpoints") if saved.exists() else None
    if model_ckpt is None or not paths.stage2_ckpt.exists():
        raise UserError(f"{demo}: no finished demo here: python evaluation/demo.py --output-dir {demo} makes one")
    values = {"AE_ckpt": str(paths.stage2_ckpt), "model_ckpt": str(model_ckpt), "output_dir": str(output)}
    return load_config(GenerationConfig, saved, values={**values, "num_samples": num_samples})


# ------------------------------------------------------------------------------------------------------- table, picture


def over_seeds(results: Found, measure: str) -> dict[tuple[str, int], tuple[float, float | None]]:
    """Mean and standard deviation over the seeds for each (strategy, steps); None where there is one seed."""
    values: dict[tuple[str, int], list[float]] = {}
    for run in sorted(results):
        values.setdefault((run.strategy, run.steps), []).append(results[run][measure])
    return {key: mean_and_spread(found) for key, found in values.items()}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (of the sample); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(results: Found, floor: Sequence[dict[str, float]]) -> str:
    """Markdown: steps x strategy for each measure, what real volumes get in the last row."""
    strategies = [name for name in _ALL if any(run.strategy == name for run in results)]
    lines = []
    for measure, meaning in MEASURES.items():
        found = over_seeds(results, measure)
        lines += [f"{meaning[0].upper()}{meaning[1:]}: mean ± standard deviation over the seeds.", ""]
        lines += ["| " + " | ".join(["steps", *strategies]) + " |", f"|---|{'---|' * len(strategies)}"]
        for steps in sorted({steps for _, steps in found}):
            cells = [_cell(found.get((name, steps))) for name in strategies]
            lines.append(f"| {steps} | {' | '.join(cells)} |")
        real = _cell(mean_and_spread([values[measure] for values in floor]))
        lines += ["", f"Training phantoms in {len(floor)} sets of the same size: {real}", ""]
    return "\n".join(lines)


def _cell(value: tuple[float, float | None] | None) -> str:
    return " ± ".join(f"{number:.4f}" for number in value or () if number is not None)


def picture(results: Found, floor: Sequence[dict[str, float]]) -> bytes:
    """PNG: each measure against the number of steps; ddpm as a band, real volumes as a line."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (measure, meaning) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        found = over_seeds(results, measure)
        for number, name in enumerate(name for name in _ALL if name != ALL_TIMESTEPS):
            points = [(steps, *found[strategy, steps]) for strategy, steps in sorted(found) if strategy == name]
            if points:
                steps, means, spreads = zip(*points, strict=True)
                shifted = [count * 1.03 ** (number - 1) for count in steps]  # so that error bars don't hide each other
                axes.errorbar(shifted, means, [s or 0 for s in spreads], marker="o", ms=4, capsize=2, label=name)
        for (strategy, steps), (mean, spread) in found.items():
            if strategy == ALL_TIMESTEPS:
                low, high = mean - (spread or 0), mean + (spread or 0)
                axes.axhspan(low, high, color="grey", alpha=0.3, label=f"ddpm, {steps} steps")
                axes.axhline(mean, color="grey", lw=0.8)
        real = statistics.fmean(values[measure] for values in floor)
        axes.axhline(real, color="black", ls="--", lw=1, label="training phantoms")
        axes.set_xscale("log")
        axes.set_xlabel("steps")
        axes.set_title(meaning, fontsize=9)
        axes.legend(fontsize=8)
    return png_of(figure)
