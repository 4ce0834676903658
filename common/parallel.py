"""Work on many files in several processes, with its progress."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.progress import tracked


class _Calls(Dataset):
    """Item i is (i, function(items[i])), computed by whichever process is asked for it."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function = function
        self.items = items

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.function(self.items[index])

    def __len__(self) -> int:
        return len(self.items)


def map_in_processes(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    num_workers: int,
    label: str,
    unit: str = "volume",
    show: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Yields (index of the item, `function(item)`) for every item, in the order in which they are finished.

    The processes are those of torch's DataLoader, which end with the process that started them, however that ends. No
    global random state is changed.

    num_workers: processes, at most one per core; 0 computes in this one.
    label, unit, show: as of `Progress`.
    Raises UserError where `function` raises one, or where a process is killed, for instance for want of memory.
    """
    num_workers = min(num_workers, len(items), num_cores())
    options = {"prefetch_factor": 1, "in_order": False} if num_workers else {}
    options["generator"] = torch.Generator()  # a pass draws a number: not from the global generator
    loader = DataLoader(_Calls(function, items), batch_size=None, num_workers=num_workers, collate_fn=_same, **options)
    results = iter(loader)
    try:
        yield from tracked(results, label, unit, len(items), show=show)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"{label}: a process was killed, perhaps for want of memory: give fewer processes (num_workers) and start "
            "again; what is done is kept"
        ) from error
    finally:
        if num_workers:  # now, so that nothing is being written when an error reaches the caller
            results._shutdown_workers()  # there is no public way


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(count: int, option: str, way_out: str) -> None:
    """UserError for more processes than cores: they would only wait for each other, and the machine with them."""
    if count > num_cores():
        raise UserError(f"{option} is {count}, but {num_cores()} core(s) may be used: take as many, or {way_out}")


def _same(result: Any) -> Any:
    return result
