"""A Llama-like model in numbers: parameters, operations of its matrices, bytes of weights and activations."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from launch.config import ModelConfig
from launch.model import LOGITS
from muse_dist import MuseConfig

BUCKETS = 2 * 4.0 * 500_000_000  # bytes of gradients that ZeRO 1 and 2 collect: two buckets of DeepSpeed's default size
OPTIMIZER_BYTES = 40  # read and written of a parameter in a step: 12 to clip its gradient, 28 by AdamW
LOGIT_BYTES = 12  # of a logit while its loss is computed: bf16 and fp32, and the gradients of both, not all at once
LIVE = 0.8  # of what a layer keeps, at most there with the gradients that take its place as its backward goes on
GRAPHS = 6  # times q, k and v of a layer: what MuSe with CUDA graphs held beyond exact attention
# These three were chosen by the steps of launch/results/2026-11-22-scaling.jsonl.


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with tied embeddings."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, model: ModelConfig) -> Shape:
        """ValueError where the vocabulary is the data's, which nobody knows here."""
        if not model.vocabulary:
            raise ValueError("model.vocabulary=0 takes the size from the data; give it, such as "
                             "--set model.vocabulary=32000")
        return cls(model.layers, model.width, model.heads, model.kv_heads, model.mlp, model.vocabulary)

    @property
    def dim(self) -> int:
        """Head dim."""
        return self.width // self.heads

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer that multiply every token."""
        return self.width * ((2 * self.heads + 2 * self.kv_heads) * self.dim + 3 * self.mlp)

    @property
    def parameters(self) -> int:
        """All weights: embedding, layers with two norms each, and the last norm."""
        return (self.vocabulary * self.width + self.layers * (self.layer_matrices + 2 * self.width) + self.width)

    def forward_flops(self) -> tuple[float, float]:
        """Operations a token of the layers' matrices, and of the logits; a backward takes twice as many."""
        return 2.0 * self.layers * self.layer_matrices, 2.0 * self.vocabulary * self.width

    def step_flops(self, tokens: int, local: int, recompute: bool) -> float:
        """Operations of the matrices in a step over `tokens` tokens, of which a rank holds `local` of a sequence.

        Recomputed layers go forward twice, up to the last input that a backward needs, which is that of the MLP's last
        matrix; so do the logits where there are too many to keep.
        """
        layers, logits = self.forward_flops()
        again = layers - 2.0 * self.layers * self.width * self.mlp if recompute else 0.0
        return tokens * (3 * layers + again + logits * (4 if local > LOGITS else 3))

    def layer_bytes(self, muse: MuseConfig | None) -> float:
        """Bytes a token that one layer keeps for its backward, under bf16 autocast.

        Two norms keep input and result in fp32, five matrix products a bf16 copy of their input each, the MLP four
        tensors, attention q, k, v, out and log-sum-exp; MuSe its orders and opened leaves as int64 too.
        """
        kept = 26.0 * self.width + 8 * self.mlp + 4 * (self.heads + self.kv_heads) * self.dim + 4 * self.heads + 8
        if muse is not None:
            slots = (muse.opened + muse.sinks) / muse.group
            kept += 8 * self.kv_heads + 8 * self.heads + 8 * self.heads * slots
        return kept


class Scheme(NamedTuple):
    """What GPUs do with a model's state, in bytes of a parameter: AdamW's two moments are 8, fp32 weights 4."""

    whole: float  # held by every GPU
    split: float  # held by all GPUs together
    weights: float  # received by a GPU in a step, or in every pass if weights are split
    gradients: float  # received by a GPU in a step


# By what `launch.train` does. ZeRO 1 and 2 update an fp32 copy of the weights; Megatron's weights are bf16 beside it.
SCHEMES = {
    "whole": Scheme(16, 0, 0, 8),  # torch: gradients are summed everywhere
    "sharded": Scheme(0, 16, 4, 4),  # torch's FSDP, ZeRO 3: bf16 weights travel forward and backward
    "zero1": Scheme(8, 12, 4, 4),
    "zero2": Scheme(4, 16, 4, 4),
    "megatron": Scheme(6, 12, 2, 4),
}


@dataclass(frozen=True)
class Memory:
    """Bytes a GPU needs at its peak."""

    state: float  # weights, gradients, optimizer
    copies: float  # weights in bf16, buckets of gradients, layers that were gathered, what CUDA graphs hold
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.copies + self.activations + self.logits


def memory(
    shape: Shape, muse: MuseConfig | None, tokens: int, *, world: int, scheme: str, recompute: bool, passes: int = 1
) -> Memory:
    """What a GPU holds that reads `tokens` tokens at a time, when it holds most: at the loss, or in a layer's backward.

    Args:
        world: all ranks, over which the scheme of that name splits the state.
        passes: how often a step goes forward and backward; in the first one there are no gradients yet at the loss.
    """
    state = (SCHEMES[scheme].whole + SCHEMES[scheme].split / world) * shape.parameters
    new = {"whole": 4.0, "sharded": 4.0 / world}.get(scheme, 0.0) * shape.parameters if passes == 1 else 0.0
    casts = 2.0 * shape.parameters  # autocast's bf16 weights, until the forward ends
    copies = graphs = 0.0
    if muse is not None and muse.cuda_graphs:
        graphs = GRAPHS * 2.0 * tokens * (shape.heads + 2 * shape.kv_heads) * shape.dim
    if scheme == "sharded":  # two layers and the embedding are there whole, in bf16
        casts, copies = 0.0, 2.0 * (2 * shape.layer_matrices + shape.vocabulary * shape.width) * 2
    elif scheme == "megatron":
        casts = 0.0
    elif scheme != "whole":
        copies = BUCKETS
    elif world > 1:
        copies = 4.0 * shape.parameters
        casts += copies  # DDP makes its buckets anew in the second step; in most rows the old ones were still there
    layer = tokens * shape.layer_bytes(muse)
    between = 2.0 if scheme == "megatron" else 4.0  # bytes of a number between layers, which autocast leaves in fp32
    kept = tokens * shape.layers * between * shape.width if recompute else shape.layers * layer
    logits = float(min(tokens, LOGITS) * shape.vocabulary * LOGIT_BYTES)
    at_loss = Memory(state - new, casts + copies + graphs, kept, logits)
    in_layer = Memory(state, copies + graphs, kept + (LIVE * layer if recompute else 0.0), 0.0)
    return max(at_loss, in_layer, key=lambda found: found.total)
