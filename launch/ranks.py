"""The processes of one training run: started by torchrun, or just this one."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from muse_dist.layout import Layout, LayoutName

TIMEOUT = timedelta(minutes=10)  # for an exchange; a rank that waits longer reports which one and stops


@dataclass(frozen=True)
class Ranks:
    """Ranks that share every sequence; the groups are None where there is one rank.

    `gradients` is a group of its own, so that averages of gradients never mix with the exchanges of the attention.
    """

    rank: int
    size: int
    device: torch.device
    layout: LayoutName
    group: dist.ProcessGroup | None = None
    gradients: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def split(self, tokens: int, block: int) -> Layout:
        """Who reads which of the `tokens` tokens of a sequence; ValueError if they do not divide."""
        return Layout(self.layout, self.size, tokens, block)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, in place."""
        if self.gradients is not None:
            dist.all_reduce(x, group=self.gradients)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of equal shapes."""
        if self.gradients is None:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.gradients)
        return parts


@contextmanager
def join_ranks(device: torch.device, layout: LayoutName) -> Iterator[Ranks]:
    """Join the processes that torchrun started: gloo on the CPU, NCCL on GPUs, one GPU a process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(0, 1, device, layout)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    everyone = list(range(dist.get_world_size()))
    groups = [dist.new_group(everyone, timeout=TIMEOUT) for _ in range(2)]
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, layout, groups[0], groups[1])
        dist.barrier()  # no rank may leave while another still reads from it
    finally:
        dist.destroy_process_group()
