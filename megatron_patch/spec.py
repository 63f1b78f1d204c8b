"""Layer specs with MuSe as their core attention."""
from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from muse_dist.config import MuseConfig
from muse_dist.megatron_patch.core_attention import ChosenCoreAttention, MuseCoreAttention
from muse_dist.megatron_patch.refusals import refuse
from muse_dist.megatron_patch.versions import transformer_impl


def use_muse(spec: Any, config: MuseConfig, layers: Collection[int] | None = None) -> Any:
    """A GPT layer spec, or block of them, with MuSe in place of the core attention; `spec` itself is left as it is.

    Args:
        spec: of a layer (`get_gpt_layer_local_spec`, `get_gpt_layer_with_transformer_engine_spec`) or a whole block
            (`get_gpt_decoder_block_spec`, which models with experts use).
        config: settings of MuSe.
        layers: which layers use it, numbered from 1 over the whole model as Megatron does; the others keep what the
            spec has. None: all.
    Raises:
        TypeError or ValueError for a spec without self-attention or with a core attention of MuSe already. Building
        the model raises ValueError with all that MuSe cannot serve in its TransformerConfig.
    """
    if not isinstance(config, MuseConfig):
        raise TypeError(f"config: must be a MuseConfig, not {type(config).__name__}")
    if layers is not None:
        layers = frozenset(layers)
        if not layers or any(type(layer) is not int or layer < 1 for layer in layers):
            raise ValueError(f"layers={sorted(layers, key=str)}: must be numbers from 1; None means all layers")
    if hasattr(spec, "layer_specs"):
        block = copy.copy(spec)
        block.layer_specs = [_layer_spec(layer, config, layers) for layer in spec.layer_specs]
        return block
    return _layer_spec(spec, config, layers)


def _layer_spec(spec: ModuleSpec, config: MuseConfig, layers: Collection[int] | None) -> ModuleSpec:
    attention: Any = getattr(getattr(spec, "submodules", None), "self_attention", None)
    parts = getattr(attention, "submodules", None)
    if not hasattr(parts, "core_attention"):
        raise TypeError(f"spec: {type(spec).__name__} has no self_attention with a core_attention; give the spec of a "
                        "GPT layer or of a block of them")
    spec, attention = copy.copy(spec), copy.copy(attention)
    spec.submodules = copy.copy(spec.submodules)
    spec.submodules.self_attention = attention
    attention.submodules = with_muse(parts, config, layers)
    attention.params = {**attention.params, "kind": attention.module}
    attention.module = SelfAttentionWithoutCache
    return spec


def with_muse(parts: Any, config: MuseConfig, layers: Collection[int] | None) -> Any:
    """A copy of the submodules of a self-attention whose core attention is MuSe in the chosen layers."""
    exact = parts.core_attention
    if getattr(exact, "module", None) is ChosenCoreAttention:
        raise ValueError("spec: its core attention is MuSe already; give the spec it was made from")
    parts = copy.copy(parts)
    parts.core_attention = ModuleSpec(ChosenCoreAttention, {"muse": config, "layers": layers, "exact": exact})
    return parts


class SelfAttentionWithoutCache:
    """Builds the self-attention that stood there before, which then refuses a cache if its core attention is MuSe.

    A class, and its instances are of another one, as with ChosenCoreAttention.
    """

    def __new__(cls, *arguments: Any, kind: type[nn.Module], **options: Any) -> nn.Module:  # type: ignore[misc]
        attention = kind(*arguments, **options)
        refuse_cache(attention)
        return attention


def refuse_cache(attention: nn.Module) -> None:
    """Have a self-attention with MuSe raise ValueError for a cache that is filled through its core attention.

    That one sees later steps alone, and not that the prompt, which it would approximate, goes into a cache. Dynamic
    batching does not ask it for anything: it is exact.
    """
    if isinstance(attention.core_attention, MuseCoreAttention):
        attention.register_forward_pre_hook(_check_cache, with_kwargs=True)


def _check_cache(attention: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    for value in (*arguments, *options.values()):
        if isinstance(value, BaseInferenceContext) and value.is_static_batching():
            raise ValueError("inference_context: MuSe would approximate the prompt that a cache is filled with; "
                             "generate with the exact layer spec, whose checkpoints are the same")


class MuseTransformerLayer(TransformerLayer):
    """A transformer layer of the kind that the model's config asks for, with MuSe: for Megatron-LM's --spec.

    That option takes a finished spec, before there is a config; so the layer makes its own.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any = None, layer_number: int = 1, *, muse: MuseConfig,
        layers: Collection[int] | None, **arguments: Any,
    ) -> None:
        """Arguments as Megatron-core passes them, and those of `use_muse`. `submodules` must be None.

        Raises:
            ValueError as `MuseCoreAttention` does, and for models whose layers are not all alike.
        """
        refuse(_spec_problems(config, submodules))
        spec = use_muse(_stock_spec(config), muse, layers)
        super().__init__(config=config, submodules=spec.submodules, layer_number=layer_number, **arguments)


def layer_spec(config: MuseConfig, layers: Collection[int] | None = None) -> ModuleSpec:
    """What Megatron-LM's --spec can name, in a module of yours: `my_spec = layer_spec(MuseConfig(...))`."""
    return ModuleSpec(MuseTransformerLayer, {"muse": config, "layers": layers})


def _spec_problems(config: TransformerConfig, submodules: Any) -> list[str]:
    problems = []
    if submodules is not None:
        problems.append("submodules: this layer makes its own; use_muse changes a spec that has some")
    if config.num_moe_experts is not None and config.moe_layer_freq != 1:
        problems.append(f"moe_layer_freq={config.moe_layer_freq}: --spec gives all layers one spec; use --attention "
                        "muse, or use_muse on get_gpt_decoder_block_spec")
    return problems


def _stock_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron-core's own spec of a layer of this model."""
    options = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
        "qk_l2_norm": getattr(config, "qk_l2_norm", False),
    }
    if transformer_impl(config) == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(**options)
    return get_gpt_layer_local_spec(**options, normalization=config.normalization)


muse_layer_spec = layer_spec(MuseConfig())
