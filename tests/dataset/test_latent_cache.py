"""The cache of latents and the batches that come from it: the same ones, in the same order, and sound."""

import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from dataset import check
from dataset.cache import latents as latent_cache
from dataset.cache import volumes as cache_module
from dataset.cache.latents import LatentCache
from dataset.order.buckets import BucketOrder
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.index import list_volumes
from dataset.volumes.latent_record import start_folder
from dataset.volumes.volume_io import read_latent, write_latent
from train.diffusion.batches import CacheLoader, GlobalBatchSampler, LatentBatches, make_cache, make_loader
from train.loop.session import session
from train.loop.signals import close_loader

SHAPE = (4, 2, 3, 5)
GRID = SHAPE[1:]
NUM_LATENTS = 9


def latent(seed: int) -> np.ndarray:
    """Random values, with those among them that a conversion could lose."""
    values = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    values.flat[:4] = (-0.0, 1e-42, 3e38, np.nextafter(np.float32(1), np.float32(2)))
    return values


@pytest.fixture
def root(tmp_path) -> Path:
    """Nine latents of two classes, one of them in a subfolder, and their JSON."""
    for i in range(NUM_LATENTS):
        place = tmp_path / f"class{i % 2}_latents" / ("deep" if i == 4 else "")
        write_latent(place / f"{i}.nii.gz", latent(i))
    (tmp_path / "latents.json").write_text('{"0": "class0_latents", "1": "class1_latents"}')
    return tmp_path / "latents.json"


def built(root: Path, num_workers: int = 0, **options) -> Singleres_dataset:
    """A data set with its cache. Options are those of the cache."""
    data = Singleres_dataset(root, GRID, cache=LatentCache(**options))
    data.cache.build(data.class_folders, num_workers)
    return data


def loader_of(data: Singleres_dataset, num_workers: int = 0, batch_size: int = 2) -> DataLoader | CacheLoader:
    order = GlobalBatchSampler(BucketOrder([range(len(data))], [batch_size], seed=3))
    return make_loader(data, order, num_workers, pin_memory=False)


def first_batches(data: Singleres_dataset, num_workers: int, count: int, samples_seen: int = 0) -> list:
    """The batches of a run that goes on in its first epoch."""
    with session("cpu") as here:
        places = iter([(0, samples_seen), (1, 0), (2, 0)])
        batches = LatentBatches(data, 2, 3, num_workers, here).endless(lambda: next(places))
        found = [next(batches) for _ in range(count)]
    return [[batch.indices, batch.latents, batch.conditions["y"], batch.conditions["res"]] for batch in found]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Items and batches


def test_items_equal_the_uncached_ones_bit_for_bit(root):
    plain, cached = Singleres_dataset(root, GRID), built(root, num_workers=2)
    for index in range(NUM_LATENTS):
        for expected, found in zip(plain[index], cached[index], strict=True):
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert bits(found) == bits(expected)
    assert names(root.parent / "class1_latents_cache") == [".lock"] + [
        f"float32/{i}.{kind}" for i in (1, 3, 5, 7) for kind in ("json", "npy")
    ]
    assert bits(torch.from_numpy(np.load(root.parent / "class0_latents_cache/float32/deep/4.npy"))) == bits(
        torch.from_numpy(latent(4))
    )


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("samples_seen", [0, 4])
def test_batches_equal_the_uncached_ones_over_epochs_and_resuming(root, num_workers, samples_seen):
    expected = first_batches(Singleres_dataset(root, GRID), 0, 10, samples_seen)
    found = first_batches(built(root), num_workers, 10, samples_seen)  # compared at the end: none is written over
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) == 4
        for part, other in zip(ours, theirs, strict=True):
            assert (part.dtype, part.shape) == (other.dtype, other.shape)
            assert part.is_contiguous()
            assert bits(part) == bits(other)


def test_threads_read_ahead_and_not_far(root, monkeypatch):
    data, loader, read_by = built(root), None, []
    read = LatentCache.read_into
    monkeypatch.setattr(
        LatentCache, "read_into", lambda *args: (read_by.append(threading.current_thread()), read(*args))[1]
    )
    loader = loader_of(data, num_workers=2, batch_size=1)
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 20
    while len(read_by) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(read_by) == 3  # the one that was asked for, and one for each thread
    assert threading.main_thread() not in read_by
    close_loader(loader)
    assert not any(thread.is_alive() for thread in read_by)

    read_by.clear()
    next(iter(loader_of(data, num_workers=0, batch_size=1)))
    assert read_by == [threading.main_thread()]


def test_pinned_memory_is_asked_for_by_the_training_thread(root, monkeypatch):
    """There is none without a GPU; that nothing else is allocated can be seen anyway."""
    data, asked, empty = built(root), [], torch.empty

    def pinned_empty(*args, pin_memory: bool = False):
        asked.append((pin_memory, threading.current_thread()))
        return empty(*args)

    monkeypatch.setattr(torch, "empty", pinned_empty)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned_empty(0, pin_memory=True) is None or tensor)
    order = GlobalBatchSampler(BucketOrder([range(NUM_LATENTS)], [9], seed=3))
    loader = make_loader(data, order, 2, pin_memory=True)
    next(iter(loader))
    close_loader(loader)
    assert asked == [(True, threading.main_thread())] * 4


# Made once, and again where it must be


def test_a_latent_that_was_encoded_again_is_cached_anew(root, caplog):
    built(root)
    write_latent(root.parent / "class1_latents" / "3.nii.gz", latent(99))
    (root.parent / "class0_latents" / "8.nii.gz").unlink()
    caplog.clear()  # a test that ran before may have set the level
    with caplog.at_level(logging.INFO, "dataset.cache.volumes"):
        data = built(root)
        built(root)
    size = 8 * (4 * np.prod(SHAPE) + 128 + 8192) / 1e9
    message = f"cache: building 1 of 8 latents, {size:.3g} GB in {root.parent / 'class1_latents_cache'}"
    assert [record.getMessage() for record in caplog.records] == [message]
    index = data.files.index(root.parent / "class1_latents" / "3.nii.gz")
    assert bits(data[index][0]) == latent(99).tobytes()
    assert "float32/8.npy" not in names(root.parent / "class0_latents_cache")


def test_processes_that_start_together_build_each_latent_once(root, monkeypatch):
    log = root.parent / "log"

    def slow(path: Path) -> torch.Tensor:
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.02)
        return read_latent(path)

    monkeypatch.setattr(latent_cache, "read_latent", slow)
    fork = multiprocessing.get_context("fork")
    pair = [fork.Process(target=built, args=(root,)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    assert sorted(log.read_text().split()) == [f"{i}.nii.gz" for i in range(NUM_LATENTS)]


@pytest.mark.parametrize("change", [{"shape": [4, 2, 15]}, {"shape": 3}, {"version": 0}])
def test_a_record_of_another_form_does_not_count(root, change):
    built(root)
    path = root.parent / "class0_latents_cache" / "float32" / "0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **change}))
    assert bits(built(root)[0][0]) == latent(0).tobytes()
    assert json.loads(path.read_text()) == record


def test_the_cache_confuses_no_one_who_lists_latents(root, capsys):
    for folder in ("class0_latents", "class1_latents"):
        (root.parent / folder / "latents.json").write_text('{"autoencoder": "abc", "checkpoint": "x.ckpt"}')
    before = Singleres_dataset(root, GRID).files
    built(root)
    assert Singleres_dataset(root, GRID).files == before
    assert list_volumes(root.parent) == sorted(before)
    check.main([str(root), "--num-workers", "0", "--num-pictures", "0", "--report", str(root.parent / "report")])
    found = json.loads((root.parent / "report").read_text())
    assert [summary["files"] for summary in found["names"].values()] == [5, 4]
    record = {"autoencoder": "abc", "checkpoint": "x.ckpt", "patch_size": 64, "intensity_range": [-1, 1]}
    start_folder(root.parent / "class0_latents", record)
    assert len(names(root.parent / "class0_latents_cache")) == 1 + 2 * 5


def test_the_cache_can_lie_elsewhere(root, tmp_path):
    built(root, cache_dir=tmp_path / "fast")
    assert sorted(path.name[:-8] for path in (tmp_path / "fast").iterdir()) == ["class0_latents-", "class1_latents-"]
    assert not (tmp_path / "class0_latents_cache").exists()


# Mistakes


@pytest.mark.parametrize("kind", ["NaN", "truncated"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_give_the_same_error_as_without_a_cache(root, kind, num_workers):
    path = root.parent / "class1_latents" / "5.nii.gz"
    if kind == "NaN":
        write_latent(path, np.full(SHAPE, np.nan))
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"5\.nii\.gz") as expected:
        read_latent(path)
    with pytest.raises(UserError) as caught:
        built(root, num_workers)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "reason"), [(Path.unlink, "No such file"), (lambda p: os.truncate(p, 200), "trunc")]
)
def test_an_entry_lost_during_training(root, damage, reason, num_workers):
    loader = loader_of(built(root), num_workers)
    damage(root.parent / "class0_latents_cache" / "float32" / "deep" / "4.npy")
    with pytest.raises(UserError, match=rf"^\S*4\.npy: cached latent lost during training \(.*{reason}.*") as caught:
        for _ in loader:
            pass
    close_loader(loader)
    assert "\n" not in str(caught.value)


def test_too_small_a_limit_or_disk(root, monkeypatch):
    ways = "set cache_dir to a folder on a larger disk, or cache=none"
    with pytest.raises(UserError) as caught:
        built(root, limit_gb=1e-5)
    where = f"{root.parent / 'class0_latents_cache'} and 1 more folders"
    assert str(caught.value) == (
        f"cache_limit_gb is 1e-05, but the cache in {where} needs 7.92e-05 GB: raise it, {ways}"
    )
    usage = cache_module.shutil.disk_usage(root.parent)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(UserError, match=rf"the disk has 2e-05 GB free: {ways}"):
        built(root)


def test_options(caplog):
    class Config:
        cache, cache_dir, cache_limit_gb = "float32", "fast", 3.0

    logger = logging.getLogger("test")
    cache = make_cache(Config, logger)
    assert (cache.dtype, cache.cache_dir, cache.limit_gb) == ("float32", "fast", 3.0)
    assert caplog.records == []
    Config.cache = "none"
    assert make_cache(Config, logger) is None
    assert caplog.messages == ["cache is none: cache_dir and cache_limit_gb have no effect"]
    Config.cache_dir = Config.cache_limit_gb = None
    assert make_cache(Config, logger) is None
    assert len(caplog.messages) == 1
