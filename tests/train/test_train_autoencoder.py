"""Training of the autoencoder through its real entry points: two stages, resume, signals, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from autoencoder_runs import ROOT, TINY, assert_same_weights, config, make_data, weights
from omegaconf import OmegaConf

from AutoEncoder.checkpoint import load_autoencoder
from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from common.files import lock_folder
from dataset.volumes.volume_io import read_volume, write_volume
from train.autoencoder import training
from train.autoencoder.training import train
from train.callbacks import VolumeLogger


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stage_1(data, tmp_path_factory) -> Path:
    """A finished stage-1 run of seven steps."""
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    train(config(data, folder, "model.max_steps=7", "model.log_volume_every=4"), stage=1)
    return folder


def test_run_folder(stage_1):
    names = sorted(path.name for path in (stage_1 / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("step-")] == [f"step-000000{step}.ckpt" for step in (2, 4, 6)]
    best = sorted(name[:12] for name in names if name.startswith("best-"))
    assert best == [f"best-000000{step}" for step in (3, 6, 7)]  # the last at the end
    assert "last.ckpt" in names
    assert OmegaConf.load(stage_1 / "config.yaml").model.max_steps == 7
    assert list((stage_1 / "logs").glob("events*"))
    split = json.loads((stage_1 / "split.json").read_text())
    assert [len(split["files"]["box"][side]) for side in ("training", "validation")] == [4, 1]
    assert (split["val_fraction"], split["split_seed"], split["subject_pattern"]) == (0.1, 0, None)
    checkpoint = load_checkpoint(stage_1 / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 7
    assert len(checkpoint["optimizer_states"]) == 2
    assert not any("perceptual" in name for name in checkpoint["state_dict"])
    logged = {path.name for path in (stage_1 / "volumes" / "train").glob("*.png")}
    assert logged == {f"step_{step:07d}.png" for step in (1, 2, 4)}
    for name in ("input", "reconstruction"):
        assert read_volume(stage_1 / "volumes" / "val" / f"step_0000003_{name}.nii.gz").data.shape == (1, 16, 16, 16)
    spacing = nib.load(stage_1 / "volumes" / "val" / "step_0000003_input.nii.gz").header.get_zooms()
    np.testing.assert_allclose(spacing, [2, 2, 3])


@pytest.mark.parametrize("stop", [3, 4])
def test_interrupted_and_resumed_equals_uninterrupted(data, stage_1, tmp_path, stop):
    """Stopped after an odd and an even step, in the middle of an epoch of two batches and at its end."""
    train(config(data, tmp_path / "run", f"model.max_steps={stop}"), stage=1)
    train(config(data, tmp_path / "run", "model.max_steps=7"), stage=1)
    assert_same_weights(weights(tmp_path / "run"), weights(stage_1))


def test_a_finished_run_is_left_alone(data, stage_1, tmp_path):
    run = shutil.copytree(stage_1, tmp_path / "run")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert train(config(data, run, "model.max_steps=7"), stage=1) == {}
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_how_the_data_are_read_may_change_when_a_run_goes_on(data, stage_1, tmp_path, capsys):
    """From the cache, then from the files: the exact cache, so that the weights are those of a run without one."""
    options = ["dataset.cache=float32", f"dataset.cache_dir={tmp_path / 'fast'}", "dataset.cache_limit_gb=1"]
    train(config(data, tmp_path / "run", "model.max_steps=4", "model.num_workers=1", *options), stage=1)
    assert "cache: building 5 of 5 volumes" in capsys.readouterr().err
    assert len(list((tmp_path / "fast").rglob("*.npy"))) == 5
    cfg = config(data, tmp_path / "run", "model.max_steps=7", "dataset.cache=none", "dataset.cache_limit_gb=1")
    train(cfg, stage=1)
    assert (
        "dataset.cache is none: dataset.cache_dir and dataset.cache_limit_gb have no effect" in capsys.readouterr().err
    )
    train(config(data, tmp_path / "plain", "model.max_steps=7", "dataset.cache=none"), stage=1)
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_the_newest_regular_checkpoints_are_kept(data, stage_1, tmp_path):
    """And the best and last ones; one that can't be read is replaced when training comes to its step."""
    run = shutil.copytree(stage_1, tmp_path / "run") / "checkpoints"
    for path in (run / "last.ckpt", *run.glob("best-000000[67]-*")):
        path.unlink()
    (run / "step-0000006.ckpt").write_bytes(b"damaged")
    best = {path.name for path in run.glob("best-*")}
    train(config(data, tmp_path / "run", "model.max_steps=7", "model.keep_checkpoints=1"), stage=1)
    assert [path.name for path in run.glob("step-*")] == ["step-0000006.ckpt"]
    assert best <= {path.name for path in run.glob("best-*")}
    assert load_checkpoint(run / "step-0000006.ckpt")["global_step"] == 6
    assert_same_weights(weights(tmp_path / "run"), weights(stage_1))


def test_resuming_from_a_named_checkpoint(data, stage_1, tmp_path):
    source = stage_1 / "checkpoints" / "step-0000004.ckpt"
    train(config(data, tmp_path / "run", "model.max_steps=7", f"model.resume_from_checkpoint={source}"), stage=1)
    assert_same_weights(weights(tmp_path / "run"), weights(stage_1))


def test_a_damaged_last_checkpoint_is_passed_over(data, stage_1, tmp_path):
    train(config(data, tmp_path / "run", "model.max_steps=4"), stage=1)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    train(config(data, tmp_path / "run", "model.max_steps=7"), stage=1)
    assert_same_weights(weights(tmp_path / "run"), weights(stage_1))


def test_stage_2_trains_the_decoder_only(data, stage_1, tmp_path):
    source = stage_1 / "checkpoints" / "last.ckpt"
    cfg = config(
        data,
        tmp_path / "run",
        "model.max_steps=4",
        "model.batch_size=1",
        "model.discriminator_iter_start=0",
        "model.log_volume_every=1",
        f"model.resume_from_checkpoint={source}",
        stage=2,
    )
    metrics = train(cfg, stage=2)
    assert {"train/recon_loss", "train/discloss", "val/recon_loss"} <= metrics.keys()
    before, after = weights(stage_1), weights(tmp_path / "run")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    # logging volumes at every step did not wake the codebook or the encoder
    assert changed == {"decoder", "post_vq_conv", "volume_discriminator"}
    load_autoencoder(tmp_path / "run" / "checkpoints" / "last.ckpt", downsample=4)


def test_bf16_trains_with_the_codebook_in_float32(data, tmp_path):
    options = ("model.precision=bf16", "model.max_steps=4")
    metrics = train(config(data, tmp_path / "run", *options), stage=1)
    assert metrics["train/recon_loss"] < 4
    state = weights(tmp_path / "run")
    assert {state[f"codebook.{name}"].dtype for name in ("embeddings", "N", "z_avg")} == {torch.float32}
    assert len(torch.unique(state["codebook.embeddings"].bfloat16().float())) < len(
        torch.unique(state["codebook.embeddings"])
    )  # codes have more digits than bf16 holds


@pytest.mark.parametrize(("steps", "epochs", "last"), [(7, 10, 7), (7, 2, 6), (-1, 2, 6), (7, -1, 7), (-1, -1, -1)])
def test_training_ends_by_steps_or_epochs(steps, epochs, last):
    cfg = OmegaConf.create({"model": {"max_steps": steps, "max_epochs": epochs}})
    assert training._last_step(cfg, steps_per_epoch=3) == last


def test_volume_logger_is_due_at_powers_of_two_and_then_regularly():
    due = [batch for batch in range(1, 3100) if VolumeLogger(Path("x"), 1500, None).is_due(batch)]
    assert due == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1500, 3000]


def other_kind(folder: Path) -> Path:
    path = folder / "other.pt"
    save_checkpoint({"model": {}, "ema": {}}, path)
    return path


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (1, ["dataset.root_dir=null"], "dataset.root_dir"),
        (1, ["dataset.root_dir=/nowhere/data.json"], "/nowhere/data.json"),
        (1, ["model.default_root_dir=null"], "model.default_root_dir"),
        (1, ["model.stage=2"], "model.stage is 2, but this script trains stage 1"),
        (2, [], "model.resume_from_checkpoint"),
        (2, ["model.resume_from_checkpoint=/nowhere.ckpt"], "/nowhere.ckpt: no such checkpoint file"),
        (2, ["model.resume_from_checkpoint={other}"], "a BiFlowNet checkpoint, expected an autoencoder"),
        (2, ["model.resume_from_checkpoint={stage_1}", "model.n_hiddens=16"], "the weights do not fit"),
        (1, ["model.perceptual_weight=1", "model.perceptual_weights={empty}"], "vgg"),
        (1, ["model.precision=16"], "model.precision is 16, which needs a GPU: take bf16 on a CPU"),
        (1, ["dataset.image_channels=3"], "dataset.image_channels is 3, but volumes are read with 1 channel"),
        (1, ["dataset.intensity_range=[0,1]"], r"lie outside the declared range \[0, 1\]"),
        (1, ["dataset.intensity_range=[-3,1]"], r"data.json: box: intensities from -1 to 0.9, only the upper half"),
    ],
)
def test_mistakes_end_in_one_line(data, stage_1, tmp_path, monkeypatch, stage, overrides, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _no_network)
    names = {"other": other_kind(tmp_path), "stage_1": stage_1 / "checkpoints" / "last.ckpt", "empty": tmp_path}
    overrides = [override.format(**names) if "{" in override else override for override in overrides]
    with pytest.raises(UserError, match=f"(?i){message}") as caught:
        train(config(data, tmp_path / "run", *overrides, stage=stage), stage=stage)
    assert "\n" not in str(caught.value)


def _no_network(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU on a machine without one")
def test_a_gpu_that_is_not_there(data, tmp_path):
    with pytest.raises(UserError, match="model.accelerator is gpu, but no CUDA device was found"):
        train(config(data, tmp_path / "run", "model.accelerator=gpu"), stage=1)


def test_other_options_for_the_same_folder_are_refused(data, stage_1):
    with pytest.raises(UserError, match=r"holds a run with other options: model.lr: 0.002 -> 0.1; add --set-anew"):
        train(config(data, stage_1, "model.lr=0.1"), stage=1)


def test_a_run_older_than_an_option_goes_on(data, stage_1, tmp_path):
    """Its configuration lacks the option, its optimisers aren't fused: it did what the default says."""
    run = shutil.copytree(stage_1, tmp_path / "run")
    cfg = OmegaConf.load(run / "config.yaml")
    del cfg.model.lr_warmup
    OmegaConf.save(cfg, run / "config.yaml")
    train(config(data, run, "model.max_steps=8", "model.channels_last=true"), stage=1)
    with pytest.raises(UserError, match="model.lr_warmup: 0 -> 2"):
        train(config(data, run, "model.lr_warmup=2"), stage=1)


def test_volumes_of_different_sizes_need_batches_of_one(data, stage_1, tmp_path):
    folder = tmp_path / "box"
    shutil.copytree(data.parent / "box", folder)
    write_volume(folder / "9.nii.gz", torch.zeros(1, 24, 16, 16), np.eye(4))
    (tmp_path / "data.json").write_text(json.dumps({"box": "box"}))
    source = stage_1 / "checkpoints" / "last.ckpt"
    cfg = config(
        tmp_path / "data.json",
        tmp_path / "run",
        "model.batch_size=2",
        "dataset.val_fraction=0",
        f"model.resume_from_checkpoint={source}",
        stage=2,
    )
    with pytest.raises(UserError, match=r"different sizes \(z x y: 16 16 16, 24 16 16\).*set model.batch_size=1"):
        train(cfg, stage=2)


def test_sigterm_saves_a_checkpoint_and_the_command_goes_on(data, stage_1, tmp_path):
    """The real script: its process group stopped by SIGTERM, killed by SIGKILL, then run to its end."""
    run = tmp_path / "run"
    common = [*TINY, f"dataset.root_dir={data}", f"model.default_root_dir={run}"]
    common += ["model.val_every=100000", "model.num_workers=1"]
    command = [sys.executable, "train/train_PatchVolume.py", "--config", "config/demo/PatchVolume.yaml", *common]

    def start(*overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *overrides],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    process = start("model.max_steps=100000")
    wait_for(run / "checkpoints" / "step-0000002.ckpt", process)
    os.killpg(process.pid, signal.SIGTERM)  # the loading process gets it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "stopped by signal 15" in stderr
    assert "Traceback" not in stderr
    step = load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]
    assert f"at step {step}: last.ckpt saved" in stderr
    assert not list((run / "checkpoints").glob("best-*"))  # no validation came first

    process = start("model.max_steps=100000")
    wait_for(run / "checkpoints" / f"step-{step + 20 - step % 2:07d}.ckpt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)

    process = start(f"model.max_steps={step + 40}")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "resuming from" in stderr
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == step + 40
    assert "Traceback" not in stderr


def test_a_second_run_in_the_same_folder_is_refused(data, stage_1):
    """And replaces nothing of the run that goes on, even where it had other options."""
    records = [(stage_1 / name).read_bytes() for name in ("config.yaml", "split.json")]
    with (
        lock_folder(stage_1, "training"),
        pytest.raises(UserError, match="another process .* is training in this folder"),
    ):
        subprocess_lock(data, stage_1)
    assert [(stage_1 / name).read_bytes() for name in ("config.yaml", "split.json")] == records


def subprocess_lock(data: Path, folder: Path) -> None:
    """Locks hold between processes: raise what a second one says."""
    script = ["train/train_PatchVolume.py", "--config", "config/demo/PatchVolume.yaml", *TINY, "model.max_steps=9"]
    paths = [f"dataset.root_dir={data}", f"model.default_root_dir={folder}", "model.log_volume_every=4"]
    done = subprocess.run([sys.executable, *script, *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    raise UserError(done.stderr.strip().splitlines()[-1])


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_two_processes_train_as_one(data, stage_1, tmp_path):
    """Two processes with one patch each are one process with two: gradients, codebook, losses.

    Without what a process does by itself: the discriminator's batch norm, and restarts from rank 0's vectors.
    """
    alone = [*TINY, "model.volume_gan_weight=0", "model.no_random_restart=true", "model.max_steps=8"]
    alone += [f"model.resume_from_checkpoint={weights_only(stage_1, tmp_path)}", f"dataset.root_dir={data}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["train/train_PatchVolume.py", "--config", "config/demo/PatchVolume.yaml", *alone, "model.batch_size=1"]
    done = subprocess.run(
        [*command, *script, f"model.default_root_dir={tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished at step 8") == 1
    train(config(data, tmp_path / "one", *alone, "model.batch_size=2"), stage=1)
    before, two, one = weights(stage_1), weights(tmp_path / "two"), weights(tmp_path / "one")
    moved = (one["encoder.conv_first.weight"] - before["encoder.conv_first.weight"]).abs().max()
    assert moved > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=0.02 * moved.item(), msg=name)


def weights_only(run: Path, folder: Path) -> Path:
    """A checkpoint that holds weights and nothing of a training run."""
    path = folder / "weights.ckpt"
    save_checkpoint({"state_dict": weights(run)}, path)
    return path


def test_stage_1_starts_from_the_weights_of_what_it_cannot_resume(data, stage_1, tmp_path, capsys):
    source = weights_only(stage_1, tmp_path)
    train(config(data, tmp_path / "run", "model.max_steps=1", f"model.resume_from_checkpoint={source}"), stage=1)
    assert "holds weights only: training starts from its weights at step 0" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 1

    other = load_checkpoint(stage_1 / "checkpoints" / "last.ckpt")
    other["optimizer_states"][0]["state"].pop(0)
    save_checkpoint(other, tmp_path / "other.ckpt")
    cfg = config(data, tmp_path / "run2", "model.max_steps=1", f"model.resume_from_checkpoint={tmp_path}/other.ckpt")
    train(cfg, stage=1)
    assert "its optimisers are those of other parameters" in capsys.readouterr().err


def test_unreadable_checkpoints_are_not_overwritten_by_a_new_start(data, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"half a checkpoint")
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        train(config(data, tmp_path / "run"), stage=1)


def test_stage_2_needs_a_codebook_that_was_started(data, tmp_path):
    source = tmp_path / "stage1"
    train(config(data, source, "model.max_steps=2", "model.codebook_init_step=50"), stage=1)
    start = f"model.resume_from_checkpoint={source / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(UserError, match="its codebook was never started from data"):
        train(config(data, tmp_path / "stage2", start, "model.batch_size=1", stage=2), stage=2)
    with pytest.raises(UserError, match="its codebook was never started from data"):
        load_autoencoder(source / "checkpoints" / "last.ckpt")
