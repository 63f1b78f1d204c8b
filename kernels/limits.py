"""What the Triton kernels can run, known without importing Triton."""
from __future__ import annotations

import functools

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_DIM = 256
LARGE = (64 * 1024, 1024)  # bytes of the keys of a padded leaf, and of a key, that fit on chip: 228 KiB, on Hopper
MIDDLE = (32 * 1024, 1024)  # 163 KiB, compute capabilities 8.0 and 8.7; the kernels were compiled for 8.0 to see
SMALL = (16 * 1024, 256)  # 99 KiB, GPUs for graphics; compiled for 8.6


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def even_parts(count: int, together: int) -> list[slice]:
    """`count` things in as few runs of at most `together` (at least one) as can be, all about as long."""
    parts = ceil_div(count, max(1, together))
    ends = [count * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def padded(size: int) -> int:
    """The power of two that tiles of `size` take; tl.dot needs 16."""
    return max(16, power_of_two(size))


@functools.lru_cache(maxsize=256)  # asked at every launch
def largest_leaf(dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Keys that a leaf may hold, padded to a power of two; 0 where keys of this dtype and head dim are too long."""
    row_bytes = padded(dim) * dtype.itemsize
    leaf, row = LARGE
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability[0] not in (9, 10):
            leaf, row = MIDDLE if capability in ((8, 0), (8, 7)) else SMALL
    return leaf // row_bytes if row_bytes <= row else 0


# Query means that a group chooses its leaves with: 1 chooses worse, 16 a little better at four times the cost. Where a
# tolerance decides, 2 do: half the products, and +0.0166 nats for +0.0152 (launch.evaluate, preset fast, 65536 tokens).
PROBES, JUDGES = 4, 2


def probe_count(rows: int, judged: bool) -> int:
    """Probes of a group of `rows` query rows, the means of as many equal runs; `judged`: a tolerance decides."""
    count = JUDGES if judged else PROBES
    return count if rows % count == 0 else 1
