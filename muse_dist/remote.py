"""What ranks compute for each other in exchange="moments": anchors of chunks, and moments of leaves about them.

Shape legend as in `kernels/reference.py`; C chunks a rank, Q remote anchors of a chunk.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.backend import Operators, kernels_for
from muse_dist.compute import Upstream, grouped, no_moments
from muse_dist.config import MuseConfig
from muse_dist.kernels.plain_blocks import Moments
from muse_dist.layout import Layout, chunk_pairs
from muse_dist.slabs import FarSlab, far_slabs, head_slabs, moment_bytes
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
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if config.remote_anchors == 1:
        means = points.mean(3, keepdim=True)
        part = torch.zeros(points.shape[:4], dtype=torch.int64, device=points.device)
    else:
        size = points.shape[3] // config.remote_anchors
        order = kernels_for(config, plan.anchors).bisect(points, size)
        means = points.gather(3, order[..., None].expand_as(points)).unflatten(3, (-1, size)).mean(4)
        place = torch.arange(order.shape[3], device=order.device)
        part = torch.empty_like(order).scatter_(3, order, place.expand_as(order)) // size
    return ChunkAnchors(means.to(plan.anchors.dtype), part.unflatten(3, (-1, config.anchors)))


def remote_valid(chunk: int, layout: Layout, config: MuseConfig, device: torch.device) -> Tensor:
    """bool [J, remote_leaf]: keys of a chunk that count in the moments sent; the sinks travel apart."""
    tokens = torch.arange(layout.chunk_blocks * config.block, device=device)
    sinks = config.sinks * config.leaf if chunk == 0 else 0
    return (tokens >= sinks).unflatten(0, (-1, config.remote_leaf))


class Message(NamedTuple):
    """Moments of one chunk about the anchors of another, as they travel: means in the inputs' dtype, the rest not.

    The trace of keys of a few hundred would overflow in fp16, and a rounded mass would shift a whole leaf.
    """

    mass: Tensor  # [1 + trace, B, K, Q, J] fp32 or fp64: the mass and, if there is one, the trace
    key: Tensor  # [B, K, Q, J, D] in the inputs' dtype
    value: Tensor  # [B, K, Q, J, D]


def to_message(leaf: Moments, dtype: torch.dtype, trace: bool) -> Message:
    sums = torch.stack([leaf.mass, leaf.trace]) if trace else leaf.mass[None]
    return Message(sums, leaf.key.to(dtype), leaf.value.to(dtype))


def from_message(message: Message, dtype: torch.dtype) -> Moments:
    """The moments of a message, its means in the working dtype."""
    mass, *trace = message.mass.unbind()
    return Moments(mass, message.key.to(dtype), message.value.to(dtype), *(trace or [torch.zeros_like(mass)]))


def message_specs(shape: Sequence[int], dtype: torch.dtype, mass: torch.dtype, config: MuseConfig,
                  layout: Layout) -> list[Spec]:
    """Shapes and dtypes of one `Message` for keys of shape [B, K, S, D]."""
    batch, heads, _, dim = shape
    lead = (batch, heads, config.remote_anchors, layout.chunk_blocks * config.block // config.remote_leaf)
    return [((1 + config.trace, *lead), mass), ((*lead, dim), dtype), ((*lead, dim), dtype)]


def join_messages(messages: Sequence[Message], dtype: torch.dtype) -> Moments:
    """The moments of messages about the same anchors, one behind the other, the means in the working dtype."""
    parts = [from_message(message, dtype) for message in messages]
    return parts[0] if len(parts) == 1 else Moments(*(torch.cat(column, 3) for column in zip(*parts)))


def sources(layout: Layout, rank: int, chunk: int, config: MuseConfig) -> list[tuple[int, int]]:
    """(rank, chunk of keys) of all messages for a chunk of queries that `rank` holds, in the order of arrival."""
    return [(source, mine) for source in range(layout.ranks)
            for mine, theirs in chunk_pairs(layout, source, rank, config) if theirs == chunk]


@staged("remote")
def remote_forward(
    q: Tensor, plan: Plan, anchors: ChunkAnchors, leaves: Sequence[RemoteLeaves | None], query_blocks: Sequence[int],
    scale: float, config: MuseConfig,
) -> tuple[Tensor, Tensor]:
    """Far field of a rank's queries over other ranks' leaves: out [B, K, G, S, D], lse [B, K, G, S].

    `leaves` holds the remote leaves of each chunk of queries, None where it sees none.
    """
    ops, dtype = kernels_for(config, q), torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=q.device)
    for chunk, remote, slab in _remote_slabs(leaves, query_blocks, 1, len(query_blocks), config):
        order, tokens = plan.query_order[:, :, slab.rows].contiguous(), _tokens(slab, config)
        part = ops.far_field(
            _rows(ops, q[:, :, :, tokens], order, config), anchors.anchor[:, :, chunk], remote.leaf, None, None, None,
            slab.sight(q.device), scale, config.trace, None, _use(anchors, chunk, slab, len(leaves), query_blocks))
        for total, rows in ((out, part[0]), (lse[..., None], part[1][..., None])):
            ops.put_tokens(total[:, :, :, tokens], rows.flatten(3, 4), order)
    return out, lse


@staged("remote backward")
def remote_backward(
    up: Upstream, q: Tensor, k: Tensor, plan: Plan, anchors: ChunkAnchors, leaves: Sequence[RemoteLeaves | None],
    query_blocks: Sequence[int], scale: float, config: MuseConfig,
) -> tuple[Tensor, list[Moments | None]]:
    """Gradients of `remote_forward` for q, and in at least fp32 for the moments of every chunk of queries.

    Every block has gradients of its own of the moments it sees. Heads and query blocks are taken together as far as
    these fit into the size of the inputs, of which k [B, K, S, D] is one.
    """
    ops, bound = kernels_for(config, q), q.nbytes + 2 * k.nbytes
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grads: list[Moments | None] = [None] * len(leaves)
    block_bytes = max((_block_bytes(x, config) for x in leaves if x is not None), default=0)
    for heads in head_slabs(k.shape[1], block_bytes, len(query_blocks) // len(leaves), bound):
        here, about = plan.of_heads(heads), anchors.of_heads(heads)
        some = [None if x is None else x.of_heads(heads) for x in leaves]
        for chunk, remote, slab in _remote_slabs(
                some, query_blocks, block_bytes * (heads.stop - heads.start), bound, config):
            order, tokens = here.query_order[:, :, slab.rows].contiguous(), _tokens(slab, config)
            dout, lse, delta = grouped(ops, up.of_heads(heads).of_tokens(tokens), None, order, config)
            use, sight = _use(about, chunk, slab, len(leaves), query_blocks), slab.sight(q.device)
            rows, grad, _, _ = ops.far_field_backward(
                dout, _rows(ops, q[:, heads, :, tokens], order, config), about.anchor[:, :, chunk], remote.leaf, None,
                None, None, lse, delta, sight, scale, config.trace, None, use)
            ops.put_tokens(dq[:, heads, :, tokens], rows.flatten(3, 4), order)
            part = Moments(*(_to_anchors(x, use, config.remote_anchors) for x in grad))
            grads[chunk] = _add_moments(grads[chunk], part, leaves[chunk], heads)
    return dq, grads


def _rows(ops: Operators, q: Tensor, order: Tensor, config: MuseConfig) -> Tensor:
    """q [B, K, G, S, D] as groups of rows in the order of a plan's queries: [B, K, n, U, g, D]."""
    return ops.gather_tokens(q, order).unflatten(3, (-1, config.group))


def _tokens(slab: FarSlab, config: MuseConfig) -> slice:
    """A rank's tokens in the query blocks of a slab. Ranks hold whole blocks."""
    return slice(slab.rows.start * config.block, slab.rows.stop * config.block)


def _block_bytes(remote: RemoteLeaves, config: MuseConfig) -> int:
    """Bytes of the gradients that the parts of one query block of one head have of the moments of remote leaves."""
    key = remote.leaf.key
    return moment_bytes(key.shape[0], config.anchors, key.shape[3], key.shape[4], key.dtype)


def _remote_slabs(
    leaves: Sequence[RemoteLeaves | None], query_blocks: Sequence[int], block_bytes: int, bound: int,
    config: MuseConfig,
) -> list[tuple[int, RemoteLeaves, FarSlab]]:
    """(chunk, its remote leaves, some of its query blocks and the leaves they see) for all that see remote leaves.

    As many blocks together as fit into `bound` at `block_bytes` each. The slab's `rows` count all blocks of the rank.
    """
    per_chunk, per_block = len(query_blocks) // len(leaves), config.block // config.remote_leaf
    result = []
    for chunk, remote in enumerate(leaves):
        if remote is None:
            continue
        first = chunk * per_chunk
        blocks = query_blocks[first:first + per_chunk]
        for slab in far_slabs(blocks, remote.blocks, block_bytes, bound, per_block, config):
            seen = RemoteLeaves(Moments(*(x[:, :, :, :slab.leaves] for x in remote.leaf)), remote.blocks)
            place = slice(first + slab.rows.start, first + slab.rows.stop)
            result.append((chunk, seen, slab._replace(rows=place)))
    return result


def _use(anchors: ChunkAnchors, chunk: int, slab: FarSlab, chunks: int, query_blocks: Sequence[int]) -> Tensor:
    """The remote anchor that serves each part of the blocks of a slab: [B, K, blocks, R]."""
    first = chunk * (len(query_blocks) // chunks)
    return anchors.part[:, :, chunk, slab.rows.start - first:slab.rows.stop - first]


def _to_anchors(grad: Tensor, use: Tensor, count: int) -> Tensor:
    """Sum what the parts of all blocks give their anchors, in a fixed order, in at least fp32.

    Args:
        grad: [B, K, n, R, J] or [B, K, n, R, J, D], 0 for leaves that a block does not see; use: [B, K, n, R].
    Returns:
        [B, K, Q, J] or [B, K, Q, J, D] for Q = `count` anchors.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if count == 1:
        return grad.sum((2, 3), dtype=dtype)[:, :, None]
    use = use.reshape(*use.shape, *[1] * (grad.dim() - 4))
    return torch.stack([torch.where(use == a, grad, 0.0).sum((2, 3), dtype=dtype) for a in range(count)], 2)


def _add_moments(total: Moments | None, part: Moments, remote: RemoteLeaves | None, heads: slice) -> Moments:
    """Add gradients of the first moments of some heads, from some blocks, to those of all of `remote`."""
    assert remote is not None
    if total is None and part.mass.shape == remote.leaf.mass.shape:
        return part
    total = no_moments(remote.leaf) if total is None else total
    for sum_, x in zip(total, part):
        sum_[:, heads, :, :x.shape[3]].add_(x)
    return total
