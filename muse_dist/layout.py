"""Index arithmetic: which blocks are read exactly or seen as leaves, and which rank holds what. Kernels see none of it.

A sequence of N tokens is cut into blocks. Context-parallel ranks hold contiguous chunks, each a whole number of blocks:
one chunk a rank ("contiguous"), or chunks r and 2P-1-r of 2P ("zigzag", which balances causal work).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from muse_dist.config import MuseConfig
from muse_dist.kernels.limits import ceil_div

LayoutName = Literal["contiguous", "zigzag"]


def block_count(tokens: int, block: int) -> int:
    """Blocks that `tokens` tokens are cut into; the last may be short."""
    return ceil_div(tokens, block)


def is_near(query_block: int, key_block: int, config: MuseConfig) -> bool:
    """Whether every query of one block may read the other exactly."""
    distance = query_block - key_block
    return 0 <= distance <= config.halo if config.causal else abs(distance) <= config.halo


def is_far(query_block: int, key_block: int, config: MuseConfig) -> bool:
    """Whether the queries of one block see the leaves of the other."""
    distance = query_block - key_block
    return distance > config.halo if config.causal else abs(distance) > config.halo


def near_pairs(queries: Sequence[int], keys: Sequence[int], config: MuseConfig) -> list[tuple[int, int, bool]]:
    """Near pairs among blocks given by their places in the sequence.

    Returns:
        (index in `queries`, index in `keys`, whether the pair is the causal diagonal) a pair, by query and place.
    """
    place = {key: j for j, key in enumerate(keys)}
    near = range(-config.halo, 1 if config.causal else config.halo + 1)
    return [(i, place[query + step], config.causal and step == 0)
            for i, query in enumerate(queries) for step in near if query + step in place]


@dataclass(frozen=True)
class Layout:
    """Who holds which tokens of a sequence of `tokens` tokens (all ranks together).

    Raises:
        ValueError that names the argument and the fix, if the tokens do not divide into whole blocks a chunk.
    """

    name: LayoutName
    ranks: int
    tokens: int
    block: int

    def __post_init__(self) -> None:
        if self.name not in get_args(LayoutName):
            raise ValueError(f"layout={self.name!r}: must be one of {', '.join(map(repr, get_args(LayoutName)))}")
        whole = self.chunks * self.block
        if self.ranks < 1 or self.tokens < 1 or self.tokens % whole:
            raise ValueError(
                f"q: {self.tokens} tokens over {self.ranks} ranks do not make whole blocks of {self.block} in "
                f"{self.chunks} {self.name} chunks; use a multiple of {whole} tokens, or a smaller block")

    @property
    def chunks_per_rank(self) -> int:
        return 2 if self.name == "zigzag" else 1

    @property
    def chunks(self) -> int:
        return self.ranks * self.chunks_per_rank

    @property
    def chunk_blocks(self) -> int:
        """Blocks in a chunk."""
        return self.tokens // self.chunks // self.block

    def chunks_of(self, rank: int) -> list[int]:
        """Chunks a rank holds, in the order it holds them."""
        return [rank, self.chunks - 1 - rank] if self.name == "zigzag" else [rank]

    def owner(self, chunk: int) -> int:
        """The rank that holds a chunk."""
        return min(chunk, self.chunks - 1 - chunk) if self.name == "zigzag" else chunk

    def blocks_of_chunk(self, chunk: int) -> list[int]:
        return list(range(chunk * self.chunk_blocks, (chunk + 1) * self.chunk_blocks))

    def blocks_of(self, rank: int) -> list[int]:
        """Blocks a rank holds, in the order it holds them."""
        return [block for chunk in self.chunks_of(rank) for block in self.blocks_of_chunk(chunk)]

    def block_owner(self, block: int) -> int:
        """The rank that holds a block."""
        return self.owner(block // self.chunk_blocks)

    def positions(self, rank: int) -> Tensor:
        """int64 [N / P]: the place in the sequence of every token a rank holds."""
        starts = torch.tensor(self.blocks_of(rank))[:, None] * self.block
        return (starts + torch.arange(self.block)).flatten()

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The part of a full tensor that a rank holds, along `dim`: of N tokens, or one entry a block or leaf.

        A view where the rank holds one chunk.
        """
        held = self.parts(x, rank, dim)
        return held[0] if len(held) == 1 else torch.cat(held, dim)

    def parts(self, x: Tensor, rank: int, dim: int) -> list[Tensor]:
        """The chunks of a full tensor that a rank holds, in the order it holds them: views."""
        chunks = x.chunk(self.chunks, dim)
        return [chunks[chunk] for chunk in self.chunks_of(rank)]

    def join(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The full tensor from the parts of all ranks, in rank order: the inverse of `shard`."""
        found = {chunk: part for rank, shard in enumerate(shards)
                 for chunk, part in zip(self.chunks_of(rank), shard.chunk(self.chunks_per_rank, dim))}
        return torch.cat([found[chunk] for chunk in range(self.chunks)], dim)


@lru_cache(maxsize=1024)
def halo_blocks(layout: Layout, rank: int, config: MuseConfig) -> tuple[int, ...]:
    """Blocks other ranks hold that some block of this rank reads exactly, in the order of the sequence."""
    mine, count = set(layout.blocks_of(rank)), layout.chunks * layout.chunk_blocks
    near = {i + step for i in mine for step in range(-config.halo, config.halo + 1) if is_near(i, i + step, config)}
    return tuple(sorted(j for j in near - mine if 0 <= j < count))


def needs_sinks(layout: Layout, rank: int, config: MuseConfig) -> bool:
    """Whether a rank reads the sinks without holding them."""
    mine = layout.blocks_of(rank)
    return config.sinks > 0 and 0 not in mine and any(is_far(i, 0, config) for i in mine)


@lru_cache(maxsize=1024)
def chunk_pairs(layout: Layout, source: int, target: int, config: MuseConfig) -> tuple[tuple[int, int], ...]:
    """(chunk of `source`, chunk of `target`) for all moments that rank `source` sends rank `target`, in order.

    A pair of chunks that are near in every block has no far field between them and is left out.
    """
    return tuple((mine, theirs) for theirs in layout.chunks_of(target) for mine in sorted(layout.chunks_of(source))
                 if source != target and _any_far(layout, theirs, mine, config))


def _any_far(layout: Layout, queries: int, keys: int, config: MuseConfig) -> bool:
    """Whether any two blocks of two chunks are far: the ones at their outer ends are if any are."""
    ends = [(layout.blocks_of_chunk(queries)[a], layout.blocks_of_chunk(keys)[b]) for a, b in ((0, -1), (-1, 0))]
    return any(is_far(i, j, config) for i, j in ends)
