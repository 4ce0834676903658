"""What generation leaves on disk: units, types, records, and what a second run keeps."""

import json
import multiprocessing
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from generation_models import CUBE, config, prepared, row, save_models, voxels

from common.errors import UserError
from dataset.preparation.manifest import Intensity
from evaluation.generation import record as volume_record
from evaluation.generation import run as generation
from evaluation.generation.run import generate


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def test_denormalize_writes_hounsfield_units_and_zero_to_one(models, tmp_path):
    plain = [voxels(path) for path in generate(config(models, tmp_path / "plain"))]
    window = Intensity("window", -200.0, 400.0, "HU")
    data = prepared(tmp_path, Chest=[window, window], Head=[Intensity("percentiles", 3.0, 70.0)])
    cfg = config(models, tmp_path / "units", denormalize=str(data))
    chest, head = generate(cfg)
    torch.testing.assert_close(voxels(chest), plain[0] * 300 + 100, atol=1e-2, rtol=0)
    torch.testing.assert_close(voxels(head), (plain[1] + 1) / 2, atol=1e-5, rtol=0)
    assert voxels(chest).max() > 100
    record = json.loads(chest.with_name("Chest_32x32x32.json").read_text())
    assert record["intensity"] == {"method": "window", "low": -200, "high": 400, "unit": "HU"}
    before = chest.stat().st_mtime_ns
    assert generate(cfg) == [chest, head]  # done already, and recognised as such
    assert chest.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other settings \(intensity"):
        generate(config(models, tmp_path / "units"))


def test_denormalize_needs_units_that_are_known(models, tmp_path):
    data = prepared(tmp_path, Chest=[Intensity("window", 0.0, 1.0), Intensity("window", 0.0, 2.0)])
    chest = [row(0, "Chest", CUBE)]
    with pytest.raises(UserError, match="prepared in different ways"):
        generate(config(models, tmp_path / "a", chest, denormalize=str(data)))
    with pytest.raises(UserError, match=r"denormalize: .*Singleres_dataset\.json has no class 1"):
        generate(config(models, tmp_path / "a", denormalize=str(data)))
    with pytest.raises(UserError, match=r"missing\.json: no such dataset JSON"):
        generate(config(models, tmp_path / "a", chest, denormalize=str(tmp_path / "missing.json")))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("num_samples", "names"), [(1, ["A_32x32x32"]), (2, ["A_32x32x32_0", "A_32x32x32_1"])])
def test_numbers_of_samples(models, tmp_path, num_samples, names):
    paths = generate(config(models, tmp_path, [row(0, "A", CUBE)], num_samples=num_samples))
    assert [path.name for path in paths] == [f"{name}.nii.gz" for name in names]


def test_record_beside_a_volume(models, tmp_path):
    (path,) = generate(config(models, tmp_path, [row(1, "Head", CUBE, spacing=(1.0, 1.0, 2.0))], seed=3, eta=0.5))
    record = json.loads((path.parent / "Head_32x32x32.json").read_text())
    assert {len(record.pop(name)) for name in ("AE_sha256", "model_sha256")} == {64}
    run = record.pop("run")
    assert run["sampling_s"] > 0
    assert run["decoding_s"] > 0
    assert 0.1 < run["peak_memory_gb"] < 1000
    assert run["versions"]["torch"] == torch.__version__
    assert (run["batch_size"], run["world_size"]) == (1, 1)
    assert run["device"].startswith("CPU")
    assert run["finished_utc"].endswith("+00:00")
    assert sys.argv[0] in run["command"]
    assert record == {
        "class_id": 1,
        "class_name": "Head",
        "grid": [8, 8, 8],
        "spacing_mm": [1.0, 1.0, 2.0],
        "sample": 0,
        "voxels": [32, 32, 32],
        "decoding": "exact",
        "tile": None,
        "intensity": None,
        "seed": 3,
        "timesteps": 12,
        "sampling_strategy": "ddim",
        "ddim_steps": 3,
        "eta": 0.5,
        "guidance_scale": 1.0,
        "vq_size": 64,
        "resnet_groups": 8,
        "dit_num_heads": 4,
        "precision": "32",
        "output_dtype": "float32",
    }


# Volumes that are there ---------------------------------------------------------------------------------------------


def test_whole_volumes_are_kept_and_all_others_made_again(models, tmp_path):
    paths = generate(config(models, tmp_path, num_samples=2))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    whole, truncated, missing, other_kind = paths
    truncated.write_bytes(truncated.read_bytes()[:-10])
    missing.unlink()
    other_kind.write_text("no volume")
    assert generate(config(models, tmp_path, num_samples=2)) == paths
    for path, (content, mtime) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == mtime) == (path == whole)


def test_an_interrupted_run_goes_on(models, tmp_path, monkeypatch):
    """The second volume cannot be written; the same command later makes it alone."""
    write, written = generation.write_volume, []

    def full_disk(path, *args):
        if written:
            raise UserError(f"{path}: cannot be written (No space left on device)")
        written.append(path)
        write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "write_volume", full_disk)
        with pytest.raises(UserError, match="No space left"):
            generate(config(models, tmp_path))
    time = written[0].stat().st_mtime_ns
    paths = generate(config(models, tmp_path))
    assert all(path.is_file() for path in paths)
    assert paths[0].stat().st_mtime_ns == time


def test_a_larger_table_keeps_what_is_there(models, tmp_path):
    (path,) = generate(config(models, tmp_path, [row(1, "Head", CUBE)]))
    time = path.stat().st_mtime_ns
    assert len(generate(config(models, tmp_path))) == 2
    assert path.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dtype": "int16"}, r"output_dtype was 'float32', is 'int16'"),
        ({"ddim_steps": 4}, r"other settings \(ddim_steps: ddim_steps was 3, is 4\)"),
        ({"classes": [row(1, "Chest", CUBE)]}, r"class_id was 0, is 1"),
        ({"classes": [row(0, "Chest", CUBE, spacing=(1.0, 1.0, 3.0))]}, "spacing_mm was"),
    ],
)
def test_volumes_of_other_settings_are_not_taken_for_done(models, tmp_path, values, message):
    generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    with pytest.raises(UserError, match=message):
        generate(config(models, tmp_path, **{"classes": [row(0, "Chest", CUBE)], **values}))


def test_other_weights_are_other_settings(models, tmp_path):
    classes = [row(0, "Chest", CUBE)]
    generate(config(models, tmp_path, classes))
    other = torch.load(models / "flow.pt", weights_only=False)
    other["ema"]["init_conv.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="model_sha256"):
        generate(config(models, tmp_path, classes, model_ckpt=str(tmp_path / "other.pt")))


def test_volumes_of_unknown_settings_are_not_taken_for_done(models, tmp_path):
    (path,) = generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    (path.parent / "Chest_32x32x32.json").unlink()
    with pytest.raises(UserError, match=r"Chest_32x32x32.nii.gz: how this volume was made is not known"):
        generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "{", "\0"])
def test_damaged_records_are_none(models, tmp_path, content):
    (path,) = generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    (path.parent / "Chest_32x32x32.json").write_text(content)
    with pytest.raises(UserError, match=r"Chest_32x32x32.json is not there or damaged"):
        generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))


def test_processes_wait_for_slower_ones(models, tmp_path, monkeypatch):
    """Longer than torch's ten or thirty minutes: one volume alone may take more."""
    seen = []
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **options: seen.append(options["timeout"]))
    monkeypatch.setattr(generation, "image_settings", None)
    with pytest.raises((TypeError, ValueError, RuntimeError)):  # the group was not made, so the first use of it fails
        generate(config(models, tmp_path))
    assert seen == [timedelta(days=30)]


def in_two_processes(work, monkeypatch) -> None:
    """Calls work(rank) in two processes, as torchrun would."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))

    def rank(number: int) -> None:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
        work(number)

    fork = multiprocessing.get_context("fork")  # children share the loaded modules
    children = [fork.Process(target=rank, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)


def test_processes_share_the_volumes_out(models, tmp_path, monkeypatch):
    alone = generate(config(models, tmp_path / "alone"))
    write = generation.write_volume

    def work(number: int) -> None:
        written = []
        generation.write_volume = lambda path, *args: written.append(path.name) or write(path, *args)
        generate(config(models, tmp_path / "shared"))
        (tmp_path / f"rank{number}").write_text(" ".join(written))

    in_two_processes(work, monkeypatch)
    assert [(tmp_path / f"rank{number}").read_text() for number in range(2)] == [path.name for path in alone]
    for path in alone:
        assert (tmp_path / "shared" / "seed_0" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "shared" / "seed_0" / "contact_sheet.png").is_file()


def test_processes_hash_the_checkpoints_once_and_fail_together(models, tmp_path, monkeypatch):
    """A volume of other settings in the second process's share ends both, with the same message."""
    generate(config(models, tmp_path / "out", [row(1, "Head", CUBE)], ddim_steps=2))

    def work(number: int) -> None:
        hashed = []
        sha256 = volume_record.file_sha256
        volume_record.file_sha256 = lambda path: hashed.append(str(path)) or sha256(path)
        with pytest.raises(UserError) as caught:
            generate(config(models, tmp_path / "out"))
        (tmp_path / f"rank{number}").write_text(f"{len(hashed)} {caught.value}")

    in_two_processes(work, monkeypatch)
    first, second = ((tmp_path / f"rank{number}").read_text() for number in range(2))
    assert (first[0], second[0]) == ("2", "0")
    assert "Head_32x32x32.nii.gz: this volume was made with other settings" in first
    assert first[1:] == second[1:]


def test_nothing_to_do_loads_no_model(models, tmp_path, monkeypatch):
    paths = generate(config(models, tmp_path))
    monkeypatch.setattr(generation, "load_models", None)
    assert generate(config(models, tmp_path)) == paths
    with pytest.raises(TypeError):  # the check above would see it
        generate(config(models, tmp_path, seed=1))


def test_a_run_killed_between_record_and_volume_goes_on(models, tmp_path):
    (path,) = generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    content = path.read_bytes()
    path.unlink()
    assert generate(config(models, tmp_path, [row(0, "Chest", CUBE)])) == [path]
    assert path.read_bytes() == content


def test_how_a_volume_was_made_may_differ(models, tmp_path):
    """Another machine, batch size, memory or layout leaves what is there."""
    (path,) = generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    record = json.loads((path.parent / "Chest_32x32x32.json").read_text())
    del record["run"]
    (path.parent / "Chest_32x32x32.json").write_text(json.dumps(record))
    time = path.stat().st_mtime_ns
    generate(config(models, tmp_path, [row(0, "Chest", CUBE)], batch_size=4, max_memory=3, channels_last=True))
    assert path.stat().st_mtime_ns == time


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_samples_keeps_the_first(models, tmp_path, before, after):
    """Sample 0 is one volume, whether it is called NAME or NAME_0."""
    chest = [row(0, "Chest", CUBE)]
    first, *_ = generate(config(models, tmp_path, chest, num_samples=before))
    time = first.stat().st_mtime_ns
    paths = generate(config(models, tmp_path, chest, num_samples=after))
    assert paths[0] == first
    assert first.stat().st_mtime_ns == time
    assert [path.name for path in paths[1:]] == ["Chest_32x32x32_1.nii.gz"][: after - 1]


def test_a_disk_that_is_too_small_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"2 volumes need at least 0.0 GB, the disk has 0.0 GB: free space"):
        generate(config(models, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_what_lies_in_a_volumes_place_is_never_lost(models, tmp_path):
    """A whole volume of another size, a folder."""
    chest = [row(0, "Chest", CUBE)]
    (path,) = generate(config(models, tmp_path, chest))
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)), path)
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"another volume is there, of \(8, 8, 8\) voxels"):
        generate(config(models, tmp_path, chest))
    assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="a folder is in the volume's place"):
        generate(config(models, tmp_path, chest))


def test_a_file_as_output_folder(models, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(generation, "load_models", None)
    with pytest.raises(UserError, match="output_dir: .*file is a file"):
        generate(config(models, tmp_path / "file" / "out"))


@pytest.mark.parametrize(("name", "value"), [("vq_size", 32), ("resnet_groups", 4), ("dit_num_heads", 2)])
def test_options_that_no_weight_shows(models, tmp_path, name, value):
    """They load whatever they are: compared with the checkpoint where it tells, and with what is there."""
    chest = [row(0, "Chest", CUBE)]
    generate(config(models, tmp_path / "a", chest))
    with pytest.raises(UserError, match=rf"other settings \({name}"):
        generate(config(models, tmp_path / "a", chest, **{name: value}))
    checkpoint = torch.load(models / "flow.pt", weights_only=False)
    setattr(checkpoint["args"], name, value)
    torch.save(checkpoint, tmp_path / "told.pt")
    with pytest.raises(UserError, match=rf"{name} is .*, but .*told.pt was trained with {value}: give that"):
        generate(config(models, tmp_path / "b", chest, model_ckpt=str(tmp_path / "told.pt")))


# Seeds and requests -------------------------------------------------------------------------------------------------


def test_seeds_in_one_batch_are_as_each_alone(models, tmp_path):
    chest = [row(0, "Chest", CUBE)]
    together = generate(config(models, tmp_path / "a", chest, seeds="3-4", batch_size=2))
    assert [str(path.relative_to(tmp_path)) for path in together] == [
        "a/seed_3/Chest_32x32x32.nii.gz",
        "a/seed_4/Chest_32x32x32.nii.gz",
    ]
    for path, seed in zip(together, (3, 4), strict=True):
        (alone,) = generate(config(models, tmp_path / "b", chest, seed=seed))
        assert ((voxels(path) - voxels(alone)).abs() > 1e-4).float().mean() < 1e-3
        assert json.loads((path.parent / "Chest_32x32x32.json").read_text())["seed"] == seed
        assert {file.name for file in path.parent.iterdir()} >= {"config.yaml", "contact_sheet.png"}
    assert not torch.allclose(voxels(together[0]), voxels(together[1]), atol=1e-2)


def test_a_list_of_requests_is_generated(models, tmp_path):
    """Head twice as wide in x, with its own spacing, seed and number; Chest as the options say."""
    (tmp_path / "list.csv").write_text("class,seed,num_samples,resolution,spacing\nHead,5,2,32 32 64,1 1 2\nChest\n")
    paths = generate(config(models, tmp_path / "out", requests=str(tmp_path / "list.csv"), seed=1))
    assert [str(path.relative_to(tmp_path / "out")) for path in paths] == [
        "seed_5/Head_64x32x32_0.nii.gz",
        "seed_5/Head_64x32x32_1.nii.gz",
        "seed_1/Chest_32x32x32.nii.gz",
    ]
    image = nib.load(paths[0])
    assert image.shape == (64, 32, 32)
    assert np.allclose(image.affine[:3], [[1, 0, 0, -31.5], [0, 1, 0, -15.5], [0, 0, 2, -31]])


# Types --------------------------------------------------------------------------------------------------------------


def test_int16_in_hounsfield_units_and_scaled(models, tmp_path):
    window = Intensity("window", -1000.0, 1000.0, "HU")
    data = prepared(tmp_path, Chest=[window], Head=[Intensity("percentiles", 3.0, 70.0)])
    exact = generate(config(models, tmp_path / "a", denormalize=str(data)))
    cfg = config(models, tmp_path / "b", denormalize=str(data), output_dtype="int16")
    chest, head = generate(cfg)
    assert torch.equal(voxels(chest), voxels(exact[0]).round())
    assert 0 < (voxels(head) - voxels(exact[1])).abs().max() <= 0.5001 / 65534
    assert [nib.load(path).get_data_dtype() for path in (chest, head)] == [np.int16] * 2
    before = chest.stat().st_mtime_ns
    assert generate(cfg) == [chest, head]
    assert chest.stat().st_mtime_ns == before
