"""Work done once per volume: kept on disk under the hash of the file, shared out to processes, continued when killed.

CACHE/NAME-HASH/settings.json     what the results depend on besides the volume
CACHE/NAME-HASH/xx/KEY.arrays     the results of one volume; KEY is the SHA-256 of its file (see `Work.key`)
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_atomically
from common.parallel import map_in_processes
from common.processes import Distributed
from common.shards import shard_of

Arrays = dict[str, np.ndarray]
DIGEST_BYTES = 32  # SHA-256 of the rest of a file, so that a damaged one is never taken for whole


class ResultCache:
    """Named arrays by key, in files of their own. Damaged files count as missing.

    folder: of all caches. name: for people. settings: what the results depend on besides the volume.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, indent=2)
        self.folder = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self._settings = text

    def get(self, key: str) -> Arrays | None:
        """The arrays under a key, None where there are none."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return dict(file)

    def put(self, key: str, arrays: Arrays) -> None:
        """Keeps the arrays of a key. UserError if they cannot be written."""
        if not (self.folder / "settings.json").exists():
            write_atomically(self.folder / "settings.json", self._settings.encode())
        content = io.BytesIO()
        np.savez(content, **arrays)
        content = content.getvalue()
        write_atomically(self._path(key), hashlib.sha256(content).digest(), content)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.arrays"


@dataclass(frozen=True)
class Work:
    """What is done to each item of a set.

    key: item -> name of its results. read: item -> tensor; both run in loading processes and may raise UserError.
    compute: tensors of one shape, stacked (B, ...) -> the arrays of each, in the main process on its device.
    """

    label: str
    key: Callable[[Any], str]
    read: Callable[[Any], Tensor]
    compute: Callable[[Tensor], list[Arrays]]
    cache: ResultCache
    batch_size: int = 1


def do_work(
    work: Work, items: Sequence, place: Distributed, num_workers: int, shard: str | None = None
) -> tuple[list[Arrays | None], dict]:
    """The results of all items, those that are there from the cache, and why the others can't be read, by item.

    To be called on every rank; each does its share, and rank 0 gets the results (the others, and with a shard all, a
    list of None).
    """
    mine = shard_of(range(len(items)), shard)[place.rank :: place.world_size]
    shares = place.on_all(lambda: _do_share(work, {i: items[i] for i in mine}, num_workers, place.is_main))
    keys = {i: key for of_rank, _ in shares for i, key in of_rank.items()}
    refused = {i: reason for _, of_rank in shares for i, reason in of_rank.items()}
    concludes = place.is_main and shard is None
    results = [work.cache.get(keys[i]) if concludes and i in keys else None for i in range(len(items))]
    if concludes and (lost := [i for i in keys if results[i] is None]):
        raise UserError(f"{work.cache.folder}: the results of {len(lost)} volumes are gone: start again")
    return results, {items[i]: refused[i] for i in sorted(refused)}


def _do_share(work: Work, items: Mapping[int, Any], num_workers: int, show: bool) -> tuple[dict, dict]:
    """Leaves the results of these items in the cache. Returns by the item's number its key, or why it can't be read."""
    numbers, keys, refused = list(items), {}, {}
    waiting: dict[str, Tensor] = {}  # of one shape, to be computed together

    def compute() -> None:
        if waiting:
            for key, arrays in zip(waiting, work.compute(torch.stack([*waiting.values()])), strict=True):
                work.cache.put(key, arrays)
            waiting.clear()

    read = partial(_read, work.key, work.read, work.cache)
    found = map_in_processes(read, [*items.values()], num_workers, work.label, show=show)
    for position, (key, tensor, reason) in found:
        if reason is not None:
            refused[numbers[position]] = reason
            continue
        keys[numbers[position]] = key
        if tensor is None or key in waiting:
            continue
        if waiting and next(iter(waiting.values())).shape != tensor.shape:
            compute()
        waiting[key] = tensor
        if len(waiting) == work.batch_size:
            compute()
    compute()
    return keys, refused


def _read(key_of: Callable, read: Callable, cache: ResultCache, item: Any) -> tuple:
    """Key, tensor (None where the results are there), and the reason why it can't be read; in a loading process."""
    try:
        key = key_of(item)
        return key, None if cache.get(key) is not None else read(item), None
    except UserError as error:
        return None, None, str(error)
