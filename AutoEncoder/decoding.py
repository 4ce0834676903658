"""Normalised latent -> volume: whole, in blended tiles or in the official tiles, within the memory that there is.

| decoding | how | borders |
|---|---|---|
| exact | the whole latent, as in one pass; block by block where it doesn't fit (`exact_decoding.py`) | none |
| blended | overlapping tiles, each decoded as a volume of its own, averaged with Gaussian weights | smoothed |
| tiles | tiles that meet without overlap, as the official release decodes large volumes | seams |

None of them depends on how much memory there is: that only decides how large the blocks are in which a volume or a
tile is computed.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from AutoEncoder.exact_decoding import activation_bytes, plan_blocks
from AutoEncoder.latents import denormalise_latents
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.errors import UserError
from common.precision import autocast
from evaluation.generation.requests import Request

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OVERLAP = 0.25  # of neighbouring blended tiles, as a share of their edge
CPU_SHARE, GPU_SHARE = 0.5, 0.8  # of the memory that is free: others use a machine's main memory too


@torch.inference_mode()
def decode(
    autoencoder: patchvolumeAE,
    latent: Tensor,
    decoding: str = "exact",
    tile: int | None = None,
    max_bytes: int | None = None,
    precision: str = "32",
) -> Tensor:
    """Normalised latent (C, d, h, w) -> volume (1, D, H, W) float32 in [-1, 1] (NaN if it overflowed), on the CPU.

    Args:
        decoding: "exact", "blended" or "tiles".
        tile: edge of a tile in image voxels; "exact" has none.
        max_bytes: memory for activations; None: `free_memory`.
        precision: "32", "bf16" or "16"; the codes are chosen in float32 whatever it is.

    Raises:
        UserError: `max_bytes` is too little.
    """
    raw = denormalise_latents(latent[None], autoencoder.codebook.embeddings)  # (1, C, d, h, w)
    limit = free_memory(latent.device) if max_bytes is None else max_bytes
    whole = partial(autoencoder.decode, quantize=True, max_bytes=limit)
    try:
        with autocast(latent.device, precision):
            if decoding == "exact":
                volume = whole(raw)  # (1, 1, D, H, W)
            elif decoding == "blended":
                edges = [min(tile // autoencoder.downsample_factor, extent) for extent in raw.shape[2:]]
                from monai.inferers import sliding_window_inference  # importing monai sets an environment variable

                volume = sliding_window_inference(
                    raw, edges, 1, lambda part: whole(part).float().cpu(), OVERLAP, mode="gaussian", device="cpu"
                )
            else:
                volume = autoencoder.decode_sliding(raw, quantize=True, patch_size=tile, max_bytes=limit)
    except ValueError as error:  # the smallest blocks don't fit
        raise _too_little(error) from error
    volume = volume[0].float()
    return volume.masked_fill(volume.isinf(), torch.nan).clamp(-1, 1).cpu()  # clamping alone would hide an overflow


def check_memory(
    autoencoder: patchvolumeAE,
    requests: Sequence[Request],
    device: torch.device,
    max_bytes: int | None = None,
    precision: str = "32",
) -> None:
    """UserError if there is a volume among the requests that `max_bytes` is too little to decode."""
    limit = free_memory(device) if max_bytes is None else max_bytes
    with autocast(device, precision):
        element_bytes = activation_bytes(autoencoder.codebook.embeddings)
    for request in {request.grid: request for request in requests}.values():
        cells = max(request.grid) if request.tile is None else request.tile // autoencoder.downsample_factor
        shape = (1, autoencoder.embedding_dim, *(min(cells, extent) for extent in request.grid))
        try:
            plan_blocks(autoencoder.decoder, shape, element_bytes, limit)
        except ValueError as error:
            raise _too_little(error, f"{request.path}: ") from error


def _too_little(error: ValueError, where: str = "") -> UserError:
    return UserError(f"{where}{error}: raise max_memory, or take decoding=blended with a smaller tile")


def free_memory(device: torch.device) -> int:
    """Bytes that decoding may take on a device: a share of what is free now."""
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
