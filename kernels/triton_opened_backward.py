"""Gradients of the keys and values of opened leaves: a program holds one leaf and walks over the groups that opened it.

A leaf that very many groups opened is shared by several programs; their partial sums are added up in order.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.leaf_readers import Readers, piece, piece_length
from muse_dist.kernels.limits import ceil_div
from muse_dist.kernels.triton_common import (
    LOG2E, PRECISION, Tile, add_rows, flags, in_place, keep_heads, load_rows, padded, products, side, store_rows,
)


def opened_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, base: Tensor, delta: Tensor, readers: Readers, scale: float,
    valid: Tensor | None, tile: Tile, total: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Gradients (dk, dv) [B, K, J, m, D] of the opened leaves, added to `total` in place if that is given.

    Args:
        dout, q: [B, K, n, U, g, D]; k, v: [B, K, J, m, D]; base, delta: fp32 [B, K, n, U, g], the log-sum-exp of
            the merged softmax in base 2, 0 where it is -inf, and sum(dout * out); all contiguous, except k and v.
        readers: `leaf_readers` of the opened leaves; valid: bool [J, m], which keys exist; all if None.
    """
    assert all(x.is_contiguous() for x in (dout, q, base, delta)), "rows are addressed as they stand in whole tensors"
    leaves, leaf, dim = k.shape[2:]
    (k, held), (v, _) = keep_heads(k), keep_heads(v)
    batch, size = k.shape[0] * k.shape[1], q.shape[4]
    dk, dv = total or tuple(torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    (dk_at, held_out), (dv_at, _) = in_place(dk), in_place(dv)
    partial = torch.empty((2 * readers.cuts, 2, leaf, dim), dtype=torch.float32, device=k.device)
    keys = side(leaf, tile.keys, tile.warps)
    constants = {"LEAF": leaf, "DIM": dim, "KEYS": keys, "DIM_PAD": padded(dim), "ADD": total is not None,
                 "num_warps": tile.warps}
    tiles = ceil_div(leaf, keys)
    groups = q.shape[2] * q.shape[3]
    _backward[readers.cuts + leaves * batch, tiles](
        dout, q, k, v, flags(valid), base, delta, *readers[:3], partial, dk_at, dv_at, scale, batch, leaves, held,
        held_out, readers.cuts, readers.least, SLOTS=readers.slot.shape[0] // (batch * groups), SIZE=size,
        HAS_VALID=valid is not None, ROWS=max(tile.rows, 4 * tile.warps), num_stages=tile.stages, **constants)
    _add_partials[leaves * batch, tiles](
        readers.bounds, partial, dk_at, dv_at, batch, leaves, held_out, readers.cuts, readers.least, **constants)
    return dk, dv


@triton.jit
def _backward(dout, q, k, v, valid, base, delta, slot, name, bounds, partial, dk, dv, scale, batch, leaves, held,
              held_out, cuts, least, SLOTS: tl.constexpr, SIZE: tl.constexpr, HAS_VALID: tl.constexpr,
              ROWS: tl.constexpr, LEAF: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, DIM_PAD: tl.constexpr,
              ADD: tl.constexpr):
    called, first, last, sum_at = piece(tl.program_id(0), name, bounds, leaves * batch, cuts, least)
    if called < 0:
        return
    leaf = called // batch
    head = (called % batch).to(tl.int64)
    place = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    inside = place < LEAF
    exists = inside
    if HAS_VALID:
        exists = inside & (tl.load(valid + leaf.to(tl.int64) * LEAF + place, mask=inside, other=0) != 0)
    source = head * held + leaf
    keys = load_rows(k + source * LEAF * DIM, place, exists, DIM, DIM_PAD)
    values = load_rows(v + source * LEAF * DIM, place, exists, DIM, DIM_PAD)
    grad_k = tl.zeros((KEYS, DIM_PAD), tl.float32)
    grad_v = tl.zeros((KEYS, DIM_PAD), tl.float32)

    # Rows of all the groups that opened the leaf, one behind the other: a tile may hold several groups, or part of one.
    end = (last - first) * SIZE
    for start in range(0, end, ROWS):
        at = start + tl.arange(0, ROWS)
        ok = at < end
        group = tl.load(slot + first + at // SIZE, mask=ok, other=0) // SLOTS  # of all batches' groups
        row = group * SIZE + at % SIZE
        rows = load_rows(q, row, ok, DIM, DIM_PAD)
        rows_up = load_rows(dout, row, ok, DIM, DIM_PAD)
        logit = products(keys, rows) * (scale * LOG2E)
        if HAS_VALID:
            logit = tl.where(exists[:, None], logit, float("-inf"))
        # Rows that are not there give nothing: their gradients and deltas are 0, and their p at most 1.
        p = tl.exp2(logit - tl.load(base + row, mask=ok, other=0.0)[None, :])
        shared = tl.load(delta + row, mask=ok, other=0.0)
        d_logit = p * (products(values, rows_up) - shared[None, :])
        grad_v = tl.dot(p.to(rows.dtype), rows_up, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(d_logit.to(rows.dtype), rows, grad_k, input_precision=PRECISION)
    grad_k *= scale
    if sum_at < 0:
        to = (head * held_out + leaf) * LEAF * DIM
        add_rows(dk + to, place, inside, grad_k, DIM, DIM_PAD, ADD)
        add_rows(dv + to, place, inside, grad_v, DIM, DIM_PAD, ADD)
    else:
        to = 2 * sum_at.to(tl.int64) * LEAF * DIM
        store_rows(partial + to, place, inside, grad_k, DIM, DIM_PAD)
        store_rows(partial + to + LEAF * DIM, place, inside, grad_v, DIM, DIM_PAD)


@triton.jit
def _add_partials(bounds, partial, dk, dv, batch, leaves, held_out, cuts, least, LEAF: tl.constexpr,
                  DIM: tl.constexpr, KEYS: tl.constexpr, DIM_PAD: tl.constexpr, ADD: tl.constexpr):
    called = tl.program_id(0)
    begin = tl.load(bounds + called)
    end = tl.load(bounds + called + 1)
    longest = piece_length(bounds, leaves * batch, cuts, least)
    first = begin // longest
    last = (end - 1) // longest
    if (end == begin) | (first == last):
        return
    place = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    inside = place < LEAF
    grad_k = tl.zeros((KEYS, DIM_PAD), tl.float32)
    grad_v = tl.zeros((KEYS, DIM_PAD), tl.float32)
    for cut in range(first, last + 1):
        sum_at = tl.where(cut == first, cuts + first, cut).to(tl.int64)
        grad_k += load_rows(partial + 2 * sum_at * LEAF * DIM, place, inside, DIM, DIM_PAD)
        grad_v += load_rows(partial + (2 * sum_at + 1) * LEAF * DIM, place, inside, DIM, DIM_PAD)
    to = ((called % batch).to(tl.int64) * held_out + called // batch) * LEAF * DIM
    add_rows(dk + to, place, inside, grad_k, DIM, DIM_PAD, ADD)
    add_rows(dv + to, place, inside, grad_v, DIM, DIM_PAD, ADD)
