"""The cache of volumes: the same items, made once, and again where it must be."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_sets import AFFINE, SHAPE, VOXELS, age, built, data_set, entries, make_set, names, renewed, scan
from torch.utils.data import DataLoader

from dataset.cache import entry as cache_entry
from dataset.order.epochs import EpochSampler, SampleKey
from dataset.volumes.index import cache_folder
from dataset.volumes.volume_io import write_volume
from dataset.vqgan import CropRule, VQGANDataset


@pytest.fixture
def root(tmp_path) -> Path:
    return make_set(tmp_path)


# Items


class SmallCrops(VQGANDataset):
    train_crop = val_crop = CropRule(8 * 8 * 8, (8, 6, 7))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"background_keep": 0.0},
        {"patch_size": 13},  # larger than the volumes along two axes
        {"kind": SmallCrops, "stage": 2},
        {"stage": 2},
        {"kind": SmallCrops, "split": "val", "val_fraction": 0.5},
        {"intensity_range": (-2, 3)},
    ],
)
def test_items_equal_the_uncached_ones(root, options, num_workers):
    plain = data_set(root, **options)
    exact, close = (built(root, dtype, num_workers, **options) for dtype in ("float32", "int16"))
    for epoch in range(3):
        for index in range(len(plain)):
            key = SampleKey(epoch, index)
            item, same, near = plain[key], exact[key], close[key]
            assert item.keys() == same.keys() == near.keys()
            assert torch.equal(item["data"], same["data"])
            torch.testing.assert_close(near["data"], item["data"], atol=1.6e-5, rtol=0)
            if "affine" in item:
                assert torch.equal(item["affine"], same["affine"])
                assert item["path"] == same["path"]


def test_int16_differs_and_says_so_in_its_folder(root):
    first = built(root, "int16", stage=2)[0]["data"]
    assert not torch.equal(first, data_set(root, stage=2)[0]["data"])
    assert names(entries(root)) == ["0.json", "0.npy", "1.json", "1.npy", "3.v1.json", "3.v1.npy"] + [
        "deep/2.json",
        "deep/2.npy",
    ]
    stored = np.load(entries(root) / "0.npy", mmap_mode="r")
    assert (stored.shape, stored.dtype) == (SHAPE, np.int16)
    assert (entries(root) / "0.npy").stat().st_size < 2 * VOXELS + 256


def test_items_are_the_same_for_any_number_of_workers(root):
    seen = []
    for num_workers in (0, 1, 2):
        data = built(root, num_workers=num_workers)
        loader = DataLoader(data, 2, sampler=EpochSampler(4), num_workers=num_workers, generator=torch.Generator())
        seen.append(torch.cat([batch["data"] for batch in loader]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_one_foreground_voxel_is_in_every_patch(tmp_path, dtype):
    volume = torch.full((24, 24, 24), -1.0)
    volume[20, 3, 11] = -0.9979  # just enough to be foreground
    write_volume(tmp_path / "A" / "a.nii.gz", volume, AFFINE)
    (tmp_path / "set.json").write_text('{"A": "A"}')
    data = built(tmp_path / "set.json", dtype)
    patches = [data[SampleKey(epoch, 0)]["data"] for epoch in range(20)]
    assert all((patch > -0.998).sum() == 1 for patch in patches)
    assert len({int(patch.argmax()) for patch in patches}) > 5


def test_a_patch_needs_neither_the_source_nor_the_rest_of_the_cache(root):
    """The sources are gone, and voxels outside of the crop are poisoned."""
    data = built(root, "float32", augmentation=False)
    expected = data[0]["data"]
    for path in data.files:
        path.unlink()
    assert torch.equal(data[0]["data"], expected)
    with (entries(root, "float32") / "0.npy").open("r+b") as file:
        file.seek(-4 * 14 * 11, os.SEEK_END)
        file.write(b"\xff" * 4 * 14 * 11)  # the last slice: NaN
    volume = data.cache.open(data.files[0])
    assert torch.equal(volume.crop((0, 0, 0), (11, 14, 11))[0], scan(0)[:11])
    assert volume.crop((0, 0, 0), SHAPE).isnan().sum() == 14 * 11


def test_a_crop_touches_few_pages_of_a_large_volume(tmp_path):
    """Counted by the kernel: resident pages of the mapping after one patch of a 64 MB sparse file."""
    shape, patch = (256, 256, 256), (16, 16, 16)
    entry = cache_entry.CacheEntry(tmp_path / "a.nii.gz", tmp_path / "a.npy", "float32")
    with entry.array.open("wb") as file:
        file.truncate(cache_entry.array_bytes(shape, "float32"))
    volume = cache_entry.CachedVolume(entry, shape, np.eye(4), None).open()
    assert volume.crop((100, 100, 100), patch).shape == (1, *patch)
    text = Path("/proc/self/smaps").read_text()
    block = text[text.index(str(entry.array)) :]
    resident = int(block[block.index("Rss:") + 4 :].split()[0])  # kB
    assert 0 < resident < 4096


def test_building_leaves_the_global_random_numbers_alone(root):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    built(root)
    built(root, "float32", num_workers=2)
    assert torch.equal(torch.get_rng_state(), state)


# Made once, and again where it must be


def test_a_second_time_nothing_is_built(root):
    built(root)
    age(entries(root))
    built(root, num_workers=2)
    assert renewed(entries(root)) == []


def test_a_changed_source_is_cached_anew(root):
    data = built(root, stage=2, augmentation=False)
    age(entries(root))
    write_volume(data.files[1], scan(9), AFFINE)
    again = built(root, stage=2, augmentation=False)
    assert renewed(entries(root)) == ["1.json", "1.npy"]
    torch.testing.assert_close(again[1]["data"][0], scan(9), atol=1.6e-5, rtol=0)
    status = data.files[0].stat()  # the same content at another time counts as changed too
    os.utime(data.files[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    age(entries(root))
    built(root)
    assert renewed(entries(root)) == ["0.json", "0.npy"]


@pytest.mark.parametrize("victim", ["deep/2.npy", "deep/2.json"])
@pytest.mark.parametrize("left", [0, 100, -1, None])
def test_a_truncated_or_lost_file_is_made_again(root, victim, left):
    built(root)
    age(entries(root))
    path = entries(root) / victim
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
        os.utime(path, (time.time() - 3600,) * 2)
    data = built(root, stage=2, augmentation=False)
    assert renewed(entries(root)) == ["deep/2.json", "deep/2.npy"]
    index = [path.name for path in data.files].index("2.nii.gz")
    torch.testing.assert_close(data[index]["data"][0], scan(2), atol=1.6e-5, rtol=0)


@pytest.mark.parametrize("change", [{"version": 0}, {"shape": [12, 14, 12]}, {"shape": None}, {"voxels": "x"}, None])
def test_a_record_of_another_form_does_not_count(root, change):
    built(root)
    path = entries(root) / "0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps([] if change is None else {**record, **change}))
    built(root)
    assert json.loads(path.read_text()) == record


def test_the_record_is_written_last_and_an_old_one_does_not_vouch(root, monkeypatch):
    """Killed between the two files of a changed volume, which then gets its old content back."""
    path = data_set(root).files[0]
    built(root)
    before, status = path.read_bytes(), path.stat()
    write_volume(path, scan(9), AFFINE)

    def dying(place: Path, *parts) -> None:
        if place.suffix == ".json":
            raise KeyboardInterrupt
        return write(place, *parts)

    write = cache_entry.write_atomically
    monkeypatch.setattr(cache_entry, "write_atomically", dying)
    with pytest.raises(KeyboardInterrupt):
        built(root)
    monkeypatch.undo()
    path.write_bytes(before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    data = built(root, stage=2, augmentation=False)
    torch.testing.assert_close(data[0]["data"][0], scan(0), atol=1.6e-5, rtol=0)


def test_entries_of_other_settings_stay_and_those_without_source_go(root):
    files = data_set(root).files
    built(root, "float32")
    built(root, "int16")
    (root.parent / "A_cache" / "notes.json").write_text("not ours")
    (root.parent / "A_cache" / "mine").mkdir()
    (root.parent / "A_cache" / "mine" / "x.npy").write_text("not ours")
    files[0].unlink()
    built(root, "int16", intensity_range=(-2, 2))
    folder = root.parent / "A_cache"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "int16_-1.0_1.0", "float32_-1.0_1.0", "int16_-2.0_2.0", "mine",
    }  # fmt: skip
    assert {name.split("/", 1)[1] for name in names(folder) if name.endswith("0.npy")} == set()
    assert len([name for name in names(folder) if name.endswith("1.npy")]) == 6  # 1 and 3.v1 for each of the settings
    assert (folder / "notes.json").exists()
    assert (folder / "mine" / "x.npy").exists()


def test_the_cache_can_lie_elsewhere(root, tmp_path):
    shutil.copytree(tmp_path / "A", tmp_path / "B" / "A")
    root.write_text('{"A": "A", "B": "B/A"}')
    built(root, cache_dir=tmp_path / "fast")
    folders = sorted(path.name for path in (tmp_path / "fast").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("A-") and len(name) == 10 for name in folders)
    assert not (tmp_path / "A_cache").exists()
    assert len(names(tmp_path / "fast")) == 2 * (4 * 2 + 1)
    assert cache_folder("X") == Path("X_cache")
