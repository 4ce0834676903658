"""Where a run of the autoencoder goes on from: its own newest checkpoint, or the one that the configuration names."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from AutoEncoder.checkpoint import load_autoencoder_weights
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_contents import MOST_STEPS, count_in
from common.checkpoint_files import checkpoints_in
from common.errors import UserError
from common.hub import local_file
from config.schema.autoencoder import AutoencoderConfig
from config.schema.option import BEGINNING
from train.autoencoder.validation import Validations
from train.loop import continuing
from train.loop.averages import is_optimizer_state


class Start(NamedTuple):
    """Where training starts."""

    checkpoint: Path | None = None  # that it resumes from
    step: int = 0  # of the optimisers
    validated_at: int = 0  # step of the last validation
    content: Mapping[Path, dict[str, Any]] = {}  # of the checkpoint, for the one who takes it from here: it is large


def take_up(cfg: DictConfig) -> DictConfig:
    """The configuration with the run's folder that `continue_from` may name as `default_root_dir`."""
    cfg = cfg.copy()
    if cfg.model.continue_from and continuing.is_run_folder(cfg.model.continue_from):
        cfg.model.default_root_dir, cfg.model.continue_from = cfg.model.continue_from, None
    return cfg


def has_begun(root: Path) -> bool:
    """Whether the folder is that of a run with checkpoints of its own."""
    return bool(checkpoints_in(root / "checkpoints"))


def load_weights(cfg: DictConfig, model: patchvolumeAE, root: Path, logger: logging.Logger) -> Start:
    """Load the weights that training starts from, and find out where.

    That is the run's own newest checkpoint, or the one that `continue_from` names, or in stage 1
    `resume_from_checkpoint`. Stage 2 begins with the weights of that.
    """
    config = OmegaConf.to_container(cfg)
    own = continuing.own_checkpoint(root)
    if own is not None:
        found = continuing.changes_of_run(AutoencoderConfig, root, config)
        continuing.check_goes_on(root, found, cfg.model.set_anew, "name another model.default_root_dir")
        for line in continuing.news_of(found, config):
            logger.info("%s: %s", root, line)
        checkpoint = load_autoencoder_weights(model, own)
        _check_whole(own, checkpoint)
        return _start(own, checkpoint, model)
    source = cfg.model.continue_from or cfg.model.resume_from_checkpoint
    if cfg.model.continue_from is None and (source is None or cfg.model.stage == 2):
        for line in continuing.news_of_others(AutoencoderConfig, root, config):
            logger.info("%s: %s", root, line)
    if source is None:
        return Start()
    checkpoint = load_autoencoder_weights(model, source)
    is_resumed = cfg.model.continue_from is not None or cfg.model.stage == 1
    if is_resumed and _can_resume(model, source, checkpoint, logger):
        _tell_of_other_values(source, checkpoint, config, logger)
        return _start(local_file(source), checkpoint, model)
    if cfg.model.stage == 2 and not model.codebook.initialised:
        raise UserError(f"{source}: its codebook was never started from data: train stage 1 for longer")
    return Start()


def _can_resume(model: patchvolumeAE, path: str, checkpoint: Mapping[str, Any], logger: logging.Logger) -> bool:
    """Whether a stage-1 checkpoint's optimisers fit ours; if not, training starts from its weights, with a warning."""
    problem = None
    if not {"pytorch-lightning_version", "global_step", "loops", "optimizer_states"} <= checkpoint.keys():
        problem = "it holds weights only"
    else:
        _check_whole(path, checkpoint)
        saved = [state["state"] for state in checkpoint["optimizer_states"]]
        own = [optimizer.param_groups[0]["params"] for optimizer in model.configure_optimizers()]
        if len(saved) != len(own) or not all(map(_moments_fit, saved, own)):
            problem = "its optimisers are those of other parameters"
    if problem is None:
        return True
    logger.warning("%s: %s: training starts from its weights at step 0, with new optimisers", path, problem)
    return False


def _check_whole(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """UserError: what Lightning goes on with, and would fail at in its depths, is damaged."""
    for entry, is_sound in (("optimizer_states", _are_states), ("loops", _are_loops)):
        if not is_sound(checkpoint.get(entry)):
            raise UserError(f"{path}: its {entry} are damaged: go on from another checkpoint")


def _are_loops(loops: Any) -> bool:
    """Whether Lightning's loops say how far they are in whole numbers."""
    if not isinstance(loops, dict) or not isinstance(loops.get("fit_loop"), dict):
        return False
    todo = [value for name, value in loops["fit_loop"].items() if str(name).endswith("progress")]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif not isinstance(value, int) or not 0 <= value <= MOST_STEPS:
            return False
    return True


def _are_states(states: Any) -> bool:
    return isinstance(states, list) and all(map(is_optimizer_state, states))


def _moments_fit(saved: dict, parameters: list) -> bool:
    """Whether Adam's averages, numbered by position, have the parameters' shapes; an unused optimiser has none."""
    if not saved:
        return True
    shapes = {index: tuple(parameter.shape) for index, parameter in enumerate(parameters)}
    return {index: tuple(state["exp_avg"].shape) for index, state in saved.items()} == shapes


def _tell_of_other_values(
    path: str, checkpoint: Mapping[str, Any], config: dict[str, Any], logger: logging.Logger
) -> None:
    """Of a checkpoint of another run."""
    stored = checkpoint.get("hyper_parameters")
    stored = stored.get("cfg") if isinstance(stored, Mapping | DictConfig) else None
    saved = OmegaConf.to_container(OmegaConf.create(stored)) if isinstance(stored, Mapping | DictConfig) else {}
    before = {
        table: {**options, **(saved[table] if isinstance(saved.get(table), dict) else {})}
        for table, options in config.items()
    }  # official ones lack many
    found = continuing.changes(AutoencoderConfig, before, config)
    for line in continuing.news_of([change for change in found if change.resume is not BEGINNING], config):
        logger.warning("%s was trained with other values; %s", path, line)


def _start(path: Path, checkpoint: dict[str, Any], model: patchvolumeAE) -> Start:
    step = count_in(path, checkpoint, "global_step", None)
    if step is None:
        raise UserError(f"{path}: no Lightning checkpoint of a training run (it has no global_step)")
    checkpoint["state_dict"] = model.state_dict()  # which has these weights now: no copy of them while a cache is built
    return Start(path, step, Validations.last_of(checkpoint), {path: checkpoint})
