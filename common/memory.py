"""How much memory a device has left, how much this process takes, and smaller parts where it does not suffice."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
CPU_SHARE, GPU_SHARE = 0.5, 0.8  # of the memory that is free: others use a machine's main memory too


def resident_memory_gb() -> float | None:
    """Memory of this process that lies in RAM, in 10⁹ bytes; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def free_memory(device: torch.device) -> int:
    """Bytes that work on a device may take: a share of what is free now."""
    if device.type == "cuda":
        return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + _cached_memory(device)))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(CPU_SHARE * free_main_memory() / processes)


def halving(work: Callable[[int], Result], most: int) -> Result:
    """`work(most)`, and where the GPU's memory doesn't suffice with the half of it, and so on down to 1.

    How much a GPU has left is known, but not what others take meanwhile, into what pieces it lies, and how much space
    cuDNN's algorithms want to work in. `most`: a number of things at a time, or of bytes.
    """
    while True:
        try:
            return work(most)
        except torch.OutOfMemoryError:
            if most <= 1:
                raise
        # Here the failed try's tensors are gone, which its traceback held.
        torch.cuda.empty_cache()
        most //= 2
        logging.getLogger(__name__).info("the GPU's memory did not suffice: trying with half as much at a time")


def _cached_memory(device: torch.device) -> int:
    """Bytes that torch holds and doesn't use, without those of CUDA graphs, which nothing else can have."""
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = (s for s in torch.cuda.memory_snapshot() if s["device"] == index and s["segment_pool_id"] == (0, 0))
    return sum(segment["total_size"] - segment["active_size"] for segment in segments)


def free_main_memory() -> int:
    """What the machine, or the container or batch job that this process runs in, has left."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for folder, limit_file, usage_file in _control_groups():
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_file, usage_file))
            statistics = (folder / "memory.stat").read_text().split()
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        counts = dict(zip(statistics[::2], map(int, statistics[1::2]), strict=True))
        files = counts.get("inactive_file", 0) + counts.get("active_file", 0)  # given up when memory is needed
        free = min(free, max(0, limit - max(0, used - files)))
    return free


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """This process's control group and those around it: folder, file of the limit, file of the use (versions 2, 1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, place in (line.split(":", 2) for line in lines):
        if controllers == "":
            root, names = CONTROL_GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CONTROL_GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / place.strip("/")
        yield from ((path, *names) for path in (folder, *folder.parents) if path.is_relative_to(root))
