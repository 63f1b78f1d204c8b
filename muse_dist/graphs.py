"""CUDA graphs of forwards and backwards: a replay costs the host a few launches instead of a hundred.

Over ranks, graphs are cut where exchanges are posted and awaited. Those happen at every replay as they do without
graphs: overlapped with the same kernels, counted, named when they fail, and no graph keeps NCCL from shutting down.
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

MOST = 48  # recordings of a group or a device: a shape has two over ranks, three on one, and they keep their memory

# What each group's calls have recorded. Dies with the group, so nothing in it may hold the group.
_RECORDED: weakref.WeakKeyDictionary[ProcessGroup, Recorded] = weakref.WeakKeyDictionary()


@dataclass
class Recorded:
    """The recordings of a group or of a device. They share memory: one replay has to end before the next begins."""

    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)  # a pool's memory is shared on one stream
    found: dict[Hashable, Recording | None] = field(default_factory=dict)  # None: has run once
    last: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # the end of the last replay


@functools.cache
def _on_device(device: torch.device) -> Recorded:
    """What the calls of one device have recorded, for as long as the process lives."""
    with torch.cuda.device(device):
        return Recorded()


def replayed(
    key: Hashable, function: Function, inputs: Sequence[Tensor], comm: Communicator | None = None
) -> list[Tensor]:
    """What function(*inputs) returns, replayed from the second call on with a `key` and inputs of such shapes.

    Args:
        key: what decides, besides shapes, dtypes and the device of `inputs`, what the function launches.
        function: launches kernels and uses `comm`, without waiting for the GPU.
        comm: of the ranks that share the sequence; None on one device.
    Returns:
        Tensors of the caller's own, which no later replay overwrites.
    Raises:
        RuntimeError if there are too many keys, or if a call cannot be recorded.
    """
    if torch.cuda.is_current_stream_capturing():  # the user's own graph takes in everything
        return function(*inputs)
    recorded = _on_device(inputs[0].device) if comm is None else _RECORDED.get(comm.group)
    if recorded is None:
        assert comm is not None
        recorded = _RECORDED[comm.group] = Recorded()
    shapes = tuple((x.shape, x.dtype) for x in inputs)
    key = (type(comm), key, shapes, inputs[0].device, torch.are_deterministic_algorithms_enabled())
    if key not in recorded.found:
        if len(recorded.found) == MOST:
            raise RuntimeError(f"cuda_graphs=True: {MOST} calls are recorded, two or three a shape, and each keeps "
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


def _record(comm: Communicator | None, function: Function, inputs: Sequence[Tensor], recorded: Recorded) -> Recording:
    """A recording of the call; RuntimeError with the cause if that cannot be."""
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            return Recording(comm, function, inputs, recorded.pool, recorded.stream)
        torch.cuda.empty_cache()  # the allocator does not take back what it caches while it records
        if not any(recorded.found.values()):
            recorded.pool = torch.cuda.graph_pool_handle()  # a pool dies with the last graph that used it
        return Recording(comm, function, inputs, recorded.pool, recorded.stream)
    except Exception as error:
        raise RuntimeError(f"cuda_graphs=True: the call could not be recorded ({type(error).__name__}: {error}); "
                           "take cuda_graphs=False") from error


class Recording:
    """A function of tensors as graphs, and what the host does between them."""

    def __init__(
        self, comm: Communicator | None, function: Function, inputs: Sequence[Tensor], pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        """Record a call on `stream`, which must not be the default one. Nothing runs, and nothing is sent."""
        self.steps: list[Callable[[Any], None]] = []  # take the communicator of the call, or None
        self.pool = pool
        if comm is not None:
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
            if comm is not None:
                comm.between = None

    def replay(self, comm: Communicator | None, inputs: Sequence[Tensor]) -> list[Tensor]:
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
