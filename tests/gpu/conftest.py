"""Tests that need a GPU; elsewhere they are skipped. Each under a minute, with no more than torch where possible."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.precision import configure_backend

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A GPU in exact arithmetic, without memory of other tests."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    configure_backend(device, "exact")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield device
    configure_backend(device, "fast")
