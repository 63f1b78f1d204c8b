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
from muse_dist.compute import far_backward, far_forward, group_rows, kernels_for, rows_to_tokens, ungroup
from muse_dist.kernels.reference import Moments
from muse_dist.layout import chunk_pairs, near_pairs
from muse_dist.remote import (
    ChunkAnchors,
    Message,
    RemoteLeaves,
    chunk_anchors,
    from_message,
    message_specs,
    remote_backward,
    remote_forward,
    remote_leaves,
    remote_valid,
    sources,
    to_message,
)
from muse_dist.shard import Shard, add_halo_gradients, post_halo, post_halo_gradients, received_halo
from muse_dist.tree import Plan, arrange, from_leaves, open_blocks, order_blocks, to_leaves


class Saved(NamedTuple):
    """What the backward needs besides q, k, v, the output and its log-sum-exp."""

    plan: Plan
    anchors: ChunkAnchors  # of this rank's chunks
    everyone: Tensor  # [P, B, K, C, Q, D] anchors of all ranks' chunks
    halo: tuple[Tensor, Tensor]  # keys and values of other ranks' halo blocks and sinks [B, K, T, D]
    messages: list[Message]  # from all ranks, in the order of arrival


def forward(s: Shard, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Saved]:
    """Out [B, K, G, S, D] and lse [B, K, G, S] of a rank's queries, all in the working dtype, k and v [B, K, S, D]."""
    ops, config = kernels_for(s.config, q.device), s.config
    halo = post_halo(s, k, v)
    plan = order_blocks(q, k, config, min(config.leaf, config.remote_leaf), s.mine[0] == 0)
    plan = plan._replace(anchors=plan.anchors.to(s.dtype).to(q.dtype))
    anchors = chunk_anchors(plan, s.layout, config)
    gathered = s.comm.all_gather("anchors", anchors.anchor.to(s.dtype))
    parts = [ops.near_field(q, k, v, s.scale, near_pairs(s.mine, s.mine, config), config.block)]
    everyone = torch.stack(gathered.wait()).to(q.dtype)
    anchors = anchors._replace(anchor=everyone[s.comm.rank])
    moments = _post_moments(s, k, v, plan, everyone)
    keys, values = received_halo(s, halo, k)
    parts.append(ops.near_field(q, keys, values, s.scale, s.halo_pairs, config.block))
    blocks = arrange(q, k, v, plan, config)
    plan = plan._replace(opened=open_blocks(blocks, s.mine, s.mine, config, s.scale))
    parts.append(rows_to_tokens(far_forward(blocks, plan, s.mine, s.mine, s.scale, config), plan, q.shape[2:4]))
    messages = _messages(moments.wait())
    far = remote_forward(blocks, anchors, _remote(s, messages), s.mine, s.scale, config)
    parts.append(rows_to_tokens(far, plan, q.shape[2:4]))
    out, lse = ops.merge(parts)
    return out, lse, Saved(plan, anchors, everyone, (keys, values), messages)


def backward(
    s: Shard, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of the rank's own shard, with what the other ranks' losses add to dk and dv."""
    ops, config, plan = kernels_for(s.config, q.device), s.config, saved.plan
    heads, tokens = q.shape[2:4]
    delta = (dout * out).sum(-1)
    blocks = arrange(q, k, v, plan, config)
    rows = group_rows(dout, lse, delta, blocks, plan, config)
    dq_rows, grads = remote_backward(
        rows, blocks, saved.anchors, _remote(s, saved.messages), s.mine, s.scale, config)
    moment_grads = _post_moment_gradients(s, grads, k)
    dq, *d_halo = ops.near_field_backward(dout, q, *saved.halo, lse, delta, s.scale, s.halo_pairs, config.block)
    halo_grads = post_halo_gradients(s, d_halo[0], d_halo[1])
    own = ops.near_field_backward(
        dout, q, k, v, lse, delta, s.scale, near_pairs(s.mine, s.mine, config), config.block)
    d_rows, d_keys, d_values = far_backward(rows, blocks, plan, s.mine, s.mine, s.scale, config)
    dq = dq + own[0] + ungroup(d_rows + dq_rows, plan, heads, tokens)
    dk, dv = own[1] + from_leaves(d_keys, plan, tokens), own[2] + from_leaves(d_values, plan, tokens)
    add_halo_gradients(s, halo_grads, dk, dv)
    sent = _moment_gradients_home(s, _messages(moment_grads.wait()), k, v, plan, saved.everyone)
    return dq, dk + sent[0], dv + sent[1]


def _messages(tensors: Sequence[Tensor]) -> list[Message]:
    return [Message(*pair) for pair in zip(tensors[::2], tensors[1::2])]


def _specs(s: Shard, k: Tensor, pairs: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return message_specs(k.shape, s.dtype, k.dtype, s.config, s.layout) * pairs


def _pairs(s: Shard, target: int) -> tuple[tuple[int, int], ...]:
    """(own chunk, chunk of rank `target`) of the messages this rank sends it."""
    return chunk_pairs(s.layout, s.comm.rank, target, s.config)


def _chunk_leaves(s: Shard, x: Tensor, plan: Plan) -> dict[int, Tensor]:
    """The leaves others see, by chunk of this rank: x [B, K, S, D] -> [B, K, J, remote_leaf, D] each."""
    chunks = s.layout.chunks_of(s.comm.rank)
    return dict(zip(chunks, to_leaves(x, plan, s.config.remote_leaf).chunk(len(chunks), 2), strict=True))


def _anchor_of(s: Shard, everyone: Tensor, rank: int, chunk: int) -> Tensor:
    """Anchors [B, K, Q, D] of a chunk that `rank` holds."""
    return everyone[rank, :, :, s.layout.chunks_of(rank).index(chunk)]


def _post_moments(s: Shard, k: Tensor, v: Tensor, plan: Plan, everyone: Tensor) -> Pending:
    """Send every rank the moments of this rank's leaves about the anchors of its chunks."""
    ops, config = kernels_for(s.config, k.device), s.config
    keys, values = _chunk_leaves(s, k, plan), _chunk_leaves(s, v, plan)
    send: list[list[Tensor]] = []
    for rank in range(s.comm.size):
        send.append([])
        for mine, theirs in _pairs(s, rank):
            leaf = ops.moments(_anchor_of(s, everyone, rank, theirs), keys[mine], values[mine], s.scale,
                               remote_valid(mine, s.layout, config, k.device))
            send[-1] += to_message(leaf, s.dtype, config.trace)
    receive = [_specs(s, k, len(chunk_pairs(s.layout, rank, s.comm.rank, config))) for rank in range(s.comm.size)]
    return s.comm.all_to_all("moments", send, receive, k.device)


def _remote(s: Shard, messages: Sequence[Message]) -> list[RemoteLeaves | None]:
    """The messages received, joined for each of this rank's chunks."""
    arrival = [pair for rank in range(s.comm.size) for pair in chunk_pairs(s.layout, rank, s.comm.rank, s.config)]
    result: list[RemoteLeaves | None] = []
    for chunk in s.layout.chunks_of(s.comm.rank):
        here = [(message, theirs) for message, (theirs, mine) in zip(messages, arrival, strict=True) if mine == chunk]
        result.append(remote_leaves([m for m, _ in here], [c for _, c in here], s.layout, s.config) if here else None)
    return result


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


def _moment_gradients_home(
    s: Shard, messages: Sequence[Message], k: Tensor, v: Tensor, plan: Plan, everyone: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's k and v [B, K, S, D] from the moments it sent."""
    ops = kernels_for(s.config, k.device)
    keys, values = _chunk_leaves(s, k, plan), _chunk_leaves(s, v, plan)
    dk, dv = ({chunk: torch.zeros_like(x) for chunk, x in keys.items()} for _ in range(2))
    pairs = [(rank, pair) for rank in range(s.comm.size) for pair in _pairs(s, rank)]
    for message, (rank, (mine, theirs)) in zip(messages, pairs, strict=True):
        anchor = _anchor_of(s, everyone, rank, theirs)
        valid = remote_valid(mine, s.layout, s.config, k.device)
        leaf = ops.moments(anchor, keys[mine], values[mine], s.scale, valid)
        d_keys, d_values = ops.moments_backward(
            from_message(message), anchor, keys[mine], values[mine], leaf, s.scale, valid)
        dk[mine] += d_keys
        dv[mine] += d_values
    return tuple(from_leaves(torch.cat(list(x.values()), 2), plan, k.shape[2]) for x in (dk, dv))  # type: ignore
