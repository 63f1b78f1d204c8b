"""How many bytes a rank receives a layer and step: predicted, for both exchange modes and for exact attention."""
from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from muse_dist.comm import padded
from muse_dist.config import MuseConfig
from muse_dist.layout import Layout, LayoutName, chunk_pairs, halo_blocks, needs_sinks
from muse_dist.remote import message_specs
from muse_dist.tree import has_far_field


class Traffic(NamedTuple):
    """Bytes one rank receives in a forward and a backward, by exchange, as `ByteCounter` names them."""

    moments: dict[str, int]
    kv: dict[str, int]
    ring: dict[str, int]  # keys and values pass through every rank, their gradients travel home
    ulysses: dict[str, int]  # heads against tokens: q, k, v and the output change hands


def traffic(
    config: MuseConfig, shape: tuple[int, int, int, int, int], ranks: int, *, layout: LayoutName = "zigzag",
    dtype: torch.dtype = torch.bfloat16, rank: int | None = None,
) -> Traffic:
    """Predict what a rank receives for one attention layer, forward and backward, in bytes.

    Args:
        config: see `MuseConfig`.
        shape: (B, H, K, N, D) of the whole sequence: batch, query heads, key/value heads, tokens, head dim.
        ranks: context-parallel ranks P; layout and dtype: as in `muse_attention`.
        rank: which one; None: the one that receives most bytes with moments (contiguous chunks are not balanced).
    Returns:
        Traffic. Activation recomputation adds a forward.
    Raises:
        ValueError if the tokens do not divide into whole blocks a chunk.
    """
    described = Layout(layout, ranks, shape[3], config.block)
    if rank is None:
        rank = max(range(ranks), key=lambda r: sum(_moments(config, shape, described, dtype, r).values()))
    batch, heads, kv_heads, tokens, dim = shape
    local = tokens // ranks
    kv = 2 * batch * kv_heads * local * dim * dtype.itemsize
    everyone = (ranks - 1) * 2 * padded(kv // 2)
    chunks = described.chunks_per_rank  # gradients travel chunk by chunk
    gradients = (ranks - 1) * 2 * chunks * padded(kv // 2 // chunks)
    orders = (ranks - 1) * padded(batch * kv_heads * local * torch.int32.itemsize)
    if not has_far_field(tokens, config):
        orders = 0
    swapped = (ranks - 1) * batch * (2 * heads + 2 * kv_heads) * local * dim * dtype.itemsize // ranks
    return Traffic(
        moments=_moments(config, shape, described, dtype, rank),
        kv={"keys and values": 2 * everyone, "key order": orders, "keys and values gradients": gradients},
        ring={"forward": (ranks - 1) * kv, "backward": (2 * ranks - 1) * kv if ranks > 1 else 0},
        ulysses={"forward": swapped, "backward": swapped})


def _moments(config: MuseConfig, shape: tuple[int, int, int, int, int], layout: Layout, dtype: torch.dtype,
             rank: int) -> dict[str, int]:
    """Bytes `rank` receives with exchange="moments"."""
    batch, _, kv_heads, tokens, dim = shape
    width = batch * kv_heads * dim * dtype.itemsize  # bytes of one token's keys
    others = [r for r in range(layout.ranks) if r != rank]
    anchors = padded(width * layout.chunks_per_rank * config.remote_anchors)
    specs = message_specs((batch, kv_heads, tokens // layout.ranks, dim), dtype,
                          torch.promote_types(dtype, torch.float32), config, layout)
    message = sum(padded(prod(size) * kind.itemsize) for size, kind in specs)
    return {
        "halo and sinks": sum(2 * padded(width * _halo_tokens(layout, config, r, rank)) for r in others),
        "anchors": len(others) * anchors,
        "moments": sum(message * len(chunk_pairs(layout, r, rank, config)) for r in others),
        "moments gradients": sum(message * len(chunk_pairs(layout, rank, r, config)) for r in others),
        "halo and sinks gradients": sum(2 * padded(width * _halo_tokens(layout, config, rank, r)) for r in others),
    }


def _halo_tokens(layout: Layout, config: MuseConfig, owner: int, rank: int) -> int:
    """Tokens of halo blocks and sinks that `owner` sends `rank`."""
    blocks = sum(layout.block_owner(j) == owner for j in halo_blocks(layout, rank, config))
    sinks = config.sinks * config.leaf if layout.block_owner(0) == owner and needs_sinks(layout, rank, config) else 0
    return blocks * config.block + sinks
