"""The command line of every script: `--config FILE`, the public flags, then `key=value` overrides.

A flag wins over an override, an override over the config file, the file over the schema's default.
"""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from common.errors import UserError
from config.loading import CONFIG_FOLDER, load_config

_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Flag:
    """A public flag and the key it sets; `--ddim_steps` and `--ddim-steps` are the same flag.

    name: as published, with its dashes. key: key of a flat schema; None = the name with underscores.
    """

    name: str
    key: str | None = None

    @property
    def target(self) -> str:
        return self.key or self.name.lstrip("-").replace("-", "_")


def _flags(names: str) -> tuple[Flag, ...]:
    return tuple(Flag(f"--{name}") for name in names.split())


PREPROCESS_FLAGS = _flags(
    "input output-dir preset name class-id select assume-orientation spacing size multiple interpolation modality "
    "window percentiles num-workers dry-run"
)
LATENT_FLAGS = _flags("data-path AE-ckpt batch-size num-workers device")
BIFLOWNET_FLAGS = _flags(
    "data-path results-dir loss-type volume-channels timesteps model-dim dim-mults use-attn patch-size num-dit "
    "enable_amp model AE-ckpt num-classes epochs global-seed num-workers batch-size resolution log-every ckpt-every "
    "ckpt vq-size max-steps run-name device channels-last compile gradient-checkpointing"
)
GENERATION_FLAGS = (Flag("--classes", "class_names"),) + _flags(
    "AE-ckpt model-ckpt output-dir timesteps model-dim patch-size num-dit dim-mults use-attn sampling-strategy "
    "ddim_steps num-classes loss-type volume-channels vq-size seed num-samples guidance-scale eta batch-size device "
    "denormalize resolution spacing seeds requests output-dtype decoding max-memory precision channels-last compile"
)
_EVALUATION = "output-dir cache-dir weights-dir real-range exclude-unreadable num-resamples num-workers seed device "
RECONSTRUCTION_FLAGS = _flags(_EVALUATION + "data AE-ckpt lpips max-memory num-pictures")
GENERATION_METRICS_FLAGS = _flags(
    _EVALUATION + "networks slices batch-size num-pairs num-halvings real generated training generated-range resample "
    "ignore-spacing neighbours num-pictures"
)
VALIDITY_FLAGS = _flags(_EVALUATION + "networks slices batch-size num-pairs num-halvings real other AE-ckpt")


def parse_command_line(
    argv: Sequence[str] | None,
    schema: type,
    default_config: str | None,
    description: str,
    flags: Sequence[Flag] = (),
) -> DictConfig:
    """Reads a command line into a checked config.

    Args:
        argv: arguments without the program's name; None = those of this process.
        schema: dataclass of `config/schema.py`; flags need a flat one.
        default_config: file of `config/` used without `--config`; None = the schema's defaults.
        description: first lines of `--help`.
        flags: the script's public flags.

    Raises:
        UserError: in one line, whatever is wrong with the command line or the config.
        SystemExit: after `--help`.
    """
    argv = [_canonical(token, flags) for token in (sys.argv[1:] if argv is None else argv)]
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--config FILE] [flags] [key=value ...]",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    parser.add_argument("--config", metavar="FILE", help=f"YAML file (default: {default_config or 'none'})")
    hints = get_type_hints(schema)
    texts = {name: f"{meaning} ({default})".replace("%", "%%") for name, _, default, meaning in _key_rows(schema)}
    for flag in flags:
        parser.add_argument(flag.name, dest=flag.target, help=texts[flag.target], **_arity(hints[flag.target]))
    given, rest = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(given).items() if value is not None}
    if given.pop("help"):
        parser.epilog = _other_keys(schema, {flag.target for flag in flags})
        parser.print_help()
        raise SystemExit(0)
    path = given.pop("config", None) or (CONFIG_FOLDER / default_config if default_config else None)
    values, overrides = _split_overrides(given, rest, hints, flags)
    return load_config(schema, path, overrides, values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all flags and keys")


def _canonical(token: str, flags: Sequence[Flag]) -> str:
    """The published spelling of a flag that was written with other dashes or underscores."""
    head, equals, value = token.partition("=")
    if not head.startswith("--"):
        return token
    for flag in flags:
        if flag.name.replace("_", "-") == head.replace("_", "-"):
            return f"{flag.name}{equals}{value}"
    return token


def _arity(hint: Any) -> dict[str, Any]:
    """How many words a flag takes: lists one or more, a switch none or true/false, everything else one."""
    if any(get_origin(kind) is list for kind in (hint, *get_args(hint))):
        return {"nargs": "+", "metavar": "N"}
    if hint is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    return {"metavar": "VALUE"}


def _split_overrides(
    given: Mapping[str, Any], rest: Sequence[str], hints: Mapping[str, Any], flags: Sequence[Flag]
) -> tuple[dict[str, Any], list[str]]:
    """Separates the flags' values from `key=value` overrides, also those that a list or a switch swallowed."""
    values, overrides = dict(given), []
    for name, value in given.items():
        if isinstance(value, list):
            overrides += [item for item in value if _OVERRIDE.match(item)]
            values[name] = [item for item in value if not _OVERRIDE.match(item)]
            if not values[name]:
                published = next(flag.name for flag in flags if flag.target == name)
                raise UserError(
                    f"argument {published}: expected at least one argument; --help lists all flags and keys"
                )
        elif hints[name] is bool and _OVERRIDE.match(value):
            overrides.append(value)
            values[name] = "true"
    for token in rest:
        if token.startswith("-"):
            names = [flag.name for flag in flags] + ["--config"]
            close = difflib.get_close_matches(token.partition("=")[0], names, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise UserError(f"unknown flag {token}{hint}; --help lists all flags and keys")
        overrides.append(token)
    return values, overrides


# ------------------------------------------------------------------------------------------------------ help


def _other_keys(schema: type, shown: Collection[str]) -> str:
    """Every key with its default, type and meaning, but for those that a flag has shown already."""
    lines = [f"{'further ' if shown else ''}keys, in the config file or as key=value (defaults in the schema):"]
    for dotted, hint, default, meaning in _key_rows(schema):
        if dotted not in shown:
            lines += [f"  {dotted}={default}", *textwrap.wrap(f"{meaning} ({hint})", 106, initial_indent=" " * 8)]
    return "\n".join(lines)


def _key_rows(schema: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key of a schema."""
    rows = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        hint = hints[item.name]
        if is_dataclass(hint):
            rows += _key_rows(hint, f"{prefix}{item.name}.")
            continue
        default = item.default_factory() if item.default is MISSING else item.default
        name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
        shown = OmegaConf.to_yaml(OmegaConf.create([default])).removeprefix("- ").strip()
        shown = str(default).replace(" ", "") if isinstance(default, list) else shown
        rows.append((prefix + item.name, re.sub(r"\w+\.", "", name), shown, item.metadata.get("meaning", "")))
    return rows
