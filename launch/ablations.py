"""The method with parts of it left out: what each part is worth. Forward only, put together from the reference."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from muse_dist import MuseConfig, muse_attention
from muse_dist.attention import near_only
from muse_dist.checks import check_tensors
from muse_dist.compute import near_forward, working
from muse_dist.emulation import emulate_ranks
from muse_dist.kernels import plain_blocks, reference
from muse_dist.layout import LayoutName
from muse_dist.slabs import sight_of
from muse_dist.tree import arrange, has_far_field, make_plan, open_blocks

Far = Literal["none", "centroids", "tilted", "dipole"]


@dataclass(frozen=True)
class Variant:
    """One attention to try in a trained model: `function(q, k, v, config=config, scale=scale)`."""

    name: str
    about: str
    config: MuseConfig
    function: Callable[..., Tensor] = muse_attention


def ladder(config: MuseConfig) -> list[Variant]:
    """From the own block alone to the whole method with `config`, a part at a time; last, without semantic leaves."""
    plain = dataclasses.replace(config, trace=False)
    closed = dataclasses.replace(plain, opened=0)
    full = dataclasses.replace(config, trace=True)
    return [
        Variant("own", "own block only", dataclasses.replace(closed, halo=0), near_only),
        Variant("halo", "+ the halo blocks", closed, near_only),
        Variant("sinks", "+ the sink leaves", closed, partial(ablated, far="none")),
        Variant("centroids", "+ plain centroids of all far leaves", closed, partial(ablated, far="centroids")),
        Variant("tilted", "tilted moments without the dipole instead", closed, partial(ablated, far="tilted")),
        Variant("dipole", "+ the dipole", closed),
        Variant("opened", "+ opened leaves", plain),
        Variant("trace", "+ the trace: the whole method", full),
        Variant("positional", "the same, clusters by position", full, partial(ablated, positional=True)),
    ]


def across_ranks(whole: Variant, ranks: int, layout: LayoutName) -> list[Variant]:
    """One variant as `ranks` context-parallel ranks compute it, under each exchange mode."""
    split = partial(emulate_ranks, ranks=ranks, layout=layout)
    return [
        dataclasses.replace(whole, name=f"{whole.name} kv", about="keys and values of all ranks"),
        Variant(f"{whole.name} moments", "moments of other ranks' leaves", whole.config, split),
        Variant(f"{whole.name} alone", "halo and sinks, nothing else from other ranks", whole.config,
                partial(split, remote=False)),
    ]


@torch.no_grad()
def ablated(
    q: Tensor, k: Tensor, v: Tensor, *, config: MuseConfig, scale: float | None = None, far: Far = "dipole",
    positional: bool = False,
) -> Tensor:
    """`muse_attention` with parts left out; no gradients.

    Args:
        q: [B, H, N, D]; k, v: [B, K, N, D].
        far: what queries see of the leaves they do not open. "none": nothing. "centroids": the mean key and value of
            each leaf (moments about 0). "tilted": moments about the anchors, without the dipole term of the logit.
            "dipole": all of it, with the trace where `config` says so.
        positional: leaves are runs of consecutive tokens instead of semantic clusters.
    Returns:
        [B, H, N, D] in q's dtype.
    """
    if far not in get_args(Far):
        raise ValueError(f"far={far!r}: must be one of {', '.join(get_args(Far))}")
    scale = check_tensors(q, k, v, config, scale)
    config = config.plain()
    rows, keys, values = working(q, k, v, config)
    near, near_lse = near_forward(rows, keys, values, scale, config)
    if not has_far_field(q.shape[2], config):
        return near.reshape(q.shape).to(q.dtype)
    plan = make_plan(rows, keys, config, scale)
    count = plan.key_order.shape[2]
    if positional:
        plan = plan._replace(key_order=torch.arange(config.block, device=q.device).expand_as(plan.key_order))
        opened = open_blocks(rows, keys, plan, range(count), range(count), config, scale)
        plan = plan._replace(opened=opened)
    sight = sight_of(range(count), range(count), config, q.device)
    leaves_seen = plain_blocks.seen_blocks(sight).repeat_interleave(config.block // config.leaf, -1)
    blocks = arrange(plain_blocks, rows, keys, values, plan, config)
    out, lse = (plain_blocks.gather_tokens(x, plan.query_order).unflatten(3, (-1, config.group))
                for x in (near, near_lse[..., None]))
    for i in range(config.halo + 1, count) if config.causal else range(count):
        parts = _far_parts(blocks.q[:, :, i], plan.anchors[:, :, i], blocks.k, blocks.v, plan.opened[:, :, i],
                           leaves_seen[i], blocks.key_valid, scale, config.trace, far)
        out[:, :, i], _ = reference.merge([(out[:, :, i], lse[:, :, i, ..., 0]), *parts])
    out = plain_blocks.scatter_tokens(out.flatten(3, 4), plan.query_order, *rows.shape[2:4])
    return out.reshape(q.shape).to(q.dtype)


def _far_parts(
    q: Tensor, anchor: Tensor, k: Tensor, v: Tensor, opened: Tensor, seen: Tensor, valid: Tensor | None, scale: float,
    trace: bool, far: Far,
) -> list[tuple[Tensor, Tensor]]:
    """Partial softmaxes of one query block, shapes as in `reference`: opened leaves, and moments of the others."""
    parts = [reference.opened_leaves(q, k, v, opened, scale, valid)] if opened.shape[-1] else []
    if far == "none":
        return parts
    if far == "centroids":
        anchor = torch.zeros_like(anchor)
    leaf = reference.moments(anchor, k, v, scale, valid)
    if far == "tilted":
        leaf = leaf._replace(key=torch.zeros_like(leaf.key))
    hidden = reference.hidden_leaves(opened, seen)
    return [*parts, reference.far_field(q, anchor, leaf, hidden, scale, trace)]
