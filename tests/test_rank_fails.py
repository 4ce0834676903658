"""One of two processes fails: it says why and leaves, and the other follows, in every script that computes in several.

On GPUs (nccl) destroying a group waits for the peers, and a collective operation whose partner is gone waits for ever.
On CPUs (gloo) neither does; here both are made to.
"""

import os
import subprocess
import sys
from pathlib import Path

import autoencoder_runs
import biflownet_runs
import evaluation_sets
import generation_models
import latent_runs
import pytest

from config.loading import save_config

ROOT = Path(__file__).parents[1]
TIME_LIMIT_S = 100  # far above what a run takes, and below torch's time-outs
DRIVER = """
import importlib, os, runpy, sys, time
from datetime import timedelta
import torch.distributed as dist
from common import launched
from common.errors import UserError

def as_nccl(collective):
    def run(*args, **options):
        try:
            return collective(*args, **options)
        except RuntimeError:
            time.sleep(600)
    return run

for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier"):
    setattr(dist, name, as_nccl(getattr(dist, name)))

def destroy():
    store = dist.distributed_c10d._get_default_store()
    store.set("leaving " + os.environ["RANK"], "")
    store.wait(["leaving 0", "leaving 1"], timedelta(seconds=600))

dist.destroy_process_group = destroy
launched.GRACE_S = 1.0

def fail(*args, **options):
    raise (UserError if kind == "UserError" else ZeroDivisionError)("emulated")

rank, target, kind = sys.argv[1:4]
if os.environ["RANK"] == rank:
    module, name = target.split(":")
    setattr(importlib.import_module(module), name, fail)
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """Of each script a command that ends well by itself; FOLDER stands for one of the test's own."""
    folder = tmp_path_factory.mktemp("ranks")
    volumes = autoencoder_runs.make_data(folder / "volumes")
    latents = biflownet_runs.make_latents(folder / "latents")
    to_encode = latent_runs.make_dataset(folder / "encode")
    (folder / "models").mkdir()
    models = generation_models.save_models(folder / "models")
    cfg = generation_models.config(models, folder / "out", device="cpu")
    save_config(cfg, folder / "models")
    evaluation_sets.write_three(folder / "sets")
    stage_1 = ["--config", "config/demo/PatchVolume.yaml", *autoencoder_runs.TINY, f"dataset.root_dir={volumes}"]
    return {
        "training": ["train/train_BiFlowNet_SingleRes.py", *biflownet_runs.arguments(latents, folder / "results")],
        "autoencoder": [
            "train/train_PatchVolume.py", *stage_1, f"model.default_root_dir={folder / 'stage1'}",
            "model.accelerator=cpu", "model.max_steps=2",
        ],
        "encoding": [
            "train/generate_training_latent.py", "--data-path", str(to_encode), "--AE-ckpt",
            str(models / "ae.ckpt"), "--num-workers", "0", "--device", "cpu", "--batch-size", "1",
        ],
        "generation": [
            "evaluation/class_conditional_generation_4x.py", "--config", str(folder / "models" / "config.yaml"),
            "--output-dir", "FOLDER",
        ],
        "metrics": [
            "evaluation/generation_metrics.py", "--real", str(folder / "sets" / "real"), "--generated",
            str(folder / "sets" / "generated"), "--output-dir", str(folder / "figures"), *evaluation_sets.FAST,
        ],
    }  # fmt: skip


CASES = [
    ("training", "train.diffusion.training:clip_gradients", "UserError"),
    ("autoencoder", "AutoEncoder.model.adversarial_training:learning_rate_factor", "UserError"),
    ("encoding", "train.latents.encoding:encode", "UserError"),
    ("generation", "evaluation.generation.run:decode", "UserError"),
    ("metrics", "evaluation.comparison.pairs:_compare_pairs", "ZeroDivisionError"),
]


@pytest.mark.parametrize(
    ("script", "target", "kind", "rank"),
    # The last three leave in one way: which of their ranks fails makes no difference but to the minutes of these tests.
    [(*case, 1) for case in CASES]
    + [(*case, 0) for case in CASES[:2]]
    + [pytest.param(*case, 0, marks=pytest.mark.slow) for case in CASES[2:]],
)
def test_the_one_that_fails_says_why_and_both_end(tmp_path, commands, script, target, kind, rank):
    (tmp_path / "driver.py").write_text(DRIVER)
    launch = [sys.executable, "train/launch.py", "--standalone", "--nproc-per-node", "2", str(tmp_path / "driver.py")]
    done = subprocess.run(
        [*launch, str(rank), target, kind, *(str(tmp_path) if w == "FOLDER" else w for w in commands[script])],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIME_LIMIT_S,
    )
    said = "error: emulated" if kind == "UserError" else "ZeroDivisionError: emulated"
    assert done.returncode == (2 if kind == "UserError" else 1), done.stderr
    assert done.stderr.count(said) == 1, done.stderr  # torch marks the lines of a traceback with the rank
