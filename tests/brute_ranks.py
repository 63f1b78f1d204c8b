"""What P ranks compute in exchange="moments", evaluated a second time: loops over rows and leaves, no communication.

Written from the definition. It takes the structure (orders, block anchors, opened leaves, chunk anchors) from the
package and does everything else itself: who holds what, who sees what and how, and the arithmetic. Every query counts
the keys it sees and checks that each visible key is counted once.
"""
from __future__ import annotations

import itertools

import torch
from torch import Tensor

from muse_dist.layout import Layout
from muse_dist.remote import chunk_anchors
from muse_dist.tree import open_blocks, order_blocks
from tests.brute import far_blocks, is_near, leaf_moments


def chunks_held(layout: str, ranks: int, rank: int) -> list[int]:
    """The chunks of `rank`, in the order it holds them."""
    return [rank, 2 * ranks - 1 - rank] if layout == "zigzag" else [rank]


def blocks_held(layout: str, ranks: int, rank: int, blocks: int) -> list[int]:
    """The blocks of `rank` among `blocks` of the sequence, in the order it holds them."""
    chunks = 2 * ranks if layout == "zigzag" else ranks
    size = blocks // chunks
    return [chunk * size + i for chunk in chunks_held(layout, ranks, rank) for i in range(size)]


def structure(q: Tensor, k: Tensor, rank: int, ranks: int, layout: str, config, scale: float):
    """What a rank finds in its own shard of q [B, H, N, D], k [B, K, N, D]: its plan and its chunk anchors."""
    held = blocks_held(layout, ranks, rank, k.shape[2] // config.block)
    tokens = torch.tensor([j * config.block + i for j in held for i in range(config.block)])
    rows, keys = q[:, :, tokens].detach().unflatten(1, (k.shape[1], -1)), k[:, :, tokens].detach()
    plan = order_blocks(rows, keys, config, min(config.leaf, config.remote_leaf), held[0] == 0)
    opened = open_blocks(rows, keys, plan, held, held, config, scale)
    return plan._replace(opened=opened), chunk_anchors(plan, Layout(layout, ranks, k.shape[2], config.block), config)


def attend_ranks(q: Tensor, k: Tensor, v: Tensor, config, ranks: int, layout: str, scale: float) -> Tensor:
    """The attention of all ranks together. q [B, H, N, D], k and v [B, K, N, D] -> [B, H, N, D]."""
    batch, heads, length, _ = q.shape
    share = heads // k.shape[1]
    found = [structure(q, k, rank, ranks, layout, config, scale) for rank in range(ranks)]
    rows = {}
    for b, kh in itertools.product(range(batch), range(k.shape[1])):
        mine = [_Rank([x[b, kh] for x in plan], [x[b, kh] for x in anchors],
                      blocks_held(layout, ranks, rank, length // config.block))
                for rank, (plan, anchors) in enumerate(found)]
        head = _Head(q[b, kh * share:(kh + 1) * share], k[b, kh], v[b, kh], mine, config, scale)
        for rank in range(ranks):
            for (g, t), out in head.rows(rank):
                rows[b, kh * share + g, t] = out
    return torch.stack([torch.stack([torch.stack([rows[b, h, t] for t in range(length)]) for h in range(heads)])
                        for b in range(batch)])


class _Rank:
    """The structure of one rank for one key/value head: fields as in `Plan` and `ChunkAnchors`, without B and K."""

    def __init__(self, plan: list[Tensor], anchors: list[Tensor], held: list[int]) -> None:
        self.key_order, self.query_order, self.anchors, self.opened = plan
        self.remote_anchor, self.part = anchors
        self.held = held

    def leaf(self, place: int, index: int, size: int) -> list[int]:
        """Tokens of the sequence in leaf `index`, of `size` keys, of the block at `place`."""
        return [self.held[place] * self.key_order.shape[1] + int(p)
                for p in self.key_order[place, index * size:(index + 1) * size]]


class _Head:
    """One key/value head of one batch element: q [G, N, D], k and v [N, D], and the structure every rank has found."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ranks: list[_Rank], config, scale: float) -> None:
        self.q, self.k, self.v, self.ranks, self.config, self.scale = q, k, v, ranks, config, scale
        self.blocks = k.shape[0] // config.block

    def rows(self, rank: int):
        """Yields ((query head within the pool, token), output [D]) for every query of a rank."""
        own, config = self.ranks[rank], self.config
        pooled = self.q.shape[0] * config.block
        for place, block in enumerate(own.held):
            far = far_blocks(block, self.blocks, config.halo, config.causal)
            for part in range(config.anchors):
                local = self._local(own, own.anchors[place, part], far)
                remote = self._remote(rank, place, part, far)
                for p in range(part * pooled // config.anchors, (part + 1) * pooled // config.anchors):
                    g, t = divmod(int(own.query_order[place, p]), config.block)
                    t += block * config.block
                    opened = set(own.opened[place, p // config.group].tolist()) if local else set()
                    exact = self._near(block, t)
                    if own.held[0] != 0 and 0 in far:  # the sinks of another rank
                        exact += list(range(config.sinks * config.leaf))
                    exact += [n for leaf in opened & set(local) for n in local[leaf][0]]
                    seen = [local[leaf] for leaf in local if leaf not in opened]
                    yield (g, t), self._row(self.q[g, t], t, exact, seen, own.anchors[place, part], *remote)

    def _near(self, block: int, t: int) -> list[int]:
        size, config = self.config.block, self.config
        return [n for n in range(len(self.k)) if is_near(block, n // size, config.halo, config.causal)
                and (n <= t or not config.causal)]

    def _local(self, own: _Rank, anchor: Tensor, far: list[int]) -> dict[int, tuple[list[int], tuple[Tensor, ...]]]:
        """Tokens and moments of the rank's own far leaves, by their number among its leaves."""
        leaves, per_block = {}, self.config.block // self.config.leaf
        for place, index in itertools.product(range(len(own.held)), range(per_block)):
            if own.held[place] in far:
                tokens = own.leaf(place, index, self.config.leaf)
                leaves[place * per_block + index] = tokens, self._moments(anchor, tokens)
        return leaves

    def _remote(self, rank: int, place: int, part: int, far: list[int]):
        """Tokens and moments of other ranks' far leaves without the sinks, and the anchor they are about."""
        own, size = self.ranks[rank], self.config.remote_leaf
        chunk, inside = divmod(place, own.part.shape[1])
        anchor = own.remote_anchor[chunk, own.part[chunk, inside, part]]
        leaves = []
        for other in self.ranks:
            for i, index in itertools.product(range(len(other.held)), range(self.config.block // size)):
                tokens = [n for n in other.leaf(i, index, size) if n >= self.config.sinks * self.config.leaf]
                if other is not own and other.held[i] in far and tokens:
                    leaves.append((tokens, self._moments(anchor, tokens)))
        return leaves, anchor

    def _moments(self, anchor: Tensor, tokens: list[int]) -> tuple[Tensor, ...]:
        return leaf_moments(anchor, self.k[tokens], self.v[tokens], self.scale)

    def _row(self, query: Tensor, t: int, exact: list[int], local, anchor: Tensor, remote, remote_anchor: Tensor):
        """One softmax over single keys, local leaves and remote leaves."""
        seen = sorted(exact + [n for tokens, _ in local + remote for n in tokens])
        assert seen == list(range(t + 1 if self.config.causal else len(self.k))), "a key is missing or counted twice"
        logits, values = [self.scale * self.k[exact] @ query], [self.v[exact]]
        for leaves, about in ((local, anchor), (remote, remote_anchor)):
            if leaves:
                mass, key, value, spread = (torch.stack(x) for x in zip(*(m for _, m in leaves)))
                away = query - about
                logit = mass + self.scale * key @ away
                logits.append(logit + self.scale ** 2 / 2 * (away @ away) * spread if self.config.trace else logit)
                values.append(value)
        return torch.cat(logits).softmax(0) @ torch.cat(values)
