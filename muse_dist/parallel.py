"""Attention over a sequence that context-parallel ranks share: one differentiable function around the two exchanges."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from muse_dist import exchange_kv, exchange_moments
from muse_dist.comm import Communicator
from muse_dist.compute import working
from muse_dist.config import MuseConfig
from muse_dist.graphs import replayed
from muse_dist.kernels.plain_blocks import Moments
from muse_dist.layout import Layout, LayoutName
from muse_dist.remote import ChunkAnchors
from muse_dist.shard import Shard
from muse_dist.tree import Plan


def make_shard(
    q: Tensor, k: Tensor, v: Tensor, config: MuseConfig, scale: float, comm: Communicator, layout: LayoutName,
    problem: str | None,
) -> Shard:
    """What a call on local shards q [B, H, S, D], k and v [B, K, S, D] needs to know, agreed on with the other ranks.

    `problem` is what this rank's own checks found, so that all ranks hear of it instead of waiting for this one.
    Raises ValueError on every rank if any has a problem or calls with other shapes, dtypes or settings.
    """
    described = None
    if problem is None:
        try:
            described = Layout(layout, comm.size, q.shape[2] * comm.size, config.block)
        except ValueError as error:
            problem = str(error)
    # Sizes of this rank's own call; all ranks must say the same.
    backward = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v))
    comm.agree(f"q {_describe(q)}, k {_describe(k)}, {layout}, scale={scale:.9g}, {backward=}, {config}", problem)
    assert described is not None
    return Shard(comm, described, config, scale, q.dtype)


def _describe(x: Any) -> str:
    return f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


class ParallelAttention(torch.autograd.Function):
    """Attention of a rank's queries to the keys of all ranks; the backward mirrors the forward's exchanges."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> Tensor:  # type: ignore[override]
        """q [B, H, S, D], k and v [B, K, S, D] of one dtype -> [B, H, S, D]."""
        out, *rest = _run(_forward, shard, q, k, v)
        ctx.shard = shard
        ctx.save_for_backward(q, k, v, out, *rest)
        return out

    @staticmethod
    @once_differentiable  # second derivatives are refused, not wrong
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of q, k and v."""
        return (*_run(_backward, ctx.shard, dout, *ctx.saved_tensors), None)


def _run(function: Callable[..., list[Tensor]], shard: Shard, *tensors: Tensor) -> list[Tensor]:
    """function(shard, *tensors), from CUDA graphs if the settings say so."""
    call = functools.partial(function, shard)
    if not shard.config.cuda_graphs:
        return call(*tensors)
    return replayed((function.__name__, shard.layout, shard.config, shard.scale), call, tensors, shard.comm)


def _forward(shard: Shard, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output, its log-sum-exp and what else the backward needs."""
    mode = exchange_moments if shard.config.exchange == "moments" else exchange_kv
    with torch.autocast(q.device.type, enabled=False):
        out, lse, saved = mode.forward(shard, *working(q, k, v, shard.config))
        return [out.flatten(1, 2).to(q.dtype), lse, *_flatten(saved)]


def _backward(
    shard: Shard, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Tensor
) -> list[Tensor]:
    """Gradients of q, k and v."""
    mode = exchange_moments if shard.config.exchange == "moments" else exchange_kv
    with torch.autocast(q.device.type, enabled=False):
        rows, keys, values = working(q, k, v, shard.config)
        dout, out = (x.contiguous().to(rows.dtype).unflatten(1, rows.shape[1:3]) for x in (dout, out))
        saved = _unflatten(list(rest))
        dq, dk, dv = mode.backward(shard, dout, rows, keys, values, out, lse, saved)  # type: ignore[arg-type]
        return [dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)]


def _flatten(saved: exchange_kv.Saved | exchange_moments.Saved) -> list[Tensor]:
    """Tensors of a `Saved`, so that autograd can keep, offload and free them."""
    if isinstance(saved, exchange_kv.Saved):
        return [] if saved.plan is None else list(saved.plan)
    return [*saved.plan, *saved.anchors, saved.everyone, *saved.halo, *(x for leaf in saved.leaves for x in leaf)]


def _unflatten(tensors: list[Tensor]) -> exchange_kv.Saved | exchange_moments.Saved:
    """The inverse of `_flatten`."""
    if not tensors:
        return exchange_kv.Saved(None)
    plan = Plan(*tensors[:4])
    if len(tensors) == 4:
        return exchange_kv.Saved(plan)
    leaves = [Moments(*four) for four in zip(*(tensors[9 + i::4] for i in range(4)))]
    return exchange_moments.Saved(plan, ChunkAnchors(*tensors[4:6]), tensors[6], (tensors[7], tensors[8]), leaves)
