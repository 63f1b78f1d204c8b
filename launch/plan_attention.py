"""What one attention layer costs a rank: floating-point operations by stage, counted from the blocks it holds.

A pair is one query of one head with one key, or with one leaf. The operations of a pair follow from the matrix products
of `kernels/reference.py`, each of 2 * head dim operations; what grows slower than the pairs is left out.
"""
from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

from muse_dist import MuseConfig, flops
from muse_dist.kernels.limits import probe_count
from muse_dist.layout import Layout, LayoutName, block_count

# Matrix products of a pair, forward and backward.
PRODUCTS = {
    "exact": (2, 5),  # as in the near field
    **flops.PRODUCTS,
    "remote moments": (3, 6),  # kept for the backward, not computed again
}
# How often the queries and keys of a layer move through memory for the far field: cut, sorted, and put back.
MOVES = (6, 10)
# Tensors of q's size, and as many of k's, that CUDA graphs are given or give away, forward and backward; on one device
# the choice of leaves is a graph of its own. Each copy reads and writes.
COPIES, COPIES_ALONE = (2, 4), (3, 4)
# Exchanges of a layer, forward and backward. Around each, tensors are packed, cut and joined, and kernels come in
# smaller parts, as a profile of two ranks shows: what that costs an exchange is found in measured rows.
EXCHANGES = {"moments": (3, 2), "kv": (2, 2), "exact": (1, 2)}
# The host's time to start a layer's kernels, which run beside it: a layer takes whichever is longer.
STARTS = ("start exact", "start", "start ranks", "start replay")


@dataclass(frozen=True)
class Case:
    """One attention layer: causal, one sequence of `tokens` tokens over `ranks` ranks; no `muse` is exact attention."""

    heads: int
    kv_heads: int
    dim: int
    tokens: int
    muse: MuseConfig | None = None
    ranks: int = 1
    layout: LayoutName = "zigzag"


@dataclass(frozen=True)
class Work:
    """By stage, what the busiest rank does: operations; bytes for "ordering" and "copies", exchanges for "stops"."""

    forward: dict[str, float]
    backward: dict[str, float]
    start: str  # which of STARTS


@lru_cache(maxsize=4096)
def attention_work(case: Case) -> Work:
    """The work of a layer's forward and backward.

    Raises:
        ValueError: the attention is not causal, or the tokens do not divide into blocks over the ranks.
    """
    if case.muse is not None and not case.muse.causal:
        raise ValueError("muse.causal=false: only causal attention is planned")
    pairs = max((_pairs(case, rank) for rank in _ranks(case)), key=lambda found: sum(found.values()))
    passes = [{stage: 2.0 * products[i] * case.dim * pairs[stage] for stage, products in PRODUCTS.items()
               if pairs.get(stage) and products[i]} for i in (0, 1)]
    once = 2.0 * case.dim * (case.heads + case.kv_heads) * case.tokens / case.ranks  # bytes of q and k
    stops = exchange_counts(case)
    for work, moves, copies, count in zip(passes, MOVES, COPIES if case.ranks > 1 else COPIES_ALONE, stops):
        if case.ranks > 1:
            work["stops"] = count
        if pairs.get("far field"):
            work["ordering"] = moves * once
        if case.muse is not None and case.muse.cuda_graphs:
            work["copies"] = 2 * copies * once
    return Work(passes[0], passes[1], _start(case))


def exchange_counts(case: Case) -> tuple[int, int]:
    """Exchanges of a layer over several ranks, forward and backward."""
    return EXCHANGES["exact" if case.muse is None else case.muse.exchange]


def _start(case: Case) -> str:
    if case.muse is None:
        return "start exact"
    if case.muse.cuda_graphs:
        return "start replay"
    return "start" if case.ranks == 1 else "start ranks"


def _ranks(case: Case) -> range | list[int]:
    """Ranks that may be the busiest: the last of contiguous chunks, the first and the last pair of chunks."""
    return [case.ranks - 1] if case.layout == "contiguous" else sorted({0, case.ranks // 2, case.ranks - 1})


def _pairs(case: Case, rank: int) -> dict[str, float]:
    """Pairs by stage that a rank computes, of all heads."""
    if case.muse is None:
        return {"exact": case.heads * _exact_pairs(case, rank)}
    config, count = case.muse, block_count(case.tokens, case.muse.block)
    if case.ranks == 1:
        mine = list(range(count))
        chunks = {}
    else:
        split = Layout(case.layout, case.ranks, case.tokens, config.block)
        mine = split.blocks_of(rank)
        chunks = {chunk: split.blocks_of_chunk(chunk) for chunk in split.chunks_of(rank)}
    found = {"near field": case.heads * sum(config.block ** 2 * (0.5 + min(i, config.halo)) for i in mine)}
    own = count if case.ranks == 1 or config.exchange == "kv" else None
    for i in mine:
        everything = max(i - config.halo, 0)  # blocks in the far field
        local = everything if own is not None else bisect_left(sorted(mine), i - config.halo)
        pinned = config.sinks if own is not None or 0 in mine else 0  # leaves here that are no candidates
        near = sum(i - config.halo <= j <= i for j in (mine if own is None else range(count)))  # whose keys are here
        _add_far(found, case, config, local, everything - local, pinned, near)
    if own is None:
        found["remote moments"] = sum(_sent_moments(case, config, chunk, blocks)
                                      for chunk, blocks in chunks.items())
    return found


def _exact_pairs(case: Case, rank: int) -> float:
    """Of one head: half the square, or what a rank's chunks of it see."""
    if case.ranks == 1 or case.layout == "zigzag":
        return case.tokens ** 2 / 2 / case.ranks
    chunk = case.tokens / case.ranks
    return chunk ** 2 * (rank + 0.5)


def _add_far(
    found: dict[str, float], case: Case, config: MuseConfig, local: int, remote: int, pinned: int, near: int
) -> None:
    """Add what one block of queries does with `local` blocks whose keys are here and `remote` ones that are not.

    Where a tolerance decides what is opened, probes weigh the keys of `near` blocks too, and moments are needed for it.
    """
    rows, keys = case.heads * config.block, local * config.block
    leaves = local * (config.block // config.leaf)
    chosen = min(flops.opened_at_most(config), max(leaves - pinned, 0))
    probes = probe_count(config.group, config.tolerance > 0)
    judged = config.tolerance > 0 and config.opened > 0 and local > 0
    choice = rows / config.group * probes * (keys + near * config.block if judged else keys)
    if judged:
        choice += PRODUCTS["moments"][0] * case.kv_heads * config.anchors * keys
    sinks = config.sinks if local + remote else 0
    for stage, pairs in (
            ("far field", rows * (leaves + remote * (config.block // config.remote_leaf))),
            ("opened leaves", rows * (chosen + sinks) * config.leaf),
            ("moments", case.kv_heads * config.anchors * keys),
            ("choice", choice if config.opened else 0)):
        found[stage] = found.get(stage, 0.0) + pairs


def _sent_moments(case: Case, config: MuseConfig, chunk: int, blocks: list[int]) -> float:
    """Keys times anchors of the moments of one chunk that other ranks see."""
    split = Layout(case.layout, case.ranks, case.tokens, config.block)
    mine = split.owner(chunk)
    seen = sum(split.owner(other) != mine and split.blocks_of_chunk(other)[-1] - blocks[0] > config.halo
               for other in range(split.chunks))
    return case.kv_heads * config.remote_anchors * seen * len(blocks) * config.block
