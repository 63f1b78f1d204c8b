"""Far field and opened leaves in one pass over the query groups: forward, and what the backward shares with it.

A program takes one group of query rows (or a tile of a large one). It walks over tiles of leaves, which it sees through
their moments, then over the keys of the leaves its group has opened, with one online softmax.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div, power_of_two
from muse_dist.kernels.plain_blocks import Moments, Sight
from muse_dist.kernels.triton_common import (
    LOG2E, PRECISION, Tile, check_kernel_inputs, flags, forward_tile, keep_heads, leaf_span, load_rows, load_vector,
    padded, sees, side, store_rows,
)


def far_field(
    q: Tensor, anchor: Tensor, leaf: Moments, k: Tensor | None, v: Tensor | None, opened: Tensor | None, sight: Sight,
    scale: float, trace: bool, valid: Tensor | None = None, use: Tensor | None = None, *, tile: Tile | None = None,
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
        tile: launch shape; pinned by head dim and dtype if None.
    Returns:
        out [B, K, n, U, g, D] in the dtype of q and lse [B, K, n, U, g] in fp32; 0 and -inf for a group that sees
        nothing.
    """
    tile = forward_tile(q.shape[-1], q.dtype) if tile is None else tile
    call = FarCall(q, anchor, leaf, k, v, opened, sight, scale, trace, valid, use)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    grid, constants = call.launch(tile)
    _forward[grid](*call.tensors, out, lse, *call.numbers, **constants)
    return out, lse


class FarCall:
    """The arguments of a far-field launch, checked, contiguous, and in the order in which the kernels take them."""

    def __init__(
        self, q: Tensor, anchor: Tensor, leaf: Moments, k: Tensor | None, v: Tensor | None, opened: Tensor | None,
        sight: Sight, scale: float, trace: bool, valid: Tensor | None, use: Tensor | None,
    ) -> None:
        blocks, groups, size, dim = q.shape[2:]
        leaves = leaf.mass.shape[-1]
        keys = 1 if k is None else k.shape[3]
        check_kernel_inputs(dim, keys, q=q, anchor=anchor, leaf_key=leaf.key, leaf_value=leaf.value, k=k, v=v)
        slots = 0 if opened is None else opened.shape[-1]
        q, anchor = q.contiguous(), anchor.contiguous()
        leaf = Moments(*(x.contiguous() for x in leaf))
        self.per_block = leaves // sight.key.shape[0]
        self.parts = anchor.shape[3] if use is None else use.shape[-1]
        span = leaf_span(sight, self.per_block)
        use = None if use is None else use.contiguous()
        bias = _shift(anchor, leaf, span if use is None else None, scale)
        held = 0
        if slots and k is not None and v is not None and opened is not None:
            (k, held), (v, _) = keep_heads(k), keep_heads(v)
            opened = opened.contiguous()
            bias = _leave_out(bias, opened, use, span, self.parts)
        self.tensors = (
            q, anchor, bias, leaf.key, leaf.value, leaf.trace if trace else None, k if slots else None,
            v if slots else None, flags(valid), opened if slots else None, use, sight.query, sight.key, span)
        self.numbers = (scale, blocks, groups, leaves, held, leaf.mass.shape[2] if use is not None else 0, sight.halo)
        self.shape = q.shape
        self.constants = {
            "SIZE": size, "PARTS": self.parts, "PER_BLOCK": self.per_block, "LEAF": keys, "SLOTS": slots, "DIM": dim,
            "CAUSAL": sight.causal, "GAPS": sight.gaps, "TRACE": trace, "HAS_VALID": valid is not None,
            "SHARED": use is not None, "DIM_PAD": padded(dim), "SLOTS_PAD": power_of_two(slots)}

    def launch(self, tile: Tile) -> tuple[tuple[int, int], dict[str, int | bool]]:
        """Grid of a program for every tile of a group's rows, and the compile-time arguments."""
        batch, heads, blocks, groups, size = self.shape[:5]
        rows = side(size, tile.rows, tile.warps)
        keys = self.constants["LEAF"] * max(1, self.constants["SLOTS"])
        return (blocks * groups * ceil_div(size, rows), batch * heads), {
            **self.constants, "ROWS": rows, "LEAVES": side(tile.keys, tile.keys, tile.warps),
            "KEYS": side(keys, tile.keys, tile.warps), "num_warps": tile.warps, "num_stages": tile.stages}


def _shift(anchor: Tensor, leaf: Moments, span: Tensor | None, scale: float) -> Tensor:
    """mass - scale * anchor.key in base 2, fp32 in the shape of mass: the logit of a leaf for the query 0.

    With it a logit is shift + scale * q.key: queries are multiplied as they came, not rounded minus the anchor. `span`
    [n, 2] bounds the leaves that each block sees; None where blocks share their anchors.
    """
    parts, leaves, dim = anchor.shape[-2], leaf.mass.shape[-1], anchor.shape[-1]
    shift = torch.empty(leaf.mass.shape, dtype=torch.float32, device=anchor.device)
    rows = 64
    grid = (ceil_div(leaves, rows), anchor[0, 0].numel() // dim, anchor.shape[0] * anchor.shape[1])
    _shift_kernel[grid](
        anchor, leaf.mass, leaf.key, span, shift, scale, grid[1], leaves, PARTS=parts, SHARED=span is None, ROWS=rows,
        DIM=dim, DIM_PAD=padded(dim))
    return shift


@triton.jit
def _shift_kernel(anchor, mass, key, span, shift, scale, anchors, leaves, PARTS: tl.constexpr, SHARED: tl.constexpr,
                  ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    part = tl.program_id(1)
    at = tl.program_id(2).to(tl.int64) * anchors + part
    leaf = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = leaf < leaves
    if not SHARED:
        ok = (leaf >= tl.load(span + part // PARTS * 2)) & (leaf < tl.load(span + part // PARTS * 2 + 1))
    about = load_vector(anchor + at * DIM, DIM, DIM_PAD)
    keys = load_rows(key + at * leaves * DIM, leaf, ok, DIM, DIM_PAD).to(tl.float32)
    logit = tl.load(mass + at * leaves + leaf, mask=ok, other=0.0) - scale * tl.sum(keys * about[None, :], 1)
    tl.store(shift + at * leaves + leaf, logit * LOG2E, mask=ok)


@triton.jit
def anchor_of(use, part, batch, anchors, SHARED: tl.constexpr):
    """Where the anchor of a part of a block, and the moments about it, stand among all anchors."""
    source = part
    if SHARED:
        source = batch * anchors + tl.load(use + part).to(tl.int64)
    return source


def _leave_out(shift: Tensor, opened: Tensor, use: Tensor | None, span: Tensor, parts: int) -> Tensor:
    """fp32 [B, K, n, U, J]: what `_shift` says of every leaf to every group, -inf for those the group has opened.

    Leaves out of sight are not written. The kernels can fetch fp32 ahead of its use, which they cannot with flags.
    """
    (blocks, groups, slots), leaves = opened.shape[2:], shift.shape[-1]
    bias = torch.empty((*opened.shape[:4], leaves), dtype=torch.float32, device=shift.device)
    count = min(1024, padded(leaves))
    _leave_out_kernel[opened.shape[:4].numel(), ceil_div(leaves, count)](
        shift, opened, use, span, bias, blocks, leaves, shift.shape[2], GROUPS=groups, PARTS=parts, SLOTS=slots,
        SHARED=use is not None, COUNT=count, SLOTS_PAD=power_of_two(slots))
    return bias


@triton.jit
def _leave_out_kernel(shift, opened, use, span, bias, blocks, leaves, anchors, GROUPS: tl.constexpr,
                      PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr, COUNT: tl.constexpr,
                      SLOTS_PAD: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    block = group // GROUPS
    part = block * PARTS + group % GROUPS * PARTS // GROUPS
    source = anchor_of(use, part, block // blocks, anchors, SHARED)
    leaf = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    begin = tl.load(span + block % blocks * 2)
    stop = tl.load(span + block % blocks * 2 + 1)
    ok = (leaf >= begin) & (leaf < stop)
    result = tl.load(shift + source * leaves + leaf, mask=ok, other=0.0)
    for slot in range(filled_slots(opened + group * SLOTS, SLOTS, SLOTS_PAD)):
        result = tl.where(leaf == tl.load(opened + group * SLOTS + slot), float("-inf"), result)
    tl.store(bias + group * leaves + leaf, result, mask=ok)


@triton.jit
def filled_slots(opened, SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr):
    """How many slots of a group there are up to the last one that is not empty."""
    slot = tl.arange(0, SLOTS_PAD)
    filled = tl.load(opened + slot, mask=slot < SLOTS, other=-1) >= 0
    return tl.max(tl.where(filled, slot + 1, 0), 0)


@triton.jit
def opened_turns(opened, SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, LEAF: tl.constexpr, KEYS: tl.constexpr):
    """How many tiles of `opened_keys` hold all that a group has opened."""
    together: tl.constexpr = KEYS // LEAF if KEYS > LEAF else 1  # leaves in a tile
    tiles: tl.constexpr = (LEAF + KEYS - 1) // KEYS  # tiles in a leaf
    return (filled_slots(opened, SLOTS, SLOTS_PAD) + together - 1) // together * tiles


@triton.jit
def seen_leaves(leaf, stop, query_id, key_ids, halo, PER_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
                GAPS: tl.constexpr):
    """Which leaves from the first of its `leaf_span` on, which ends before `stop`, a query block sees."""
    ok = leaf < stop
    if GAPS:
        ok = ok & sees(query_id, tl.load(key_ids + leaf // PER_BLOCK, mask=ok, other=0), halo, CAUSAL)
    return ok


@triton.jit
def opened_keys(opened, valid, turn, held_from, SLOTS: tl.constexpr, LEAF: tl.constexpr, KEYS: tl.constexpr,
                HAS_VALID: tl.constexpr):
    """Tile `turn` of the keys of a group's opened leaves: their rows among all keys, which exist, and if any does.

    A tile is part of a leaf or, where leaves are shorter than tiles, holds several.
    """
    if KEYS <= LEAF:
        tiles: tl.constexpr = (LEAF + KEYS - 1) // KEYS
        leaf = tl.load(opened + turn // tiles).to(tl.int64)
        some = leaf >= 0
        leaf = tl.maximum(leaf, 0)  # an empty slot reads some leaf, so that the mask is known before the slot is
        place = turn % tiles * KEYS + tl.arange(0, KEYS)
        ok = place < LEAF
    else:
        each: tl.constexpr = KEYS // LEAF
        lane = tl.arange(0, KEYS)
        slot = turn * each + lane // LEAF
        ok = (slot < SLOTS) & (lane < each * LEAF)
        leaf = tl.load(opened + slot, mask=ok, other=-1).to(tl.int64)
        place = lane % LEAF
        ok = ok & (leaf >= 0)
        some = turn >= 0
    if HAS_VALID:
        ok = ok & (tl.load(valid + leaf * LEAF + place, mask=ok, other=0) != 0)
    return (held_from + leaf) * LEAF + place, ok, some


@triton.jit
def mask_keys(product, ok, LEAF: tl.constexpr, KEYS: tl.constexpr, HAS_VALID: tl.constexpr):
    """-inf for keys of a tile of `opened_keys` that do not exist; a tile of existing keys is left as it is."""
    if HAS_VALID or LEAF % KEYS != 0:
        product = tl.where(ok[None, :], product, float("-inf"))
    return product


@triton.jit
def _absorb(out, top, total, product, factor, offset, values):
    """One step of the online softmax in base 2: out [rows, D] under the largest logit `top`, and its weights' sum.

    Logits are factor * product + offset, the offset 0 or -inf for all: so a weight costs one multiply-add and one exp2.
    """
    new = tl.maximum(top, tl.max(product, 1) * factor + offset)
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(product * factor - (base - offset)[:, None])
    keep = tl.exp2(top - base)
    out = tl.dot(p.to(values.dtype), values, out * keep[:, None], input_precision=PRECISION)
    return out, new, total * keep + tl.sum(p, 1)


@triton.jit
def squared_steps(rows, about):
    """|q - a|^2 of every row of a tile, in fp32."""
    step = rows.to(tl.float32) - about[None, :]
    return tl.sum(step * step, 1)


@triton.jit
def _forward(q, anchor, bias, key, value, trace, k, v, valid, opened, use, query_ids, key_ids, span, out, lse, scale,
             blocks, groups, leaves, held, anchors, halo, SIZE: tl.constexpr, PARTS: tl.constexpr,
             PER_BLOCK: tl.constexpr, LEAF: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
             CAUSAL: tl.constexpr, GAPS: tl.constexpr, TRACE: tl.constexpr, HAS_VALID: tl.constexpr,
             SHARED: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr, KEYS: tl.constexpr,
             DIM_PAD: tl.constexpr, SLOTS_PAD: tl.constexpr):
    row_tiles: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    batch = tl.program_id(1).to(tl.int64)
    group = blocks * groups - 1 - tl.program_id(0) // row_tiles  # late blocks, which see most, start first
    block = group // groups
    at = batch * blocks * groups + group
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    inside = row < SIZE
    rows = load_rows(q + at * SIZE * DIM, row, inside, DIM, DIM_PAD)
    part = (batch * blocks + block) * PARTS + group % groups * PARTS // groups
    source = anchor_of(use, part, batch, anchors, SHARED)
    bias += (at if SLOTS > 0 else source) * leaves
    query_id = tl.load(query_ids + block)
    scale2 = scale * LOG2E
    if TRACE:
        about = load_vector(anchor + source * DIM, DIM, DIM_PAD)
        square = squared_steps(rows, about) * (0.5 * scale * scale2)

    total_out = tl.zeros((ROWS, DIM_PAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    stop = tl.load(span + 2 * block + 1)
    for start in range(tl.load(span + 2 * block), stop, LEAVES):
        leaf = start + tl.arange(0, LEAVES)
        ok = seen_leaves(leaf, stop, query_id, key_ids, halo, PER_BLOCK, CAUSAL, GAPS)
        mean_key = load_rows(key + source * leaves * DIM, leaf, ok, DIM, DIM_PAD)
        offset = tl.load(bias + leaf, mask=ok, other=float("-inf"))
        logit = tl.dot(rows, tl.trans(mean_key), input_precision=PRECISION) * scale2 + offset[None, :]
        if TRACE:
            spread = tl.load(trace + source * leaves + leaf, mask=ok, other=0.0)
            logit += square[:, None] * spread[None, :]
        mean_value = load_rows(value + source * leaves * DIM, leaf, ok, DIM, DIM_PAD)
        total_out, top, total = _absorb(total_out, top, total, logit, 1.0, 0.0, mean_value)
    if SLOTS > 0:
        for turn in range(opened_turns(opened + at * SLOTS, SLOTS, SLOTS_PAD, LEAF, KEYS)):
            key_row, ok, some = opened_keys(
                opened + at * SLOTS, valid, turn, batch * held, SLOTS, LEAF, KEYS, HAS_VALID)
            keys = load_rows(k, key_row, ok, DIM, DIM_PAD)
            product = mask_keys(tl.dot(rows, tl.trans(keys), input_precision=PRECISION), ok, LEAF, KEYS, HAS_VALID)
            values = load_rows(v, key_row, ok, DIM, DIM_PAD)
            offset = tl.where(some, 0.0, float("-inf"))
            total_out, top, total = _absorb(total_out, top, total, product, scale2, offset, values)
    result = total_out / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out + at * SIZE * DIM, row, inside, result, DIM, DIM_PAD)
    tl.store(lse + at * SIZE + row, (top + tl.log2(total)) / LOG2E, mask=inside)
