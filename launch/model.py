"""The decoder of the training command: a Hugging Face Llama whose attention can be swapped while it lives."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import RunConfig
from launch.data import VOCABULARY
from launch.ranks import Ranks
from muse_dist import ByteCounter, MuseConfig
from muse_dist.attention import near_only
from muse_dist.huggingface import register
from muse_dist.layout import Layout

# What the report calls an attention, and its name in transformers' registry.
ATTENTIONS = {"muse": "muse", "exact": "sdpa", "near": "muse_near"}


def register_attentions(config: MuseConfig, ranks: Ranks | None = None, counter: ByteCounter | None = None) -> None:
    """Make "muse" and "muse_near", the same on one device and without its far field, known to transformers."""
    if ranks is None or ranks.group is None:
        register(config)
    else:
        register(config, group=ranks.group, layout=ranks.layout, counter=counter)
    register(config, name="muse_near", function=near_only)


def build_model(
    config: RunConfig, device: torch.device, ranks: Ranks | None = None, counter: ByteCounter | None = None
) -> LlamaForCausalLM:
    """A Llama with random fp32 weights drawn from `train.seed`, reading its context with MuSe, shared by `ranks`."""
    register_attentions(config.muse, ranks, counter)
    shape = config.model
    torch.manual_seed(config.train.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.width, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=config.data.context, tie_word_embeddings=True, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, attn_implementation="muse"))
    return model.to(device)


@contextmanager
def attention(model: LlamaForCausalLM, name: str) -> Iterator[None]:
    """Read the context with another of `ATTENTIONS` for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTIONS[name])
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def token_losses(model: nn.Module, sequences: Tensor, positions: Tensor | None = None) -> Tensor:
    """Loss of every token after the first in nats, fp32 [B, n - 1], for sequences int64 [B, n].

    With `positions` int64 [S], the places in the sequence that this rank reads, it is [B, S] for those.
    Computed in fp32 on the CPU and under bf16 autocast on a GPU.
    """
    device = next(model.parameters()).device
    sequences = sequences.to(device)
    tokens, labels, options = sequences[:, :-1], sequences[:, 1:], {}
    if positions is not None:
        positions = positions.to(device)
        tokens, labels = tokens[:, positions], labels[:, positions]
        options = {"position_ids": positions.expand(len(sequences), -1)}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(tokens, **options).logits
    return cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")


@torch.no_grad()
def held_out_losses(model: LlamaForCausalLM, sequences: Tensor, split: Layout | None = None,
                    ranks: Ranks | None = None) -> Tensor:
    """`token_losses` of whole sequences on the CPU, one at a time to bound memory; read by all `ranks` if given."""
    if split is None or ranks is None:
        return torch.cat([token_losses(model, sequence[None]).cpu() for sequence in sequences])
    positions = split.positions(ranks.rank)
    return torch.cat([split.join(ranks.gather(token_losses(model, sequence[None], positions)), 1).cpu()
                      for sequence in sequences])


def make_optimizer(model: LlamaForCausalLM, config: RunConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": config.train.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.train.lr, betas=(0.9, 0.95), fused=True)


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
