"""Hugging Face transformers 5: `attn_implementation="muse"` for any decoder that uses its attention interface.

    from muse_dist import MuseConfig
    from muse_dist.huggingface import register

    register(MuseConfig(block=4096, opened=16))
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="muse")

`register` comes first: a model that is loaded before it fails with transformers' own error, which lists the attention
implementations that exist. Whole sequences (training, and the prompt of `generate`) run through MuSe. Steps that read a
cache are exact attention of their few queries to the cached keys. What is neither is refused, never approximated
silently. No N x N mask is built: a step's mask is queries x keys, and its queries are at most one block.

With `group`, every rank feeds the model its own tokens of the sequence and their positions in it:

    register(config, group=group, layout="zigzag")
    positions = Layout("zigzag", ranks, tokens, config.block).positions(rank)
    model(input_ids[:, positions], position_ids=positions[None])
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from muse_dist.attention import muse_attention
from muse_dist.comm import ByteCounter, ProcessGroup
from muse_dist.config import MuseConfig
from muse_dist.layout import Layout, LayoutName

# Options of transformers' attention functions that change the result: what each would need, for the error.
REFUSED_OPTIONS = {
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "a bias on the logits",
    "indices": "keys selected by an indexer",
    "block_indices": "keys selected by an indexer",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "cache": "a paged cache (continuous batching)",
}
PACKED = ("positions that do not count up by one (packed sequences): MuSe would let one document read another. "
          "Give each document its own row, or train on the row as one document without position_ids")
SHARDED = ("position_ids must be the places of this rank's tokens in the whole sequence, "
           "Layout(layout, ranks, tokens, block).positions(rank): without them the model takes the shard for a whole")
PADDED = ("attention_mask has zeros: MuSe reads every token. In causal training pad on the right, set the labels of "
          "the padding to -100 and leave attention_mask out; to generate, give prompts of one length a batch")


def register(
    config: MuseConfig, name: str = "muse", function: Callable[..., Tensor] | None = None, *,
    group: ProcessGroup | None = None, layout: LayoutName = "contiguous", counter: ByteCounter | None = None,
) -> None:
    """Make MuSe known to transformers as the attention implementation `name`.

    Registering a name again replaces it, also for models that are already loaded with it.

    Args:
        config: settings of every layer that runs under this name; `config.causal` must be what the layers ask for.
        name: what `attn_implementation=` takes. Names of transformers' own implementations are refused.
        function: called as function(q, k, v, config=config, scale=scale) with q [B, H, N, D], k and v [B, K, N, D]
            (key/value heads not repeated), to return [B, H, N, D]; `muse_attention` if None. With `group` it is
            given group, layout and counter too.
        group, layout, counter: of `muse_attention`, for ranks that share the sequence. The model must then be given
            `position_ids`, the places of this rank's tokens in the sequence; caches are refused.
    Raises:
        ValueError, TypeError: for a bad `name` or `config`. The registered attention itself raises ValueError, with the
            fix, for padding, packed sequences, windows shorter than the sequence, custom masks, dropout, and layers
            whose causality is not that of `config`. With `group`, a rank that is refused a batch the others accept
            stops alone: they wait for it in an exchange until the group's timeout, and then raise RuntimeError that
            names the exchange. Its own message says why.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if not isinstance(config, MuseConfig):
        raise TypeError(f"config must be a MuseConfig, not {type(config).__name__}")
    taken = AttentionInterface().get(name)
    if name == "eager" or (taken is not None and taken.__module__ != __name__):
        raise ValueError(f"name={name!r} is an attention implementation of transformers; take another, such as 'muse'")
    if not name or set("/|@: ") & set(name) or "flash" in name:
        raise ValueError(f"name={name!r}: transformers reads special meanings into '/', '|', '@', ':' and 'flash'; "
                         "take a plain word, such as 'muse'")
    if function is None or group is not None:
        function = partial(function or muse_attention, group=group, layout=layout, counter=counter)
    place = None if group is None else partial(_shard_positions, config, group, layout)
    AttentionInterface.register(name, _attention(config, function, place))
    AttentionMaskInterface.register(name, _mask(config, group is not None))


def _shard_positions(config: MuseConfig, group: ProcessGroup, layout: LayoutName, tokens: int) -> Tensor:
    """Places in the sequence of the `tokens` tokens this rank holds."""
    return Layout(layout, group.size(), tokens * group.size(), config.block).positions(group.rank())


def _mask(config: MuseConfig, sharded: bool) -> Callable[..., Tensor | None]:
    """The mask function of transformers' interface: checks what a model asks for and returns None for MuSe.

    None means here what it means to transformers' own `sdpa`: plain causal (or full) attention of all the queries. Only
    steps on a cache get a mask [B, 1, queries, keys].
    """
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    exact_mask = AttentionMaskInterface()["sdpa"]
    pattern = causal_mask_function if config.causal else bidirectional_mask_function
    kind = "causal" if config.causal else "bidirectional"

    def mask(
        *, q_length: int, kv_length: int, mask_function: Callable[..., Any], q_offset: int | Tensor = 0,
        attention_mask: Tensor | None = None, local_size: int | None = None, allow_is_causal_skip: bool = True,
        **options: Any,
    ) -> Tensor | None:
        if q_length == 1 or (q_length < kv_length and q_offset != 0):
            _check_step(q_length, config)
            return exact_mask(
                q_length=q_length, kv_length=kv_length, mask_function=mask_function, q_offset=q_offset,
                attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
                **options)
        short = local_size is not None and kv_length < local_size and allow_is_causal_skip and config.causal
        # The positions of a shard may jump, which transformers takes for packing; the attention checks them itself.
        jumps = sharded and local_size is None
        if mask_function is not pattern and not short and not jumps:
            raise ValueError(_pattern_error(mask_function, local_size, kind))
        if attention_mask is not None:
            _check_padding(attention_mask, q_length)
        return None

    return mask


def _attention(
    config: MuseConfig, function: Callable[..., Tensor], place: Callable[[int], Tensor] | None
) -> Callable[..., tuple[Tensor, None]]:
    """The attention function of transformers' interface: q [B, H, N, D], k, v [B, K, T, D] -> [B, N, H, D], None."""
    from transformers import AttentionInterface

    exact = AttentionInterface()["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
        sliding_window: int | None = None, position_ids: Tensor | None = None, **options: Any,
    ) -> tuple[Tensor, None]:
        _check_options(options, dropout)
        tokens, keys = query.shape[2], key.shape[2]
        if tokens == 1 or (attention_mask is not None and tokens < keys):  # a step on a cache
            if place is not None:
                raise ValueError("a step on a cache: ranks that share a sequence cannot generate; register without "
                                 "group to do so")
            return exact(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        _check_layer(causal, tokens, keys, attention_mask, sliding_window, config)
        _check_positions(module, position_ids, None if place is None else place(tokens))
        # A static cache hands over its whole buffer; its first `tokens` places are the prompt.
        out = function(query, key[:, :, :tokens], value[:, :, :tokens], config=config, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _check_step(queries: int, config: MuseConfig) -> None:
    if queries > config.block:
        raise ValueError(
            f"{queries} new tokens on a cache that is not empty: these are read exactly, at most {config.block} (one "
            "block) at a time. Give the prompt in one piece, or go on in pieces of at most that many tokens")


def _check_padding(attention_mask: Tensor, tokens: int) -> None:
    if attention_mask.shape[1] < tokens:
        raise ValueError(f"attention_mask of shape {list(attention_mask.shape)} is shorter than the {tokens} tokens; "
                         "leave it out")
    _require(attention_mask[:, :tokens].all(), PADDED)


def _pattern_error(mask_function: Callable[..., Any], local_size: int | None, kind: str) -> str:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if local_size is not None:
        return (f"the model asks for local attention (sliding window or chunks of {local_size} tokens), and the "
                "sequence is not shorter: MuSe reads all of it. Load the model with 'sdpa', or use shorter sequences")
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return f"the model is not {kind}, but config.causal={kind == 'causal'}: register a config with the other value"
    if torch.compiler.is_compiling():
        return ("under torch.compile transformers does not tell plain from packed sequences; compile the decoder "
                "layers instead of the model, or pass attention_mask=torch.ones_like(input_ids)")
    return f"the model asks for more than a plain {kind} mask: custom masks, or {PACKED}"


def _check_options(options: dict[str, Any], dropout: float) -> None:
    if dropout:
        raise ValueError(f"dropout={dropout}: MuSe has no attention dropout; set the model's attention_dropout=0")
    for name, meaning in REFUSED_OPTIONS.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}: the model asks for {meaning}, which MuSe does not have; load it with 'sdpa' or "
                             "'eager'")


def _check_layer(
    causal: bool, tokens: int, keys: int, attention_mask: Tensor | None, window: int | None, config: MuseConfig
) -> None:
    if attention_mask is not None:
        raise ValueError(f"attention_mask of shape {list(attention_mask.shape)}: MuSe takes no custom masks; leave it "
                         "out, or load the model with 'sdpa'")
    if causal != config.causal:
        raise ValueError(f"a layer has is_causal={causal}, but config.causal={config.causal}: register a config with "
                         f"causal={causal} for this model")
    if not causal and tokens != keys:
        raise ValueError(f"cross attention of {tokens} queries to {keys} keys: MuSe is for self-attention; load the "
                         "model with 'sdpa'")
    if window is not None and tokens >= window:
        raise ValueError(f"sliding_window={window}: a layer sees less than the {tokens} tokens given, and MuSe reads "
                         "all of them; load the model with 'sdpa', or use shorter sequences")


def _check_positions(module: nn.Module, position_ids: Tensor | None, expected: Tensor | None) -> None:
    """Refuse positions that restart: with a cache transformers does not look for them. One layer a forward checks.

    A shard's positions must be the `expected` ones, or its rotary embeddings would be those of other tokens.
    """
    if position_ids is None or position_ids.dim() != 2:
        if expected is not None:
            raise ValueError(SHARDED)
        return
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or []
    first = kinds.index("full_attention") if "full_attention" in kinds else 0
    if getattr(module, "layer_idx", None) in (None, first):
        if expected is not None:
            _require((position_ids == expected.to(position_ids.device)).all(), SHARDED)
        else:
            _require((position_ids.diff() == 1).all(), PACKED)


def _require(condition: Tensor, message: str) -> None:
    """Raise `ValueError` unless a 0-d tensor is true; inside torch.compile, where its value is unknown, assert it."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
