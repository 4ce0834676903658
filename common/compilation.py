"""torch.compile, and what users are told where it can't."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.errors import UserError

MOST_SHAPES = 64  # different shapes that are compiled, each for itself; torch runs further ones uncompiled


@contextmanager
def compiling(option: str = "compile", remedy: str = "leave --compile out") -> Iterator[None]:
    """Around calls of compiled modules: the first call with each shape compiles.

    Args:
        option, remedy: what compiling was asked for by and how to go without, for the message.

    Raises:
        UserError: this machine can't compile.
    """
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{option}: torch cannot compile on this machine ({reason}): {remedy}") from error


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
