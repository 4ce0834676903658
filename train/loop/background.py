"""Slow work of rank 0, checkpoints and previews, beside training: the other ranks would have to wait for it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class BackgroundWork:
    """One thread that does what it is given, in order; to be used in a `with` block, whose end waits for all of it.

    An error of the work is raised where the next work is given, at `check` or at the end: no error is lost, and none is
    raised twice. Where the `with` block ends in an error, that one counts, and the work's is dropped.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future | None = None

    def __enter__(self) -> "BackgroundWork":
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)
            self._thread = None

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Have `function(*args)` done, after waiting for what was given before: of its data there is one copy at most.

        Raises what the work before raised; then `function` is not called.
        """
        self.wait()
        self._last = self._thread.submit(function, *args)

    def check(self) -> None:
        """Raises what the work raised, if it has, without waiting for what is not done."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is left to do. Raises what the work raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def snapshot(state: Any) -> Any:
    """A copy of a nested state on the CPU that training does not change any more."""
    return tree_map_only(Tensor, _copy, state)


@torch.no_grad()
def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
