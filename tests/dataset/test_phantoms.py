"""Phantoms: deterministic, within the contract of the data sets, different by class, and resumable on disk."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from dataset.order.data_split import HELD_OUT, TRAINING, VALIDATION, files_of_side
from dataset.preparation.phantoms import CLASSES, make_phantom, only_training, write_phantoms
from dataset.volumes.index import read_class_json, read_dataset_json
from dataset.volumes.volume_io import read_header, read_model_volume, tensor_to_nifti

SIZE = 16


@pytest.mark.parametrize("class_id", [0, 1])
def test_phantom_keeps_the_contract(class_id):
    phantom = make_phantom(class_id, 0, size=32)
    assert phantom.data.shape == (32, 32, 32)
    assert phantom.data.dtype == np.float32
    assert phantom.data.min() == -1  # air
    assert 0.2 < phantom.data.max() <= 1
    assert phantom.data[0, 0].max() == -1  # the corners of the picture are air all along
    assert 0.2 < np.mean(phantom.data > -1) < 0.7
    assert all(4 < spacing < 14 for spacing in phantom.spacing_mm)


def test_phantoms_depend_on_seed_class_and_index_only():
    first = make_phantom(0, 3, SIZE, seed=1)
    np.random.seed(5)  # noqa: NPY002
    again = make_phantom(0, 3, SIZE, seed=1)
    assert np.array_equal(first.data, again.data)
    assert first.spacing_mm == again.spacing_mm
    for other in (make_phantom(0, 4, SIZE, seed=1), make_phantom(0, 3, SIZE, seed=2), make_phantom(1, 3, SIZE, seed=1)):
        assert np.abs(first.data - other.data).mean() > 0.01
        assert first.spacing_mm != other.spacing_mm


def test_classes_are_told_apart_by_nearest_mean():
    volumes = np.array([[make_phantom(k, i, 32).data.ravel() for i in range(6)] for k in (0, 1)])
    means = volumes[:, :3].mean(axis=1)
    for class_id in (0, 1):
        for volume in volumes[class_id, 3:]:
            assert np.argmin(((means - volume) ** 2).mean(axis=1)) == class_id


def test_anatomy_is_where_it_belongs():
    chest, head = make_phantom(0, 0, 32).data, make_phantom(1, 0, 32).data
    for lung in (chest[7:11, 14:19, 16:22], chest[21:25, 14:19, 16:22]):  # on both sides
        assert np.median(lung) < -0.6
    assert chest[12:20, :12, 8:24].max() > 0.4  # the spine at the back
    assert chest[16, 16].min() > -1.0  # the chest runs through the whole picture from top to bottom
    assert head[16, 16, 31] == -1  # air above the head
    assert head[8, 16, 16] > 0.0  # white matter
    assert head[8:24, 16, 16].min() < -0.15  # ventricles


def test_texture_is_about_one_percent_of_the_range():
    liver = make_phantom(0, 0, 64).data[44:50, 28:36, 2:8]
    assert 0.01 < liver.std() < 0.03


def test_folders_and_jsons(tmp_path):
    counts = {TRAINING: 2, VALIDATION: 1, HELD_OUT: 3}
    write_phantoms(tmp_path, counts, size=SIZE, seed=0)
    names = [name for name, _ in CLASSES]
    by_name = read_dataset_json(tmp_path / "PatchVolume_data.json")
    assert list(by_name) == names
    assert list(read_class_json(tmp_path / "Singleres_dataset.json").values()) == list(by_name.values())
    latents = json.loads((tmp_path / "Singleres_latents.json").read_text())
    assert latents == {str(i): f"{name}_latents" for i, name in enumerate(names)}
    for side, count in counts.items():
        files = files_of_side(tmp_path / "PatchVolume_data.json", side)
        assert {name: len(of_class) for name, of_class in files.items()} == dict.fromkeys(names, count)
    path = tmp_path / "CTChest" / "CTChest_0001.nii.gz"
    phantom = make_phantom(0, 1, SIZE)
    assert np.array_equal(tensor_to_nifti(read_model_volume(path, (-1, 1)).data[0]).numpy(), phantom.data)
    np.testing.assert_allclose(np.diag(read_header(path).affine), (*phantom.spacing_mm, 1), rtol=1e-6)


def test_held_out_phantoms_are_others(tmp_path):
    write_phantoms(tmp_path, {TRAINING: 3, VALIDATION: 3, HELD_OUT: 3}, size=SIZE, seed=0)
    contents = {path.read_bytes() for path in tmp_path.rglob("*.nii.gz")}
    assert len(contents) == 18


def test_whole_files_are_kept_and_partial_ones_replaced(tmp_path):
    options = {"counts": only_training(2), "size": SIZE, "seed": 0}
    write_phantoms(tmp_path, **options)
    whole, partial = tmp_path / "CTChest" / "CTChest_0000.nii.gz", tmp_path / "MRBrain" / "MRBrain_0001.nii.gz"
    expected, time = partial.read_bytes(), whole.stat().st_mtime_ns
    partial.write_bytes(expected[:100])
    write_phantoms(tmp_path, **options)
    assert partial.read_bytes() == expected
    assert whole.stat().st_mtime_ns == time


def test_phantoms_of_other_options_are_not_mixed(tmp_path):
    write_phantoms(tmp_path, only_training(2), size=SIZE, seed=0)
    with pytest.raises(UserError, match='"seed": 0.*name a new folder'):
        write_phantoms(tmp_path, only_training(2), size=SIZE, seed=1)
    with pytest.raises(UserError, match="2 files more than asked for.*name a new folder"):
        write_phantoms(tmp_path, only_training(1), size=SIZE, seed=0)
    write_phantoms(tmp_path, only_training(3), size=SIZE, seed=0)
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 6


def test_size_is_checked():
    with pytest.raises(UserError, match="--size 8"):
        make_phantom(0, 0, size=8)


def test_script(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "dataset" / "phantoms.py"), "--output-dir", str(tmp_path / "phantoms")]
    options = ["--num-per-class", "1", "--num-validation", "0", "--num-held-out", "0", "--size"]
    done = subprocess.run([*command, *options, "16"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "phantoms").rglob("*.nii.gz"))) == 2
    failed = subprocess.run([*command, *options, "24"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
