"""Multipole semantic attention: the function users call. On one device it is two opaque operators of PyTorch."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from muse_dist.checks import cast_dtype, check_backend, check_inputs
from muse_dist.comm import ByteCounter, Communicator, ProcessGroup
from muse_dist.compute import backward, forward, working
from muse_dist.config import MuseConfig
from muse_dist.flops import attend_backward_flops, attend_flops, plan_flops
from muse_dist.graphs import replayed
from muse_dist.layout import LayoutName, block_count
from muse_dist.parallel import ParallelAttention, make_shard
from muse_dist.tree import Plan, has_far_field, make_plan


def muse_attention(
    q: Tensor, k: Tensor, v: Tensor, *, config: MuseConfig, scale: float | None = None,
    group: ProcessGroup | None = None, layout: LayoutName = "contiguous", counter: ByteCounter | None = None,
) -> Tensor:
    """Multipole semantic attention, differentiable in q, k and v.

    Args:
        q: [B, H, N, D] queries; k, v: [B, K, N, D] keys and values, K dividing H: query head h reads key/value head
            h // (H / K). fp64, fp32, bf16 or fp16, any strides; sums and log-sum-exp are kept in fp32 or better.
        config: see `MuseConfig`.
        scale: factor of the dot products before the softmax; 1 / sqrt(D) if None.
        group: ranks that share the sequence; q, k and v then are this rank's N / P tokens, a whole number of blocks
            a chunk. Every rank of the group must call, with equal shapes and settings. None: one device.
        layout: which tokens a rank holds: "contiguous" chunk r of P, or "zigzag" chunks r and 2P-1-r of 2P.
        counter: adds up the bytes this rank receives, forward and backward, if given.
    Returns:
        [B, H, N, D] in q's dtype (under autocast, in its dtype). Exact attention if N is at most (1 + halo) * block.
    Raises:
        ValueError or TypeError that names the argument and the fix: on every rank of the group, if any rank's first
        call with such shapes and settings is wrong. A rank that differs later leaves the others to the timeout.
        RuntimeError that names the pending exchange if a rank dies or the timeout passes. (NCCL reports both from its
        own watchdog, which ends the process.)
    """
    if group is not None:
        return _parallel(q, k, v, config, scale, group, layout, counter)
    scale = check_inputs(q, k, v, config, scale)
    q, k, v = _autocast(q, k, v)
    return _one_device(q, k, v, config, scale)


def _one_device(q: Tensor, k: Tensor, v: Tensor, config: MuseConfig, scale: float) -> Tensor:
    settings = config.encoded
    plan = torch.ops.muse_dist.plan(q.detach(), k.detach(), scale, settings)
    return torch.ops.muse_dist.attend(q, k, v, *plan, scale, settings)[0]


@torch.compiler.disable
def _parallel(
    q: Tensor, k: Tensor, v: Tensor, config: MuseConfig, scale: float | None, group: ProcessGroup, layout: LayoutName,
    counter: ByteCounter | None,
) -> Tensor:
    """`muse_attention` on a rank's shard. Exchanges have an order that compilers must not change."""
    comm, problem, number = Communicator(group, counter), None, 1.0
    try:
        if counter is not None and not isinstance(counter, ByteCounter):
            raise TypeError(f"counter: must be a ByteCounter or None, not {type(counter).__name__}")
        number = check_inputs(q, k, v, config, scale)
        q, k, v = _autocast(q, k, v)
    except (ValueError, TypeError) as error:
        problem = str(error)
    shard = make_shard(q, k, v, config, number, comm, layout, problem)
    if comm.size == 1:
        return _one_device(q, k, v, config, number)
    return ParallelAttention.apply(q, k, v, shard)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan | None, config: MuseConfig, scale: float | None) -> Tensor:
    """`muse_attention` with the structure that `muse_dist.tree.make_plan` returned; None: there is no far field."""
    scale = check_inputs(q, k, v, config, scale)
    q, k, v = _autocast(q, k, v)
    return torch.ops.muse_dist.attend(q, k, v, *(_empty_plan(q) if plan is None else plan), scale, config.encoded)[0]


def near_only(q: Tensor, k: Tensor, v: Tensor, *, config: MuseConfig, scale: float | None = None) -> Tensor:
    """Attention to the own block and the halo alone, the baseline of far fields; shapes as in `muse_attention`."""
    return attend(q, k, v, None, config, scale)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, config: MuseConfig, scale: float | None = None,
    group: ProcessGroup | None = None, layout: LayoutName = "contiguous", counter: ByteCounter | None = None,
) -> Tensor:
    """Exact attention, for the layers of a model that do not use MuSe; arguments and errors as in `muse_attention`."""
    ranks = 1 if group is None else group.size()
    chunk = q.shape[2] // (2 if layout == "zigzag" and ranks > 1 else 1)
    return muse_attention(q, k, v, config=config.exact(q.shape[2] * ranks, chunk), scale=scale, group=group,
                          layout=layout, counter=counter)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = cast_dtype(q)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _empty_plan(q: Tensor) -> Plan:
    empty = torch.empty(0, dtype=torch.int64, device=q.device)
    return Plan(empty, empty.clone(), q.new_empty(0), empty.clone())


def _plan_or_none(plan: Plan) -> Plan | None:
    return plan if plan.key_order.numel() else None


def _run(function: Callable[..., list[Tensor]], tensors: Sequence[Tensor], scale: float, config: MuseConfig) -> Any:
    """function(*tensors, scale, config) as the tuple an operator returns, from CUDA graphs if the settings say so."""
    check_backend(tensors[0], config, tensors[0].dtype)

    def call(*inputs: Tensor) -> list[Tensor]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return [x.contiguous() for x in function(*inputs, scale, config)]

    if not config.cuda_graphs:
        return tuple(call(*tensors))
    return tuple(replayed((function.__name__, scale, config), call, tensors))


@torch.library.custom_op("muse_dist::plan", mutates_args=())
def _plan_op(q: Tensor, k: Tensor, scale: float, settings: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `Plan` of q [B, H, N, D] and k [B, K, N, D]; empty tensors where there is no far field."""
    config = MuseConfig.decode(settings)
    if not has_far_field(q.shape[2], config):
        return tuple(_empty_plan(q))  # type: ignore[return-value]
    return _run(_plan, (q, k), scale, config)  # type: ignore[no-any-return]


def _plan(q: Tensor, k: Tensor, scale: float, config: MuseConfig) -> list[Tensor]:
    rows, keys, _ = working(q, k, k, config)
    plan = make_plan(rows, keys, config, scale, q.dtype)
    return list(plan._replace(anchors=plan.anchors.to(q.dtype)))


@_plan_op.register_fake
def _(q: Tensor, k: Tensor, scale: float, settings: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = MuseConfig.decode(settings)
    if not has_far_field(q.shape[2], config):
        return tuple(_empty_plan(q))  # type: ignore[return-value]
    lead = (q.shape[0], k.shape[1], block_count(q.shape[2], config.block))
    rows = q.shape[1] // k.shape[1] * config.block
    leaves = lead[2] * (config.block // config.leaf)
    order = torch.empty(*lead, config.block, dtype=torch.int64, device=q.device)
    opened = (*lead, rows // config.group, config.sinks + min(config.opened, leaves))
    anchors = q.new_empty(*lead, config.anchors, q.shape[3])
    return order, order.new_empty(*lead, rows), anchors, order.new_empty(opened)


@torch.library.custom_op("muse_dist::attend", mutates_args=())
def _attend_op(
    q: Tensor, k: Tensor, v: Tensor, key_order: Tensor, query_order: Tensor, anchors: Tensor, opened: Tensor,
    scale: float, settings: str,
) -> tuple[Tensor, Tensor]:
    """Out [B, H, N, D] in q's dtype and lse [B, H, N] in the dtype of the arithmetic, for a structure."""
    tensors = (q, k, v, key_order, query_order, anchors, opened)
    return _run(_attend, tensors, scale, MuseConfig.decode(settings))  # type: ignore[no-any-return]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, key_order: Tensor, query_order: Tensor, anchors: Tensor, opened: Tensor,
    scale: float, config: MuseConfig,
) -> list[Tensor]:
    rows, keys, values = working(q, k, v, config)
    plan = _plan_or_none(Plan(key_order, query_order, anchors.to(rows.dtype), opened))
    out, lse = forward(rows, keys, values, plan, scale, config)
    return [out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])]


@_attend_op.register_fake
def _(q, k, v, key_order, query_order, anchors, opened, scale, settings):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("muse_dist::attend_backward", mutates_args=())
def _attend_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_order: Tensor, query_order: Tensor,
    anchors: Tensor, opened: Tensor, scale: float, settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B, H, N, D] and of k and v [B, K, N, D], given that of out."""
    tensors = (dout, q, k, v, out, lse, key_order, query_order, anchors, opened)
    return _run(_attend_backward, tensors, scale, MuseConfig.decode(settings))  # type: ignore[no-any-return]


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_order: Tensor, query_order: Tensor,
    anchors: Tensor, opened: Tensor, scale: float, config: MuseConfig,
) -> list[Tensor]:
    rows, keys, values = working(q, k, v, config)
    dout, out = (x.contiguous().to(rows.dtype).reshape(rows.shape) for x in (dout, out))
    plan = _plan_or_none(Plan(key_order, query_order, anchors.to(rows.dtype), opened))
    dq, dk, dv = backward(dout, rows, keys, values, out, lse.reshape(rows.shape[:4]), plan, scale, config)
    return [dq.reshape(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)]


@_attend_backward_op.register_fake
def _(dout, q, k, v, out, lse, key_order, query_order, anchors, opened, scale, settings):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale, ctx.settings = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout, _):  # type: ignore[no-untyped-def]
    q, k, v, *plan, out, lse = ctx.saved_tensors
    grads = torch.ops.muse_dist.attend_backward(dout, q, k, v, out, lse, *plan, ctx.scale, ctx.settings)
    return (*grads, None, None, None, None, None, None)


_attend_op.register_autograd(_differentiate, setup_context=_save_for_backward)
register_flop_formula(torch.ops.muse_dist.plan)(plan_flops)
register_flop_formula(torch.ops.muse_dist.attend)(attend_flops)
register_flop_formula(torch.ops.muse_dist.attend_backward)(attend_backward_flops)
