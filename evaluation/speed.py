"""What makes generation faster without changing what is computed, mixed precision and compilation, and its clock."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from config.errors import UserError

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
MOST_SHAPES = 64  # different shapes that are compiled, each for itself; torch runs further ones uncompiled


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision "bf16" or "16" on this device; "32" is none."""
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


class CompiledDenoiser:
    """A BiFlowNet compiled at its first call with each shape; its attributes are those of the network.

    Raises UserError at the first call on machines on which torch can't compile.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._compiled: Callable[..., Tensor] = torch.compile(network, dynamic=False)

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def __call__(self, *args: Tensor, **conditions: Tensor) -> Tensor:
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
                return self._compiled(*args, **conditions)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"compile: torch cannot compile on this machine ({reason}): leave --compile out") from error
