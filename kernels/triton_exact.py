"""Exact attention and its gradients in Triton, where neither cuDNN nor FlashAttention can run: fp32, odd head dims.

The forward and the gradient of the queries take a tile of query rows a program and walk over the keys; the gradients
of the keys take a tile of keys and walk over the query rows of all heads that read them. Nothing is added atomically.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div
from muse_dist.kernels.triton_common import (
    LOG2E, PRECISION, Tile, backward_tile, check_kernel_inputs, forward_tile, load_rows, padded, side, store_rows,
)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Exact attention of every batch entry and head by itself.

    Args:
        q: [n, H, S, D]; k, v: [n, K, T, D], query head h reads key head h * K // H.
        causal: whether query i reads the keys 0 to i only, not all.
        tile: launch shape; pinned by head dim and dtype if None.
    Returns:
        out [n, H, S, D] in the dtype of q and lse [n, H, S] in fp32.
    """
    check_kernel_inputs(q.shape[-1], 1, q=q, k=k, v=v)
    tile = _forward_tile(q.shape[-1], q.dtype) if tile is None else tile
    q, k, v = (_packed(x) for x in (q, k, v))
    out = _heads_first(q)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    constants = _constants(q, k, causal, tile)
    _forward[(_programs(q, constants["ROWS"]),)](
        q, k, v, out, lse, scale, q.shape[2], k.shape[2], *_strides(q, k, v, out), **constants)
    return out, lse


def exact_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `exact_attention` as a part of a larger softmax.

    Args:
        dout: [n, H, S, D]; out [n, H, S, D] and lse [n, H, S] of the larger softmax, where lse = inf takes a row out.
        q, k, v, scale, causal, tile: as in `exact_attention`.
    """
    check_kernel_inputs(q.shape[-1], 1, q=q, k=k, v=v, out=out, dout=dout)
    tile = _backward_tile(q.shape[-1], q.dtype) if tile is None else tile
    dout, q, k, v, out = (_packed(x) for x in (dout, q, k, v, out))
    dq, dk, dv = (_heads_first(x) for x in (q, k, v))
    lse, delta = lse.contiguous(), torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    constants = _constants(q, k, causal, tile)
    _backward_rows[(_programs(q, constants["ROWS"]),)](
        dout, q, k, v, out, lse, delta, dq, scale, q.shape[2], k.shape[2], *_strides(dout, q, k, v, out, dq),
        **constants)
    _backward_keys[(_programs(k, constants["KEYS"]),)](
        dout, q, k, v, lse, delta, dk, dv, scale, q.shape[2], k.shape[2], *_strides(dout, q, k, v, dk, dv),
        **constants)
    return dq, dk, dv


def _forward_tile(dim: int, dtype: torch.dtype) -> Tile:
    """In fp32, tiles that hardly spill on Ampere or Hopper and fit the shared memory of every GPU since Ampere."""
    if dtype != torch.float32:
        return forward_tile(dim, dtype)
    if dim <= 64:
        return Tile(64, 32, 4, 2)
    return Tile(32, 32, 4, 1) if dim <= 128 else Tile(16, 16, 4, 1)


def _backward_tile(dim: int, dtype: torch.dtype) -> Tile:
    if dtype != torch.float32:
        return backward_tile(dim, dtype)
    if dim <= 64:
        return Tile(32, 32, 4, 2)
    return Tile(32, 32, 8, 1) if dim <= 128 else Tile(16, 16, 4, 1)


def _packed(x: Tensor) -> Tensor:
    """[n, H, S, D] with the rows of a head one behind the other; batch entries and heads may lie anywhere."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _heads_first(x: Tensor) -> Tensor:
    """Memory like x [n, H, S, D] in which the batch entries of a head follow each other, as blocks of a sequence do."""
    return torch.empty((x.shape[1], x.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device).transpose(0, 1)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _programs(x: Tensor, size: int) -> int:
    return x.shape[0] * x.shape[1] * ceil_div(x.shape[2], size)


def _constants(q: Tensor, k: Tensor, causal: bool, tile: Tile) -> dict[str, int | bool]:
    dim = q.shape[3]
    return {
        "HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "CAUSAL": causal,
        "ROWS": side(tile.rows, tile.rows, tile.warps), "KEYS": side(tile.keys, tile.keys, tile.warps), "DIM": dim,
        "DIM_PAD": padded(dim), "num_warps": tile.warps, "num_stages": tile.stages}


@triton.jit
def _place(x, at, HEADS: tl.constexpr, batch_stride, head_stride):
    """Where head `at` of all batch entries' heads starts."""
    return x + (at // HEADS).to(tl.int64) * batch_stride + (at % HEADS).to(tl.int64) * head_stride


@triton.jit
def _read(row, rows, key, keys, CAUSAL: tl.constexpr):
    """bool [len(row), len(key)]: which keys a query row reads."""
    ok = (row < rows)[:, None] & (key < keys)[None, :]
    return ok & (row[:, None] >= key[None, :]) if CAUSAL else ok


@triton.jit
def _forward(q, k, v, out, lse, scale, rows, keys, q_n, q_h, k_n, k_h, v_n, v_h, out_n, out_h, HEADS: tl.constexpr,
             GROUP: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
             DIM_PAD: tl.constexpr):
    tiles = tl.cdiv(rows, ROWS)
    at = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * ROWS  # late rows, which read most, start first
    row = first + tl.arange(0, ROWS)
    inside = row < rows
    queries = load_rows(_place(q, at, HEADS, q_n, q_h), row, inside, DIM, DIM_PAD)
    keys_of = _place(k, at // GROUP, HEADS // GROUP, k_n, k_h)
    values_of = _place(v, at // GROUP, HEADS // GROUP, v_n, v_h)
    total_out = tl.zeros((ROWS, DIM_PAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    stop = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    for start in range(0, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        tile = load_rows(keys_of, key, key < keys, DIM, DIM_PAD)
        logit = tl.dot(queries, tl.trans(tile), input_precision=PRECISION) * (scale * LOG2E)
        logit = tl.where(_read(row, rows, key, keys, CAUSAL), logit, float("-inf"))
        new = tl.maximum(top, tl.max(logit, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(logit - base[:, None])
        keep = tl.exp2(top - base)
        values = load_rows(values_of, key, key < keys, DIM, DIM_PAD)
        total_out = tl.dot(p.to(values.dtype), values, total_out * keep[:, None], input_precision=PRECISION)
        total = total * keep + tl.sum(p, 1)
        top = new
    result = total_out / tl.where(inside, total, 1.0)[:, None]
    store_rows(_place(out, at, HEADS, out_n, out_h), row, inside, result, DIM, DIM_PAD)
    tl.store(lse + at.to(tl.int64) * rows + row, (top + tl.log2(total)) / LOG2E, mask=inside)


@triton.jit
def _backward_rows(dout, q, k, v, out, lse, delta, dq, scale, rows, keys, dout_n, dout_h, q_n, q_h, k_n, k_h, v_n,
                   v_h, out_n, out_h, dq_n, dq_h, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
                   ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    tiles = tl.cdiv(rows, ROWS)
    at = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    row = first + tl.arange(0, ROWS)
    inside = row < rows
    queries = load_rows(_place(q, at, HEADS, q_n, q_h), row, inside, DIM, DIM_PAD)
    up = load_rows(_place(dout, at, HEADS, dout_n, dout_h), row, inside, DIM, DIM_PAD)
    result = load_rows(_place(out, at, HEADS, out_n, out_h), row, inside, DIM, DIM_PAD)
    shift = tl.sum(up.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + at.to(tl.int64) * rows + row, shift, mask=inside)  # for the gradients of the keys
    base = tl.load(lse + at.to(tl.int64) * rows + row, mask=inside, other=0.0) * LOG2E
    keys_of = _place(k, at // GROUP, HEADS // GROUP, k_n, k_h)
    values_of = _place(v, at // GROUP, HEADS // GROUP, v_n, v_h)
    grad = tl.zeros((ROWS, DIM_PAD), tl.float32)
    stop = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    for start in range(0, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        tile = load_rows(keys_of, key, key < keys, DIM, DIM_PAD)
        values = load_rows(values_of, key, key < keys, DIM, DIM_PAD)
        logit = tl.dot(queries, tl.trans(tile), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.where(_read(row, rows, key, keys, CAUSAL), tl.exp2(logit - base[:, None]), 0.0)
        change = tl.dot(up, tl.trans(values), input_precision=PRECISION)
        d_logit = p * (change - shift[:, None])
        grad = tl.dot(d_logit.to(tile.dtype), tile, grad, input_precision=PRECISION)
    store_rows(_place(dq, at, HEADS, dq_n, dq_h), row, inside, grad * scale, DIM, DIM_PAD)


@triton.jit
def _backward_keys(dout, q, k, v, lse, delta, dk, dv, scale, rows, keys, dout_n, dout_h, q_n, q_h, k_n, k_h, v_n, v_h,
                   dk_n, dk_h, dv_n, dv_h, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
                   ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    key_heads: tl.constexpr = HEADS // GROUP
    tiles = tl.cdiv(keys, KEYS)
    of = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * KEYS  # early keys, which are read most, start first
    key = first + tl.arange(0, KEYS)
    inside = key < keys
    tile = load_rows(_place(k, of, key_heads, k_n, k_h), key, inside, DIM, DIM_PAD)
    values = load_rows(_place(v, of, key_heads, v_n, v_h), key, inside, DIM, DIM_PAD)
    grad_k = tl.zeros((KEYS, DIM_PAD), tl.float32)
    grad_v = tl.zeros((KEYS, DIM_PAD), tl.float32)
    begin = first // ROWS * ROWS if CAUSAL else 0
    for member in range(GROUP):
        at = of * GROUP + member
        queries_of = _place(q, at, HEADS, q_n, q_h)
        up_of = _place(dout, at, HEADS, dout_n, dout_h)
        for start in range(begin, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            queries = load_rows(queries_of, row, row < rows, DIM, DIM_PAD)
            up = load_rows(up_of, row, row < rows, DIM, DIM_PAD)
            base = tl.load(lse + at.to(tl.int64) * rows + row, mask=row < rows, other=0.0) * LOG2E
            shift = tl.load(delta + at.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
            # Transposed, [keys, rows]: the weights then multiply the rows from the left as they are.
            logit = tl.dot(tile, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
            read = tl.trans(_read(row, rows, key, keys, CAUSAL))
            p = tl.where(read, tl.exp2(logit - base[None, :]), 0.0)
            grad_v = tl.dot(p.to(up.dtype), up, grad_v, input_precision=PRECISION)
            change = tl.dot(values, tl.trans(up), input_precision=PRECISION)
            d_logit = p * (change - shift[None, :])
            grad_k = tl.dot(d_logit.to(queries.dtype), queries, grad_k, input_precision=PRECISION)
    store_rows(_place(dk, of, key_heads, dk_n, dk_h), key, inside, grad_k * scale, DIM, DIM_PAD)
    store_rows(_place(dv, of, key_heads, dv_n, dv_h), key, inside, grad_v, DIM, DIM_PAD)
