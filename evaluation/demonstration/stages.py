"""The commands of the demo: one real script after the other, and where each puts its results."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.child import LAUNCHER, run_child
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

PHANTOMS = {False: (40, 4, 16), True: (8, 2, 6)}  # short? -> phantoms per class to train, validate and hold out
SLABS = 0.5  # chests of half the height, as a share of these
# What --short changes; everything else is as in the demo proper.
SHORT = {
    "stage1": ["model.max_steps=12", "model.val_every=6", "model.discriminator_iter_start=6"]
    + ["model.codebook_init_step=2"],
    "stage2": ["model.max_steps=2", "model.val_every=2", "model.discriminator_iter_start=0"],
    "biflownet": ["max_steps=4", "ckpt_every=2", "preview_steps=2"],
    "generation": ["num_samples=2", "ddim_steps=2"],
}


class DemoPaths:
    """Where each stage puts its results, below the folder of the demo."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.phantoms = output / "phantoms"
        self.stage1_ckpt = output / "stage1" / "checkpoints" / "last.ckpt"
        self.stage2_ckpt = output / "stage2" / "checkpoints" / "last.ckpt"
        self.biflownet = output / "biflownet"
        self.generated = output / "generated"
        self.evaluation = output / "evaluation"


Stages = dict[str, list[str]]  # title -> command, without the interpreter


def training_stages(paths: DemoPaths, short: bool) -> Stages:
    """Everything up to the trained diffusion model."""
    training, validation, held_out = PHANTOMS[short]
    changed = SHORT if short else {name: [] for name in SHORT}
    data = f"dataset.root_dir={paths.phantoms / 'PatchVolume_data.json'}"
    launch = [LAUNCHER, "--standalone", "--nproc-per-node", "2"]
    return {
        "phantoms: chests as CT in two sizes, heads as MR": (
            ["dataset/phantoms.py", "--output-dir", f"{paths.phantoms}", "--slabs", f"{SLABS}"]
            + ["--num-per-class", f"{training}", "--num-validation", f"{validation}", "--num-held-out", f"{held_out}"]
        ),
        "autoencoder, stage 1: patches": (
            ["train/train_PatchVolume.py", "--config", "config/demo/PatchVolume.yaml", data]
            + [f"model.default_root_dir={paths.output / 'stage1'}", *changed["stage1"]]
        ),
        "autoencoder, stage 2: whole volumes": (
            ["train/train_PatchVolume_stage2.py", "--config", "config/demo/PatchVolume_s2.yaml", data]
            + [f"model.default_root_dir={paths.output / 'stage2'}"]
            + [f"model.resume_from_checkpoint={paths.stage1_ckpt}", *changed["stage2"]]
        ),
        "latents of all phantoms": (
            ["train/generate_training_latent.py", "--data-path", f"{paths.phantoms / 'Singleres_dataset.json'}"]
            + ["--AE-ckpt", f"{paths.stage2_ckpt}", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
        ),
        "BiFlowNet on both sizes, two processes": (
            [*launch, "train/train_BiFlowNet_MultiRes.py", "--config", "config/demo/BiFlowNet_multires.yaml"]
            + ["--AE-ckpt", f"{paths.stage2_ckpt}", "--data-path", f"{paths.phantoms / 'Singleres_latents.json'}"]
            + ["--results-dir", f"{paths.output}", "--run-name", paths.biflownet.name, *changed["biflownet"]]
        ),
    }


def evaluation_stages(paths: DemoPaths, model_ckpt: Path, short: bool) -> Stages:
    """Sampling of every class with the trained models, figures that one can publish, and the page that shows them.

    Phantoms' voxels have no common size in mm.
    """
    held_out, training = (f"{paths.phantoms / 'split.json'}:{side}" for side in ("held_out", "training"))
    common = ["--output-dir", f"{paths.evaluation}", "--num-workers", "0", "--device", "cpu"]
    features = [*common, "--slices", "4", "--num-resamples", "100"]
    return {
        "class-conditional generation": (
            ["evaluation/class_conditional_generation_4x.py", "--config", "config/demo/generation.yaml"]
            + ["--AE-ckpt", f"{paths.stage2_ckpt}", "--model-ckpt", f"{model_ckpt}"]
            + ["--output-dir", f"{paths.generated}", "--seed", "0", *(SHORT["generation"] if short else [])]
        ),
        "evaluation: reconstruction by both stages": (
            ["evaluation/reconstruction.py", "--data", held_out, *common]
            + ["--AE-ckpt", f"{paths.stage1_ckpt}", f"{paths.stage2_ckpt}"]
        ),
        "evaluation: generated against real volumes": (
            ["evaluation/generation_metrics.py", "--real", held_out, "--generated", f"{paths.generated}"]
            + ["--training", training, "--ignore-spacing", *features]
        ),
        "evaluation: report": (
            ["evaluation/report.py", "--input-dir", f"{paths.evaluation}", "--title", "Demo on phantoms"]
        ),
    }


def run_stage(number: int, title: str, command: Sequence[str], again: str = "`make demo` again") -> None:
    """Run one command in the project's folder; its failure ends the demo with the command to repeat."""
    announce(f"[{number}] {title}")
    begin = time.monotonic()
    status = run_child(command, processes=2 if LAUNCHER in command else 1, folder=ROOT)
    if status:
        raise UserError(
            f"stage {number} ({title}) ended with exit status {status}; what it said stands above. "
            f"{again} goes on with this stage"
        )
    announce(f"[{number}] {time.monotonic() - begin:.0f} s")


def announce(line: str) -> None:
    sys.stdout.write(f"== {line}\n")
    sys.stdout.flush()
