"""Attributes of volumes to generate: what is asked for, checked against what the model was trained with."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import UserError
from common.text import shown
from ddpm.attributes import AttributeSpec, of_volume

if TYPE_CHECKING:
    from evaluation.generation.requests import Request

Attributes = tuple[tuple[str, str], ...]  # names and values as they are typed, by name
LONGEST = 70  # characters that they add to a file's name; with those of the class it may have 255 bytes
SLACK = 1e-6  # of a range's width: spacings of headers are float32


def parse_attributes(words: Sequence[str], where: str = "") -> Attributes:
    """Of words such as age=63. UserError, which begins with `where`, for others and for names given twice."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not (name.isidentifier() and name.isascii()) or not value:
            raise UserError(f"{where}attributes are given as age=63 sex=F, got {shown(word)}")
        if name in found:
            raise UserError(f"{where}attribute {name:.60} is given twice, as {shown(found[name])} and {shown(value)}")
        found[name] = value
    attributes = tuple(sorted(found.items()))
    if (length := len(file_suffix(attributes))) > LONGEST:
        raise UserError(f"{where}attributes of {length} characters, which files are named after: at most {LONGEST}")
    return attributes


def file_suffix(attributes: Attributes) -> str:
    """What they add to a file's name: "_age=63_sex=F"."""
    return "".join(f"_{name}={re.sub(r'[^A-Za-z0-9.+-]', '-', value)}" for name, value in attributes)


def encoded_attributes(
    specs: Sequence[AttributeSpec], request: "Request", extrapolate: bool, model: str
) -> list[float]:
    """What the network is given, in its order: unknown where nothing is asked for; spacing and size are the volume's.

    model: its file, for messages. UserError: an unknown name or value, or one outside the range trained on.
    """
    asked = dict(request.attributes)
    known = {spec.name for spec in specs}
    if unknown := sorted(asked.keys() - known):
        has = f"has {', '.join(sorted(known))}" if known else "was trained without any"
        raise UserError(f"attribute {unknown[0]}: {model} {has}: leave it out, or correct the name")
    return [spec.encoded(_value(spec, asked.get(spec.name), request, extrapolate)) for spec in specs]


def _value(spec: AttributeSpec, asked: str | None, request: "Request", extrapolate: bool) -> float | str | None:
    if spec.range is None:
        if asked is not None and asked not in spec.categories:
            raise UserError(f"attribute {spec.name}: {asked!r}, the model knows {' | '.join(spec.categories)}")
        return asked
    if asked is None and spec.of_volume is None:
        return None
    try:
        value = of_volume(spec.of_volume, request.spacing_mm, request.voxels) if asked is None else float(asked)
    except ValueError as error:
        raise UserError(f"attribute {spec.name}: {asked!r} is no number") from error
    low, high = spec.range
    slack = SLACK * (high - low)
    if not math.isfinite(value) or not (extrapolate or low - slack <= value <= high + slack):
        of = f" (of {request.class_name})" if asked is None else ""
        raise UserError(
            f"attribute {spec.name}: {value:g}{of} lies outside {low:g} to {high:g}, which the model was trained on: "
            "ask for another, or add --extrapolate"
        )
    return value
