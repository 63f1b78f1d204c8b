"""What ranks compute for each other in exchange="moments": anchors of chunks, and moments of leaves about them.

Shape legend as in `kernels/reference.py`; C chunks a rank, Q remote anchors of a chunk.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.backend import kernels_for
from muse_dist.compute import (
    Upstream, grouped, join_blocks, join_heads, join_rows, moment_bytes, no_moments, rows_to_tokens,
)
from muse_dist.config import MuseConfig
from muse_dist.kernels.clustering import bisect
from muse_dist.kernels.reference import Moments
from muse_dist.layout import Layout, chunk_pairs
from muse_dist.slabs import FarSlab, far_slabs, head_slabs
from muse_dist.stages import staged
from muse_dist.tree import Plan

Spec = tuple[tuple[int, ...], torch.dtype]


class ChunkAnchors(NamedTuple):
    """Anchors that stand for the queries of a whole chunk in front of other ranks."""

    anchor: Tensor  # [B, K, C, Q, D]
    part: Tensor  # int64 [B, K, C, n / C, R] the remote anchor that serves each part of each block

    def of_heads(self, heads: slice) -> ChunkAnchors:
        """The anchors of some of the key/value heads."""
        return ChunkAnchors(*(x[:, heads] for x in self))


class RemoteLeaves(NamedTuple):
    """Moments of other ranks' leaves as one chunk of queries sees them."""

    leaf: Moments  # [B, K, Q, J] and [B, K, Q, J, D]
    blocks: list[int]  # the blocks of the sequence they lie in, in order

    def of_heads(self, heads: slice) -> RemoteLeaves:
        """The leaves of some of the key/value heads."""
        return RemoteLeaves(Moments(*(x[:, heads] for x in self.leaf)), self.blocks)


@staged("order")
def chunk_anchors(plan: Plan, layout: Layout, config: MuseConfig) -> ChunkAnchors:
    """Bisect the block anchors of every chunk into `remote_anchors` parts and take their means."""
    points = plan.anchors.unflatten(2, (layout.chunks_per_rank, -1)).flatten(3, 4)  # [B, K, C, n/C * R, D]
    size = points.shape[3] // config.remote_anchors
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    order = bisect(points, size)
    runs = points.gather(3, order[..., None].expand_as(points)).unflatten(3, (-1, size))
    part = torch.empty_like(order).scatter_(3, order, torch.arange(order.shape[3], device=order.device)
                                            .expand_as(order)) // size
    return ChunkAnchors(runs.mean(4).to(plan.anchors.dtype), part.unflatten(3, (-1, config.anchors)))


def remote_valid(chunk: int, layout: Layout, config: MuseConfig, device: torch.device) -> Tensor:
    """bool [J, remote_leaf]: keys of a chunk that count in the moments sent; the sinks travel apart."""
    tokens = torch.arange(layout.chunk_blocks * config.block, device=device)
    sinks = config.sinks * config.leaf if chunk == 0 else 0
    return (tokens >= sinks).unflatten(0, (-1, config.remote_leaf))


class Message(NamedTuple):
    """Moments of one chunk about the anchors of another, as they travel: means in the inputs' dtype, the rest not.

    The trace of keys of a few hundred would overflow in fp16, and a rounded mass would shift a whole leaf.
    """

    mass: Tensor  # [B, K, Q, J, 1 + trace] fp32 or fp64: the mass and, if there is one, the trace
    key: Tensor  # [B, K, Q, J, D] in the inputs' dtype
    value: Tensor  # [B, K, Q, J, D]


def to_message(leaf: Moments, dtype: torch.dtype, trace: bool) -> Message:
    sums = torch.stack([leaf.mass, leaf.trace], -1) if trace else leaf.mass[..., None]
    return Message(sums, leaf.key.to(dtype), leaf.value.to(dtype))


def from_message(message: Message, dtype: torch.dtype) -> Moments:
    """The moments of a message, its means in the working dtype."""
    mass, *trace = message.mass.unbind(-1)
    return Moments(mass, message.key.to(dtype), message.value.to(dtype), *(trace or [torch.zeros_like(mass)]))


def message_specs(shape: Sequence[int], dtype: torch.dtype, mass: torch.dtype, config: MuseConfig,
                  layout: Layout) -> list[Spec]:
    """Shapes and dtypes of one `Message` for keys of shape [B, K, S, D]."""
    batch, heads, _, dim = shape
    lead = (batch, heads, config.remote_anchors, layout.chunk_blocks * config.block // config.remote_leaf)
    return [((*lead, 1 + config.trace), mass), ((*lead, dim), dtype), ((*lead, dim), dtype)]


def remote_leaves(messages: Sequence[Message], chunks: Sequence[int], layout: Layout,
                  dtype: torch.dtype) -> RemoteLeaves:
    """Join the messages for one chunk of queries, from `chunks` of keys, in the working dtype."""
    parts = [from_message(message, dtype) for message in messages]
    leaf = Moments(*(torch.cat(column, 3) for column in zip(*parts)))
    return RemoteLeaves(leaf, [block for chunk in chunks for block in layout.blocks_of_chunk(chunk)])


def sources(layout: Layout, rank: int, chunk: int, config: MuseConfig) -> list[tuple[int, int]]:
    """(rank, chunk of keys) of all messages for a chunk of queries that `rank` holds, in the order of arrival."""
    return [(source, mine) for source in range(layout.ranks)
            for mine, theirs in chunk_pairs(layout, source, rank, config) if theirs == chunk]


@staged("remote")
def remote_forward(
    q: Tensor, k: Tensor, plan: Plan, anchors: ChunkAnchors, leaves: Sequence[RemoteLeaves | None],
    query_blocks: Sequence[int], scale: float, config: MuseConfig,
) -> tuple[Tensor, Tensor]:
    """Far field of a rank's queries over other ranks' leaves: out [B, K, G, S, D], lse [B, K, G, S].

    `leaves` holds the remote leaves of each chunk of queries, None where it sees none; k only tells sizes.
    """
    ops, parts, bound = kernels_for(config, q), [], q.nbytes + 2 * k.nbytes
    for heads in _remote_heads(k, leaves, query_blocks, bound, config):
        here, about = plan.of_heads(heads), anchors.of_heads(heads)
        rows = _rows(ops, q[:, heads], here, config)
        found = []
        for chunk, remote, slab in _remote_slabs(k, leaves, heads, query_blocks, bound, config):
            found.append((slab.rows, ops.far_field(
                rows[:, :, slab.rows], about.anchor[:, :, chunk], remote.leaf, None, None, None, slab.sight(q.device),
                scale, config.trace, None, _use(about, chunk, slab, len(leaves), query_blocks))))
        parts.append(rows_to_tokens(ops, join_blocks(found, rows), here, q.shape[2:4]))
    return join_heads(parts)  # type: ignore[return-value]


@staged("remote backward")
def remote_backward(
    up: Upstream, q: Tensor, k: Tensor, plan: Plan, anchors: ChunkAnchors, leaves: Sequence[RemoteLeaves | None],
    query_blocks: Sequence[int], scale: float, config: MuseConfig,
) -> tuple[Tensor, list[Moments | None]]:
    """Gradients of `remote_forward` for q, and in at least fp32 for the moments of every chunk of queries."""
    ops, parts, bound = kernels_for(config, q), [], q.nbytes + 2 * k.nbytes
    grads = [None if x is None else no_moments(x.leaf) for x in leaves]
    for heads in _remote_heads(k, leaves, query_blocks, bound, config):
        here, about = plan.of_heads(heads), anchors.of_heads(heads)
        rows = _rows(ops, q[:, heads], here, config)
        grouped_up = grouped(ops, up.of_heads(heads), None, here, config)
        found = []
        for chunk, remote, slab in _remote_slabs(k, leaves, heads, query_blocks, bound, config):
            dout, lse, delta = grouped_up.of_blocks(slab.rows)
            use, sight = _use(about, chunk, slab, len(leaves), query_blocks), slab.sight(q.device)
            dq, grad, _, _ = ops.far_field_backward(
                dout, rows[:, :, slab.rows], about.anchor[:, :, chunk], remote.leaf, None, None, None, lse, delta,
                sight, scale, config.trace, None, use)
            found.append((slab.rows, dq))
            total = grads[chunk]
            assert total is not None
            seen = ops.seen_blocks(sight).repeat_interleave(slab.leaves // len(slab.key_places), -1)
            for sum_, x in zip(total, grad):
                sum_[:, heads, :, :slab.leaves].add_(_to_anchors(x, use, seen, sum_.shape[2]))
        placed = join_rows(found, rows).flatten(3, 4)
        parts.append((ops.scatter_tokens(placed, here.query_order, *q.shape[2:4]),))
    return join_heads(parts)[0], grads


def _rows(ops: ModuleType, q: Tensor, plan: Plan, config: MuseConfig) -> Tensor:
    """q [B, K, G, S, D] as groups of rows in the order of a plan: [B, K, n, U, g, D]. Ranks hold whole blocks."""
    return ops.gather_tokens(q, plan.query_order).unflatten(3, (-1, config.group))


def _block_bytes(k: Tensor, remote: RemoteLeaves, config: MuseConfig) -> int:
    """Bytes of the moments that the parts of one query block of one head see of remote leaves, with gradients."""
    leaves = len(remote.blocks) * (config.block // config.remote_leaf)
    return 2 * moment_bytes(k.shape[0], config.anchors, leaves, k.shape[3], k.dtype)


def _remote_heads(
    k: Tensor, leaves: Sequence[RemoteLeaves | None], query_blocks: Sequence[int], bound: int, config: MuseConfig
) -> list[slice]:
    """Key/value heads of k [B, K, S, D] to work on together."""
    most = max((_block_bytes(k, remote, config) for remote in leaves if remote is not None), default=0)
    return head_slabs(k.shape[1], most, len(query_blocks) // len(leaves), bound)


def _remote_slabs(
    k: Tensor, leaves: Sequence[RemoteLeaves | None], heads: slice, query_blocks: Sequence[int], bound: int,
    config: MuseConfig,
) -> list[tuple[int, RemoteLeaves, FarSlab]]:
    """(chunk, its remote leaves, some of its query blocks and the leaves they see) for all that see remote leaves.

    The slab's `rows` count all query blocks of the rank.
    """
    per_chunk, per_block = len(query_blocks) // len(leaves), config.block // config.remote_leaf
    result = []
    for chunk, remote in enumerate(leaves):
        if remote is None:
            continue
        here = remote.of_heads(heads)
        first = chunk * per_chunk
        block_bytes = _block_bytes(k, remote, config) * (heads.stop - heads.start)
        blocks = query_blocks[first:first + per_chunk]
        for slab in far_slabs(blocks, remote.blocks, block_bytes, bound, per_block, config):
            seen = RemoteLeaves(Moments(*(x[:, :, :, :slab.leaves] for x in here.leaf)), here.blocks)
            place = slice(first + slab.rows.start, first + slab.rows.stop)
            result.append((chunk, seen, slab._replace(rows=place)))
    return result


def _use(anchors: ChunkAnchors, chunk: int, slab: FarSlab, chunks: int, query_blocks: Sequence[int]) -> Tensor:
    """The remote anchor that serves each part of the blocks of a slab: [B, K, blocks, R]."""
    first = chunk * (len(query_blocks) // chunks)
    return anchors.part[:, :, chunk, slab.rows.start - first:slab.rows.stop - first]


def _to_anchors(grad: Tensor, use: Tensor, seen: Tensor, count: int) -> Tensor:
    """Sum what the parts of all blocks give their anchors, in a fixed order, in at least fp32.

    Args:
        grad: [B, K, n, R, J] or [B, K, n, R, J, D]; use: [B, K, n, R]; seen: bool [n, J].
    Returns:
        [B, K, Q, J] or [B, K, Q, J, D] for Q = `count` anchors.
    """
    seen = seen[:, None] if grad.dim() == 5 else seen[:, None, :, None]
    grad = torch.where(seen, grad, 0.0).to(torch.promote_types(grad.dtype, torch.float32))
    if count == 1:
        return grad.sum((2, 3))[:, :, None]
    serves = (use[:, :, None] == torch.arange(count, device=use.device)[:, None, None]).to(grad.dtype)
    return (serves.flatten(3) @ grad.flatten(2, 3).flatten(3)).unflatten(3, grad.shape[4:])
