"""CUDA graphs of forwards and backwards: a replay costs the host a few launches instead of a hundred.

Over ranks, graphs are cut where exchanges are posted and awaited. Those happen at every replay as they do without
graphs: overlapped with the same kernels, counted, named when they fail, and no graph keeps NCCL from shutting down.
"""
from __future__ import annotations

import contextlib
import threading
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
# The same of calls on one device; until `forget_graphs`.
_DEVICES: dict[torch.device, Recorded] = {}


@dataclass
class Recorded:
    """The recordings of a group or of a device. They share memory: one replay has to end before the next begins."""

    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)  # a pool's memory is shared on one stream
    found: dict[Hashable, Recording] = field(default_factory=dict)
    run: set[tuple[Hashable, int]] = field(default_factory=set)  # keys, and the threads that have run them once
    last: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # the end of the last replay
    lock: threading.RLock = field(default_factory=threading.RLock)  # recordings read and write buffers of their own


def _of(comm: Communicator | None, device: torch.device) -> Recorded:
    """What calls of a group, or of one device, have recorded."""
    found = _DEVICES.get(device) if comm is None else _RECORDED.get(comm.group)
    if found is not None:
        return found
    with torch.cuda.device(device):
        made = Recorded()
    return _DEVICES.setdefault(device, made) if comm is None else _RECORDED.setdefault(comm.group, made)


def replayed(
    key: Hashable, function: Function, inputs: Sequence[Tensor], comm: Communicator | None = None
) -> list[Tensor]:
    """What function(*inputs) returns, replayed from a thread's second call on with a `key` and inputs of such shapes.

    Args:
        key: what decides, besides shapes, dtypes and the device of `inputs`, what the function launches.
        function: launches kernels and uses `comm`, without waiting for the GPU.
        comm: of the ranks that share the sequence; None on one device.
    Returns:
        Tensors of the caller's own, which no later replay overwrites.
    Raises:
        RuntimeError if a call cannot be recorded. Beyond `MOST` recordings calls run as without graphs, with a warning.
    """
    if torch.cuda.is_current_stream_capturing():  # the user's own graph takes in everything
        return function(*inputs)
    device = inputs[0].device
    recorded = _of(comm, device)
    shapes = tuple((x.shape, x.dtype) for x in inputs)
    key = (type(comm), key, shapes, device, torch.are_deterministic_algorithms_enabled(),
           torch.is_deterministic_algorithms_warn_only_enabled())
    with recorded.lock:
        if key not in recorded.found:
            # What a graph cannot hold comes first: kernels are compiled, and libraries start, cuDNN once a thread.
            here = key, threading.get_ident()
            if here not in recorded.run or _full(recorded):
                outputs = function(*inputs)
                recorded.run.add(here)
                return outputs
            recorded.found[key] = _record(comm, function, inputs, recorded)
        recording = recorded.found[key]
        stream = torch.cuda.current_stream(device)
        stream.wait_event(recorded.last)
        try:
            return recording.replay(comm, inputs)
        finally:
            recorded.last.record(stream)


def _full(recorded: Recorded) -> bool:
    """Whether there is no place for another recording, with a warning."""
    if len(recorded.found) < MOST:
        return False
    warnings.warn(f"cuda_graphs=True: {MOST} calls are recorded, two or three a shape, and each keeps memory; other "
                  "shapes run without graphs. Pad sequences to a few lengths, or call muse_dist.forget_graphs()",
                  stacklevel=3)
    return True


def forget_graphs() -> None:
    """Give up the graphs that calls with cuda_graphs=True have recorded in this process, and the memory they keep.

    The next call with a shape runs as the first one did, and the one after it is recorded. On ranks, graphs also end
    with their group.
    """
    for recorded in [*_RECORDED.values(), *_DEVICES.values()]:
        recorded.last.synchronize()
    _RECORDED.clear()
    _DEVICES.clear()


def _record(comm: Communicator | None, function: Function, inputs: Sequence[Tensor], recorded: Recorded) -> Recording:
    """A recording of the call; RuntimeError with the cause if that cannot be."""
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            return _attempt(comm, function, inputs, recorded)
        torch.cuda.empty_cache()  # the allocator does not take back what it caches while it records
        return _attempt(comm, function, inputs, recorded)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(f"cuda_graphs=True: the call could not be recorded ({type(error).__name__}: {error}); "
                           "take cuda_graphs=False") from error


def _attempt(comm: Communicator | None, function: Function, inputs: Sequence[Tensor], recorded: Recorded) -> Recording:
    if not recorded.found:
        recorded.pool = torch.cuda.graph_pool_handle()  # a pool dies with the last graph that used it
    recording = Recording(comm, function, inputs, recorded.pool, recorded.stream)
    torch.cuda.current_stream(inputs[0].device).wait_stream(recorded.stream)  # under deterministic algorithms it fills
    return recording


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
