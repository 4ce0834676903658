"""Process set-up for training: one process, several on a node or several nodes, on CPU (gloo) or GPU (nccl).

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without it a script is a world of one process and no process group
is made. Devices go by LOCAL_RANK, the process's place on its own node, so several nodes work.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_distributed

from common.errors import UserError
from common.launched import leave_after_another
from common.precision import configure_backend

Result = TypeVar("Result")
# For work that is shared out by volume: a process that is done waits for those whose volumes are larger.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Distributed:
    """One process's place among those that train together."""

    rank: int  # among all processes
    local_rank: int  # among those of this node
    world_size: int  # number of processes
    device: torch.device  # where this process computes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks, on every rank, in place."""
        if self.world_size > 1:
            torch_distributed.all_reduce(values, op=torch_distributed.ReduceOp.MAX)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise mean over the ranks, on every rank, in place."""
        if self.world_size > 1:
            torch_distributed.all_reduce(values, op=torch_distributed.ReduceOp.SUM)
            values /= self.world_size
        return values

    def gather(self, item: object) -> list:
        """Each rank's `item` (anything picklable), in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list = [None] * self.world_size
        torch_distributed.all_gather_object(items, item)
        return items

    def on_all(self, function: Callable[[], Result]) -> list[Result]:
        """Call `function` on every rank: the picklable results in rank order; a UserError of any is raised on all."""
        gathered = self.gather(_attempt(function))
        for _, message in gathered:
            if message is not None:
                raise UserError(message)
        return [result for result, _ in gathered]

    def barrier(self) -> None:
        """Wait for all ranks. Never around work that takes long on one of them."""
        if self.world_size > 1:
            torch_distributed.barrier()

    def on_main(self, function: Callable[[], Result], share: bool = True) -> Result | None:
        """Call `function` on rank 0 only; a UserError of it is raised on every rank.

        Every rank gets its picklable result, or with `share=False` rank 0 its result and the others None.
        """
        result, message = _attempt(function) if self.is_main else (None, None)
        if self.world_size > 1:
            shared = [result if share else None, message]
            torch_distributed.broadcast_object_list(shared, src=0)
            result, message = (shared[0] if share else result), shared[1]
        if message is not None:
            raise UserError(message)
        return result


@contextmanager
def joined(
    device: str = "auto", timeout: timedelta | None = None, arithmetic: str = "fast", fixed_shapes: bool = False
) -> Iterator[Distributed]:
    """The process group that torchrun's environment describes, within a `with` block; none for a lone process.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        timeout: how long a process waits for the others before it gives up; None: torch's default, some minutes.
        arithmetic, fixed_shapes: as of `configure_backend`.

    Raises:
        UserError: CUDA is demanded and there is none, a node has fewer GPUs than processes, or two share one.
    """
    place = _join(device, timeout)
    configure_backend(place.device, arithmetic, fixed_shapes)
    with group_left_in_order():
        yield place


@contextmanager
def group_left_in_order() -> Iterator[None]:
    """Destroys the process group, if there is one, after a block that ends well, as it then does on all ranks.

    After an exception it stays: destroying it waits for the peers (nccl), and these may be waiting for this rank. Then
    nobody would ever learn why. `run_script` says it, and ends the process as it is.
    """
    leave_after_another()
    yield
    if torch_distributed.is_available() and torch_distributed.is_initialized():
        torch_distributed.destroy_process_group()


def _join(device: str, timeout: timedelta | None) -> Distributed:
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    torch_device = choose_device(device, local_rank)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    if world_size > 1:
        backend = "nccl" if torch_device.type == "cuda" else "gloo"
        torch_distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        check_own_gpu(torch_distributed.distributed_c10d._get_default_store(), torch_device, rank, world_size)
    return Distributed(rank, local_rank, world_size, torch_device)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device of the process at place `local_rank` of its node; errors as in `setup`."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: got {device!r}, expected auto, cpu or cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device: cuda is demanded and this machine has no usable GPU; use device=cpu or device=auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:  # perhaps one of many, if each process sees its own alone; `check_own_gpu` finds out
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"world size that doesn't fit: process {local_rank} of this node has no GPU, the node has {count}; "
            f"start torchrun with --nproc-per-node {count} or less"
        )
    return torch.device("cuda", local_rank)


def check_own_gpu(store: torch_distributed.Store, device: torch.device, rank: int, world_size: int) -> None:
    """UserError, on all ranks, where two processes have the same GPU; to be called by all before they use it together.

    NCCL would end in a traceback. store: that they meet in.
    """
    if device.type != "cuda":
        return
    store.set(f"gpu of {rank}", f"{platform.node()}, GPU {torch.cuda.get_device_properties(device).uuid}")
    gpus = [store.get(f"gpu of {other}").decode() for other in range(world_size)]
    store.set(f"gpus known to {rank}", "")
    if rank == 0:  # it may be the one that serves the store
        store.wait([f"gpus known to {other}" for other in range(world_size)])
    if sharing := [other for other, gpu in enumerate(gpus) if gpus.count(gpu) > 1]:
        first = gpus[sharing[0]]
        same = " and ".join(str(other) for other in sharing if gpus[other] == first)
        raise UserError(
            f"processes {same} share one GPU ({first}), expected one for each: start as many on a node as it has GPUs "
            "(--nproc-per-node), or let each see its own (Slurm: --gpus-per-task=1)"
        )


@contextmanager
def own_gpu(device: torch.device) -> Iterator[None]:
    """As `check_own_gpu` for processes that a launcher has started and that have not met yet."""
    if device.type != "cuda" or not is_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://"))  # kept: if rank 0 serves it, others go on with the same one
    check_own_gpu(store, device, rank, world_size)
    yield


def is_launched() -> bool:
    """Whether torchrun has started this process, or whoever sets what torchrun sets."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def device_name(device: torch.device) -> str:
    """What a device is called in records and results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Its result, or the message of its UserError."""
    try:
        return function(), None
    except UserError as error:
        return None, str(error)
