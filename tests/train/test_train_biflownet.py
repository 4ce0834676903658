"""Training of BiFlowNet over processes and interruptions: how it stops, goes on and ends the same."""

import argparse
import os
import re
import signal
import time
from pathlib import Path

import biflownet_runs as runs
import pytest
import torch
from biflownet_runs import assert_same_training, checkpoint, crash_at

from dataset.volumes.volume_io import read_volume, write_latent
from train.diffusion import run_folder
from train.diffusion.preview import Previews
from train.loop.metrics_file import MetricsWriter
from train.train_BiFlowNet_SingleRes import main, train

TIME_LIMIT_S = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return runs.make_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def ae_ckpt(tmp_path_factory) -> Path:
    return runs.save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "ae.ckpt")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> dict:
    """Weights after six steps of batch 2 with everything on that has state, without the cache that others use."""
    return train(runs.config(data, tmp_path_factory.mktemp("uninterrupted"), cache="none", **STATEFUL))


# Everything that a resumed run could get wrong: schedule, warm-up, dropped labels, averaged weights, a second epoch.
STATEFUL = {"lr_schedule": "cosine", "lr_warmup": 3, "label_dropout": 0.5, "ema_start": 3, "ema_every": 2, "lr": 1e-3}


# ------------------------------------------------------------------------------------------------------- processes


def test_two_processes_train_as_one_with_twice_the_batch_and_stop_together(data, tmp_path):
    """SIGUSR1 to one of two nodes stops both; the same command on one goes on and ends as a single process does, and
    exactly as two nodes that nothing stops.
    """
    results, port = tmp_path / "two", 29600 + os.getpid() % 1000
    options = ("max_steps=8", "label_dropout=0.5")
    command = runs.arguments(data, results, *options)
    pair = runs.two_nodes(command, port)
    run = results / "000-BiFlowNet"
    wait_for(lambda: runs.logged_steps(run)[-1:] >= [1], pair)
    pair[1].send_signal(signal.SIGUSR1)
    outputs = [process.communicate(timeout=TIME_LIMIT_S)[0] for process in pair]
    assert [process.returncode for process in pair] == [138, 138], outputs
    assert "".join(outputs).count("SIGUSR1: stopped after step") == 1
    assert "Traceback" not in "".join(outputs)
    stopped_at = run_folder.step_of(run_folder.list_checkpoints(run)[-1])
    assert 1 <= stopped_at < 8

    launcher = runs.start(runs.torchrun(command))
    output = launcher.communicate(timeout=TIME_LIMIT_S)[0]
    assert launcher.returncode == 0, output
    assert f"step {stopped_at}" in output
    assert [folder.name for folder in results.iterdir()] == ["000-BiFlowNet"]
    assert runs.logged_steps(run) == list(range(1, 9))

    pair = runs.two_nodes(runs.arguments(data, tmp_path / "never", *options), port + 1)
    outputs = [process.communicate(timeout=TIME_LIMIT_S)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert_same_training(checkpoint(tmp_path / "never" / "000-BiFlowNet", 8), checkpoint(run, 8))

    one = train(runs.config(data, tmp_path / "one", batch_size=4, max_steps=8, label_dropout=0.5))
    ours, theirs = checkpoint(one["folder"], 8), checkpoint(run, 8)
    for entry in ("model", "ema"):
        for name, value in ours[entry].items():  # eight steps of 1e-4 move weights by up to 8e-4
            torch.testing.assert_close(theirs[entry][name], value, rtol=0, atol=2e-5, msg=f"{entry} {name}")
    assert (ours["epoch"], ours["samples_seen"]) == (theirs["epoch"], theirs["samples_seen"]) == (4, 0)


def test_killed_and_terminated_runs_end_as_if_never_interrupted(data, tmp_path, uninterrupted):
    overrides = [f"{key}={value}" for key, value in STATEFUL.items()]
    command = runs.lone(runs.arguments(data, tmp_path, *overrides))
    run = tmp_path / "000-BiFlowNet"

    process = runs.start(command)
    wait_for(lambda: run_folder.list_checkpoints(run), [process])
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIME_LIMIT_S)
    first = run_folder.step_of(run_folder.list_checkpoints(run)[-1])
    assert first < 6

    process = runs.start(command)
    wait_for(lambda: "going on" in (run / "log.txt").read_text(), [process])
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=TIME_LIMIT_S)[0]
    assert process.returncode == 143, output
    assert first < run_folder.step_of(run_folder.list_checkpoints(run)[-1]) < 6

    train(runs.config(data, tmp_path, **STATEFUL))
    assert runs.logged_steps(run) == list(range(1, 7))
    assert_same_training(checkpoint(uninterrupted["folder"], 6), checkpoint(run, 6))


def test_non_finite_loss_of_one_rank_stops_all_and_names_its_files(tmp_path):
    """One poisoned latent among ten; the rank that has it in its batch is named, and nothing hangs."""
    data = runs.make_latents(tmp_path)
    poison = data.parent / "class1_latents" / "3.nii.gz"
    write_latent(poison, 3e38 * torch.rand(4, *runs.GRID))
    process = runs.start(runs.torchrun(runs.arguments(data, tmp_path / "results")))
    output = process.communicate(timeout=TIME_LIMIT_S)[0]
    assert process.returncode != 0
    message = next(line for line in output.splitlines() if line.startswith("error: "))
    found = re.match(
        r"error: step (\d): the loss is not finite, .*?; rank ([01]): loss (nan|inf), files (.*?);", message
    )
    assert found is not None, output
    assert str(poison) in found[4]
    assert len(found[4].split(", ")) == 2  # that rank's batch and no other
    saved = run_folder.list_checkpoints(tmp_path / "results" / "000-BiFlowNet")
    assert all(run_folder.step_of(path) < int(found[1]) for path in saved)


def wait_for(condition, processes) -> None:
    """Until the condition holds; fails with the output of a process that ended before."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:  # a file that is not there yet
            pass
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    pytest.fail("waited in vain")


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("crash_step", [4, 6])
def test_crashed_run_with_previews_and_workers_ends_as_the_plain_one(
    data, ae_ckpt, tmp_path, monkeypatch, uninterrupted, crash_step
):
    """Resumed in the middle of the first epoch and of the second; options that cannot change a weight are changed."""
    options = {"num_workers": 1, "preview": True, "preview_steps": 2, "AE_ckpt": str(ae_ckpt), **STATEFUL}
    with monkeypatch.context() as patch:
        crash_at(patch, crash_step)
        with pytest.raises(RuntimeError, match="power cut"):
            train(runs.config(data, tmp_path, **options))
    torch.rand(7)  # whatever else happens to the global generator
    result = train(runs.config(data, tmp_path, **{**options, "num_workers": 0}))
    assert result["step"] == 6
    assert_same_training(checkpoint(uninterrupted["folder"], 6), checkpoint(result["folder"], 6))
    previews = sorted(path.name for path in (result["folder"] / "samples").glob("*.nii.gz"))
    expected = ["step_0000002_class_1", "step_0000004_class_0", "step_0000006_class_1"]
    assert previews == [f"{name}.nii.gz" for name in expected]
    assert (result["folder"] / "samples" / f"{expected[0]}.png").stat().st_size > 1000
    assert read_volume(result["folder"] / "samples" / previews[0]).data.shape == (1, 32, 32, 32)


def test_finished_run_says_so_and_trains_on(data, tmp_path, capfd):
    short = train(runs.config(data, tmp_path, max_steps=4))
    newest = run_folder.list_checkpoints(short["folder"])[-1]
    written = newest.stat().st_mtime_ns
    again = train(runs.config(data, tmp_path, max_steps=4))
    assert again["folder"] == short["folder"]
    assert newest.stat().st_mtime_ns == written
    assert "is finished: step 4, epoch 0. To train on, give a larger max_steps or --epochs" in capfd.readouterr().err
    branch = train(runs.config(data, tmp_path, max_steps=6, ckpt=str(newest)))
    assert branch["folder"].name == "001-BiFlowNet"
    longer = train(runs.config(data, tmp_path, max_steps=6))
    assert longer["folder"] == short["folder"]
    assert "max_steps: 4 -> 6" in capfd.readouterr().err
    straight = train(runs.config(data, tmp_path / "straight"))
    for run in (branch, longer):
        assert_same_training(checkpoint(straight["folder"], 6), checkpoint(run["folder"], 6))


@pytest.mark.parametrize("step", [2, 3])
def test_a_preview_due_where_training_stopped_is_made(data, ae_ckpt, tmp_path, monkeypatch, uninterrupted, step):
    """Killed between the checkpoint and its preview, or stopped there by a signal; also where training had ended."""
    options = {"preview": True, "preview_steps": 2, "AE_ckpt": str(ae_ckpt), "max_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(Previews, "write", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train(runs.config(data, tmp_path, **{**options, "max_steps": step}))
    for _ in range(2):
        run = train(runs.config(data, tmp_path, **{**options, "max_steps": step}))["folder"]
    names = {path.name for path in (run / "samples").glob("*.nii.gz")}
    assert f"step_{step:07d}_class_{step // 2 % 2}.nii.gz" in names
    whole = train(runs.config(data, tmp_path / "whole", **{**options, "max_steps": step}))["folder"]
    ours, theirs = (
        read_volume(folder / "samples" / f"step_{step:07d}_class_{step // 2 % 2}.nii.gz").data
        for folder in (run, whole)
    )
    assert torch.equal(ours, theirs)


def test_previews_that_fail_do_not_end_the_training(data, ae_ckpt, tmp_path, monkeypatch, uninterrupted, capfd):
    def fail(self, class_id: int, grid: tuple) -> None:
        raise RuntimeError("CUDA error: odd")

    monkeypatch.setattr(Previews, "_sample", fail)
    run = train(runs.config(data, tmp_path, preview=True, preview_steps=2, AE_ckpt=str(ae_ckpt), **STATEFUL))["folder"]
    assert_same_training(checkpoint(uninterrupted["folder"], 6), checkpoint(run, 6))
    said = "warning: preview of step {}: failed, training goes on (RuntimeError: CUDA error: odd); say preview=false\n"
    assert all(said.format(step) in (run / "log.txt").read_text() for step in (2, 4, 6))
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_newest_checkpoint_is_passed_over(data, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(RuntimeError, match="power cut"):
            train(runs.config(data, tmp_path, keep_checkpoints=1, ckpt_every=1))
    run = tmp_path / "000-BiFlowNet"
    assert [path.name for path in run_folder.list_checkpoints(run)] == ["BiFlowNet_0000004.pt"]
    newest = run_folder.checkpoint_path(run, 5)
    newest.write_bytes(run_folder.checkpoint_path(run, 4).read_bytes()[:-1000])
    leftover = newest.with_name(".BiFlowNet_0000009.pt.tmp-123")
    leftover.write_bytes(b"half")

    result = train(runs.config(data, tmp_path, keep_checkpoints=1, ckpt_every=1, log_every=2))
    text = capfd.readouterr().err
    assert "BiFlowNet_0000005.pt: " in text
    assert f"going on from {run_folder.checkpoint_path(run, 4)}, step 4" in text
    assert result["step"] == 6
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["BiFlowNet_0000005.pt.damaged", "BiFlowNet_0000006.pt"]


@pytest.mark.parametrize(("keep", "expected"), [(2, [5, 6]), (0, [1, 2, 3, 4, 5, 6])])
def test_the_latest_checkpoints_are_kept(data, tmp_path, keep, expected):
    """An older file of another cadence counts too: what is deleted is found on disk, not computed."""
    cfg = runs.config(data, tmp_path, ckpt_every=1, keep_checkpoints=keep)
    folder = train(cfg)["folder"]
    assert [run_folder.step_of(path) for path in run_folder.list_checkpoints(folder)] == expected


@pytest.mark.parametrize(("name", "step"), [("BiFlowNet_0453500.pt", 453500), ("official.pt", 0)])
def test_official_checkpoint_goes_on(data, tmp_path, capfd, name, step):
    """Published files have no step, no position and no generator states, and may prefix names with `module.`."""
    source = train(runs.config(data, tmp_path / "source", max_steps=2))
    saved = checkpoint(source["folder"], 2)
    official = {key: saved[key] for key in ("model", "ema", "scaler", "opt")}
    official["args"] = argparse.Namespace(timesteps=500, results_dir="elsewhere")
    official["epoch"] = 3
    torch.save(official, tmp_path / name)

    changed = {"prediction": "v", "latent_scaling": "unit"}  # of which official files say nothing
    result = train(runs.config(data, tmp_path, ckpt=str(tmp_path / name), max_steps=step + 1, ckpt_every=1, **changed))
    ended = checkpoint(result["folder"], step + 1)
    assert (ended["step"], ended["epoch"], ended["samples_seen"]) == (step + 1, 3, 2)
    # Adam's count of steps goes on: its state came along.
    assert {state["step"].item() for state in ended["opt"]["state"].values()} == {3}
    text = capfd.readouterr().err
    assert ("no step in the file or its name" in text) == (step == 0)
    assert "trained with other values; changed: timesteps: 500 -> 1000, prediction: noise -> v, " in text
    assert "latent_scaling: range -> unit" in text


def test_ctrl_c_saves_and_says_130(data, ae_ckpt, tmp_path, monkeypatch, capfd):
    write = MetricsWriter.write

    def interrupt(self, step: int, scalars: dict) -> None:
        write(self, step, scalars)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsWriter, "write", interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        main(runs.arguments(data, tmp_path, "--enable_amp", "amp_dtype=bf16", "--AE-ckpt", str(ae_ckpt)))
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert "SIGINT: stopped after step 3, checkpoint saved; the same command goes on" in capfd.readouterr().err
    assert run_folder.step_of(run_folder.list_checkpoints(tmp_path / "000-BiFlowNet")[-1]) == 3
