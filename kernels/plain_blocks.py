"""The steps of the method over all blocks of a sequence at once: the plain twins of the GPU kernels.

Each function calls `reference` block by block and has the name, arguments and results of a Triton kernel. Half
precision is computed in fp32 and rounded once at the end.

Shape legend: B batch, K key/value heads, n query blocks, c key blocks, A anchors a block, U groups of g query rows, J
leaves of m keys (those of block 0 first, as many for every block), O opened leaves a group, D head dim.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_dist.kernels import reference
from muse_dist.kernels.clustering import bisect, gather_rows, principal_axes, project, scatter_rows
from muse_dist.kernels.reference import Acceptance, Moments, mean_rows, merge, near_field, near_field_backward

__all__ = [
    "Acceptance", "Moments", "Sight", "add_tokens", "add_up", "bisect", "far_field", "far_field_backward",
    "gather_tokens", "mean_rows", "merge", "moments", "moments_backward", "near_field", "near_field_backward",
    "open_leaves", "principal_axes", "project", "put_tokens", "row_dots", "scatter_tokens", "seen_blocks",
    "working_dtype",
]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of `dtype` are handed over in: half precision is computed in fp32."""
    return torch.promote_types(dtype, torch.float32)


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Rows of all blocks of x [B, K, G, N, D] in the order int64 [B, K, n, G * b]: [B, K, n, G * b, D].

    Row g * b + t of a block is its token t in head g; rows behind the last token are 0.
    """
    blocks, block = order.shape[2], order.shape[3] // x.shape[2]
    pad = blocks * block - x.shape[3]
    rows = F.pad(x, (0, 0, 0, pad)) if pad else x
    return gather_rows(rows.unflatten(3, (blocks, block)).transpose(2, 3).flatten(3, 4), order)


def scatter_tokens(rows: Tensor, order: Tensor, heads: int, tokens: int) -> Tensor:
    """The inverse of `gather_tokens`: rows [B, K, n, G * b, D] -> [B, K, G, N, D] for G = `heads`, N = `tokens`."""
    placed = scatter_rows(rows, order).unflatten(3, (heads, -1))
    return placed.transpose(2, 3).flatten(3, 4)[..., :tokens, :]


def add_tokens(total: Tensor, rows: Tensor, order: Tensor) -> None:
    """Add what `scatter_tokens` makes of rows [B, K, n, G * b, D] to `total` [B, K, G, N, D], in place."""
    total.add_(scatter_tokens(rows, order, *total.shape[2:4]))


def put_tokens(total: Tensor, rows: Tensor, order: Tensor) -> None:
    """Write what `scatter_tokens` makes of rows [B, K, n, G * b, D] to `total` [B, K, G, N, D], in place."""
    total.copy_(scatter_tokens(rows, order, *total.shape[2:4]))


def add_up(parts: Sequence[Tensor], total: Tensor | None = None) -> Tensor:
    """The sum of equal tensors [..., N, D], rounded once; written to `total` if that is given."""
    found = torch.stack(list(parts)).sum(0)  # torch adds half precision up in fp32
    return found if total is None else total.copy_(found)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of a and b [..., D], in at least fp32: [...]."""
    return (a.to(_work(a)) * b.to(_work(b))).sum(-1)


class Sight(NamedTuple):
    """Which key blocks the far field of a query block reads, by the blocks' places in the whole sequence."""

    query: Tensor  # int32 [n] place of every query block
    key: Tensor  # int32 [c] place of every key block
    halo: int  # blocks next to the own one that the near field reads
    causal: bool  # only earlier blocks are seen
    gaps: bool = True  # whether a query block may miss a key block that stands between two it sees; False if none does


def seen_blocks(sight: Sight) -> Tensor:
    """bool [n, c]: whether the far field of a query block reads the leaves of a key block."""
    distance = sight.query[:, None] - sight.key
    return distance > sight.halo if sight.causal else distance.abs() > sight.halo


def moments(
    anchor: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, valid: Tensor | None = None
) -> Moments:
    """Moments of every leaf about every anchor of the query blocks that see it.

    Args:
        anchor: [B, K, n, A, D]; k, v: [B, K, J, m, D] of the same dtype; valid: bool [J, m], which keys exist (a key
            that does not is finite); all if None.
    Returns:
        Moments; key and value [B, K, n, A, J, D] in the dtype of k, mass and trace [B, K, n, A, J] in at least fp32.
        Leaves that a block does not see are unspecified there: read them only through `sight`.
    """
    work = _work(k)
    parts = [reference.moments(a, k.to(work), v.to(work), scale, valid) for a in anchor.to(work).unbind(2)]
    mass, key, value, trace = (torch.stack(x, 2) for x in zip(*parts))
    return Moments(mass, key.to(k.dtype), value.to(k.dtype), trace)


def moments_backward(
    grad: Moments, anchor: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, valid: Tensor | None = None,
    total: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients (dk, dv) [B, K, J, m, D] of `moments`, given those of its results. Anchors are constants.

    Args:
        grad: gradients in the shapes of the moments; read only where a block sees a leaf.
        anchor, k, v, sight, scale, valid: as in `moments`.
        total: if given, the gradients are added to these, in place and in their dtype, and these returned.
    """
    work = _work(k)
    anchor, keys, values = (x.to(work) for x in (anchor, k, v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for i, seen in enumerate(_seen_leaves(sight, k.shape[2])):
        here = _only(Moments(*(x[:, :, i].to(work) for x in grad)), seen)
        out = reference.moments(anchor[:, :, i], keys, values, scale, valid)
        for whole, part in zip((dk, dv), reference.moments_backward(
                here, anchor[:, :, i], keys, values, out, scale, valid)):
            whole += part
    return _add_to(total, dk, dv) or (dk.to(k.dtype), dv.to(v.dtype))


def far_field(
    q: Tensor, anchor: Tensor, leaf: Moments, k: Tensor | None, v: Tensor | None, opened: Tensor | None, sight: Sight,
    scale: float, trace: bool, valid: Tensor | None = None, use: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of groups of query rows to far leaves: to the keys of the opened ones, to the moments of the others.

    Args:
        q: [B, K, n, U, g, D]; anchor: [B, K, n, A, D], anchor a serves groups a*U/A to (a+1)*U/A - 1.
        leaf: `moments` of the leaves about these anchors.
        k, v: [B, K, J, m, D]; opened: integers [B, K, n, U, O], different leaves that the group's block sees, -1 for
            an empty slot. All three None if nothing is opened.
        trace: whether the logits have the second-order term; valid: bool [J, m], which keys exist; all if None.
        use: integers [B, K, n, A]. If given, all blocks share Q anchors [B, K, Q, D], moments [B, K, Q, J] are about
            these, and part a of a block takes the anchor it names.
    Returns:
        out [B, K, n, U, g, D] in the dtype of q and lse [B, K, n, U, g] in at least fp32; 0 and -inf for a group that
        sees nothing.
    """
    work = _work(q)
    results = []
    for i, seen in enumerate(_seen_leaves(sight, leaf.mass.shape[-1])):
        rows, about, here, choice, hidden = _block(i, seen, q, anchor, leaf, opened, use)
        parts = [reference.far_field(rows, about, here, hidden, scale, trace)]
        if choice is not None and choice.shape[-1] and k is not None and v is not None:
            parts.append(reference.opened_leaves(rows, k.to(work), v.to(work), choice, scale, valid))
        results.append(reference.merge(parts))
    out, lse = (torch.stack(x, 2) for x in zip(*results))
    return out.to(q.dtype), lse


def far_field_backward(
    dout: Tensor, q: Tensor, anchor: Tensor, leaf: Moments, k: Tensor | None, v: Tensor | None, opened: Tensor | None,
    lse: Tensor, delta: Tensor, sight: Sight, scale: float, trace: bool, valid: Tensor | None = None,
    use: Tensor | None = None, total: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Moments, Tensor | None, Tensor | None]:
    """Gradients of `far_field` for q, for the moments, and for k and v as far as they were opened.

    Args:
        dout: [B, K, n, U, g, D]; lse, delta: fp32 [B, K, n, U, g] of the merged softmax, where lse = inf takes a row
            out; the others as in `far_field`.
        total: if given, dk and dv are added to these, in place and in their dtype, and these returned.
    Returns:
        dq, the gradients of the moments [B, K, n, A, J, ...] (those of leaves out of sight are unspecified; with `use`,
        each part's share of its anchor's, and 0 out of sight), dk and dv (None without opened leaves).
    """
    work = _work(q)
    dq = torch.zeros_like(q, dtype=work)
    some = opened is not None and opened.shape[-1] > 0
    dk, dv = (torch.zeros_like(x, dtype=work) if some and x is not None else None for x in (k, v))
    grads = []
    for i, seen in enumerate(_seen_leaves(sight, leaf.mass.shape[-1])):
        rows, about, here, choice, hidden = _block(i, seen, q, anchor, leaf, opened, use)
        d_rows, at, shift = dout[:, :, i].to(work), lse[:, :, i].to(work), delta[:, :, i].to(work)
        dq[:, :, i], grad = reference.far_field_backward(d_rows, rows, about, here, hidden, at, shift, scale, trace)
        grads.append(grad)
        if choice is not None and choice.shape[-1] and k is not None and v is not None:
            assert dk is not None and dv is not None
            d_opened, *d_leaves = reference.opened_leaves_backward(
                d_rows, rows, k.to(work), v.to(work), choice, at, shift, scale, valid)
            dq[:, :, i] += d_opened
            dk, dv = dk + d_leaves[0], dv + d_leaves[1]
    mass, key, value, d_trace = (torch.stack(x, 2) for x in zip(*grads))
    moment_grads = Moments(mass, key.to(q.dtype), value.to(q.dtype), d_trace)
    if dk is None or dv is None:
        return dq.to(q.dtype), moment_grads, *(total or (None, None))
    return dq.to(q.dtype), moment_grads, *(_add_to(total, dk, dv) or (dk.to(q.dtype), dv.to(q.dtype)))


def _block(
    i: int, seen: Tensor, q: Tensor, anchor: Tensor, leaf: Moments, opened: Tensor | None, use: Tensor | None
) -> tuple[Tensor, Tensor, Moments, Tensor | None, Tensor]:
    """Query rows, anchors, moments, opened leaves and hidden leaves [B, K, U, J] of query block i."""
    work = _work(q)
    about, *parts = (_of_block(x, i, use).to(work) for x in (anchor, *leaf))
    here = _only(Moments(*parts), seen)
    choice = None if opened is None else opened[:, :, i].long()
    none = torch.full((*q.shape[:2], q.shape[3], 0), -1, dtype=torch.int64, device=q.device)
    return q[:, :, i].to(work), about, here, choice, reference.hidden_leaves(
        none if choice is None else choice, seen)


def _of_block(x: Tensor, i: int, use: Tensor | None) -> Tensor:
    """What the parts of block i have of x: [B, K, n, A, ...] or, with `use`, [B, K, Q, ...] -> [B, K, A, ...]."""
    if use is None:
        return x[:, :, i]
    part = use[:, :, i].long()
    return x.gather(2, part.view(*part.shape, *[1] * (x.dim() - 3)).expand(-1, -1, -1, *x.shape[3:]))


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _add_to(total: tuple[Tensor, Tensor] | None, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor] | None:
    """Add gradients to `total` in place, if it is given."""
    for whole, part in zip(total or (), (dk, dv)):
        whole += part
    return total


def _seen_leaves(sight: Sight, leaves: int) -> Tensor:
    """bool [n, J]: whether a query block sees a leaf."""
    return seen_blocks(sight).repeat_interleave(leaves // sight.key.shape[0], -1)


def _only(leaf: Moments, seen: Tensor) -> Moments:
    """Moments with zeros for the leaves [J] out of sight, where anything may stand."""
    return Moments(*(torch.where(seen if x.dim() == leaf.mass.dim() else seen[:, None], x, 0.0) for x in leaf))


def open_leaves(
    q: Tensor, k: Tensor, sight: Sight, opened: int, sinks: int, scale: float, row_valid: Tensor | None = None,
    valid: Tensor | None = None, accept: Acceptance | None = None,
) -> Tensor:
    """Choose the leaves every group of queries reads exactly: the sinks, and the `opened` others with most attention.

    Args:
        q: sorted query rows [B, K, n, U, g, D]; k: leaves [B, K, J, m, D], of which 0 to sinks-1 are the sinks.
        row_valid: bool [B, K, n, U, g], which rows exist; valid: bool [J, m], which keys exist; all if None.
        accept: with `moments` of the leaves about anchors [B, K, n, A, D]. If given, a leaf is opened only where its
            moments get at least the tolerance wrong, as a share of the attention to all leaves that a block sees and
            to those of the blocks it reads exactly, as far as they are among these.
    Returns:
        int64 [B, K, n, U, sinks + min(opened, J)]: leaves that the group's block sees, all different, first the sinks
        and then the best; -1 where there is nothing left to open.
    """
    rows, keys = q.to(_work(q)), k.to(_work(k))
    far, at_hand = (_seen_leaves(x, k.shape[2]) for x in (sight, sight._replace(halo=-1)))
    found = []
    for i, seen in enumerate(far):
        here = None
        if accept is not None:
            leaf = _only(Moments(*(x[:, :, i].to(_work(x)) for x in accept.leaf)), seen)
            here = accept._replace(anchor=accept.anchor[:, :, i].to(_work(q)), leaf=leaf)
        exists = None if row_valid is None else row_valid[:, :, i]
        found.append(reference.open_leaves(
            rows[:, :, i], keys, seen, opened, sinks, scale, exists, valid, here, at_hand[i] & ~seen))
    return torch.stack(found, 2)
