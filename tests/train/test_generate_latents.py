"""Encoding a data set: the same latents whatever the interruptions, beside their images, of a known autoencoder."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_runs import config, contents, make_dataset, save_autoencoder, save_json, save_volume

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.latents import normalise_latents
from AutoEncoder.model.autoencoder import Autoencoder
from common.errors import UserError
from common.processes import Distributed
from dataset.order.batches import batches_of_one_shape
from dataset.volumes import volume_io
from dataset.volumes.volume_io import read_latent, read_volume, write_latent, write_volume
from train.latents import encoding
from train.latents.encoding import generate_latents

ROOT = Path(__file__).resolve().parents[2]
fork = multiprocessing.get_context("fork")  # children share the loaded modules and, where patched, the patches


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("models") / "ae.ckpt")


@pytest.fixture
def dataset(tmp_path) -> Path:
    return make_dataset(tmp_path)


# What is written ----------------------------------------------------------------------------------------------------


def test_latents_are_those_of_direct_encoding(dataset, checkpoint):
    files = generate_latents(config(dataset, checkpoint))
    names = ["CT_latents/a", "CT_latents/b", "CT_latents/late/a", "MR_latents/a", "MR_latents/b"]
    assert [str(file.relative_to(dataset.parent)) for file in files] == [f"{name}.nii.gz" for name in names]
    autoencoder = load_autoencoder(checkpoint)
    for file in files:
        source = dataset.parent / str(file.relative_to(dataset.parent)).replace("_latents", "")
        x = read_volume(source).data[None]
        expected = normalise_latents(autoencoder.patch_encode(x), autoencoder.codebook.embeddings)[0]
        torch.testing.assert_close(read_latent(file), expected, rtol=1e-5, atol=1e-5)


def test_padded_volumes_are_announced_once(dataset, checkpoint, capsys):
    generate_latents(config(dataset, checkpoint))
    lines = [line for line in capsys.readouterr().err.splitlines() if "do not divide into patches of 16" in line]
    assert len(lines) == 1
    assert "1 volumes" in lines[0]
    assert "MR/a.nii.gz" in lines[0]
    assert read_latent(dataset.parent / "MR_latents" / "a.nii.gz").shape == (4, 4, 8, 4)


def test_only_the_class_folder_itself_is_renamed(tmp_path, checkpoint):
    """A folder whose name occurs elsewhere in the path, given with a trailing slash."""
    save_volume(tmp_path / "CT" / "CT" / "CT" / "CT.nii.gz")
    data = save_json(tmp_path, {"0": f"{tmp_path}/CT/CT/"})
    assert generate_latents(config(data, checkpoint)) == [tmp_path / "CT" / "CT_latents" / "CT" / "CT.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CT", "data.json"]


def test_record_names_the_autoencoder(dataset, checkpoint):
    generate_latents(config(dataset, checkpoint))
    embeddings = load_autoencoder(checkpoint).codebook.embeddings
    for name in ("CT_latents", "MR_latents"):
        record = json.loads((dataset.parent / name / "latents.json").read_text())
        assert len(record.pop("autoencoder")) == 64
        assert record == {
            "checkpoint": "ae.ckpt",
            "downsample": 4,
            "embedding_dim": 4,
            "codebook_min": embeddings.min().item(),
            "codebook_max": embeddings.max().item(),
            "patch_size": 16,
            "intensity_range": [-1.0, 1.0],
        }


def test_sliding_window_bounds_the_patches_encoded_together(tmp_path, checkpoint, monkeypatch):
    save_volume(tmp_path / "CT" / "a.nii.gz", (16, 32, 32))
    save_volume(tmp_path / "CT" / "b.nii.gz", (16, 32, 32), seed=1)
    data = save_json(tmp_path, {"0": "CT"})
    together = []
    encode = Autoencoder.encode
    monkeypatch.setattr(
        Autoencoder,
        "encode",
        lambda self, x, *args, **kwargs: together.append(len(x)) or encode(self, x, *args, **kwargs),
    )
    generate_latents(config(data, checkpoint, sliding_window=3))
    assert together == [6, 2]  # 3 patches of each of the 2 volumes, then what is left


def test_intensity_range_comes_from_the_checkpoint_unless_given(tmp_path, checkpoint):
    """The same image on disk in [0, 1] and in [-1, 1] gives the same latent."""
    save_volume(tmp_path / "low" / "a.nii.gz", low=0.0)
    half = read_volume(tmp_path / "low" / "a.nii.gz").data
    write_volume(tmp_path / "full" / "a.nii.gz", 2 * half - 1, np.eye(4))
    of_low = save_autoencoder(tmp_path / "low.ckpt", intensity_range=[0.0, 1.0])
    (full,) = generate_latents(config(save_json(tmp_path, {"0": "full"}), checkpoint))
    (recorded,) = generate_latents(config(save_json(tmp_path, {"0": "low"}), of_low))
    torch.testing.assert_close(read_latent(recorded), read_latent(full), rtol=1e-5, atol=1e-5)
    (tmp_path / "low_latents").rename(tmp_path / "before")
    (given,) = generate_latents(config(tmp_path / "data.json", checkpoint, intensity_range=[0.0, 1.0]))
    torch.testing.assert_close(read_latent(given), read_latent(full), rtol=1e-5, atol=1e-5)


def test_script_as_published(dataset, checkpoint):
    """The published command line, from another working directory."""
    script = [sys.executable, str(ROOT / "train" / "generate_training_latent.py"), "--data-path", "data.json"]
    options = ["--AE-ckpt", str(checkpoint), "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    run = subprocess.run([*script, *options], cwd=dataset.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(contents(dataset.parent)) == 5 + 2


@pytest.mark.parametrize(
    ("shapes", "batch_size", "expected"),
    [
        ("aaaaa", 2, [[0, 1], [2, 3], [4]]),
        ("abab", 4, [[0, 2], [1, 3]]),
        ("abcab", 1, [[0], [3], [1], [4], [2]]),
    ],
)
def test_batches_hold_one_shape(shapes, batch_size, expected):
    assert batches_of_one_shape(range(len(shapes)), [(letter,) for letter in shapes], batch_size) == expected


# Interruptions ------------------------------------------------------------------------------------------------------


def test_whole_latents_are_kept_and_all_others_replaced(dataset, checkpoint):
    files = generate_latents(config(dataset, checkpoint))
    before = contents(dataset.parent)
    times = {file: file.stat().st_mtime_ns for file in files}
    truncated, poisoned, whole, missing, misshapen = files  # the first and the whole one were encoded together
    truncated.write_bytes(truncated.read_bytes()[:-20])
    write_latent(poisoned, torch.full((4, 4, 8, 4), torch.nan))
    missing.unlink()
    write_latent(misshapen, torch.zeros(4, 4, 4, 8))
    assert generate_latents(config(dataset, checkpoint)) == files
    assert contents(dataset.parent) == before
    assert [file for file in files if file.stat().st_mtime_ns == times[file]] == [whole]


def test_what_is_missing_is_shared_out_evenly(dataset, checkpoint, monkeypatch):
    """All that one of two processes had done is there: the other's share is not left to it alone."""
    files = generate_latents(config(dataset, checkpoint, batch_size=1))
    for file in files[1:5:2]:
        file.unlink()
    for rank in (0, 1):
        place = Distributed(rank, rank, 2, torch.device("cpu"))
        monkeypatch.setattr(Distributed, "on_all", lambda self, function: [[], [1, 3]])  # as the second rank finds
        monkeypatch.setattr(Distributed, "on_main", lambda self, function, share=True: function())
        monkeypatch.setattr(Distributed, "barrier", lambda self: None)
        monkeypatch.setattr(encoding, "joined", lambda *_, place=place: nullcontext(place))
        monkeypatch.setattr(encoding, "_check_still_there", lambda *_: None)
        generate_latents(config(dataset, checkpoint, batch_size=1))
        assert [file.exists() for file in files[1:5:2]] == [True, rank == 1]


def test_nothing_is_encoded_twice(dataset, checkpoint, monkeypatch):
    generate_latents(config(dataset, checkpoint))
    monkeypatch.setattr(Autoencoder, "encode", lambda *args, **kwargs: pytest.fail("encoded again"))
    generate_latents(config(dataset, checkpoint))


@pytest.mark.parametrize("fatal_write", [1, 2, 4, 6])
def test_sigkill_and_again_gives_the_same_as_one_go(dataset, checkpoint, monkeypatch, fatal_write):
    """The process dies in the middle of a write: of a record (1, 2), or of the second or fourth latent."""
    generate_latents(config(dataset, checkpoint))
    expected = contents(dataset.parent)
    for name in ("CT_latents", "MR_latents"):
        (dataset.parent / name).rename(dataset.parent / f"{name}_before")
    write, calls = volume_io.write_atomically, []

    def dying_write(path, content):
        calls.append(path)
        if len(calls) < fatal_write:
            return write(path, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(volume_io, "write_atomically", dying_write)
        patch.setattr("dataset.volumes.latent_record.write_atomically", dying_write)
        child = fork.Process(target=generate_latents, args=(config(dataset, checkpoint),))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    generate_latents(config(dataset, checkpoint))
    found = {name: content for name, content in contents(dataset.parent).items() if "_before" not in name}
    assert found == expected


def test_processes_share_the_volumes_out(dataset, checkpoint, monkeypatch, tmp_path):
    generate_latents(config(dataset, checkpoint))
    expected = contents(dataset.parent)
    for name in ("CT_latents", "MR_latents"):
        (dataset.parent / name).rename(tmp_path / f"{name}_before")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(29500 + os.getpid() % 2000))

    def rank(number: int) -> None:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
        written = []
        encoding.write_latent = lambda path, latent: written.append(path) or write_latent(path, latent)
        generate_latents(config(dataset, checkpoint))
        (tmp_path / f"rank{number}").write_text(str(len(written)))

    children = [fork.Process(target=rank, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert {name: content for name, content in contents(dataset.parent).items() if "_before" not in name} == expected
    shares = [int((tmp_path / f"rank{number}").read_text()) for number in range(2)]
    assert sum(shares) == 5
    assert min(shares) >= 1


# Which autoencoder --------------------------------------------------------------------------------------------------


def test_latents_of_another_autoencoder_are_refused(dataset, checkpoint, tmp_path):
    generate_latents(config(dataset, checkpoint))
    before = contents(dataset.parent)
    other = save_autoencoder(tmp_path / "other.ckpt", seed=1)
    with pytest.raises(
        UserError, match=r"CT_latents: holds latents of another autoencoder \(ae.ckpt\) than other.ckpt"
    ):
        generate_latents(config(dataset, other))
    assert contents(dataset.parent) == before


def test_stage_2_of_the_same_autoencoder_shares_its_latents(dataset, checkpoint, tmp_path):
    generate_latents(config(dataset, checkpoint))
    before = contents(dataset.parent)
    stage_2 = torch.load(checkpoint, weights_only=False)
    for name, value in stage_2["state_dict"].items():
        if name.startswith(("decoder.", "post_vq_conv.")):
            value.add_(1)
    torch.save(stage_2, tmp_path / "stage_2.ckpt")
    generate_latents(config(dataset, tmp_path / "stage_2.ckpt"))
    assert contents(dataset.parent) == before


def test_latents_of_another_range_are_refused(tmp_path, checkpoint):
    save_volume(tmp_path / "CT" / "a.nii.gz", low=0.0)
    data = save_json(tmp_path, {"0": "CT"})
    generate_latents(config(data, checkpoint, intensity_range=[0.0, 1.0]))
    with pytest.raises(UserError, match=r"made with intensity_range \[0.0, 1.0\], not \[-0.5, 1.0\]"):
        generate_latents(config(data, checkpoint, intensity_range=[-0.5, 1.0]))


def test_latents_without_a_record_are_refused(dataset, checkpoint):
    write_latent(dataset.parent / "MR_latents" / "old.nii.gz", torch.zeros(4, 4, 4, 4))
    with pytest.raises(UserError, match=r"MR_latents: has latents but no latents.json"):
        generate_latents(config(dataset, checkpoint))
