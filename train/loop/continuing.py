"""What of a run may change when it goes on: one rule for all trainings, by the `resume=` of each option's row.

docs/training.md has it as a table. A run is a folder with `config.yaml` and `checkpoints/`.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint_files import checkpoints_in, newest_checkpoint
from common.errors import UserError
from common.places import is_file, is_folder
from config.loading import SAVED_CONFIG, read_config_file
from config.schema.option import BEGINNING, CHANGES, FREE, IDENTITY, Resume, options_of

# What some changes bring with them, by the last part of the option's name.
CONSEQUENCES = {
    **dict.fromkeys(("gpus", "batch_size"), "a step has another number of samples, so the order of the data changes"),
    **dict.fromkeys(("seed", "global_seed"), "the order of the data and all random numbers change"),
}


@dataclass(frozen=True)
class Change:
    """An option whose value is another than a run's."""

    key: str
    before: Any
    now: Any
    resume: Resume

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def changes(schema: type, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The options by which two configurations differ, those aside that change no weight (FREE).

    before: that of a run; what it lacks, being older than the option, was as the default says.
    """
    found = []
    for option in options_of(schema):
        values = [_value(config, option.name, option.default) for config in (before, now)]
        if option.resume is not FREE and not _are_same(*values):
            found.append(Change(option.name, *values, option.resume))
    return found


def changes_of_run(schema: type, folder: Path, now: Mapping[str, Any]) -> list[Change]:
    """How the run in `folder` would change if it went on; nothing where it has no configuration.

    Where it began is past: that is a change only where another file is named than its own.
    """
    before = read_config(folder)
    found = changes(schema, before, now) if before is not None else []
    return [change for change in found if change.resume is not BEGINNING or not _is_past(change.now, folder)]


def check_goes_on(folder: Path, found: Sequence[Change], set_anew: bool, other_run: str) -> None:
    """UserError where the run in `folder` can't go on with these changes.

    other_run: what to do for another run.
    """
    begins_another = [change for change in found if change.resume in (IDENTITY, BEGINNING)]
    if begins_another:
        raise UserError(
            f"{folder} holds another run: {_listed(begins_another)}; take these back, or for a new run {other_run}"
        )
    refused = [change for change in found if change.resume is CHANGES and not set_anew]
    if refused:
        raise UserError(
            f"{folder} holds a run with other options: {_listed(refused)}; add --set-anew to go on with the new values "
            f"or take them back, or for a new run {other_run}"
        )


def news_of(found: Sequence[Change], now: Mapping[str, Any]) -> list[str]:
    """Lines for the log of a run that goes on with these changes."""
    if not found:
        return []
    last_parts = [change.key.rpartition(".")[2] for change in found]
    notes = [CONSEQUENCES[part] for part in last_parts if part in CONSEQUENCES]
    schedules = [_value(now, name, None) for name in ("lr_schedule", "model.lr_schedule")]
    if "cosine" in schedules and not {"max_steps", "epochs", "max_epochs"}.isdisjoint(last_parts):
        notes.append("the cosine has another length")
    return ["; ".join([f"changed: {_listed(found)}", *dict.fromkeys(notes)])]


def news_of_others(schema: type, folder: Path, now: Mapping[str, Any]) -> list[str]:
    """A line for the log of a new run, where beside it lie others of the same data and networks."""
    others = []
    for config in folder.parent.glob(f"*/{SAVED_CONFIG}"):
        run, before = config.parent, config_of_other(config.parent)
        if before is None or run == folder or run.is_symlink() or not checkpoints_in(run / "checkpoints"):
            continue
        found = changes(schema, before, now)
        if all(change.resume is not IDENTITY for change in found):
            others.append((config.stat().st_mtime_ns, run, found))
    if not others:
        return []
    others = sorted(others, reverse=True, key=lambda other: other[:2])
    shown = ", ".join(f"{run} ({_listed(found) or 'the same options'})" for _, run, found in others[:3])
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    _, newest, found = others[0]
    needs_flag = any(change.resume is CHANGES for change in found)
    command = f"--continue-from {newest}" + (" --set-anew" if needs_flag else "")
    return [f"a new run, from step 0; of the same data and networks there are {shown}{more}: to go on, add {command}"]


def is_run_folder(source: str | Path) -> bool:
    """Whether `continue_from` is a run's folder; False: a checkpoint file. UserError where it is neither."""
    source = Path(source)
    if is_file(source):
        return False
    if not is_folder(source):
        raise UserError(f"continue_from: {source}: no such run folder or checkpoint file")
    if not checkpoints_in(source / "checkpoints"):
        raise UserError(f"continue_from: {source}: not the folder of a run: it has no checkpoints/*.pt or *.ckpt")
    return True


def own_checkpoint(folder: Path) -> Path | None:
    """The run's newest readable checkpoint; None in a new run. UserError where none can be read, but there are some."""
    checkpoints = folder / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    if newest is None and checkpoints_in(checkpoints):  # starting anew would overwrite them
        raise UserError(f"{checkpoints}: none of its checkpoints can be read: move the folder away to start anew")
    return newest


def read_config(folder: Path) -> dict | None:
    """A run's saved configuration; None where there is none. UserError where it is damaged."""
    path = folder / SAVED_CONFIG
    try:
        return read_config_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as the configuration of the run ({error}): to go on with the run by the options "
            "of the command, move it away; to start anew, the folder"
        ) from error


def config_of_other(folder: Path) -> dict | None:
    """As `read_config`, of a run that nobody has named: None where it is damaged, too."""
    with suppress(UserError):
        return read_config(folder)
    return None


def _listed(found: Sequence[Change]) -> str:
    return ", ".join(map(str, found))


def _value(config: Mapping[str, Any], name: str, default: Any) -> Any:
    for part in name.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return default
        config = config[part]
    return config


def _are_same(first: Any, second: Any) -> bool:
    """Equal, or two ways to write the path of one file."""
    if isinstance(first, str) and isinstance(second, str):
        return os.path.realpath(first) == os.path.realpath(second)
    return first == second


def _is_past(source: Any, folder: Path) -> bool:
    if not source or not isinstance(source, str):
        return not source
    return Path(os.path.realpath(source)).is_relative_to(os.path.realpath(folder))
