"""The module that Megatron-core's self-attention calls between its projections."""
from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from muse_dist import ByteCounter, MuseConfig, muse_attention
from muse_dist.megatron_patch.refusals import config_problems, refuse
from muse_dist.megatron_patch.versions import context_parallel_group


class MuseCoreAttention(MegatronModule):
    """MuSe over the context-parallel group, on Megatron's zigzag shards. It has no parameters and keeps no state.

    `apply_query_key_layer_scaling` needs nothing: Megatron divides the logits by the layer's number and multiplies
    them again before the softmax, to spare fp16 an overflow. Here they are never in less than fp32.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str = "self",
        attention_dropout: float | None = None, softmax_scale: float | None = None, cp_comm_type: str | None = None,
        *, muse: MuseConfig, **groups: Any,
    ) -> None:
        """Arguments as Megatron-core passes them to any core attention, and `muse`, the settings.

        Raises:
            ValueError that lists every setting of the model that MuSe cannot serve, each with its fix.
        """
        super().__init__(config=config)
        problems = config_problems(config, muse)
        if attention_dropout:
            problems.append(f"attention_dropout={attention_dropout}: MuSe has no dropout; build the layer without it")
        if attention_type != "self" or attn_mask_type != AttnMaskType.causal:
            problems.append(f"{attention_type} attention with mask type {attn_mask_type.name}: MuSe is for causal "
                            "self-attention; build this layer's spec without it")
        refuse(problems)
        if cp_comm_type not in (None, "p2p"):
            warnings.warn(f"cp_comm_type={cp_comm_type!r} is how exact attention communicates; layers with MuSe send "
                          f"what exchange={muse.exchange!r} says", stacklevel=2)
        self.muse = muse
        self.scale = softmax_scale
        self.group = context_parallel_group(groups) if config.context_parallel_size > 1 else None
        self.counter: ByteCounter | None = None  # whoever wants to know what is received sets one

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, H, D], key and value [S, B, K, D], this rank's S tokens and heads -> [S, B, H * D].

        Raises:
            ValueError for a cache, masks, biases and packed sequences, and as `muse_attention` does.
        """
        refuse(_call_problems(query, key, attention_mask, attn_mask_type, attention_bias, packed_seq_params))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = muse_attention(q, k, v, config=self.muse, scale=self.scale, group=self.group, layout="zigzag",
                             counter=self.counter)
        return out.permute(2, 0, 1, 3).flatten(2)

    def extra_repr(self) -> str:
        ranks = "" if self.group is None else f", ranks={self.group.size()}"
        return f"{self.muse}{ranks}"


class ChosenCoreAttention:
    """Builds MuSe in the chosen layers and what stood there before in the others.

    A class, because every version of Megatron-core builds classes and some return functions as they are. Its instances
    are those of the module chosen: nothing is wrapped, and checkpoints keep their names.
    """

    def __new__(  # type: ignore[misc]  # it returns one of two other classes
        cls, *, muse: MuseConfig, layers: Collection[int] | None, exact: ModuleSpec | type, layer_number: int,
        **arguments: Any,
    ) -> MegatronModule:
        """`layers` are numbered from 1 over the whole model; None: all. `arguments` are passed on."""
        if layers is None or layer_number in layers:
            return MuseCoreAttention(layer_number=layer_number, muse=muse, **arguments)
        return build_module(exact, layer_number=layer_number, **arguments)


def _call_problems(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, attn_mask_type: AttnMaskType | None,
    attention_bias: Tensor | None, packed_seq_params: PackedSeqParams | None,
) -> list[str]:
    problems = []
    if packed_seq_params is not None:
        problems.append("packed_seq_params: MuSe would let one document read another; give each its own sequence")
    if attention_bias is not None:
        problems.append("attention_bias: MuSe has no bias on the logits; build the model without it")
    if query.shape[0] != key.shape[0]:
        problems.append(f"{query.shape[0]} queries and {key.shape[0]} keys, as in inference with a cache or cross "
                        "attention: MuSe is for whole sequences; generate with the exact layer spec, whose checkpoints "
                        "are the same")
    elif attn_mask_type not in (None, AttnMaskType.causal):
        problems.append(f"attn_mask_type={attn_mask_type.name}: MuSe is causal; use the exact layer spec")
    if attention_mask is not None:
        problems.append("attention_mask: MuSe is causal and reads no mask; pass None (for Megatron-LM: "
                        "--no-create-attention-mask-in-dataloader)")
    return problems
