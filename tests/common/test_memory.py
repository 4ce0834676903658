"""What a GPU has left, and work in smaller parts where that does not suffice; a GPU is made up."""

import pytest
import torch

from common import memory
from common.memory import free_memory, halving
from common.precision import configure_backend

GPU = torch.device("cuda", 1)


@pytest.mark.parametrize(("fits", "tried"), [(8, [8]), (3, [8, 4, 2]), (1, [8, 4, 2, 1])])
def test_what_does_not_fit_is_tried_with_half_as_much(monkeypatch, fits, tried):
    emptied, found = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def work(at_once: int) -> int:
        found.append(at_once)
        if at_once > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return at_once

    assert halving(work, 8) == tried[-1]
    assert (found, len(emptied)) == (tried, len(tried) - 1)


def test_what_fits_in_no_way_stays_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def work(at_once: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        halving(work, 5)


def test_memory_of_cuda_graphs_and_other_gpus_is_not_free(monkeypatch):
    segments = [(1, (0, 0), 100, 40), (1, (0, 7), 1000, 0), (0, (0, 0), 10_000, 0), (1, (0, 0), 50, 50)]
    names = ("device", "segment_pool_id", "total_size", "active_size")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [dict(zip(names, s, strict=True)) for s in segments])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (940, 5000))
    assert free_memory(GPU) == int(memory.GPU_SHARE * (940 + 60))


@pytest.mark.parametrize(
    ("arithmetic", "fixed_shapes", "tf32", "benchmark", "deterministic"),
    [("fast", True, True, True, False), ("fast", False, True, False, False), ("exact", True, False, False, True)],
)
def test_what_float32_means_on_a_gpu(monkeypatch, arithmetic, fixed_shapes, tf32, benchmark, deterministic):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "unset")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    with cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        try:
            configure_backend(torch.device("cpu"), arithmetic, fixed_shapes)
            assert not cudnn.allow_tf32
            assert not cudnn.deterministic
            configure_backend(GPU, arithmetic, fixed_shapes)
            assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (tf32, benchmark, deterministic)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert not torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.use_deterministic_algorithms(before)
