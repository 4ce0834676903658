"""The cache of volumes when something is in its way: kills, other processes, full disks, bad files."""

import errno
import gzip
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

import pytest
import torch
from cached_sets import AFFINE, VOXELS, age, built, data_set, entries, make_set, names, renewed, scan

from common.errors import UserError
from dataset.cache import entry as cache_entry
from dataset.cache import volumes as cache_module
from dataset.cache.volumes import VolumeCache
from dataset.volumes.volume_io import read_volume, write_volume

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path) -> Path:
    return make_set(tmp_path)


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

    monkeypatch.setattr("fcntl.flock", no_locks)
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
