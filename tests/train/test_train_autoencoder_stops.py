"""What the autoencoder's training makes up for when it goes on: validations, last.ckpt, half-written files."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from autoencoder_runs import assert_same_weights, config, make_data, weights

from common import checkpoint_files
from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from train.autoencoder import training
from train.autoencoder.training import train
from train.autoencoder.validation import Validations


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of six steps, of two an epoch; validations after 3 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    train(config(data, folder, "model.max_steps=6", "model.log_volume_every=1"), stage=1)
    return folder


class StopAt(pl.Callback):
    """SIGTERM, or a crash, in a step; `hook` of `step`."""

    def __init__(self, hook: str, step: int, act) -> None:
        setattr(self, hook, lambda trainer, *_: act() if trainer.global_step == step else None)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("power cut")


def stopped(data: Path, run: Path, monkeypatch, hook: str, step: int, act, *overrides: str) -> None:
    original = training.build_trainer

    def build(*args) -> pl.Trainer:
        trainer = original(*args)
        trainer.callbacks.insert(0, StopAt(hook, step, act))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(training, "build_trainer", build)
        with pytest.raises(SystemExit if act is terminate else RuntimeError):
            train(config(data, run, "model.max_steps=6", "model.log_volume_every=1", *overrides), stage=1)


def validated(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["val/recon_loss"]) for line in lines if "val/recon_loss" in line]
    assert len(found) == len(dict(found)), "a validation is there twice"
    return dict(found)


def best(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("best-*")}


# A validation is due after steps 3 and 6, and after 6 training ends.
@pytest.mark.parametrize(
    ("hook", "step", "act"),
    [
        ("on_train_batch_start", 2, terminate),  # stopped after the third step
        ("on_train_batch_start", 5, terminate),  # after the last one
        ("on_validation_start", 3, crash),  # the checkpoint of step 2 is the newest
        ("on_validation_start", 6, crash),  # that of step 6 is there, without its validation
        ("on_validation_batch_end", 6, crash),
        ("on_validation_end", 6, crash),  # it is logged, and there is no best checkpoint
    ],
)
def test_a_validation_due_where_training_stopped_is_made(data, whole, tmp_path, monkeypatch, hook, step, act):
    stopped(data, tmp_path, monkeypatch, hook, step, act)
    train(config(data, tmp_path, "model.max_steps=6", "model.log_volume_every=1"), stage=1)
    assert_same_weights(weights(tmp_path), weights(whole))
    assert validated(tmp_path) == validated(whole)
    assert validated(whole).keys() == {3, 6}
    assert best(tmp_path) == best(whole)
    pictures = [{p.name for p in (run / "volumes" / "train").glob("*.png")} for run in (tmp_path, whole)]
    assert pictures[0] == pictures[1] == {f"step_{step:07d}.png" for step in range(1, 7)}
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_a_run_whose_last_validation_was_made_up_for_trains_on_exactly(data, tmp_path, monkeypatch):
    stopped(data, tmp_path / "run", monkeypatch, "on_validation_start", 6, crash)
    for steps in (6, 9):
        train(config(data, tmp_path / "run", f"model.max_steps={steps}"), stage=1)
    train(config(data, tmp_path / "whole", "model.max_steps=9"), stage=1)
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert validated(tmp_path / "run") == validated(tmp_path / "whole")
    assert validated(tmp_path / "run").keys() == {3, 6, 9}


@pytest.mark.parametrize("stop", [4, 5])
def test_training_validates_with_its_checkpoints_and_at_its_end(data, tmp_path, monkeypatch, stop):
    """Where it does not say when: a checkpoint comes after every second step here, and the end after the fifth."""
    steps = ("model.max_steps=5", "model.val_every=null")
    stopped(data, tmp_path / "run", monkeypatch, "on_validation_start", stop, crash, *steps)
    for run in ("run", "whole"):
        train(config(data, tmp_path / run, *steps), stage=1)
    assert validated(tmp_path / "run") == validated(tmp_path / "whole")
    assert validated(tmp_path / "run").keys() == {2, 4, 5}
    assert best(tmp_path / "run") == best(tmp_path / "whole")
    for run in ("run", "whole"):  # finished is finished
        assert train(config(data, tmp_path / run, *steps), stage=1) == {}


def test_a_run_that_ends_before_a_validation_is_due_is_validated(data, tmp_path):
    metrics = train(config(data, tmp_path, "model.max_steps=1", "model.val_every=null"), stage=1)
    assert validated(tmp_path) == {1: pytest.approx(metrics["val/recon_loss"])}
    assert len(best(tmp_path)) == 1


def test_validations_draw_the_same_numbers_and_leave_those_of_training_alone():
    validations, trainer = Validations(3, 0), SimpleNamespace(global_rank=1, global_step=3)
    drawn = []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = torch.rand(2)
        torch.manual_seed(7)
        for _ in range(2):
            validations.on_validation_start(trainer, None)
            drawn.append(torch.rand(2))
            validations.on_validation_end(trainer, None)
        assert torch.equal(torch.rand(2), expected)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], expected)


def test_a_run_from_before_validations_were_counted_makes_up_for_none(data, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(last)
    del checkpoint["callbacks"]["Validations"]
    save_checkpoint(checkpoint, last)
    before = last.read_bytes()
    assert train(config(data, run, "model.max_steps=6"), stage=1) == {}
    assert last.read_bytes() == before


@pytest.mark.parametrize("state", ["missing", "old", "truncated"])
def test_a_finished_run_has_its_last_checkpoint(data, whole, tmp_path, state, capsys):
    """Also where it was killed, or the disk was full, between the last step's checkpoint and last.ckpt."""
    run = shutil.copytree(whole, tmp_path / "run")
    last, newest = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "step-0000006.ckpt"
    shutil.copy(last, newest)
    last.unlink()
    if state == "old":
        shutil.copy(run / "checkpoints" / "step-0000004.ckpt", last)
    elif state == "truncated":
        last.write_bytes(newest.read_bytes()[:-500])
    leftovers = [run / "checkpoints" / ".last.ckpt.77.tmp", run / "volumes" / ".a.nii.gz.77.tmp", run / ".x.77.tmp"]
    for path in leftovers:
        path.write_bytes(b"half")
    assert train(config(data, run, "model.max_steps=6"), stage=1) == {}
    assert last.read_bytes() == newest.read_bytes()
    assert f"finished at step 6, {last}" in capsys.readouterr().err
    assert not any(path.exists() for path in leftovers)


def test_a_run_is_not_called_finished_where_its_last_checkpoint_cannot_be_written(data, whole, tmp_path, monkeypatch):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "step-0000006.ckpt")
    monkeypatch.setattr(checkpoint_files.shutil, "copyfileobj", no_space)
    with pytest.raises(UserError, match=r"last\.ckpt: the checkpoint could not be written \(No space left"):
        train(config(data, run, "model.max_steps=6"), stage=1)
    assert not (run / "checkpoints" / "last.ckpt").exists()


def no_space(*args) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
