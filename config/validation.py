"""Checks of values, by the rules of the schema's rows, and of combinations of values, by the rules here.

Everything wrong with a config is reported in one line.
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib.util import find_spec
from typing import get_args

from omegaconf import DictConfig, OmegaConf

from common.errors import UserError
from config.schema.autoencoder import AutoencoderConfig, downsampling
from config.schema.control import ControlledGenerationConfig, ControlNetConfig
from config.schema.data import PreprocessConfig
from config.schema.diffusion import FLOW_STRATEGIES, BiFlowNetConfig, BiFlowNetMultiresConfig, GenerationConfig
from config.schema.evaluation import GenerationMetricsConfig, RecipeStudyConfig, fewest_volumes
from config.schema.option import options_of


def validate(cfg: DictConfig, schema: type) -> None:
    """Raises one UserError with every value of `cfg` that is out of range, separated by '; '."""
    problems = list(_single_values(cfg, schema))
    problems += _BETWEEN_KEYS[schema](cfg) if schema in _BETWEEN_KEYS else ()
    if problems:
        raise UserError("; ".join(problems))


def _single_values(cfg: DictConfig, schema: type) -> Iterator[str]:
    for option in options_of(schema):
        value = OmegaConf.select(cfg, option.name)
        if row_type := next(filter(is_dataclass, get_args(option.hint)), None):
            for index, row in enumerate(value):
                yield from (f"{option.name}[{index}]: {problem}" for problem in _single_values(row, row_type))
        elif problem := option.problem(OmegaConf.to_container(value) if OmegaConf.is_list(value) else value):
            yield problem


# --------------------------------------------------------------------------------------------- between keys


def _autoencoder(cfg: DictConfig) -> Iterator[str]:
    model, dataset = cfg.model, cfg.dataset
    if downsampling.holds(model.downsample) and dataset.patch_size % model.downsample[0]:
        factor = model.downsample[0]
        yield f"dataset.patch_size must be a multiple of model.downsample {factor}, got {dataset.patch_size}"
    if model.lr_schedule == "cosine" and model.max_steps < 1:
        yield f"model.max_steps must be at least 1 with lr_schedule cosine, got {model.max_steps}"
    if model.gradient_checkpointing and model.norm_type == "batch":
        yield "model.gradient_checkpointing needs model.norm_type group: batch norms would count each batch twice"
    if model.norm_type == "group" and model.num_groups > 0 and model.n_hiddens % model.num_groups:
        yield f"model.num_groups must divide model.n_hiddens {model.n_hiddens}, got {model.num_groups}"


def _levels(cfg: DictConfig) -> Iterator[str]:
    if len(cfg.dim_mults) != len(cfg.use_attn):
        yield f"use_attn must have one entry per level of dim_mults {list(cfg.dim_mults)}, got {list(cfg.use_attn)}"


def _process(cfg: DictConfig) -> Iterator[str]:
    """Options of a diffusion that a flow has not."""
    without = {"prediction": "noise", "loss_weighting": "none"}
    for name, value in without.items():
        if cfg.process == "flow" and cfg.get(name) not in (None, value):
            yield f"{name} {cfg[name]} has no meaning with process flow, which predicts the velocity: leave it out"


def _attributes(cfg: DictConfig) -> Iterator[str]:
    names = [row.name for row in cfg.attributes]
    if "" in names or len(set(names)) < len(names):
        yield f"attributes must have different names, got {names}"
    for index, row in enumerate(cfg.attributes):
        if (row.range is None) == (len(row.categories) == 0):
            yield f"attributes[{index}]: {row.name} needs either a range or categories"
        if row.categories and len(set(row.categories)) < max(2, len(row.categories)):
            yield f"attributes[{index}]: categories must be two or more different ones, got {list(row.categories)}"


def _beginning(cfg: DictConfig) -> Iterator[str]:
    """Options of fine-tuning, each with what it needs."""
    if cfg.init_from and cfg.ckpt:
        yield "init_from and ckpt exclude each other: init_from begins anew with its weights, ckpt goes on exactly"
    needs_weights = {
        "class_map": bool(cfg.class_map), f"trainable {cfg.trainable}": cfg.trainable != "all",
        "replay.samples": cfg.replay.samples > 0,
    }  # fmt: skip
    for name in (name for name, is_set in needs_weights.items() if is_set and not cfg.init_from):
        yield f"{name} needs init_from, the checkpoint to begin with"
    if cfg.replay.samples and cfg.replay.data_path:
        yield "replay.data_path and replay.samples exclude each other: give one of them"
    rows = {option.name: option.default for option in options_of(BiFlowNetConfig)}
    for name in ("lora_rank", "lora_alpha", "lora_blocks"):
        if cfg.trainable != "lora" and cfg[name] != rows[name]:
            yield f"{name} has no meaning with trainable {cfg.trainable}: leave it out"


def _biflownet(cfg: DictConfig) -> Iterator[str]:
    yield from _latent_training(cfg)
    yield from _beginning(cfg)


def _latent_training(cfg: DictConfig) -> Iterator[str]:
    yield from _attributes(cfg)
    if cfg.class_weights and len(cfg.class_weights) != cfg.num_classes:
        yield f"class_weights must be one for each of {cfg.num_classes} classes, got {list(cfg.class_weights)}"
    grids = [tuple(row.grid) for row in cfg.get("buckets", [])]
    if len(set(grids)) < len(grids):
        yield f"buckets must have different grids, got {grids}"
    yield from _levels(cfg)
    yield from _process(cfg)
    if cfg.preview_steps > cfg.timesteps:
        yield f"preview_steps must be at most timesteps {cfg.timesteps}, got {cfg.preview_steps}"


def _generation(cfg: DictConfig) -> Iterator[str]:
    yield from _sampling(cfg)
    for index, row in enumerate(cfg.classes):
        if row.id >= cfg.num_classes:
            yield f"classes[{index}]: id must be below num_classes {cfg.num_classes}, got {row.id}"
    yield from _classes(cfg)


def _sampling(cfg: DictConfig) -> Iterator[str]:
    yield from _levels(cfg)
    yield from _process(cfg)
    if cfg.sampling_strategy in FLOW_STRATEGIES and cfg.eta != 0:
        yield f"eta must be 0 with sampling_strategy {cfg.sampling_strategy}, which draws no noise, got {cfg.eta}"
    if cfg.sampling_strategy not in ("ddpm", *FLOW_STRATEGIES) and cfg.ddim_steps > cfg.timesteps:
        yield f"ddim_steps must be at most timesteps {cfg.timesteps}, got {cfg.ddim_steps}"
    if cfg.sampling_strategy in ("dpm++", "unipc") and find_spec("diffusers") is None:
        yield (
            f"sampling_strategy {cfg.sampling_strategy} needs the package diffusers: pip install -r requirements.txt, "
            "or choose ddpm or ddim"
        )


def _controlled_generation(cfg: DictConfig) -> Iterator[str]:
    yield from _sampling(cfg)
    steps = cfg.timesteps if cfg.sampling_strategy == "ddpm" else cfg.ddim_steps
    if cfg.consistency_steps and not cfg.data_consistency:
        yield f"consistency_steps {cfg.consistency_steps} needs data_consistency: give it too, or leave both out"
    if cfg.consistency_steps > steps:
        yield f"consistency_steps must be at most the {steps} sampling steps, got {cfg.consistency_steps}"


def _preprocess(cfg: DictConfig) -> Iterator[str]:
    if cfg.window is not None and cfg.percentiles is not None:
        yield "window and percentiles exclude each other: give one of them"
    yield from _classes(cfg)
    names = [row.name for row in cfg.classes]
    if len(set(names)) < len(names):  # each is a folder
        yield f"classes must have different names, got {names}"


def _classes(cfg: DictConfig) -> Iterator[str]:
    for index, row in enumerate(cfg.classes):
        if len(row.grids) != len(row.spacings_mm):
            found = len(row.spacings_mm)
            yield f"classes[{index}]: spacings_mm must have one entry per grid ({len(row.grids)}), got {found}"
    ids = [row.id for row in cfg.classes]
    if len(set(ids)) != len(ids):
        yield f"classes must have different ids, got {ids}"


def _generation_metrics(cfg: DictConfig) -> Iterator[str]:
    if cfg.resample and cfg.ignore_spacing:
        yield "resample and ignore_spacing exclude each other: give one of them"


def _recipe_study(cfg: DictConfig) -> Iterator[str]:
    if cfg.base is None:  # no study yet: the script says what it needs
        return
    names = [row.name for row in cfg.variants]
    if len(names) < 2 or "" in names or len({name.casefold() for name in names}) < len(names):
        yield f"variants must be two or more with different names, the first as the baseline, got {names}"
    if (cfg.budget.steps is None) == (cfg.budget.seconds is None):
        yield "budget must have either steps or seconds"
    if cfg.stage == "autoencoder":
        if cfg.generation is not None or any(row.generation for row in cfg.variants):
            yield "generation is for stage diffusion: an autoencoder is judged by its reconstructions"
    elif cfg.num_samples < (least := fewest_volumes(cfg.neighbours)):
        yield f"num_samples must be at least {least} with neighbours {cfg.neighbours}, got {cfg.num_samples}"


def _multires(cfg: DictConfig) -> Iterator[str]:
    yield from _biflownet(cfg)
    yield from _several_sizes(cfg)


def _controlnet(cfg: DictConfig) -> Iterator[str]:
    yield from _latent_training(cfg)
    yield from _several_sizes(cfg)
    names = [row.name for row in cfg.hints]
    if cfg.base_ckpt and (not names or "" in names or len(set(names)) < len(names)):
        yield f"hints must be one or more with different names, got {names}"
    for index, row in enumerate(cfg.hints):
        if (row.kind == "mask") == (len(row.labels) == 0):
            yield f"hints[{index}]: a mask needs labels, and nothing else has them"
        if row.labels and (min(row.labels.values()) < 1 or len(set(row.labels.values())) < len(row.labels)):
            yield f"hints[{index}]: labels must be different whole numbers from 1 on, got {dict(row.labels)}"
        if (row.kind != "mask" and row.bits) or (row.kind != "latent" and row.channels is not None):
            yield f"hints[{index}]: bits are of a mask, channels of a latent"


def _several_sizes(cfg: DictConfig) -> Iterator[str]:
    if cfg.buckets and cfg.batch_size is not None:
        yield f"batch_size {cfg.batch_size} and buckets exclude each other: change its rows, or say buckets=[]"
    if cfg.bucket_order == "turns" and cfg.bucket_temperature != 1:
        yield f"bucket_temperature must be 1 with bucket_order turns, got {cfg.bucket_temperature}"


_BETWEEN_KEYS: dict[type, Callable[[DictConfig], Iterator[str]]] = {
    AutoencoderConfig: _autoencoder,
    BiFlowNetConfig: _biflownet,
    BiFlowNetMultiresConfig: _multires,
    ControlNetConfig: _controlnet,
    GenerationConfig: _generation,
    ControlledGenerationConfig: _controlled_generation,
    PreprocessConfig: _preprocess,
    GenerationMetricsConfig: _generation_metrics,
    RecipeStudyConfig: _recipe_study,
}
