"""The decoder of the training command: a Hugging Face Llama whose attention can be swapped while it lives."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, nll_loss
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import RunConfig
from launch.corpus import VOCABULARY
from launch.ranks import Ranks
from muse_dist import ByteCounter, MuseConfig
from muse_dist.attention import near_only
from muse_dist.huggingface import register
from muse_dist.layout import Layout

# What the report calls an attention, and its name in transformers' registry. Ranks that share a sequence read it
# exactly with "muse_exact", one rank alone with PyTorch's own.
ATTENTIONS = {"muse": "muse", "exact": "sdpa", "near": "muse_near", "exact on ranks": "muse_exact"}
LOGITS = 4096  # tokens whose logits exist at a time: those of a long context and a large vocabulary fill a GPU

Losses = Callable[[Tensor, "Tensor | None"], Tensor]


def register_attentions(config: RunConfig, ranks: Ranks | None = None, counter: ByteCounter | None = None) -> None:
    """Make the names of `ATTENTIONS` known to transformers; "muse_near" is always on one device."""
    muse = config.muse
    exact = exact_settings(config, 1 if ranks is None else ranks.size)
    for name, settings in (("muse", muse), ("muse_exact", exact)):
        if ranks is None or ranks.group is None:
            register(settings, name)
        else:
            register(settings, name, group=ranks.group, layout=ranks.layout, counter=counter)
    register(muse, name="muse_near", function=near_only)


def exact_settings(config: RunConfig, ranks: int) -> MuseConfig:
    """Settings with which nothing is far, which is exact attention, for ranks that share a sequence."""
    context = config.data.context
    return config.muse.exact(context, context // (ranks * (2 if config.layout == "zigzag" and ranks > 1 else 1)))


def build_model(
    config: RunConfig, device: torch.device, ranks: Ranks | None = None, counter: ByteCounter | None = None,
    vocabulary: int = VOCABULARY,
) -> LlamaForCausalLM:
    """A Llama with random fp32 weights drawn from `train.seed`, reading its context with MuSe, shared by `ranks`.

    Raises:
        ValueError: `model.vocabulary` is smaller than the `vocabulary` of the data.
    """
    register_attentions(config, ranks, counter)
    shape = config.model
    if shape.vocabulary and shape.vocabulary < vocabulary:
        raise ValueError(f"model.vocabulary={shape.vocabulary} is less than the {vocabulary} tokens of the data; "
                         "take at least that, or 0")
    torch.manual_seed(config.train.seed)
    llama = LlamaConfig(
        vocab_size=shape.vocabulary or vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=config.data.context, tie_word_embeddings=True, use_cache=False,
        bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, attn_implementation="muse")
    with device:  # a GPU draws a billion weights in a moment
        return LlamaForCausalLM(llama)


def recompute_activations(model: LlamaForCausalLM) -> None:
    """Keep the inputs of layers only, and compute what is inside again in the backward."""
    # The old name is deprecated where the new one exists.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def attention(model: LlamaForCausalLM, name: str) -> Iterator[None]:
    """Read the context with another of `ATTENTIONS` for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTIONS[name])
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class LossModel(nn.Module):
    """`token_losses` as a module, for wrappers that must see the whole forward."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequences: Tensor, positions: Tensor | None = None) -> Tensor:
        """Sequences int64 [B, n] -> losses fp32 [B, n - 1], or [B, S] for positions int64 [S]."""
        return token_losses(self.model, sequences, positions).clone()  # FSDP warns of outputs that are views


def token_losses(model: LlamaForCausalLM, sequences: Tensor, positions: Tensor | None = None) -> Tensor:
    """Loss of every token after the first in nats, fp32 [B, n - 1], for sequences int64 [B, n].

    With `positions` int64 [S], the places in the sequence that this rank reads, it is [B, S] for those.
    Computed in fp32 on the CPU and under bf16 autocast on a GPU.
    """
    device = model.device
    sequences = sequences.to(device)
    tokens, labels, options = sequences[:, :-1], sequences[:, 1:], {}
    if positions is not None:
        positions = positions.to(device)
        tokens, labels = tokens[:, positions], labels[:, positions]
        options = {"position_ids": positions.expand(len(sequences), -1)}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.model(tokens, **options).last_hidden_state
        if tokens.shape[1] <= LOGITS:
            return _cross_entropy(model.lm_head, hidden, labels)
        parts = zip(hidden.split(LOGITS, 1), labels.split(LOGITS, 1))
        return torch.cat([checkpoint(_cross_entropy, model.lm_head, *part, use_reentrant=False) for part in parts], 1)


def _cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Losses fp32 [B, n] for hidden [B, n, width] and labels int64 [B, n]."""
    # Tokens in rows: over a vocabulary that is not the last dimension PyTorch's softmax is many times slower on a GPU.
    log_p = log_softmax(head(hidden).flatten(0, 1), -1, dtype=torch.float32)  # without an fp32 copy of the logits
    return nll_loss(log_p, labels.flatten(), reduction="none").view_as(labels)


@torch.no_grad()
def held_out_losses(losses: Losses, sequences: Tensor, split: Layout | None = None,
                    ranks: Ranks | None = None) -> Tensor:
    """`losses` of whole sequences on the CPU, one at a time to bound memory; read by all `ranks` if given.

    Args:
        losses: a `LossModel` or the like.
        sequences: int64 [count, n].
    Returns:
        fp32 [count, n - 1].
    """
    if split is None or ranks is None:
        return torch.cat([losses(sequence[None], None).cpu() for sequence in sequences])
    positions = split.positions(ranks.rank)
    return torch.cat([split.join(ranks.gather(losses(sequence[None], positions)), 1).cpu() for sequence in sequences])


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Shortest wall-clock time of a call in seconds, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
