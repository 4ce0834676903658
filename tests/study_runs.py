"""A small data set with its latents, and study files on it, for tests of recipe studies."""

import json
from pathlib import Path

import yaml
from configs import TINY_4X
from generation_models import CUBE, MODEL, row, save_models

from dataset import phantoms
from evaluation.recipe_study import main
from train import generate_training_latent

NAMES = ("CTChest", "MRBrain")
TRAINING = {**MODEL, "resolution": CUBE, "batch_size": 2, "num_workers": 0, "log_every": 1, "ckpt_every": 1}
AUTOENCODER = {
    "model": {**TINY_4X, "num_workers": 0, "precision": 32, "accelerator": "cpu", "discriminator_iter_start": 1}
    | {"log_every": 1, "checkpoint_every": 1, "val_every": 2, "log_volume_every": 0},
    "dataset": {"patch_size": 16},
}


def make_demo(folder: Path) -> Path:
    """Phantoms of 32³ voxels, a random autoencoder, and their latents of 8³."""
    counts = "--num-per-class 4 --num-validation 1 --num-held-out 4 --size 32".split()
    phantoms.main(["--output-dir", f"{folder / 'phantoms'}", *counts])
    save_models(folder)
    data = folder / "phantoms" / "Singleres_dataset.json"
    quiet = ["--num-workers", "0", "--device", "cpu"]
    generate_training_latent.main(["--data-path", f"{data}", "--AE-ckpt", f"{folder / 'ae.ckpt'}", *quiet])
    return folder


def write_yaml(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def study_file(demo: Path, folder: Path, **changed) -> Path:
    """A study of two variants of a diffusion model, two steps each."""
    classes = [row(label, name, CUBE) for label, name in enumerate(NAMES)]
    sampling = {"sampling_strategy": "ddim", "ddim_steps": 2, "downsample": 4, "device": "cpu", "batch_size": 4}
    content = {
        "base": str(write_yaml(folder / "training.yaml", {**TRAINING, "device": "cpu"})),
        "generation": str(write_yaml(folder / "generation.yaml", {**MODEL, **sampling, "classes": classes})),
        "data": f"{demo / 'phantoms' / 'Singleres_latents.json'}",
        "volumes": f"{demo / 'phantoms' / 'split.json'}",
        "autoencoder": f"{demo / 'ae.ckpt'}",
        "budget": {"steps": 2},
        "seeds": [0, 1],
        "variants": [{"name": "as is"}, {"name": "fast", "training": ["lr=0.1"]}],
        **{"num_samples": 3, "neighbours": 1, "slices": 2, "num_pairs": 3, "num_resamples": 20, "device": "cpu"},
    }
    return write_yaml(folder / "study.yaml", {**content, **changed})


def autoencoder_study_file(demo: Path, folder: Path, **changed) -> Path:
    """A study of two variants of an autoencoder's stage 1, two steps each."""
    base = {"defaults": ["PatchVolume_4x", "_self_"], **AUTOENCODER}
    content = {
        "stage": "autoencoder",
        "base": str(write_yaml(folder / "training.yaml", base)),
        "data": f"{demo / 'phantoms' / 'PatchVolume_data.json'}",
        "budget": {"steps": 2},
        "seeds": [0, 1],
        "variants": [{"name": "as is"}, {"name": "slow", "training": ["model.lr=1e-5"]}],
        **{"num_resamples": 20, "lpips": "off", "device": "cpu"},
    }
    return write_yaml(folder / "study.yaml", {**content, **changed})


def run(file: Path, output: Path, *more: str) -> dict:
    """study.json after the study."""
    main(["--config", f"{file}", "--output-dir", f"{output}", *more])
    return json.loads((output / "study.json").read_text())
