"""Forward and backward of the attention over the blocks of a sequence, for a structure that is given.

Tensors are in the working dtype (fp32 or fp64) and in the shapes q [B, K, G, N, D], k and v [B, K, N, D].
"""
from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.config import MuseConfig
from muse_dist.kernels import reference
from muse_dist.layout import block_count, near_pairs
from muse_dist.tree import (
    Blocks,
    Plan,
    arrange,
    from_leaves,
    from_query_rows,
    gather_rows,
    query_rows,
    scatter_rows,
    seen_leaves,
)


class FarBlock(NamedTuple):
    """One query block with a far field, in the order of the plan."""

    place: int  # the block's place among the query blocks
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


def working(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D] as [B, K, G, N, D], k and v [B, K, N, D], in the dtype of the arithmetic."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.to(dtype).unflatten(1, (k.shape[1], -1)), k.to(dtype), v.to(dtype)


def near_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, config: MuseConfig) -> tuple[Tensor, Tensor]:
    """The near field of a whole sequence: out [B, K, G, N, D], lse [B, K, G, N]."""
    blocks = range(block_count(q.shape[3], config.block))
    pairs = near_pairs(blocks, blocks, config)
    return kernels_for(config, q.device).near_field(q, k, v, scale, pairs, config.block)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | None, scale: float, config: MuseConfig
) -> tuple[Tensor, Tensor]:
    """Out [B, K, G, N, D] and lse [B, K, G, N] of the merged softmax; `plan` is None where there is no far field."""
    near = near_forward(q, k, v, scale, config)
    if plan is None:
        return near
    blocks = range(plan.key_order.shape[2])
    far = far_forward(arrange(q, k, v, plan, config), plan, blocks, blocks, scale, config)
    return kernels_for(config, q.device).merge([near, rows_to_tokens(far, plan, q.shape[2:4])])


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan | None, scale: float,
    config: MuseConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv), given those of `out`. Moments are computed again rather than kept."""
    delta = (dout * out).sum(-1)
    places = range(block_count(q.shape[3], config.block))
    near = kernels_for(config, q.device).near_field_backward(
        dout, q, k, v, lse, delta, scale, near_pairs(places, places, config), config.block)
    if plan is None:
        return near
    blocks = arrange(q, k, v, plan, config)
    rows = group_rows(dout, lse, delta, blocks, plan, config)
    dq, dk, dv = far_backward(rows, blocks, plan, places, places, scale, config)
    heads, tokens = q.shape[2:4]
    return (near[0] + ungroup(dq, plan, heads, tokens), near[1] + from_leaves(dk, plan, tokens),
            near[2] + from_leaves(dv, plan, tokens))


class GroupedRows(NamedTuple):
    """What a backward needs of the query rows, in the order of a plan."""

    dout: Tensor  # [B, K, n, U, g, D]
    lse: Tensor  # [B, K, n, U, g]
    delta: Tensor  # [B, K, n, U, g]


def group_rows(
    dout: Tensor, lse: Tensor, delta: Tensor, blocks: Blocks, plan: Plan, config: MuseConfig
) -> GroupedRows:
    """dout [B, K, G, N, D], lse and delta [B, K, G, N] in the order of a plan."""
    dout, lse, delta = (
        gather_rows(query_rows(x, config.block), plan.query_order).unflatten(3, (-1, config.group))
        for x in (dout, lse[..., None], delta[..., None]))
    # Rows that do not exist get no weight, whatever their logits: exp(logit - inf) = 0.
    return GroupedRows(dout, lse[..., 0].masked_fill(~blocks.row_valid, torch.inf), delta[..., 0])


def ungroup(rows: Tensor, plan: Plan, heads: int, tokens: int) -> Tensor:
    """[B, K, n, U, g, D] -> [B, K, G, N, D]: grouped rows back in the order of the sequence."""
    return from_query_rows(scatter_rows(rows.flatten(3, 4), plan.query_order), heads, tokens)


def rows_to_tokens(part: tuple[Tensor, Tensor], plan: Plan, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A partial softmax of grouped rows in the order of the sequence; `size` is (G, N)."""
    heads, tokens = size
    return ungroup(part[0], plan, heads, tokens), ungroup(part[1][..., None], plan, heads, tokens)[..., 0]


def far_forward(
    blocks: Blocks, plan: Plan, query_blocks: Sequence[int], key_blocks: Sequence[int], scale: float,
    config: MuseConfig,
) -> tuple[Tensor, Tensor]:
    """Far field and opened leaves of grouped rows: out [B, K, n, U, g, D], lse [B, K, n, U, g]."""
    ops = kernels_for(config, blocks.q.device)
    out, lse = torch.zeros_like(blocks.q), blocks.q.new_full(blocks.q.shape[:-1], -torch.inf)
    for far in _far_blocks(blocks, plan, query_blocks, key_blocks, config):
        leaf = ops.moments(far.anchor, far.k, far.v, scale, far.valid)
        parts = [ops.far_field(far.q, far.anchor, leaf, far.hidden, scale, config.trace)]
        if far.opened.shape[-1]:
            parts.append(ops.opened_leaves(far.q, far.k, far.v, far.opened, scale, far.valid))
        out[:, :, far.place], lse[:, :, far.place] = ops.merge(parts)
    return out, lse


def far_backward(
    rows: GroupedRows, blocks: Blocks, plan: Plan, query_blocks: Sequence[int], key_blocks: Sequence[int],
    scale: float, config: MuseConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `far_forward` for the rows [B, K, n, U, g, D] and the leaves [B, K, J, m, D] of `blocks`."""
    ops = kernels_for(config, blocks.q.device)
    dq, dk, dv = torch.zeros_like(blocks.q), torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
    for far in _far_blocks(blocks, plan, query_blocks, key_blocks, config):
        dout, lse, delta = (x[:, :, far.place] for x in rows)
        leaf = ops.moments(far.anchor, far.k, far.v, scale, far.valid)
        dq[:, :, far.place], grad = ops.far_field_backward(
            dout, far.q, far.anchor, leaf, far.hidden, lse, delta, scale, config.trace)
        grads = [ops.moments_backward(grad, far.anchor, far.k, far.v, leaf, scale, far.valid)]
        if far.opened.shape[-1]:
            d_rows, *d_leaves = ops.opened_leaves_backward(
                dout, far.q, far.k, far.v, far.opened, lse, delta, scale, far.valid)
            dq[:, :, far.place] += d_rows
            grads.append(d_leaves)
        for d_keys, d_values in grads:
            dk[:, :, :far.k.shape[2]] += d_keys
            dv[:, :, :far.v.shape[2]] += d_values
    return dq, dk, dv


def _far_blocks(
    blocks: Blocks, plan: Plan, query_blocks: Sequence[int], key_blocks: Sequence[int], config: MuseConfig
) -> Iterator[FarBlock]:
    """The query blocks that have a far field, one after the other: memory stays O(N * block)."""
    for i, block in enumerate(query_blocks):
        seen = seen_leaves(block, key_blocks, config, config.block // config.leaf, blocks.q.device)
        here = len(seen)
        if here:
            opened = plan.opened[:, :, i]
            yield FarBlock(
                i, blocks.q[:, :, i], plan.anchors[:, :, i], blocks.k[:, :, :here], blocks.v[:, :, :here],
                blocks.key_valid[:here], opened, reference.hidden_leaves(opened, seen))
