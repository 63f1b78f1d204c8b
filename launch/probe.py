"""What the attention of a live model does: how far the approximation is from exact, and where the mass lies."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from launch.config import RunConfig
from launch.ranks import Ranks
from muse_dist import MuseConfig, muse_attention
from muse_dist.compute import working
from muse_dist.layout import Layout, block_count
from muse_dist.tree import has_far_field, open_blocks, order_blocks

if TYPE_CHECKING:
    from launch.engine import Engine

ROWS = 16  # query tokens of each rank that are compared with exact attention
SUMS = ("error", "exact", "near", "opened", "far", "rows", "not_finite", "q", "k", "v")  # added up over the ranks


class Captured(NamedTuple):
    """What one layer's attention was given, for one sequence."""

    q: Tensor  # [1, H, S, D] this rank's tokens
    k: Tensor  # [1, K, S, D]
    v: Tensor  # [1, K, S, D]
    scale: float


def sampled_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers` layers, spread evenly, the first and the last among them."""
    count = min(count, layers)
    return sorted({round(i * (layers - 1) / max(count - 1, 1)) for i in range(count)})


@torch.no_grad()
def probe_layers(
    engine: Engine, sequences: Tensor, config: RunConfig, ranks: Ranks, layers: Sequence[int],
) -> dict[str, dict[str, float | None]]:
    """Read the first of `sequences` int64 [B, n] once more and look at the attention of some layers.

    Every rank must call it; all get the same numbers.

    Args:
        engine: runs the model whose attention is looked at.
    Returns:
        by layer: "error" (of MuSe's output, relative to the norm of the exact one), the shares "near", "opened" and
        "far" of the exact softmax, "largest_logit", the root mean squares "q", "k" and "v", and how many of their
        entries are "not_finite". None for what is no number.
    """
    split = Layout(ranks.layout if ranks.size > 1 else "contiguous", ranks.size,
                   _whole(config, ranks), config.muse.block)
    positions = split.positions(ranks.rank) if ranks.size > 1 else None
    with engine.capture(layers) as found:
        engine.module(sequences[:1], positions)
    table = torch.stack([_statistics(found[layer], split, config.muse, ranks) for layer in layers]).double()
    everyone = table.new_zeros(ranks.world, *table.shape)
    everyone[ranks.world_rank] = table
    everyone = ranks.sum(everyone.float()).double()
    return {f"layer_{layer}": _named(everyone[:, i], ranks.world) for i, layer in enumerate(layers)}


def _whole(config: RunConfig, ranks: Ranks) -> int:
    """Tokens of a sequence; a single rank's short last block is counted as whole."""
    if ranks.size > 1:
        return config.data.context
    return block_count(config.data.context, config.muse.block) * config.muse.block


def _named(rows: Tensor, world: int) -> dict[str, float | None]:
    """Statistics [world, entries] of all ranks as one table."""
    sums = dict(zip(SUMS, rows[:, :-1].sum(0).tolist()))
    count = max(sums["rows"], 1.0)
    values = {"error": math.sqrt(sums["error"] / sums["exact"]) if sums["exact"] > 0 else math.nan,
              **{name: sums[name] / count for name in ("near", "opened", "far")},
              **{name: math.sqrt(sums[name] / world) if sums[name] >= 0 else math.nan for name in ("q", "k", "v")},
              "largest_logit": rows[:, -1].max().item(), "not_finite": sums["not_finite"]}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


@contextmanager
def capture(model: LlamaForCausalLM, layers: Sequence[int]) -> Iterator[dict[int, Captured]]:
    """Keep what the attention of `layers` is given, while the model runs as it is."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = model.config._attn_implementation
    inner, found = AttentionInterface()[name], {}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if module.layer_idx in layers:
            scale = options.get("scaling")
            # Autocast, which is over when the probe computes, leaves q, k and v in different dtypes.
            kind = query.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
            q, k, v = (x[:1].to(dtype) for x in (query, key, value))
            found[module.layer_idx] = Captured(q, k, v, query.shape[-1] ** -0.5 if scale is None else scale)
        return inner(module, query, key, value, mask, **options)

    AttentionInterface.register("muse_probe", attention)
    AttentionMaskInterface.register("muse_probe", AttentionMaskInterface()[name])
    model.set_attn_implementation("muse_probe")
    try:
        yield found
    finally:
        model.set_attn_implementation(name)


def _statistics(layer: Captured, split: Layout, config: MuseConfig, ranks: Ranks) -> Tensor:
    """This rank's `SUMS` and its largest logit: fp32 [11]."""
    out = muse_attention(layer.q, layer.k, layer.v, config=config, scale=layer.scale, group=ranks.group,
                         layout=ranks.layout)
    keys, values = (_join(x, split, ranks).float() for x in (layer.k, layer.v))
    rows = torch.linspace(0, layer.q.shape[2] - 1, ROWS, device=out.device).round().long().unique()
    places = split.positions(ranks.rank).to(out.device)[rows]
    heads = layer.q.shape[1] // keys.shape[1]
    read = _read_exactly(layer, rows, split, config, ranks)[..., :keys.shape[2]]
    own = places // config.block
    block = torch.arange(keys.shape[2], device=out.device) // config.block
    near = (block <= own[:, None]) & (block >= own[:, None] - config.halo)
    error, exact, mass = (torch.zeros(n, device=out.device).squeeze() for n in (1, 1, 3))
    largest = -math.inf
    for head in range(layer.q.shape[1]):  # one at a time: rows x keys numbers
        q, k = layer.q[0, head, rows].float(), head // heads
        logits = layer.scale * q @ keys[0, k].T
        logits = logits.masked_fill(torch.arange(keys.shape[2], device=out.device) > places[:, None], -math.inf)
        p = logits.softmax(-1)
        wanted = p @ values[0, k]
        error += (out[0, head, rows].float() - wanted).square().sum()
        exact += wanted.square().sum()
        opened = p.masked_fill(near | ~read[head], 0.0).sum()
        close = p.masked_fill(~near, 0.0).sum()
        mass += torch.stack([close, opened, p.sum() - close - opened])
        largest = max(largest, logits.max().item())
    given = (layer.q, layer.k, layer.v)
    return torch.stack([torch.as_tensor(x, dtype=torch.float32, device=out.device) for x in (
        error, exact, *mass, layer.q.shape[1] * len(rows), sum((~x.isfinite()).sum() for x in given),
        *(x.float().square().mean() for x in given), largest)])


def _join(x: Tensor, split: Layout, ranks: Ranks) -> Tensor:
    """[1, K, S, D] of all ranks as [1, K, N, D]."""
    return x if ranks.size == 1 else split.join(ranks.gather(x), 2)


def _read_exactly(layer: Captured, rows: Tensor, split: Layout, config: MuseConfig, ranks: Ranks) -> Tensor:
    """bool [H, rows, N]: the far keys that the groups of some query rows opened, and the sinks."""
    heads, tokens = layer.q.shape[1], split.tokens
    read = torch.zeros(heads, len(rows), tokens, dtype=torch.bool, device=layer.q.device)
    read[..., :config.sinks * config.leaf] = True
    if not has_far_field(tokens, config):
        return read
    if ranks.size > 1 and config.exchange == "kv":
        q, k = _join(layer.q, split, ranks), _join(layer.k, split, ranks)
        blocks, rows = list(range(tokens // config.block)), split.positions(ranks.rank).to(rows.device)[rows]
    else:
        q, k, blocks = layer.q, layer.k, split.blocks_of(ranks.rank)
    queries, keys, _ = working(q, k, k, config)
    shared = ranks.size > 1 and config.exchange == "moments"
    plan = order_blocks(queries, keys, config, min(config.leaf, config.remote_leaf) if shared else config.leaf,
                        blocks[0] == 0)
    opened = open_blocks(queries, keys, plan, blocks, blocks, config, layer.scale)
    starts = torch.tensor(blocks, device=rows.device)[:, None] * config.block
    leaves = (plan.key_order[0] + starts).flatten(1).unflatten(1, (-1, config.leaf))  # [K, J, m] places of keys
    place = plan.query_order[0].argsort(-1)  # [K, n, G * b] where each row of a block is in the order of groups
    share = heads // leaves.shape[0]
    for head in range(heads):
        k_head, row = head // share, head % share * config.block + rows % config.block
        group = place[k_head, rows // config.block, row] // config.group
        chosen = opened[0, k_head, rows // config.block, group]  # [rows, O]
        for i, leaf in enumerate(chosen):
            read[head, i, leaves[k_head, leaf[leaf >= 0]].flatten().clamp(max=tokens - 1)] = True
    return read
