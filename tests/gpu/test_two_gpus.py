"""Two processes on two GPUs (nccl): training, SIGTERM, and one rank that fails."""

import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("nibabel", reason="training reads NIfTI files: needs nibabel")

import biflownet_runs as runs

TIME_LIMIT_S = 55


@pytest.fixture
def two_gpus(gpu) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device, two are needed")


def launch(*arguments: str) -> list[str]:
    return [sys.executable, "train/launch.py", "--standalone", "--nproc-per-node", "2", *arguments]


def options(tmp_path, *more: str) -> list[str]:
    data = runs.make_latents(tmp_path / "latents")
    return runs.arguments(data, tmp_path / "results", "device=cuda", *more)


def run_of(tmp_path):
    (run,) = (tmp_path / "results").iterdir()
    return run


def test_two_train(two_gpus, tmp_path):
    process = runs.start(launch(str(runs.SCRIPT), *options(tmp_path, "max_steps=4")))
    text = process.communicate(timeout=TIME_LIMIT_S)[0]
    assert process.returncode == 0, text
    assert runs.checkpoint(run_of(tmp_path), 4)["step"] == 4


def test_two_stop_with_a_checkpoint(two_gpus, tmp_path):
    process = runs.start(launch(str(runs.SCRIPT), *options(tmp_path, "max_steps=100000", "ckpt_every=100000")))
    end = time.monotonic() + TIME_LIMIT_S
    while not any((tmp_path / "results").glob("*/metrics.jsonl")) and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=TIME_LIMIT_S)[0]
    assert process.returncode == 128 + signal.SIGTERM, text
    assert len(list((run_of(tmp_path) / "checkpoints").glob("*.pt"))) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_one_fails_and_says_why(two_gpus, tmp_path, rank):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, runpy, sys\n"
        "from common.errors import UserError\n"
        "from train.diffusion import training\n"
        "def fail(*_): raise UserError('made up')\n"
        f"if os.environ['RANK'] == '{rank}': training.clip_gradients = fail\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = launch(str(driver), str(runs.SCRIPT), *options(tmp_path))
    process = runs.start(command, PYTHONPATH=str(runs.ROOT))
    try:
        text = process.communicate(timeout=TIME_LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 2, text
    assert text.count("error: made up") == 1, text
