"""What ends the autoencoder's training, and what is written beside it: news read late, signals, failed writes."""

import errno
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from autoencoder_runs import assert_same_weights, config, make_data, weights, with_callback

from AutoEncoder.model.PatchVolume import patchvolumeAE
from common import checkpoint_files as checkpoints
from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from train import callbacks
from train.autoencoder import checkpoint_io, step_watch, training
from train.autoencoder.batches import build_datasets, build_loaders, split_files
from train.autoencoder.checkpoint_io import BackgroundCheckpointIO, RandomState
from train.autoencoder.step_watch import _news
from train.autoencoder.training import train
from train.loop.background import BackgroundWork
from train.loop.step_flags import StepFlags


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def late(monkeypatch):
    """As on a GPU: news of a step are read after the next."""
    monkeypatch.setattr(step_watch, "StepFlags", lambda device, is_late: StepFlags(device, is_late=True))


def add(monkeypatch, callback: pl.Callback) -> None:
    original = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *args: with_callback(original(*args), callback))


class Act(pl.Callback):
    """Does something before a step."""

    def __init__(self, step: int, act) -> None:
        self.step = step
        self.act = act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act(pl_module)


def poison(model) -> None:
    torch.nn.init.constant_(model.decoder.final_block[2].bias, torch.inf)


# 4: its news would be read after step 5. 5: a checkpoint follows at once. 2: a validation does
@pytest.mark.parametrize("step", [4, 5, 2])
def test_a_bad_step_whose_news_come_late(data, tmp_path, monkeypatch, late, step):
    add(monkeypatch, Act(step, poison))
    cfg = config(data, tmp_path / "run", "model.max_steps=9")
    with pytest.raises(UserError, match=rf"the loss is (inf|nan) at step {step} on rank 0, batch /") as caught:
        train(cfg, stage=1)
    batches = build_loaders(cfg, pl.Trainer(logger=False), *build_datasets(cfg, split_files(cfg), None))[
        0
    ].batch_sampler
    assert all(str(path) in str(caught.value) for path in batches.files_of(step))
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        state = load_checkpoint(path)
        assert state["global_step"] <= step
        assert torch.isfinite(state["state_dict"]["decoder.final_block.2.bias"]).all()


def test_the_last_step_is_looked_at_too(data, tmp_path, monkeypatch, late):
    add(monkeypatch, Act(2, poison))
    with pytest.raises(UserError, match="the loss is inf at step 2"):
        train(config(data, tmp_path / "run", "model.max_steps=3", "model.val_every=100"), stage=1)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


# after step 2 comes a validation, after 3 a checkpoint
@pytest.mark.parametrize(
    ("step", "saved_at", "number"), [(2, 3, signal.SIGTERM), (3, 5, signal.SIGUSR1), (4, 6, signal.SIGTERM)]
)
def test_a_signal_whose_news_come_late(data, tmp_path, monkeypatch, late, step, saved_at, number):
    with monkeypatch.context() as patch:
        add(patch, Act(step, lambda model: os.kill(os.getpid(), number)))
        with pytest.raises(SystemExit) as caught:
            train(config(data, tmp_path / "run", "model.max_steps=9"), stage=1)
    assert caught.value.code == 128 + number
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == saved_at
    train(config(data, tmp_path / "run", "model.max_steps=9"), stage=1)
    train(config(data, tmp_path / "whole", "model.max_steps=9"), stage=1)
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_news_of_a_step():
    trainer = type("Trainer", (), {"world_size": 1})
    watched = {"loss": torch.tensor(2.0, dtype=torch.bfloat16), "gradient": torch.tensor(torch.nan)}
    assert _news(watched, 15, trainer).tolist()[:4] == [15, 0, 1, 2]
    assert _news({"loss": torch.tensor(-torch.inf)}, 0, trainer).tolist() == [0, 1, 0, -torch.inf, 0]  # fp16


NO_SPACE = "[Errno 28] No space left on device"


def no_space(*args, **options) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_training_soon(data, tmp_path, monkeypatch):
    """Though the next checkpoint is far off."""
    monkeypatch.setattr(checkpoints.torch, "save", no_space)
    steps = []
    add(monkeypatch, Act(50, lambda model: steps.append(50)))
    options = ["model.checkpoint_every=5", "model.val_every=1000", "model.max_steps=51"]
    cfg = config(data, tmp_path / "run", *options)
    monkeypatch.setattr(checkpoint_io.BackgroundCheckpointIO, "save_checkpoint", _once(BackgroundCheckpointIO))
    with pytest.raises(UserError, match=r"step-0000005\.ckpt: the checkpoint could not be written \(No space left"):
        train(cfg, stage=1)
    assert steps == []


def _once(kind):
    """Saves only the first time: further errors would come of themselves."""
    original, done = kind.save_checkpoint, []

    def save(self, *args, **kwargs):
        if not done:
            done.append(True)
            original(self, *args, **kwargs)

    return save


def no_memory(*args, **options) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("place", "name", "fail", "reason"),
    [
        (callbacks, "save_slice_grid", no_space, f"failed, training goes on (OSError: {NO_SPACE})"),
        (patchvolumeAE, "log_volumes", no_memory, "not enough memory"),
    ],
)
def test_a_logged_volume_that_fails_does_not_end_the_training(
    data, tmp_path, monkeypatch, capsys, place, name, fail, reason
):
    """Neither the pass on the training's device nor the writing beside it; the weights are those without volumes."""
    train(config(data, tmp_path / "plain", "model.max_steps=3"), stage=1)
    monkeypatch.setattr(place, name, fail)
    train(config(data, tmp_path / "run", "model.max_steps=3", "model.log_volume_every=1"), stage=1)
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    said = capsys.readouterr().err
    for step in (1, 2, 3):
        assert f"warning: logged volume of step {step}: {reason}; set model.log_volume_every=0\n" in said
    assert "Traceback" not in said


def test_checkpoints_are_written_beside_training(tmp_path, monkeypatch):
    """As they were when saved; and what they replace goes once they are there."""
    may_write = threading.Event()
    save = checkpoint_io.save_checkpoint
    monkeypatch.setattr(checkpoint_io, "save_checkpoint", lambda *args: (may_write.wait(10), save(*args)))
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    old.touch()
    weight = torch.ones(2)
    with BackgroundWork() as work:
        files = BackgroundCheckpointIO(work, 0, {})
        files.save_checkpoint({"weight": weight, "step": [1]}, new)
        files.remove_checkpoint(old)
        weight.zero_()
        assert (old.exists(), new.exists()) == (True, False)
        may_write.set()
        assert files.load_checkpoint(new)["weight"].tolist() == [1, 1]
        assert not old.exists()
        files.remove_checkpoint(new)
        files.save_checkpoint({"step": 2}, new)  # not to be removed any more
        assert files.load_checkpoint(new) == {"step": 2}


def test_what_was_read_before_is_handed_on_once(tmp_path):
    """And let go: it may be gigabytes."""
    path, read = tmp_path / "a.ckpt", {tmp_path / "a.ckpt": {"step": 1}}
    save_checkpoint({"step": 2}, path)
    with BackgroundWork() as work:
        files = BackgroundCheckpointIO(work, 0, read)
        assert [files.load_checkpoint(path) for _ in range(2)] == [{"step": 1}, {"step": 2}]
    assert read == {}


@pytest.mark.parametrize(("rank", "world_size", "expected"), [(0, 2, 0), (1, 2, 1), (1, 3, 0), (0, 1, 0)])
def test_each_rank_goes_on_with_its_own_random_numbers(rank, world_size, expected):
    """Unless there are other ranks than before: then all with those of rank 0."""
    ranks = [{"cpu": torch.Generator().manual_seed(number).get_state(), "cuda": []} for number in range(2)]
    callback = RandomState()
    callback.load_state_dict({**ranks[0], "ranks": ranks})
    with torch.random.fork_rng():
        callback.on_train_start(SimpleNamespace(global_rank=rank, world_size=world_size), None)
        assert torch.equal(torch.get_rng_state(), ranks[expected]["cpu"])


def test_no_rank_leaves_before_the_signals_checkpoint_is_written():
    """Where one process ends, the launcher ends the one that still writes."""
    done = []
    work = SimpleNamespace(wait=lambda: done.append("written"))
    trainer = SimpleNamespace(
        save_checkpoint=lambda path, weights_only: done.append("saved"),
        strategy=SimpleNamespace(barrier=lambda: done.append("all")),
    )
    watch = step_watch.StepWatch(None, work)
    watch._received = signal.SIGTERM
    with pytest.raises(step_watch.TrainingStopped):
        watch.stop_if_asked(trainer)
    assert done == ["saved", "written", "all"]
