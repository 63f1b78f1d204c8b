"""Work in slabs: heads and query blocks are taken together up to a bound on temporary memory."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.config import MuseConfig
from muse_dist.kernels.limits import even_parts
from muse_dist.kernels.plain_blocks import Sight
from muse_dist.layout import is_far


class FarSlab(NamedTuple):
    """Some query blocks, and the key blocks up to the last one that their far field reads."""

    rows: slice  # of the query blocks
    leaves: int  # how many of the leaves, from the first
    query_places: Sequence[int]  # of these query blocks in the sequence
    key_places: Sequence[int]
    halo: int
    causal: bool

    def sight(self, device: torch.device) -> Sight:
        """Which of these key blocks each of these query blocks sees."""
        keys = self.key_places
        gaps = not self.causal or any(a > b for a, b in zip(keys, keys[1:]))
        return Sight(places(self.query_places, device), places(keys, device), self.halo, self.causal, gaps)


def sight_of(
    query_blocks: Sequence[int], key_blocks: Sequence[int], config: MuseConfig, device: torch.device
) -> Sight:
    """What the far field of query blocks reads of key blocks, both given by their places in the sequence."""
    return Sight(places(query_blocks, device), places(key_blocks, device), config.halo, config.causal)


def head_slabs(heads: int, block_bytes: int, blocks: int, bound: int) -> list[slice]:
    """Key/value heads to work on together: as many as all their query blocks fit into `bound`, at least one.

    Args:
        block_bytes: temporary memory of one query block of one head that sees all leaves; blocks: query blocks.
        bound: how much all may take. With the size of the inputs for it memory grows as the length, not its square.
    """
    return even_parts(heads, bound // max(1, block_bytes * blocks))


def moment_bytes(batch: int, anchors: int, leaves: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of the moments of `leaves` leaves of a head about `anchors` anchors."""
    return batch * anchors * leaves * (2 * dim * dtype.itemsize + 8)


def far_slabs(
    query_blocks: Sequence[int], key_blocks: Sequence[int], block_bytes: int, bound: int, per_block: int,
    config: MuseConfig, near: bool = False,
) -> list[FarSlab]:
    """Query blocks to work on together, those without a far field left out.

    Args:
        query_blocks, key_blocks: places in the sequence.
        block_bytes: temporary memory that a query block takes if it sees all leaves; bound: how much all may take.
        per_block: leaves in a key block; near: whether the key blocks go on to those that the near field reads.
    """
    result = []
    for rows in even_parts(len(query_blocks), bound // max(1, block_bytes)):
        here = query_blocks[rows]
        first, last = min(here), max(here)  # a block that is far from any of them is far from one of these two
        count = max((place + 1 for place, j in enumerate(key_blocks)
                     if is_far(last, j, config) or is_far(first, j, config)), default=0)
        if count:
            if near:
                count = max(place + 1 for place, j in enumerate(key_blocks) if j <= last or not config.causal)
            result.append(FarSlab(rows, count * per_block, here, key_blocks[:count], config.halo, config.causal))
    return result


def places(blocks: Sequence[int], device: torch.device) -> Tensor:
    """int32 [n]: the places of blocks on the device, without waiting for it, as copying a list would."""
    starts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1] + 1]
    runs = [torch.arange(blocks[a], blocks[b - 1] + 1, dtype=torch.int32, device=device)
            for a, b in zip(starts, [*starts[1:], len(blocks)])]
    return runs[0] if len(runs) == 1 else torch.cat(runs)
