"""What ranks compute for each other in exchange="moments": anchors of chunks, and moments of leaves about them.

Shape legend as in `kernels/reference.py`; C chunks a rank, Q remote anchors of a chunk.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.compute import GroupedRows, kernels_for
from muse_dist.config import MuseConfig
from muse_dist.kernels.reference import NEG_INF, Moments, bisect
from muse_dist.layout import Layout, chunk_pairs, is_far
from muse_dist.tree import Blocks, Plan

Spec = tuple[tuple[int, ...], torch.dtype]


class ChunkAnchors(NamedTuple):
    """Anchors that stand for the queries of a whole chunk in front of other ranks."""

    anchor: Tensor  # [B, K, C, Q, D]
    part: Tensor  # int64 [B, K, C, n / C, R] the remote anchor that serves each part of each block


class RemoteLeaves(NamedTuple):
    """Moments of other ranks' leaves as one chunk of queries sees them."""

    leaf: Moments  # [B, K, Q, J] and [B, K, Q, J, D]
    blocks: list[int]  # the blocks of the sequence they lie in, in order


def chunk_anchors(plan: Plan, layout: Layout, config: MuseConfig) -> ChunkAnchors:
    """Bisect the block anchors of every chunk into `remote_anchors` parts and take their means."""
    points = plan.anchors.unflatten(2, (layout.chunks_per_rank, -1)).flatten(3, 4)  # [B, K, C, n/C * R, D]
    size = points.shape[3] // config.remote_anchors
    order = bisect(points, size)
    runs = points.gather(3, order[..., None].expand_as(points)).unflatten(3, (-1, size))
    part = torch.empty_like(order).scatter_(3, order, torch.arange(order.shape[3], device=order.device)
                                            .expand_as(order)) // size
    return ChunkAnchors(runs.mean(4), part.unflatten(3, (-1, config.anchors)))


def remote_valid(chunk: int, layout: Layout, config: MuseConfig, device: torch.device) -> Tensor:
    """bool [J, remote_leaf]: keys of a chunk that count in the moments sent; the sinks travel apart."""
    tokens = torch.arange(layout.chunk_blocks * config.block, device=device)
    sinks = config.sinks * config.leaf if chunk == 0 else 0
    return (tokens >= sinks).unflatten(0, (-1, config.remote_leaf))


class Message(NamedTuple):
    """Moments of one chunk about the anchors of another, as they travel: sums in the inputs' dtype, masses not."""

    mass: Tensor  # [B, K, Q, J] fp32 or fp64
    rest: Tensor  # [B, K, Q, J, 2D + trace] key, value and trace in the inputs' dtype


def to_message(leaf: Moments, dtype: torch.dtype, trace: bool) -> Message:
    columns = [leaf.key, leaf.value] + ([leaf.trace[..., None]] if trace else [])
    return Message(leaf.mass, torch.cat(columns, -1).to(dtype))


def from_message(message: Message) -> Moments:
    """The moments of a message, in the dtype of its masses."""
    rest = message.rest.to(message.mass.dtype)
    dim = rest.shape[-1] // 2
    trace = rest[..., 2 * dim] if rest.shape[-1] % 2 else torch.zeros_like(message.mass)
    return Moments(message.mass, rest[..., :dim], rest[..., dim:2 * dim], trace)


def message_specs(shape: Sequence[int], dtype: torch.dtype, mass: torch.dtype, config: MuseConfig,
                  layout: Layout) -> list[Spec]:
    """Shapes and dtypes of one `Message` for keys of shape [B, K, S, D]."""
    batch, heads, _, dim = shape
    lead = (batch, heads, config.remote_anchors, layout.chunk_blocks * config.block // config.remote_leaf)
    return [(lead, mass), ((*lead, 2 * dim + config.trace), dtype)]


def remote_leaves(messages: Sequence[Message], chunks: Sequence[int], layout: Layout,
                  config: MuseConfig) -> RemoteLeaves:
    """Join the messages for one chunk of queries, from `chunks` of keys."""
    parts = [from_message(message) for message in messages]
    leaf = Moments(*(torch.cat(column, 3) for column in zip(*parts)))
    return RemoteLeaves(leaf, [block for chunk in chunks for block in layout.blocks_of_chunk(chunk)])


def sources(layout: Layout, rank: int, chunk: int, config: MuseConfig) -> list[tuple[int, int]]:
    """(rank, chunk of keys) of all messages for a chunk of queries that `rank` holds, in the order of arrival."""
    return [(source, mine) for source in range(layout.ranks)
            for mine, theirs in chunk_pairs(layout, source, rank, config) if theirs == chunk]


def remote_forward(
    blocks: Blocks, anchors: ChunkAnchors, leaves: Sequence[RemoteLeaves | None], query_blocks: Sequence[int],
    scale: float, config: MuseConfig,
) -> tuple[Tensor, Tensor]:
    """Far field of grouped rows over other ranks' leaves: out [B, K, n, U, g, D], lse [B, K, n, U, g].

    `leaves` holds the remote leaves of each chunk of queries, None where it sees none.
    """
    ops = kernels_for(config, blocks.q.device)
    out, lse = torch.zeros_like(blocks.q), blocks.q.new_full(blocks.q.shape[:-1], NEG_INF)
    for i, remote, anchor, part, hidden in _remote_blocks(blocks, anchors, leaves, query_blocks, config):
        out[:, :, i], lse[:, :, i] = ops.far_field(
            blocks.q[:, :, i], anchor, _per_part(remote.leaf, part), hidden, scale, config.trace)
    return out, lse


def remote_backward(
    rows: GroupedRows, blocks: Blocks, anchors: ChunkAnchors, leaves: Sequence[RemoteLeaves | None],
    query_blocks: Sequence[int], scale: float, config: MuseConfig,
) -> tuple[Tensor, list[Moments | None]]:
    """Gradients of `remote_forward` for the rows and for the moments of every chunk of queries."""
    ops = kernels_for(config, blocks.q.device)
    dq = torch.zeros_like(blocks.q)
    grads = [None if x is None else Moments(*(torch.zeros_like(y) for y in x.leaf)) for x in leaves]
    per_chunk = len(query_blocks) // len(leaves)
    for i, remote, anchor, part, hidden in _remote_blocks(blocks, anchors, leaves, query_blocks, config):
        dout, lse, delta = (x[:, :, i] for x in rows)
        dq[:, :, i], grad = ops.far_field_backward(
            dout, blocks.q[:, :, i], anchor, _per_part(remote.leaf, part), hidden, lse, delta, scale, config.trace)
        total = grads[i // per_chunk]
        assert total is not None
        for sum_, x in zip(total, _to_anchors(grad, part, remote.leaf.mass.shape[2])):
            sum_ += x
    return dq, grads


def _remote_blocks(
    blocks: Blocks, anchors: ChunkAnchors, leaves: Sequence[RemoteLeaves | None], query_blocks: Sequence[int],
    config: MuseConfig,
) -> Iterator[tuple[int, RemoteLeaves, Tensor, Tensor | None, Tensor]]:
    """Yield (place, remote leaves, anchors [B, K, A, D], part of each anchor, hidden [B, K, U, J]) of query blocks."""
    per_chunk = len(query_blocks) // len(leaves)
    for i, block in enumerate(query_blocks):
        remote = leaves[i // per_chunk]
        if remote is None:
            continue
        anchor = anchors.anchor[:, :, i // per_chunk]
        part = None
        if config.remote_anchors > 1:  # one anchor serves all parts as it is
            part = anchors.part[:, :, i // per_chunk, i % per_chunk]
            anchor = anchor.gather(2, part[..., None].expand(*part.shape, anchor.shape[-1]))
        hidden = torch.tensor([not is_far(block, j, config) for j in remote.blocks], device=anchor.device)
        hidden = hidden.repeat_interleave(config.block // config.remote_leaf)
        yield i, remote, anchor, part, hidden.expand(*blocks.q.shape[:2], blocks.q.shape[3], -1)


def _per_part(leaf: Moments, part: Tensor | None) -> Moments:
    """Moments about remote anchors [B, K, Q, J] for the anchors that serve parts [B, K, R]: [B, K, R, J]."""
    if part is None:
        return leaf
    return Moments(*(x.gather(2, part.view(*part.shape, *[1] * (x.dim() - 3)).expand(-1, -1, -1, *x.shape[3:]))
                     for x in leaf))


def _to_anchors(grad: Moments, part: Tensor | None, count: int) -> Moments:
    """The adjoint of `_per_part`, summed in a fixed order."""
    if part is None:
        return grad
    serves = (part[:, :, None] == torch.arange(count, device=part.device)[:, None]).to(grad.mass.dtype)
    return Moments(*((serves @ x.flatten(3)).unflatten(3, x.shape[3:]) for x in grad))
