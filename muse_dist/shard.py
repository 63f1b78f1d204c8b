"""One rank's part of a sequence, and the exchange of halo blocks and sinks, which both exchange modes describe."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from muse_dist.comm import Communicator, Pending
from muse_dist.config import MuseConfig
from muse_dist.layout import Layout, halo_blocks, is_far, near_pairs, needs_sinks
from muse_dist.stages import staged


@dataclass(frozen=True)
class Shard:
    """Everything about a call that holds no tensor."""

    comm: Communicator
    layout: Layout
    config: MuseConfig
    scale: float
    dtype: torch.dtype  # of the inputs, and of what travels

    @cached_property
    def mine(self) -> list[int]:
        """Blocks this rank holds, in the order it holds them."""
        return self.layout.blocks_of(self.comm.rank)

    @cached_property
    def everything(self) -> list[int]:
        """All blocks of the sequence."""
        return list(range(self.layout.chunks * self.layout.chunk_blocks))

    @cached_property
    def own_pairs(self) -> list[tuple[int, int, bool]]:
        """Near pairs of own query blocks and own key blocks."""
        return near_pairs(self.mine, self.mine, self.config)

    @cached_property
    def other_pairs(self) -> list[tuple[int, int, bool]]:
        """Near pairs of own query blocks and other ranks' key blocks, counted among all blocks."""
        held = set(self.mine)
        return [pair for pair in near_pairs(self.mine, self.everything, self.config) if pair[1] not in held]

    @cached_property
    def halo(self) -> list[list[int]]:
        """Halo blocks this rank receives from each rank."""
        return self.halo_of(self.comm.rank)

    def halo_of(self, rank: int) -> list[list[int]]:
        """Halo blocks `rank` receives from each rank."""
        needed = halo_blocks(self.layout, rank, self.config)
        return [[j for j in needed if self.layout.block_owner(j) == owner] for owner in range(self.layout.ranks)]

    @cached_property
    def halo_pairs(self) -> list[tuple[int, int, bool]]:
        """Near pairs of own query blocks and the blocks received; the sinks, if any, are one short block behind."""
        received = [j for blocks in self.halo for j in blocks]
        pairs = near_pairs(self.mine, received, self.config)
        if needs_sinks(self.layout, self.comm.rank, self.config):
            pairs += [(i, len(received), False) for i, block in enumerate(self.mine) if is_far(block, 0, self.config)]
        return pairs

    def sinks_for(self, owner: int, rank: int) -> int:
        """Sink tokens that `owner` sends `rank`."""
        here = self.layout.block_owner(0) == owner and needs_sinks(self.layout, rank, self.config)
        return self.config.sinks * self.config.leaf if here else 0

    def rows_for(self, rank: int) -> list[slice]:
        """Own tokens that `rank` reads exactly: halo blocks, then sinks, in the order of sending."""
        block = self.config.block
        rows = [slice(self.mine.index(j) * block, (self.mine.index(j) + 1) * block)
                for j in self.halo_of(rank)[self.comm.rank]]
        sinks = self.sinks_for(self.comm.rank, rank)
        return rows + ([slice(0, sinks)] if sinks else [])

    def received_tokens(self, owner: int) -> tuple[int, int]:
        """(halo tokens, sink tokens) that this rank receives from `owner`."""
        return len(self.halo[owner]) * self.config.block, self.sinks_for(owner, self.comm.rank)


@staged("pack")
def post_halo(s: Shard, k: Tensor, v: Tensor) -> Pending:
    """Send the halo blocks and sinks of k and v [B, K, S, D] to the ranks that read them exactly."""
    send = []
    for rank in range(s.comm.size):
        rows = s.rows_for(rank)
        send.append([torch.cat([x[:, :, r] for r in rows], 2).to(s.dtype) for x in (k, v)] if rows else [])
    return s.comm.all_to_all("halo and sinks", send, [_halo_specs(s, k, rank) for rank in range(s.comm.size)], k.device)


def _halo_specs(s: Shard, k: Tensor, owner: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tokens = sum(s.received_tokens(owner))
    shape = (*k.shape[:2], tokens, k.shape[3])
    return [(shape, s.dtype), (shape, s.dtype)] if tokens else []


@staged("unpack")
def received_halo(s: Shard, pending: Pending, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values received [B, K, T, D], halo blocks first and sinks last, as `halo_pairs` counts them."""
    tensors = iter(pending.wait())
    halo: tuple[list[Tensor], list[Tensor]] = ([k[:, :, :0]], [k[:, :, :0]])
    sinks: tuple[list[Tensor], list[Tensor]] = ([], [])
    for owner in range(s.comm.size):
        counts = s.received_tokens(owner)
        for place in range(2 if sum(counts) else 0):
            blocks, first = next(tensors).to(k.dtype).split(list(counts), 2)
            halo[place].append(blocks)
            sinks[place].append(first)
    keys, values = (torch.cat(halo[place] + sinks[place], 2) for place in range(2))
    return keys, values


@staged("pack")
def post_halo_gradients(s: Shard, dk: Tensor, dv: Tensor) -> Pending:
    """Send the gradients of the halo blocks and sinks [B, K, T, D] home."""
    send, at = [], 0
    end = dk.shape[2] - sum(s.received_tokens(owner)[1] for owner in range(s.comm.size))
    for owner in range(s.comm.size):
        tokens, sinks = s.received_tokens(owner)
        rows = [slice(at, at + tokens), slice(end, end + sinks)]
        at += tokens
        send.append([torch.cat([x[:, :, r] for r in rows], 2).to(s.dtype) for x in (dk, dv)] if tokens + sinks else [])
    receive = []
    for rank in range(s.comm.size):
        shape = (*dk.shape[:2], _length(s.rows_for(rank)), dk.shape[3])
        receive.append([(shape, s.dtype), (shape, s.dtype)] if shape[2] else [])
    return s.comm.all_to_all("halo and sinks gradients", send, receive, dk.device)


@staged("unpack")
def add_halo_gradients(s: Shard, pending: Pending, dk: Tensor, dv: Tensor) -> None:
    """Add what other ranks' queries give this rank's keys and values to dk and dv [B, K, S, D], in rank order.

    All ranks that see the sinks add to the same rows: dk and dv are in at least fp32.
    """
    tensors = iter(pending.wait())
    for rank in range(s.comm.size):
        rows = s.rows_for(rank)
        for total in (dk, dv) if rows else ():
            at = 0
            received = next(tensors)
            for r in rows:
                length = r.stop - r.start
                total[:, :, r].add_(received[:, :, at:at + length])
                at += length


def _length(rows: Sequence[slice]) -> int:
    return sum(r.stop - r.start for r in rows)
