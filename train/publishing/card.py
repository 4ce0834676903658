"""A model card: README.md as the Hugging Face hub shows it, from checkpoints and results of evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.errors import UserError
from common.tensor_files import SUFFIX
from dataset.volumes.index import read_json_object

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
RESULTS = "3d-meddiffusion/evaluation/"  # what the schema of results begins with; docs/evaluation.md has their keys
RESULTS_VERSION = 1
MEMORISATION = ("nearer than held-out", "nearest distance ratio")


def write_card(cfg: DictConfig, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The card's text. parts: what `exporting.published` made of each checkpoint, by its kind.

    UserError: results that are none, a class table for another compression.
    """
    from huggingface_hub import ModelCard, ModelCardData

    factors = parts["autoencoder"]["hyper_parameters"]["cfg"]["model"]["downsample"] if "autoencoder" in parts else []
    if cfg.classes and factors and factors[0] != cfg.downsample:
        found = f"is for {cfg.downsample}x, the autoencoder compresses by {factors[0]}x"
        raise UserError(f"class_table: {cfg.class_table} {found}: give another")
    figures = [row for path in cfg.results for row in read_figures(path)]
    head = ModelCardData(license=cfg.licence, tags=["medical-imaging", "3d", "latent-diffusion", "safetensors"])
    args = [vars(parts[kind]["args"]) for kind in ("biflownet", "controlnet") if kind in parts]
    options = args[0] if args else {}
    card = ModelCard.from_template(
        head,
        template_path=str(TEMPLATE),
        title=cfg.title or Path(cfg.output_dir).absolute().name,
        data=cfg.data,
        files=[_file_row(kind, content) for kind, content in parts.items()],
        kinds=list(parts),
        classes=[_class_row(cfg, row) for row in cfg.classes],
        num_classes=options.get("num_classes"),
        grids=_grids(options),
        attributes=[_attribute(row) for row in options.get("attributes") or []],
        hints=[f"{row['name']} ({row['kind']})" for of_kind in args for row in of_kind.get("hints") or []],
        figures=[row for row in figures if row["metric"] not in MEMORISATION],
        memorisation=[row for row in figures if row["metric"] in MEMORISATION],
    )
    return card.content


def read_figures(path: str) -> list[dict[str, str]]:
    """The rows of a KIND.json for the card. UserError: another file, or one of another version."""
    content = read_json_object(Path(path))
    if not str(content.get("schema")).startswith(RESULTS) or not isinstance(content.get("figures"), list):
        raise UserError(f"results: {path}: not a result of the evaluation scripts, e.g. generation.json: give one")
    if content.get("schema_version") != RESULTS_VERSION:
        raise UserError(f"results: {path}: schema_version is {content.get('schema_version')}, this code reads 1")
    return [_figure_row(figure) for figure in content["figures"]]


def _figure_row(figure: Mapping[str, Any]) -> dict[str, str]:
    value, interval, floor = figure["value"], figure.get("interval"), figure.get("floor")
    unit = f" {figure['unit']}" if figure.get("unit") else ""
    row = {
        "class": figure["group"],
        "metric": figure["metric"],
        "of": ", ".join(filter(None, (figure.get("network"), figure.get("model")))),
        "value": "–" if value is None else f"{value:.4g}{unit}",
        "interval": "–" if not interval or None in interval else f"{interval[0]:.4g} to {interval[1]:.4g}",
        "num": ", ".join(f"{count} {name}" for name, count in figure["num"].items()),
        "floor": "–" if not floor or floor["value"] is None else f"{floor['value']:.4g} ({floor['num']})",
    }
    return {name: text.replace("|", "\\|") for name, text in row.items()}


def _file_row(kind: str, content: Mapping[str, Any]) -> dict[str, str]:
    weights = content["state_dict"] if kind == "autoencoder" else content["ema"]
    count = sum(value.numel() for value in weights.values()) / 1e6
    steps = content.get("step", content.get("global_step"))
    about = [f"{count:.1f} million numbers"] + ([] if steps is None else [f"{steps:,} optimiser steps"])
    if kind == "autoencoder":
        model = content["hyper_parameters"]["cfg"]["model"]
        factors = "×".join(str(factor) for factor in model["downsample"])
        about += [f"compresses by {factors}", f"{model['embedding_dim']} channels", f"{model['n_codes']} codes"]
    return {"name": f"{kind}{SUFFIX}", "kind": kind, "about": ", ".join(about)}


def _class_row(cfg: DictConfig, row: DictConfig) -> dict[str, str]:
    sizes = []
    for (d, h, w), spacing_mm in zip(row.grids, row.spacings_mm, strict=True):
        voxels = "×".join(str(side * cfg.downsample) for side in (h, w, d))
        sizes.append(f"{voxels} at {' × '.join(f'{mm:g}' for mm in spacing_mm)} mm")
    return {"id": str(row.id), "name": row.name, "modality": row.modality or "–", "sizes": "; ".join(sizes)}


def _grids(options: Mapping[str, Any]) -> list[str]:
    """Latent grids (z, x, y) that the network was trained on."""
    grids: Sequence[Sequence[int]] = [row["grid"] for row in options.get("buckets") or []]
    grids = grids or [grid for grid in (options.get("resolution"),) if grid]
    return ["×".join(map(str, grid)) for grid in grids]


def _attribute(row: Mapping[str, Any]) -> str:
    values = f"{row['range'][0]:g} to {row['range'][1]:g}" if row.get("range") else ", ".join(row["categories"])
    return f"{row['name']} ({values})"
