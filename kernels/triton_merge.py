"""Join partial softmaxes over disjoint keys, and add up their gradients, in one pass over memory."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div
from muse_dist.kernels.triton_common import LOG2E, load_rows, padded, store_rows

MOST = 4  # parts that a kernel reads at once


class Part(NamedTuple):
    """Partial softmax of some consecutive rows of every head."""

    out: Tensor  # [heads, rows, D]
    lse: Tensor  # fp32 [heads, rows]
    start: int  # the first of the rows


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join partial softmaxes over disjoint keys: (out [..., D], lse [...]) each -> out, lse of their union.

    The log-sum-exps are fp32; out has the dtype of the first part. Rows that are empty everywhere give 0 and -inf. A
    single part is returned as it is.
    """
    shape = parts[0][0].shape
    flat = [Part(out.reshape(1, -1, shape[-1]), lse.reshape(1, -1), 0) for out, lse in parts]
    out, lse = join(flat, flat[0].lse.shape[1])
    return out.view(shape), lse.view(shape[:-1])


def join(parts: Sequence[Part], rows: int) -> tuple[Tensor, Tensor]:
    """Join parts of which each covers some of the rows: out [heads, rows, D] in the dtype of the first, lse fp32.

    A single part that covers all rows is returned as it is.
    """
    parts = list(parts)
    while len(parts) > MOST:
        parts = [Part(*_join_few(parts[:MOST], rows), 0), *parts[MOST:]]
    if len(parts) == 1 and parts[0].lse.shape[1] == rows:
        return parts[0].out, parts[0].lse
    return _join_few(parts, rows)


def add_part(total: Tensor, part: Tensor, start: int) -> None:
    """Add part [heads, size, D], of any strides but 1 between the columns, to rows of total [heads, rows, D] in place.

    Both are of the same dtype, `total` contiguous; `start` is the first of the rows. torch's own addition
    does not read strided rows in wide words.
    """
    heads, size, dim = part.shape
    tile = max(16, min(128, 8192 // padded(dim)))
    _add[(ceil_div(size, tile), heads)](
        total, part, start, size, part.stride(0), part.stride(1), total.stride(0), ROWS=tile, DIM=dim,
        DIM_PAD=padded(dim))


def add_up(parts: Sequence[Tensor], total: Tensor | None = None) -> Tensor:
    """The sum of equal tensors [..., N, D], rounded once; written to `total` if that is given.

    The rows of both may be those of longer tensors. Of up to four parts each is read once, and nothing else.
    """
    first = parts[0]
    if total is None:
        total = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    few = list(parts)
    while len(few) > MOST:
        few = [_add_few(few[:MOST], torch.empty(first.shape, dtype=torch.float32, device=first.device)), *few[MOST:]]
    return _add_few(few, total)


def _add_few(parts: Sequence[Tensor], total: Tensor) -> Tensor:
    flat = [_rows_of(x) for x in parts]
    place = _rows_of(total)
    assert place.data_ptr() == total.data_ptr(), "sums are written where they stand"
    heads, size, dim = place.shape
    none, zero = (None,) * (MOST - len(parts)), (0,) * (MOST - len(parts))
    tile = max(16, min(128, 8192 // padded(dim)))
    _sum[(ceil_div(size, tile), heads)](
        *flat, *none, place, *(x.stride(0) for x in flat), *zero, place.stride(0), size, PARTS=len(parts), ROWS=tile,
        DIM=dim, DIM_PAD=padded(dim))
    return total


def _rows_of(x: Tensor) -> Tensor:
    """[..., N, D] -> [heads, N, D] whose rows are whole and lie one behind the other, a view where it can be."""
    flat = x.flatten(0, -3)
    return flat if flat.stride()[1:] == (flat.shape[2], 1) else flat.contiguous()


@triton.jit
def _sum(part0, part1, part2, part3, total, stride0, stride1, stride2, stride3, total_stride, size,
         PARTS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < size
    found = load_rows(part0 + head * stride0, row, inside, DIM, DIM_PAD).to(tl.float32)
    if PARTS > 1:
        found += load_rows(part1 + head * stride1, row, inside, DIM, DIM_PAD).to(tl.float32)
    if PARTS > 2:
        found += load_rows(part2 + head * stride2, row, inside, DIM, DIM_PAD).to(tl.float32)
    if PARTS > 3:
        found += load_rows(part3 + head * stride3, row, inside, DIM, DIM_PAD).to(tl.float32)
    store_rows(total + head * total_stride, row, inside, found, DIM, DIM_PAD)


@triton.jit(do_not_specialize=["start"])
def _add(total, part, start, size, head_stride, row_stride, total_stride, ROWS: tl.constexpr, DIM: tl.constexpr,
         DIM_PAD: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_PAD)
    ok = (row < size)[:, None] & (column < DIM)[None, :]
    at = total + head * total_stride + (start + row)[:, None] * DIM + column[None, :]
    change = tl.load(part + head * head_stride + row[:, None] * row_stride + column[None, :], mask=ok, other=0.0)
    result = tl.load(at, mask=ok, other=0.0).to(tl.float32) + change.to(tl.float32)
    tl.store(at, result.to(total.dtype.element_ty), mask=ok)


def _join_few(parts: Sequence[Part], rows: int) -> tuple[Tensor, Tensor]:
    heads, _, dim = parts[0].out.shape
    out = torch.empty((heads, rows, dim), dtype=parts[0].out.dtype, device=parts[0].out.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=out.device)
    none = (None,) * (MOST - len(parts))
    zero = (0,) * (MOST - len(parts))
    tile = max(16, min(64, 4096 // padded(dim)))
    _join[(ceil_div(rows, tile) * heads,)](
        *(part.out.contiguous() for part in parts), *none, *(part.lse.contiguous() for part in parts), *none,
        *(part.start for part in parts), *zero, *(part.lse.shape[1] for part in parts), *zero, out, lse, rows,
        PARTS=len(parts), ROWS=tile, DIM=dim, DIM_PAD=padded(dim))
    return out, lse


@triton.jit
def _load_lse(lse, head, row, start, count):
    """Log-sum-exps of the rows in base 2, -inf where a part does not cover them."""
    place = row - start
    inside = (place >= 0) & (place < count)
    return tl.load(lse + head * count + place, mask=inside, other=float("-inf")) * LOG2E


@triton.jit
def _weighed(out, head, row, start, count, weight, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """The rows of a part times their weights; what has no weight is not read."""
    place = row - start
    inside = (place >= 0) & (place < count) & (weight != 0.0)
    return load_rows(out + head * count * DIM, place, inside, DIM, DIM_PAD).to(tl.float32) * weight[:, None]


@triton.jit
def _join(out0, out1, out2, out3, lse0, lse1, lse2, lse3, start0, start1, start2, start3, count0, count1, count2,
          count3, out, lse, rows, PARTS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    tiles = tl.cdiv(rows, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at0 = _load_lse(lse0, head, row, start0, count0)
    top = at0
    if PARTS > 1:
        at1 = _load_lse(lse1, head, row, start1, count1)
        top = tl.maximum(top, at1)
    if PARTS > 2:
        at2 = _load_lse(lse2, head, row, start2, count2)
        top = tl.maximum(top, at2)
    if PARTS > 3:
        at3 = _load_lse(lse3, head, row, start3, count3)
        top = tl.maximum(top, at3)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2(at0 - base)
    result = _weighed(out0, head, row, start0, count0, total, DIM, DIM_PAD)
    if PARTS > 1:
        weight = tl.exp2(at1 - base)
        total += weight
        result += _weighed(out1, head, row, start1, count1, weight, DIM, DIM_PAD)
    if PARTS > 2:
        weight = tl.exp2(at2 - base)
        total += weight
        result += _weighed(out2, head, row, start2, count2, weight, DIM, DIM_PAD)
    if PARTS > 3:
        weight = tl.exp2(at3 - base)
        total += weight
        result += _weighed(out3, head, row, start3, count3, weight, DIM, DIM_PAD)
    inside = row < rows
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(out + head * rows * DIM, row, inside, result, DIM, DIM_PAD)
    tl.store(lse + head * rows + row, (base + tl.log2(total)) / LOG2E, mask=inside)
