"""The decoder of the training command as a GPT of megatron-core, with the Llama's weights under their names."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launch.config import ModelConfig, RunConfig
from launch.model import LOGITS, exact_settings
from muse_dist import ByteCounter

if TYPE_CHECKING:  # Megatron is imported where it is used
    from muse_dist.megatron_patch.core_attention import MuseCoreAttention

# Where Megatron's parameters are those of the Llama under another name: of the model, and of a layer.
OUTSIDE = {"embedding.word_embeddings.weight": "model.embed_tokens.weight",
           "decoder.final_layernorm.weight": "model.norm.weight"}
IN_A_LAYER = {"input_layernorm.weight": "input_layernorm.weight",
              "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
              "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
              "mlp.linear_fc2.weight": "mlp.down_proj.weight"}


def transformer_config(
    shape: ModelConfig, ranks: int, dtype: torch.dtype, recompute: str = "none", **changes: Any,
) -> Any:
    """Megatron's settings for a model like a Llama: RMSNorm, SwiGLU, no biases, no dropout.

    Args:
        ranks: how many share a sequence.
        dtype: of weights and activations.
        recompute: what the backward computes again: "none", "selective" or "full".
        changes: further settings, or others.
    """
    from megatron.core.transformer import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": shape.layers, "hidden_size": shape.width, "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads, "ffn_hidden_size": shape.mlp, "context_parallel_size": ranks,
        "normalization": "RMSNorm", "add_bias_linear": False, "gated_linear_unit": True,
        "activation_func": nn.functional.silu, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "bf16": dtype == torch.bfloat16, "params_dtype": dtype, "pipeline_dtype": dtype,
        # These need Transformer Engine or apex.
        "gradient_accumulation_fusion": False, "persist_layer_norm": False, "masked_softmax_fusion": False,
    }
    if recompute != "none":
        settings["recompute_granularity"] = recompute
    if recompute == "full":
        settings |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(**settings | changes)


def build_gpt(config: RunConfig, settings: Any, vocabulary: int) -> Any:
    """A GPTModel with MuSe on this GPU, whose weights are yet to be set. It returns hidden states [S, B, width]."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from muse_dist.megatron_patch.spec import use_muse

    spec = use_muse(get_gpt_layer_local_spec(normalization=settings.normalization), config.muse)
    gpt = GPTModel(settings, spec, vocabulary, config.data.context, share_embeddings_and_output_weights=True,
                   position_embedding_type="rope", rotary_base=config.model.rope_theta)
    gpt.post_process = False  # the logits of a whole long context would not fit: MegatronLosses takes a few at a time
    return gpt.to(torch.cuda.current_device())  # PyTorch's norms, which stand in for Megatron's, are made on the CPU


def data_parallel(gpt: Any) -> Any:
    """The GPT in Megatron's wrappers: bf16 if its config says so, gradients in fp32, for the distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    ways = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return DistributedDataParallel(gpt.config, ways, Float16Module(gpt.config, gpt) if gpt.config.bf16 else gpt)


def attentions(gpt: Any, config: RunConfig, counter: ByteCounter | None) -> dict[str, list[MuseCoreAttention]]:
    """The core attentions of all layers: "muse", which they have, and "exact". Both count what they receive."""
    from megatron.core.transformer.enums import AttnMaskType

    from muse_dist.megatron_patch.core_attention import MuseCoreAttention

    exact = exact_settings(config, gpt.config.context_parallel_size)
    found = {"muse": [layer.self_attention.core_attention for layer in gpt.decoder.layers],
             "exact": [MuseCoreAttention(gpt.config, layer.layer_number, AttnMaskType.causal, muse=exact)
                       for layer in gpt.decoder.layers]}
    for core in [*found["muse"], *found["exact"]]:
        core.counter = counter
    return found


class MegatronLosses(nn.Module):
    """What `launch.model.LossModel` is for a Llama: the losses of sequences, of a GPT in Megatron's wrappers."""

    def __init__(self, wrapped: nn.Module, gpt: Any) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.gpt = gpt

    def forward(self, sequences: Tensor, positions: Tensor | None = None) -> Tensor:
        """Sequences int64 [B, n] -> losses fp32 [B, n - 1], or [B, S] for positions int64 [S]."""
        weight = self.gpt.shared_embedding_or_output_weight()
        sequences = sequences.to(weight.device)
        tokens, labels = sequences[:, :-1], sequences[:, 1:]
        if positions is None:
            positions = torch.arange(tokens.shape[1])
        positions = positions.to(weight.device)
        tokens, labels = tokens[:, positions], labels[:, positions]
        # The wrapper returns fp32.
        hidden = self.wrapped(tokens, positions.expand(len(tokens), -1), None).to(weight.dtype)
        if tokens.shape[1] <= LOGITS:
            return self._cross_entropy(hidden, labels)
        parts = zip(hidden.split(LOGITS), labels.split(LOGITS, 1))
        return torch.cat([checkpoint(self._cross_entropy, *part, use_reentrant=False) for part in parts], 1)

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Losses fp32 [B, n] for hidden [n, B, width] and labels int64 [B, n]."""
        logits, _ = self.gpt.output_layer(hidden, weight=self.gpt.shared_embedding_or_output_weight())
        return self.gpt.compute_language_model_loss(labels, logits)


def pieces(name: str, whole: Tensor, shape: ModelConfig) -> dict[str, Tensor]:
    """A parameter of the GPT as views, by the names of the Llama's parameters in it.

    A view has the numbers of the Llama's parameter in their order, but not always its shape.
    """
    if name in OUTSIDE:
        return {OUTSIDE[name]: whole}
    _, _, layer, rest = name.split(".", 3)
    if rest == "self_attention.linear_qkv.weight":  # [K, G + 2, D, width]
        groups = whole.view(shape.kv_heads, -1, shape.width // shape.heads, shape.width)
        inside = {"self_attn.q_proj.weight": groups[:, :-2], "self_attn.k_proj.weight": groups[:, -2],
                  "self_attn.v_proj.weight": groups[:, -1]}
    elif rest == "mlp.linear_fc1.weight":
        gate, up = whole.chunk(2)
        inside = {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    else:
        inside = {IN_A_LAYER[rest]: whole}
    return {f"model.layers.{layer}.{part}": view for part, view in inside.items()}
