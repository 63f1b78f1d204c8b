"""The structure of one layer's far field: leaves, groups, anchors and the leaves that groups open.

It is computed from q and k, holds for one forward and backward, and is a constant for differentiation.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_dist.backend import Operators, kernels_for
from muse_dist.config import MuseConfig
from muse_dist.kernels.plain_blocks import Acceptance
from muse_dist.layout import block_count
from muse_dist.slabs import FarSlab, far_slabs, head_slabs, moment_bytes
from muse_dist.stages import staged

AXES = 8  # principal axes the trees split along; more change nothing measurable


class Plan(NamedTuple):
    """Structure for B sequences, K key/value heads, n blocks of b tokens, G query heads per key/value head.

    Padding tokens of a short last block stand last in both orders.
    """

    key_order: Tensor  # int64 [B, K, n, b] token in its block at each sorted place; leaves are runs of it
    query_order: Tensor  # int64 [B, K, n, G * b] row g * b + t at each sorted place; groups are runs of it
    anchors: Tensor  # [B, K, n, R, D] mean queries of R equal runs of query_order
    opened: Tensor  # int64 [B, K, n, U, O] leaves each group reads exactly, sinks first; -1 for an empty slot

    def of_heads(self, heads: slice) -> Plan:
        """The structure of some of the key/value heads."""
        return Plan(*(x[:, heads] if x.dim() > 1 else x for x in self))


class Blocks(NamedTuple):
    """q, k, v cut into whole blocks in the order of a plan, and which places hold existing tokens."""

    q: Tensor  # [B, K, n, U, g, D] query rows
    k: Tensor  # [B, K, J, m, D] leaves of all blocks
    v: Tensor  # [B, K, J, m, D]
    row_valid: Tensor | None  # bool [B, K, n, U, g]; None if all rows exist
    key_valid: Tensor | None  # bool [J, m]; None if all keys exist

    def some(self, slab: FarSlab) -> Blocks:
        """The query blocks and the leaves of a slab."""
        rows, leaves = slab.rows, slab.leaves
        return Blocks(self.q[:, :, rows], self.k[:, :, :leaves], self.v[:, :, :leaves],
                      None if self.row_valid is None else self.row_valid[:, :, rows],
                      None if self.key_valid is None else self.key_valid[:leaves])


def has_far_field(tokens: int, config: MuseConfig) -> bool:
    """Whether a sequence of `tokens` tokens is longer than what is read exactly."""
    return block_count(tokens, config.block) > config.halo + 1


def to_blocks(x: Tensor, block: int) -> Tensor:
    """[..., N, D] -> [..., n, block, D], zeros behind the last token."""
    pad = -x.shape[-2] % block
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    return x.unflatten(-2, (-1, block))


def query_rows(q: Tensor, block: int) -> Tensor:
    """[B, K, G, N, D] -> [B, K, n, G * block, D]: the heads of a key/value head are pooled as more rows."""
    return to_blocks(q, block).transpose(2, 3).flatten(3, 4)


def token_valid(tokens: int, block: int, device: torch.device) -> Tensor | None:
    """bool [n, block]: which places of the blocks hold tokens; None if all do.

    Sorting keeps it: padding stays last in its block.
    """
    if tokens % block == 0:
        return None
    return (torch.arange(block_count(tokens, block) * block, device=device) < tokens).unflatten(0, (-1, block))


def make_plan(q: Tensor, k: Tensor, config: MuseConfig, scale: float, dtype: torch.dtype | None = None) -> Plan:
    """Structure of the far field of a sequence.

    Args:
        q: [B, K, G, N, D] in the working dtype of the backend; k: [B, K, N, D].
        scale: softmax scale.
        dtype: what the anchors are rounded to, q's if None. Any point near the queries serves as an anchor; in the
            inputs' dtype kernels and ranks can share it as it is.
    Returns:
        a Plan; without randomness, and bitwise the same for the same input.
    """
    plan = order_blocks(q, k, config, config.leaf, True)
    plan = plan._replace(anchors=plan.anchors.to(dtype or q.dtype).to(q.dtype))
    blocks = range(block_count(k.shape[2], config.block))
    return plan._replace(opened=open_blocks(q, k, plan, blocks, blocks, config, scale))


@staged("order")
def order_blocks(q: Tensor, k: Tensor, config: MuseConfig, part: int, first: bool) -> Plan:
    """The orders and anchors of blocks, each from its own queries and keys; `opened` is left empty.

    Args:
        q: [B, K, G, S, D]; k: [B, K, S, D].
        part: keys in the finest leaves wanted; coarser ones are runs of them.
        first: whether the first block is the first of the sequence, where the sinks are.
    """
    ops = kernels_for(config, q)
    rows = query_rows(q, config.block)
    valid = token_valid(k.shape[2], config.block, k.device)
    key_order, query_order = _orders(ops, rows, to_blocks(k, config.block), valid, config, part, first)
    runs = ops.gather_tokens(q, query_order).unflatten(3, (config.anchors, -1))
    anchors = ops.mean_rows(runs, _unflatten(_row_valid(valid, query_order), config.anchors))
    return Plan(key_order, query_order, anchors, query_order.new_empty(0))


def _orders(
    ops: Operators, rows: Tensor, keys: Tensor, valid: Tensor | None, config: MuseConfig, part: int, first: bool
) -> tuple[Tensor, Tensor]:
    """Orders of the keys [B, K, n, b, D] and the query rows [B, K, n, G * b, D] of every block.

    Both trees split along the principal axes of the keys. Queries are measured in units of what they do to the logits,
    the spread of the keys along each axis, and by direction only: that is what decides which leaves matter to them.
    Where all queries of a block share an anchor and no group chooses, their order says nothing, and they keep it.
    """
    exists = torch.ones(1, 1, dtype=torch.bool, device=keys.device) if valid is None else valid
    axes, spread = ops.principal_axes(keys, exists.expand(*keys.shape[2:4]), min(AXES, keys.shape[-1]))
    points = ops.project(keys, axes)
    key_order = ops.bisect(points, part, 0, valid)
    if first and config.sinks:  # the first block once more, its sinks kept in place: cheaper than copies of the others
        sinks = config.sinks * config.leaf
        key_order[:, :, :1] = ops.bisect(points[:, :, :1], part, sinks, None if valid is None else valid[:1])
    if config.anchors == 1 and not config.opened:
        return key_order, _as_they_stand(rows, valid)
    return key_order, ops.bisect(ops.project(rows, axes, spread), config.group, 0, _per_row(valid, rows.shape[3]))


def _as_they_stand(rows: Tensor, valid: Tensor | None) -> Tensor:
    """The order int64 [B, K, n, G * b] that leaves rows [B, K, n, G * b, D] where they are, but puts padding last."""
    order = torch.arange(rows.shape[3], device=rows.device)
    missing = _per_row(valid, rows.shape[3])
    if missing is not None:
        order = (~missing).to(torch.int8).argsort(dim=-1, stable=True)
    return order.expand(rows.shape[:4]).contiguous()


def _per_row(valid: Tensor | None, rows: int) -> Tensor | None:
    """valid [n, b] for the pooled rows of a block: [n, G * b]."""
    return None if valid is None else valid.repeat(1, rows // valid.shape[-1])


def _row_valid(valid: Tensor | None, query_order: Tensor) -> Tensor | None:
    """valid [n, b] in the query order [B, K, n, G * b]."""
    rows = _per_row(valid, query_order.shape[-1])
    return None if rows is None else rows.expand_as(query_order).gather(-1, query_order)


def _unflatten(valid: Tensor | None, parts: int) -> Tensor | None:
    """[..., rows] -> [..., parts, rows / parts]."""
    return None if valid is None else valid.unflatten(-1, (parts, -1))


def arrange(ops: Operators, q: Tensor, k: Tensor, v: Tensor | None, plan: Plan, config: MuseConfig) -> Blocks:
    """q [B, K, G, S, D] and k, v [B, K, T, D] in the order of a plan; v is k where it is None."""
    groups = plan.query_order.shape[3] // config.group
    rows = ops.gather_tokens(q, plan.query_order).unflatten(3, (groups, -1))
    row_valid = _row_valid(token_valid(q.shape[3], config.block, q.device), plan.query_order)
    keys = to_leaves(ops, k, plan, config.leaf)
    values = keys if v is None else to_leaves(ops, v, plan, config.leaf)
    key_valid = token_valid(k.shape[2], config.block, k.device)
    return Blocks(rows, keys, values, _unflatten(row_valid, groups),
                  None if key_valid is None else key_valid.view(-1, config.leaf))


def to_leaves(ops: Operators, x: Tensor, plan: Plan, leaf: int) -> Tensor:
    """[B, K, T, D] -> [B, K, J, leaf, D]: runs of `leaf` keys of every block in the order of a plan."""
    blocks = ops.gather_tokens(x[:, :, None], plan.key_order)
    return blocks.flatten(2, 3).unflatten(2, (-1, leaf))


def sorted_blocks(x: Tensor, plan: Plan) -> Tensor:
    """Leaves [B, K, J, leaf, D] as the sorted keys of blocks [B, K, n, b, D]."""
    return x.flatten(2, 3).unflatten(2, plan.key_order.shape[2:])


@staged("choice")
def open_blocks(
    q: Tensor, k: Tensor, plan: Plan, query_blocks: Sequence[int], key_blocks: Sequence[int], config: MuseConfig,
    scale: float,
) -> Tensor:
    """Opened leaves of every query block: int64 [B, K, n, U, O], counted among the leaves of the key blocks.

    Args:
        q: [B, K, G, S, D]; k: [B, K, T, D], the tokens of the query blocks and of the key blocks.
    """
    ops, per_block = kernels_for(config, q), config.block // config.leaf
    slots = config.sinks + min(config.opened, len(key_blocks) * per_block)
    groups = plan.query_order.shape[3] // config.group
    opened = torch.full((*plan.query_order.shape[:3], groups, slots), -1, dtype=torch.int64, device=q.device)
    sinks = config.sinks if key_blocks[0] == 0 else 0
    # Scores of every leaf at a few probes a group; the kernels bound their own temporary memory.
    leaves, bound = len(key_blocks) * per_block, 2 * q.nbytes + k.nbytes
    near = config.tolerance > 0 and config.opened > 0  # errors are shares of all attention, that to near keys too
    block_bytes = 16 * q.shape[0] * groups * leaves
    if near:
        block_bytes += moment_bytes(q.shape[0], config.anchors, leaves, q.shape[-1], q.dtype)
    for heads in head_slabs(k.shape[1], block_bytes, len(query_blocks), bound):
        blocks = arrange(ops, q[:, heads], k[:, heads], None, plan.of_heads(heads), config)
        count = heads.stop - heads.start
        for slab in far_slabs(query_blocks, key_blocks, block_bytes * count, bound, per_block, config, near):
            here, sight = blocks.some(slab), slab.sight(q.device)
            accept = None
            if near:
                anchor = plan.anchors[:, heads, slab.rows]
                leaf = ops.moments(anchor, here.k, here.k, sight, scale, here.key_valid)
                accept = Acceptance(anchor, leaf, config.trace, config.tolerance)
            chosen = ops.open_leaves(here.q, here.k, sight, config.opened, sinks, scale,
                                     here.row_valid, here.key_valid, accept)
            opened[:, heads, slab.rows, :, :chosen.shape[-1]] = chosen
    return opened
