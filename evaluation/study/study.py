"""A study: every variant with every seed, trained and judged once, whenever the command is given; results on the way.

OUT/study.json              speeds, references and one line a run; what is there is not done again
OUT/study.md, *.png         tables and pictures of what is there so far (evaluation/study/report.py)
OUT/runs/NAME/seed_S-KEY    a training, by all that its weights depend on; in it what is generated
OUT/cache                   features and measurements of volumes
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.child import exit_at_sigterm
from common.documents import read_json
from common.errors import UserError
from common.files import file_sha256, lock_folder, write_atomically
from common.log import get_logger
from common.places import exists
from common.processes import PATIENCE, joined
from evaluation.study import running
from evaluation.study.generated import GeneratedJudge
from evaluation.study.recipes import Recipe, data_fingerprint, generation_key, key_of, read_recipes, training_key
from evaluation.study.reconstructed import ReconstructedJudge
from evaluation.study.report import Result, write_report
from evaluation.study.running import RunFailed
from evaluation.study.statistics import to_figures, to_record

SCHEMA = "3d-meddiffusion/recipe-study/1"

Judge = GeneratedJudge | ReconstructedJudge
Record = dict[str, Any]  # as JSON holds it


def run_study(cfg: DictConfig) -> None:
    """Do the runs of a `RecipeStudyConfig` that are not there yet; write results, table and pictures after each.

    Raises UserError: before anything is trained for whatever is wrong with the study, its variants and files; later
    where a script ends by something else than a mistake of its variant, or another process is on the same study.
    """
    with ExitStack() as closing:
        place = closing.enter_context(joined(cfg.device, PATIENCE, "exact"))
        recipes = read_recipes(cfg)
        judge: Judge = GeneratedJudge(cfg, place) if cfg.stage == "diffusion" else ReconstructedJudge(cfg, place)
        for recipe in recipes if cfg.stage == "diffusion" else ():
            judge.check_requests(recipe.generation_config(cfg.seeds[0], recipe.training_config(cfg.seeds[0], 1)))
        output = Path(cfg.output_dir).absolute()
        output.mkdir(parents=True, exist_ok=True)
        closing.enter_context(lock_folder(output, "working on a study"))
        closing.enter_context(exit_at_sigterm())
        study = Study(cfg, recipes, judge, output)
        study.add_references()
        study.add_speeds()
        planned = study.plan()
        study.write(planned)
        for number, run in enumerate(planned, start=1):
            if run.key not in study.runs:
                get_logger().info("[%d of %d] %s, seed %d", number, len(planned), run.recipe.name, run.seed)
                study.runs[run.key] = study.measure(run)
                study.write(planned)
        get_logger().info("%s", output / "study.md")


@dataclass(frozen=True)
class Run:
    """A variant with a seed.

    key: of all that its figures depend on. folder: of its training. generated: of its volumes. reason: why it can't be
    trained at all.
    """

    recipe: Recipe
    seed: int
    key: str
    folder: Path
    generated: Path
    cfg: DictConfig
    reason: str = ""


class Study:
    """What is there of a study in `output`, and how more comes to it."""

    def __init__(self, cfg: DictConfig, recipes: list[Recipe], judge: Judge, output: Path) -> None:
        self.cfg, self.recipes, self.judge, self.output = cfg, recipes, judge, output
        self.data = data_fingerprint(cfg.data)
        self.judging = key_of(judge.settings, cfg.autoencoder and file_sha256(cfg.autoencoder))
        found = read_study(output / "study.json")
        self.runs: dict[str, Record] = {run["key"]: run for run in found["runs"]}
        self.speeds: dict[str, Any] = found["speeds"]  # key -> steps a second, or why there are none
        self.references: dict[str, Record] = found["references"]  # key -> floor and ceiling, figures for each seed
        self.reference_key = key_of(self.judging, list(cfg.seeds))

    def add_references(self) -> None:
        """Floor and ceiling of generated volumes; reconstructions are compared with their own volumes."""
        if self.cfg.stage == "diffusion" and self.reference_key not in self.references:
            get_logger().info("floor and ceiling: training volumes, and their reconstructions")
            found = self.judge.of_references(self.output / "ceiling")
            self.references[self.reference_key] = {
                name: [to_record(figures) for figures in of_seeds] for name, of_seeds in found.items()
            }

    def add_speeds(self) -> None:
        """With a budget in seconds, the steps a second of all variants that have none yet."""
        if self.cfg.budget.seconds is None:
            return
        keys = {recipe.name: self._speed_key(recipe) for recipe in self.recipes}
        missing = {recipe.name: recipe for recipe in self.recipes if keys[recipe.name] not in self.speeds}
        if missing:
            found = running.measure_speeds(missing, self.output / "speed")
            self.speeds |= {keys[name]: speeds for name, speeds in found.items()}

    def plan(self) -> list[Run]:
        """All runs, seed by seed: variants have as many runs, and what slows the machine for a while hits all."""
        return [self._planned(recipe, seed) for seed in self.cfg.seeds for recipe in self.recipes]

    def measure(self, run: Run) -> Record:
        """Train, generate and judge. A variant's mistake, such as a loss that is not finite, is a result too."""
        recipe, cfg = run.recipe, run.cfg
        steps = recipe.steps_of(cfg)
        record = {"key": run.key, "variant": recipe.name, "seed": run.seed, "steps": steps}
        record["folder"] = str(run.folder.relative_to(self.output))
        try:
            if run.reason:
                raise RunFailed(run.reason)
            folder, judged = running.train(recipe, cfg, run.folder)
            record["seconds"] = running.training_seconds(folder, steps)
            if recipe.is_diffusion:
                judged = running.generate(recipe, run.seed, cfg, judged, run.generated)
            figures = to_record(self.judge.of_run(judged))
        except RunFailed as failure:
            get_logger().warning("%s, seed %d failed: %s", recipe.name, run.seed, failure)
            return {**record, "status": "failed", "reason": str(failure)}
        judged = str(judged.relative_to(self.output))
        return {**record, "status": "done", "judged": judged, "figures": figures}

    def write(self, planned: list[Run]) -> None:
        """study.json of all that was ever done here; table and pictures of the study as it is now."""
        parts = {"schema": SCHEMA, "speeds": self.speeds, "references": self.references}
        lines = ",\n".join(json.dumps(run) for run in self.runs.values())
        text = f'{json.dumps(parts)[:-1]}, "runs": [\n{lines}\n]}}\n'
        write_atomically(self.output / "study.json", text.encode())
        results = [Result(run.recipe.name, run.seed, self.runs.get(run.key)) for run in planned]
        references = {
            name: [to_figures(figures) for figures in of_seeds]
            for name, of_seeds in self.references.get(self.reference_key, {}).items()
        }
        write_report(self.output, self.cfg, self.judge, results, references)

    def _planned(self, recipe: Recipe, seed: int) -> Run:
        budget, speeds = self.cfg.budget, None
        if budget.seconds is not None:
            speeds = self.speeds[self._speed_key(recipe)]
        reason = speeds if isinstance(speeds, str) else ""
        steps = budget.steps if speeds is None else 1 if reason else running.steps_for(budget.seconds, speeds)
        cfg = recipe.training_config(seed, steps)
        trained = training_key(recipe, cfg, self.data)
        generation = generation_key(recipe.generation_config(seed, cfg)) if recipe.is_diffusion else ""
        folder = self.output / "runs" / recipe.name / f"seed_{seed}-{trained}"
        key = key_of(trained, generation, self.judging)
        return Run(recipe, seed, key, folder, folder / f"generated-{generation}", cfg, reason)

    def _speed_key(self, recipe: Recipe) -> str:
        return training_key(recipe, recipe.training_config(0, self.cfg.budget.warm_up), self.data, of_speed=True)


def read_study(path: Path) -> Record:
    """A study.json, an empty one where there is none. UserError: not a study's."""
    if not exists(path):
        return {"runs": [], "speeds": {}, "references": {}}
    try:
        content = read_json(path)
        if content["schema"] != SCHEMA:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of this script: remove it or choose another --output-dir") from error
    return content
