"""Where a run of the autoencoder goes on from: its own newest checkpoint, or the one that the configuration names."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from AutoEncoder.checkpoint import load_autoencoder_weights
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_files import newest_checkpoint
from common.errors import UserError
from config.schema.autoencoder import AutoencoderConfig
from config.schema.option import EXTENDS, FREE, keys_of

# What may differ when a run goes on: how long, where and how fast it runs, how it reads its data, how often it reports.
CHANGEABLE = keys_of(AutoencoderConfig, FREE, EXTENDS)


def load_weights(cfg: DictConfig, model: patchvolumeAE, root: Path, logger: logging.Logger) -> tuple[Path | None, int]:
    """Load the weights that training starts from; the checkpoint that it resumes from, if any, and its optimiser step.

    That is the run's own newest checkpoint, or in stage 1 `resume_from_checkpoint`. Stage 2 begins with its weights.
    """
    own = _own_checkpoint(root / "checkpoints")
    if own is not None:
        _check_same_run(cfg, root, logger)
        return own, _global_step(own, load_autoencoder_weights(model, own))
    if cfg.model.resume_from_checkpoint is None:
        return None, 0
    source = Path(cfg.model.resume_from_checkpoint)
    checkpoint = load_autoencoder_weights(model, source)
    if cfg.model.stage == 1 and _can_resume(model, source, checkpoint, logger):
        return source, _global_step(source, checkpoint)
    if cfg.model.stage == 2 and not model.codebook.initialised:
        raise UserError(f"{source}: its codebook was never started from data: train stage 1 for longer")
    return None, 0


def _own_checkpoint(checkpoints: Path) -> Path | None:
    """The run's newest readable checkpoint; None in a new run. UserError where none can be read, but there are some."""
    if not checkpoints.is_dir():
        return None
    newest = newest_checkpoint(checkpoints)
    if newest is None and any(checkpoints.glob("*.ckpt")):  # starting anew would overwrite them
        raise UserError(f"{checkpoints}: none of its checkpoints can be read: move the folder away to start anew")
    return newest


def _can_resume(model: patchvolumeAE, path: Path, checkpoint: Mapping[str, Any], logger: logging.Logger) -> bool:
    """Whether a stage-1 checkpoint's optimisers fit ours; if not, training starts from its weights, with a warning."""
    problem = None
    if not {"pytorch-lightning_version", "global_step", "loops", "optimizer_states"} <= checkpoint.keys():
        problem = "it holds weights only"
    else:
        saved = [state["state"] for state in checkpoint["optimizer_states"]]
        own = [optimizer.param_groups[0]["params"] for optimizer in model.configure_optimizers()]
        if len(saved) != len(own) or not all(map(_moments_fit, saved, own)):
            problem = "its optimisers are those of other parameters"
    if problem is None:
        return True
    logger.warning("%s: %s: training starts from its weights at step 0, with new optimisers", path, problem)
    return False


def _moments_fit(saved: dict, parameters: list) -> bool:
    """Whether Adam's averages, numbered by position, have the parameters' shapes; an unused optimiser has none."""
    if not saved:
        return True
    shapes = {index: tuple(parameter.shape) for index, parameter in enumerate(parameters)}
    return {index: tuple(state["exp_avg"].shape) for index, state in saved.items()} == shapes


def _check_same_run(cfg: DictConfig, root: Path, logger: logging.Logger) -> None:
    """A run goes on only with the options that it began with; `CHANGEABLE` ones aside."""
    if not (root / "config.yaml").is_file():
        return
    before = OmegaConf.load(root / "config.yaml")
    before = {table: {**OmegaConf.structured(AutoencoderConfig)[table], **before[table]} for table in cfg}  # new keys
    changed = [
        f"{table}.{key} ({before[table][key]} -> {value})"
        for table in cfg
        for key, value in cfg[table].items()
        if f"{table}.{key}" not in CHANGEABLE and before[table][key] != value
    ]
    if changed:
        raise UserError(
            f"{root} holds a run with other options: {', '.join(changed)}; "
            "name another model.default_root_dir or take these back"
        )
    if before["model"]["gpus"] != cfg.model.gpus:
        logger.warning(
            "%s: model.gpus was %s and is %s: a step has another number of samples, so the order of the data changes",
            *(root, before["model"]["gpus"], cfg.model.gpus),
        )
    if cfg.model.lr_schedule == "cosine" and before["model"]["max_steps"] != cfg.model.max_steps:
        logger.warning("%s: model.max_steps was %s: the cosine has another length", root, before["model"]["max_steps"])


def _global_step(path: Path, checkpoint: Mapping[str, Any]) -> int:
    """The optimiser step that a checkpoint was saved at."""
    step = checkpoint.get("global_step")
    if not isinstance(step, int):
        raise UserError(f"{path}: no Lightning checkpoint of a training run (it has no global_step)")
    return step
