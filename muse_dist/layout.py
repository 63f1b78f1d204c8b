"""Index arithmetic of blocks: which are read exactly, which are seen as leaves. Kernels never see any of it."""
from __future__ import annotations

from collections.abc import Sequence

from muse_dist.config import MuseConfig


def block_count(tokens: int, block: int) -> int:
    """Blocks that `tokens` tokens are cut into; the last may be short."""
    return -(-tokens // block)


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
        (index in `queries`, index in `keys`, whether the pair is the causal diagonal) a pair, in order.
    """
    return [(i, j, config.causal and query == key)
            for i, query in enumerate(queries) for j, key in enumerate(keys) if is_near(query, key, config)]
