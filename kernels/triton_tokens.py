"""Copies between the order of the sequence and the sorted rows of blocks, the heads of a key/value head pooled."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div, power_of_two
from muse_dist.kernels.triton_common import load_rows, store_rows

GATHER, SCATTER, ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TILE = 8192  # numbers that a program copies


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Rows of all blocks of x [B, K, G, N, D] in the order int64 [B, K, n, G * b]: [B, K, n, G * b, D].

    Row g * b + t of a block is its token t in head g; rows behind the last token are 0.
    """
    out = torch.empty((*order.shape, x.shape[4]), dtype=x.dtype, device=x.device)
    _launch(x, out, order, GATHER)
    return out


def scatter_tokens(rows: Tensor, order: Tensor, heads: int, tokens: int) -> Tensor:
    """The inverse of `gather_tokens`: rows [B, K, n, G * b, D] -> [B, K, G, N, D] for G = `heads`, N = `tokens`."""
    x = torch.empty((*rows.shape[:2], heads, tokens, rows.shape[4]), dtype=rows.dtype, device=rows.device)
    _launch(x, rows, order, SCATTER)
    return x


def add_tokens(total: Tensor, rows: Tensor, order: Tensor) -> None:
    """Add what `scatter_tokens` makes of rows [B, K, n, G * b, D] to `total` [B, K, G, N, D], in place."""
    _launch(total, rows, order, ADD)


def put_tokens(total: Tensor, rows: Tensor, order: Tensor) -> None:
    """Write what `scatter_tokens` makes of rows [B, K, n, G * b, D] to `total` [B, K, G, N, D], in place."""
    _launch(total, rows, order, SCATTER)


def _launch(x: Tensor, rows: Tensor, order: Tensor, how: tl.constexpr) -> None:
    """Copy between tokens x [B, K, G, N, D] and rows [B, K, n, G * b, D]."""
    batch, groups, heads, tokens, dim = x.shape
    place = x
    if not _whole_rows(x):
        assert how is GATHER, "tokens are written where they stand"
        place = x.contiguous()
    blocks, size = order.shape[2:]
    wide = power_of_two(dim)
    rows_a_tile = min(power_of_two(size), max(1, TILE // wide))
    tiles = ceil_div(size, rows_a_tile)
    _copy[(batch * groups * blocks * tiles,)](
        place, rows.contiguous(), order.contiguous(), place.stride(0), place.stride(1), place.stride(2) // dim, groups,
        blocks, tokens, tiles, BLOCK=size // heads, SIZE=size, DIM=dim, DIM_PAD=wide, ROWS=rows_a_tile, HOW=how,
        num_warps=4)


def _whole_rows(x: Tensor) -> bool:
    """Whether the tokens of each head of x [B, K, G, N, D] lie one behind the other, and heads whole tokens apart."""
    heads, tokens, dim = x.shape[2:]
    return ((dim == 1 or x.stride(4) == 1) and (tokens == 1 or x.stride(3) == dim)
            and (heads == 1 or x.stride(2) % dim == 0))


@triton.jit
def _copy(x, rows, order, batch_stride, head_stride, step, groups, blocks, tokens, tiles, BLOCK: tl.constexpr,
          SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, HOW: tl.constexpr):
    at = (tl.program_id(0) // tiles).to(tl.int64)
    block = at % blocks
    head = at // blocks
    x += head // groups * batch_stride + head % groups * head_stride
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    ok = row < SIZE
    source = tl.load(order + at * SIZE + row, mask=ok, other=0)
    token = block * BLOCK + source % BLOCK
    exists = ok & (token < tokens)
    place = source // BLOCK * step + token
    rows += at * SIZE * DIM
    if HOW == GATHER:
        store_rows(rows, row, ok, load_rows(x, place, exists, DIM, DIM_PAD), DIM, DIM_PAD)
    else:
        values = load_rows(rows, row, exists, DIM, DIM_PAD)
        if HOW == ADD:
            values = values.to(tl.float32) + load_rows(x, place, exists, DIM, DIM_PAD).to(tl.float32)
        store_rows(x, place, exists, values, DIM, DIM_PAD)
