"""Forward and backward of the attention over the blocks of a sequence, for a structure that is given.

Tensors are in the working dtype (fp32 or fp64) and in the shapes q [B, K, G, N, D], k and v [B, K, N, D].
"""
from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.config import MuseConfig
from muse_dist.kernels import reference
from muse_dist.layout import block_count, near_pairs
from muse_dist.tree import (
    Blocks, Plan, arrange, from_query_rows, gather_rows, query_rows, scatter_rows, seen_leaves,
)


class FarBlock(NamedTuple):
    """One query block with a far field, in the order of the plan."""

    index: int  # the block's place among all
    q: Tensor  # [B, K, U, g, D]
    anchor: Tensor  # [B, K, R, D]
    k: Tensor  # [B, K, J, m, D] leaves up to the last one seen
    v: Tensor  # [B, K, J, m, D]
    valid: Tensor  # bool [J, m]
    opened: Tensor  # int64 [B, K, U, O]
    hidden: Tensor  # bool [B, K, U, J]


def kernels_for(config: MuseConfig, device: torch.device) -> ModuleType:
    """The module whose functions run; with backend="auto" the choice is logged once."""
    if config.backend == "auto":
        _say_backend("torch", device.type)
    return reference


@functools.cache
def _say_backend(name: str, device: str) -> None:
    logging.getLogger("muse_dist").info("backend 'auto' takes '%s' on %s", name, device)


def near_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, config: MuseConfig) -> tuple[Tensor, Tensor]:
    """The near field of a whole sequence: out [B, K, G, N, D], lse [B, K, G, N]."""
    blocks = range(block_count(q.shape[3], config.block))
    pairs = near_pairs(blocks, blocks, config)
    return kernels_for(config, q.device).near_field(q, k, v, scale, pairs, config.block)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | None, scale: float, config: MuseConfig
) -> tuple[Tensor, Tensor]:
    """Out [B, K, G, N, D] and lse [B, K, G, N] of the merged softmax; `plan` is None where there is no far field."""
    ops = kernels_for(config, q.device)
    near, near_lse = near_forward(q, k, v, scale, config)
    if plan is None:
        return near, near_lse
    out, lse = query_rows(near, config.block), query_rows(near_lse[..., None], config.block)
    for far in _far_blocks(arrange(q, k, v, plan, config), plan, config):
        leaf = ops.moments(far.anchor, far.k, far.v, scale, far.valid)
        parts = [ops.far_field(far.q, far.anchor, leaf, far.hidden, scale, config.trace)]
        if far.opened.shape[-1]:
            parts.append(ops.opened_leaves(far.q, far.k, far.v, far.opened, scale, far.valid))
        order = plan.query_order[:, :, far.index]
        far_out, far_lse = (scatter_rows(x.flatten(2, 3), order) for x in _column(ops.merge(parts)))
        merged = ops.merge([(out[:, :, far.index], lse[:, :, far.index, :, 0]), (far_out, far_lse[..., 0])])
        out[:, :, far.index], lse[:, :, far.index] = _column(merged)
    heads, tokens = q.shape[2:4]
    return from_query_rows(out, heads, tokens), from_query_rows(lse, heads, tokens)[..., 0]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan | None, scale: float,
    config: MuseConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv), given those of `out`. Moments are computed again rather than kept."""
    ops = kernels_for(config, q.device)
    delta = (dout * out).sum(-1)
    blocks = range(block_count(q.shape[3], config.block))
    pairs = near_pairs(blocks, blocks, config)
    near = ops.near_field_backward(dout, q, k, v, lse, delta, scale, pairs, config.block)
    if plan is None:
        return near
    far = _far_backward(dout, q, k, v, lse, delta, plan, scale, config)
    return near[0] + far[0], near[1] + far[1], near[2] + far[2]


def _far_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: Plan, scale: float,
    config: MuseConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the far field and the opened leaves, back in the order of the sequence."""
    ops = kernels_for(config, q.device)
    blocks = arrange(q, k, v, plan, config)
    dout, lse, delta = (_grouped(x, plan, config) for x in (dout, lse[..., None], delta[..., None]))
    # Rows that do not exist get no weight, whatever their logits: exp(logit - inf) = 0.
    lse, delta = lse[..., 0].masked_fill(~blocks.row_valid, torch.inf), delta[..., 0]
    dq, dk, dv = torch.zeros_like(blocks.q), torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
    for far in _far_blocks(blocks, plan, config):
        rows = dout[:, :, far.index], lse[:, :, far.index], delta[:, :, far.index]
        leaf = ops.moments(far.anchor, far.k, far.v, scale, far.valid)
        dq[:, :, far.index], grad = ops.far_field_backward(
            rows[0], far.q, far.anchor, leaf, far.hidden, rows[1], rows[2], scale, config.trace)
        grads = [ops.moments_backward(grad, far.anchor, far.k, far.v, leaf, scale, far.valid)]
        if far.opened.shape[-1]:
            d_rows, *d_leaves = ops.opened_leaves_backward(
                rows[0], far.q, far.k, far.v, far.opened, rows[1], rows[2], scale, far.valid)
            dq[:, :, far.index] += d_rows
            grads.append(d_leaves)
        for d_keys, d_values in grads:
            dk[:, :, :far.k.shape[2]] += d_keys
            dv[:, :, :far.v.shape[2]] += d_values
    heads, tokens = q.shape[2:4]
    dq = from_query_rows(scatter_rows(dq.flatten(3, 4), plan.query_order), heads, tokens)
    return dq, _from_leaves(dk, plan, tokens), _from_leaves(dv, plan, tokens)


def _far_blocks(blocks: Blocks, plan: Plan, config: MuseConfig) -> Iterator[FarBlock]:
    """The query blocks that have a far field, one after the other: memory stays O(N * block)."""
    count = blocks.q.shape[2]
    for i in range(count):
        seen = seen_leaves(i, count, config, blocks.q.device)
        here = len(seen)
        if here:
            opened = plan.opened[:, :, i]
            yield FarBlock(
                i, blocks.q[:, :, i], plan.anchors[:, :, i], blocks.k[:, :, :here], blocks.v[:, :, :here],
                blocks.key_valid[:here], opened, reference.hidden_leaves(opened, seen))


def _column(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) with a last dimension of 1 on lse, so that both can be moved alike."""
    return part[0], part[1][..., None]


def _grouped(x: Tensor, plan: Plan, config: MuseConfig) -> Tensor:
    """[B, K, G, N, D] -> [B, K, n, U, g, D] in the order of the plan."""
    return gather_rows(query_rows(x, config.block), plan.query_order).unflatten(3, (-1, config.group))


def _from_leaves(x: Tensor, plan: Plan, tokens: int) -> Tensor:
    """[B, K, J, m, D] -> [B, K, N, D] in the order of the sequence."""
    sorted_blocks = x.flatten(2, 3).unflatten(2, plan.key_order.shape[2:])
    return scatter_rows(sorted_blocks, plan.key_order).flatten(2, 3)[:, :, :tokens]
