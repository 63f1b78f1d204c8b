"""What a training step will cost in the layers with MuSe, against exact attention: bytes and FLOPs, before it runs."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch

from muse_dist.config import MuseConfig
from muse_dist.flops import opened_at_most
from muse_dist.layout import Layout, block_count
from muse_dist.megatron_patch.options import Choice, show_layers
from muse_dist.traffic import traffic

# A backward does 5 matrix products for the 2 of a forward: the logits are computed again.
TRAINING = 3.5


class Step(NamedTuple):
    """One optimizer step, and the ranks it is spread over."""

    sequences: int  # of all data-parallel ranks together
    micro_batch: int
    tokens: int  # of a sequence
    layers: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    tensor_ranks: int
    context_ranks: int
    pipeline_ranks: int
    data_ranks: int


def read_step(args: Any, world_size: int) -> Step | None:
    """The step that Megatron-LM's parsed arguments describe; None if they leave its shape to a checkpoint."""
    needed = (args.num_layers, args.hidden_size, args.num_attention_heads, args.seq_length, args.micro_batch_size)
    if None in needed:
        return None
    layers, width, heads, tokens, micro_batch = needed
    ranks = args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size
    data_ranks = max(1, world_size // ranks)
    grouped = getattr(args, "group_query_attention", False)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return Step(
        args.global_batch_size or micro_batch * data_ranks, micro_batch, tokens, layers, heads,
        args.num_query_groups if grouped else heads, args.kv_channels or width // heads, dtype,
        args.tensor_model_parallel_size, args.context_parallel_size, args.pipeline_model_parallel_size, data_ranks)


def exact_flops(shape: tuple[int, int, int, int, int]) -> int:
    """FLOPs of the matrix products of causal attention, forward; shape (B, H, K, N, D) as in `traffic`."""
    batch, heads, _, tokens, dim = shape
    return batch * heads * 2 * tokens * (tokens + 1) * dim


def muse_flops(config: MuseConfig, shape: tuple[int, int, int, int, int], ranks: int) -> int:
    """The same for MuSe on `ranks` zigzag ranks together. Sorting keys and queries into leaves is left out."""
    batch, heads, kv_heads, tokens, dim = shape
    count = block_count(tokens, config.block)
    block = min(config.block, tokens)
    place = torch.arange(count)
    distance = place[:, None] - place
    far = distance > config.halo
    halo = ((distance > 0) & ~far).sum().item()
    with_far = far.any(1).sum().item()
    remote, remote_moments = torch.zeros_like(far), 0
    if ranks > 1 and config.exchange == "moments":
        layout = Layout("zigzag", ranks, tokens, config.block)
        owner = torch.tensor([layout.block_owner(i) for i in range(count)])
        remote = far & (owner[:, None] != owner)
        # A rank's anchors serve a whole chunk: a key meets them once for all the chunk's blocks.
        chunks = remote.view(layout.chunks, layout.chunk_blocks, count).any(1)
        remote_moments = int(chunks.sum().item()) * config.remote_anchors
    near, seen = int((far & ~remote).sum().item()), int(remote.sum().item())
    logits = count * block * (block + 1) // 2 + halo * block ** 2
    opened = min(opened_at_most(config), count * block // config.leaf)
    logits += with_far * block * config.leaf * (config.sinks + opened)
    logits += block ** 2 * near // config.leaf + block ** 2 * seen // config.remote_leaf
    moments = block * (near * config.anchors + remote_moments)
    return batch * dim * (4 * heads * int(logits) + 6 * kv_heads * moments)


def report(choice: Choice, step: Step | None) -> list[str]:
    """Lines that say what was chosen and what it will cost."""
    config, layers = choice
    every = "all" if step is None else f"1-{step.layers}"
    lines = [f"layers {every if layers is None else show_layers(layers)} use {config}"]
    if step is None:
        return [*lines, "no costs predicted: the model's shape is left to the checkpoint"]
    count = step.layers if layers is None else len(layers)
    shape = (step.micro_batch, step.heads, step.kv_heads, step.tokens, step.dim)
    share = count * step.sequences // step.micro_batch
    muse, exact = (TRAINING * share * flops
                   for flops in (muse_flops(config, shape, step.context_ranks), exact_flops(shape)))
    lines.append(f"a step of {step.sequences} sequences of {step.tokens} tokens, in these layers, all ranks: "
                 f"{muse:.3g} FLOPs of attention, against {exact:.3g} exact ({exact / muse:.2f} times as many)")
    if step.context_ranks > 1:
        lines.append(_bytes(config, step, share))
    return lines


def _bytes(config: MuseConfig, step: Step, share: int) -> str:
    heads, kv_heads = (max(1, x // step.tensor_ranks) for x in (step.heads, step.kv_heads))
    predicted = traffic(config, (step.micro_batch, heads, kv_heads, step.tokens, step.dim), step.context_ranks,
                        layout="zigzag", dtype=step.dtype)
    calls = share / step.data_ranks / step.pipeline_ranks
    muse = calls * sum(getattr(predicted, config.exchange).values())
    ring = calls * sum(predicted.ring.values())
    return (f"each of {step.context_ranks} context-parallel ranks receives {muse:.3g} bytes a step for it "
            f"(exchange {config.exchange}), against {ring:.3g} in a ring of exact attention "
            f"({ring / muse:.2f} times as many); activation recomputation comes on top")
