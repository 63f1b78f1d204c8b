"""Exact attention of some query rows, forward and backward, to hold fast or approximate attention against.

The loss is taken over the chosen rows alone: then their share of the gradients of all keys and values is cheap at any
length, and exact.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Results of R query rows: out and dq [B, H, R, D]; dk and dv [B, K, N, D] of a loss over these rows."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Window(NamedTuple):
    """Keys that a query sees: its own block of tokens and `halo` blocks before it (on both sides when acausal)."""

    block: int
    halo: int


def choose_rows(tokens: int, count: int, device: torch.device) -> Tensor:
    """Places of `count` query rows, or of all if there are fewer: int64 [R], ascending, the same at every call."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    return order[:count].sort().values.to(device)


def only_rows(dout: Tensor, rows: Tensor) -> Tensor:
    """dout [B, H, N, D] with zeros outside the rows."""
    return torch.zeros_like(dout).index_copy_(2, rows, dout.index_select(2, rows))


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Tensor, causal: bool, window: Window | None = None
) -> Rows:
    """Softmax attention of chosen rows in fp32 (fp64 for fp64 inputs), a head at a time.

    Args:
        q, dout: [B, H, N, D]; k, v: [B, K, N, D]; rows: int64 [R].
        window: what queries see, besides what `causal` says; everything if None.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    group = q.shape[1] // k.shape[1]
    hidden = _hidden(rows, k.shape[2], causal, window)
    q, dout = (x.index_select(2, rows) for x in (q, dout))
    out, dq = (torch.empty(q.shape, dtype=dtype, device=q.device) for _ in range(2))
    dk, dv = (torch.zeros(k.shape, dtype=dtype, device=q.device) for _ in range(2))
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            at, kv = (batch, head), (batch, head // group)
            query, key, value, grad = (x.to(dtype) for x in (q[at], k[kv], v[kv], dout[at]))
            weight = (scale * query @ key.mT).masked_fill_(hidden, -torch.inf).softmax(-1)
            out[at] = weight @ value
            dv[kv] += weight.mT @ grad
            d_logit = scale * weight * (grad @ value.mT - (grad * out[at]).sum(-1, keepdim=True))
            dq[at] = d_logit @ key
            dk[kv] += d_logit.mT @ query
    return Rows(out, dq, dk, dv)


def _hidden(rows: Tensor, tokens: int, causal: bool, window: Window | None) -> Tensor:
    """bool [R, N]: which keys a row does not see."""
    keys = torch.arange(tokens, device=rows.device)
    hidden = keys > rows[:, None] if causal else torch.zeros(len(rows), tokens, dtype=torch.bool, device=rows.device)
    if window is not None:
        hidden |= (rows[:, None] // window.block - keys // window.block).abs() > window.halo
    return hidden


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, NaN where anything is."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()


def squared_errors(found: Rows, wanted: Rows) -> dict[str, float]:
    """Relative squared error |found - wanted|^2 / |wanted|^2 of each result."""
    return {name: relative(getattr(found, name), getattr(wanted, name)) ** 2 for name in Rows._fields}


def cosines(found: Rows, wanted: Rows) -> dict[str, float]:
    """Cosine of the angle between found and wanted, for each result."""
    pairs = {name: (getattr(found, name).double().flatten(), getattr(wanted, name).double().flatten())
             for name in Rows._fields}
    return {name: (a @ b / (a.norm() * b.norm())).item() for name, (a, b) in pairs.items()}
