"""One row an option: name, type, default, range, meaning, flag, and what another value means for resuming.

Flags, `--help`, the commented base files, the checks of single values and what of a run may change when it goes on all
come from these rows (`options_of`).
"""

from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum, auto
from functools import partial
from math import inf
from typing import Any, get_type_hints

import yaml

from common.text import shown
from config.schema.rules import Rule, not_negative, one_of, shard_number


class Resume(Enum):
    """What another value means for a run that goes on (`train/loop/continuing.py`; table in docs/training.md)."""

    IDENTITY = auto()  # it is another run
    BEGINNING = auto()  # another one is another run; but once a run has begun, null is as good
    CHANGES = auto()  # it goes on otherwise than it began: only where `set_anew` says so
    EXTENDS = auto()  # it goes on further or elsewhere
    FREE = auto()  # nothing: no weight changes, rounding aside


IDENTITY, BEGINNING, CHANGES, EXTENDS, FREE = Resume


LARGEST_NUMBER = 2**32 - 1  # that NumPy takes as a seed; nothing else is counted as far


def _is_countable(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(map(_is_countable, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) <= LARGEST_NUMBER


LARGEST = Rule(_is_countable, f"of whole numbers up to {LARGEST_NUMBER:,}")


@dataclass(frozen=True)
class Option:
    """A key of a schema.

    flag: as it is typed, with its dashes; without dashes it is a positional argument's name in `--help`; None = none.
    section: heading in the base files for it and what follows; None = that of the key before.
    name: dotted for keys of sub-sections. hint: the type.
    """

    default: Any
    meaning: str
    rules: tuple[Rule, ...]
    flag: str | bool | None
    resume: Resume
    section: str | None
    name: str = ""
    hint: Any = None

    @property
    def written_default(self) -> str:
        """The default as it stands in a YAML file, on one line."""
        return yaml.safe_dump(self.default, default_flow_style=True, width=inf).removesuffix("...\n").strip()

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value by the first rule that it breaks; null breaks none."""
        broken = (rule for rule in (LARGEST, *self.rules) if value is not None and not rule.holds(value))
        return next((f"{self.name} must be {rule.expected}, got {shown(value)}" for rule in broken), None)


def key(
    default,
    meaning: str,
    *rules: Rule | tuple[Rule, ...],
    flag: str | bool = False,
    resume: Resume = IDENTITY,
    section: str | None = None,
) -> Any:
    """Dataclass field of an option. flag: True = `--name-with-dashes`; a string where it is published otherwise."""
    each = tuple(rule for given in rules for rule in (given if isinstance(given, tuple) else (given,)))
    option = Option(default, meaning, each, flag, resume, section)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata={"option": option})
    return field(default=default, metadata={"option": option})


TENSORBOARD = "tensorboard"
flag = partial(key, flag=True)
tuned = partial(key, resume=CHANGES)  # how a run trains


def device_flag(resume: Resume = IDENTITY) -> Any:
    """The option `--device`."""
    return flag("auto", "auto (GPU if there is one) | cpu | cuda", one_of("auto", "cpu", "cuda"), resume=resume)


def arithmetic(has_flag: bool = True) -> Any:
    """What float32 means on a GPU (`common.precision.configure_backend`)."""
    return key(
        "fast",
        "float32 on a GPU: fast (convolutions in TF32) | exact (float32, deterministic, slower); CPUs are always exact",
        one_of("fast", "exact"),
        flag=has_flag,
        resume=FREE,
    )


def logger() -> Any:
    """The option `logger` of a training (`train/loop/tracker.py`)."""
    meaning = "where figures go: tensorboard (and metrics.jsonl) | wandb or mlflow, beside these"
    return key(TENSORBOARD, meaning, one_of(TENSORBOARD, "wandb", "mlflow"), resume=FREE)


def shard() -> Any:
    """The option `--shard` (`common/shards.py`)."""
    meaning = "I/N: only every N-th item from the I-th on, as a job of an array; a last call without it completes"
    return flag(None, meaning, shard_number)


def continue_from() -> Any:
    """The option `--continue-from` of a training."""
    meaning = (
        "run folder to go on in, whose options hold where none are given; or a checkpoint for a new run to go on from"
    )
    return flag(None, meaning, resume=BEGINNING)


def set_anew() -> Any:
    """The option `--set-anew` of a training."""
    return flag(False, "a run that goes on takes new values of learning rate, losses, batch size, …", resume=FREE)


def keep_checkpoints() -> Any:
    """The option `keep_checkpoints` of a training."""
    return key(6, "newest checkpoints kept; 0 = all", not_negative, resume=FREE)


def options_of(schema: type, prefix: str = "") -> list[Option]:
    """Every option of a schema and of its sub-sections, in the order of their declaration."""
    found = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        name, hint = prefix + item.name, hints[item.name]
        if is_dataclass(hint):
            found += options_of(hint, f"{name}.")
            continue
        option = item.metadata["option"]
        flag = f"--{item.name.replace('_', '-')}" if option.flag is True else option.flag or None
        found.append(replace(option, name=name, hint=hint, flag=flag))
    return found
