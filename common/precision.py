"""What makes generation faster without changing what is computed, mixed precision and compilation, and its clock."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from common.compilation import compiling

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


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

    On a GPU a step is replayed as one CUDA graph, as launching the many kernels of small latents one by one takes
    longer than they run.

    Raises UserError at the first call on machines on which torch can't compile.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._replays_graphs = next(network.parameters()).device.type == "cuda"
        mode = "reduce-overhead" if self._replays_graphs else None
        self._compiled: Callable[..., Tensor] = torch.compile(network, dynamic=False, mode=mode)

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def __call__(self, *args: Tensor, **conditions: Tensor) -> Tensor:
        with compiling():
            if not self._replays_graphs:
                return self._compiled(*args, **conditions)
            torch.compiler.cudagraph_mark_step_begin()
            return self._compiled(*args, **conditions).clone()  # the next replay overwrites it, and solvers keep it
