"""The balanced k-d tree of `clustering.bisect`: a launch splits runs a few times, one program a run.

Runs are cut by selection, not by sorting: a median is found bit by bit, counting the points below.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import power_of_two
from muse_dist.kernels import clustering
from muse_dist.kernels.triton_clustering import check_points, finite, flags_of


class BisectTile(NamedTuple):
    """Launch shape of the bisection."""

    most: int  # points of the largest run that a program holds; coarser levels are split by torch's sort
    share: int  # points that a thread holds, a power of two, unless that takes more than 16 warps
    axes: int  # coordinates read at once, a power of two
    levels: int  # levels of the tree in one launch, for runs of at most 4096 points


def bisect(
    x: Tensor, part: int, pinned: int = 0, valid: Tensor | None = None, *, tile: BisectTile | None = None
) -> Tensor:
    """Order points so that consecutive runs of `part` points are clusters: a balanced k-d tree.

    Args:
        x: points [..., n, c], c at most 256; coordinates that are not finite count as 0.
        part: points in a cluster; n must be a multiple.
        pinned: the first `pinned` points stay first, in their order (attention sinks).
        valid: bool, broadcastable to [..., n]; points that do not exist go last. All exist if None.
        tile: launch shape; pinned if None.
    Returns:
        int64 [..., n]: the point at each place of the new order.
    """
    n, count = x.shape[-2:]
    check_points(x, count)
    clustering.check_part(n, part)
    tile = BisectTile(16384, 8, 2, 3) if tile is None else tile
    flags, periods = (None, 1) if valid is None else flags_of(valid, x.shape[:-1])
    order, size = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device), n
    fresh = n <= min(tile.most, 8192 if valid is not None else n)  # more would take too much shared memory
    if n > tile.most:
        order, size = clustering.bisect_down_to(tile.most, x, part, pinned, valid)
    elif valid is not None and not fresh:
        order.copy_(clustering.existing_first(valid))
    x = x.contiguous()
    while fresh or size > part:
        levels, odd = _levels(size // part, tile.levels if size <= 4096 else 1)
        held = power_of_two(size)
        _bisect[(x.shape[:-1].numel() // size,)](
            x, flags, order, pinned, n, periods, FRESH=fresh, SIZE=size, SIZE_PAD=held, LEVELS=levels, ODD=odd,
            COUNT=count, AXES=min(tile.axes, power_of_two(count)),
            num_warps=min(16, max(1, held // (32 * tile.share))))
        size //= odd << levels
        fresh = False
    return order


def _levels(parts: int, most: int) -> tuple[int, int]:
    """How often a launch splits runs of `parts` parts in two, and the odd number it cuts them into thereafter."""
    all_levels = (parts & -parts).bit_length() - 1
    levels = min(all_levels, most)
    return levels, parts >> levels if levels == all_levels else 1


@triton.jit
def _bisect(x, valid, order, pinned, points, periods, FRESH: tl.constexpr, SIZE: tl.constexpr,
            SIZE_PAD: tl.constexpr, LEVELS: tl.constexpr, ODD: tl.constexpr, COUNT: tl.constexpr, AXES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first // points
    x += at * points * COUNT
    order += first
    if valid is not None:
        valid += at % periods * points
    if FRESH:
        _start(valid, order, SIZE, SIZE_PAD)
    for level in tl.static_range(LEVELS):
        _split(x, valid, order, pinned, 1 << level, SIZE >> level, SIZE_PAD >> level, 2, COUNT, AXES)
    if ODD > 1:
        _split(x, valid, order, pinned, 1 << LEVELS, SIZE >> LEVELS, SIZE_PAD >> LEVELS, ODD, COUNT, AXES)


@triton.jit
def _start(valid, order, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr):
    """As clustering.existing_first."""
    point = tl.arange(0, SIZE_PAD)
    to = point
    if valid is not None:
        exists = (tl.load(valid + point, mask=point < SIZE, other=0) != 0).to(tl.int32)
        before = tl.cumsum(exists, 0)
        to = tl.where(exists != 0, before - 1, tl.sum(exists, 0) + point - before)
    tl.store(order + to, point.to(tl.int64), mask=point < SIZE)


@triton.jit
def _split(x, valid, order, pinned, RUNS: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr,
           PIECES: tl.constexpr, COUNT: tl.constexpr, AXES: tl.constexpr):
    """Cut RUNS runs of SIZE points into equal pieces along the axis on which their free points vary most."""
    piece_size: tl.constexpr = SIZE // PIECES
    place = tl.arange(0, SIZE_PAD)[None, :]
    first = tl.arange(0, RUNS)[:, None] * SIZE
    inside = (place < SIZE) & (first >= 0)
    tl.debug_barrier()  # other threads wrote the order
    point = tl.load(order + first + place, mask=inside, other=0).to(tl.int32)
    exists = inside
    if valid is not None:
        exists = exists & (tl.load(valid + point, mask=inside, other=0) != 0)
    free = exists & (point >= pinned)
    axis = _widest_axis(x, point, free, RUNS, COUNT, AXES)
    along = finite(tl.load(x + point * COUNT + axis[:, None], mask=free, other=0.0))
    # Fixed points get a place below or above all others.
    key = tl.where(exists, tl.where(free, _sortable(along), 0), 0xFFFFFFFF).to(tl.uint32)

    to = tl.full((RUNS, SIZE_PAD), -1, tl.int32)
    seen = tl.zeros((RUNS, SIZE_PAD), tl.int32)
    for piece in range(1, PIECES):
        bound = _smallest(key, piece * piece_size, RUNS)[:, None]
        below = (key < bound) & inside
        equal = (key == bound) & inside
        wanted = piece * piece_size - tl.sum(below.to(tl.int32), 1)
        lower = below | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= wanted[:, None]))
        now = tl.cumsum(lower.to(tl.int32), 1)
        to = tl.where(lower & (to < 0), (piece - 1) * piece_size + now - seen - 1, to)
        seen = now
    to = tl.where(to < 0, (PIECES - 1) * piece_size + place - seen, to)
    tl.debug_barrier()  # other threads read the order
    tl.store(order + first + to, point.to(tl.int64), mask=inside)


@triton.jit
def _widest_axis(x, point, free, RUNS: tl.constexpr, COUNT: tl.constexpr, AXES: tl.constexpr):
    """The first axis [RUNS] of largest variance of the free points [RUNS, SIZE_PAD]."""
    share = 1.0 / tl.maximum(tl.sum(free.to(tl.int32), 1), 1).to(tl.float32)
    widest = tl.full((RUNS,), -1.0, tl.float32)
    found = tl.zeros((RUNS,), tl.int32)
    for start in range(0, COUNT, AXES):
        axis = start + tl.arange(0, AXES)
        ok = free[:, :, None] & (axis < COUNT)[None, None, :]
        value = finite(tl.load(x + point[:, :, None] * COUNT + axis[None, None, :], mask=ok, other=0.0))
        mean = tl.sum(value * share[:, None, None], 1)
        value = tl.where(ok, value - mean[:, None, :], 0.0)
        unit = tl.maximum(tl.max(tl.abs(value), 1), 1.1754944e-38)  # so that squares are finite
        value = value / unit[:, None, :]
        width = tl.where((axis < COUNT)[None, :], unit * tl.sqrt(tl.sum(value * value, 1)), -1.0)
        most = tl.max(width, 1)
        where = tl.min(tl.where(width == most[:, None], axis[None, :], COUNT), 1)
        found = tl.where(most > widest, where, found)
        widest = tl.maximum(widest, most)
    return found


@triton.jit
def _sortable(x):
    """uint32 in the order of the finite fp32 x, neither the smallest nor the largest; 0 and -0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _smallest(key, rank, RUNS: tl.constexpr):
    """The rank-th smallest, from 1, of each row of uint32 [RUNS, n]; keys of places outside are the largest."""
    found = tl.zeros((RUNS,), tl.uint32)
    bit = tl.full((RUNS,), 0x80000000, tl.uint32)
    for _ in range(32):
        bound = found | bit
        count = tl.sum((key < bound[:, None]).to(tl.int32), 1)
        found = tl.where(count < rank, bound, found)
        bit = bit >> 1
    return found
