"""Small models of transformers whose attention is far from uniform."""
from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from muse_dist import MuseConfig
from muse_dist.huggingface import register

SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 4096}
BLOCK = 32
CONFIG = MuseConfig(block=BLOCK, halo=0, leaf=8, group=8, remote_leaf=8, anchors=1, opened=1)
WIDE = MuseConfig(block=4096)  # every sequence of these tests is one block: exact
BOTH_SIDES = MuseConfig(block=64, anchors=1, causal=False)


def ids(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def build(kind=LlamaForCausalLM, config=LlamaConfig, attention: str = "muse", **changes):
    """A small decoder with weights large enough that its attention is far from uniform."""
    torch.manual_seed(0)
    model = kind(config(**{**SHAPE, **changes}, attn_implementation=attention))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return model.eval()


def register_both():
    """The attentions "muse", which approximates, and "muse-wide", which is exact."""
    register(CONFIG)
    register(WIDE, "muse-wide")


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def with_attention(model, name: str):
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other
