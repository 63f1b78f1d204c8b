"""The processes of one training run: started by torchrun, or just this one."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from muse_dist.layout import Layout, LayoutName

TIMEOUT = 600  # seconds for an exchange; a rank that waits longer reports which one and stops

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` that share its sequences, and among all; the groups are None where there is one.

    `gradients` and `files` are groups of all ranks of their own, so that averages of gradients, and checkpoints that
    are written meanwhile, never mix with the exchanges of the attention.
    """

    rank: int
    size: int
    device: torch.device
    layout: LayoutName
    group: dist.ProcessGroup | None = None
    gradients: dist.ProcessGroup | None = None
    files: dist.ProcessGroup | None = None  # on CPUs
    replica: int = 0  # which of the `replicas` sets of ranks, each of which reads other sequences
    replicas: int = 1

    @property
    def world(self) -> int:
        """All ranks of the run."""
        return self.size * self.replicas

    @property
    def world_rank(self) -> int:
        """This rank's place among all."""
        return self.replica * self.size + self.rank

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.world_rank == 0

    def split(self, tokens: int, block: int) -> Layout:
        """Who reads which of the `tokens` tokens of a sequence; ValueError if they do not divide."""
        return Layout(self.layout, self.size, tokens, block)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        if self.gradients is not None:
            dist.all_reduce(x, group=self.gradients)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of the ranks that share a sequence, of equal shapes."""
        if self.group is None:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def collect(self, value: Any) -> list[Any]:
        """One value from every rank, in rank order, on every rank. Not while a checkpoint is being written."""
        if self.files is None:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.files)
        return found

    def agree(self, problem: str | None) -> None:
        """Raise ValueError on every rank if any has a problem, instead of leaving the others to wait for it."""
        problems = [found for found in self.collect(problem) if found is not None]
        if problems:
            raise ValueError(problems[0])

    def on_first(self, function: Callable[[], Value]) -> Value | None:
        """What `function` returns on the first rank, None on the others; its ValueError or OSError is everyone's."""
        value, problem = None, None
        if self.first:
            try:
                value = function()
            except (OSError, ValueError) as error:
                problem = str(error)
        self.agree(problem)
        return value


def started_processes(context_parallel: int) -> tuple[int, int]:
    """How many processes were started, and how many of them share a sequence. ValueError as of `join_ranks`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    size = context_parallel or world
    if world % size:
        raise ValueError(f"train.context_parallel={size} must divide the {world} processes that were started: start "
                         "a multiple of it, with torchrun for example, or take another --context-parallel (0: all)")
    return world, size


@contextmanager
def join_ranks(
    device: torch.device, layout: LayoutName, context_parallel: int = 0, timeout: int = TIMEOUT
) -> Iterator[Ranks]:
    """Join the processes that torchrun started: gloo on the CPU, NCCL on GPUs, one GPU a process.

    Args:
        context_parallel: ranks that share a sequence, neighbours of each other; 0 for all.
        timeout: seconds for an exchange.
    Raises:
        ValueError: the processes are no multiple of `context_parallel`.
    """
    world, size = started_processes(context_parallel)
    if world == 1:
        yield Ranks(0, 1, device, layout)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit, **_meeting(limit))
    try:
        rank = dist.get_rank()
        gradients = dist.new_group(timeout=limit)
        files = dist.new_group(backend="gloo", timeout=limit)
        # Every process has to take part in the making of every group.
        sharing = [dist.new_group(list(range(at, at + size)), timeout=limit) for at in range(0, world, size)]
        group = sharing[rank // size] if size > 1 else None
        yield Ranks(rank % size, size, device, layout, group, gradients, files, rank // size, world // size)
        dist.barrier(files)  # no rank may leave while another still reads from it
    finally:
        dist.destroy_process_group()


def _meeting(limit: timedelta) -> dict[str, Any]:
    """Where the processes of this start meet: arguments of `init_process_group`, none where its own choice is right.

    torchrun keeps its store when it restarts the processes (--max-restarts), with what those before wrote there: a rank
    could take the address of a dead one for its successor's. On one host all know how often they were restarted; for
    several, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which gives every start a store of its own.
    """
    said = os.environ
    if said.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or said.get("LOCAL_WORLD_SIZE") != said["WORLD_SIZE"]:
        return {}
    store = dist.TCPStore(said["MASTER_ADDR"], int(said["MASTER_PORT"]), is_master=False, timeout=limit)
    return {"store": dist.PrefixStore(f"start {said['TORCHELASTIC_RESTART_COUNT']}", store), "rank": int(said["RANK"]),
            "world_size": int(said["WORLD_SIZE"])}
