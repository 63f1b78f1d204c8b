"""exchange="kv": keys and values of all ranks are gathered, every leaf can be opened, the result is one device's."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.comm import Pending, words
from muse_dist.backend import kernels_for
from muse_dist.compute import Upstream, add_far_backward, far_forward, merge, near_field, near_field_backward
from muse_dist.shard import Shard
from muse_dist.stages import staged
from muse_dist.tree import Plan, has_far_field, open_blocks, order_blocks


class Saved(NamedTuple):
    """What the backward needs besides q, k, v, the output and its log-sum-exp; keys are gathered again."""

    plan: Plan | None  # own queries, the keys of all blocks; None where nothing is far


def forward(s: Shard, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Saved]:
    """Out [B, K, G, S, D] and lse [B, K, G, S] of a rank's queries, all in the working dtype, k and v [B, K, S, D]."""
    config = s.config
    gathered = s.comm.all_gather("keys and values", k.to(s.dtype), v.to(s.dtype))
    ordered = _order(s, q, k) if has_far_field(s.layout.tokens, config) else None
    parts = [near_field(q, k, v, s.scale, s.own_pairs, config)]
    all_k, all_v = _join(s, gathered, k.dtype)
    plan = None if ordered is None else _join_orders(s, *ordered)
    parts.append(near_field(q, all_k, all_v, s.scale, s.other_pairs, config))
    if plan is not None:
        plan = plan._replace(opened=open_blocks(q, all_k, plan, s.mine, s.everything, config, s.scale))
        parts.append(far_forward(q, all_k, all_v, plan, s.mine, s.everything, s.scale, config))
    return *merge(parts, config), Saved(plan)


@staged("unpack")
def _join(s: Shard, gathered: Pending, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values of all ranks, [B, K, N, D] each, once they are there."""
    found = gathered.wait()
    return [s.layout.join(words(*found[i::2]), 2).view(s.dtype).to(dtype) for i in range(2)]


def _order(s: Shard, q: Tensor, k: Tensor) -> tuple[Plan, Pending]:
    """The structure of the rank's own blocks, and the key orders of all ranks on their way."""
    plan = order_blocks(q, k, s.config, s.config.leaf, s.mine[0] == 0)
    return plan, s.comm.all_gather("key order", plan.key_order.to(torch.int32))


def _join_orders(s: Shard, plan: Plan, orders: Pending) -> Plan:
    """The structure of own queries and all keys, once the orders are there."""
    return plan._replace(key_order=s.layout.join(orders.wait(), 2).to(torch.int64),
                         anchors=plan.anchors.to(s.dtype).to(plan.anchors.dtype))


def backward(
    s: Shard, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of the rank's own shard, with what the other ranks' losses add to dk and dv."""
    config, plan = s.config, saved.plan
    gathered = s.comm.all_gather("keys and values", k.to(s.dtype), v.to(s.dtype))
    # The keys travel behind each block's own near field, the gradients behind that of the blocks beside it.
    within, beside = ([p for p in s.own_pairs if (p[0] == p[1]) == same] for same in (True, False))
    own = near_field_backward(dout, q, k, v, out, lse, s.scale, within, config)
    all_k, all_v = _join(s, gathered, k.dtype)
    dq, dk, dv = near_field_backward(dout, q, all_k, all_v, out, lse, s.scale, s.other_pairs, config)
    if plan is not None:
        up = Upstream(dout, lse, kernels_for(config, q).row_dots(dout, out))
        add_far_backward((dq, dk, dv), up, q, all_k, all_v, plan, s.mine, s.everything, s.scale, config)
    shares = [[part for x in (dk, dv) for part in s.layout.parts(x, rank, 2)] for rank in range(s.comm.size)]
    pending = _post_shares(s, shares)
    rest = near_field_backward(dout, q, k, v, out, lse, s.scale, beside, config)
    dk, dv = _add_shares(s, pending, shares[s.comm.rank], (own[1], own[2]), (rest[1], rest[2]))
    return kernels_for(config, q).add_up([dq, own[0], rest[0]]), dk, dv


@staged("pack")
def _post_shares(s: Shard, shares: list[list[Tensor]]) -> Pending:
    """Send every other rank its share of the gradients of all keys, then of all values, [B, K, S / C, D] a chunk."""
    others = [rank for rank in range(s.comm.size) if rank != s.comm.rank]
    send = [[part.to(s.dtype) for part in share] if rank in others else [] for rank, share in enumerate(shares)]
    specs = [(part.shape, s.dtype) for part in shares[0]]
    receive = [specs if rank in others else [] for rank in range(s.comm.size)]
    return s.comm.all_to_all("keys and values gradients", send, receive, shares[0][0].device)


@staged("unpack")
def _add_shares(s: Shard, pending: Pending, mine: list[Tensor], *others: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What all ranks give this one's keys and values, in rank order, and then `others`: [B, K, S, D] each."""
    ops, size = kernels_for(s.config, mine[0]), len(mine)
    received = [x.to(mine[0].dtype) for x in pending.wait()]
    shares = [received[at:at + size] for at in range(0, len(received), size)]
    shares.insert(s.comm.rank, mine)
    totals = [torch.empty_like(x) for x in others[0]]
    places = [part for total in totals for part in total.chunk(s.layout.chunks_per_rank, 2)]
    rest = [[part for x in pair for part in x.chunk(s.layout.chunks_per_rank, 2)] for pair in others]
    for total, *parts in zip(places, *shares, *rest, strict=True):
        ops.add_up(parts, total)
    return totals
