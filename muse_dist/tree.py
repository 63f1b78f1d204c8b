"""The structure of one layer's far field: leaves, groups, anchors and the leaves that groups open.

It is computed from q and k, holds for one forward and backward, and is a constant for differentiation.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_dist.config import MuseConfig
from muse_dist.kernels import reference
from muse_dist.layout import block_count, is_far

AXES = 8  # principal axes the trees split along; more change nothing measurable


class Plan(NamedTuple):
    """Structure for B sequences, K key/value heads, n blocks of b tokens, G query heads per key/value head.

    Padding tokens of a short last block stand last in both orders.
    """

    key_order: Tensor  # int64 [B, K, n, b] token in its block at each sorted place; leaves are runs of it
    query_order: Tensor  # int64 [B, K, n, G * b] row g * b + t at each sorted place; groups are runs of it
    anchors: Tensor  # [B, K, n, R, D] mean queries of R equal runs of query_order
    opened: Tensor  # int64 [B, K, n, U, O] leaves each group reads exactly, sinks first; -1 for an empty slot


class Blocks(NamedTuple):
    """q, k, v cut into whole blocks in the order of a plan, and which places hold existing tokens."""

    q: Tensor  # [B, K, n, U, g, D] query rows
    k: Tensor  # [B, K, J, m, D] leaves of all blocks
    v: Tensor  # [B, K, J, m, D]
    row_valid: Tensor  # bool [B, K, n, U, g]
    key_valid: Tensor  # bool [J, m]


def has_far_field(tokens: int, config: MuseConfig) -> bool:
    """Whether a sequence of `tokens` tokens is longer than what is read exactly."""
    return block_count(tokens, config.block) > config.halo + 1


def to_blocks(x: Tensor, block: int) -> Tensor:
    """[..., N, D] -> [..., n, block, D], zeros behind the last token."""
    pad = -x.shape[-2] % block
    return F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, block))


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [..., n, D] in the order [..., n]."""
    return x.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))


def scatter_rows(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `gather_rows`: row p of x goes to place order[p]."""
    return torch.empty_like(x).scatter_(-2, order[..., None].expand_as(x), x)


def query_rows(q: Tensor, block: int) -> Tensor:
    """[B, K, G, N, D] -> [B, K, n, G * block, D]: the heads of a key/value head are pooled as more rows."""
    return to_blocks(q, block).transpose(2, 3).flatten(3, 4)


def from_query_rows(rows: Tensor, heads: int, tokens: int) -> Tensor:
    """The inverse of `query_rows` for G = `heads`: [B, K, n, G * block, D] -> [B, K, G, N, D]."""
    return rows.unflatten(3, (heads, -1)).transpose(2, 3).flatten(3, 4)[..., :tokens, :]


def token_valid(tokens: int, block: int, device: torch.device) -> Tensor:
    """bool [n, block]: which places of the blocks hold tokens. Sorting keeps it: padding stays last in its block."""
    return (torch.arange(block_count(tokens, block) * block, device=device) < tokens).unflatten(0, (-1, block))


def make_plan(q: Tensor, k: Tensor, config: MuseConfig, scale: float) -> Plan:
    """Structure of the far field of a sequence.

    Args:
        q: [B, K, G, N, D] fp32 or fp64; k: [B, K, N, D].
        scale: softmax scale.
    Returns:
        a Plan; without randomness, and bitwise the same for the same input.
    """
    plan = order_blocks(q, k, config, config.leaf, True)
    blocks = range(block_count(k.shape[2], config.block))
    return plan._replace(opened=open_blocks(arrange(q, k, None, plan, config), blocks, blocks, config, scale))


def order_blocks(q: Tensor, k: Tensor, config: MuseConfig, part: int, first: bool) -> Plan:
    """The orders and anchors of blocks, each from its own queries and keys; `opened` is left empty.

    Args:
        q: [B, K, G, S, D]; k: [B, K, S, D].
        part: keys in the finest leaves wanted; coarser ones are runs of them.
        first: whether the first block is the first of the sequence, where the sinks are.
    """
    rows = query_rows(q, config.block)
    valid = token_valid(k.shape[2], config.block, k.device)
    key_order, query_order = _orders(rows, to_blocks(k, config.block), valid, config, part, first)
    row_valid = _row_valid(valid, query_order)
    anchors = reference.mean_rows(
        gather_rows(rows, query_order).unflatten(3, (config.anchors, -1)), row_valid.unflatten(3, (config.anchors, -1)))
    return Plan(key_order, query_order, anchors, query_order.new_empty(0))


def _orders(
    rows: Tensor, keys: Tensor, valid: Tensor, config: MuseConfig, part: int, first: bool
) -> tuple[Tensor, Tensor]:
    """Orders of the keys [B, K, n, b, D] and the query rows [B, K, n, G * b, D] of every block.

    Both trees split along the principal axes of the keys. Queries are measured in units of what they do to the logits,
    the spread of the keys along each axis, and by direction only: that is what decides which leaves matter to them.
    """
    finite = torch.where(keys.isfinite(), keys, 0.0)
    axes, spread = reference.principal_axes(finite, valid, min(AXES, keys.shape[-1]))
    points = finite @ axes
    pinned = config.sinks * config.leaf if first else 0
    head = reference.bisect(points[:, :, :1], part, pinned, valid[:1])
    key_order = torch.cat([head, reference.bisect(points[:, :, 1:], part, 0, valid[1:])], 2)
    direction = F.normalize((rows @ axes) * spread[..., None, :], dim=-1)
    return key_order, reference.bisect(direction, config.group, 0, _per_row(valid, rows.shape[3]))


def _per_row(valid: Tensor, rows: int) -> Tensor:
    """valid [n, b] for the pooled rows of a block: [n, G * b]."""
    return valid.repeat(1, rows // valid.shape[-1])


def _row_valid(valid: Tensor, query_order: Tensor) -> Tensor:
    """valid [n, b] in the query order [B, K, n, G * b]."""
    return _per_row(valid, query_order.shape[-1]).expand_as(query_order).gather(-1, query_order)


def arrange(q: Tensor, k: Tensor, v: Tensor | None, plan: Plan, config: MuseConfig) -> Blocks:
    """q [B, K, G, S, D] and k, v [B, K, T, D] in the order of a plan; v is k where it is None."""
    rows = gather_rows(query_rows(q, config.block), plan.query_order).unflatten(3, (-1, config.group))
    row_valid = _row_valid(token_valid(q.shape[3], config.block, q.device), plan.query_order)
    keys = to_leaves(k, plan, config.leaf)
    values = keys if v is None else to_leaves(v, plan, config.leaf)
    key_valid = token_valid(k.shape[2], config.block, k.device).view(-1, config.leaf)
    return Blocks(rows, keys, values, row_valid.unflatten(3, (-1, config.group)), key_valid)


def to_leaves(x: Tensor, plan: Plan, leaf: int) -> Tensor:
    """[B, K, T, D] -> [B, K, J, leaf, D]: runs of `leaf` keys of every block in the order of a plan."""
    return gather_rows(to_blocks(x, plan.key_order.shape[3]), plan.key_order).flatten(2, 3).unflatten(2, (-1, leaf))


def from_leaves(x: Tensor, plan: Plan, tokens: int) -> Tensor:
    """The inverse of `to_leaves`: [B, K, J, leaf, D] -> [B, K, tokens, D]."""
    sorted_blocks = x.flatten(2, 3).unflatten(2, plan.key_order.shape[2:])
    return scatter_rows(sorted_blocks, plan.key_order).flatten(2, 3)[:, :, :tokens]


def seen_leaves(
    query_block: int, key_blocks: Sequence[int], config: MuseConfig, per_block: int, device: torch.device
) -> Tensor:
    """bool [J]: leaves of key blocks that are far from a query block, `per_block` a block, up to the last such leaf."""
    far = [is_far(query_block, j, config) for j in key_blocks]
    last = max((place + 1 for place, seen in enumerate(far) if seen), default=0)
    return torch.tensor(far[:last], dtype=torch.bool, device=device).repeat_interleave(per_block)


def open_blocks(
    blocks: Blocks, query_blocks: Sequence[int], key_blocks: Sequence[int], config: MuseConfig, scale: float
) -> Tensor:
    """Opened leaves of every query block: int64 [B, K, n, U, O], counted among the leaves of `blocks.k`."""
    leaves, device = blocks.k.shape[2], blocks.q.device
    shape = (*blocks.q.shape[:4], config.sinks + min(config.opened, leaves))
    opened = torch.full(shape, -1, dtype=torch.int64, device=device)
    sinks = config.sinks if key_blocks[0] == 0 else 0
    for i, block in enumerate(query_blocks):
        seen = seen_leaves(block, key_blocks, config, config.block // config.leaf, device)
        here = len(seen)
        if here:
            chosen = reference.open_leaves(
                blocks.q[:, :, i], blocks.k[:, :, :here], seen, config.opened, sinks, scale,
                blocks.row_valid[:, :, i], blocks.key_valid[:here])
            opened[:, :, i, :, :chosen.shape[-1]] = chosen
    return opened
