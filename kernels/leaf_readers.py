"""Which groups opened a leaf: the index that gradients of opened keys are summed with, in a fixed order."""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div

LEAST = 64  # readers of a piece at least: fewer hardly fill a program


class Readers(NamedTuple):
    """Slots of `opened` sorted by the leaf that stands in them.

    Leaf j of batch b is called j * batch + b: early leaves have the most readers, and long work should start first.
    The list is cut at every multiple of a length, too: a few leaves may have most of the readers. A program sums up one
    piece, of one leaf: the first piece of every leaf, and every piece that begins at a cut. How many slots are filled
    only the device knows: it takes the least length with which they make no more than `cuts` pieces.
    """

    slot: Tensor  # int64 [slots] places in `opened` [batch, groups, O]; those of each leaf together and in order
    name: Tensor  # int32 [slots] the leaf in each of them; leaves * batch for an empty slot
    bounds: Tensor  # int32 [leaves * batch + 1] where the slots of each leaf begin
    cuts: int  # pieces that may begin at a cut
    least: int  # readers of a piece between two cuts, at least


def leaf_readers(opened: Tensor, leaves: int, cuts: int, least: int = LEAST) -> Readers:
    """Invert opened leaves [batch, groups, O] (-1: empty slot). Nothing waits for the device."""
    batch, count = opened.shape[0], opened.numel()
    name = torch.empty(count, dtype=torch.int32, device=opened.device)
    _names[(ceil_div(count, 1024),)](opened.contiguous(), name, batch, count // batch, count, leaves, TILE=1024)
    name, slot = name.sort(stable=True)
    every = torch.arange(leaves * batch + 1, device=name.device, dtype=torch.int32)
    return Readers(slot, name, torch.searchsorted(name, every, out_int32=True), cuts, least)


@triton.jit
def _names(opened, name, batch, per_batch, count, leaves, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    leaf = tl.load(opened + at, mask=at < count, other=-1).to(tl.int32)
    tl.store(name + at, tl.where(leaf < 0, leaves * batch, leaf * batch + at // per_batch), mask=at < count)


@triton.jit
def piece_length(bounds, names, cuts, least):
    """The distance of the cuts."""
    return tl.maximum(tl.cdiv(tl.load(bounds + names), cuts), least)


@triton.jit
def piece(item, name, bounds, names, cuts, least):
    """What program `item` sums up: its leaf's name, the slots from first to before last, and its partial sum.

    Programs 0 to cuts - 1 take pieces that begin at a cut; name = -1 if a leaf begins there or none does. The others
    take the first pieces. The partial sum is -1 where a piece is all of its leaf.
    """
    longest = piece_length(bounds, names, cuts, least)
    if item < cuts:
        first = item * longest
        leaf = tl.load(name + first, mask=first < tl.load(bounds + names), other=names)
        begin = tl.load(bounds + tl.minimum(leaf, names))
        leaf = tl.where((leaf >= names) | (begin >= first), -1, leaf)
        last = tl.minimum(tl.load(bounds + tl.maximum(leaf, 0) + 1), first + longest)
        place = item
    else:
        leaf = item - cuts
        first = tl.load(bounds + leaf)
        end = tl.load(bounds + leaf + 1)
        last = tl.minimum(end, (first // longest + 1) * longest)
        place = tl.where(last < end, cuts + first // longest, -1)
    return leaf, first, last, place
