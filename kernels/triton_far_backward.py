"""Backward of the far field and the opened leaves, in three kernels that each own what they write: no atomics.

Queries: a program a group, the loop of the forward again. Moments: a program an anchor and a tile of leaves, over the
rows that use the anchor. Opened keys: a program a leaf, over the groups that opened it.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.leaf_readers import leaf_readers
from muse_dist.kernels.limits import ceil_div
from muse_dist.kernels.plain_blocks import Moments, Sight
from muse_dist.kernels.triton_common import (
    LOG2E, PRECISION, BackwardTiles, backward_tiles, load_base2, load_rows, load_vector, products, store_rows,
)
from muse_dist.kernels.triton_far import (
    FarCall, anchor_of, mask_keys, opened_keys, opened_turns, seen_leaves, squared_steps,
)
from muse_dist.kernels.triton_opened_backward import opened_backward


def far_field_backward(
    dout: Tensor, q: Tensor, anchor: Tensor, leaf: Moments, k: Tensor | None, v: Tensor | None, opened: Tensor | None,
    lse: Tensor, delta: Tensor, sight: Sight, scale: float, trace: bool, valid: Tensor | None = None,
    use: Tensor | None = None, total: tuple[Tensor, Tensor] | None = None, *, tile: BackwardTiles | None = None,
) -> tuple[Tensor, Moments, Tensor | None, Tensor | None]:
    """Gradients of `far_field` for q, for the moments, and for k and v as far as they were opened.

    Args:
        dout: [B, K, n, U, g, D]; lse, delta: fp32 [B, K, n, U, g] of the merged softmax, where lse = inf takes a row
            out; the others as in `far_field`.
        total: if given, dk and dv are added to these, in place and in their dtype, and these returned.
    Returns:
        dq, the gradients of the moments [B, K, n, A, J, ...] (those of leaves out of sight are not written; with `use`,
        each part's share of its anchor's, and 0 out of sight), dk and dv (None without opened leaves).
    """
    tile = backward_tiles(q.shape[-1], q.dtype) if tile is None else tile
    call = FarCall(q, anchor, leaf, k, v, opened, sight, scale, trace, valid, use)
    q, dout, lse, delta = (x.contiguous() for x in (q, dout, lse, delta))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    base = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    square = torch.empty_like(base) if trace else None
    grid, constants = call.launch(tile.query)
    _query_backward[grid](*call.tensors, dout, lse, delta, dq, base, square, *call.numbers, **constants)
    shape = (*q.shape[:3], call.parts, leaf.mass.shape[-1])
    grad = Moments(*(torch.empty((*shape, *x.shape[leaf.mass.dim():]), dtype=x.dtype, device=x.device) for x in leaf))
    if not trace:
        grad.trace.zero_()
    _, constants = call.launch(tile.moment)
    _moment_backward[ceil_div(shape[-1], constants["LEAVES"]), q.shape[2] * call.parts, q.shape[0] * q.shape[1]](
        *call.tensors, dout, base, delta, square, *grad, *call.numbers, **constants)
    if k is None or v is None or opened is None or not opened.shape[-1]:
        return dq, grad, *(total or (None, None))
    cuts = max(1, dout.numel() // (16 * k[0, 0, 0].numel()))  # partial sums take half the memory of q in bf16
    readers = leaf_readers(opened.reshape(q.shape[0] * q.shape[1], -1, opened.shape[-1]), k.shape[2], cuts)
    dk, dv = opened_backward(dout, q, k, v, base, delta, readers, scale, valid, tile.opened, total)
    return dq, grad, dk, dv


@triton.jit
def _query_step(dq, logit, base, rows_up, delta, keys, values):
    """Adds the part of dq that some keys give, and returns the gradient of their logits too."""
    p = tl.exp2(logit - base[:, None])
    d_logit = p * (products(rows_up, values) - delta[:, None])
    return tl.dot(d_logit.to(keys.dtype), keys, dq, input_precision=PRECISION), d_logit


@triton.jit
def _query_backward(q, anchor, bias, key, value, trace, k, v, valid, opened, use, query_ids, key_ids, span, dout, lse,
                    delta, dq, bases, squares, scale, blocks, groups, leaves, held, anchors, halo,
                    SIZE: tl.constexpr, PARTS: tl.constexpr,
                    PER_BLOCK: tl.constexpr, LEAF: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
                    CAUSAL: tl.constexpr, GAPS: tl.constexpr, TRACE: tl.constexpr, HAS_VALID: tl.constexpr,
                    SHARED: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr, KEYS: tl.constexpr,
                    DIM_PAD: tl.constexpr, SLOTS_PAD: tl.constexpr):
    """Gradients of the rows; and log-sum-exps in base 2 and |q - a|^2 of every row, for the kernels that come after."""
    row_tiles: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    batch = tl.program_id(1).to(tl.int64)
    group = blocks * groups - 1 - tl.program_id(0) // row_tiles
    block = group // groups
    at = batch * blocks * groups + group
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    inside = row < SIZE
    rows = load_rows(q + at * SIZE * DIM, row, inside, DIM, DIM_PAD)
    rows_up = load_rows(dout + at * SIZE * DIM, row, inside, DIM, DIM_PAD)
    base = load_base2(lse + at * SIZE, row, inside)
    tl.store(bases + at * SIZE + row, base, mask=inside)
    shared = tl.load(delta + at * SIZE + row, mask=inside, other=0.0)
    part = (batch * blocks + block) * PARTS + group % groups * PARTS // groups
    source = anchor_of(use, part, batch, anchors, SHARED)
    bias += (at if SLOTS > 0 else source) * leaves
    query_id = tl.load(query_ids + block)
    scale2 = scale * LOG2E
    if TRACE:
        about = load_vector(anchor + source * DIM, DIM, DIM_PAD)
        square = squared_steps(rows, about)
        tl.store(squares + at * SIZE + row, square, mask=inside)
        square *= 0.5 * scale * scale2
        outward = tl.zeros((ROWS,), tl.float32)

    grad = tl.zeros((ROWS, DIM_PAD), tl.float32)
    stop = tl.load(span + 2 * block + 1)
    for start in range(tl.load(span + 2 * block), stop, LEAVES):
        leaf = start + tl.arange(0, LEAVES)
        ok = seen_leaves(leaf, stop, query_id, key_ids, halo, PER_BLOCK, CAUSAL, GAPS)
        mean_key = load_rows(key + source * leaves * DIM, leaf, ok, DIM, DIM_PAD)
        mean_value = load_rows(value + source * leaves * DIM, leaf, ok, DIM, DIM_PAD)
        offset = tl.load(bias + leaf, mask=ok, other=float("-inf"))
        logit = products(rows, mean_key) * scale2 + offset[None, :]
        if TRACE:
            spread = tl.load(trace + source * leaves + leaf, mask=ok, other=0.0)
            logit += square[:, None] * spread[None, :]
        grad, d_logit = _query_step(grad, logit, base, rows_up, shared, mean_key, mean_value)
        if TRACE:
            outward += tl.sum(d_logit * spread[None, :], 1)
    if SLOTS > 0:
        for turn in range(opened_turns(opened + at * SLOTS, SLOTS, SLOTS_PAD, LEAF, KEYS)):
            key_row, ok, some = opened_keys(
                opened + at * SLOTS, valid, turn, batch * held, SLOTS, LEAF, KEYS, HAS_VALID)
            keys = load_rows(k, key_row, ok, DIM, DIM_PAD)
            values = load_rows(v, key_row, ok, DIM, DIM_PAD)
            logit = mask_keys(products(rows, keys), ok, LEAF, KEYS, HAS_VALID) * scale2
            here = tl.where(some, base, float("inf"))  # exp2(logit - inf) = 0
            grad, d_logit = _query_step(grad, logit, here, rows_up, shared, keys, values)
    grad *= scale
    if TRACE:
        grad += scale * scale * outward[:, None] * (rows.to(tl.float32) - about[None, :])
    store_rows(dq + at * SIZE * DIM, row, inside, grad, DIM, DIM_PAD)


@triton.jit
def _moment_backward(q, anchor, bias, key, value, trace, k, v, valid, opened, use, query_ids, key_ids, span, dout, base,
                     delta, squares, d_mass, d_key, d_value, d_trace, scale, blocks, groups, leaves, held,
                     anchors, halo, SIZE: tl.constexpr, PARTS: tl.constexpr,
                     PER_BLOCK: tl.constexpr, LEAF: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
                     CAUSAL: tl.constexpr, GAPS: tl.constexpr, TRACE: tl.constexpr, HAS_VALID: tl.constexpr,
                     SHARED: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr, KEYS: tl.constexpr,
                     DIM_PAD: tl.constexpr, SLOTS_PAD: tl.constexpr):
    start = tl.program_id(0) * LEAVES
    batch = tl.program_id(2).to(tl.int64)
    block = blocks - 1 - tl.program_id(1) // PARTS
    begin = tl.load(span + 2 * block)
    stop = tl.load(span + 2 * block + 1)
    outside = (start >= stop) | (start + LEAVES <= begin)
    if outside and not SHARED:
        return
    nth = tl.program_id(1) % PARTS
    part = (batch * blocks + block) * PARTS + nth
    source = anchor_of(use, part, batch, anchors, SHARED)
    leaf = start + tl.arange(0, LEAVES)
    seen = seen_leaves(leaf, stop, tl.load(query_ids + block), key_ids, halo, PER_BLOCK, CAUSAL, GAPS) & (leaf >= begin)
    mean_key = load_rows(key + source * leaves * DIM, leaf, seen, DIM, DIM_PAD)
    mean_value = load_rows(value + source * leaves * DIM, leaf, seen, DIM, DIM_PAD)
    scale2 = scale * LOG2E
    if SLOTS == 0:
        offset = tl.load(bias + source * leaves + leaf, mask=seen, other=float("-inf"))
    if TRACE:
        spread = tl.load(trace + source * leaves + leaf, mask=seen, other=0.0) * (0.5 * scale * scale2)
        grad_trace = tl.zeros((LEAVES,), tl.float32)
    grad_key = tl.zeros((LEAVES, DIM_PAD), tl.float32)
    grad_value = tl.zeros((LEAVES, DIM_PAD), tl.float32)
    grad_mass = tl.zeros((LEAVES,), tl.float32)
    rounded_mass = tl.zeros((LEAVES,), tl.float32)

    row_tiles: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    first = (batch * blocks + block) * groups + nth * (groups // PARTS)
    turns = groups // PARTS * row_tiles
    written = seen
    if SHARED:  # blocks are added up: the leaves that one does not see must not hold anything
        turns = tl.where(outside, 0, turns)
        written = leaf < leaves
    for turn in range(turns):
        at = first + turn // row_tiles
        row = turn % row_tiles * ROWS + tl.arange(0, ROWS)
        inside = row < SIZE
        rows = load_rows(q + at * SIZE * DIM, row, inside, DIM, DIM_PAD)
        rows_up = load_rows(dout + at * SIZE * DIM, row, inside, DIM, DIM_PAD)
        if SLOTS > 0:
            offset = tl.load(bias + at * leaves + leaf, mask=seen, other=float("-inf"))
        logit = products(mean_key, rows) * scale2 + offset[:, None]
        if TRACE:
            square = tl.load(squares + at * SIZE + row, mask=inside, other=0.0)
            logit += spread[:, None] * square[None, :]
        # Rows that are not there give nothing: their gradients and deltas are 0, and their p at most a leaf's keys.
        p = tl.exp2(logit - tl.load(base + at * SIZE + row, mask=inside, other=0.0)[None, :])
        shared = tl.load(delta + at * SIZE + row, mask=inside, other=0.0)
        d_logit = p * (products(mean_value, rows_up) - shared[None, :])
        rounded = d_logit.to(rows.dtype)
        grad_value = tl.dot(p.to(rows.dtype), rows_up, grad_value, input_precision=PRECISION)
        grad_key = tl.dot(rounded, rows, grad_key, input_precision=PRECISION)
        grad_mass += tl.sum(d_logit, 1)
        rounded_mass += tl.sum(rounded.to(tl.float32), 1)
        if TRACE:
            grad_trace += tl.sum(d_logit * square[None, :], 1)
    about = load_vector(anchor + source * DIM, DIM, DIM_PAD)
    grad_key = scale * (grad_key - rounded_mass[:, None] * about[None, :])
    store_rows(d_key + part * leaves * DIM, leaf, written, grad_key, DIM, DIM_PAD)
    store_rows(d_value + part * leaves * DIM, leaf, written, grad_value, DIM, DIM_PAD)
    tl.store(d_mass + part * leaves + leaf, grad_mass, mask=written)
    if TRACE:
        tl.store(d_trace + part * leaves + leaf, 0.5 * scale * scale * grad_trace, mask=written)
