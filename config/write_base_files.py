"""Writes the base files of this folder, which show every option with its default and meaning, from the schema.

python -m config.write_base_files
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from config.schema.autoencoder import AutoencoderConfig
from config.schema.control import ControlledGenerationConfig, ControlNetConfig
from config.schema.data import PreprocessConfig
from config.schema.diffusion import BiFlowNetConfig, BiFlowNetMultiresConfig, GenerationConfig
from config.schema.option import Option, options_of

COMMENT_COLUMN = 34
LINE_LENGTH = 120


@dataclass(frozen=True)
class BaseFile:
    """head: the file's first lines. inherited: keys that come from its defaults list."""

    name: str
    schema: type
    head: str
    inherited: tuple[str, ...] = ()

    def text(self) -> str:
        """The whole file: head, then keys under the headings of their sections, files first."""
        lines = ["# Written by config/write_base_files.py from the schema.", self.head.strip()]
        for part, sections in self._sections().items():
            lines += ["", f"{part}:"] if part else []
            indent = "  " if part else ""
            for section in sorted(sections, key=lambda name: name != "Files"):
                lines += [] if lines[-1].endswith(":") else [""]
                lines += [f"{indent}# --- {section}"] if section else []
                lines += [line for option in sections[section] for line in _lines(option, indent)]
        return "\n".join(lines) + "\n"

    def _sections(self) -> dict[str, dict[str | None, list[Option]]]:
        """Part of the file ("model"; "" where there are none) -> section -> its options."""
        parts: dict[str, dict[str | None, list[Option]]] = {}
        section = None
        for option in options_of(self.schema):
            if option.name in self.inherited:
                continue
            part = option.name.rpartition(".")[0]
            section = option.section or (section if part in parts else None)
            parts.setdefault(part, {}).setdefault(section, []).append(option)
        return parts


def _lines(option: Option, indent: str) -> list[str]:
    value = f"{indent}{option.name.rpartition('.')[2]}: {option.written_default}"
    first, *further = textwrap.wrap(option.meaning, LINE_LENGTH - COMMENT_COLUMN - 2)
    return [f"{value:{COMMENT_COLUMN - 1}} # {first}", *(f"{'':{COMMENT_COLUMN}}# {line}" for line in further)]


BASE_FILES = (
    BaseFile(
        "base_cfg.yaml",
        AutoencoderConfig,
        """
# Every key of the Patch-Volume autoencoder with its default. The other files are short diffs over this one:
#   defaults: [base_cfg, _self_]
# The generator's and the discriminator's optimiser steps are counted together.""",
    ),
    BaseFile(
        "BiFlowNet_base.yaml",
        BiFlowNetConfig,
        """
# Every key of the latent diffusion training with its default; the keys are the flags of
# train/train_BiFlowNet_SingleRes.py with underscores. A flag on the command line wins over this file.""",
    ),
    BaseFile(
        "BiFlowNet_multires_base.yaml",
        BiFlowNetMultiresConfig,
        """
# Every key of the latent diffusion training at several resolutions with its default; the keys are the flags of
# train/train_BiFlowNet_MultiRes.py with underscores. A flag on the command line wins over this file.""",
    ),
    BaseFile(
        "ControlNet_base.yaml",
        ControlNetConfig,
        """
# Every key of a ControlNet's training with its default; the keys are the flags of train/train_ControlNet.py with
# underscores. A flag on the command line wins over this file.""",
    ),
    BaseFile(
        "generation_base.yaml",
        GenerationConfig,
        """
# Every key of class-conditional generation with its default; the keys are the flags of
# evaluation/class_conditional_generation.py with underscores. A flag on the command line wins over this file.
# Use generation_8x.yaml or generation_4x.yaml, which hold the class table.""",
    ),
    BaseFile(
        "controlled_base.yaml",
        ControlledGenerationConfig,
        """
# Every key of controlled generation with its default; the keys are the flags of evaluation/controlled_generation.py
# with underscores. A flag on the command line wins over this file.""",
    ),
    BaseFile(
        "preprocess.yaml",
        PreprocessConfig,
        """
# Every key of preprocessing with its default; the keys are the flags of dataset/preprocess.py with underscores. The
# presets are the classes of the paper: for classes of your own start a file with `defaults: [preprocess, _self_]` and
# give it a table `classes` like that of classes_8x.yaml; generation takes the same table.
defaults: [classes_8x, _self_]    # the class table: downsample and classes""",
        inherited=("downsample", "classes"),
    ),
)


def main() -> None:
    for base in BASE_FILES:
        Path(__file__).with_name(base.name).write_text(base.text(), encoding="utf-8")


if __name__ == "__main__":
    main()
