"""Small kernels over rows: dot products of two tensors' rows, and means of runs of rows."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div
from muse_dist.kernels.triton_common import flags, load_rows, padded

ROWS = 64  # rows in a tile


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of a and b [..., D], in fp32: [...]."""
    dim = a.shape[-1]
    out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    row_dots_kernel[(ceil_div(out.numel(), ROWS),)](
        a.contiguous(), b.contiguous(), out, out.numel(), TILE=ROWS, DIM=dim, DIM_PAD=padded(dim))
    return out


def mean_rows(q: Tensor, row_valid: Tensor | None) -> Tensor:
    """Mean of the existing, finite rows of [..., g, D]; 0 where there is none. A NaN query must not reach others."""
    size, dim = q.shape[-2:]
    out = torch.empty((*q.shape[:-2], dim), dtype=q.dtype, device=q.device)
    _mean_rows[(out.numel() // dim,)](
        q.contiguous(), flags(row_valid), out, size, HAS_VALID=row_valid is not None, TILE=ROWS, DIM=dim,
        DIM_PAD=padded(dim))
    return out


@triton.jit
def row_dots_kernel(a, b, out, count, TILE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    ok = row < count
    left = load_rows(a, row, ok, DIM, DIM_PAD).to(tl.float32)
    right = load_rows(b, row, ok, DIM, DIM_PAD).to(tl.float32)
    tl.store(out + row, tl.sum(left * right, 1), mask=ok)


@triton.jit
def _mean_rows(q, valid, out, size, HAS_VALID: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
               DIM_PAD: tl.constexpr):
    run = tl.program_id(0).to(tl.int64)
    total = tl.zeros((DIM_PAD,), tl.float32)
    count = 0.0
    for start in range(0, size, TILE):
        row = start + tl.arange(0, TILE)
        ok = row < size
        if HAS_VALID:
            ok = ok & (tl.load(valid + run * size + row, mask=ok, other=0) != 0)
        rows = load_rows(q + run * size * DIM, row, ok, DIM, DIM_PAD).to(tl.float32)
        # x - x is 0 for finite x and NaN for all others.
        ok = ok & (tl.sum(tl.where(rows - rows == 0.0, 0, 1), 1) == 0)
        total += tl.sum(tl.where(ok[:, None], rows, 0.0), 0)
        count += tl.sum(ok.to(tl.float32), 0)
    column = tl.arange(0, DIM_PAD)
    mean = total / tl.maximum(count, 1.0)
    tl.store(out + run * DIM + column, mean.to(out.dtype.element_ty), mask=column < DIM)
