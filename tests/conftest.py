"""What holds for all tests."""

import torch

# Sums of floats depend on the number of threads, and subprocesses of tests use one. Besides, a process forked from one
# that has used several OpenMP threads hangs in its first sum.
torch.set_num_threads(1)
