"""Mixed precision, what float32 means on a GPU, and a clock that waits for the device."""

import os
import time

import torch

from common.errors import UserError

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16, "fp16": torch.float16}  # as options spell them


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision "bf16" or "16" ("fp16") on this device; "32" is none."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def configure_backend(device: torch.device, arithmetic: str = "fast", fixed_shapes: bool = False) -> None:
    """What float32 means on a GPU, for the whole process and whatever torch's defaults are; no change for a CPU.

    | arithmetic | convolutions | products of matrices | algorithms |
    |---|---|---|---|
    | fast | inputs rounded to TF32 (10 bits) | float32 | of fixed shapes the fastest, found by trying |
    | exact | float32 | float32 | deterministic where torch has such; it warns where not |

    Products stay in float32 in both: the codebook's distances, the embedding of noisy latents and attention rely on it.

    fixed_shapes: the same few shapes come again and again, so that trying pays.
    """
    if device.type != "cuda":
        return
    is_exact = arithmetic == "exact"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = not is_exact
    torch.backends.cudnn.benchmark = fixed_shapes and not is_exact
    torch.backends.cudnn.deterministic = is_exact
    torch.use_deterministic_algorithms(is_exact, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check for our tests, which takes time
    if is_exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else products are not; read at the first one


def check_precision(device: torch.device, option: str, precision: str) -> None:
    """UserError: float16 on a CPU, which has no fast arithmetic for it. option: what the precision is the value of."""
    if device.type == "cpu" and PRECISIONS[precision] is torch.float16:
        raise UserError(f"{option} is {precision}, which needs a GPU: take bf16 on a CPU")


def clock(device: torch.device) -> float:
    """Seconds, read when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
