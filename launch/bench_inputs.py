"""Queries, keys and values to measure attention on: those of a trained model, or Gaussian noise."""
from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist import MuseConfig

NAME = "muse-captured"


class Shape(NamedTuple):
    """q [1, H, N, D], k and v [1, K, N, D]."""

    heads: int
    kv_heads: int
    tokens: int
    dim: int


@dataclass(frozen=True)
class Inputs:
    """Of the whole sequence; `source` says where they come from."""

    q: Tensor  # [1, H, N, D]
    k: Tensor  # [1, K, N, D]
    v: Tensor  # [1, K, N, D]
    dout: Tensor  # [1, H, N, D]
    source: str


def make_inputs(shape: Shape, model: TrainedHeads | None, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Trained q, k and v if the model has heads of this dim and grouping, else Gaussian; the same on every rank."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, shape.tokens, shape.dim, generator=generator, device=device, dtype=dtype)

    dout = normal(shape.heads)
    if model is not None and model.fits(shape):
        q, k, v = (x.to(device=device, dtype=dtype) for x in model.capture(shape))
        return Inputs(q, k, v, dout, model.describe(shape))
    return Inputs(normal(shape.heads), normal(shape.kv_heads), normal(shape.kv_heads), dout, "gaussian")


class TrainedHeads:
    """Heads of a trained model's layers on its validation tokens, after the rotary embedding."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """`folder` as in launch.evaluate. Raises ValueError if there is no model."""
        from launch.trained import load

        model, self.tokens = load(folder, [])
        self.model = model.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.context: int = config.max_position_embeddings

    def fits(self, shape: Shape) -> bool:
        """Whether the model has such heads: the same dim, as many queries' heads a key's."""
        return self.dim == shape.dim and self.heads * shape.kv_heads == self.kv_heads * shape.heads

    def describe(self, shape: Shape) -> str:
        """Which layers, and how many windows of the context stand one after the other."""
        layers = ",".join(map(str, self._chosen(shape)))
        windows = ceil(shape.tokens / self.context)
        return f"trained (layers {layers}" + (f"; {windows} windows)" if windows > 1 else ")")

    def _chosen(self, shape: Shape) -> list[int]:
        """Layers spread evenly over the depth, as many as it takes to get the heads."""
        count = ceil(shape.heads / self.heads)
        return [int((i + 0.5) * self.layers / count) for i in range(count)]

    @torch.no_grad()
    def capture(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """q [1, H, N, D], k and v [1, K, N, D]: heads of several layers side by side.

        A sequence longer than the model's context is made of windows, each with positions of its own.
        """
        from launch.trained import cut
        from muse_dist.huggingface import register

        length = min(shape.tokens, self.context)
        caught: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        chosen = self._chosen(shape)

        def probe(q: Tensor, k: Tensor, v: Tensor, *, config: MuseConfig, scale: float | None) -> Tensor:
            caught[-1].append((q if scale is None else q * (scale * self.dim ** 0.5), k, v))
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

        register(MuseConfig(), NAME, probe)
        self.model.set_attn_implementation(NAME)
        for window in cut(self.tokens, ceil(shape.tokens / length), length):
            caught.append([])
            self.model.base_model(window[:, :-1].to(self.model.device), use_cache=False)
            caught[-1] = [caught[-1][layer] for layer in chosen]
        q, k, v = (torch.cat([torch.cat([layer[i] for layer in window], 1) for window in caught], 2)
                   for i in range(3))
        return (q[:, :shape.heads, :shape.tokens].contiguous(), k[:, :shape.kv_heads, :shape.tokens].contiguous(),
                v[:, :shape.kv_heads, :shape.tokens].contiguous())
