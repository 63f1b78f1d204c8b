"""A sequence that ranks share: inputs, who holds which tokens, and one forward and backward on a rank's shard.

Who holds what is written down a second time here: the package's index arithmetic is not compared with itself.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muse_dist import MuseConfig, muse_attention
from muse_dist.emulation import emulate_ranks
from tests.brute import exact_attention, random_inputs


def small(**changes: Any) -> MuseConfig:
    """Everything of the method at a size that runs in milliseconds: blocks of 8 tokens, leaves of 2."""
    return MuseConfig(**{"block": 8, "halo": 1, "leaf": 2, "group": 4, "anchors": 2, "remote_anchors": 1,
                         "remote_leaf": 2, "opened": 2, "sinks": 1, **changes})


def tokens_held(layout: str, ranks: int, rank: int, tokens: int) -> Tensor:
    """The places in the sequence of the tokens of a rank, in the order it holds them: int64 [tokens / ranks]."""
    if layout == "contiguous":
        return torch.arange(tokens).chunk(ranks)[rank]
    chunks = torch.arange(tokens).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def join(parts: Sequence[Tensor], layout: str) -> Tensor:
    """The full tensor [B, H, N, D] from the shards of all ranks, in rank order."""
    places = torch.cat([tokens_held(layout, len(parts), r, len(parts) * parts[0].shape[2]) for r in range(len(parts))])
    full = torch.empty_like(torch.cat(list(parts), 2))
    full[:, :, places] = torch.cat(list(parts), 2)
    return full


@dataclass(frozen=True)
class Case:
    """One call: settings, layout and shapes of the whole sequence. The inputs follow from it."""

    config: MuseConfig
    tokens: int
    layout: str = "contiguous"
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    dim: int = 5
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v of the whole sequence, and the gradient of the output."""
        q, k, v = random_inputs(self.seed, self.batch, self.heads, self.kv_heads, self.tokens, self.dim)
        dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return tuple(x.to(self.dtype) for x in (q, k, v, dout))

    def reference(self, ranks: int) -> tuple[Tensor, ...]:
        """Output, dq, dk, dv without communication: one device for "kv", the emulation of the ranks for "moments"."""
        return _gradients(self._whole(ranks), *self.inputs())

    def exact(self) -> tuple[Tensor, ...]:
        """Output, dq, dk, dv of exact attention."""
        scale, causal = self.dim ** -0.5, self.config.causal
        return _gradients(lambda q, k, v: exact_attention(q, k, v, scale, causal), *self.inputs())

    def local_only(self, ranks: int) -> list[tuple[Tensor, ...]]:
        """(dk, dv) of every rank's shard from the queries of that rank alone, what a lost reduction would leave."""
        *inputs, dout = self.inputs()
        found = []
        for rank in range(ranks):
            held = tokens_held(self.layout, ranks, rank, self.tokens)
            own = torch.zeros_like(dout)
            own[:, :, held] = dout[:, :, held]
            found.append(tuple(x[:, :, held] for x in _gradients(self._whole(ranks), *inputs, own)[2:]))
        return found

    def _whole(self, ranks: int) -> Any:
        if self.config.exchange == "kv":
            return lambda q, k, v: muse_attention(q, k, v, config=self.config)
        return lambda q, k, v: emulate_ranks(q, k, v, config=self.config, ranks=ranks, layout=self.layout)

    def shard(self, group: Any = None) -> list[Tensor]:
        """This rank's part of `inputs`; `group` is the whole world if None. Only on a rank."""
        group = dist.group.WORLD if group is None else group
        held = tokens_held(self.layout, group.size(), group.rank(), self.tokens)
        return [x[:, :, held] for x in self.inputs()]

    def step(self, group: Any = None, **options: Any) -> tuple[Tensor, ...]:
        """Output, dq, dk, dv of this rank's shard, with communication. Only on a rank."""
        group = dist.group.WORLD if group is None else group

        def call(*x: Tensor) -> Tensor:
            return muse_attention(*x, config=self.config, group=group, layout=self.layout, **options)

        return _gradients(call, *self.shard(group))


def _gradients(function: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def joined(found: Sequence[tuple[Tensor, ...]], layout: str) -> tuple[Tensor, ...]:
    """What the ranks returned from `Case.step` as full tensors."""
    return tuple(join(parts, layout) for parts in zip(*found))
