"""Runs the real scripts for a study: short trainings that are timed, trainings, generation."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from omegaconf import DictConfig

from common.checkpoint_files import newest_checkpoint
from common.child import LAUNCHER, ROOT, run_child
from common.documents import json_lines
from common.errors import UserError
from common.files import lock_folder
from common.log import get_logger
from common.script import MISTAKE
from evaluation.study.recipes import Recipe, save_recipe

ROUNDS = 3  # of short trainings, one of each variant in each round
GENERATION_SCRIPT = "evaluation/class_conditional_generation.py"
OUTPUT = "output.txt"  # what the scripts of a run say


class RunFailed(Exception):
    """A script refused or ended its work as a user's mistake, such as a loss that is not finite; the text says why."""


def train(recipe: Recipe, cfg: DictConfig, folder: Path) -> tuple[Path, Path]:
    """The folder of a training in `folder`, which goes on where it stopped, and its last checkpoint.

    RunFailed: it ended with a mistake. UserError: it ended otherwise, or another process trains there.
    """
    run = recipe.put_into(cfg, folder)
    if run.is_dir():
        with lock_folder(run, "training"):  # of a study that was killed, its training may be there still
            pass
    folder.mkdir(parents=True, exist_ok=True)
    config = save_recipe(cfg, folder / "training.yaml")
    processes = recipe.study.processes
    script = [recipe.script_of(cfg), "--config", str(config)]
    if processes > 1:
        script = [LAUNCHER, "--standalone", "--nproc-per-node", f"{processes}", str(ROOT / script[0]), *script[1:]]
    _run(script, folder, processes)
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = newest_checkpoint(run / "checkpoints") if recipe.is_diffusion else last
    if checkpoint is None or not checkpoint.is_file():
        raise UserError(f"{run}: the training left no checkpoint, see {folder / OUTPUT}")
    return run, checkpoint


def generate(recipe: Recipe, seed: int, training: DictConfig, checkpoint: Path, output: Path) -> Path:
    """The folder of the volumes that a checkpoint generates, in `output`; those that are there stay. As `train`."""
    cfg = recipe.generation_config(seed, training)
    cfg.model_ckpt, cfg.output_dir = str(checkpoint), str(output)
    output.mkdir(parents=True, exist_ok=True)
    _run([GENERATION_SCRIPT, "--config", str(save_recipe(cfg, output / "generation.yaml"))], output, 1)
    return output / f"seed_{seed}"


def _run(command: Sequence[str], folder: Path, processes: int) -> None:
    output = folder / OUTPUT
    status = run_child(command, processes, output)
    if status == MISTAKE:
        raise RunFailed(_last_error(output))
    if status:
        raise UserError(f"{command[0]} ended with exit status {status}, see {output}; the same command goes on")


def _last_error(output: Path) -> str:
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "no reason")


# ---------------------------------------------------------------------------------------------------------------- time


def measure_speeds(recipes: Mapping[str, Recipe], folder: Path) -> dict[str, list[float] | str]:
    """Steps a second of each recipe by its name, one value a round, or why it can't be trained.

    In each round all are trained for a few steps, so that what slows the machine for a while hits all of them. Timed
    is the second half, by the training's own clock, without starting and the first batches.
    """
    found: dict[str, list[float] | str] = {name: [] for name in recipes}
    for number in range(ROUNDS):
        for name, recipe in recipes.items():
            if isinstance(found[name], str):
                continue
            get_logger().info("speed of %s, round %d of %d", name, number + 1, ROUNDS)
            shutil.rmtree(folder, ignore_errors=True)
            steps = recipe.study.budget.warm_up
            cfg = recipe.training_config(0, steps, f"log_every={steps // 2}")
            try:
                run, _ = train(recipe, cfg, folder)
            except RunFailed as failure:
                found[name] = str(failure)
                continue
            intervals = logged_intervals(run)
            if not intervals:
                raise UserError(f"{folder}: a training of {steps} steps logged no speed: raise budget.warm_up")
            found[name].append(intervals[-1][1])
    shutil.rmtree(folder, ignore_errors=True)
    return found


def steps_for(seconds: float, speeds: Sequence[float]) -> int:
    return max(1, round(seconds * median(speeds)))


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a training's metrics.jsonl; names without "train/" in front."""
    path = run / "metrics.jsonl"
    try:
        lines = [line for _, line in json_lines(path)] if path.is_file() else []
        return [{name.removeprefix("train/"): value for name, value in line.items()} for line in lines]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not the numbers of a run ({error}): move its folder away, it is trained anew"
        ) from error


def logged_intervals(run: Path) -> list[tuple[int, float]]:
    """(steps, steps a second) of the intervals between logged steps."""
    speeds = [(line["step"], line["steps_per_s"]) for line in read_metrics(run) if line.get("steps_per_s")]
    before = [0, *(step for step, _ in speeds)]
    return [(step - last, speed) for last, (step, speed) in zip(before, speeds, strict=False)]


def training_seconds(run: Path, steps: int) -> float | None:
    """By the training's own clock; steps after the last logged one as fast as the others. None: nothing was logged."""
    intervals = logged_intervals(run)
    logged = sum(count for count, _ in intervals)
    return sum(count / speed for count, speed in intervals) * steps / logged if logged else None
