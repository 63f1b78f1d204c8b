"""What the Triton kernels share: tile sizes, checks of their arguments, and small device functions.

The kernels address memory in int64, multiply in the dtype of their inputs, add up in fp32 and take softmaxes in base 2.
Head dims and leaf sizes that are no power of two are padded to one with masks.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import DTYPES, MOST_DIM, largest_leaf, padded, power_of_two
from muse_dist.kernels.plain_blocks import Sight

LOG2E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")  # of fp32 products, right to about 1e-6; plain fp32 takes no tensor cores and spills


class Tile(NamedTuple):
    """Launch shape of a kernel."""

    rows: int  # query rows or anchors in a tile, a power of two >= 16
    keys: int  # keys or leaves in a tile, a power of two >= 16
    warps: int  # 4, or 8 for head dims above 16; 8 make tiles of 16 rows or keys ones of 32, see `side`
    stages: int  # tiles in flight


def forward_tile(dim: int, dtype: torch.dtype) -> Tile:
    """Pinned tile of the forward kernels for head dim `dim`; half precision up to 128 was measured on an H200."""
    row_bytes = padded(dim) * dtype.itemsize
    if row_bytes <= 128:
        return Tile(64, 64, 4, 2)
    if row_bytes <= 256:
        return Tile(64, 32, 4, 3)
    return Tile(64, 32, 4, 2) if row_bytes <= 512 else Tile(32, 16, 4, 1)


class BackwardTiles(NamedTuple):
    """Launch shapes of the three kernels of the far field's backward."""

    query: Tile  # gradients of the queries
    moment: Tile  # gradients of the moments
    opened: Tile  # gradients of the opened keys; its rows may be those of several groups


def backward_tile(dim: int, dtype: torch.dtype) -> Tile:
    """Pinned tile of the backward kernels for head dim `dim`."""
    row_bytes = padded(dim) * dtype.itemsize
    if row_bytes <= 128:
        return Tile(64, 64, 4, 2)
    if row_bytes <= 256:
        return Tile(64, 64, 8, 2)
    return Tile(32, 32, 4, 1) if row_bytes <= 512 else Tile(16, 16, 4, 1)


def backward_tiles(dim: int, dtype: torch.dtype) -> BackwardTiles:
    """Pinned tiles of the far field's backward for head dim `dim`; half precision up to 128 was measured on an H200."""
    row_bytes = padded(dim) * dtype.itemsize
    if row_bytes <= 128:
        return BackwardTiles(Tile(64, 128, 4, 2), Tile(128, 64, 4, 2), Tile(128, 64, 4, 2))
    if row_bytes <= 256:
        return BackwardTiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 3), Tile(64, 128, 8, 2))
    return BackwardTiles(*[backward_tile(dim, dtype)] * 3)


def side(size: int, most: int, warps: int) -> int:
    """The power of two that a tile spans of `size` rows or keys: at most `most`, at least 4 * warps.

    For eight warps and 16 columns Triton 3.6 multiplies by Hopper's wgmma in pieces of 8 columns, which in fp32 ends in
    illegal memory accesses (https://github.com/triton-lang/triton/issues/10629). Pieces of 16 columns do not.
    """
    return max(4 * warps, min(most, power_of_two(size)))


def check_kernel_inputs(dim: int, leaf: int, **tensors: Tensor | None) -> None:
    """Raise ValueError for what the kernels cannot run: dtypes, head dims above 256, leaves too large for the chip."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, dtype = next((name, x.dtype) for name, x in given.items())
    if dtype not in DTYPES:
        raise ValueError(f"{first} is {dtype}: the Triton kernels take bfloat16, float16 and float32; cast it or take "
                         "backend='torch'")
    for name, x in given.items():
        if x.dtype != dtype or x.device != given[first].device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but {first} is {dtype} on {given[first].device}: "
                             "they must agree")
    if dim > MOST_DIM:
        raise ValueError(f"head dim {dim}: the Triton kernels take at most {MOST_DIM}; take backend='torch'")
    most = largest_leaf(dim, dtype, given[first].device)
    if padded(leaf) > most:
        raise ValueError(f"leaf={leaf}: with head dim {dim} in {dtype} the Triton kernels take at most {most}; "
                         "take smaller leaves or backend='torch'")


def flags(valid: Tensor | None) -> Tensor | None:
    """Booleans as bytes, which kernels can load."""
    return None if valid is None else valid.contiguous().view(torch.uint8)


def keep_heads(x: Tensor) -> tuple[Tensor, int]:
    """Leaves [B, K, J, m, D] that kernels can read, and how many leaves lie between a head's first and the next's.

    The first leaves of a longer tensor are read where they are; anything else is copied.
    """
    leaf = x.shape[3] * x.shape[4]
    step = x.stride(1)
    if x.stride()[2:] != (leaf, x.shape[4], 1) or step % leaf or x.stride(0) != x.shape[1] * step:
        return x.contiguous(), x.shape[2]
    return x, step // leaf


def in_place(x: Tensor) -> tuple[Tensor, int]:
    """`keep_heads` of leaves that a kernel writes to, which must not be a copy."""
    kept, held = keep_heads(x)
    assert kept is x, "gradients are added to the first leaves of whole tensors"
    return kept, held


def leaf_span(sight: Sight, per_block: int) -> Tensor:
    """int32 [n, 2]: the first leaf that a query block sees, and the one behind the last."""
    return _spans(sight, False, per_block)


def anchor_span(sight: Sight, per_block: int) -> Tensor:
    """int32 [c, 2]: the first anchor that sees a key block, counted through all blocks, and the one behind the last."""
    return _spans(sight, True, per_block)


def _spans(sight: Sight, of_keys: bool, per_block: int) -> Tensor:
    """int32 [blocks, 2]: from the first to behind the last block in sight of each, times per_block; 0 and 0 if none."""
    of, over = (sight.key, sight.query) if of_keys else (sight.query, sight.key)
    out = torch.empty((of.shape[0], 2), dtype=torch.int32, device=of.device)
    _span_kernel[(of.shape[0],)](
        of, over, out, over.shape[0], sight.halo, per_block, CAUSAL=sight.causal, OF_KEYS=of_keys,
        COUNT=padded(over.shape[0]))
    return out


@triton.jit
def _span_kernel(of, over, out, count, halo, per_block, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr,
                 COUNT: tl.constexpr):
    row = tl.program_id(0)
    here = tl.load(of + row)
    place = tl.arange(0, COUNT)
    other = tl.load(over + place, mask=place < count, other=0)
    ok = sees(other, here, halo, CAUSAL) if OF_KEYS else sees(here, other, halo, CAUSAL)
    ok = ok & (place < count)
    last = tl.max(tl.where(ok, place + 1, 0), 0)
    first = tl.min(tl.where(ok, place, last), 0)
    tl.store(out + 2 * row, tl.minimum(first, last) * per_block)
    tl.store(out + 2 * row + 1, last * per_block)


@triton.jit
def sees(query, key, halo, CAUSAL: tl.constexpr):
    """Whether the far field of a query block reads a key block, by their places in the sequence."""
    distance = query - key
    return distance > halo if CAUSAL else (distance > halo) | (distance < -halo)


@triton.jit
def load_rows(pointer, row, ok, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows [len(row), DIM_PAD] of a matrix with DIM columns, zeros where not ok and in the padding."""
    column = tl.arange(0, DIM_PAD)
    mask = ok[:, None]
    if DIM != DIM_PAD:
        mask = mask & (column < DIM)[None, :]
    return tl.load(pointer + row[:, None] * DIM + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, row, ok, x, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """The inverse of `load_rows`."""
    column = tl.arange(0, DIM_PAD)
    mask = ok[:, None]
    if DIM != DIM_PAD:
        mask = mask & (column < DIM)[None, :]
    tl.store(pointer + row[:, None] * DIM + column[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_rows(pointer, row, ok, x, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ADD: tl.constexpr):
    """`store_rows`, or if ADD add to what is there, which no other program writes."""
    if ADD:
        x += load_rows(pointer, row, ok, DIM, DIM_PAD).to(tl.float32)
    store_rows(pointer, row, ok, x, DIM, DIM_PAD)


@triton.jit
def load_vector(pointer, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """fp32 [DIM_PAD], zeros in the padding."""
    column = tl.arange(0, DIM_PAD)
    return tl.load(pointer + column, mask=column < DIM, other=0.0).to(tl.float32)


@triton.jit
def products(a, b):
    """Dot products of the rows of a [M, D] and of b [N, D]: fp32 [M, N].

    fp32 rows of 256 are multiplied in halves: tensor cores cut off digits at every step of a sum, and on an H200 the
    gradients of whole rows missed 1e-5.
    """
    if a.dtype == tl.float32 and a.shape[1] > 128:
        left, right = _halves(a)
        other_left, other_right = _halves(b)
        result = tl.dot(left, tl.trans(other_left), input_precision=PRECISION)
        result += tl.dot(right, tl.trans(other_right), input_precision=PRECISION)
    else:
        result = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return result


@triton.jit
def _halves(x):
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def load_base2(lse, row, ok):
    """Log-sum-exps in base 2, so that exp2(logit - them) is 0 in rows that read nothing or are not there."""
    x = tl.load(lse + row, mask=ok, other=float("inf")) * LOG2E
    return tl.where(x == float("-inf"), 0.0, x)
