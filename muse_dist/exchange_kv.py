"""exchange="kv": keys and values of all ranks are gathered, every leaf can be opened, the result is one device's."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.comm import Pending
from muse_dist.backend import kernels_for
from muse_dist.compute import Upstream, add_far_backward, far_forward, merge, near_field, near_field_backward
from muse_dist.shard import Shard, add_up
from muse_dist.stages import staged
from muse_dist.tree import Plan, has_far_field, open_blocks, order_blocks


class Saved(NamedTuple):
    """What the backward needs besides q, k, v, the output and its log-sum-exp; keys are gathered again."""

    plan: Plan | None  # own queries, the keys of all blocks; None where nothing is far


def forward(s: Shard, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Saved]:
    """Out [B, K, G, S, D] and lse [B, K, G, S] of a rank's queries, all in the working dtype, k and v [B, K, S, D]."""
    config = s.config
    gathered = s.comm.all_gather("keys and values", torch.stack([k, v]).to(s.dtype))
    ordered = _order(s, q, k) if has_far_field(s.layout.tokens, config) else None
    parts = [near_field(q, k, v, s.scale, s.own_pairs, config)]
    all_k, all_v = _join(s, gathered, k.dtype)  # [B, K, N, D] each
    plan = None if ordered is None else _join_orders(s, *ordered)
    parts.append(near_field(q, all_k, all_v, s.scale, s.other_pairs, config))
    if plan is not None:
        plan = plan._replace(opened=open_blocks(q, all_k, plan, s.mine, s.everything, config, s.scale))
        parts.append(far_forward(q, all_k, all_v, plan, s.mine, s.everything, s.scale, config))
    return *merge(parts, config), Saved(plan)


@staged("unpack")
def _join(s: Shard, gathered: Pending, dtype: torch.dtype) -> Tensor:
    """Keys and values of all ranks [2, B, K, N, D], once they are there."""
    return s.layout.join(gathered.wait(), 3).to(dtype)


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
    gathered = s.comm.all_gather("keys and values", torch.stack([k, v]).to(s.dtype))
    # The keys travel behind each block's own near field, the gradients behind that of the blocks beside it.
    within, beside = ([p for p in s.own_pairs if (p[0] == p[1]) == same] for same in (True, False))
    own = near_field_backward(dout, q, k, v, out, lse, s.scale, within, config)
    all_k, all_v = _join(s, gathered, k.dtype)
    dq, dk, dv = near_field_backward(dout, q, all_k, all_v, out, lse, s.scale, s.other_pairs, config)
    if plan is not None:
        up = Upstream(dout, lse, kernels_for(config, q).row_dots(dout, out))
        add_far_backward((dq, dk, dv), up, q, all_k, all_v, plan, s.mine, s.everything, s.scale, config)
    grads = torch.stack([dk, dv])
    shares = [s.layout.shard(grads, rank, 3) for rank in range(s.comm.size)]
    pending = _post_shares(s, shares)
    rest = near_field_backward(dout, q, k, v, out, lse, s.scale, beside, config)
    shares = _received_shares(s, pending, shares[s.comm.rank])
    return (add_up([dq, own[0], rest[0]]), add_up([*(x[0] for x in shares), own[1], rest[1]]),
            add_up([*(x[1] for x in shares), own[2], rest[2]]))


@staged("pack")
def _post_shares(s: Shard, shares: list[Tensor]) -> Pending:
    """Send every other rank its share [2, B, K, S, D] of the gradients of all keys and values."""
    others = [rank for rank in range(s.comm.size) if rank != s.comm.rank]
    send = [[share.to(s.dtype)] if rank in others else [] for rank, share in enumerate(shares)]
    spec = (tuple(shares[0].shape), s.dtype)
    receive = [[spec] if rank in others else [] for rank in range(s.comm.size)]
    return s.comm.all_to_all("keys and values gradients", send, receive, shares[0].device)


@staged("unpack")
def _received_shares(s: Shard, pending: Pending, mine: Tensor) -> list[Tensor]:
    """What all ranks give this one's share [2, B, K, S, D], in rank order."""
    received = [x.to(mine.dtype) for x in pending.wait()]
    return [*received[:s.comm.rank], mine, *received[s.comm.rank:]]
