"""The choice of the leaves that groups of query rows read exactly.

`_average` makes the probes of every group, `_weigh` multiplies a tile of them with the keys of one block and keeps the
log mass of every leaf, and `_choose` turns the masses of a group into shares and picks the best leaves. Where a
criterion decides what is opened, `triton_accept` turns the masses into errors before.

The masses go through memory. Shares need a probe's masses of all leaves, and the probes of a group add up only as
shares: without memory for them every logit would be computed twice. There are m times fewer masses than logits, which
makes writing and reading them cheap, but of a long sequence still too many at once: hence slabs of SCRATCH_BYTES.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div, power_of_two, probe_count
from muse_dist.kernels.plain_blocks import Acceptance, Sight
from muse_dist.kernels.triton_accept import masses_to_errors
from muse_dist.kernels.triton_common import (
    LOG2E, PRECISION, Tile, check_kernel_inputs, flags, keep_heads, load_rows, padded, sees, side, store_rows,
)

SCRATCH_BYTES = 2**28  # of masses at a time; if those of one query block are more, as many as they are
CHIP_BYTES = 96 * 1024  # of probes and keys that a program holds on chip: Ampere and Ada have 99 KiB at least
NONE = tl.constexpr(-1)  # ranks behind every leaf
LAST_LEAF = tl.constexpr(2**31 - 1)
SHARE_BASE = tl.constexpr(100.0)  # shares are counted in 2^-100: with fp32's exponents those down to 2^-226 differ


def open_leaves(
    q: Tensor, k: Tensor, sight: Sight, opened: int, sinks: int, scale: float, row_valid: Tensor | None = None,
    valid: Tensor | None = None, accept: Acceptance | None = None, *, tile: Tile | None = None,
) -> Tensor:
    """Choose the leaves every group of queries reads exactly: the sinks, and the `opened` others with most attention.

    Args:
        q: sorted query rows [B, K, n, U, g, D]; k: leaves [B, K, J, m, D], of which 0 to sinks-1 are the sinks.
        row_valid: bool [B, K, n, U, g], which rows exist; valid: bool [J, m], which keys exist; all if None.
        accept: with `moments` of the leaves about anchors [B, K, n, A, D]. If given, a leaf is opened only where its
            moments get at least the tolerance wrong, as a share of the attention to all leaves that a block sees and
            to those of the blocks it reads exactly, as far as they are among these.
        tile: launch shape of the products of probes and keys; pinned by head dim and dtype if None, as those of the
            errors always are.
    Returns:
        int64 [B, K, n, U, sinks + min(opened, J)]: leaves that the group's block sees, all different, first the sinks
        and then the best; -1 where there is nothing left to open.
    """
    blocks, groups, _, dim = q.shape[2:]
    leaves, leaf = k.shape[2:4]
    about = (None, None) if accept is None else (accept.anchor, accept.leaf.key)
    check_kernel_inputs(dim, leaf, q=q, k=k, anchor=about[0], leaf_key=about[1])
    count, slots = q.shape[:4].numel(), min(opened, leaves)
    out = torch.empty((*q.shape[:4], sinks + slots), dtype=torch.int64, device=q.device)
    shared = {"PER_BLOCK": leaves // sight.key.shape[0], "CAUSAL": sight.causal}
    if sinks:
        _sinks[(ceil_div(count, 256),)](
            sight.query, sight.key, out, count, blocks, sight.halo, GROUPS=groups, SINKS=sinks, SLOTS=slots, TILE=256,
            SINKS_PAD=power_of_two(sinks), **shared)
    if slots:
        shared |= {"SINKS": sinks, "SLOTS": slots, "HAS_VALID": valid is not None}
        _open_best(out, q, k, sight, scale, row_valid, valid, accept, tile, shared)
    return out


def _open_best(
    out: Tensor, q: Tensor, k: Tensor, sight: Sight, scale: float, row_valid: Tensor | None, valid: Tensor | None,
    accept: Acceptance | None, tile: Tile | None, shared: dict[str, int],
) -> None:
    """Write the leaves that are no sinks, slab by slab, into `out` of `open_leaves`."""
    heads, (blocks, groups, size, dim), (leaves, leaf) = q.shape[:2].numel(), q.shape[2:], k.shape[2:4]
    runs = probe_count(size, accept is not None)
    count = groups * runs
    probe, live = _probes(q, row_valid, runs, scale)
    k, held = keep_heads(k)
    holds = None if valid is None else flags(valid.any(-1))
    products = _products(count, blocks, leaf, dim, k.dtype, tile, shared)
    choice = _choice(groups, runs, leaves, shared) | {"JUDGED": accept is not None}
    tolerance, at_hand = (0.0, sight.halo) if accept is None else (accept.tolerance, -1)  # -1: the near blocks too
    parts = sight.key.shape[0] * ceil_div(shared["PER_BLOCK"], products["SPAN"])
    together = SCRATCH_BYTES // (count * leaves * 4)
    some_heads, some_blocks = _even(heads, together // blocks), _even(blocks, together)
    mass = torch.empty((some_heads, leaves, some_blocks * count), dtype=torch.float32, device=q.device)
    for head in range(0, heads, some_heads):
        for block in range(0, blocks, some_blocks):
            here = min(some_heads, heads - head), min(some_blocks, blocks - block)
            numbers = head, block, here[1], blocks, leaves
            _weigh[(here[0] * ceil_div(here[1] * count, products["ROWS"]), parts)](
                probe, k, flags(valid), sight.query, sight.key, mass, *numbers, at_hand, held, **products)
            if accept is not None:
                masses_to_errors(mass, probe, sight, accept, scale, here, head, block)
            _choose[(here[0] * here[1] * ceil_div(groups, choice["TILE"]),)](
                mass, live, holds, sight.query, sight.key, out, *numbers, sight.halo, tolerance, **choice)


def _even(count: int, together: int) -> int:
    """The length of as few runs of at most `together` things, or of one, as make up `count`, all about as long."""
    return ceil_div(count, ceil_div(count, max(1, together)))


def _probes(q: Tensor, row_valid: Tensor | None, runs: int, scale: float) -> tuple[Tensor, Tensor]:
    """Means of `runs` equal runs of the rows of every group [B, K, n, U, runs, D], and whether any row exists, uint8.

    The means are multiplied by the scale and log2(e) before they are rounded: their products are logits in base 2.
    """
    size, dim = q.shape[4:]
    probe = torch.empty((*q.shape[:4], runs, dim), dtype=q.dtype, device=q.device)
    live = torch.empty(probe.shape[:-1], dtype=torch.uint8, device=q.device)
    rows = min(16, power_of_two(size // runs))
    tile = max(1, 8192 // (rows * padded(dim)))
    _average[(ceil_div(live.numel(), tile),)](
        q.contiguous(), flags(row_valid), probe, live, scale, live.numel(), RUN=size // runs, DIM=dim,
        HAS_ROWS=row_valid is not None, TILE=tile, ROWS=rows, DIM_PAD=padded(dim))
    return probe, live


def _weigh_tile(dim: int, dtype: torch.dtype) -> Tile:
    """Small programs: while one multiplies, others on the same processor take exponentials, which cost the most."""
    row_bytes = padded(dim) * dtype.itemsize
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1) if row_bytes <= 512 else Tile(16, 16, 4, 1)
    if row_bytes <= 128:
        return Tile(64, 128, 4, 2)
    return Tile(128, 128, 8, 2) if row_bytes <= 256 else Tile(64, 64, 4, 2)


def _products(
    probes: int, blocks: int, leaf: int, dim: int, dtype: torch.dtype, tile: Tile | None, shared: dict[str, int]
) -> dict[str, int]:
    """The compile-time arguments of `_weigh`. A tile has whole leaves; where these are large, fewer rows and stages."""
    tile = _weigh_tile(dim, dtype) if tile is None else tile
    leaf_pad = power_of_two(leaf)
    columns = max(leaf_pad, side(shared["PER_BLOCK"] * leaf_pad, tile.keys, tile.warps))
    rows, stages = tile.rows, tile.stages
    if columns > tile.keys:
        rows = rows * tile.keys // columns
        stages = max(1, min(stages, CHIP_BYTES // (columns * padded(dim) * dtype.itemsize) - 1))
    return {
        "PROBES": probes, "LEAF": leaf, "DIM": dim, "HAS_GAPS": leaf != leaf_pad,
        "ROWS": side(blocks * probes, rows, tile.warps), "LEAVES": columns // leaf_pad, "LEAF_PAD": leaf_pad,
        "SPAN": 32 * columns // leaf_pad, "DIM_PAD": padded(dim), "num_warps": tile.warps, "num_stages": stages,
        **{name: shared[name] for name in ("PER_BLOCK", "CAUSAL", "HAS_VALID")}}


def _choice(groups: int, runs: int, leaves: int, shared: dict[str, int]) -> dict[str, int]:
    """The compile-time arguments of `_choose`. A tile has eight probes: 32 bytes, the least that memory is read in."""
    chunk = min(1024, power_of_two(leaves))
    return {"GROUPS": groups, "RUNS": runs, "TILE": 8 // runs, "CHUNK": chunk, "ONE_CHUNK": leaves <= chunk,
            "SLOTS_PAD": power_of_two(shared["SLOTS"]), **shared}


@triton.jit
def _sinks(query_ids, key_ids, out, groups, blocks, halo, GROUPS: tl.constexpr, SINKS: tl.constexpr,
           SLOTS: tl.constexpr, PER_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr,
           SINKS_PAD: tl.constexpr):
    """The first columns of `out`: a sink where the block sees it, else -1."""
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    leaf = tl.arange(0, SINKS_PAD)
    ok = (group < groups)[:, None] & (leaf < SINKS)[None, :]
    query_id = tl.load(query_ids + group // GROUPS % blocks)
    key_id = tl.load(key_ids + leaf // PER_BLOCK, mask=leaf < SINKS, other=0)
    chosen = tl.where(sees(query_id[:, None], key_id[None, :], halo, CAUSAL), leaf[None, :], -1)
    tl.store(out + group[:, None] * (SINKS + SLOTS) + leaf[None, :], chosen.to(tl.int64), mask=ok)


@triton.jit
def _average(q, row_valid, probe, live, scale, runs, RUN: tl.constexpr, DIM: tl.constexpr, HAS_ROWS: tl.constexpr,
             TILE: tl.constexpr, ROWS: tl.constexpr, DIM_PAD: tl.constexpr):
    """Scaled means of the existing, finite rows of TILE runs of RUN rows; 0 where there is none."""
    run = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, DIM_PAD)
    total = tl.zeros((TILE, DIM_PAD), tl.float32)
    used = tl.zeros((TILE,), tl.int32)
    existing = tl.zeros((TILE,), tl.int32)
    for start in range(0, RUN, ROWS):
        row = start + tl.arange(0, ROWS)
        at = run[:, None] * RUN + row[None, :]
        exists = (run < runs)[:, None] & (row < RUN)[None, :]
        if HAS_ROWS:
            exists = exists & (tl.load(row_valid + at, mask=exists, other=0) != 0)
        rows = tl.load(q + at[:, :, None] * DIM + column[None, None, :],
                       mask=exists[:, :, None] & (column < DIM)[None, None, :], other=0.0).to(tl.float32)
        use = exists & (tl.min((tl.abs(rows) < float("inf")).to(tl.int32), 2) > 0)
        total += tl.sum(tl.where(use[:, :, None], rows, 0.0), 1)
        used += tl.sum(use.to(tl.int32), 1)
        existing += tl.sum(exists.to(tl.int32), 1)
    mean = total / tl.maximum(used, 1).to(tl.float32)[:, None]
    store_rows(probe, run, run < runs, mean * (scale * LOG2E), DIM, DIM_PAD)
    tl.store(live + run, (existing > 0).to(tl.uint8), mask=run < runs)


@triton.jit(do_not_specialize=["head", "block", "some_blocks"])
def _weigh(probe, k, valid, query_ids, key_ids, mass, head, block, some_blocks, blocks, leaves, halo, held,
           PROBES: tl.constexpr, PER_BLOCK: tl.constexpr, LEAF: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr,
           HAS_VALID: tl.constexpr, HAS_GAPS: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr,
           LEAF_PAD: tl.constexpr, SPAN: tl.constexpr, DIM_PAD: tl.constexpr):
    """Log masses, in base 2, of up to SPAN leaves of a key block at ROWS probes of a head, where these see them."""
    probes = some_blocks * PROBES
    tiles = tl.cdiv(probes, ROWS)
    place = (tl.program_id(0) // tiles).to(tl.int64)
    spans: tl.constexpr = (PER_BLOCK + SPAN - 1) // SPAN
    key_block = tl.program_id(1) // spans
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    query_id = tl.load(query_ids + block + row // PROBES, mask=row < probes, other=0)
    seen = (row < probes) & sees(query_id, tl.load(key_ids + key_block), halo, CAUSAL)
    rows = load_rows(probe + ((head + place) * blocks + block) * PROBES * DIM, row, seen, DIM, DIM_PAD)
    keys_at = k + ((head + place) * held + key_block * PER_BLOCK) * LEAF * DIM
    mass += (place * leaves + key_block * PER_BLOCK) * probes
    column = tl.arange(0, LEAVES * LEAF_PAD)
    begin = tl.program_id(1) % spans * SPAN
    stop = tl.where(tl.max(seen.to(tl.int32), 0) > 0, tl.minimum(begin + SPAN, PER_BLOCK), begin)
    for start in range(begin, stop, LEAVES):
        key_leaf = start + column // LEAF_PAD
        key = key_leaf * LEAF + column % LEAF_PAD
        ok = (key_leaf < PER_BLOCK) & (column % LEAF_PAD < LEAF)
        keys = load_rows(keys_at, key, ok, DIM, DIM_PAD)
        logit = tl.dot(rows, tl.trans(keys), input_precision=PRECISION)
        if HAS_VALID:
            ok = ok & (tl.load(valid + key_block * PER_BLOCK * LEAF + key, mask=ok, other=0) != 0)
        if HAS_VALID or HAS_GAPS:
            logit = tl.where(ok[None, :], logit, float("-inf"))
        result = _log_mass(tl.reshape(logit, (ROWS, LEAVES, LEAF_PAD)))
        leaf = start + tl.arange(0, LEAVES)
        tl.store(mass + leaf.to(tl.int64)[None, :] * probes + row[:, None], result,
                 mask=seen[:, None] & (leaf < PER_BLOCK)[None, :])


@triton.jit
def _log_mass(logit):
    """log2 of the sum of exp2 along the last of three axes; -inf where all are."""
    top = tl.max(logit, 2)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.sum(tl.exp2(logit - top[:, :, None]), 2))


@triton.jit
def _candidates(leaf, holds, query_id, key_ids, leaves, halo, SINKS: tl.constexpr, PER_BLOCK: tl.constexpr,
                CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr):
    """Which leaves can be chosen: those in sight that hold a key and are no sinks."""
    ok = (leaf >= SINKS) & (leaf < leaves)
    ok = ok & sees(query_id, tl.load(key_ids + leaf // PER_BLOCK, mask=ok, other=0), halo, CAUSAL)
    if HAS_VALID:
        ok = ok & (tl.load(holds + leaf, mask=ok, other=0) != 0)
    return ok


@triton.jit
def _load_masses(mass, leaf, ok, probe, inside, probes):
    """Masses [leaves, groups, runs], -inf for what is no candidate."""
    at = leaf.to(tl.int64)[:, None, None] * probes + probe[None, :, :]
    return tl.load(mass + at, mask=ok[:, None, None] & inside[None, :, None], other=float("-inf"))


@triton.jit(do_not_specialize=["head", "block", "some_blocks"])
def _choose(mass, live, holds, query_ids, key_ids, out, head, block, some_blocks, blocks, leaves, halo, tolerance,
            GROUPS: tl.constexpr, RUNS: tl.constexpr, SINKS: tl.constexpr, SLOTS: tl.constexpr, PER_BLOCK: tl.constexpr,
            CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
            ONE_CHUNK: tl.constexpr, SLOTS_PAD: tl.constexpr, JUDGED: tl.constexpr):
    """The best leaves of TILE groups of one query block, by the sum over the probes of each probe's shares.

    If JUDGED, `mass` holds errors, and leaves are chosen by their mean from the tolerance on.
    """
    tiles: tl.constexpr = (GROUPS + TILE - 1) // TILE
    probes = some_blocks * (GROUPS * RUNS)
    place = (tl.program_id(0) // tiles // some_blocks).to(tl.int64)
    offset = tl.program_id(0) // tiles % some_blocks
    group = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    group_at = ((head + place) * blocks + block + offset) * GROUPS + group
    inside = group < GROUPS
    run = tl.arange(0, RUNS)
    use = tl.load(live + group_at[:, None] * RUNS + run[None, :], mask=inside[:, None], other=0) != 0
    query_id = tl.load(query_ids + block + offset)
    mass += place * leaves * probes + offset * (GROUPS * RUNS)
    probe = group[:, None] * RUNS + run[None, :]

    top = tl.full((TILE, RUNS), float("-inf"), tl.float32)
    total = tl.zeros((TILE, RUNS), tl.float32)
    for start in range(0, 0 if JUDGED else leaves, CHUNK):
        leaf = start + tl.arange(0, CHUNK)
        ok = _candidates(leaf, holds, query_id, key_ids, leaves, halo, SINKS, PER_BLOCK, CAUSAL, HAS_VALID)
        if tl.max(ok.to(tl.int32), 0) > 0:
            masses = _load_masses(mass, leaf, ok, probe, inside, probes)
            new = tl.maximum(top, tl.max(masses, 0))
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(masses - base[None, :, :]), 0)
            top = new
    whole = tl.where(use, top + tl.log2(total) - SHARE_BASE, float("inf"))
    count = tl.maximum(tl.sum(use.to(tl.int32), 1), 1).to(tl.float32)

    slot = tl.arange(0, SLOTS_PAD)
    best = tl.full((TILE, SLOTS_PAD), NONE, tl.int64)
    for start in range(0, leaves, CHUNK):
        leaf = start + tl.arange(0, CHUNK)
        ok = _candidates(leaf, holds, query_id, key_ids, leaves, halo, SINKS, PER_BLOCK, CAUSAL, HAS_VALID)
        if tl.max(ok.to(tl.int32), 0) > 0:
            masses = _load_masses(mass, leaf, ok, probe, inside, probes)
            if JUDGED:
                score = tl.sum(tl.where(use[None, :, :], masses, 0.0), 2) / count[None, :]
                fit = ok[:, None] & (score >= tolerance)
            else:
                score = tl.sum(tl.exp2(masses - whole[None, :, :]), 2)
                fit = tl.broadcast_to(ok[:, None], score.shape)
            score = tl.where(score > 0, score, 0.0)  # also where it is not a number
            # Bits of positive floats are in their order; below them equal scores are in the order of the leaves.
            rank = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (leaf ^ LAST_LEAF).to(tl.int64)[:, None]
            best = _merge(tl.where(fit, rank, NONE), best, slot, TILE, SLOTS, ONE_CHUNK)
    chosen = tl.where(best == NONE, -1, (best & LAST_LEAF) ^ LAST_LEAF)
    to = out + group_at[:, None] * (SINKS + SLOTS) + SINKS + slot[None, :]
    tl.store(to, chosen, mask=inside[:, None] & (slot < SLOTS)[None, :])


@triton.jit
def _merge(rank, best, slot, TILE: tl.constexpr, SLOTS: tl.constexpr, ONE_CHUNK: tl.constexpr):
    """The SLOTS largest, in order, of the ranks [CHUNK, TILE] and the best of chunks before [TILE, len(slot)]."""
    result = tl.full(best.shape, NONE, tl.int64)
    last = tl.full((TILE,), 2**63 - 1, tl.int64)
    found = tl.max(tl.sum((rank != NONE).to(tl.int32), 0), 0) + tl.max(tl.sum((best != NONE).to(tl.int32), 1), 0)
    for turn in range(tl.minimum(found, SLOTS)):
        top = tl.max(tl.where(rank < last[None, :], rank, NONE), 0)
        if not ONE_CHUNK:
            top = tl.maximum(top, tl.max(tl.where(best < last[:, None], best, NONE), 1))
        result = tl.where(slot[None, :] == turn, top[:, None], result)
        last = top
    return result
