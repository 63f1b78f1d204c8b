"""Multipole semantic attention in plain PyTorch: every step of the method as one would explain it on a board.

The backward of a partial softmax takes the output and log-sum-exp of the *merged* softmax, through `lse` and
`delta = sum(dout * out)`:

    P = exp(logit - lse)        dlogit = P * (dout . value - delta)        dvalue = P^T dout

Shape legend: B batch, K key/value heads, G query heads per key/value head, D head dim; n blocks of b tokens, J leaves
of m keys, A anchors, U groups of g query rows, O opened leaves a group. `...` stands for any leading batch dimensions.
Arithmetic is done in the dtype given: callers pass fp32 or fp64. None of the functions changes its arguments.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from muse_dist.kernels.clustering import bisect, principal_axes
from muse_dist.kernels.leaf_moments import (
    NEG_INF, Acceptance, Moments, exp_from, merge_moments, moments, moments_backward, tilt,
)
from muse_dist.kernels.limits import probe_count

__all__ = [
    "Acceptance", "Moments", "bisect", "far_field", "far_field_backward", "hidden_leaves", "mean_rows", "merge",
    "merge_moments", "moment_errors", "moments", "moments_backward", "near_field", "near_field_backward",
    "open_leaves", "opened_leaves", "opened_leaves_backward", "principal_axes", "tilt",
]

UNSEEN = 0.1  # of a leaf's share: the error that a right mass does not show, as rows differ from their mean


# ------------------------------------------------------------------------------------------------------ opening leaves


def open_leaves(
    q: Tensor, k: Tensor, seen: Tensor, opened: int, sinks: int, scale: float, row_valid: Tensor | None = None,
    valid: Tensor | None = None, accept: Acceptance | None = None, near: Tensor | None = None,
) -> Tensor:
    """Choose the leaves every group of queries reads exactly: the sinks, and the `opened` others with most attention.

    A few probes stand for a group, the means of equal runs of its rows. A leaf's score is the share of its exact mass
    in the far field of a probe, added up over the probes. Shares, not masses: else the longest query would decide.
    With `accept`, the score is the error of `moment_errors`, averaged over the probes, and leaves whose score is below
    the tolerance stay closed.

    Args:
        q: sorted query rows [..., U, g, D]; k: leaves [..., J, m, D], of which 0 to sinks-1 are the sinks.
        seen: bool [J], leaves in the far field of these queries.
        row_valid: bool [..., U, g], which rows exist; valid: bool [J, m], which keys exist; all if None.
        accept: about anchors [..., A, D]; near: bool [J], leaves that these queries read exactly anyway.
    Returns:
        int64 [..., U, sinks + min(opened, J)]: leaf ids, all different; -1 where there is nothing left to open.
    """
    size, count = q.shape[-2], k.shape[-3]
    runs = probe_count(size, accept is not None)
    if row_valid is None:
        row_valid = torch.ones(q.shape[:-1], dtype=torch.bool, device=q.device)
    row_valid = row_valid.unflatten(-1, (runs, -1))
    probe = mean_rows(q.unflatten(-2, (runs, -1)), row_valid)  # [..., U, runs, D]
    candidate = seen & (torch.arange(count, device=q.device) >= sinks)
    if valid is not None:
        candidate = candidate & valid.any(-1)
    mass, _ = tilt(probe.flatten(-3, -2), k, scale, valid)
    live = row_valid.any(-1, keepdim=True)
    if accept is None:
        share = mass.masked_fill(~candidate, NEG_INF).log_softmax(-1).unflatten(-2, probe.shape[-3:-1])
        score = share.masked_fill(~live, NEG_INF).logsumexp(-2)  # [..., U, J]
        score = score.nan_to_num(nan=torch.finfo(score.dtype).min)
    else:
        mass = mass.masked_fill(~(seen if near is None else seen | near), NEG_INF)
        errors = moment_errors(probe, mass, accept, scale).masked_fill(~live, 0.0)
        score = errors.sum(-2) / live.sum(-2).clamp(min=1)
        candidate = candidate & (score >= accept.tolerance)  # false for errors that are no numbers
    score = torch.where(candidate, score, NEG_INF)
    best, leaf = score.sort(dim=-1, descending=True, stable=True)
    chosen = torch.where(best > NEG_INF, leaf, -1)[..., :min(opened, count)]
    first = torch.arange(sinks, device=q.device)
    first = torch.where(seen[first], first, -1).expand(*chosen.shape[:-1], sinks)
    return torch.cat([first, chosen], -1)


def moment_errors(probe: Tensor, mass: Tensor, accept: Acceptance, scale: float) -> Tensor:
    """The share of a probe's attention that the moments of a leaf get wrong: [..., U, runs, J].

    That is how far a leaf's share by its moments is from its exact one, and UNSEEN of the latter.

    Args:
        probe: [..., U, runs, D]; mass: exact log masses [..., U * runs, J] of all leaves at hand, -inf for others.
    """
    logit, _, _ = _far_logits(probe, accept.anchor, accept.leaf, None, scale, accept.trace)
    whole = mass.logsumexp(-1, keepdim=True)
    exact = exp_from(mass, whole)
    wrong = (exp_from(logit.flatten(-3, -2), whole).clamp(max=1.0) - exact).abs() + UNSEEN * exact
    return wrong.unflatten(-2, probe.shape[-3:-1])


def mean_rows(q: Tensor, row_valid: Tensor | None) -> Tensor:
    """Mean of the existing, finite rows of [..., g, D]; 0 where there is none. A NaN query must not reach others."""
    use = q.isfinite().all(-1, keepdim=True)
    if row_valid is not None:
        use = use & row_valid[..., None]
    return torch.where(use, q, 0.0).sum(-2) / use.sum(-2).clamp(min=1)


def hidden_leaves(opened: Tensor, seen: Tensor) -> Tensor:
    """Leaves a group must not see in its far field: opened [..., U, O], seen [J] -> bool [..., U, J]."""
    count = seen.shape[-1]
    marks = torch.zeros(*opened.shape[:-1], count + 1, dtype=torch.bool, device=opened.device)
    marks.scatter_(-1, torch.where(opened < 0, count, opened), True)  # column J takes the empty slots
    return marks[..., :count] | ~seen


# --------------------------------------------------------------------------------------------------- partial softmaxes


def near_field(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pairs: Sequence[tuple[int, int, bool]], block: int
) -> tuple[Tensor, Tensor]:
    """Exact attention of query blocks to key blocks.

    Args:
        q: [B, K, G, S, D]; k, v: [B, K, T, D]; the last block of either may be short.
        pairs: (query block, key block, whether the pair is the causal diagonal), counted inside q and k.
    Returns:
        out [B, K, G, S, D] and lse [B, K, G, S]; 0 and -inf for queries that have no pair.
    """
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], NEG_INF)
    for rows, spans, logit in _near_logits(q, k, scale, pairs, block):
        lse[..., rows] = logit.logsumexp(-1)
        out[..., rows, :] = exp_from(logit, lse[..., rows, None]) @ _read(v, spans)
    return out, lse


def near_field_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    pairs: Sequence[tuple[int, int, bool]], block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `near_field`, with out [B, K, G, S, D] and lse [B, K, G, S] of the merged softmax."""
    delta = (dout * out).sum(-1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, spans, logit in _near_logits(q, k, scale, pairs, block):
        p = exp_from(logit, lse[..., rows, None])
        d_logit = p * (dout[..., rows, :] @ _read(v, spans).mT - delta[..., rows, None])
        dq[..., rows, :] = scale * d_logit @ _read(k, spans)
        sizes = [span.stop - span.start for span in spans]
        for span, d_part, p_part in zip(spans, d_logit.split(sizes, -1), p.split(sizes, -1)):
            dk[:, :, span] += scale * (d_part.mT @ q[..., rows, :]).sum(2)
            dv[:, :, span] += (p_part.mT @ dout[..., rows, :]).sum(2)
    return dq, dk, dv


def _read(x: Tensor, spans: Sequence[slice]) -> Tensor:
    """The tokens of some slices of [B, K, T, D], shared by the query heads: [B, K, 1, tokens, D]."""
    return torch.cat([x[:, :, span] for span in spans], 2)[:, :, None]


def _near_logits(
    q: Tensor, k: Tensor, scale: float, pairs: Sequence[tuple[int, int, bool]], block: int
) -> Iterator[tuple[slice, list[slice], Tensor]]:
    """Yield (query slice, key slices, logits [B, K, G, queries, keys]) for every query block that has keys."""
    by_query: dict[int, list[tuple[slice, bool]]] = {}
    for i, j, diagonal in pairs:
        span = slice(j * block, min((j + 1) * block, k.shape[-2]))
        by_query.setdefault(i, []).append((span, diagonal))
    for i, blocks in by_query.items():
        rows = slice(i * block, min((i + 1) * block, q.shape[-2]))
        spans = [span for span, _ in blocks]
        logit = scale * q[..., rows, :] @ _read(k, spans).mT
        at = 0
        for span, diagonal in blocks:
            part = logit[..., at:at + span.stop - span.start]
            at += part.shape[-1]
            if diagonal:
                part.masked_fill_(torch.ones_like(part[0, 0, 0], dtype=torch.bool).triu(1), NEG_INF)
        yield rows, spans, logit


def far_field(
    q: Tensor, anchor: Tensor, leaf: Moments, hidden: Tensor | None, scale: float, trace: bool
) -> tuple[Tensor, Tensor]:
    """Attention of groups of query rows to the moments of leaves.

    Args:
        q: [..., U, g, D]; anchor: [..., A, D], anchor a serves groups a*U/A to (a+1)*U/A - 1.
        leaf: moments about these anchors; hidden: bool [..., U, J], leaves a group leaves out; none if None.
    Returns:
        out [..., U, g, D] and lse [..., U, g]; 0 and -inf where every leaf is hidden or empty.
    """
    logit, _, _ = _far_logits(q, anchor, leaf, hidden, scale, trace)
    lse = logit.logsumexp(-1)
    out = exp_from(logit, lse[..., None]) @ leaf.value
    return out.flatten(-3, -2).unflatten(-2, q.shape[-3:-1]), lse.flatten(-2).unflatten(-1, q.shape[-3:-1])


def far_field_backward(
    dout: Tensor, q: Tensor, anchor: Tensor, leaf: Moments, hidden: Tensor | None, lse: Tensor, delta: Tensor,
    scale: float, trace: bool,
) -> tuple[Tensor, Moments]:
    """Gradients of `far_field` for q and for the moments, with lse and delta [..., U, g] of the merged softmax."""
    parts = anchor.shape[-2]
    logit, step, square = _far_logits(q, anchor, leaf, hidden, scale, trace)  # [..., A, rows, J]
    dout, lse, delta = (_by_part(x, parts) for x in (dout, lse[..., None], delta[..., None]))
    p = exp_from(logit, lse)
    d_logit = p * (dout @ leaf.value.mT - delta)
    dq = scale * d_logit @ leaf.key
    d_trace = torch.zeros_like(leaf.trace)
    if trace:
        dq = dq + scale ** 2 * step * (d_logit @ leaf.trace[..., None])
        d_trace = 0.5 * scale ** 2 * (d_logit * square).sum(-2)
    grad = Moments(d_logit.sum(-2), scale * d_logit.mT @ step, p.mT @ dout, d_trace)
    return dq.flatten(-3, -2).unflatten(-2, q.shape[-3:-1]), grad


def _by_part(x: Tensor, parts: int) -> Tensor:
    """Group rows [..., U, g, D] -> [..., A, U/A * g, D]."""
    return x.flatten(-3, -2).unflatten(-2, (parts, -1))


def _far_logits(
    q: Tensor, anchor: Tensor, leaf: Moments, hidden: Tensor | None, scale: float, trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [..., A, rows, J], the steps q - a [..., A, rows, D] and their squared lengths [..., A, rows, 1]."""
    parts = anchor.shape[-2]
    step = _by_part(q, parts) - anchor[..., None, :]
    square = step.square().sum(-1, keepdim=True)
    logit = leaf.mass[..., None, :] + scale * step @ leaf.key.mT
    if trace:
        logit = logit + 0.5 * scale ** 2 * square * leaf.trace[..., None, :]
    if hidden is not None:
        logit = logit.masked_fill(_by_part(hidden[..., None, :].expand(*q.shape[:-1], -1), parts), NEG_INF)
    return logit, step, square


def opened_leaves(
    q: Tensor, k: Tensor, v: Tensor, opened: Tensor, scale: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact attention of groups of query rows to the leaves each has opened.

    Args:
        q: [..., U, g, D]; k, v: [..., J, m, D]; opened: int64 [..., U, O], -1 for an empty slot; valid: bool [J, m].
    Returns:
        out [..., U, g, D] and lse [..., U, g]; 0 and -inf for a group that opened nothing.
    """
    logit, _, values, _ = _opened_logits(q, k, v, opened, scale, valid)
    lse = logit.logsumexp(-1)
    return exp_from(logit, lse[..., None]) @ values, lse


def opened_leaves_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, opened: Tensor, lse: Tensor, delta: Tensor, scale: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `opened_leaves`, with lse and delta [..., U, g] of the merged softmax."""
    logit, keys, values, index = _opened_logits(q, k, v, opened, scale, valid)
    p = exp_from(logit, lse[..., None])
    d_logit = p * (dout @ values.mT - delta[..., None])
    dk = _sum_to_leaves(scale * d_logit.mT @ q, index, k)
    dv = _sum_to_leaves(p.mT @ dout, index, v)
    return scale * d_logit @ keys, dk, dv


def _opened_logits(
    q: Tensor, k: Tensor, v: Tensor, opened: Tensor, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [..., U, g, O*m], the keys and values read [..., U, O*m, D], and leaf ids in flattened k [..., U, O]."""
    size, leaves = k.shape[-2], k.shape[-3]
    batch = torch.arange(k.shape[:-3].numel(), device=k.device).view(*k.shape[:-3], 1, 1)
    exists = opened >= 0
    index = opened.clamp(min=0) + batch * leaves
    keys, values = (x.flatten(0, -3)[index].flatten(-3, -2) for x in (k, v))
    read = exists[..., None].expand(*exists.shape, size)
    if valid is not None:
        read = read & valid[opened.clamp(min=0)]
    logit = (scale * q @ keys.mT).masked_fill(~read.flatten(-2)[..., None, :], NEG_INF)
    return logit, keys, values, index


def _sum_to_leaves(grad: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Add the gradients of the keys read [..., U, O*m, D] up per leaf: [..., J, m, D], in a fixed order."""
    size, dim = like.shape[-2:]
    grad, index = grad.reshape(-1, size, dim), index.flatten()
    total = torch.zeros_like(like).flatten(0, -3)
    if grad.is_cuda:  # index_add_ uses atomics there; index_put_ sorts first
        total.index_put_((index,), grad, accumulate=True)
    else:
        total.index_add_(0, index, grad)
    return total.view_as(like)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join partial softmaxes over disjoint keys: (out [..., D], lse [...]) each -> out, lse of their union."""
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
    out = sum(exp_from(part_lse, lse)[..., None] * part for part, part_lse in parts)
    assert isinstance(out, Tensor)
    return out, lse
