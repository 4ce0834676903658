"""What training of the autoencoder checks: its files and their split before, loss and gradient at each step."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from autoencoder_runs import config, make_data, with_callback

from common.checkpoint_files import load_checkpoint
from common.errors import UserError
from dataset.checking import before_training as sample_check
from dataset.order.epochs import EpochSampler
from dataset.volumes.volume_io import write_volume
from train.autoencoder import training
from train.autoencoder.batches import EpochBatches, build_datasets, build_loaders, split_files
from train.autoencoder.training import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_a_bad_file_is_found_before_training(data, tmp_path):
    """A file of the validation part, which training itself would read only after its first steps."""
    shutil.copytree(data.parent / "box", tmp_path / "box")
    (tmp_path / "data.json").write_text(json.dumps({"box": "box"}))
    cfg = config(tmp_path / "data.json", tmp_path / "run", "model.max_steps=4")
    (path,) = build_datasets(cfg, split_files(cfg), training.get_logger())[1].files
    write_volume(path, torch.full((1, 16, 16, 16), 3.0), np.eye(4))
    with pytest.raises(UserError, match=rf"{path.name}: intensities from 3 to 3 lie outside the declared range"):
        train(cfg, stage=1)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_file_that_the_sample_missed(data, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(sample_check, "SAMPLE_SIZE", 0)
    cfg = config(data, tmp_path / "run", "dataset.intensity_range=[0,1]", f"model.num_workers={num_workers}")
    with pytest.raises(UserError, match=r"lie outside the declared range \[0, 1\]") as caught:
        train(cfg, stage=1)
    assert "\n" not in str(caught.value)


def test_a_sample_is_read_whole_before_the_model_is_built(data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data.parent / "box", tmp_path / "box")
    write_volume(tmp_path / "box" / "2.nii.gz", torch.full((1, 16, 16, 16), -1.0), np.eye(4))
    write_volume(tmp_path / "box" / "3.nii.gz", torch.rand(1, 16, 16, 16) - 0.5, np.diag([-1.0, 1.0, 1.0, 1.0]))
    (tmp_path / "data.json").write_text(json.dumps({"box": "box"}))
    monkeypatch.delattr(training, "build_autoencoder")
    with pytest.raises(UserError, match=r"box/2\.nii\.gz: all background .*`python dataset/check\.py .*data\.json`"):
        train(config(tmp_path / "data.json", tmp_path / "run"), stage=1)
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("1 of 5 files have odd headers, axes not in the order RAS: 1 (axes mixed: 4 RAS, 1 LAS)") == 1
    assert f"{tmp_path}/box/3.nii.gz: its axes are LAS" in err
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_files(data, tmp_path):
    folder = shutil.copytree(data.parent, tmp_path / "data")
    cfg = config(folder / "data.json", tmp_path / "run", "model.max_steps=2")
    train(cfg, stage=1)
    shutil.copy(folder / "box" / "0.nii.gz", folder / "box" / "9.nii.gz")
    with pytest.raises(UserError, match=r"split\.json: the run began with another split.*1 new \(e\.g\. box/9\.nii"):
        train(cfg, stage=1)


def test_subjects_are_not_parted(data, tmp_path):
    """Volumes 0 to 4 as two visits of a subject, and one."""
    for i in range(5):
        path = tmp_path / "box" / f"sub-{i // 2}" / f"{i}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data.parent / "box" / f"{i}.nii.gz", path)
    (tmp_path / "data.json").write_text(json.dumps({"box": "box"}))
    pattern = r"dataset.subject_pattern=sub-\d+"
    cfg = config(tmp_path / "data.json", tmp_path / "run", "model.max_steps=1", "dataset.val_fraction=0.4", pattern)
    train(cfg, stage=1)
    sides = json.loads((tmp_path / "run" / "split.json").read_text())["files"]["box"]
    train_data, val_data = build_datasets(cfg, split_files(cfg), logging.getLogger())
    for data, names in ((train_data, sides["training"]), (val_data, sides["validation"])):
        assert [path.relative_to(tmp_path / "box").as_posix() for path in data.files] == names
    train_subjects, val_subjects = ({path.parent.name for path in data.files} for data in (train_data, val_data))
    assert (len(train_subjects), len(val_subjects), train_subjects & val_subjects) == (2, 1, set())


@pytest.mark.parametrize(("val_volumes", "taken", "per_rank"), [(4, 4, 2), (3, 3, 2), (32, 6, 3), ("null", 6, 3)])
def test_validation_takes_a_few_volumes_of_every_class(data, tmp_path, val_volumes, taken, per_rank):
    """The same ones on all ranks, each of which gets as many, and with another seed of the training."""
    for name in ("a", "b"):
        shutil.copytree(data.parent / "box", tmp_path / name)
    (tmp_path / "data.json").write_text(json.dumps({"a": "a", "b": "b"}))
    options = [f"model.val_volumes={val_volumes}", "dataset.val_fraction=0.6", "dataset.cache=none"]
    found = []
    for seed in (1, 2):
        cfg = config(tmp_path / "data.json", tmp_path / "run", f"model.seed={seed}", *options)
        train_data, val_data = build_datasets(cfg, split_files(cfg), logging.getLogger())
        place = dict(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")), global_step=0)
        ranks = [SimpleNamespace(global_rank=rank, **place) for rank in range(2)]
        loaders = [build_loaders(cfg, rank, train_data, val_data)[1] for rank in ranks]
        assert [len(loader) for loader in loaders] == [per_rank, per_rank]
        found.append({batch["path"][0] for loader in loaders for batch in loader})
    assert found[0] == found[1]
    assert len(found[0]) == taken
    assert {Path(path).parent.name for path in found[0]} == {"a", "b"}


def test_batches_know_their_place():
    files = [Path(str(i)) for i in range(5)]
    place = {"step": 0}
    batches = EpochBatches(EpochSampler(5, seed=3), 2, files, lambda: place["step"])
    epochs = []
    for place["step"] in (0, 3):
        epochs.append([[key.index for key in batch] for batch in batches])
    assert [len(batch) for batch in epochs[0]] == [2, 2, 1]
    assert epochs[0] != epochs[1]
    place["step"] = 4  # the second batch of the second epoch
    for _ in range(2):  # a pass in vain changes nothing
        assert [[key.index for key in batch] for batch in batches] == epochs[1][1:]
    assert len(batches) == 3
    assert batches.files_of(4) == [files[i] for i in epochs[1][1]]


class Poison(pl.Callback):
    """Makes the decoder's output infinite before the third step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            torch.nn.init.constant_(pl_module.decoder.final_block[2].bias, torch.inf)


def test_a_loss_that_is_not_finite_names_step_rank_and_files(data, tmp_path, monkeypatch):
    original = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *args: with_callback(original(*args), Poison()))
    with pytest.raises(UserError, match=r"the loss is inf at step 2 on rank 0, batch .*\d\.nii\.gz.*lower model\.lr"):
        train(config(data, tmp_path / "run", "model.max_steps=5"), stage=1)
    saved = [load_checkpoint(path) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert {checkpoint["global_step"] for checkpoint in saved} == {2}
    assert all(torch.isfinite(checkpoint["state_dict"]["decoder.final_block.2.bias"]).all() for checkpoint in saved)


def test_a_gradient_that_is_not_finite_saves_nothing(data, tmp_path, monkeypatch):
    """A finite loss can have a NaN gradient; the weights, and the checkpoint due at this step, must stay sound."""

    class PoisonGradient(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                pl_module.decoder.conv_first.weight.grad.fill_(torch.nan)

    original = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *args: with_callback(original(*args), PoisonGradient()))
    with pytest.raises(UserError, match="the gradient is nan at step 1 on rank 0, batch"):
        train(config(data, tmp_path / "run", "model.max_steps=5"), stage=1)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_gradient_clipping_bounds_the_step(data, tmp_path, monkeypatch):
    norms = []

    class Measure(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            norms.append(torch.stack([p.grad.norm() for p in pl_module.decoder.parameters()]).norm().item())

    original = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *args: with_callback(original(*args), Measure()))
    train(config(data, tmp_path / "run", "model.max_steps=2", "model.gradient_clip=0.001"), stage=1)
    train(config(data, tmp_path / "free", "model.max_steps=2"), stage=1)
    clipped, free = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert 0 < max(clipped) <= 0.001 * 1.001
    assert max(free) > 0.01
