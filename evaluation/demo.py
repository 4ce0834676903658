"""The whole pipeline in one command, on phantoms: data, autoencoder, latents, diffusion, generation, evaluation.

    python evaluation/demo.py --output-dir demo            about 17 minutes on two CPU cores; `make demo` calls it
    python evaluation/demo.py --output-dir demo --short    a few steps of each: shows that every stage runs

Each stage is the real script with a small config of config/demo/. The same command again goes on where it stopped.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import UserError  # noqa: E402
from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.evaluation import DemoConfig  # noqa: E402

PHANTOMS = {False: (40, 16), True: (6, 6)}  # short? -> training and held-out phantoms per class
# What --short changes; everything else is as in the demo proper.
SHORT = {
    "stage1": [
        "model.max_steps=12",
        "model.val_every=6",
        "model.discriminator_iter_start=6",
        "model.codebook_init_step=2",
    ],
    "stage2": ["model.max_steps=2", "model.val_every=2", "model.discriminator_iter_start=0"],
    "biflownet": ["max_steps=4", "batch_size=2", "ckpt_every=2", "preview_steps=2"],
    "generation": ["num_samples=2", "ddim_steps=2"],
}


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline."""

    title: str
    command: list[str]  # without the interpreter


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages, then the report; ends with exit status 1 where the report misses its targets."""
    cfg = parse_command_line(argv, DemoConfig, None, __doc__)
    from common.checkpoint_files import newest_checkpoint
    from evaluation.results.demo_figures import write_report

    output = Path(cfg.output_dir).resolve()
    begin = time.monotonic()

    paths = DemoPaths(output)
    stages = autoencoder_stages(paths, cfg.short)
    for number, stage in enumerate(stages, start=1):
        run_stage(stage, number)
    model_ckpt = newest_checkpoint(paths.biflownet / "checkpoints")
    if model_ckpt is None:
        raise UserError(f"{paths.biflownet}: BiFlowNet's training left no checkpoint")
    last = [generation_stage(paths, model_ckpt, cfg.short), *evaluation_stages(paths, cfg.short)]
    for number, stage in enumerate(last, start=len(stages) + 1):
        run_stage(stage, number)

    announce(f"[{len(stages) + len(last) + 1}] figures on phantoms that were not trained on")
    passed = write_report(
        output,
        phantoms=paths.phantoms,
        stage_checkpoints=(paths.stage1_ckpt, paths.stage2_ckpt),
        generated=paths.generated / "seed_0",
        judge=not cfg.short,
    )
    announce(f"done in {(time.monotonic() - begin) / 60:.1f} minutes: {output / 'demo.png'}, {output / 'demo.json'}")
    announce(f"report: {paths.evaluation / 'report.html'}")
    if not passed:
        raise UserError(f"the demo missed a target, see the table above and {output / 'demo.json'}")


@dataclass(frozen=True)
class DemoPaths:
    """Where each stage puts its results."""

    output: Path

    @property
    def phantoms(self) -> Path:
        return self.output / "phantoms"

    @property
    def stage1_ckpt(self) -> Path:
        return self.output / "stage1" / "checkpoints" / "last.ckpt"

    @property
    def stage2_ckpt(self) -> Path:
        return self.output / "stage2" / "checkpoints" / "last.ckpt"

    @property
    def biflownet(self) -> Path:
        return self.output / "biflownet"

    @property
    def generated(self) -> Path:
        return self.output / "generated"

    @property
    def evaluation(self) -> Path:
        return self.output / "evaluation"


def autoencoder_stages(paths: DemoPaths, short: bool) -> list[Stage]:
    """Everything up to the trained diffusion model."""
    training, held_out = PHANTOMS[short]
    changed = SHORT if short else {name: [] for name in SHORT}
    data = f"dataset.root_dir={paths.phantoms / 'PatchVolume_data.json'}"
    return [
        Stage(
            "phantoms: chests as CT, heads as MR",
            ["dataset/phantoms.py", "--output-dir", f"{paths.phantoms}"]
            + ["--num-per-class", f"{training}", "--num-held-out", f"{held_out}"],
        ),
        Stage(
            "autoencoder, stage 1: patches",
            ["train/train_PatchVolume.py", "--config", "config/demo/PatchVolume.yaml", data]
            + [f"model.default_root_dir={paths.output / 'stage1'}", *changed["stage1"]],
        ),
        Stage(
            "autoencoder, stage 2: whole volumes",
            ["train/train_PatchVolume_stage2.py", "--config", "config/demo/PatchVolume_s2.yaml", data]
            + [f"model.default_root_dir={paths.output / 'stage2'}"]
            + [f"model.resume_from_checkpoint={paths.stage1_ckpt}", *changed["stage2"]],
        ),
        Stage(
            "latents of all phantoms",
            ["train/generate_training_latent.py", "--data-path", f"{paths.phantoms / 'Singleres_dataset.json'}"]
            + ["--AE-ckpt", f"{paths.stage2_ckpt}", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"],
        ),
        Stage(
            "BiFlowNet, two processes under torchrun",
            [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "train/train_BiFlowNet_SingleRes.py",
            ]
            + ["--config", "config/demo/BiFlowNet.yaml", "--AE-ckpt", f"{paths.stage2_ckpt}"]
            + ["--data-path", f"{paths.phantoms / 'Singleres_latents.json'}"]
            + ["--results-dir", f"{paths.output}", "--run-name", paths.biflownet.name, *changed["biflownet"]],
        ),
    ]


def generation_stage(paths: DemoPaths, model_ckpt: Path, short: bool) -> Stage:
    """Sampling of every class with the trained models."""
    return Stage(
        "class-conditional generation",
        ["evaluation/class_conditional_generation_4x.py", "--config", "config/demo/generation.yaml"]
        + ["--AE-ckpt", f"{paths.stage2_ckpt}", "--model-ckpt", f"{model_ckpt}"]
        + ["--output-dir", f"{paths.generated}", "--seed", "0", *(SHORT["generation"] if short else [])],
    )


def evaluation_stages(paths: DemoPaths, short: bool) -> list[Stage]:
    """Figures that one can publish, and the page that shows them; phantoms' voxels have no common size in mm."""
    held_out = f"{paths.phantoms / 'held_out' / 'PatchVolume_data.json'}"
    common = ["--output-dir", f"{paths.evaluation}", "--num-workers", "0", "--device", "cpu"]
    features = [*common, "--slices", "4", "--num-resamples", "100"]
    # What a few steps of training leave of an autoencoder is no nearer to real volumes than another class is.
    judged = [] if short else ["--AE-ckpt", f"{paths.stage2_ckpt}"]
    return [
        Stage(
            "evaluation: reconstruction by both stages",
            ["evaluation/reconstruction.py", "--data", held_out, *common]
            + ["--AE-ckpt", f"{paths.stage1_ckpt}", f"{paths.stage2_ckpt}"],
        ),
        Stage(
            "evaluation: generated against real volumes",
            ["evaluation/generation_metrics.py", "--real", held_out, "--generated", f"{paths.generated}"]
            + ["--training", f"{paths.phantoms / 'PatchVolume_data.json'}", "--ignore-spacing", *features],
        ),
        Stage(
            "evaluation: do the distances see what they should?",
            ["evaluation/validity.py", "--real", held_out, *features, *judged],
        ),
        Stage(
            "evaluation: report",
            ["evaluation/report.py", "--input-dir", f"{paths.evaluation}", "--title", "Demo on phantoms"],
        ),
    ]


def run_stage(stage: Stage, number: int) -> None:
    """Run one command in the project's folder; its failure ends the demo with the command to repeat."""
    announce(f"[{number}] {stage.title}")
    processes = 2 if "torch.distributed.run" in stage.command else 1
    threads = max(1, (os.cpu_count() or 1) // processes)
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, *stage.command], cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": f"{threads}"}
    )
    if done.returncode:
        raise UserError(
            f"stage {number} ({stage.title}) ended with exit status {done.returncode}; what it said stands above. "
            "`make demo` again goes on with this stage"
        )
    announce(f"[{number}] {time.monotonic() - begin:.0f} s")


def announce(line: str) -> None:
    """A clear line in the output of all stages."""
    sys.stdout.write(f"== {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(run_script(main))
