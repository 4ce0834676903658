"""Numbered run folders `NNN-BiFlowNet`, and finding the one that a repeated command goes on with.

    results/003-BiFlowNet/
        config.yaml       the resolved configuration
        log.txt           what the console showed
        metrics.jsonl     one line of numbers per logged step (TensorBoard's event files lie beside it)
        checkpoints/      BiFlowNet_0453500.pt: seven digits, the optimiser step; the last few are kept
        samples/          previews

A repeated command finds its folder by `config.yaml`. Everything here runs on rank 0 only.
"""

import contextlib
import re
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.checkpoint_files import newest_checkpoint
from common.errors import UserError
from common.files import lock_folder
from config.loading import save_config
from config.schema.diffusion import BiFlowNetConfig
from config.schema.option import FREE, keys_of

CONFIG_FILE = "config.yaml"
CHECKPOINT_PREFIX = "BiFlowNet_"
# Keys that cannot change a single weight, rounding aside. Runs that differ only here are the same run.
IRRELEVANT_KEYS = keys_of(BiFlowNetConfig, FREE)


def open_run_folder(config: dict, name: str = "BiFlowNet") -> Path:
    """The folder of the newest earlier run with the same configuration, or a new one, with config.yaml in it.

    config: the resolved one, plain values; its `results_dir` holds the run folders, and its `run_name`, if not None,
    replaces the numbered name. name: what follows the number.

    Raises:
        UserError: the folder cannot be written, or `run_name` exists with another configuration.
    """
    results = Path(config["results_dir"])
    try:
        results.mkdir(parents=True, exist_ok=True)
        folder = _named_folder(results, config) if config.get("run_name") else _numbered_folder(results, config, name)
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        save_config(OmegaConf.create(config), folder)
    except OSError as error:
        raise UserError(
            f"results_dir {results}: the run folder cannot be written ({error.strerror or error})"
        ) from error
    return folder


def open_locked(config: dict, closing: contextlib.ExitStack) -> Path:
    """`open_run_folder`, locked until `closing` closes, without half-written files."""
    folder = open_run_folder(config, config["model"])
    closing.enter_context(lock_folder(folder, "training"))
    for file in folder.rglob(".*.tmp*"):  # of a killed process
        file.unlink(missing_ok=True)
    return folder


def find_checkpoint(folder: Path, given: str | None) -> Path | None:
    """The run folder's newest whole checkpoint, else the one that the user gave, else None."""
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is None:
        return None if given is None else Path(given)
    # Later ones could not be read. Under their own names they would count among the latest and push out whole ones.
    step = step_of(newest)
    for file in list_checkpoints(folder):
        if step is not None and step_of(file) > step:  # None: a file that was put there under a name of its own
            file.rename(file.with_name(file.name + ".damaged"))
    return newest


def checkpoint_path(folder: Path, step: int) -> Path:
    """`<run>/checkpoints/BiFlowNet_0453500.pt`."""
    return folder / "checkpoints" / f"{CHECKPOINT_PREFIX}{step:07d}.pt"


def step_of(path: str | Path) -> int | None:
    """The step in a checkpoint's file name, its last run of digits; None without digits."""
    digits = re.findall(r"\d+", Path(path).stem)
    return int(digits[-1]) if digits else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoint files, oldest step first."""
    files = [file for file in (folder / "checkpoints").glob(f"{CHECKPOINT_PREFIX}*.pt") if step_of(file) is not None]
    return sorted(files, key=step_of)


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the `keep` latest of the checkpoints that there are; 0 keeps all."""
    for file in list_checkpoints(folder)[:-keep] if keep else []:
        file.unlink(missing_ok=True)


def differing_keys(config: dict, other: dict) -> list[str]:
    """The keys by which two configurations could train different weights."""
    keys = (config.keys() | other.keys()) - IRRELEVANT_KEYS
    missing = object()
    return sorted(key for key in keys if config.get(key, missing) != other.get(key, missing))


def _named_folder(results: Path, config: dict) -> Path:
    folder = results / config["run_name"]
    saved = _read_config(folder / CONFIG_FILE)
    if saved is not None and (keys := differing_keys(config, saved)):
        raise UserError(
            f"run_name={config['run_name']}: {folder} is a run with other values of {', '.join(keys)}; "
            "choose another run_name, or give the values in its config.yaml"
        )
    return folder


def _numbered_folder(results: Path, config: dict, name: str) -> Path:
    numbered = [(int(match[1]), file) for file in results.iterdir() if (match := re.match(r"(\d{3,})-", file.name))]
    for _, folder in sorted(numbered, reverse=True):
        saved = _read_config(folder / CONFIG_FILE) if folder.name.endswith(f"-{name}") else None
        if saved is not None and not differing_keys(config, saved):
            return folder
    number = max((number for number, _ in numbered), default=-1) + 1
    while True:
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another run took the number in this moment
            number += 1


def _read_config(path: Path) -> dict | None:
    """The saved configuration; None where there is none or it is not one."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError):
        return None
    return saved if isinstance(saved, dict) else None
