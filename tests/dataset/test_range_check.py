"""Files of another intensity range than the declared one, given to the data sets without any of our scripts."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from common.errors import UserError
from dataset import GenerateTrData_dataset, Singleres_dataset, VQGANDataset, VQGANDataset_4x
from dataset.checking import before_training, examine
from dataset.volumes.volume_io import write_volume

DATASETS: dict[str, Callable[..., Dataset]] = {
    "stage 1": lambda root, **options: VQGANDataset(root, True, "train", 1, 8, **options),
    "stage 2, 4x": lambda root, **options: VQGANDataset_4x(root, False, "train", 2, **options),
    "validation": lambda root, **options: VQGANDataset(root, False, "val", **options),
    "volumes to encode": lambda root, **options: Singleres_dataset(root, generate_latents=True, **options),
    "folder": lambda root, **options: GenerateTrData_dataset(root.parent / "A", **options),
}


def make_set(folder: Path, *ranges: tuple[float, float], names=("A",)) -> Path:
    """A volume of each range for each name, in a JSON whose names are class ids."""
    for name in names:
        for i, (low, high) in enumerate(ranges):
            data = np.random.default_rng(i).uniform(low, high, (8, 9, 10)).astype(np.float32)
            data[0] = low  # the background
            write_volume(folder / name / f"{i}.nii.gz", data, np.eye(4))
    root = folder / "set.json"
    root.write_text(json.dumps({str(i): name for i, name in enumerate(names)}))
    return root


def lowest(item: dict | tuple) -> float:
    return float((item["data"] if isinstance(item, dict) else item[0]).min())


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
@pytest.mark.parametrize(("declared", "files"), [((-1, 1), (0, 1)), ((0, 2), (1, 2)), ((-1000, 1000), (0, 1000))])
def test_half_of_the_declared_range_is_refused_at_once(tmp_path, build, declared, files):
    root = make_set(tmp_path, files, files)
    low, high = files
    with pytest.raises(
        UserError, match=rf"only the upper half .* dataset.intensity_range=\[{low},{high}\] fits .*Python"
    ):
        build(root, intensity_range=declared)
    assert lowest(build(root, intensity_range=files)[0]) == -1
    middle = build(root, intensity_range=declared, check=False)  # whoever knows better
    assert lowest(middle[0]) == 0


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([(0, 255), (0, 255)], r"0\.nii\.gz: intensities from 0 to 25\d.* lie outside the declared range \[-1, 1\]"),
        ([(-1, -1), (-1, 1)], r"0\.nii\.gz: all background"),
        ([(0, 1), (0.2, 0.9)], r"intensities from 0 to .* only the upper half"),
    ],
)
def test_what_else_the_sample_shows(tmp_path, build, files, message):
    with pytest.raises(UserError, match=message):
        build(make_set(tmp_path, *files))


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
def test_a_bright_volume_among_others_is_no_mistake(tmp_path, build):
    """Whichever side of the split it is on."""
    root = make_set(tmp_path, (-1, 1), (0.2, 1), (-1, 0.5))
    assert len(build(root)) > 0


def test_one_name_of_several_is_found(tmp_path):
    root = make_set(tmp_path, (-1, 1), (-1, 1), names=("A", "B"))
    make_set(tmp_path, (0, 1), (0, 1), names=("C",))
    root.write_text(json.dumps({"0": "A", "1": "B", "2": "C"}))
    with pytest.raises(
        UserError, match=r"set\.json: 2: intensities from 0 to .*`python dataset/check\.py .*set\.json`"
    ):
        Singleres_dataset(root, generate_latents=True)


def test_a_plain_folder_is_named(tmp_path):
    make_set(tmp_path, (0, 1))
    with pytest.raises(UserError, match=rf"^{tmp_path}/A: A: intensities .*`python dataset/check\.py JSON` reads all"):
        GenerateTrData_dataset(tmp_path / "A")


@pytest.mark.parametrize("values", [(0, 1), (-1024, 3071)])
def test_values_as_they_are_have_no_range(tmp_path, values):
    make_set(tmp_path, values)
    assert lowest(GenerateTrData_dataset(tmp_path / "A", no_norm=True)[0]) == values[0]


def test_the_sample_is_read_once_and_anew_where_it_was_corrected(tmp_path, monkeypatch):
    read, original = [], examine.read_volume
    monkeypatch.setattr(examine, "read_volume", lambda path: read.append(path.name) or original(path))
    root = make_set(tmp_path, *[(-1, 1)] * 20)
    for split in ("train", "val"):
        VQGANDataset(root, split=split)
    assert len(read) == len(set(read)) == before_training.SAMPLE_SIZE
    write_volume(tmp_path / "A" / read[0], torch.full((8, 9, 10), 3.0), np.eye(4))
    with pytest.raises(UserError, match=rf"A/{read[0]}: intensities from 3 to 3 lie outside"):
        VQGANDataset(root)
    assert read[before_training.SAMPLE_SIZE :] == read[:1]


def test_odd_headers_are_warned_of_once(tmp_path, caplog):
    root = make_set(tmp_path, (-1, 1), (-1, 1))
    write_volume(tmp_path / "A" / "0.nii.gz", torch.rand(8, 9, 10) - 0.5, np.diag([-1.0, 1, 1, 1]))
    with caplog.at_level(logging.WARNING):
        Singleres_dataset(root, generate_latents=True)
    assert caplog.text.count("1 of 2 files have odd headers, axes not in the order RAS: 1") == 1
