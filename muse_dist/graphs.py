"""CUDA graphs of a rank's forward and backward: a replay costs the host a few launches instead of hundreds.

Graphs are cut where exchanges are posted and awaited. Those happen at every replay as they do without graphs:
overlapped with the same kernels, counted, named when they fail, and no graph keeps NCCL from shutting down.
"""
from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muse_dist.comm import Communicator, ProcessGroup

Function = Callable[..., "list[Tensor]"]

MOST = 32  # recordings of a group: every shape has two, which keep their memory

# What each group's calls have recorded. Dies with the group, so nothing in it may hold the group.
_RECORDED: weakref.WeakKeyDictionary[ProcessGroup, Recorded] = weakref.WeakKeyDictionary()


@dataclass
class Recorded:
    """The recordings of a group. They share memory, so that one replay has to end before the next begins."""

    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)  # a pool's memory is shared on one stream
    found: dict[Hashable, Recording | None] = field(default_factory=dict)  # None: has run once
    last: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # the end of the last replay


def replayed(comm: Communicator, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What function(*inputs) returns, replayed from the second call with a `key` on.

    Args:
        key: everything that decides what the function launches.
        function: launches kernels and uses `comm`, without waiting for the GPU.
    Returns:
        Tensors of the caller's own, which no later replay overwrites.
    Raises:
        RuntimeError if there are too many keys, or if a call cannot be recorded.
    """
    if torch.cuda.is_current_stream_capturing():  # the user's own graph takes in everything
        return function(*inputs)
    recorded = _RECORDED.get(comm.group)
    if recorded is None:
        recorded = _RECORDED[comm.group] = Recorded()
    key = (type(comm), key)
    if key not in recorded.found:
        if len(recorded.found) == MOST:
            raise RuntimeError(f"cuda_graphs=True: calls of {MOST // 2} different shapes are recorded, and each keeps "
                               "memory; pad sequences to a few lengths, or take cuda_graphs=False")
        outputs = function(*inputs)  # kernels are compiled and libraries start, which no graph can hold
        recorded.found[key] = None
        return outputs
    recording = recorded.found[key]
    if recording is None:
        recording = recorded.found[key] = _record(comm, function, inputs, recorded)
    stream = torch.cuda.current_stream()
    stream.wait_event(recorded.last)
    outputs = recording.replay(comm, inputs)
    recorded.last.record(stream)
    return outputs


def _record(comm: Communicator, function: Function, inputs: Sequence[Tensor], recorded: Recorded) -> Recording:
    """A recording of the call; RuntimeError with the cause if that cannot be."""
    record = functools.partial(Recording, comm, function, inputs, recorded.pool, recorded.stream)
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            return record()
        torch.cuda.empty_cache()  # the allocator does not take back what it caches while it records
        return record()
    except Exception as error:
        raise RuntimeError(f"cuda_graphs=True: the call could not be recorded ({type(error).__name__}: {error}); "
                           "take cuda_graphs=False") from error


class Recording:
    """A function of tensors as graphs, and what the host does between them."""

    def __init__(
        self, comm: Communicator, function: Function, inputs: Sequence[Tensor], pool: Any, stream: torch.cuda.Stream
    ) -> None:
        """Record a call on `stream`, which must not be the default one. Nothing runs, and nothing is sent."""
        self.steps: list[Callable[[Communicator], None]] = []
        self.pool = pool
        comm.between = self._cut
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
                self.inputs = [torch.empty_like(x) for x in inputs]
                self._begin()
                try:
                    self.outputs = function(*self.inputs)
                except BaseException:
                    self._abandon()
                    raise
                self._end()
        finally:
            comm.between = None

    def replay(self, comm: Communicator, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the outputs for other inputs; exchanges go through `comm`, which counts them."""
        torch._foreach_copy_(self.inputs, list(inputs))
        for step in self.steps:
            step(comm)
        outputs = [torch.empty_like(x) for x in self.outputs]
        torch._foreach_copy_(outputs, self.outputs)
        return outputs

    def _cut(self, action: Callable[[Communicator], None]) -> None:
        """Have the host do something before the kernels that follow."""
        self._end()
        self.steps.append(action)
        self._begin()

    def _begin(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks about events meanwhile, which only a recording of this thread alone allows.
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # two exchanges in a row
            self.graph.capture_end()
        graph = self.graph
        self.steps.append(lambda comm: graph.replay())

    def _abandon(self) -> None:
        """Leave the stream as it was after an error, which must not be hidden by what ending the graph says."""
        if torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(Exception):
                self.graph.capture_end()
