"""All communication between context-parallel ranks. The only module of the package that imports torch.distributed.

Exchanges are posted and awaited apart, so that callers compute in between. Every buffer travels as bytes in one
collective for all heads and sequences of the batch, in sizes that are the same at every step.
"""
from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from muse_dist.kernels.limits import ceil_div
from muse_dist.stages import stage

LOG = logging.getLogger("muse_dist")
SUCCESS = 0  # of PyTorch's WorkResult, which torch.distributed does not export

# What the ranks of a group have agreed on, and which of its exchanges are under way. Both die with the group.
_AGREED: weakref.WeakKeyDictionary[ProcessGroup, set[str]] = weakref.WeakKeyDictionary()
_UNDER_WAY: weakref.WeakKeyDictionary[ProcessGroup, SimpleQueue[_Posted | None]] = weakref.WeakKeyDictionary()


@dataclass
class ByteCounter:
    """Bytes this rank received from others, by exchange. Pass one to `muse_attention` to measure."""

    received: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, count: int) -> None:
        self.received[name] = self.received.get(name, 0) + count

    def total(self) -> int:
        """Bytes received in all exchanges."""
        return sum(self.received.values())


@dataclass(frozen=True)
class Pending:
    """An exchange that has been posted; `wait` returns what arrived."""

    name: str
    work: dist.Work | _Later
    where: str
    sent: Tensor  # must live until the exchange is done
    finish: Callable[[], list[Tensor]]

    def wait(self) -> list[Tensor]:
        """Raises RuntimeError naming the exchange if a rank failed or the group's timeout passed.

        NCCL lets only the GPU wait; what fails there is named in the log, before PyTorch ends the process.
        """
        if isinstance(self.work, _Later):
            self.work.wait()
        else:
            _wait(self.work, self.name, self.where)
        return self.finish()


def _wait(work: dist.Work, name: str, where: str) -> None:
    try:
        with stage(f"wait for {name}"):
            work.wait()
    except Exception as error:
        raise RuntimeError(f"{_failure(name, where)}: {error}") from error


Between = Callable[[Callable[["Communicator"], None]], None]


@dataclass
class _Later:
    """An exchange of a call that is being recorded: every replay posts it and waits for it anew."""

    between: Between | None  # until it has been awaited: the recording holds this exchange
    name: str
    work: dist.Work | None = None  # of the replay under way

    def post(self, begin: Callable[[Communicator], dist.Work | _Later]) -> None:
        def act(comm: Communicator) -> None:
            work = begin(comm)
            assert not isinstance(work, _Later)
            self.work = work

        assert self.between is not None
        self.between(act)

    def wait(self) -> None:
        def act(comm: Communicator) -> None:
            assert self.work is not None
            _wait(self.work, self.name, comm._where())
            self.work = None

        between, self.between = self.between, None
        assert between is not None, "an exchange is awaited once"
        between(act)


class Communicator:
    """A process group as the attention uses it: byte exchanges with names, counted if asked."""

    def __init__(self, group: ProcessGroup, counter: ByteCounter | None = None) -> None:
        """Raises ValueError on a process that is not in `group`, TypeError if it is no process group."""
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this process is not a member of the group; call muse_attention on members only")
        if not isinstance(group, ProcessGroup):
            raise TypeError(f"group: must be a torch.distributed.ProcessGroup, not {type(group).__name__}; "
                            "torch.distributed.new_group or DeviceMesh.get_group makes one")
        self.group = group
        self.counter = counter
        self.rank = group.rank()
        self.size = group.size()
        # While a call is recorded (see graphs.py): takes what every replay does between the kernels before and after.
        self.between: Between | None = None

    def all_gather(self, name: str, *tensors: Tensor) -> Pending:
        """Post the gathering of tensors whose shapes and dtypes all ranks share; `wait` gives those of rank 0 first."""
        with stage(f"post {name}"):
            send = packed(tensors, tensors[0].device)
            received = send.new_empty(self.size, send.numel())
            work = self._post(name, send.device, (self.size - 1) * send.numel(),
                              lambda group: _gather(received.view(-1), send, group))
        specs = [(x.shape, x.dtype) for x in tensors]
        return Pending(name, work, self._where(), send,
                       lambda: [x for part in received for x in _from_bytes(part, specs)])

    def all_to_all(
        self, name: str, send: Sequence[Sequence[Tensor]],
        receive: Sequence[Sequence[tuple[Sequence[int], torch.dtype]]], device: torch.device,
    ) -> Pending:
        """Post the sending of `send[r]` to every rank r, while `receive[r]` gives the shapes and dtypes r sends here.

        `wait` gives the tensors received, those of rank 0 first. A rank's own entry is empty.
        """
        sizes = [sum(padded(prod(shape) * dtype.itemsize) for shape, dtype in specs) for specs in receive]
        with stage(f"post {name}"):
            sent = [sum(padded(x.nbytes) for x in tensors) for tensors in send]
            received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            data = packed([x for tensors in send for x in tensors], device)
            work = self._post(name, device, sum(sizes), lambda group: dist.all_to_all_single(
                received, data, sizes, sent, group=group, async_op=True))
        specs = [spec for part in receive for spec in part]
        return Pending(name, work, self._where(), data, lambda: _from_bytes(received, specs))

    def agree(self, key: str, problem: str | None) -> None:
        """Check that all ranks call with the same `key` and none has a `problem`: once for each key.

        Raises ValueError with what every rank has to say, on all ranks. A rank that differs in a later call, after the
        others have agreed, cannot reach them: it waits for the group's timeout, and then says what it knows.
        """
        known = _AGREED.setdefault(self.group, set())
        if problem is None and key in known:
            return
        said: list[tuple[str, str | None]] = [("", None)] * self.size
        try:
            dist.all_gather_object(said, (key, problem), group=self.group)
        except Exception as error:
            if problem is not None:  # the others had no problem and went on, so they did not listen
                raise ValueError(problem) from error
            raise RuntimeError(
                f"exchange 'agreement' was pending on {self._where()} and failed: another rank died, hung, left, or "
                f"calls with other shapes or settings than this one, which has {key}: {error}") from error
        troubles = [f"rank {rank}: {trouble}" for rank, (_, trouble) in enumerate(said) if trouble is not None]
        if troubles:
            raise ValueError("context-parallel attention cannot run; " + "; ".join(troubles))
        if len({spoken for spoken, _ in said}) > 1:
            raise ValueError("the ranks of the group call with different shapes or configs; give all of them the same: "
                             + "; ".join(f"rank {rank}: {spoken}" for rank, (spoken, _) in enumerate(said)))
        known.add(key)

    def _post(
        self, name: str, device: torch.device, count: int, call: Callable[[ProcessGroup], dist.Work | None]
    ) -> dist.Work | _Later:
        """Begin an exchange by which this rank receives `count` bytes; in a recording, have every replay do so."""
        if self.between is not None:
            later = _Later(self.between, name)
            later.post(lambda comm: comm._post(name, device, count, call))
            return later
        try:
            work = call(self.group)
        except Exception as error:
            raise RuntimeError(f"exchange '{name}' could not be posted on {self._where()}, because another rank died, "
                               f"hung or left: {error}") from error
        assert work is not None
        self._watch(name, device, work)
        if self.counter is not None:
            self.counter.add(name, count)
        return work

    def _watch(self, name: str, device: torch.device, work: dist.Work) -> None:
        """Have a thread name an exchange of NCCL's if it fails. Neither host nor GPU waits for it."""
        on_nccl = f"{device.type}:nccl" in dist.get_backend_config(self.group).split(",")
        # While a CUDA graph is captured nothing is under way, and no result would ever come.
        if not on_nccl or torch.cuda.is_current_stream_capturing():
            return
        queue = _UNDER_WAY.get(self.group)
        if queue is None:
            queue = _UNDER_WAY[self.group] = SimpleQueue()
            weakref.finalize(self.group, queue.put, None)
            threading.Thread(target=_name_failures, args=(queue,), name="muse_dist exchanges", daemon=True).start()
        result = work.get_future_result()  # type: ignore[attr-defined]  # its stubs lack it
        queue.put(_Posted(_failure(name, self._where()), result))

    def _where(self) -> str:
        return f"rank {self.rank} of {self.size}"


@dataclass(frozen=True)
class _Posted:
    """An exchange of NCCL's, with what to say if it fails and how PyTorch tells."""

    failure: str
    result: torch.futures.Future[int]


def _name_failures(queue: SimpleQueue[_Posted | None]) -> None:
    """Log the failures of exchanges, in the order they were posted, until the queue says None.

    PyTorch's watchdog gives the results, and ends the process soon after the first that is none.
    """
    while (posted := queue.get()) is not None:
        # Many are done at once: asking first spares a change of threads for each.
        result = posted.result.value() if posted.result.done() else posted.result.wait()
        if result != SUCCESS:
            LOG.error("%s: see the message of PyTorch's NCCL watchdog", posted.failure)


def _failure(name: str, where: str) -> str:
    return f"exchange '{name}' was pending on {where} and failed, because another rank died, hung or left"


def _gather(received: Tensor, send: Tensor, group: ProcessGroup) -> dist.Work | None:
    """Into one tensor, as NCCL does it; newer versions of torch have another name for it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(received, send, group=group, async_op=True)  # type: ignore[no-any-return]


def padded(count: int) -> int:
    """Tensors in a buffer start at multiples of 16 bytes, so that they can be viewed in any dtype."""
    return ceil_div(count, 16) * 16


def words(*tensors: Tensor) -> list[Tensor]:
    """The same memory, read as words of 8 bytes where all tensors can be: torch copies strided rows word by word."""
    def fits(x: Tensor) -> bool:
        count = max(1, 8 // x.element_size())
        return x.dim() > 0 and x.stride(-1) == 1 and not any(
            n % count for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))

    return [x.view(torch.int64) for x in tensors] if all(map(fits, tensors)) else list(tensors)


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Copies of tensors as bytes, uint8 [bytes], one behind the other, each padded with zeros."""
    size, used = sum(padded(x.nbytes) for x in tensors), sum(x.nbytes for x in tensors)
    data = (torch.empty if size == used else torch.zeros)(size, dtype=torch.uint8, device=device)
    places = _from_bytes(data, [(x.shape, x.dtype) for x in tensors])
    pairs = [words(place, x.detach()) for place, x in zip(places, tensors) if x.numel()]
    if pairs:
        to, what = zip(*pairs)
        torch._foreach_copy_(list(to), list(what))  # one launch, if all are contiguous and of one dtype
    return data


def _from_bytes(buffer: Tensor, specs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """The inverse of `packed`, one after the other, for tensors of these shapes and dtypes."""
    tensors, at = [], 0
    for shape, dtype in specs:
        size = prod(shape) * dtype.itemsize
        tensors.append(buffer[at:at + size].view(dtype).view(tuple(shape)))
        at += padded(size)
    return tensors
