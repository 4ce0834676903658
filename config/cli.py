"""The command line of every script: `--config FILE`, the public flags, then `key=value` overrides.

A flag wins over an override, an override over the config file, the file over the schema's default. Where a command goes
on with a run (`--continue-from`) and names no file, the run's own is the config file.
"""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from omegaconf import DictConfig

from common.errors import UserError
from common.places import is_file
from config.loading import CONFIG_FOLDER, SAVED_CONFIG, load_config
from config.schema.option import Option, options_of

_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")
_NUMBER = re.compile(r"[-+.\d]")


def parse_command_line(
    argv: Sequence[str] | None, schema: type, default_config: str | None, description: str
) -> DictConfig:
    """Reads a command line into a checked config.

    Args:
        argv: arguments without the program's name; None = those of this process.
        schema: dataclass of `config/schema/`; its rows name the flags. `--ddim_steps` and `--ddim-steps` are the same.
        default_config: file of `config/` used without `--config`; None = the schema's defaults.
        description: first lines of `--help`.

    Raises:
        UserError: in one line, whatever is wrong with the command line or the config.
        SystemExit: after `--help`.
    """
    options = options_of(schema)
    flags = {option.flag: option for option in options if option.flag and option.flag.startswith("-")}
    positionals = [option for option in options if option.flag and option.flag not in flags]
    argv = [_canonical(token, flags) for token in (sys.argv[1:] if argv is None else argv)]
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=" ".join(["%(prog)s", *(place.flag for place in positionals), "[--config FILE] [flags] [key=value ...]"]),
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    if "--config" not in flags:  # else it is the script's own
        parser.add_argument("--config", metavar="FILE", help=f"YAML file (default: {default_config or 'none'})")
    for flag, option in flags.items():
        parser.add_argument(flag, dest=option.name, help=_help_text(option), **_arity(option.hint))
    given, rest = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(given).items() if value is not None}
    if given.pop("help"):
        for option in positionals:
            parser.add_argument(option.name, metavar=option.flag, help=option.meaning)
        parser.epilog = _other_keys(options)
        parser.print_help()
        raise SystemExit(0)
    if given.get("config") == "":  # as of a shell's variable that isn't set
        raise UserError("--config: the file's name is empty; name a YAML file, or leave --config out")
    path = given.pop("config", None) if "--config" not in flags else None
    values, overrides = _split_overrides(given, rest, flags, positionals)
    if path is None:
        path = _config_of_run(options, overrides, values) or (
            CONFIG_FOLDER / default_config if default_config else None
        )
    cfg = load_config(schema, path, overrides, values)
    if missing := [option.flag for option in positionals if cfg[option.name] is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return cfg


def _config_of_run(options: Sequence[Option], overrides: Sequence[str], values: Mapping[str, Any]) -> Path | None:
    """The configuration of the run that is to go on, if the command names its folder."""
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides) | dict(values)
    names = [option.name for option in options if option.name.rpartition(".")[2] == "continue_from"]
    folders = [Path(given[name]) for name in names if given.get(name)]
    return next((folder / SAVED_CONFIG for folder in folders if is_file(folder / SAVED_CONFIG)), None)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all flags and keys")


def _canonical(token: str, flags: Mapping[str, Option]) -> str:
    """The published spelling of a flag that was written with other dashes or underscores."""
    head, equals, value = token.partition("=")
    if not head.startswith("--"):
        return token
    same = (flag for flag in flags if flag.replace("_", "-") == head.replace("_", "-"))
    return f"{next(same, head)}{equals}{value}"


def _arity(hint: Any) -> dict[str, Any]:
    """How many words a flag takes: lists one or more, a switch none or true/false, everything else one."""
    if any(get_origin(kind) is list for kind in (hint, *get_args(hint))):
        return {"nargs": "+", "metavar": "N"}
    if hint is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    return {"metavar": "VALUE"}


def _split_overrides(
    given: Mapping[str, Any], rest: Sequence[str], flags: Mapping[str, Option], positionals: Sequence[Option]
) -> tuple[dict[str, Any], list[str]]:
    """Separates values from `key=value` overrides, also from those that a list or a switch swallowed."""
    values, rest = dict(given), list(rest)
    for flag, option in flags.items():
        value = given.get(option.name)
        if isinstance(value, list):
            swallowed = [item for item in value if _OVERRIDE.match(item) or (positionals and not _NUMBER.match(item))]
            rest += swallowed
            values[option.name] = [item for item in value if item not in swallowed]
            if not values[option.name]:
                raise UserError(f"argument {flag}: expected at least one argument; --help lists all flags and keys")
        elif option.hint is bool and value is not None and _OVERRIDE.match(value):
            rest.append(value)
            values[option.name] = "true"
    overrides, places = [], list(positionals)
    for token in rest:
        if token.startswith("-"):
            close = difflib.get_close_matches(token.partition("=")[0], [*flags, "--config"], n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise UserError(f"unknown flag {token}{hint}; --help lists all flags and keys")
        if places and not _OVERRIDE.match(token):
            values[places.pop(0).name] = token
        else:
            overrides.append(token)
    return values, overrides


# ------------------------------------------------------------------------------------------------------ help


def _help_text(option: Option) -> str:
    return f"{option.meaning} ({option.written_default})".replace("%", "%%")


def _other_keys(options: Sequence[Option]) -> str:
    """Every key with its default, type and meaning, but for those that a flag has shown already."""
    further = [option for option in options if not option.flag]
    title = f"{'further ' if len(further) < len(options) else ''}keys, in the config file or as key=value"
    lines = [f"{title} (defaults in the schema):"] if further else []
    for option in further:
        lines.append(f"  {option.name}={option.written_default.replace(' ', '')}")
        lines += textwrap.wrap(f"{option.meaning} ({_type_name(option.hint)})", 106, initial_indent=" " * 8)
    return "\n".join(lines)


def _type_name(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"\w+\.", "", name)
