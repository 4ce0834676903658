"""Encoding a data set: files, autoencoders and arguments that it refuses."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_runs import config, contents, make_dataset, save_autoencoder, save_json, save_volume

from common import files
from common.errors import UserError
from dataset.checking import before_training as sample_check
from dataset.volumes.volume_io import write_volume
from train.generate_training_latent import main
from train.latents import encoding
from train.latents.encoding import generate_latents

ROOT = Path(__file__).resolve().parents[2]


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
        ({"0": ["CT", "CT/late"]}, r"the latents .*CT/late_latents would lie among the images of .*CT"),
        ({"0": "CT", "1": "CT_latents"}, r"the latents .*CT_latents would lie among the images of .*CT_latents"),
        ({"0": ["CT", "CT/"]}, r"a folder is named twice, its latents are .*CT_latents"),
        ({"0": "CT", "1": "CT/"}, r"class 1 has the folder .*CT, which is or lies in .*CT of class 0"),
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


@contextmanager
def held_by_another(folder: Path, doing: str) -> Iterator[None]:
    code = "import pathlib, sys; from common.files import lock_folder as lock; "
    code += "held = lock(pathlib.Path(sys.argv[1]), sys.argv[2]); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(folder), doing], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()


def test_a_second_encoding_into_a_folder_is_refused(dataset, checkpoint):
    """And deletes nothing that the first one is writing."""
    half = dataset.parent / "MR_latents" / ".a.nii.gz.77.tmp"
    half.parent.mkdir()
    half.write_bytes(b"half")
    with held_by_another(half.parent, "encoding volumes"):
        with pytest.raises(UserError, match=r"MR_latents: another process \(process \d+ on .*\) is encoding"):
            generate_latents(config(dataset, checkpoint))
        assert half.exists()
        assert list(dataset.parent.glob("CT_latents/*.gz")) == []
    generate_latents(config(dataset, checkpoint))
    assert len(contents(dataset.parent)) == 5 + 2  # neither half files nor locks


def test_where_no_lock_can_be_written_whole_latents_are_enough(dataset, checkpoint, monkeypatch):
    expected = generate_latents(config(dataset, checkpoint))
    monkeypatch.setattr(files, "lock_folder", _read_only)
    assert generate_latents(config(dataset, checkpoint)) == expected


def _read_only(*_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("CT_latents/a.nii.gz", r"CT_latents/a.nii.gz: vanished meanwhile, 1 of 5 latents are gone; start again"),
        ("CT/a.nii.gz", r"CT/a.nii.gz: vanished meanwhile, 1 of 5 volumes are gone; start again with the data set"),
    ],
)
def test_what_vanishes_during_the_encoding_is_an_error(dataset, checkpoint, monkeypatch, victim, message):
    """A latent that was written, or found, already; a volume that was read."""
    write = encoding.write_latent

    def write_and_lose(path: Path, latent: torch.Tensor) -> None:
        write(path, latent)
        if path.name == "b.nii.gz" and path.parent.name == "MR_latents":  # the last but one
            (dataset.parent / victim).unlink()

    monkeypatch.setattr(encoding, "write_latent", write_and_lose)
    with pytest.raises(UserError, match=message):
        generate_latents(config(dataset, checkpoint, batch_size=1))
