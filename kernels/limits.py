"""What the Triton kernels can run, known without importing Triton."""
from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_DIM = 256
LEAF_BYTES = 64 * 1024  # of the keys of a padded leaf that a program holds on chip


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`. Triton's own costs microseconds a call."""
    return 1 << (size - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs microseconds a call."""
    return -(-a // b)


def padded(size: int) -> int:
    """The power of two that tiles of `size` take; tl.dot needs 16."""
    return max(16, power_of_two(size))


def largest_leaf(dim: int, dtype: torch.dtype) -> int:
    """Keys that a leaf may hold, padded to a power of two."""
    return LEAF_BYTES // (padded(dim) * dtype.itemsize)
