"""Context parallelism without communication: what P ranks compute, in one process, by plain dense arithmetic.

It is what the exchanges are tested against, and how a trained model is evaluated under them on one device.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.checks import check_tensors
from muse_dist.compute import working
from muse_dist.config import MuseConfig
from muse_dist.kernels import plain_blocks, reference
from muse_dist.kernels.clustering import gather_rows
from muse_dist.layout import Layout, LayoutName, is_far, is_near
from muse_dist.remote import ChunkAnchors, chunk_anchors, remote_valid
from muse_dist.tree import Plan, open_blocks, order_blocks, query_rows, to_leaves


class Rank(NamedTuple):
    """What one rank holds."""

    k: Tensor  # [B, K, S, D]
    v: Tensor  # [B, K, S, D]
    plan: Plan
    anchors: ChunkAnchors
    blocks: list[int]


def emulate_ranks(
    q: Tensor, k: Tensor, v: Tensor, *, config: MuseConfig, scale: float | None = None, ranks: int,
    layout: LayoutName = "contiguous", remote: bool = True,
) -> Tensor:
    """What `muse_attention` gives with exchange="moments" on `ranks` ranks, from the full tensors.

    Args:
        q: [B, H, N, D]; k, v: [B, K, N, D]; config, scale, layout: as in `muse_attention`.
        ranks: how many ranks to emulate.
        remote: False leaves the moments of other ranks out, to see what they are worth.
    Returns:
        [B, H, N, D], differentiable by autograd. Memory grows as N * N / ranks a head: for tests and short evaluations.
    """
    scale = check_tensors(q, k, v, config, scale)
    described = Layout(layout, ranks, q.shape[2], config.block)
    config = config.plain()
    rows, keys, values = working(q, k, v, config)
    held = [_hold(rows, keys, values, described, rank, config, scale, q.dtype) for rank in range(ranks)]
    outs = [_rank_output(rows, keys, values, described, rank, held, config, scale, remote) for rank in range(ranks)]
    return described.join(outs, 3).flatten(1, 2).to(q.dtype)


def _hold(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rank: int, config: MuseConfig, scale: float,
          dtype: torch.dtype) -> Rank:
    """The structure a rank finds in its own shard."""
    q, k, v = (layout.shard(x, rank, -2) for x in (q, k, v))
    blocks = layout.blocks_of(rank)
    with torch.no_grad():
        plan = order_blocks(q, k, config, min(config.leaf, config.remote_leaf), blocks[0] == 0)
        plan = plan._replace(anchors=plan.anchors.to(dtype).to(q.dtype))
        anchors = chunk_anchors(plan, layout, config)
        anchors = anchors._replace(anchor=anchors.anchor.to(dtype).to(q.dtype))
        opened = open_blocks(q, k, plan, blocks, blocks, config, scale)
    return Rank(k, v, plan._replace(opened=opened), anchors, blocks)


def _rank_output(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rank: int, held: list[Rank], config: MuseConfig,
                 scale: float, remote: bool) -> Tensor:
    """Outputs of a rank's queries [B, K, G, S, D], one softmax over everything each block sees."""
    own = held[rank]
    shard = layout.shard(q, rank, 3)
    rows = gather_rows(query_rows(shard, config.block), own.plan.query_order)
    outs = []
    for place, block in enumerate(own.blocks):
        x = rows[:, :, place]  # [B, K, G * b, D]
        columns = _exact_columns(x, own.plan.query_order[:, :, place], k, v, block, own.blocks, config, scale)
        columns += _local_columns(x, own, place, config, scale)
        if remote:
            columns += _remote_columns(x, layout, rank, held, place, config, scale)
        logits, seen = torch.cat([a for a, _ in columns], -1), [b for _, b in columns]
        weights = logits.softmax(-1).split([b.shape[2] for b in seen], -1)
        out = torch.stack([w @ b for w, b in zip(weights, seen)]).sum(0)
        order = own.plan.query_order[:, :, place].argsort(-1)
        outs.append(gather_rows(out, order).unflatten(2, (q.shape[2], -1)))
    return torch.cat(outs, 3)


def _exact_columns(x: Tensor, order: Tensor, k: Tensor, v: Tensor, block: int, held: list[int], config: MuseConfig,
                   scale: float) -> list[tuple[Tensor, Tensor]]:
    """Near keys, and the sinks where another rank holds them: (logits [B, K, rows, c], values [B, K, c, D])."""
    size = config.block
    columns = []
    for j in range(k.shape[2] // size):
        if is_near(block, j, config):
            logit = scale * x @ k[:, :, j * size:(j + 1) * size].mT
            if config.causal and j == block:
                later = torch.arange(size, device=x.device) > (order % size)[..., None]
                logit = logit.masked_fill(later, -torch.inf)
            columns.append((logit, v[:, :, j * size:(j + 1) * size]))
    sinks = config.sinks * config.leaf
    if 0 not in held and sinks and is_far(block, 0, config):
        columns.append((scale * x @ k[:, :, :sinks].mT, v[:, :, :sinks]))
    return columns


def _local_columns(x: Tensor, own: Rank, place: int, config: MuseConfig, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Leaves of the same rank: opened ones key by key, the others as moments."""
    keys, values = (to_leaves(plain_blocks, x, own.plan, config.leaf) for x in (own.k, own.v))
    far = torch.tensor([is_far(own.blocks[place], j, config) for j in own.blocks], device=x.device)
    seen = far.repeat_interleave(config.block // config.leaf)
    ids = torch.arange(len(seen), device=x.device)
    opened = (own.plan.opened[:, :, place, :, :, None] == ids).any(-2).repeat_interleave(config.group, 2)
    exact = (scale * x @ keys.flatten(2, 3).mT).masked_fill(
        ~opened.repeat_interleave(config.leaf, -1), -torch.inf)
    leaf = reference.moments(own.plan.anchors[:, :, place], keys, values, scale)
    part = torch.arange(config.anchors, device=x.device).repeat_interleave(x.shape[2] // config.anchors)
    return [(exact, values.flatten(2, 3)),
            *_moment_columns(x, own.plan.anchors[:, :, place], leaf, part.expand(x.shape[:3]), seen & ~opened, scale,
                             config)]


def _remote_columns(x: Tensor, layout: Layout, rank: int, held: list[Rank], place: int, config: MuseConfig,
                    scale: float) -> list[tuple[Tensor, Tensor]]:
    """Leaves of other ranks, about the anchors of this rank's chunk."""
    own, columns = held[rank], []
    chunk, inside = divmod(place, layout.chunk_blocks)
    anchor = own.anchors.anchor[:, :, chunk]
    part = own.anchors.part[:, :, chunk, inside].repeat_interleave(x.shape[2] // config.anchors, -1)
    for other, theirs in enumerate(held):
        valid = torch.cat([remote_valid(c, layout, config, x.device) for c in layout.chunks_of(other)])
        keys, values = (to_leaves(plain_blocks, y, theirs.plan, config.remote_leaf) for y in (theirs.k, theirs.v))
        far = torch.tensor([other != rank and is_far(own.blocks[place], j, config) for j in theirs.blocks],
                           device=x.device).repeat_interleave(config.block // config.remote_leaf)
        leaf = reference.moments(anchor, keys, values, scale, valid)
        columns += _moment_columns(x, anchor, leaf, part, far.expand(*x.shape[:3], -1), scale, config)
    return columns


def _moment_columns(x: Tensor, anchor: Tensor, leaf: reference.Moments, part: Tensor, seen: Tensor, scale: float,
                    config: MuseConfig) -> list[tuple[Tensor, Tensor]]:
    """A column a leaf and anchor: rows x [B, K, rows, D] use anchor part [B, K, rows] and see `seen` of the leaves."""
    columns = []
    for a in range(anchor.shape[2]):
        step = x - anchor[:, :, a, None]
        logit = leaf.mass[:, :, a, None] + scale * step @ leaf.key[:, :, a].mT
        if config.trace:
            logit = logit + 0.5 * scale ** 2 * step.square().sum(-1, keepdim=True) * leaf.trace[:, :, a, None]
        columns.append((logit.masked_fill(~(seen & (part == a)[..., None]), -torch.inf), leaf.value[:, :, a]))
    return columns
