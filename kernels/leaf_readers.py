"""Which groups opened a leaf: the index that gradients of opened keys are summed with, in a fixed order."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 256  # groups that one program reads; leaves with more readers, such as sinks, are shared by several programs


class Readers(NamedTuple):
    """Work items, each a leaf and a run of the groups that opened it.

    There are L = J * batch leaves; leaf j of batch b is j * batch + b.
    """

    group: Tensor  # int32 [entries] groups of a batch, those of each leaf together and in order
    leaf: Tensor  # int32 [items], L where there is no such item
    first: Tensor  # int32 [items] its run of `group`
    last: Tensor  # int32 [items] one behind the run
    slot: Tensor  # int32 [items] the partial sum the item writes; -1: it is the leaf's only one
    shared: Tensor  # int32 [L, 2] the partial sums of a leaf: the first, and how many; 0 if it has one item
    slots: int  # partial sums there may be


def leaf_readers(opened: Tensor, leaves: int, longest: int = LONGEST) -> Readers:
    """Invert opened leaves [batch, groups, O] (-1: empty slot) to lists of groups. Nothing waits for the device.

    Sizes follow from the shapes alone: the number of items and partial sums are upper bounds.
    """
    batch, _, slots = opened.shape
    offset = torch.arange(batch, device=opened.device, dtype=torch.int32)[:, None, None]
    total = leaves * batch
    # Leaf by leaf, not batch by batch: early leaves have the most readers, and long work should start first.
    name = torch.where(opened < 0, total, opened * batch + offset).to(torch.int32).flatten()
    name, entry = name.sort(stable=True)
    bounds = torch.searchsorted(name, torch.arange(total + 1, device=name.device, dtype=torch.int32), out_int32=True)
    start, count = bounds[:-1], bounds.diff()
    chunks = ((count + longest - 1) // longest).clamp(min=1)
    behind = chunks.cumsum(0, dtype=torch.int32)
    item = torch.arange(total + len(entry) // longest, device=name.device, dtype=torch.int32)
    leaf = torch.searchsorted(behind, item, right=True, out_int32=True)
    used = leaf.clamp(max=total - 1)
    nth = item - (behind - chunks)[used]
    first = start[used] + nth * longest
    last = torch.minimum(first + longest, (start + count)[used])
    partial = torch.where(chunks > 1, chunks, 0)
    before = partial.cumsum(0, dtype=torch.int32) - partial
    slot = torch.where(chunks[used] > 1, before[used] + nth, -1)
    group = entry // max(slots, 1) % opened.shape[1]
    return Readers(group.to(torch.int32), leaf, first, last, slot, torch.stack([before, partial], 1),
                   2 * len(entry) // longest)
