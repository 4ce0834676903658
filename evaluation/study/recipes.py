"""The recipes of a study: what each variant trains and generates with, composed and checked before anything runs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from common.errors import UserError
from common.files import file_sha256, write_atomically
from common.hub import absolute_name
from config.loading import load_config
from config.schema.autoencoder import AutoencoderConfig
from config.schema.diffusion import BiFlowNetConfig, DiffusionModelConfig, GenerationConfig
from config.schema.option import FREE, options_of
from dataset.volumes.index import read_dataset_json

RUN_NAME = "run"  # folder of a training
TRAINING_SCRIPTS = {1: "train/train_PatchVolume.py", 2: "train/train_PatchVolume_stage2.py"}  # of the autoencoder
# Keys that the study sets: what is trained on, where it goes, how long, from which seed.
OWN_KEYS = {
    "diffusion": ("data_path", "AE_ckpt", "results_dir", "run_name", "global_seed", "epochs", "ckpt", "continue_from"),
    "autoencoder": (
        *("dataset.root_dir", "model.default_root_dir", "model.seed", "model.max_epochs"),
        *("model.resume_from_checkpoint", "model.continue_from"),
    ),
    "generation": (
        *("AE_ckpt", "model_ckpt", "output_dir", "seed", "seeds", "num_samples", "requests", "denormalize"),
        *(option.name for option in options_of(DiffusionModelConfig)),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """One variant: the overrides of both configurations, and where its runs lie."""

    study: DictConfig
    name: str
    training: tuple[str, ...]
    generation: tuple[str, ...]

    @property
    def is_diffusion(self) -> bool:
        return self.study.stage == "diffusion"

    def training_config(self, seed: int, steps: int, *more: str) -> DictConfig:
        """That of a run whose folder is still to be set. The variant's own steps win. UserError: a wrong override."""
        study = self.study
        data, autoencoder = (path and absolute_name(path) for path in (study.data, study.autoencoder))
        prefix = "" if self.is_diffusion else "model."
        overrides = [f"{prefix}max_steps={steps}", *self.training, *(f"{prefix}{override}" for override in more)]
        if self.is_diffusion:
            values = {"data_path": data, "AE_ckpt": autoencoder, "run_name": RUN_NAME, "preview": False}
            cfg = load_config(BiFlowNetConfig, study.base, overrides, {**values, "global_seed": seed})
            cfg.epochs = cfg.max_steps  # an epoch has a step at least: steps decide
            return cfg
        values = {"dataset.root_dir": data, "model.seed": seed, "model.max_epochs": -1}
        cfg = load_config(AutoencoderConfig, study.base, overrides, values)
        cfg.model.resume_from_checkpoint = autoencoder if cfg.model.stage == 2 else None
        return cfg

    def generation_config(self, seed: int, training: DictConfig) -> DictConfig:
        """That of a run's volumes, whose checkpoint and folder are still to be set. UserError: a wrong override."""
        study = self.study
        model = {option.name: training[option.name] for option in options_of(DiffusionModelConfig)}
        values = {**model, "AE_ckpt": absolute_name(study.autoencoder), "output_dir": RUN_NAME, "seed": seed}
        return load_config(
            GenerationConfig, study.generation, self.generation, {**values, "num_samples": study.num_samples}
        )

    def put_into(self, cfg: DictConfig, folder: Path) -> Path:
        """Sets where a training goes, and returns the folder that it will write into."""
        if self.is_diffusion:
            cfg.results_dir = str(folder)
            return folder / RUN_NAME
        cfg.model.default_root_dir = str(folder / RUN_NAME)
        return folder / RUN_NAME

    def steps_of(self, cfg: DictConfig) -> int:
        return cfg.max_steps if self.is_diffusion else cfg.model.max_steps

    def script_of(self, cfg: DictConfig) -> str:
        return "train/train_BiFlowNet_SingleRes.py" if self.is_diffusion else TRAINING_SCRIPTS[cfg.model.stage]


def read_recipes(study: DictConfig) -> list[Recipe]:
    """All variants of a study, in order. UserError: whatever is wrong with any of them, named by its variant."""
    recipes = [Recipe(study, row.name, tuple(row.training), tuple(row.generation)) for row in study.variants]
    for recipe in recipes:
        try:
            _check(recipe)
        except UserError as error:
            raise UserError(f"variant {recipe.name}: {error}") from error
    return recipes


def _check(recipe: Recipe) -> None:
    study = recipe.study
    stages = {study.stage: recipe.training, "generation": recipe.generation}
    for stage, overrides in stages.items():
        own = {override.lstrip("+").partition("=")[0] for override in overrides} & {*OWN_KEYS[stage]}
        if own:
            raise UserError(f"{', '.join(sorted(own))}: set by the study itself, no variant may")
    steps = "max_steps" if recipe.is_diffusion else "model.max_steps"
    if study.budget.seconds is not None and any(item.lstrip("+").startswith(f"{steps}=") for item in recipe.training):
        raise UserError(f"{steps}: found by the study from budget.seconds, no variant may set it")
    training = recipe.training_config(study.seeds[0], study.budget.steps or 1)
    if recipe.is_diffusion:
        recipe.generation_config(study.seeds[0], training)
    elif training.model.stage == 2 and study.autoencoder is None:
        raise UserError("autoencoder: required for stage 2, the checkpoint of stage 1 that it starts from")
    if recipe.steps_of(training) < 1:
        raise UserError(f"{steps} must be at least 1, got {recipe.steps_of(training)}")


def key_of(*parts: Any) -> str:
    """A short name of all that something depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def training_key(recipe: Recipe, cfg: DictConfig, data: str, of_speed: bool = False) -> str:
    """Of what the weights of a run depend on, wherever it lies; `of_speed`: what its speed depends on too.

    data: fingerprint of what it trains on.
    """
    schema = BiFlowNetConfig if recipe.is_diffusion else AutoencoderConfig
    free = {option.name for option in options_of(schema) if option.resume is FREE and not of_speed}
    autoencoder = recipe.study.autoencoder and file_sha256(recipe.study.autoencoder)
    seeds = {"global_seed", "model.seed"}
    left_out = free | {*OWN_KEYS[recipe.study.stage]} - seeds
    return key_of(recipe.name, _values(cfg, schema, left_out), data, recipe.study.processes, autoencoder)


def generation_key(cfg: DictConfig) -> str:
    """Of what generated volumes depend on besides the checkpoints."""
    return key_of(_values(cfg, GenerationConfig, {"AE_ckpt", "model_ckpt", "output_dir"}))


def _values(cfg: DictConfig, schema: type, left_out: set[str]) -> dict[str, Any]:
    plain = OmegaConf.create(OmegaConf.to_container(cfg))
    names = (option.name for option in options_of(schema) if option.name not in left_out)
    found = {name: OmegaConf.select(plain, name) for name in names}
    return {name: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for name, v in found.items()}


def data_fingerprint(path: str | Path) -> str:
    """Of a dataset JSON's files by name and size: reading terabytes for a hash would take longer than many a run."""
    found = read_dataset_json(path)
    return key_of({name: [(file.name, file.stat().st_size) for file in files] for name, files in found.items()})


def save_recipe(cfg: DictConfig, path: Path) -> Path:
    """The composed configuration as a file that a script takes."""
    write_atomically(path, OmegaConf.to_yaml(cfg, resolve=True).encode())
    return path
