"""Exact attention over Megatron's zigzag shards in plain PyTorch: what `launch.megatron_bench` compares MuSe with."""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from muse_dist.megatron_patch.versions import GROUPS, context_parallel_group


class ExactCoreAttention(MegatronModule):
    """Keys and values are gathered from all ranks, as with Megatron's cp_comm_type "all_gather", and read by PyTorch's
    fused attention, one of the rank's chunks after the other."""

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **arguments: Any) -> None:
        """Arguments as Megatron-core passes them."""
        super().__init__(config=config)
        self.scale = softmax_scale
        self.group = context_parallel_group({name: arguments[name] for name in GROUPS if name in arguments})

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any) -> Tensor:
        """query [S, B, H, D], key and value [S, B, K, D] -> [S, B, H * D]; causal, no other mask."""
        ranks = self.group.size()
        copies = query.shape[2] // key.shape[2]
        if ranks > 1:
            key, value = (in_order(gather_from_sequence_parallel_region(x.contiguous(), group=self.group), ranks)
                          for x in (key, value))
        q = query.permute(1, 2, 0, 3)
        k, v = (x.permute(1, 2, 0, 3) for x in (key, value))
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        parts = []
        for chunk, part in zip(self._chunks(ranks), q.chunk(2 if ranks > 1 else 1, dim=2)):
            seen = (chunk + 1) * part.shape[2]
            bias = causal_lower_right(part.shape[2], seen)
            parts.append(scaled_dot_product_attention(part, k[:, :, :seen], v[:, :, :seen], bias, scale=self.scale))
        return torch.cat(parts, dim=2).permute(2, 0, 1, 3).flatten(2)

    def _chunks(self, ranks: int) -> list[int]:
        rank = self.group.rank()
        return [0] if ranks == 1 else [rank, 2 * ranks - 1 - rank]


def in_order(x: Tensor, ranks: int) -> Tensor:
    """[N, ...] of all ranks' zigzag shards, one after the other -> [N, ...] in the order of the sequence."""
    chunks = x.chunk(2 * ranks)  # rank r gave chunks r and 2P-1-r
    return torch.cat([*chunks[::2], *reversed(chunks[1::2])])
