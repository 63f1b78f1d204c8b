"""The near field in few calls of exact attention.

Pairs of blocks at the same distance and of the same sizes are one call, with the blocks in the place of the batch:
strided views, nothing is copied. On one device a causal near field takes `halo` + 1 calls, whatever the number of
blocks; a short last block takes as many again.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.kernels.exact_kernels import Exact, exact_kernels
from muse_dist.kernels.limits import even_parts
from muse_dist.kernels.triton_common import check_kernel_inputs
from muse_dist.kernels.triton_merge import Part, add_part, join

MOST = 2 ** 31 - 1  # elements of a tensor that cuDNN addresses; with more it gave wrong results
NEVER = 1e30  # a log-sum-exp under which every weight is 0, and finite: kernels differ in what they make of infinities


class Run(NamedTuple):
    """Consecutive query blocks of which each reads one key block: all at the same distance, or all the same one."""

    query: int  # the first query block
    key: int  # the key block that it reads
    blocks: int  # how many query blocks, and as many key blocks if these are not shared
    diagonal: bool  # whether the pairs are causal diagonals
    rows: int  # tokens of a query block
    keys: int  # tokens of a key block
    shared: bool = False  # whether all query blocks read the same key block


def near_field(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pairs: Sequence[tuple[int, int, bool]], block: int, *,
    exact: Exact | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of query blocks to key blocks.

    Args:
        q: [B, K, G, S, D]; k, v: [B, K, T, D]; the last block of either may be short.
        pairs: (query block, key block, whether the pair is the causal diagonal), counted inside q and k.
        exact: the exact attention of a block; chosen by `exact_kernels` if None.
    Returns:
        out [B, K, G, S, D] in the dtype of q and lse [B, K, G, S] in fp32; 0 and -inf for queries that have no pair.
    """
    check_kernel_inputs(q.shape[-1], 1, q=q, k=k, v=v)
    parts = _parts(q, k)
    if len(parts) == 1:
        return _near_field(q, k, v, scale, pairs, block, exact)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    for entry, head, group in parts:
        out[entry, head, group], lse[entry, head, group] = _near_field(
            q[entry, head, group], k[entry, head], v[entry, head], scale, pairs, block, exact)
    return out, lse


def _near_field(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pairs: Sequence[tuple[int, int, bool]], block: int,
    exact: Exact | None,
) -> tuple[Tensor, Tensor]:
    """`near_field` of few enough heads."""
    queries, keys, values = _heads(q), _heads(k), _heads(v)
    parts = []
    for run in find_runs(tuple(pairs), block, q.shape[3], k.shape[2]):
        rows, read = _fold(run, block, [queries], [keys, values])
        out, lse = _exact(exact, q, run).forward(*rows, *read, scale, run.diagonal)
        parts.append(Part(_unfold(out), _unfold(lse), run.query * block))
    if not parts:
        return torch.zeros_like(q), torch.full(q.shape[:-1], -math.inf, dtype=torch.float32, device=q.device)
    out, lse = join(parts, q.shape[3])
    return out.unflatten(0, q.shape[:3]), lse.unflatten(0, q.shape[:3])


def near_field_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    pairs: Sequence[tuple[int, int, bool]], block: int, *, exact: Exact | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `near_field`, given those of the output of the merged softmax.

    Args:
        dout: [B, K, G, S, D]; out [B, K, G, S, D] and lse [B, K, G, S] of the merged softmax, where lse = -inf (no
            keys) or inf takes a row out.
        q, k, v, scale, pairs, block, exact: as in `near_field`.
    """
    check_kernel_inputs(q.shape[-1], 1, q=q, k=k, v=v, out=out, dout=dout)
    parts = _parts(q, k)
    if len(parts) == 1:
        return _near_field_backward(dout, q, k, v, out, lse, scale, pairs, block, exact)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for entry, head, group in parts:
        d_part, q_part, out_part, lse_part = (x[entry, head, group] for x in (dout, q, out, lse))
        dq[entry, head, group], dk_part, dv_part = _near_field_backward(
            d_part, q_part, k[entry, head], v[entry, head], out_part, lse_part, scale, pairs, block, exact)
        dk[entry, head] += dk_part
        dv[entry, head] += dv_part
    return dq, dk, dv


def _near_field_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    pairs: Sequence[tuple[int, int, bool]], block: int, exact: Exact | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`near_field_backward` of few enough heads."""
    q, dout, out = _alike(q, dout, out)
    lse = lse.nan_to_num(nan=math.nan, posinf=NEVER, neginf=NEVER)
    of_queries = [_heads(x) for x in (q, dout, out, lse[..., None])]
    of_keys = [_heads(k), _heads(v)]
    total: list[Tensor | None] = [None, None, None]
    for run in find_runs(tuple(pairs), block, q.shape[3], k.shape[2]):
        (q_rows, d_rows, out_rows, lse_rows), read = _fold(run, block, of_queries, of_keys)
        grads = _exact(exact, q, run).backward(
            d_rows, q_rows, *read, out_rows, lse_rows[..., 0], scale, run.diagonal)
        for i, (grad, like) in enumerate(zip(grads, (q, k, v))):
            if i and run.shared:
                grad = grad.sum(0, keepdim=True)
            total[i] = _add(total[i], _unfold(grad), (run.key if i else run.query) * block, like)
    dq, dk, dv = (torch.zeros_like(like) if x is None else x.view(like.shape) for x, like in zip(total, (q, k, v)))
    return dq, dk, dv


def _alike(q: Tensor, dout: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with equal strides.

    PyTorch finds cuDNN's plan for a backward by the strides of q, k and v. One that was made for another length, with
    other strides of out and dout, would read these in wrong places, and outside of their memory.
    """
    strides = {tuple(step for step, size in zip(x.stride(), x.shape) if size > 1) for x in (q, dout, out)}
    return (q, dout, out) if len(strides) == 1 else (q.contiguous(), dout.contiguous(), out.contiguous())


def _parts(q: Tensor, k: Tensor) -> list[tuple[slice, slice, slice]]:
    """Batch entries, key heads and their query heads that make tensors of at most MOST elements, if a head does.

    Of q [B, K, G, S, D] and k [B, K, T, D]; all together where that is few enough.
    """
    (batch, heads, group), one = q.shape[:3], q[0, 0, 0].numel()
    if max(q.numel(), k.numel()) <= MOST:
        return [(slice(0, batch), slice(0, heads), slice(0, group))]
    keys = min(MOST // max(1, one * group), MOST // max(1, k[0, 0].numel()))  # heads that fit with all their queries
    return [(slice(entry, entry + 1), head, queries) for entry in range(batch) for head in even_parts(heads, keys)
            for queries in even_parts(group, group if keys else MOST // max(1, one))]


@functools.lru_cache(maxsize=256)  # on a GPU host time counts
def find_runs(pairs: tuple[tuple[int, int, bool], ...], block: int, queries: int, keys: int) -> list[Run]:
    """The runs that make up the pairs, the longest first; `queries` and `keys` are the tokens in all."""
    runs: list[Run] = []
    for i, j, diagonal in sorted(pairs, key=lambda pair: (pair[1] - pair[0], pair[2], pair[0])):
        run = Run(i, j, 1, diagonal, min(block, queries - i * block), min(block, keys - j * block))
        assert not diagonal or run.rows == run.keys, "a diagonal pair joins a block with itself"
        last = runs[-1] if runs else None
        if last and run == last._replace(query=last.query + last.blocks, key=last.key + last.blocks, blocks=1):
            runs[-1] = last._replace(blocks=last.blocks + 1)
        else:
            runs.append(run)
    return sorted(_shared(runs), key=lambda run: -run.blocks * run.rows)


def _shared(runs: list[Run]) -> list[Run]:
    """Consecutive query blocks that read the same key block, as those of a rank read sinks, as one run.

    Not as one tall query block: backwards are parallel in blocks of keys, of which sinks are one or two.
    """
    result: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.diagonal or run.blocks > 1, run.key, run.query)):
        last = result[-1] if result else None
        alone = run.blocks == 1 and not run.diagonal
        if last and alone and run == last._replace(query=last.query + last.blocks, blocks=1, shared=False):
            result[-1] = last._replace(blocks=last.blocks + 1, shared=True)
        else:
            result.append(run)
    return result


def _exact(exact: Exact | None, q: Tensor, run: Run) -> Exact:
    return exact_kernels(q, math.gcd(run.rows, run.keys)) if exact is None else exact


def _heads(x: Tensor) -> Tensor:
    """[B, K, G, S, D] or [B, K, T, D] -> [heads, tokens, D], batch entries as more heads; a view where it can be."""
    return x.flatten(0, -3)


def _fold(run: Run, block: int, of_queries: list[Tensor], of_keys: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens of a run, from [heads, tokens, D]: [blocks, heads, rows, D] and [blocks, heads, keys, D], views.

    Keys that blocks share are copied to each.
    """

    def fold(x: Tensor, first: int, size: int, blocks: int) -> Tensor:
        return x[:, first * block:][:, :blocks * size].unflatten(1, (blocks, size)).transpose(0, 1)

    keys = [fold(x, run.key, run.keys, 1 if run.shared else run.blocks) for x in of_keys]
    if run.shared:
        keys = [x.expand(run.blocks, -1, -1, -1).contiguous() for x in keys]
    return [fold(x, run.query, run.rows, run.blocks) for x in of_queries], keys


def _unfold(x: Tensor) -> Tensor:
    """[blocks, heads, size, ...] -> [heads, blocks * size, ...]; a view where the heads come first in memory."""
    return x.transpose(0, 1).flatten(1, 2)


def _add(total: Tensor | None, part: Tensor, start: int, like: Tensor) -> Tensor:
    """Add the gradient of some tokens [heads, size, D] to that of all tokens; the first that covers all is taken."""
    if total is None:
        if part.shape[1] == like.shape[-2]:
            return part.contiguous()
        total = torch.zeros_like(_heads(like), memory_format=torch.contiguous_format)
    add_part(total, part, start)
    return total
