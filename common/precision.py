"""Mixed precision, exact float32 on a GPU, and a clock that waits for the device."""

import time
from contextlib import AbstractContextManager

import torch

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16, "fp16": torch.float16}  # as options spell them


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision "bf16" or "16" ("fp16") on this device; "32" is none."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def exact_float32() -> AbstractContextManager[None]:
    """Convolutions on a GPU without the rounding of TF32, the same at every run: for figures to publish."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def clock(device: torch.device) -> float:
    """Seconds, read when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
