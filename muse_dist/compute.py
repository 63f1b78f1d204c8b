"""Forward and backward of the attention over the blocks of a sequence, for a structure that is given.

Tensors are in the working dtype of the backend and in the shapes q [B, K, G, S, D], k and v [B, K, T, D]; log-sum-exps
are in at least fp32.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.backend import Operators, kernels_for
from muse_dist.config import MuseConfig
from muse_dist.kernels.reference import Moments
from muse_dist.layout import block_count, near_pairs
from muse_dist.slabs import FarSlab, far_slabs, head_slabs, moment_bytes
from muse_dist.stages import staged
from muse_dist.tree import Blocks, Plan, arrange, sorted_blocks


def working(q: Tensor, k: Tensor, v: Tensor, config: MuseConfig) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D] as [B, K, G, N, D], k and v [B, K, N, D], contiguous and in the dtype that the kernels take.

    Several steps want whole rows of a head, which models give with the heads of a token side by side: one copy for all.
    """
    dtype = kernels_for(config, q).working_dtype(q.dtype)
    q, k, v = (x.contiguous().to(dtype) for x in (q, k, v))
    return q.unflatten(1, (k.shape[1], -1)), k, v


def near_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, config: MuseConfig) -> tuple[Tensor, Tensor]:
    """The near field of a whole sequence: out [B, K, G, N, D], lse [B, K, G, N]."""
    blocks = range(block_count(q.shape[3], config.block))
    pairs = near_pairs(blocks, blocks, config)
    return near_field(q, k, v, scale, pairs, config)


@staged("near field")
def near_field(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pairs: Sequence[tuple[int, int, bool]], config: MuseConfig
) -> tuple[Tensor, Tensor]:
    """Exact attention of the pairs of blocks that `near_pairs` lists: out [B, K, G, S, D], lse [B, K, G, S]."""
    return kernels_for(config, q).near_field(q, k, v, scale, pairs, config.block)  # type: ignore[no-any-return]


@staged("near field backward")
def near_field_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    pairs: Sequence[tuple[int, int, bool]], config: MuseConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `near_field`, given the merged out and lse."""
    return kernels_for(config, q).near_field_backward(  # type: ignore[no-any-return]
        dout, q, k, v, out, lse, scale, pairs, config.block)


@staged("merge")
def merge(parts: Sequence[tuple[Tensor, Tensor]], config: MuseConfig) -> tuple[Tensor, Tensor]:
    """Join partial softmaxes of the same queries: out [B, K, G, S, D], lse [B, K, G, S]."""
    return kernels_for(config, parts[0][0]).merge(parts)  # type: ignore[no-any-return]


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | None, scale: float, config: MuseConfig
) -> tuple[Tensor, Tensor]:
    """Out [B, K, G, N, D] and lse [B, K, G, N] of the merged softmax; `plan` is None where there is no far field."""
    near = near_forward(q, k, v, scale, config)
    if plan is None:
        return near
    blocks = range(plan.key_order.shape[2])
    return merge([near, far_forward(q, k, v, plan, blocks, blocks, scale, config)], config)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan | None, scale: float,
    config: MuseConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv), given those of `out`. Moments are computed again rather than kept."""
    places = range(block_count(q.shape[3], config.block))
    grads = near_field_backward(dout, q, k, v, out, lse, scale, near_pairs(places, places, config), config)
    if plan is not None:
        up = Upstream(dout, lse, kernels_for(config, q).row_dots(dout, out))
        add_far_backward(grads, up, q, k, v, plan, places, places, scale, config)
    return grads


class Upstream(NamedTuple):
    """What a backward needs of the merged softmax, in the order of the sequence or of a plan."""

    dout: Tensor  # [B, K, G, S, D] or [B, K, n, U, g, D]
    lse: Tensor  # [B, K, G, S] or [B, K, n, U, g]
    delta: Tensor  # sum(dout * out), as lse

    def of_heads(self, heads: slice) -> Upstream:
        """Of some of the key/value heads."""
        return Upstream(*(x[:, heads] for x in self))

    def of_blocks(self, rows: slice) -> Upstream:
        """Of some query blocks."""
        return Upstream(*(x[:, :, rows] for x in self))

    def of_tokens(self, tokens: slice) -> Upstream:
        """Of some tokens, in the order of the sequence."""
        return Upstream(*(x[:, :, :, tokens] for x in self))


def grouped(ops: Operators, up: Upstream, row_valid: Tensor | None, order: Tensor, config: MuseConfig) -> Upstream:
    """`up` in the order of a plan's queries; `row_valid` [B, K, n, U, g] says which rows exist, all if None."""
    dout, lse, delta = (
        ops.gather_tokens(x, order).unflatten(3, (-1, config.group))
        for x in (up.dout, up.lse[..., None], up.delta[..., None]))
    lse = lse[..., 0]
    if row_valid is not None:  # rows that do not exist get no weight, whatever their logits: exp(logit - inf) = 0
        lse = lse.masked_fill(~row_valid, torch.inf)
    return Upstream(dout, lse, delta[..., 0])


def rows_to_tokens(
    ops: Operators, part: tuple[Tensor, Tensor], plan: Plan, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A partial softmax of grouped rows in the order of the sequence; `size` is (G, N)."""
    out, lse = (ops.scatter_tokens(x.flatten(3, 4), plan.query_order, *size) for x in (part[0], part[1][..., None]))
    return out, lse[..., 0]


def join_heads(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Results of slabs of heads, side by side."""
    return parts[0] if len(parts) == 1 else tuple(torch.cat(x, 1) for x in zip(*parts))


@staged("far field")
def far_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, query_blocks: Sequence[int], key_blocks: Sequence[int], scale: float,
    config: MuseConfig,
) -> tuple[Tensor, Tensor]:
    """Far field and opened leaves: out [B, K, G, S, D], lse [B, K, G, S].

    Args:
        q: [B, K, G, S, D], the tokens of `query_blocks`; k, v: [B, K, T, D], those of `key_blocks`.
    """
    ops, parts = kernels_for(config, q), []
    room = Room.of(q, k, len(query_blocks), len(key_blocks), config, gradients=False)
    for heads in room.heads():
        here = plan.of_heads(heads)
        blocks = arrange(ops, q[:, heads], k[:, heads], v[:, heads], here, config)
        found = []
        for slab, some in room.blocks(blocks, query_blocks, key_blocks):
            sight, opened = slab.sight(q.device), here.opened[:, :, slab.rows]
            anchor = here.anchors[:, :, slab.rows]
            leaf = ops.moments(anchor, some.k, some.v, sight, scale, some.key_valid)
            found.append((slab.rows, ops.far_field(
                some.q, anchor, leaf, some.k, some.v, opened, sight, scale, config.trace, some.key_valid)))
        parts.append(rows_to_tokens(ops, join_blocks(found, blocks.q), here, q.shape[2:4]))
    return join_heads(parts)  # type: ignore[return-value]


def join_blocks(found: Sequence[tuple[slice, tuple[Tensor, Tensor]]], q: Tensor) -> tuple[Tensor, Tensor]:
    """Partial softmaxes of runs of the query blocks q [B, K, n, U, g, D]; blocks without one see nothing."""
    if len(found) == 1 and found[0][0] == slice(0, q.shape[2]):
        return found[0][1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=q.device)
    for rows, (part, part_lse) in found:
        out[:, :, rows], lse[:, :, rows] = part, part_lse
    return out, lse


@staged("far field backward")
def add_far_backward(
    grads: tuple[Tensor, Tensor, Tensor], up: Upstream, q: Tensor, k: Tensor, v: Tensor, plan: Plan,
    query_blocks: Sequence[int], key_blocks: Sequence[int], scale: float, config: MuseConfig,
) -> None:
    """Add the gradients of `far_forward` for q, k and v to `grads` in place."""
    ops = kernels_for(config, q)
    room = Room.of(q, k, len(query_blocks), len(key_blocks), config, gradients=True)
    for heads in room.heads():
        here = plan.of_heads(heads)
        blocks = arrange(ops, q[:, heads], k[:, heads], v[:, heads], here, config)
        rows = grouped(ops, up.of_heads(heads), blocks.row_valid, here.query_order, config)
        slabs = room.blocks(blocks, query_blocks, key_blocks)
        dq, dk, dv = _far_backward(rows, blocks, here, slabs, scale, config)
        ops.add_tokens(grads[0][:, heads], dq.flatten(3, 4), here.query_order)
        for total, part in zip(grads[1:], (dk, dv)):
            ops.add_tokens(total[:, heads, None], sorted_blocks(part, here), here.key_order)


def _far_backward(
    rows: Upstream, blocks: Blocks, plan: Plan, slabs: Sequence[tuple[FarSlab, Blocks]], scale: float,
    config: MuseConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows [B, K, n, U, g, D] and of the leaves [B, K, J, m, D] of `blocks`."""
    ops = kernels_for(config, blocks.q)
    # Sums of more than two terms are kept in fp32.
    dtype = blocks.k.dtype if len(slabs) < 2 else torch.promote_types(blocks.k.dtype, torch.float32)
    dk, dv = (torch.zeros(blocks.k.shape, dtype=dtype, device=blocks.k.device) for _ in range(2))
    found = []
    for slab, some in slabs:
        sight, opened = slab.sight(blocks.q.device), plan.opened[:, :, slab.rows]
        anchor = plan.anchors[:, :, slab.rows]
        leaf = ops.moments(anchor, some.k, some.v, sight, scale, some.key_valid)
        dout, lse, delta = rows.of_blocks(slab.rows)
        total = dk[:, :, :slab.leaves], dv[:, :, :slab.leaves]
        dq, grad, *_ = ops.far_field_backward(
            dout, some.q, anchor, leaf, some.k, some.v, opened, lse, delta, sight, scale, config.trace, some.key_valid,
            None, total)
        ops.moments_backward(grad, anchor, some.k, some.v, sight, scale, some.key_valid, total)
        found.append((slab.rows, dq))
    return join_rows(found, blocks.q), dk, dv


def join_rows(found: Sequence[tuple[slice, Tensor]], q: Tensor) -> Tensor:
    """Gradients of runs of the query blocks q [B, K, n, U, g, D]; 0 for the others."""
    if len(found) == 1 and found[0][0] == slice(0, q.shape[2]):
        return found[0][1]
    dq = torch.zeros_like(q)
    for rows, part in found:
        dq[:, :, rows] = part
    return dq


class Room(NamedTuple):
    """How heads and query blocks are taken together so that moments and their gradients stay as small as the inputs."""

    head_bytes: int  # of what one query block of one key/value head sees of the leaves
    bound: int
    head_count: int
    query_count: int
    config: MuseConfig

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, query_count: int, key_count: int, config: MuseConfig, *, gradients: bool
    ) -> Room:
        """For q [B, K, G, S, D] of `query_count` blocks and k [B, K, T, D] of `key_count`, whose size is the bound."""
        leaves = key_count * (config.block // config.leaf)
        one = (1 + gradients) * moment_bytes(q.shape[0], config.anchors, leaves, q.shape[-1], q.dtype)
        one += 4 * q.shape[0] * (q.shape[2] * config.block // config.group) * leaves  # what a group has left out
        return cls(one, q.nbytes + k.nbytes, k.shape[1], query_count, config)

    def heads(self) -> list[slice]:
        """Key/value heads that are worked on together."""
        return head_slabs(self.head_count, self.head_bytes, self.query_count, self.bound)

    def blocks(
        self, blocks: Blocks, query_blocks: Sequence[int], key_blocks: Sequence[int]
    ) -> list[tuple[FarSlab, Blocks]]:
        """Query blocks that are worked on together."""
        per_block = self.config.block // self.config.leaf
        here = self.head_bytes * blocks.k.shape[1]
        return [(slab, blocks.some(slab))
                for slab in far_slabs(query_blocks, key_blocks, here, self.bound, per_block, self.config)]


def no_moments(leaf: Moments) -> Moments:
    """Zeros to add gradients of moments to, in at least fp32."""
    return Moments(*(torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
                     for x in leaf))
