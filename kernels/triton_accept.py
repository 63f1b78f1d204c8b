"""The acceptance criterion of opened leaves: what a group's attention loses if a leaf is left to its moments."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div
from muse_dist.kernels.plain_blocks import Acceptance, Moments, Sight
from muse_dist.kernels.reference import UNSEEN
from muse_dist.kernels.triton_common import LOG2E, Tile, load_rows, load_vector, padded, products, sees, side

_UNSEEN = tl.constexpr(UNSEEN)


def masses_to_errors(
    mass: Tensor, probe: Tensor, sight: Sight, accept: Acceptance, scale: float, some: tuple[int, int], head: int,
    block: int, *, tile: Tile | None = None,
) -> None:
    """`reference.moment_errors` in place of the masses of the leaves that a block sees.

    Args:
        mass: fp32, in the first heads * J * probes numbers log masses in base 2 of the leaves at hand, for some heads
            and query blocks: [heads, J, blocks * U * runs].
        probe: [B, K, n, U, runs, D], multiplied by the scale and log2(e).
        some: how many heads, counted through all batch entries, and query blocks from `head` and `block` on.
        tile: launch shape; pinned by head dim and dtype if None.
    """
    blocks, groups, runs, dim = probe.shape[2:]
    parts, leaves = accept.leaf.mass.shape[3:]
    tile = _tile(dim, probe.dtype) if tile is None else tile
    rows = side(groups * runs // parts, tile.rows, tile.warps)
    leaf = Moments(*(x.contiguous() for x in accept.leaf))
    _judge[some[0] * some[1] * parts * ceil_div(groups * runs // parts, rows),](
        mass, probe, accept.anchor.contiguous(), leaf.mass, leaf.key, leaf.trace, sight.query, sight.key, scale, head,
        block, some[1], blocks, leaves, sight.halo, PROBES=groups * runs, PARTS=parts,
        PER_BLOCK=leaves // sight.key.shape[0], DIM=dim, CAUSAL=sight.causal, TRACE=accept.trace, ROWS=rows,
        LEAVES=side(leaves, tile.keys, tile.warps), DIM_PAD=padded(dim), num_warps=tile.warps, num_stages=tile.stages)


def _tile(dim: int, dtype: torch.dtype) -> Tile:
    row_bytes = padded(dim) * dtype.itemsize
    return Tile(64, 64, 4, 2) if row_bytes <= 256 else Tile(32, 32, 4, 1) if row_bytes <= 512 else Tile(16, 16, 4, 1)


@triton.jit(do_not_specialize=["head", "block", "some_blocks"])
def _judge(mass, probe, anchor, leaf_mass, key, trace, query_ids, key_ids, scale, head, block, some_blocks, blocks,
           leaves, halo, PROBES: tl.constexpr, PARTS: tl.constexpr, PER_BLOCK: tl.constexpr, DIM: tl.constexpr,
           CAUSAL: tl.constexpr, TRACE: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr,
           DIM_PAD: tl.constexpr):
    """One program for a tile of the probes that share an anchor: their totals, then the errors of all leaves seen."""
    each: tl.constexpr = PROBES // PARTS
    tiles: tl.constexpr = (each + ROWS - 1) // ROWS
    item = tl.program_id(0)
    row = item % tiles * ROWS + tl.arange(0, ROWS)
    inside = row < each
    part = item // tiles % PARTS
    offset = item // (tiles * PARTS) % some_blocks
    place = (item // (tiles * PARTS) // some_blocks).to(tl.int64)
    at = (head + place) * blocks + block + offset
    source = at * PARTS + part
    rows = load_rows(probe + (at * PROBES + part * each) * DIM, row, inside, DIM, DIM_PAD)
    about = load_vector(anchor + source * DIM, DIM, DIM_PAD)
    scale2 = scale * LOG2E
    if TRACE:
        step = rows.to(tl.float32) / scale2 - about[None, :]
        square = tl.sum(step * step, 1) * (0.5 * scale * scale2)
    query_id = tl.load(query_ids + block + offset)
    probes = some_blocks.to(tl.int64) * PROBES
    mass += place * leaves * probes + offset * PROBES + part * each + row[None, :]

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, leaves, LEAVES):
        leaf = start + tl.arange(0, LEAVES)
        ok = leaf < leaves
        ok = ok & sees(query_id, tl.load(key_ids + leaf // PER_BLOCK, mask=ok, other=0), -1, CAUSAL)
        masses = tl.load(mass + leaf[:, None] * probes, mask=ok[:, None] & inside[None, :], other=float("-inf"))
        new = tl.maximum(top, tl.max(masses, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(masses - base[None, :]), 0)
        top = new
    whole = top + tl.log2(total)

    for start in range(0, leaves, LEAVES):
        leaf = start + tl.arange(0, LEAVES)
        ok = leaf < leaves
        ok = ok & sees(query_id, tl.load(key_ids + leaf // PER_BLOCK, mask=ok, other=0), halo, CAUSAL)
        if tl.max(ok.to(tl.int32), 0) > 0:
            mean_key = load_rows(key + source * leaves * DIM, leaf, ok, DIM, DIM_PAD)
            shift = tl.load(leaf_mass + source * leaves + leaf, mask=ok, other=float("-inf")) * LOG2E
            shift -= scale2 * tl.sum(mean_key.to(tl.float32) * about[None, :], 1)
            logit = products(mean_key, rows) + shift[:, None]
            if TRACE:
                spread = tl.load(trace + source * leaves + leaf, mask=ok, other=0.0)
                logit += spread[:, None] * square[None, :]
            used = ok[:, None] & inside[None, :]
            exact = tl.exp2(tl.load(mass + leaf[:, None] * probes, mask=used, other=float("-inf")) - whole[None, :])
            # What is no number stays none, and its leaf closed.
            guess = tl.minimum(tl.exp2(logit - whole[None, :]), 1.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(mass + leaf[:, None] * probes, tl.abs(guess - exact) + _UNSEEN * exact, mask=used)
