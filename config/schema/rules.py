"""What values of options have to fulfil."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, prod
from typing import Any

from common.text import is_plain


@dataclass(frozen=True)
class Rule:
    """What a value that is not null has to fulfil. expected: ends the sentence "NAME must be"."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}")


def between(least: int, most: int, why: str = "") -> tuple[Rule, Rule]:
    """why: for the message, where the upper bound doesn't speak for itself."""
    reason = f" ({why})" if why else ""
    return at_least(least), Rule(lambda value: value <= most, f"at most {most:,}{reason}")


def one_of(*allowed: Any) -> Rule:
    return Rule(lambda value: value in allowed, f"one of {' | '.join(map(str, allowed))}")


def positive_triple(expected: str, most: float = inf) -> Rule:
    """expected: what the three are. most: what each is at most."""
    return Rule(lambda value: len(value) == 3 and all(0 < item <= most and item < inf for item in value), expected)


def fits_into_memory(voxel_bytes: int) -> Rule:
    """Of a volume's size: that the machine has so many bytes for each voxel."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Rule(
        lambda value: prod(value) * voxel_bytes <= memory,
        f"a size whose voxels, of {voxel_bytes} bytes each at work, fit into this machine's {memory / 1e9:.0f} GB",
    )


def name_of_a(what: str) -> Rule:
    """Not too long either: sizes, numbers and endings come to it, and most file systems stop at 255 bytes."""
    return Rule(
        lambda value: (
            is_plain(value)
            and not set(value) & set("/\\")
            and 0 < len(os.fsencode(value)) <= 150
            and not value.startswith(".")
        ),
        f"a name that a {what} can have, of at most 150 bytes, and not hidden",
    )


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_shard(value: str) -> bool:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value, flags=re.ASCII)
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
# More than any machine has uses for, and less than what makes it stand still.
workers = between(0, 256)
batch = between(1, 65_536)
