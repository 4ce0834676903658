"""The stages of the demo of controlled generation, and its figures on held-out phantoms."""

import json
from pathlib import Path

import torch
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from common.checkpoint_files import newest_checkpoint
from common.child import LAUNCHER
from common.errors import UserError
from common.files import write_atomically
from dataset.order.data_split import HELD_OUT
from dataset.preparation.classes import VOLUMES_JSON
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid
from dataset.volumes.volume_io import read_model_volume, read_volume
from evaluation.controlled.conditions import list_conditions
from evaluation.demonstration.figures import AT_LEAST_95, DemoFigure, Target, print_table
from evaluation.demonstration.masks import HINT, WHOLE, dice, height, lungs, moved
from evaluation.demonstration.stages import DemoPaths, Stages

# Operator, its options, class
MEASURED = {
    "ct": (["--operator", "ct", "--views", "16", "--photons", "20000"], 0),
    "mri": (["--operator", "mri", "--acceleration", "6"], 1),
}
TITLES = {"ct": "sparse-view CT", "mri": "fast MRI", "mask": "masks"}
SHORT = ["max_steps=2", "ckpt_every=2", "val_every=0"]
PICTURED = 1  # conditions of each task
GAIN_OF = {
    "ct": Target("at least 5", lambda value: value >= 5),
    "mri": Target("at least 3", lambda value: value >= 3),
}
NEAR_CEILING = Target("at least -2", lambda value: value >= -2)
AT_LEAST_08 = Target("at least 0.8", lambda value: value >= 0.8)
AT_LEAST_04 = Target("at least 0.4", lambda value: value >= 0.4)


def control_stages(demo: DemoPaths, output: Path, short: bool) -> Stages:
    """All scripts of all tasks."""
    base = newest_checkpoint(demo.biflownet / "checkpoints")
    if base is None:
        raise UserError(f"{demo.biflownet}: the demo's BiFlowNet left no checkpoint: run `make demo` first")
    stages: Stages = {}
    for task in TITLES:
        stages |= _stages_of(task, demo, base, output, short)
    return stages


def _stages_of(task: str, demo: DemoPaths, base: Path, output: Path, short: bool) -> Stages:
    place, title = output / task, TITLES[task]
    encoder = ["--AE-ckpt", f"{demo.stage2_ckpt}"]
    hint = f"hints=[{{name:{HINT},kind:mask,labels:{{{HINT}:1}}}}]" if task == "mask" else f"hints=[{{name:{task}}}]"
    stages: Stages = {}
    if task in MEASURED:
        options, class_id = MEASURED[task]
        stages[f"{title}: conditions"] = [
            "dataset/degrade.py",
            *options,
            "--classes",
            f"{class_id}",
            "--output-dir",
            f"{place}",
        ] + ["--data-path", f"{demo.phantoms / VOLUMES_JSON}"]
        stages[f"{title}: their latents"] = [
            "train/generate_training_latent.py",
            "--data-path",
            f"{place / 'volumes.json'}",
            *encoder,
        ] + ["--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    stages[f"{title}: ControlNet, two processes"] = (
        [LAUNCHER, "--standalone", "--nproc-per-node", "2", "train/train_ControlNet.py"]
        + ["--config", "config/demo/ControlNet.yaml", "--base-ckpt", f"{base}", *encoder]
        + ["--data-path", f"{place / 'latents.json'}", "--results-dir", f"{place}", "--run-name", "controlnet"]
        + [hint, "preview=false", *(SHORT if short else [])]
    )
    network = place / "controlnet" / "checkpoints" / f"ControlNet_{2 if short else 250:07d}.pt"
    generate = (
        ["evaluation/controlled_generation.py", "--config", "config/demo/controlled.yaml", *encoder]
        + [
            "--base-ckpt",
            f"{base}",
            "--model-ckpt",
            f"{network}",
        ]
        + (["--ddim_steps", "2"] if short else [])
    )
    conditions = f"{place / 'conditions.json'}:{HELD_OUT}"
    consistent = ["--data-consistency"] if task in MEASURED else []
    generate += [] if task in MEASURED else ["--control-scale", "2"]  # so short a training leaves masks too weak
    stages[f"{title}: generation"] = [*generate, "--data", conditions, "--output-dir", f"{place / 'out'}", *consistent]
    if task == "mask":
        stages[f"{title}: generation of moved ones"] = [
            *generate,
            "--data",
            f"{place / 'moved.json'}",
            "--output-dir",
            f"{place / 'out_moved'}",
        ]
    stages[f"{title}: figures"] = [
        "evaluation/paired_metrics.py",
        "--data",
        conditions,
        "--generated",
        f"{place / 'out'}",
        *encoder,
    ] + ["--output-dir", f"{place / 'evaluation'}", "--num-resamples", "100", "--device", "cpu"]
    return stages


def report_control(demo: DemoPaths, output: Path, judge: bool) -> bool:
    """Print and write the figures and the picture; whether all targets were reached (judge: False: all count as so)."""
    figures = [figure for task in MEASURED for figure in _measured_figures(task, output / task)]
    figures += _mask_figures(demo, output / "mask")
    content = {f.name: {"value": f.value, "target": f.target.words if f.target else ""} for f in figures}
    write_atomically(output / "control.json", (json.dumps(content, indent=2) + "\n").encode())
    _draw(output)
    print_table(figures, judge, "Controlled generation, measured on held-out phantoms")
    return not judge or all(figure.is_reached for figure in figures)


def _measured_figures(task: str, place: Path) -> list[DemoFigure]:
    found = json.loads((place / "evaluation" / "paired.json").read_text(encoding="utf-8"))["figures"]
    of = {(row["metric"], row["model"]): row["value"] for row in found}
    title, made, condition = TITLES[task], of["PSNR", "generated"], of["PSNR", "condition"]
    ceiling = of["PSNR", "autoencoder"]
    return [
        DemoFigure(f"{title}: PSNR of the condition, dB", condition),
        DemoFigure(f"{title}: of the condition, made to agree", of["PSNR", "condition, agreeing"]),
        DemoFigure(f"{title}: of the autoencoder's reconstruction", ceiling),
        DemoFigure(f"{title}: generated", made),
        DemoFigure(f"{title}: generated less condition", made - condition, GAIN_OF[task]),
        DemoFigure(f"{title}: generated less autoencoder", made - ceiling, NEAR_CEILING if task == "ct" else None),
        DemoFigure(f"{title}: own truth is the nearest", of["own truth is the nearest", "generated"], AT_LEAST_95),
    ]


def _mask_figures(demo: DemoPaths, place: Path) -> list[DemoFigure]:
    autoencoder = load_autoencoder(demo.stage2_ckpt)
    made, ceiling, asked, followed = [], [], [], []
    for condition in list_conditions(f"{place / 'conditions.json'}:{HELD_OUT}", [HINT]):
        mask = read_volume(condition.first).data
        made.append(dice(lungs(_volume(place / "out", condition.name)), mask))
        truth = read_model_volume(condition.truth, MODEL_RANGE).data
        ceiling.append(dice(lungs(autoencoder.reconstruct(truth[None])[0].clamp(*MODEL_RANGE)), mask))
        if condition.header.tensor_shape[0] == WHOLE:
            asked.append(height(moved(mask)) - height(mask))
            moved_lungs = lungs(_volume(place / "out_moved", condition.name))
            followed.append(height(moved_lungs) - height(lungs(_volume(place / "out", condition.name))))
    return [
        DemoFigure("masks: Dice of the autoencoder's reconstruction", sum(ceiling) / len(ceiling)),
        DemoFigure("masks: Dice of the lungs asked for", sum(made) / len(made), AT_LEAST_08),
        DemoFigure("masks: share of the way that moved lungs go", sum(followed) / sum(asked), AT_LEAST_04),
    ]


def _volume(folder: Path, name: str) -> Tensor:
    return read_model_volume(folder / "0" / f"{name}.nii.gz", MODEL_RANGE).data


def _draw(output: Path) -> None:
    """control.png: of each task conditions, what was generated, the truth."""
    rows = []
    for task, title in TITLES.items():
        name = HINT if task == "mask" else task
        conditions = list_conditions(f"{output / task / 'conditions.json'}:{HELD_OUT}", [name])
        whole = [c for c in conditions if c.header.shape[2] == max(d.header.shape[2] for d in conditions)]
        for condition in whole[:PICTURED]:
            made = output / task / "out" / str(condition.class_id) / f"{condition.name}.nii.gz"
            shown = {"condition": condition.first, "generated": made, "truth": condition.truth}
            for what, path in shown.items():
                data = read_volume(path).data
                data = 2 * data - 1 if (task, what) == ("mask", "condition") else data
                rows.append((f"{title}, {what}", list(central_slices(torch.as_tensor(data)).values())))
    save_slice_grid(output / "control.png", rows, columns=PLANES, title="Controlled generation, held-out phantoms")
