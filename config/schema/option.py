"""One row an option: name, type, default, range, meaning, flag, and what another value means for resuming.

Flags, `--help`, the commented base files, the checks of single values and the lists of keys that a resumed run may
change all come from these rows (`options_of`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Any, get_type_hints

import yaml

INFINITY = float("inf")


class Resume(Enum):
    """What another value means for a run that goes on."""

    IDENTITY = auto()  # it is another run
    FREE = auto()  # nothing: no weight changes, rounding aside
    EXTENDS = auto()  # the run is meant to go on further or elsewhere


IDENTITY, FREE, EXTENDS = Resume


@dataclass(frozen=True)
class Rule:
    """What a value that is not null has to fulfil. expected: ends the sentence "NAME must be"."""

    holds: Callable[[Any], bool]
    expected: str


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
        return yaml.safe_dump(self.default, default_flow_style=True, width=INFINITY).removesuffix("...\n").strip()

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value by the first rule that it breaks; null breaks none."""
        broken = (rule for rule in self.rules if value is not None and not rule.holds(value))
        return next((f"{self.name} must be {rule.expected}, got {value!r}" for rule in broken), None)


def key(
    default: Any,
    meaning: str,
    *rules: Rule,
    flag: str | bool = False,
    resume: Resume = IDENTITY,
    section: str | None = None,
) -> Any:
    """Dataclass field of an option. flag: True = `--name-with-dashes`; a string where it is published otherwise."""
    option = Option(default, meaning, rules, flag, resume, section)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"option": option})
    return field(default=default, metadata={"option": option})


flag = partial(key, flag=True)


def device_flag(resume: Resume = IDENTITY) -> Any:
    """The option `--device`."""
    return flag(
        "auto", "auto | cpu | cuda; auto = a GPU where there is one", one_of("auto", "cpu", "cuda"), resume=resume
    )


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


def keys_of(schema: type, *resume: Resume) -> frozenset[str]:
    """The names of the keys with one of these meanings for resuming."""
    return frozenset(option.name for option in options_of(schema) if option.resume in resume)


# ----------------------------------------------------------------------------------------------------- rules


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}")


def one_of(*allowed: Any) -> Rule:
    return Rule(lambda value: value in allowed, f"one of {' | '.join(map(str, allowed))}")


def positive_triple(expected: str) -> Rule:
    """expected: what the three are."""
    return Rule(lambda value: len(value) == 3 and all(0 < item < INFINITY for item in value), expected)


def name_of_a(what: str) -> Rule:
    """Not too long either: sizes, numbers and endings come to it, and most file systems stop at 255 bytes."""
    return Rule(
        lambda value: value not in ("", ".", "..") and not set(value) & set("/\\\0") and len(value.encode()) <= 150,
        f"a name that a {what} can have, of at most 150 bytes",
    )


def _is_regular_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


not_negative = Rule(lambda value: 0 <= value < INFINITY, "at least 0")
positive = Rule(lambda value: 0 < value < INFINITY, "above 0")
fraction = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
below_one = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
betas = Rule(
    lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers of at least 0 and below 1"
)
interval = Rule(
    lambda value: len(value) == 2 and -INFINITY < value[0] < value[1] < INFINITY, "two numbers, the lower one first"
)
regular_expression = Rule(_is_regular_expression, "a regular expression that Python can read")
