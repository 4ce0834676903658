"""Checks of values and of combinations of values; everything wrong is reported in one line."""

import re
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from common.errors import UserError
from config.schema.diffusion import (
    AutoencoderConfig,
    BiFlowNetConfig,
    GenerationConfig,
    GenerationMetricsConfig,
    LatentConfig,
    PreprocessConfig,
    ReconstructionConfig,
    ValidityConfig,
)

DEVICES = ("auto", "cpu", "cuda")
SAMPLING_STRATEGIES = ("ddpm", "ddim", "dpm++", "unipc")  # those of ddpm/samplers.py
FEATURE_NETWORKS = (  # those of evaluation/comparison/networks.py
    "medicalnet_resnet50",
    "imagenet_resnet50",
    "radimagenet_resnet50",
    "random_3d",
    "random_2d",
)
# BiFlowNet cuts latents into sub-volumes of this edge.
SUB_VOLUME = 8


def validate(cfg: DictConfig, schema: type) -> None:
    """Raises one UserError with every value of `cfg` that is out of range, separated by '; '."""
    rules = _RULES.get(schema)
    problems = list(rules(cfg)) if rules else []
    if problems:
        raise UserError("; ".join(problems))


# ---------------------------------------------------------------------------------------------- single values


def _check(cfg: DictConfig, names: str, holds: Callable[[Any], bool], expected: str) -> Iterator[str]:
    """A problem for each of the (space-separated) keys whose value is not null and does not hold."""
    for name in names.split():
        value = OmegaConf.select(cfg, name)
        if OmegaConf.is_list(value):
            value = OmegaConf.to_container(value)
        if value is not None and not holds(value):
            yield f"{name} must be {expected}, got {value!r}"


def _at_least(cfg: DictConfig, least: int, names: str) -> Iterator[str]:
    return _check(cfg, names, lambda value: value >= least, f"at least {least}")


def _not_negative(cfg: DictConfig, names: str) -> Iterator[str]:
    return _check(cfg, names, lambda value: 0 <= value < float("inf"), "at least 0")


def _positive(cfg: DictConfig, names: str) -> Iterator[str]:
    return _check(cfg, names, lambda value: 0 < value < float("inf"), "above 0")


def _fraction(cfg: DictConfig, names: str) -> Iterator[str]:
    return _check(cfg, names, lambda value: 0 <= value <= 1, "between 0 and 1")


def _decay(cfg: DictConfig, names: str) -> Iterator[str]:
    return _check(cfg, names, lambda value: 0 <= value < 1, "at least 0 and below 1")


def _one_of(cfg: DictConfig, names: str, allowed: Collection[Any]) -> Iterator[str]:
    return _check(cfg, names, lambda value: value in allowed, f"one of {' | '.join(map(str, allowed))}")


def _betas(cfg: DictConfig, names: str) -> Iterator[str]:
    fits = lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value)  # noqa: E731
    return _check(cfg, names, fits, "two numbers of at least 0 and below 1")


def _interval(cfg: DictConfig, names: str) -> Iterator[str]:
    fits = lambda value: len(value) == 2 and -float("inf") < value[0] < value[1] < float("inf")  # noqa: E731
    return _check(cfg, names, fits, "two numbers, the lower one first")


def _regular_expression(cfg: DictConfig, names: str) -> Iterator[str]:
    return _check(cfg, names, _is_regular_expression, "a regular expression that Python can read")


def _is_regular_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


# -------------------------------------------------------------------------------------------------- schemas


def _autoencoder(cfg: DictConfig) -> Iterator[str]:
    model, dataset = cfg.model, cfg.dataset
    yield from _at_least(
        cfg,
        1,
        "model.embedding_dim model.n_codes model.n_hiddens model.num_groups model.disc_channels model.disc_layers "
        "model.batch_size model.gpus model.checkpoint_every model.val_every model.log_every "
        "dataset.image_channels dataset.patch_size",
    )
    yield from _not_negative(
        cfg,
        "model.codebook_init_step model.discriminator_iter_start model.volume_gan_weight model.gan_feat_weight "
        "model.l1_weight model.perceptual_weight model.gradient_clip model.restart_thres model.num_workers "
        "model.log_volume_every model.seed model.lr_warmup dataset.split_seed",
    )
    yield from _at_least(cfg, -1, "model.max_steps model.max_epochs")
    yield from _positive(cfg, "model.lr dataset.cache_limit_gb")
    yield from _decay(cfg, "model.codebook_decay dataset.val_fraction")
    yield from _fraction(cfg, "dataset.background_keep")
    yield from _betas(cfg, "model.adam_betas")
    yield from _interval(cfg, "dataset.intensity_range")
    yield from _regular_expression(cfg, "dataset.subject_pattern")
    yield from _one_of(cfg, "model.stage", (1, 2))
    yield from _one_of(cfg, "model.precision", ("32", "bf16", "16"))
    yield from _one_of(cfg, "model.norm_type", ("group", "batch"))
    yield from _one_of(cfg, "model.disc_loss_type", ("hinge", "vanilla"))
    yield from _one_of(cfg, "model.lr_schedule", ("constant", "cosine"))
    yield from _one_of(cfg, "model.accelerator", ("auto", "cpu", "gpu"))
    yield from _one_of(cfg, "dataset.cache", ("int16", "float32", "none"))
    expected = "three equal powers of two above 1, e.g. [8,8,8]"
    fits = list(_check(cfg, "model.downsample", _is_downsample, expected))
    yield from fits
    if not fits and dataset.patch_size % model.downsample[0]:
        factor = model.downsample[0]
        yield f"dataset.patch_size must be a multiple of model.downsample {factor}, got {dataset.patch_size}"
    if model.lr_schedule == "cosine" and model.max_steps < 1:
        yield f"model.max_steps must be at least 1 with lr_schedule cosine, got {model.max_steps}"
    if model.gradient_checkpointing and model.norm_type == "batch":
        yield "model.gradient_checkpointing needs model.norm_type group: batch norms would count each batch twice"
    if model.norm_type == "group" and model.num_groups > 0 and model.n_hiddens % model.num_groups:
        yield f"model.num_groups must divide model.n_hiddens {model.n_hiddens}, got {model.num_groups}"


def _is_downsample(value: list[int]) -> bool:
    return len(value) == 3 and len(set(value)) == 1 and value[0] > 1 and value[0] & (value[0] - 1) == 0


def _latents(cfg: DictConfig) -> Iterator[str]:
    yield from _at_least(cfg, 1, "batch_size sliding_window")
    yield from _not_negative(cfg, "num_workers")
    yield from _interval(cfg, "intensity_range")
    yield from _one_of(cfg, "device", DEVICES)


def _diffusion_model(cfg: DictConfig) -> Iterator[str]:
    """The keys that training and generation share."""
    yield from _at_least(
        cfg,
        1,
        "volume_channels model_dim num_dit num_classes timesteps batch_size resnet_groups dit_num_heads attn_heads "
        "vq_size",
    )
    yield from _one_of(cfg, "loss_type", ("l1", "l2"))
    yield from _one_of(cfg, "device", DEVICES)
    divides = lambda value: value > 0 and SUB_VOLUME % value == 0  # noqa: E731
    yield from _check(cfg, "patch_size", divides, f"a divisor of the sub-volume edge {SUB_VOLUME}")
    positive_list = lambda value: len(value) > 0 and all(item > 0 for item in value)  # noqa: E731
    yield from _check(cfg, "dim_mults", positive_list, "one positive whole number per level")
    yield from _check(cfg, "use_attn", lambda value: set(value) <= {0, 1}, "0 or 1 per level")
    if len(cfg.dim_mults) != len(cfg.use_attn):
        yield f"use_attn must have one entry per level of dim_mults {list(cfg.dim_mults)}, got {list(cfg.use_attn)}"


def _biflownet(cfg: DictConfig) -> Iterator[str]:
    yield from _diffusion_model(cfg)
    yield from _at_least(cfg, 1, "epochs max_steps ema_every log_every ckpt_every preview_steps")
    yield from _not_negative(cfg, "lr_warmup grad_clip ema_start global_seed num_workers keep_checkpoints")
    yield from _positive(cfg, "lr cache_limit_gb")
    yield from _one_of(cfg, "cache", ("float32", "none"))
    yield from _decay(cfg, "ema_decay label_dropout")
    yield from _betas(cfg, "adam_betas")
    yield from _one_of(cfg, "lr_schedule", ("constant", "cosine"))
    yield from _one_of(cfg, "amp_dtype", ("fp16", "bf16"))
    yield from _check(cfg, "resolution", _is_grid, f"three positive multiples of {SUB_VOLUME}")
    if cfg.preview_steps > cfg.timesteps:
        yield f"preview_steps must be at most timesteps {cfg.timesteps}, got {cfg.preview_steps}"


def _generation(cfg: DictConfig) -> Iterator[str]:
    yield from _diffusion_model(cfg)
    yield from _at_least(cfg, 1, "ddim_steps num_samples max_single_pass tile")
    yield from _not_negative(cfg, "seed guidance_scale")
    yield from _fraction(cfg, "eta")
    yield from _one_of(cfg, "sampling_strategy", SAMPLING_STRATEGIES)
    yield from _one_of(cfg, "downsample", (8, 4))
    yield from _one_of(cfg, "output_dtype", ("float32", "int16"))
    yield from _one_of(cfg, "decoding", ("exact", "blended", "tiles"))
    yield from _one_of(cfg, "precision", ("32", "bf16", "16"))
    yield from _positive(cfg, "max_memory")
    yield from _check(cfg, "resolution", _is_positive_triple, "three whole numbers above 0, z y x in voxels")
    yield from _check(cfg, "spacing", _is_positive_triple, "three numbers above 0, x y z in mm")
    if cfg.sampling_strategy != "ddpm" and cfg.ddim_steps > cfg.timesteps:
        yield f"ddim_steps must be at most timesteps {cfg.timesteps}, got {cfg.ddim_steps}"
    if cfg.sampling_strategy in ("dpm++", "unipc") and find_spec("diffusers") is None:
        yield (
            f"sampling_strategy {cfg.sampling_strategy} needs the package diffusers: pip install -r requirements.txt, "
            "or choose ddpm or ddim"
        )
    yield from _classes(cfg, cfg.num_classes)


def _preprocess(cfg: DictConfig) -> Iterator[str]:
    yield from _at_least(cfg, 1, "multiple")
    yield from _not_negative(cfg, "num_workers class_id")
    yield from _one_of(cfg, "modality", ("CT", "MR"))
    yield from _one_of(cfg, "interpolation", ("linear", "bspline"))
    yield from _one_of(cfg, "downsample", (8, 4))
    yield from _check(cfg, "spacing", _is_positive_triple, "three numbers above 0, x y z in mm")
    yield from _check(cfg, "size", _is_positive_triple, "three numbers above 0, x y z in voxels")
    yield from _interval(cfg, "window percentiles")
    yield from _check(cfg, "percentiles", lambda value: 0 <= min(value) and max(value) <= 100, "between 0 and 100")
    yield from _check(cfg, "name", _is_file_name, "a name that a folder can have, of at most 150 bytes")
    is_free = lambda value: not value.endswith(("_latents", "_cache"))  # noqa: E731
    yield from _check(cfg, "name", is_free, "a name that doesn't end like a folder of latents or of the cache")
    is_orientation = lambda value: sorted(_SIDES.get(letter, letter) for letter in value) == [*"ARS"]  # noqa: E731
    yield from _check(cfg, "assume_orientation", is_orientation, "three letters, one each of L/R, P/A and I/S")
    yield from _regular_expression(cfg, "select")
    if cfg.window is not None and cfg.percentiles is not None:
        yield "window and percentiles exclude each other: give one of them"
    yield from _classes(cfg, None)


def _evaluation(cfg: DictConfig) -> Iterator[str]:
    yield from _at_least(cfg, 20, "num_resamples")
    yield from _not_negative(cfg, "num_workers seed num_pictures")
    yield from _interval(cfg, "real_range generated_range")
    yield from _one_of(cfg, "device", DEVICES)
    yield from _one_of(cfg, "lpips", ("auto", "on", "off"))
    yield from _positive(cfg, "max_memory")
    yield from _at_least(cfg, 1, "slices batch_size num_pairs neighbours num_halvings")
    is_choice = lambda value: value == ["auto"] or (value and set(value) <= set(FEATURE_NETWORKS))  # noqa: E731
    yield from _check(cfg, "networks", is_choice, f"auto, or some of {' '.join(FEATURE_NETWORKS)}")
    if OmegaConf.select(cfg, "resample") and cfg.ignore_spacing:
        yield "resample and ignore_spacing exclude each other: give one of them"


def _is_positive_triple(value: list[float]) -> bool:
    return len(value) == 3 and all(0 < item < float("inf") for item in value)


_SIDES = {"L": "R", "P": "A", "I": "S"}


def _is_file_name(value: str) -> bool:
    """Not too long either: sizes, numbers and endings come to it, and most file systems stop at 255 bytes."""
    return value not in ("", ".", "..") and not set(value) & set("/\\\0") and len(value.encode()) <= 150


def _classes(cfg: DictConfig, num_classes: int | None) -> Iterator[str]:
    """The class table; num_classes: ids have to be lower, None = any."""
    for index, row in enumerate(cfg.classes):
        yield from (f"classes[{index}]: {problem}" for problem in _class_row(row, num_classes))
    ids = [row.id for row in cfg.classes]
    if len(set(ids)) != len(ids):
        yield f"classes must have different ids, got {ids}"


def _class_row(row: DictConfig, num_classes: int | None) -> Iterator[str]:
    yield from _at_least(row, 0, "id")
    if num_classes is not None:
        yield from _check(row, "id", lambda value: value < num_classes, f"below num_classes {num_classes}")
    yield from _check(row, "name", _is_file_name, "a name that a file can have, of at most 150 bytes")
    yield from _one_of(row, "modality", ("CT", "MR"))
    are_grids = lambda value: len(value) > 0 and all(_is_grid(grid) for grid in value)  # noqa: E731
    yield from _check(row, "grids", are_grids, f"a list of grids, each three positive multiples of {SUB_VOLUME}")
    are_spacings = lambda value: all(len(item) == 3 and min(item) > 0 for item in value)  # noqa: E731
    yield from _check(row, "spacings_mm", are_spacings, "a list of spacings, each three numbers above 0")
    if len(row.grids) != len(row.spacings_mm):
        yield f"spacings_mm must have one entry per grid ({len(row.grids)}), got {len(row.spacings_mm)}"


def _is_grid(value: list[int]) -> bool:
    return len(value) == 3 and all(size > 0 and size % SUB_VOLUME == 0 for size in value)


_RULES: dict[type, Callable[[DictConfig], Iterator[str]]] = {
    AutoencoderConfig: _autoencoder,
    LatentConfig: _latents,
    BiFlowNetConfig: _biflownet,
    GenerationConfig: _generation,
    PreprocessConfig: _preprocess,
    ReconstructionConfig: _evaluation,
    GenerationMetricsConfig: _evaluation,
    ValidityConfig: _evaluation,
}
