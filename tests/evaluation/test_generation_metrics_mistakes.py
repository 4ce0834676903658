"""What evaluation/generation_metrics.py refuses, and what it warns of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import FAST, blob, counted, write_json, write_set, write_three
from evaluation_sets import run_metrics as run

from common.errors import UserError
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.volume_io import read_volume, write_volume
from evaluation.generation_metrics import main


@pytest.fixture
def sets(tmp_path):
    return write_three(tmp_path)


def spoil(sets: Path, case: str) -> None:
    path = sets / "generated" / "v021.nii.gz"
    data = blob(21)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "no image":
        path.write_bytes(b"nothing")
    elif case == "nan":
        data[3, 3, 3] = np.nan
        write_volume(path, data, affine_from_spacing((1, 1, 1)))
    elif case == "outside":
        write_volume(path, 1000 * data, affine_from_spacing((1, 1, 1)))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "v021.nii.gz: the file is truncated"),
        ("no image", "v021.nii.gz: not a NIfTI image"),
        ("nan", "v021.nii.gz: 1 NaN or infinite voxels"),
        ("outside", r"v021.nii.gz: intensities from -1000 to .* outside the declared range"),
    ],
)
def test_files_that_cannot_be_read_are_named_or_left_out(sets, case, message):
    spoil(sets, case)
    with pytest.raises(UserError, match=f"1 .*can't be read: .*{message}.*--exclude-unreadable"):
        run(sets)
    assert not (sets / "out" / "generation.json").exists()
    results = run(sets, "--exclude-unreadable")
    (excluded,) = results["excluded"]
    assert excluded["file"].endswith("v021.nii.gz")
    assert results["figures"][0]["num"] == {"real": 8, "generated": 5}
    assert "1 volumes were left out (excluded): the figures are those of the rest" in results["warnings"]


def test_the_sound_volumes_are_kept_when_others_turn_out_damaged(sets, monkeypatch):
    spoil(sets, "truncated")
    with pytest.raises(UserError):
        run(sets)
    sizes = counted(monkeypatch)
    write_set(sets / "generated", [21])
    run(sets)
    assert sizes[0] == 1  # of the first network nothing but the volume that was damaged


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"real": None}, "required but not set: real"),
        ({"networks": ["vgg"]}, "networks must be auto, or some of medicalnet_resnet50"),
        ({"networks": ["medicalnet_resnet50"]}, "medicalnet_resnet50 needs resnet_50.pth"),
        ({"real_range": [1, 0]}, "real_range must be two numbers"),
        ({"resample": True, "ignore_spacing": True}, "resample and ignore_spacing exclude each other"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
    ],
)
def test_wrong_options(sets, monkeypatch, values, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(sets / "hub"))
    words = [f"{name}={'null' if v is None else json.dumps(v)}" for name, v in values.items()]
    options = ["--generated", str(sets / "generated"), "--output-dir", str(sets / "out"), *FAST]
    options += [] if "real" in values else ["--real", str(sets / "real")]
    with pytest.raises(UserError, match=message):
        main([*options, *words])
    assert not (sets / "out").exists()


def test_volumes_too_small_for_the_similarity_are_refused_first(tmp_path):
    for name, seeds in (("real", [0, 1]), ("generated", [2, 3])):
        write_set(tmp_path / name, seeds, size=10)
    with pytest.raises(UserError, match="11"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_other_scales_are_refused(sets):
    for path in (sets / "generated").iterdir():
        write_volume(path, (read_volume(path).data + 1) / 2, affine_from_spacing((1, 1, 1)))
    with pytest.raises(UserError, match=r"their scales differ.*generated_range=\[0,1\]"):
        run(sets)
    run(sets, "--generated-range", "0", "1")


def test_memorisation_without_a_network_of_volumes_is_refused(sets):
    with pytest.raises(UserError, match="memorisation check needs a network of whole volumes"):
        run(sets, "--training", sets / "training", "--networks", "random_2d")


def test_volumes_that_say_nothing_are_warned_of(sets):
    shutil.copy(sets / "real" / "v001.nii.gz", sets / "real" / "again.nii.gz")
    write_volume(sets / "generated" / "v020.nii.gz", read_volume(sets / "real" / "v002.nii.gz").data, np.eye(4))
    write_volume(sets / "generated" / "v021.nii.gz", np.full((16, 16, 16), -1, np.float32), np.eye(4))
    text = "\n".join(run(sets)["warnings"])
    assert "1 of 9 real volumes are copies of others of the set" in text
    assert "1 of 6 generated volumes have one value everywhere" in text
    assert "1 of 9 real volumes are among the generated ones" in text
    assert "generated volumes are copies" not in text


def test_too_few_volumes_for_intervals_are_said(sets):
    text = "\n".join(run(sets)["warnings"])
    assert "precision, recall, density, coverage without interval" in text
    assert "FID" not in text.split("without interval")[0].splitlines()[-1]


def test_sides_with_fewer_slices_than_asked_for(tmp_path):
    for name, seeds in (("a", range(4)), ("b", range(4, 8)), ("ga", range(8, 12)), ("gb", range(12, 16))):
        for seed in seeds:
            write_volume(tmp_path / name / f"{seed}.nii.gz", blob(seed, 24)[:17], affine_from_spacing((1, 1, 1)))
    real = write_json(tmp_path / "r.json", a=tmp_path / "a", b=tmp_path / "b")
    made = write_json(tmp_path / "g.json", a=tmp_path / "ga", b=tmp_path / "gb")
    results = run(tmp_path, "--real", real, "--generated", made, "--networks", "random_2d", "--slices", "20")
    found = {f["metric"]: f["num"]["slices of each"] for f in results["figures"] if f["group"] == "all classes"}
    assert found == {"FID-2.5D": 57, "FID-2.5D axial": 17, "FID-2.5D coronal": 20, "FID-2.5D sagittal": 20}


@pytest.mark.parametrize("name", ["generation.json", "generation.csv"])
def test_a_folder_in_the_place_of_a_result_is_refused_first(sets, name, monkeypatch):
    sizes = counted(monkeypatch)
    (sets / "out" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is a folder: remove it"):
        run(sets)
    assert sizes == []


@pytest.mark.parametrize(("file", "option"), [("out/pictures", "output_dir"), ("cache", "cache_dir")])
def test_a_file_in_the_place_of_a_folder_is_refused_first(sets, file, option, monkeypatch):
    sizes = counted(monkeypatch)
    (sets / "out").mkdir()
    (sets / file).write_text("")
    with pytest.raises(UserError, match=f"{option}: .*{file} can't be written to"):
        run(sets, "--cache-dir", sets / "cache")
    assert sizes == []


def test_a_table_of_an_earlier_run_does_not_stay(sets):
    run(sets, "--training", sets / "training")
    run(sets)
    assert not (sets / "out" / "memorisation.csv").exists()


def test_a_place_that_cannot_be_written_to_is_refused_first(sets, monkeypatch):
    sizes = counted(monkeypatch)
    (sets / "out").write_text("a file")
    with pytest.raises(UserError, match="output_dir: .* can't be written to"):
        run(sets)
    assert sizes == []


def test_two_volumes_each_are_enough(tmp_path):
    write_set(tmp_path / "real", [0, 1])
    write_set(tmp_path / "generated", [2, 3])
    results = run(tmp_path)
    assert {f["metric"] for f in results["figures"]} >= {"FID-3D", "MMD", "diversity gap"}
    assert all(f["floor"] is None for f in results["figures"])
    assert any("neighbours=5" in warning for warning in results["warnings"])


def test_sizes_are_resampled_when_asked_for(sets):
    write_set(sets / "fine", range(20, 26), (0.5, 0.5, 0.5), 32)
    with pytest.raises(UserError, match="--resample"):
        run(sets, "--generated", sets / "fine")
    results = run(sets, "--generated", sets / "fine", "--resample")
    assert results["figures"][0]["num"] == {"real": 8, "generated": 6}


def test_without_pictures(sets):
    results = run(sets, "--training", sets / "training", "--num-pictures", "0")
    assert results["pictures"] == []
    assert not (sets / "out" / "pictures").exists()
