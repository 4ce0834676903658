"""Numbered run folders `NNN-BiFlowNet`, and finding the one that a repeated command goes on with.

    results/003-BiFlowNet/
        config.yaml       the resolved configuration
        log.txt           what the console showed
        metrics.jsonl     one line of numbers per logged step (TensorBoard's event files lie beside it)
        checkpoints/      BiFlowNet_0453500.pt: seven digits, the optimiser step; the last few are kept
        samples/          previews
        best/             the checkpoint with the least held-out loss

A repeated command finds its folder by `config.yaml`, also where it trains longer. Everything here runs on rank 0 only.
"""

import contextlib
import re
from pathlib import Path

from omegaconf import OmegaConf

from common.checkpoint_files import checkpoints_in, numbered_checkpoints
from common.errors import UserError
from common.files import RUN_LEFTOVERS, lock_folder, remove_leftovers
from config.loading import save_config
from config.schema.option import EXTENDS, IDENTITY
from train.loop import continuing
from train.loop.continuing import Change
from train.loop.deletion import deletion_explained


def open_run_folder(
    schema: type, config: dict, closing: contextlib.ExitStack, name: str = "BiFlowNet"
) -> tuple[Path, list[str]]:
    """The folder of the run that `config` names or repeats, or of a new one, locked until `closing` closes.

    It holds config.yaml and nothing half written. What of a run may change: `train/loop/continuing.py`.

    Args:
        schema: of the options, by which it is told what may change.
        config: the resolved one, plain values. `continue_from` names a folder, or `run_name` one in `results_dir`;
            without either it is that of the newest run there with the same options, or a new one.
        name: what follows the number of a new folder.

    Returns:
        The folder, and lines for the log: what changes, or which other runs there are.

    Raises:
        UserError: the folder cannot be written, another process trains there, or its run can't go on with `config`.
    """
    try:
        Path(config["results_dir"]).mkdir(parents=True, exist_ok=True)
        folder, found = _choose_folder(schema, config, name)
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        closing.enter_context(deletion_explained(folder))
        closing.enter_context(lock_folder(folder, "training"))
        remove_leftovers(folder, RUN_LEFTOVERS)
        began_from = (continuing.read_config(folder) or {}).get("ckpt")
        saved = {**config, "ckpt": config.get("ckpt") or began_from, "continue_from": None, "set_anew": False}
        save_config(OmegaConf.create(saved), folder)
    except OSError as error:
        raise UserError(
            f"results_dir {config['results_dir']}: the run folder cannot be written ({error.strerror or error})"
        ) from error
    is_new = not checkpoints_in(folder / "checkpoints") and not config.get("ckpt")
    news = continuing.news_of_others(schema, folder, config) if is_new else []
    return folder, continuing.news_of(found, config) + news


def find_checkpoint(folder: Path, given: str | None, name: str = "BiFlowNet") -> Path | None:
    """The run folder's newest whole checkpoint, else the one that the user gave, else None.

    UserError where it has checkpoints, but none can be read.
    """
    newest = continuing.own_checkpoint(folder)
    if newest is None:
        return None if given is None else Path(given)
    # Later ones could not be read. Under their own names they would count among the latest and push out whole ones.
    step = step_of(newest)
    for file in list_checkpoints(folder, name):
        if step is not None and step_of(file) > step:  # None: a file that was put there under a name of its own
            file.rename(file.with_name(file.name + ".damaged"))
    return newest


def checkpoint_path(folder: Path, step: int, name: str = "BiFlowNet") -> Path:
    """`<run>/checkpoints/BiFlowNet_0453500.pt`, of another model with its name."""
    return folder / "checkpoints" / f"{name}_{step:07d}.pt"


def best_path(folder: Path, step: int, name: str = "BiFlowNet") -> Path:
    """`<run>/best/BiFlowNet_0453500.pt`: the checkpoint with the least held-out loss."""
    return folder / "best" / f"{name}_{step:07d}.pt"


def step_of(path: str | Path) -> int | None:
    """The step in a checkpoint's file name, its last run of digits; None without digits."""
    digits = re.findall(r"\d+", Path(path).stem)
    return int(digits[-1]) if digits else None


def list_checkpoints(folder: Path, name: str = "BiFlowNet") -> list[Path]:
    """The run's checkpoint files, oldest step first."""
    return numbered_checkpoints(folder / "checkpoints", f"{name}_")


def _choose_folder(schema: type, config: dict, name: str) -> tuple[Path, list[Change]]:
    """The run's folder, which may be new, and what changes in it."""
    results, run_name, source = Path(config["results_dir"]), config.get("run_name"), config.get("continue_from")
    if source or run_name:
        folder = Path(source) if source else results / run_name
        found = continuing.changes_of_run(schema, folder, {**config, "continue_from": None})
        found += _other_script(continuing.read_config(folder), config)
        other_run = "leave --continue-from out" if source else "choose another run_name"
        continuing.check_goes_on(folder, found, bool(config.get("set_anew")), other_run)
        return folder, found
    if config.get("set_anew"):
        raise UserError("set_anew is for a run that goes on: say which, with --continue-from RUN or --run-name NAME")
    numbered = [(int(match[1]), file) for file in results.iterdir() if (match := re.match(r"(\d{3,})-", file.name))]
    same = []
    for number, folder in numbered:
        saved = continuing.config_of_other(folder) if folder.name.endswith(f"-{name}") else None
        found = continuing.changes(schema, saved, config) + _other_script(saved, config) if saved is not None else []
        if saved is not None and all(change.resume is EXTENDS for change in found):
            same.append((not found, number, folder, found))
    if same:
        *_, folder, found = max(same, key=lambda run: run[:2])  # one that just goes on before those that are extended
        return folder, found
    number = max((number for number, _ in numbered), default=-1) + 1
    while True:
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir()
            return folder, []
        except FileExistsError:  # another run took the number in this moment
            number += 1


def _other_script(saved: dict | None, config: dict) -> list[Change]:
    """A change where a run is of the script for one resolution and this is the one for several, or the other way."""
    if saved is None or ("resolution" in saved) == ("resolution" in config):
        return []
    return [Change("resolution", saved.get("resolution", "several"), config.get("resolution", "several"), IDENTITY)]
