"""exchange="moments": ranks send each other moments of their leaves, never the keys.

Posted first, awaited last: the halo and the anchors travel during the near field of the own blocks, the moments during
the halo and the local far field. The backward sends the gradients home in the mirrored order.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.comm import Pending
from muse_dist.backend import kernels_for
from muse_dist.compute import Upstream, add_far_backward, far_forward, merge, near_field, near_field_backward
from muse_dist.kernels.plain_blocks import Moments, Sight
from muse_dist.layout import chunk_pairs
from muse_dist.remote import (
    ChunkAnchors,
    Message,
    RemoteLeaves,
    chunk_anchors,
    from_message,
    join_messages,
    message_specs,
    remote_backward,
    remote_forward,
    remote_valid,
    sources,
    to_message,
)
from muse_dist.shard import Shard, add_halo_gradients, post_halo, post_halo_gradients, received_halo
from muse_dist.slabs import places
from muse_dist.stages import staged
from muse_dist.tree import Plan, open_blocks, order_blocks, to_leaves


class Saved(NamedTuple):
    """What the backward needs besides q, k, v, the output and its log-sum-exp."""

    plan: Plan
    anchors: ChunkAnchors  # of this rank's chunks
    everyone: Tensor  # [P, B, K, C, Q, D] anchors of all ranks' chunks
    halo: tuple[Tensor, Tensor]  # keys and values of other ranks' halo blocks and sinks [B, K, T, D]
    leaves: list[Moments]  # other ranks', of each chunk that sees any


def forward(s: Shard, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Saved]:
    """Out [B, K, G, S, D] and lse [B, K, G, S] of a rank's queries, all in the working dtype, k and v [B, K, S, D]."""
    config = s.config
    halo = post_halo(s, k, v)
    plan = order_blocks(q, k, config, min(config.leaf, config.remote_leaf), s.mine[0] == 0)
    plan = plan._replace(anchors=plan.anchors.to(s.dtype).to(q.dtype))
    anchors = chunk_anchors(plan, s.layout, config)
    gathered = s.comm.all_gather("anchors", anchors.anchor.to(s.dtype))
    parts = [near_field(q, k, v, s.scale, s.own_pairs, config)]
    everyone = torch.stack(gathered.wait()).to(q.dtype)
    anchors = anchors._replace(anchor=everyone[s.comm.rank])
    moments = _post_moments(s, k, v, plan, everyone)
    keys, values = received_halo(s, halo, k)
    parts.append(near_field(q, keys, values, s.scale, s.halo_pairs, config))
    plan = plan._replace(opened=open_blocks(q, k, plan, s.mine, s.mine, config, s.scale))
    parts.append(far_forward(q, k, v, plan, s.mine, s.mine, s.scale, config))
    leaves = _received_leaves(s, moments, q.dtype)
    parts.append(remote_forward(q, plan, anchors, _remote(s, leaves), s.mine, s.scale, config))
    out, lse = merge(parts, config)
    return out, lse, Saved(plan, anchors, everyone, (keys, values), leaves)


def backward(
    s: Shard, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of the rank's own shard, with what the other ranks' losses add to dk and dv."""
    config, plan = s.config, saved.plan
    up = Upstream(dout, lse, kernels_for(config, q).row_dots(dout, out))
    dq, grads = remote_backward(
        up, q, k, plan, saved.anchors, _remote(s, saved.leaves), s.mine, s.scale, config)
    moment_grads = _post_moment_gradients(s, grads, k)
    halo_q, *d_halo = near_field_backward(dout, q, *saved.halo, out, lse, s.scale, s.halo_pairs, config)
    halo_grads = post_halo_gradients(s, d_halo[0], d_halo[1])
    own_q, dk, dv = near_field_backward(dout, q, k, v, out, lse, s.scale, s.own_pairs, config)
    # Sums of more than two terms are kept in fp32, and rounded once.
    dk, dv = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dk, dv))
    add_far_backward((own_q, dk, dv), up, q, k, v, plan, s.mine, s.mine, s.scale, config)
    add_halo_gradients(s, halo_grads, dk, dv)
    _add_moment_gradients(s, _messages(moment_grads), k, v, plan, saved.everyone, dk, dv)
    return kernels_for(config, q).add_up([dq, halo_q, own_q]), dk, dv


@staged("unpack")
def _messages(pending: Pending) -> list[Message]:
    tensors = pending.wait()
    return [Message(*three) for three in zip(tensors[::3], tensors[1::3], tensors[2::3])]


def _specs(s: Shard, k: Tensor, pairs: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    mass = torch.promote_types(k.dtype, torch.float32)
    return message_specs(k.shape, s.dtype, mass, s.config, s.layout) * pairs


def _pairs(s: Shard, target: int) -> tuple[tuple[int, int], ...]:
    """(own chunk, chunk of rank `target`) of the messages this rank sends it."""
    return chunk_pairs(s.layout, s.comm.rank, target, s.config)


def _chunk_leaves(s: Shard, x: Tensor, plan: Plan) -> dict[int, Tensor]:
    """The leaves others see, by chunk of this rank: x [B, K, S, D] -> [B, K, J, remote_leaf, D] each."""
    chunks = s.layout.chunks_of(s.comm.rank)
    ops = kernels_for(s.config, x)
    return dict(zip(chunks, to_leaves(ops, x, plan, s.config.remote_leaf).chunk(len(chunks), 2), strict=True))


class Audience(NamedTuple):
    """Chunks of other ranks that see the leaves of one of this rank's chunks."""

    chunks: list[tuple[int, int]]  # (rank, chunk), in the order of sending
    anchors: Tensor  # [B, K, c, Q, D] their anchors
    sight: Sight  # every one of them sees every leaf: which blocks see which is the receiver's business
    valid: Tensor | None  # bool [J, remote_leaf] keys that count in what they see; None if all do


def _audience(s: Shard, everyone: Tensor, mine: int) -> Audience | None:
    """Who sees the leaves of chunk `mine`; None if nobody does. `everyone`: anchors [P, B, K, C, Q, D]."""
    chunks = [(rank, theirs) for rank in range(s.comm.size) for own, theirs in _pairs(s, rank) if own == mine]
    if not chunks:
        return None
    anchors = [everyone[rank, :, :, s.layout.chunks_of(rank).index(theirs)] for rank, theirs in chunks]
    device = everyone.device
    sight = Sight(places(range(len(chunks)), device), places(range(s.layout.chunk_blocks), device), -1, False)
    valid = remote_valid(mine, s.layout, s.config, device) if mine == 0 and s.config.sinks else None
    return Audience(chunks, torch.stack(anchors, 2), sight, valid)


@staged("moments")
def _post_moments(s: Shard, k: Tensor, v: Tensor, plan: Plan, everyone: Tensor) -> Pending:
    """Send every rank the moments of this rank's leaves about the anchors of its chunks."""
    ops, config = kernels_for(s.config, k), s.config
    keys, values = _chunk_leaves(s, k, plan), _chunk_leaves(s, v, plan)
    found: dict[tuple[int, int], list[Tensor]] = {}  # by (own chunk, chunk that sees it)
    for mine in keys:
        audience = _audience(s, everyone, mine)
        if audience is None:
            continue
        leaf = ops.moments(audience.anchors, keys[mine], values[mine], audience.sight, s.scale, audience.valid)
        for place, (_, theirs) in enumerate(audience.chunks):
            found[mine, theirs] = [*to_message(Moments(*(x[:, :, place] for x in leaf)), s.dtype, config.trace)]
    send = [[x for pair in _pairs(s, rank) for x in found[pair]] for rank in range(s.comm.size)]
    receive = [_specs(s, k, len(chunk_pairs(s.layout, rank, s.comm.rank, config))) for rank in range(s.comm.size)]
    return s.comm.all_to_all("moments", send, receive, k.device)


def _received_leaves(s: Shard, pending: Pending, dtype: torch.dtype) -> list[Moments]:
    """The moments received, joined for each of this rank's chunks that sees any."""
    messages = _messages(pending)
    arrival = [pair for rank in range(s.comm.size) for pair in chunk_pairs(s.layout, rank, s.comm.rank, s.config)]
    here = [[message for message, (_, mine) in zip(messages, arrival, strict=True) if mine == chunk]
            for chunk in s.layout.chunks_of(s.comm.rank)]
    return [join_messages(some, dtype) for some in here if some]


def _remote(s: Shard, leaves: Sequence[Moments]) -> list[RemoteLeaves | None]:
    """What `_received_leaves` returned, for each of this rank's chunks."""
    rest, result = iter(leaves), []
    for chunk in s.layout.chunks_of(s.comm.rank):
        seen = [theirs for _, theirs in sources(s.layout, s.comm.rank, chunk, s.config)]
        blocks = [block for theirs in seen for block in s.layout.blocks_of_chunk(theirs)]
        result.append(RemoteLeaves(next(rest), blocks) if seen else None)
    return result


@staged("pack")
def _post_moment_gradients(s: Shard, grads: Sequence[Moments | None], k: Tensor) -> Pending:
    """Send the gradients of the moments to the ranks the leaves belong to."""
    send: list[list[Tensor]] = [[] for _ in range(s.comm.size)]
    leaves = s.layout.chunk_blocks * s.config.block // s.config.remote_leaf
    chunks = s.layout.chunks_of(s.comm.rank)
    places = {chunk: sources(s.layout, s.comm.rank, chunk, s.config) for chunk in chunks}
    for rank in range(s.comm.size):
        for theirs, mine in chunk_pairs(s.layout, rank, s.comm.rank, s.config):
            grad, at = grads[chunks.index(mine)], places[mine].index((rank, theirs))
            assert grad is not None
            piece = Moments(*(x[:, :, :, at * leaves:(at + 1) * leaves] for x in grad))
            send[rank] += to_message(piece, s.dtype, s.config.trace)
    receive = [_specs(s, k, len(_pairs(s, rank))) for rank in range(s.comm.size)]
    return s.comm.all_to_all("moments gradients", send, receive, k.device)


@staged("moments backward")
def _add_moment_gradients(
    s: Shard, messages: Sequence[Message], k: Tensor, v: Tensor, plan: Plan, everyone: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Add the gradients of this rank's k and v from the moments it sent to dk and dv [B, K, S, D]."""
    ops = kernels_for(s.config, k)
    keys, values = _chunk_leaves(s, k, plan), _chunk_leaves(s, v, plan)
    pairs = [pair for rank in range(s.comm.size) for pair in _pairs(s, rank)]
    found = dict(zip(pairs, messages, strict=True))
    orders = plan.key_order.chunk(len(keys), 2)
    for place, mine in enumerate(keys):
        audience = _audience(s, everyone, mine)
        if audience is None:
            continue
        parts = [from_message(found[mine, theirs], k.dtype) for _, theirs in audience.chunks]
        grads = ops.moments_backward(
            Moments(*(torch.stack(x, 2) for x in zip(*parts))), audience.anchors, keys[mine], values[mine],
            audience.sight, s.scale, audience.valid)
        for total, part in zip((dk, dv), grads):
            here = total.chunk(len(keys), 2)[place][:, :, None]
            ops.add_tokens(here, part.flatten(2, 3).unflatten(2, orders[place].shape[2:]), orders[place])
