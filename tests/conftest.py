"""What holds for all tests."""

import torch

# Sums of floats depend on the number of threads, and subprocesses of tests use one. Besides, a process forked from one
# that has used several OpenMP threads hangs in its first sum.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list) -> None:
    """The longest tests come first, so that no core waits for them at the end."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)
