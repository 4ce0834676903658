"""The cache of volumes: the same items, made once, sound whatever happens, and no larger than allowed."""

import errno
import gzip
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from dataset.cache import entry as cache_entry
from dataset.cache import volumes as cache_module
from dataset.cache.volumes import VolumeCache
from dataset.order.epochs import EpochSampler, SampleKey
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.index import cache_folder
from dataset.volumes.volume_io import read_volume, write_volume
from dataset.vqgan import CropRule, VQGANDataset

ROOT = Path(__file__).parents[2]
AFFINE = affine_from_spacing((1.0, 2.0, 3.0))
SHAPE = (12, 14, 11)
VOXELS = 12 * 14 * 11


def scan(seed: int, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """A bright block in background, so that many crops are all background."""
    rng = np.random.default_rng(seed)
    volume = np.full(shape, -1, dtype=np.float32)
    volume[3:8, 4:9, 2:7] = rng.uniform(-1, 1, (5, 5, 5))
    return torch.from_numpy(volume)


@pytest.fixture
def root(tmp_path) -> Path:
    """Four volumes, one of them in a subfolder, and the JSON."""
    for i, name in enumerate(("0", "1", "deep/2", "3.v1")):
        write_volume(tmp_path / "A" / f"{name}.nii.gz", scan(i), AFFINE)
    (tmp_path / "set.json").write_text('{"A": "A"}')
    return tmp_path / "set.json"


def data_set(root: Path, cache: VolumeCache | None = None, kind: type = VQGANDataset, **options) -> VQGANDataset:
    options = {"augmentation": True, "patch_size": 4, "val_fraction": 0, **options}
    return kind(root, cache=cache, **options)


def built(root: Path, dtype: str = "int16", num_workers: int = 0, kind: type = VQGANDataset, **options) -> VQGANDataset:
    """A data set with its cache. Options of the cache: cache_dir, limit_gb."""
    own = {name: options.pop(name) for name in ("cache_dir", "limit_gb") if name in options}
    cache = VolumeCache(dtype, options.get("intensity_range", (-1, 1)), **own)
    data = data_set(root, cache, kind, **options)
    cache.build(data.class_folders, num_workers)
    return data


def entries(root: Path, dtype: str = "int16") -> Path:
    return root.parent / "A_cache" / f"{dtype}_-1.0_1.0"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def age(folder: Path) -> None:
    """Makes files look an hour old, so that it shows which ones are made anew."""
    for path in folder.rglob("*.*"):
        os.utime(path, (time.time() - 3600,) * 2)


def renewed(folder: Path) -> list[str]:
    return [name for name in names(folder) if time.time() - (folder / name).stat().st_mtime < 1800]


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


# Interrupted, refused, shared

BUILD = """
import sys
sys.path.insert(0, {root!r})
from dataset.cache import entry as cache_entry
from dataset.cache.volumes import VolumeCache
from dataset.vqgan import VQGANDataset
{before}
cache = VolumeCache()
data = VQGANDataset({json!r}, val_fraction=0, patch_size=4, cache=cache)
if __name__ == "__main__":
    cache.build(data.class_folders, {num_workers})
    print(sum(float(data[index]["data"].sum()) for index in range(len(data))))
"""


def start_build(root: Path, before: str = "", num_workers: int = 0) -> subprocess.Popen:
    code = BUILD.format(root=str(ROOT), json=str(root), before=before, num_workers=num_workers)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# Notes each volume that is read, and is slow.
SLOW = """
import os, time
read = cache_entry.read_model_volume
def slow_read(path, *args):
    with open({log!r}, "a") as file:
        file.write(f"{{path.name}}\\n")
    time.sleep({seconds})
    return read(path, *args)
cache_entry.read_model_volume = slow_read
"""


def test_a_killed_build_goes_on_with_what_is_missing(root, tmp_path):
    """Killed while the third volume is written: half of its bytes lie in a temporary file."""
    stop = """
import os, signal
from pathlib import Path
write = cache_entry.write_atomically
def dying_write(path, *parts):
    if Path(path).name == "3.v1.npy":
        path.with_name(f".{path.name}.99.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *parts)
cache_entry.write_atomically = dying_write
"""
    process = start_build(root, stop)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert names(entries(root)) == [".3.v1.npy.99.tmp", "0.json", "0.npy", "1.json", "1.npy"]
    age(entries(root))
    data = built(root)
    assert renewed(entries(root)) == ["3.v1.json", "3.v1.npy", "deep/2.json", "deep/2.npy"]
    assert len(names(entries(root))) == 8
    assert data[3]["data"].shape == (1, 4, 4, 4)


def test_what_killed_builds_left_is_gone_before_the_space_is_looked_at(root, monkeypatch):
    entries(root).mkdir(parents=True)
    (entries(root) / ".0.npy.99.tmp").write_bytes(b"half")
    seen, usage = [], shutil.disk_usage(root.parent)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: seen.append(names(path)) or usage)
    built(root)
    assert seen == [[".lock"]]


def test_processes_that_start_together_build_each_volume_once(root, tmp_path):
    before = SLOW.format(log=str(tmp_path / "log"), seconds=0.3)
    processes = [start_build(root, before, num_workers) for num_workers in (0, 0, 2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert sorted((tmp_path / "log").read_text().split()) == ["0.nii.gz", "1.nii.gz", "2.nii.gz", "3.v1.nii.gz"]
    assert len({output for output, _ in results}) == 1


def test_a_file_system_without_locks_is_no_obstacle(root, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("common.files.fcntl.lockf", no_locks)
    entries(root).mkdir(parents=True)
    (entries(root) / ".0.npy.1.tmp").write_bytes(b"perhaps another process is just writing this")
    built(root)
    assert len(names(entries(root))) == 9


def test_one_line_says_what_is_built(root, caplog):
    with caplog.at_level(logging.INFO):
        built(root)
        (entries(root) / "0.json").unlink()
        built(root, num_workers=2)
        built(root)
    lines = [record.getMessage() for record in caplog.records if record.name == "dataset.cache.volumes"]
    size = 4 * (2 * VOXELS + 128 + 8192) / 1e9
    place = root.parent / "A_cache"
    assert lines == [f"cache: building {n} of 4 volumes, {size:.3g} GB in {place}" for n in (4, 1)]


def test_too_small_a_limit(root):
    with pytest.raises(UserError) as caught:
        built(root, "float32", limit_gb=1e-5)
    assert str(caught.value) == (
        f"dataset.cache_limit_gb is 1e-05, but the cache in {root.parent / 'A_cache'} needs 6.28e-05 GB: raise it, set "
        "dataset.cache_dir to a folder on a larger disk, dataset.cache=int16 (half the size), or dataset.cache=none"
    )
    assert names(root.parent / "A_cache") == [".lock"]
    built(root, "float32", limit_gb=7e-5)
    (entries(root, "float32") / "0.npy").unlink()
    with pytest.raises(UserError, match=r"needs 6\.28e-05 GB"):  # what is there counts as well
        built(root, "float32", limit_gb=5e-5)


def test_too_small_a_disk(root, monkeypatch):
    usage = shutil.disk_usage(root.parent)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(UserError) as caught:
        built(root)
    assert str(caught.value) == (
        f"{root.parent / 'A_cache'}: the cache needs 4.81e-05 GB more, but the disk has 2e-05 GB free: "
        "set dataset.cache_dir to a folder on a larger disk, or dataset.cache=none"
    )
    assert names(root.parent / "A_cache") == [".lock"]
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    built(root)
    (entries(root) / "0.npy").unlink()
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    built(root)  # only what is missing needs space


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_disk_that_fills_up(root, num_workers):
    """Files cannot grow beyond 3,600 bytes: the two small volumes fit, the others do not."""
    for name in ("0", "1"):
        write_volume(root.parent / "A" / f"{name}.nii.gz", scan(0, (8, 9, 7)), AFFINE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_600, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"(3\.v1|2)\.npy: cannot be written .* disk of the cache is full"
        ) as caught:
            built(root, num_workers=num_workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert multiprocessing.active_children() == []  # nothing goes on writing
    assert "\n" not in str(caught.value)
    assert "what is built is kept: set dataset.cache_dir to a folder on a larger disk" in str(caught.value)
    assert set(names(entries(root))) <= {"0.json", "0.npy", "1.json", "1.npy"}
    if num_workers == 0:
        assert len(names(entries(root))) == 4
    age(entries(root))
    kept = names(entries(root))
    built(root)
    assert not set(renewed(entries(root))) & {name for name in kept if name.replace("npy", "json") in kept}


def test_no_space_left_is_told_from_other_errors(root, monkeypatch):
    def fail(number: int):
        def write(path, *parts):
            error = OSError(number, os.strerror(number))
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

        return write

    monkeypatch.setattr(cache_entry, "write_atomically", fail(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left on device.*the disk of the cache is full"):
        built(root)
    monkeypatch.setattr(cache_entry, "write_atomically", fail(errno.EACCES))
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)$"):
        built(root)


def test_a_folder_that_cannot_be_written(root, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "cache", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=rf"{place}/A-\w+: the cache cannot be written .*cache_dir.*cache=none"):
            built(root, cache_dir=place)


def test_a_cache_that_can_only_be_read_serves(root, monkeypatch):
    data_set(root).files[3].with_name("gone.nii.gz").write_bytes(data_set(root).files[3].read_bytes())
    built(root)
    (data_set(root).files[3].with_name("gone.nii.gz")).unlink()

    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(cache_entry, "write_atomically", read_only)
    assert built(root)[0]["data"].shape == (1, 4, 4, 4)
    (entries(root) / "0.json").write_text("")
    with pytest.raises(UserError, match=r"the cache cannot be written \(Read-only file system\)"):
        built(root)


def spoil(path: Path, kind: str) -> None:
    volume = read_volume(path).data[0]
    if kind == "NaN":
        volume[5, 5, 5] = torch.nan
    elif kind == "range":
        volume[5, 5, 5] = 1.5
    elif kind == "background":
        volume[:] = -1
    write_volume(path, volume, AFFINE)
    if kind == "truncated":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:3000]))


@pytest.mark.parametrize("kind", ["NaN", "range", "background", "truncated"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_give_the_same_error_as_without_a_cache(root, kind, num_workers):
    path = data_set(root).files[2]
    spoil(path, kind)
    with pytest.raises(UserError) as expected:
        data_set(root)[2]
    with pytest.raises(UserError) as caught:
        built(root, num_workers=num_workers)
    assert str(caught.value) == str(expected.value)
    assert path.name in str(caught.value)


def test_a_file_that_changes_while_it_is_read(root, monkeypatch):
    read = cache_entry.read_model_volume

    def touching(path, *args):
        os.utime(path, ns=(0, time.time_ns()))
        return read(path, *args)

    monkeypatch.setattr(cache_entry, "read_model_volume", touching)
    with pytest.raises(UserError, match=r"0\.nii\.gz: the file changed while it was read"):
        built(root)


def test_options_are_checked(root):
    with pytest.raises(UserError, match='dataset.cache is "int8": choose int16 or float32'):
        VolumeCache("int8")
    with pytest.raises(ValueError, match="intensity_range"):
        data_set(root, VolumeCache("int16", (0, 1)))
    with pytest.raises(AssertionError, match="call build before"):
        data_set(root, VolumeCache())[0]


def test_a_cached_file_lost_during_training(root):
    data = built(root)
    (entries(root) / "0.npy").unlink()
    with pytest.raises(UserError, match=r"0\.npy: cached volume lost during training"):
        data[0]
