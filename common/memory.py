"""How much memory a device has left, and how much this process takes."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

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
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(CPU_SHARE * _free_main_memory() / processes)


def _free_main_memory() -> int:
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
