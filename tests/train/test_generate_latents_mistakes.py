"""Encoding a data set: files, autoencoders and arguments that it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from latent_runs import config, contents, make_dataset, save_autoencoder, save_json, save_volume

from common.errors import UserError
from dataset.checking import before_training as sample_check
from dataset.volumes.volume_io import write_volume
from train.generate_training_latent import main
from train.latents.encoding import generate_latents


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("models") / "ae.ckpt")


@pytest.fixture
def dataset(tmp_path) -> Path:
    return make_dataset(tmp_path)


def test_headers_are_checked_before_anything_is_encoded(dataset, checkpoint):
    bad = dataset.parent / "MR" / "c.nii.gz"
    bad.write_bytes(bad.with_name("b.nii.gz").read_bytes()[:40])
    with pytest.raises(UserError, match=r"MR/c.nii.gz"):
        generate_latents(config(dataset, checkpoint))
    assert contents(dataset.parent) == {}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nan_stops_in_one_line_and_a_repaired_volume_goes_on(dataset, checkpoint, num_workers, monkeypatch):
    """A volume that the sample read at the start has missed."""
    monkeypatch.setattr(sample_check, "SAMPLE_SIZE", 0)
    bad = dataset.parent / "MR" / "b.nii.gz"
    good = bad.read_bytes()
    poisoned = torch.zeros(16, 16, 16)
    poisoned[3, 4, 5] = torch.nan
    write_volume(bad, poisoned, np.eye(4))
    with pytest.raises(UserError, match=r"^[^\n]*MR/b.nii.gz: 1 NaN or infinite voxels[^\n]*$"):
        generate_latents(config(dataset, checkpoint, num_workers=num_workers))
    bad.write_bytes(good)
    generate_latents(config(dataset, checkpoint, num_workers=num_workers))
    assert len(contents(dataset.parent)) == 5 + 2


def test_a_sample_is_read_whole_before_anything_is_encoded(dataset, checkpoint, capsys):
    broken = dataset.parent / "MR" / "b.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"MR/b.nii.gz: .*truncated.*`python dataset/check.py .*data.json` reads all"):
        generate_latents(config(dataset, checkpoint))
    assert contents(dataset.parent) == {}
    assert "read 5 of 5 files whole" in capsys.readouterr().err


def test_half_of_the_range_is_a_wrong_range(dataset, checkpoint):
    save_volume(dataset.parent / "low" / "a.nii.gz", low=0.0)
    data = save_json(dataset.parent, {"0": "CT", "1": "low"})
    expected = r"data.json: 1: intensities from .*, only the upper half .*--intensity-range 0 1\)"
    with pytest.raises(UserError, match=expected):
        generate_latents(config(data, checkpoint))
    assert contents(dataset.parent) == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"0": "CT", "1": "CT/late"}, r"the latents .*CT/late_latents would lie among the images of .*CT"),
        ({"0": "CT", "1": "CT_latents"}, r"the latents .*CT_latents would lie among the images of .*CT_latents"),
        ({"0": "CT", "1": "CT/"}, r"a folder is named twice, its latents are .*CT_latents"),
    ],
)
def test_folders_in_each_others_way(dataset, checkpoint, entries, message):
    save_volume(dataset.parent / "CT_latents" / "a.nii.gz")
    data = save_json(dataset.parent, entries)
    with pytest.raises(UserError, match=message):
        generate_latents(config(data, checkpoint))


def test_an_untrained_codebook_is_refused(dataset, tmp_path):
    path = save_autoencoder(tmp_path / "new.ckpt")
    state = torch.load(path, weights_only=False)
    state["state_dict"]["codebook.embeddings"].fill_(0.5)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"new.ckpt: the codebook's entries span no range"):
        generate_latents(config(dataset, path))


def test_diverged_weights_leave_no_latents(dataset, tmp_path):
    path = save_autoencoder(tmp_path / "nan.ckpt")
    state = torch.load(path, weights_only=False)
    state["state_dict"]["pre_vq_conv.bias"].fill_(torch.nan)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"CT/a.nii.gz: .*nan.ckpt gives NaN or infinite latents"):
        generate_latents(config(dataset, path))
    assert not list(dataset.parent.glob("*_latents/**/*.nii.gz"))


def test_several_channels_are_refused(dataset, tmp_path):
    path = save_autoencoder(tmp_path / "rgb.ckpt", image_channels=3)
    with pytest.raises(UserError, match=r"rgb.ckpt: an autoencoder of images with 3 channels"):
        generate_latents(config(dataset, path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"required but not set: data_path .*, AE_ckpt"),
        (["--data-path", "none.json", "--AE-ckpt", "AE"], "none.json: no such dataset JSON"),
        (["--data-path", "DATA", "--AE-ckpt", "none.ckpt"], "none.ckpt: no such checkpoint"),
        (["--data-path", "DATA", "--AE-ckpt", "AE", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--data-path", "DATA", "--AE-ckpt", "AE", "--intensity-range", "1", "-1"], "the lower one first"),
        pytest.param(
            ["--data-path", "DATA", "--AE-ckpt", "AE", "--device", "cuda"],
            "no usable GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU"),
        ),
    ],
)
def test_wrong_arguments(dataset, checkpoint, arguments, message):
    places = {"DATA": str(dataset), "AE": str(checkpoint)}
    with pytest.raises(UserError, match=message):
        main([places.get(argument, argument) for argument in arguments])
    assert contents(dataset.parent) == {}
