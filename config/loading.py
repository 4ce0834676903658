"""Loads a YAML configuration, checks it against a schema and saves it.

A file may start from others: `defaults: [base_cfg, _self_]` takes base_cfg.yaml, then what the file says itself
(`_self_`, without which it comes last). Names are looked up beside the file, beside the first one and in this folder,
with / in front not beside the file. Every mistake is a one-line `UserError`.
"""

import difflib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.documents import check_yaml, read_text, reason
from common.errors import UserError
from common.files import replacing
from common.places import is_file
from common.text import is_plain, shown
from config.schema.option import options_of
from config.validation import validate

CONFIG_FOLDER = Path(__file__).resolve().parent
SAVED_CONFIG = "config.yaml"  # in a folder of results
SELF = "_self_"  # in a defaults list, the file's own keys
MOST_BYTES, MOST_VALUES, MOST_CHARACTERS = 2**20, 20_000, 10_000  # of a file, in it, of one of them
MOST_INTERPOLATIONS = 20  # each may stand for several others, so that texts grow as a power of their number
MOST_PROBLEMS = 8  # named in a message
# Published configs carry these keys; they never had an effect.
IGNORED_KEYS = ("i3d_feat",)

logger = logging.getLogger(__name__)


def load_config(
    schema: type, path: str | Path | None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> DictConfig:
    """Composes a config file, applies overrides and returns the checked, resolved result.

    Args:
        path: YAML file; None starts from the schema's defaults.
        overrides: `key=value` in Hydra's grammar, e.g. `model.lr=1e-4`; they win over the file.
        values: plain values by flat key (from command-line flags); they win over the overrides.

    Returns:
        A plain DictConfig with every key of the schema. It is closed (an unknown attribute is an error) and holds no
        schema types, so a checkpoint that stores it stays readable without this package.

    Raises:
        UserError: in one line, all unknown keys, wrong types and values out of range that were found in one source.
    """
    cfg = OmegaConf.structured(schema)
    if path is not None:
        _merge(cfg, _compose(Path(path)), str(path))
    given = [(*_parse_override(schema, override), f"override {shown(override)}") for override in overrides]
    given += [(name, value, f"option {name}") for name, value in (values or {}).items()]
    for name, value, source in given:
        _merge(cfg, _nested(name, value), source)
    if table := cfg.get("class_table"):
        _merge(cfg, _read_class_table(Path(table)), table)
        for name, value, source in given:  # they win over the table
            _merge(cfg, _nested(name, value), source)
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path or 'config'}: {_first_line(error)}") from error
    plain = OmegaConf.create(resolved)
    if unset := sorted(OmegaConf.missing_keys(plain)):
        raise UserError(f"{path or 'config'}: {', '.join(unset)} must be set, found ???")
    if resolved != OmegaConf.to_container(cfg):  # what an interpolation stands for may be of another type than its key
        _merge(OmegaConf.structured(schema), resolved, f"{path or 'config'}: interpolations")
    validate(plain, schema)
    if odd := [name for name, text in _texts(OmegaConf.to_container(plain)) if not is_plain(text)]:
        raise UserError(f"{path or 'config'}: {odd[0]} has characters that are no text, such as NUL: write it anew")
    OmegaConf.set_struct(plain, True)
    return plain


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The texts in a config, each with the name of its option."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, f"{name}.{key}".strip("."))


def _read_class_table(path: Path) -> DictConfig:
    """UserError: more in the file than the table and the compression that it is for, or less."""
    table = _compose(path)
    if "classes" not in table or (strange := sorted(set(table) - {"classes", "downsample"})):
        found = f"found {', '.join(map(str, strange))}" if "classes" in table else "there is no classes"
        raise UserError(f"class_table: {path}: `classes` and `downsample` are needed and nothing else, {found}")
    return table


def save_config(cfg: DictConfig, folder: str | Path) -> Path:
    """Writes the resolved config as `config.yaml` into a folder (made if needed) and returns its path."""
    target = Path(folder) / SAVED_CONFIG
    try:
        with replacing(target) as file:
            file.write(OmegaConf.to_yaml(cfg, resolve=True).encode())
    except OSError as error:
        raise UserError(f"{target}: the config cannot be saved ({error.strerror}); choose another folder") from error
    return target


def require(cfg: DictConfig, *keys: str) -> None:
    """Checks that keys without a useful default were given; raises one UserError that names all that were not."""
    if missing := [name for name in keys if OmegaConf.select(cfg, name) in (None, "")]:
        hints = ", ".join(name if "." in name else f"{name} (--{name.replace('_', '-')} VALUE)" for name in missing)
        advice = f"set it in the config file or add {missing[0]}=VALUE to the command"
        raise UserError(f"required but not set: {hints}; {advice}")


# ------------------------------------------------------------------------------------------------- composing


def read_config_file(path: Path) -> dict[str, Any]:
    """What one YAML file says as plain containers, interpolations unresolved. OSError; ValueError for no config."""
    text = read_text(path, MOST_BYTES)
    check_yaml(text, yaml.SafeLoader, MOST_VALUES, MOST_CHARACTERS)
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, AttributeError) as error:
        raise ValueError(reason(error)) from error
    except AssertionError as error:  # what OmegaConf has for a text in quotes
        raise ValueError("expected keys with values, found a single text") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected keys with values, found {shown(content)}")
    return content


def _compose(path: Path) -> dict[str, Any]:
    """The file with those of its defaults list worked in, as `read_config_file`."""
    if not is_file(path):
        shipped = ", ".join(sorted(file.name for file in CONFIG_FOLDER.glob("*.yaml")))
        raise UserError(f"{path}: no such config file; config/ has {shipped}")
    if path.suffix != ".yaml":
        raise UserError(f"{path}: a config file must be named *.yaml")
    composed = _with_defaults(path, path.parent, set())
    if (number := repr(composed).count("${")) > MOST_INTERPOLATIONS:
        raise UserError(f"{path}: has {number} interpolations ${{…}}, at most {MOST_INTERPOLATIONS}: write values out")
    return composed


def _with_defaults(path: Path, root: Path, known: set[str]) -> dict[str, Any]:
    """root: folder of the first file. known: the files so far; one that is named twice is refused, or has no end."""
    known.add(os.path.realpath(path))
    try:
        content = read_config_file(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as a config: not text in UTF-8: save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a config: {getattr(error, 'strerror', None) or error}") from error
    names = content.pop("defaults", [SELF])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: defaults must be a list of names of config files and {SELF}, found {shown(names)}")
    composed: dict[str, Any] = {}
    for name in names if SELF in names else [*names, SELF]:
        below = content if name == SELF else _with_defaults(_find(name, path, root, known), root, known)
        composed = _merged(composed, below)
    return composed


def _find(name: str, path: Path, root: Path, known: set[str]) -> Path:
    """The file that `name` in the defaults list of `path` means."""
    folders = (root, CONFIG_FOLDER) if name.startswith("/") else (path.parent, root, CONFIG_FOLDER)
    places = [folder / f"{name.removeprefix('/').removesuffix('.yaml')}.yaml" for folder in folders]
    found = next((place for place in places if is_file(place)), None)
    if found is None:
        looked = " or ".join(dict.fromkeys(str(place.parent) for place in places))
        raise UserError(f"{path}: defaults: there is no {name}.yaml in {looked}")
    if os.path.realpath(found) in known:
        raise UserError(f"{path}: defaults: {name} is named a second time, or names this file: name each file once")
    return found


def _merged(below: Any, above: Any) -> Any:
    """Two configs as one: sections key by key, of all else what `above` says."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _parse_override(schema: type, text: str) -> tuple[str, Any]:
    """Splits `key=value` into the dotted key and its value.

    A value that the schema knows as text is taken as it stands, unless it is null or in quotes: a regular expression
    such as `[0-9]+` or a checkpoint `epoch=3-step=500.ckpt` needs none. All others are read by Hydra's grammar.
    """
    problem = f"override {shown(text)}: expected key=value, e.g. model.lr=1e-4"
    match = re.fullmatch(r"(?:\+{0,2})([\w.]+)=(.*)", text, flags=re.DOTALL)
    if match is None:
        raise UserError(problem)
    dotted, raw = match.groups()
    is_text = str in _alternatives({option.name: option.hint for option in options_of(schema)}.get(dotted))
    if is_text and raw.lower() != "null" and raw[:1] not in ("'", '"'):
        return dotted, re.sub(r"\\([=,: ])|\\\\", lambda found: found[1] or found[0], raw)  # Hydra's escapes work on
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
        if override.is_sweep_override():
            if is_text:
                return dotted, raw
            raise UserError(f"{problem}; several values at once are not supported, and a list is written [1,2]")
        return dotted, override.value()
    except (HydraException, ValueError, RecursionError) as error:  # ValueError: of thousands of digits
        if isinstance(error, UserError):
            raise
        if is_text:
            return dotted, raw
        raise UserError(f"{problem}; {reason(_first_line(error))}") from error


# --------------------------------------------------------------------------------------------------- merging


def _merge(cfg: DictConfig, given: Mapping[str, Any], source: str) -> None:
    """Writes `given` into the typed config and raises one UserError with all keys that do not fit."""
    found = _merge_section(cfg, OmegaConf.get_type(cfg), given, "", OmegaConf.get_type(cfg))
    if problems := [*islice(found, MOST_PROBLEMS)]:
        raise UserError(f"{source}: {'; '.join(problems)}{'; …' if len(problems) == MOST_PROBLEMS else ''}")


def _merge_section(cfg: DictConfig, section: type, given: Mapping, prefix: str, schema: type) -> Iterator[str]:
    hints = get_type_hints(section)
    for name, value in given.items():
        dotted = f"{prefix}{name}"
        if name in IGNORED_KEYS:
            logger.warning("%s is accepted for old configs and has no effect", dotted)
        elif name not in hints:
            yield f"unknown key {dotted}{_closest(dotted, schema)}"
        elif is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                yield from _merge_section(cfg[name], hints[name], value, f"{dotted}.", schema)
            else:
                yield f"{dotted} must be a section with keys, got {shown(value)}"
        elif (rows := _rows(hints[name], value)) is not None:
            cfg[name] = rows
            for index, (row, given_row) in enumerate(zip(rows, value, strict=True)):
                row_type = OmegaConf.get_type(row)
                yield from _merge_section(cfg[name][index], row_type, given_row, f"{dotted}[{index}].", row_type)
        else:
            try:
                cfg[name] = _whole_numbers(value, hints[name])
            except (OmegaConfBaseException, TypeError, ValueError, OverflowError):
                yield f"{dotted} must be {_describe(hints[name])}, got {shown(value)}"


def _rows(hint: Any, value: Any) -> list[Any] | None:
    """One section with defaults per entry of `value`, if the key holds a list of sections; else None."""
    row_type = next(iter(get_args(hint)), None)
    is_table = get_origin(hint) is list and is_dataclass(row_type)
    if not is_table or not isinstance(value, list) or not all(isinstance(row, Mapping) for row in value):
        return None
    return [OmegaConf.structured(row_type) for _ in value]


def _whole_numbers(value: Any, hint: Any) -> Any:
    """1e6 (a float in YAML, text on the command line) as 1000000 where a whole number is asked for."""
    if isinstance(value, (list, tuple)):
        inner = next((get_args(kind)[0] for kind in _alternatives(hint) if get_origin(kind) is list), None)
        return [_whole_numbers(item, inner) for item in value]
    if int in _alternatives(hint) and isinstance(value, (float, str)):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


def _closest(dotted: str, schema: type) -> str:
    """', did you mean X?' with the most similar key of the schema, or nothing where none is similar."""
    known = [*get_type_hints(schema), *(option.name for option in options_of(schema))]
    by_last = {name.rsplit(".", 1)[-1]: name for name in known}
    found = [by_last[name] for name in difflib.get_close_matches(dotted.rsplit(".", 1)[-1], by_last, n=1)]
    return f", did you mean {found[0]}?" if found else ""


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of `X | None`, or the type itself."""
    return get_args(hint) if NoneType in get_args(hint) else (hint,)


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    parts = []
    for kind in _alternatives(hint):
        if get_origin(kind) is list:
            parts.append(f"a list, each item {_describe(get_args(kind)[0])}")
        elif get_origin(kind) is dict:
            parts.append(f"names, each with {_describe(get_args(kind)[1])}")
        else:
            parts.append(names.get(kind, f"a section with the keys {', '.join(get_type_hints(kind))}"))
    return " or ".join(parts)


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
