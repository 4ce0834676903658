"""What values of options have to fulfil."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value that is not null has to fulfil. expected: ends the sentence "NAME must be"."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}")


def one_of(*allowed: Any) -> Rule:
    return Rule(lambda value: value in allowed, f"one of {' | '.join(map(str, allowed))}")


def positive_triple(expected: str) -> Rule:
    """expected: what the three are."""
    return Rule(lambda value: len(value) == 3 and all(0 < item < inf for item in value), expected)


def name_of_a(what: str) -> Rule:
    """Not too long either: sizes, numbers and endings come to it, and most file systems stop at 255 bytes."""
    return Rule(
        lambda value: value not in ("", ".", "..") and not set(value) & set("/\\\0") and len(os.fsencode(value)) <= 150,
        f"a name that a {what} can have, of at most 150 bytes",
    )


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_shard(value: str) -> bool:
    found = re.fullmatch(r"(\d+)/(\d+)", value)
    return found is not None and 1 <= int(found[1]) <= int(found[2])


def _stays_inside(value: str) -> bool:
    parts = value.split("/")
    return value == "" or (parts[0] != "" and ".." not in parts and not set(parts) <= {".", ""} and "\0" not in value)


not_negative = Rule(lambda value: 0 <= value < inf, "at least 0")
positive = Rule(lambda value: 0 < value < inf, "above 0")
inner_share = Rule(lambda value: 0 < value < 1, "above 0 and below 1")
share = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
below_one = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
betas = Rule(lambda value: len(value) == 2 and all(0 <= b < 1 for b in value), "two numbers of at least 0 and below 1")
interval = Rule(lambda value: len(value) == 2 and -inf < value[0] < value[1] < inf, "two numbers, the lower one first")
inner_path = Rule(_stays_inside, "a path inside its folder")
shard_number = Rule(_is_shard, "I/N with I from 1 to N, e.g. 3/8")
regex = Rule(_is_regex, "a regular expression that Python can read")
