"""Moments of leaves about anchors, forward and backward. A program holds one leaf and walks over the anchors."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.plain_blocks import Moments, Sight
from muse_dist.kernels.triton_common import (
    LOG2E, Tile, add_rows, anchor_span, check_kernel_inputs, flags, in_place, keep_heads, load_rows, padded, sees,
    side, store_rows,
)


def moments(
    anchor: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, valid: Tensor | None = None, *,
    tile: Tile | None = None,
) -> Moments:
    """Moments of every leaf about every anchor of the query blocks that see it.

    Args:
        anchor: [B, K, n, A, D]; k, v: [B, K, J, m, D] of the same dtype; valid: bool [J, m], which keys exist (a key
            that does not is finite); all if None.
        tile: launch shape; pinned by head dim and dtype if None.
    Returns:
        Moments; key and value [B, K, n, A, J, D] in the dtype of k, mass and trace [B, K, n, A, J] in fp32.
        Leaves that a block does not see are not written: read them only through `sight`.
    """
    blocks, parts = anchor.shape[2:4]
    leaves, leaf, dim = k.shape[2:]
    check_kernel_inputs(dim, leaf, anchor=anchor, k=k, v=v)
    tile = _forward_tile(dim, k.dtype) if tile is None else tile
    (k, held), (v, _) = keep_heads(k), keep_heads(v)
    shape = (*anchor.shape[:4], leaves)
    mass, trace = (torch.empty(shape, dtype=torch.float32, device=k.device) for _ in range(2))
    key, value = (torch.empty((*shape, dim), dtype=k.dtype, device=k.device) for _ in range(2))
    _forward[_grid(k)](
        anchor.contiguous(), k, v, flags(valid), sight.query, sight.key,
        anchor_span(sight, parts), mass, key, value, trace, scale, blocks * parts, leaves, held, sight.halo,
        **_constants(k, parts, sight, valid, blocks, tile))
    return Moments(mass, key, value, trace)


def moments_backward(
    grad: Moments, anchor: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, valid: Tensor | None = None,
    total: tuple[Tensor, Tensor] | None = None, *, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients (dk, dv) [B, K, J, m, D] of `moments`, given those of its results. Anchors are constants.

    Args:
        grad: gradients in the shapes of the moments; read only where a block sees a leaf.
        anchor, k, v, sight, scale, valid, tile: as in `moments`.
        total: if given, the gradients are added to these, in place and in their dtype, and these returned.
    """
    blocks, parts = anchor.shape[2:4]
    leaves, leaf, dim = k.shape[2:]
    check_kernel_inputs(dim, leaf, anchor=anchor, k=k, v=v, grad_key=grad.key, grad_value=grad.value)
    tile = _backward_tile(dim, k.dtype) if tile is None else tile
    (k, held), (v, _) = keep_heads(k), keep_heads(v)
    dk, dv = total or tuple(torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    (dk_at, held_out), (dv_at, _) = in_place(dk), in_place(dv)
    _backward[_grid(k)](
        *(x.contiguous() for x in grad), anchor.contiguous(), k, v, flags(valid),
        sight.query, sight.key, anchor_span(sight, parts), dk_at, dv_at, scale, blocks * parts, leaves, held, held_out,
        sight.halo, ADD=total is not None, **_constants(k, parts, sight, valid, blocks, tile))
    return dk, dv


def _forward_tile(dim: int, dtype: torch.dtype) -> Tile:
    """The loop over anchors has few turns: nothing is fetched ahead."""
    row_bytes = padded(dim) * dtype.itemsize
    if row_bytes <= 256:
        return Tile(64 if row_bytes <= 128 else 32, 64, 4, 1)
    return Tile(16, 64, 8, 1)


def _backward_tile(dim: int, dtype: torch.dtype) -> Tile:
    row_bytes = padded(dim) * dtype.itemsize
    return Tile(16, 64, 4, 1) if row_bytes <= 128 else Tile(32 if row_bytes <= 256 else 16, 64, 8, 1)


def _grid(k: Tensor) -> tuple[int, int]:
    return k.shape[2], k.shape[0] * k.shape[1]


def _constants(
    k: Tensor, parts: int, sight: Sight, valid: Tensor | None, blocks: int, tile: Tile
) -> dict[str, int | bool]:
    """The compile-time arguments that both kernels take."""
    leaves, leaf, dim = k.shape[2:]
    warps = 4 if k.dtype == torch.float32 else tile.warps  # fp32 takes no tensor cores here: no side of 32 is needed
    return {
        "PARTS": parts, "PER_BLOCK": leaves // sight.key.shape[0], "LEAF": leaf, "DIM": dim,
        "CAUSAL": sight.causal, "HAS_VALID": valid is not None, "ANCHORS": side(blocks * parts, tile.rows, warps),
        "LEAF_PAD": side(leaf, padded(leaf), warps), "DIM_PAD": padded(dim), "num_warps": tile.warps,
        "num_stages": tile.stages}


@triton.jit
def _load_leaf(k, valid, at, j, HAS_VALID: tl.constexpr, LEAF: tl.constexpr, LEAF_PAD: tl.constexpr,
               DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Keys of leaf j, their mean [1, DIM_PAD], the squares of their distances from it, and which keys exist."""
    row = tl.arange(0, LEAF_PAD)
    inside = row < LEAF
    exists = inside
    if HAS_VALID:
        exists = inside & (tl.load(valid + j * LEAF + row, mask=inside, other=0) != 0)
    keys = load_rows(k + at * LEAF * DIM, row, exists, DIM, DIM_PAD)
    count = tl.maximum(tl.sum(exists.to(tl.float32), 0), 1.0)
    centre = tl.sum(keys.to(tl.float32), 0)[None, :] / count
    offset = tl.where(exists[:, None], keys.to(tl.float32) - centre, 0.0)
    return keys, centre, tl.sum(offset * offset, 1), exists


@triton.jit
def _forward(anchor, k, v, valid, query_ids, key_ids, span, mass, key, value, trace, scale, anchors, leaves, held, halo,
             PARTS: tl.constexpr, PER_BLOCK: tl.constexpr, LEAF: tl.constexpr, DIM: tl.constexpr,
             CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, ANCHORS: tl.constexpr, LEAF_PAD: tl.constexpr,
             DIM_PAD: tl.constexpr):
    j = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    source = batch * held + j
    keys, centre, square, exists = _load_leaf(k, valid, source, j, HAS_VALID, LEAF, LEAF_PAD, DIM, DIM_PAD)
    values = load_rows(v + source * LEAF * DIM, tl.arange(0, LEAF_PAD), exists, DIM, DIM_PAD)
    block = j // PER_BLOCK
    key_id = tl.load(key_ids + block)
    for start in range(tl.load(span + 2 * block), tl.load(span + 2 * block + 1), ANCHORS):
        a = start + tl.arange(0, ANCHORS)
        ok = a < anchors
        ok = ok & sees(tl.load(query_ids + a // PARTS, mask=ok, other=0), key_id, halo, CAUSAL)
        about = load_rows(anchor + batch * anchors * DIM, a, ok, DIM, DIM_PAD)
        logit = tl.dot(about, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        logit = tl.where(exists[None, :], logit, float("-inf"))
        top = tl.max(logit, 1)
        top = tl.where(top == float("-inf"), 0.0, top)  # an empty leaf
        p = tl.exp2(logit - top[:, None])
        total = tl.sum(p, 1)
        rounded = p.to(keys.dtype)
        # Means divide by the sum of the rounded weights: a mean that all keys share comes out whole.
        weight = tl.maximum(tl.sum(rounded.to(tl.float32), 1), 1e-30)[:, None]
        mean_key = tl.dot(rounded, keys, input_precision="ieee") / weight
        mean_value = tl.dot(rounded, values, input_precision="ieee") / weight
        step = tl.where((total > 0)[:, None], mean_key - centre, 0.0)
        spread = tl.sum(p * square[None, :], 1) / tl.maximum(total, 1e-30) - tl.sum(step * step, 1)
        to = (batch * anchors + a) * leaves + j
        tl.store(mass + to, (top + tl.log2(total)) / LOG2E, mask=ok)
        tl.store(trace + to, spread / DIM, mask=ok)
        store_rows(key, to, ok, mean_key, DIM, DIM_PAD)
        store_rows(value, to, ok, mean_value, DIM, DIM_PAD)


@triton.jit
def _backward(d_mass, d_key, d_value, d_trace, anchor, k, v, valid, query_ids, key_ids, span, dk, dv, scale, anchors,
              leaves, held, held_out, halo, ADD: tl.constexpr, PARTS: tl.constexpr, PER_BLOCK: tl.constexpr,
              LEAF: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr,
              ANCHORS: tl.constexpr, LEAF_PAD: tl.constexpr, DIM_PAD: tl.constexpr):
    j = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, LEAF_PAD)
    source = batch * held + j
    keys, centre, square, exists = _load_leaf(k, valid, source, j, HAS_VALID, LEAF, LEAF_PAD, DIM, DIM_PAD)
    values = load_rows(v + source * LEAF * DIM, row, exists, DIM, DIM_PAD)
    grad_k = tl.zeros((LEAF_PAD, DIM_PAD), tl.float32)
    grad_v = tl.zeros((LEAF_PAD, DIM_PAD), tl.float32)
    grad_square = tl.zeros((LEAF_PAD,), tl.float32)
    block = j // PER_BLOCK
    key_id = tl.load(key_ids + block)
    for start in range(tl.load(span + 2 * block), tl.load(span + 2 * block + 1), ANCHORS):
        a = start + tl.arange(0, ANCHORS)
        ok = a < anchors
        ok = ok & sees(tl.load(query_ids + a // PARTS, mask=ok, other=0), key_id, halo, CAUSAL)
        to = (batch * anchors + a) * leaves + j
        about = load_rows(anchor + batch * anchors * DIM, a, ok, DIM, DIM_PAD)
        up_key = load_rows(d_key, to, ok, DIM, DIM_PAD)
        up_value = load_rows(d_value, to, ok, DIM, DIM_PAD)
        up_mass = tl.load(d_mass + to, mask=ok, other=0.0)
        up_square = tl.load(d_trace + to, mask=ok, other=0.0) / DIM

        # Transposed, [keys, anchors]: the weights then multiply the gradients from the left as they are.
        logit = tl.dot(keys, tl.trans(about), input_precision="ieee") * (scale * LOG2E)
        logit = tl.where(exists[:, None], logit, float("-inf"))
        top = tl.max(logit, 0)
        p = tl.exp2(logit - tl.where(top == float("-inf"), 0.0, top)[None, :])
        p = p / tl.maximum(tl.sum(p, 0), 1e-30)[None, :]
        rounded = p.to(keys.dtype)
        weight = tl.maximum(tl.sum(rounded.to(tl.float32), 0), 1e-30)[None, :]
        step = tl.dot(tl.trans(keys), rounded, input_precision="ieee") / weight - tl.trans(centre)
        up_key = (tl.trans(up_key).to(tl.float32) - 2.0 * up_square[None, :] * step).to(keys.dtype)
        change = tl.dot(keys, up_key, input_precision="ieee")
        change = tl.dot(values, tl.trans(up_value), change, input_precision="ieee")
        change += square[:, None] * up_square[None, :]
        d_logit = p * (up_mass[None, :] + change - tl.sum(p * change, 0)[None, :]) * scale
        grad_k = tl.dot(d_logit.to(keys.dtype), about, grad_k, input_precision="ieee")
        grad_k = tl.dot(rounded, tl.trans(up_key), grad_k, input_precision="ieee")
        grad_v = tl.dot(rounded, up_value, grad_v, input_precision="ieee")
        grad_square += tl.sum(p * up_square[None, :], 1)
    grad_k += 2.0 * grad_square[:, None] * (keys.to(tl.float32) - centre)  # no weight on keys that do not exist
    to = (batch * held_out + j) * LEAF * DIM
    add_rows(dk + to, row, row < LEAF, grad_k, DIM, DIM_PAD, ADD)
    add_rows(dv + to, row, row < LEAF, grad_v, DIM, DIM_PAD, ADD)
