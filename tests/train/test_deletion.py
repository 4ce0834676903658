"""What is deleted while a training runs: its run folder, its data."""

import shutil
from pathlib import Path

import autoencoder_runs
import biflownet_runs as runs
import pytest
import pytorch_lightning as pl
from user_errors import error_of

from common.checkpoint_files import load_checkpoint
from train.autoencoder import training
from train.autoencoder.training import train as train_autoencoder
from train.diffusion import run_folder
from train.loop.metrics_file import JsonLines, MetricsWriter
from train.train_BiFlowNet_SingleRes import train

DELETED = "the run folder was deleted during training, which ends here: start anew"


def remove(folder: Path) -> None:
    """Also while something is being written there."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


class DeleteAt(pl.Callback):
    """Deletes a folder before a step."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            remove(self.folder)


def delete_at_logged(monkeypatch, step: int, folder: Path) -> None:
    write = MetricsWriter.write

    def write_and_delete(self, logged: int, scalars: dict) -> None:
        write(self, logged, scalars)
        if logged == step:
            remove(folder)

    monkeypatch.setattr(MetricsWriter, "write", write_and_delete)


@pytest.mark.parametrize(
    ("log_every", "ckpt_every"),
    [(1, 100), (1, 1), (2, 1), (2, 3)],  # noticed at the next logged step, or at the next checkpoint
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_folder_deleted_while_biflownet_trains(tmp_path, monkeypatch, log_every, ckpt_every):
    data, run = runs.make_latents(tmp_path), tmp_path / "results" / "000-BiFlowNet"
    delete_at_logged(monkeypatch, 2, run)
    cfg = runs.config(data, tmp_path / "results", log_every=log_every, ckpt_every=ckpt_every, max_steps=6)
    assert error_of(train, cfg) == f"{run}: {DELETED}"
    assert not run.exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.log_volume_every=1"],
        ["model.log_volume_every=1", "model.log_every=100"],
        ["model.log_every=100"],
        ["model.log_every=100", "model.checkpoint_every=100"],
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_folder_deleted_while_the_autoencoder_trains(tmp_path, monkeypatch, overrides):
    data, run = autoencoder_runs.make_data(tmp_path), tmp_path / "run"
    build = training.build_trainer
    monkeypatch.setattr(
        training, "build_trainer", lambda *args: autoencoder_runs.with_callback(build(*args), DeleteAt(4, run))
    )
    cfg = autoencoder_runs.config(data, run, "model.max_steps=8", "model.val_every=100", *overrides)
    assert error_of(train_autoencoder, cfg, 1) == f"{run}: {DELETED}"
    assert not list(run.rglob("*.ckpt"))


def test_another_file_that_is_missing_is_no_deletion(tmp_path, monkeypatch):
    data = runs.make_latents(tmp_path)

    def fail(self, *_) -> None:
        raise FileNotFoundError(2, "No such file", "/elsewhere/file")

    monkeypatch.setattr(JsonLines, "write", fail)
    with pytest.raises(FileNotFoundError, match="/elsewhere/file"):
        train(runs.config(data, tmp_path / "results", max_steps=1))


def test_latents_that_vanish_are_an_error_in_the_end(tmp_path, monkeypatch):
    """The cache has them: what was trained is right and saved."""
    data = runs.make_latents(tmp_path)
    delete_at_logged(monkeypatch, 2, data.parent / "class1_latents")
    message = error_of(train, runs.config(data, tmp_path / "results", max_steps=4))
    assert message.startswith(f"{data.parent / 'class1_latents' / '1.nii.gz'}: vanished meanwhile, 5 of 10 latents are")
    assert run_folder.checkpoint_path(tmp_path / "results" / "000-BiFlowNet", 4).exists()


def test_volumes_that_vanish_are_an_error_in_the_end(tmp_path, monkeypatch):
    data, run = autoencoder_runs.make_data(tmp_path), tmp_path / "run"
    build = training.build_trainer
    callback = DeleteAt(2, data.parent / "box")
    monkeypatch.setattr(training, "build_trainer", lambda *args: autoencoder_runs.with_callback(build(*args), callback))
    message = error_of(train_autoencoder, autoencoder_runs.config(data, run, "model.max_steps=4"), 1)
    assert "vanished meanwhile, 5 of 5 volumes are gone; training went on with their copies in the cache" in message
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
