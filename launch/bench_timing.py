"""Times and peak memory of a forward and a backward: CUDA events on a GPU, the host's clock on a CPU."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from launch.bench_exact import relative
from launch.ranks import Ranks

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Value = TypeVar("Value")
LEAST, MOST = 3, 100  # repetitions of a measurement
REPLAY_TOLERANCE = 0.02  # relative: kernels that add with atomics give other bits every time
CACHE_BYTES = 256 << 20  # more than any GPU's L2 cache holds


class Spread(NamedTuple):
    """Seconds: the median, the 10th and the 90th percentile of `repeats` runs."""

    median: float
    low: float
    high: float
    repeats: int


class Times(NamedTuple):
    """Of one attention; `both` is the sum of a forward and its backward, repetition by repetition."""

    forward: Spread
    backward: Spread
    both: Spread


def spread(seconds: Sequence[float]) -> Spread:
    """Percentiles of repeated measurements."""
    values = torch.tensor(seconds, dtype=torch.float64)
    low, median, high = values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Spread(median, low, high, len(seconds))


def step(function: Attention, leaves: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v, given the output's gradient."""
    q, k, v = leaves
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, list(leaves), dout)]


def measure(
    function: Attention, leaves: Sequence[Tensor], dout: Tensor, ranks: Ranks, seconds: float, graphs: bool = False
) -> tuple[Times, int | None]:
    """Times and peak memory of an attention that has run before, so that nothing is compiled any more.

    Args:
        leaves: q, k and v of this rank, which require gradients; dout: the output's gradient.
        seconds: when to stop repeating, after three repetitions at least.
        graphs: replay CUDA graphs, one of the forward and one of both, instead of launching kernels from the host.
    Returns:
        Times, those of the slowest rank, and the largest peak of allocated bytes of any rank, with q, k, v and dout:
        None on a CPU.
    """
    peak, estimate = _peak_bytes(function, leaves, dout, ranks)
    count = min(max(int(seconds / estimate), LEAST), MOST)
    if graphs:
        replays = _on_all(ranks, lambda: _captured(function, leaves, dout))
        times = timed(lambda: _replay_marks(replays, ranks), ranks, count)
        wanted = step(function, leaves, dout)
        _on_all(ranks, lambda: replays.compare(wanted))
        pairs = [[forward, both - forward] for forward, both in times]
    else:
        pairs = timed(lambda: _marks(function, leaves, dout, ranks), ranks, count)
    forward, backward = zip(*pairs)
    return Times(spread(forward), spread(backward), spread([sum(pair) for pair in pairs])), peak


class Replays(NamedTuple):
    """CUDA graphs of a forward, and of a forward and its backward."""

    forward: torch.cuda.CUDAGraph
    both: torch.cuda.CUDAGraph
    results: list[Tensor]  # out, dq, dk and dv of the last replay

    def compare(self, wanted: Sequence[Tensor]) -> None:
        """RuntimeError unless the last replay gave what the same step gives without graphs."""
        for name, found, right in zip(("out", "dq", "dk", "dv"), self.results, wanted):
            error = relative(found, right)
            if not error <= REPLAY_TOLERANCE:
                raise RuntimeError(f"the CUDA graph's {name} differs by {error:.1g} from that without graphs")


def _on_all(ranks: Ranks, function: Callable[[], Value]) -> Value:
    """What `function` returns; if it fails on any rank, none goes on to exchanges that this one would miss."""
    problem = None
    try:
        value = function()
    except Exception as error:  # whatever cannot be captured, the next variant may
        problem = f"{type(error).__name__}: {error}"
    ranks.agree(problem)
    return value


def _captured(function: Attention, leaves: Sequence[Tensor], dout: Tensor) -> Replays:
    """Graphs of what has run before, exchanges between ranks too. Nothing in them may wait for the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(function, leaves, dout)
    torch.cuda.current_stream().wait_stream(stream)
    forward, both = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # NCCL's watchdog asks about events meanwhile, which only captures of this thread alone allow.
    with torch.cuda.graph(forward, capture_error_mode="thread_local"):
        function(*leaves)
    with torch.cuda.graph(both, capture_error_mode="thread_local"):
        results = step(function, leaves, dout)
    return Replays(forward, both, results)


def _replay_marks(replays: Replays, ranks: Ranks) -> list[torch.cuda.Event | float]:
    marks = [mark(ranks.device)]
    for graph in (replays.forward, replays.both):
        graph.replay()
        marks.append(mark(ranks.device))
    return marks


def timed(run: Callable[[], Sequence[torch.cuda.Event | float]], ranks: Ranks, count: int) -> list[list[float]]:
    """Seconds between the marks that `run` returns, a list for each of `count` runs, each the slowest rank's.

    The ranks begin every run together, with caches that hold other data. The host may run ahead of the GPU, as in
    training.
    """
    cuda = ranks.device.type == "cuda"
    other = torch.empty(CACHE_BYTES if cuda else 0, dtype=torch.uint8, device=ranks.device)
    together = torch.zeros(1, device=ranks.device)
    marks = []
    for _ in range(count):
        other.zero_()
        ranks.sum(together)
        marks.append(run())
    if cuda:
        torch.cuda.synchronize(ranks.device)
    seconds = torch.tensor([[_between(a, b) for a, b in zip(row, row[1:])] for row in marks], dtype=torch.float64)
    return slowest(seconds, ranks).tolist()  # type: ignore[no-any-return]


def slowest(seconds: Tensor, ranks: Ranks) -> Tensor:
    """The largest of all ranks' values, element by element."""
    return torch.stack(ranks.gather(seconds.to(ranks.device))).amax(0).cpu()


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This moment of the GPU's work, or of a CPU's."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1e3  # type: ignore[no-any-return]


def _marks(
    function: Attention, leaves: Sequence[Tensor], dout: Tensor, ranks: Ranks
) -> list[torch.cuda.Event | float]:
    q, k, v = leaves
    start = mark(ranks.device)
    out = function(q, k, v)
    middle = mark(ranks.device)
    torch.autograd.grad(out, [q, k, v], dout)
    return [start, middle, mark(ranks.device)]


def _peak_bytes(
    function: Attention, leaves: Sequence[Tensor], dout: Tensor, ranks: Ranks
) -> tuple[int | None, float]:
    """The largest peak of any rank and the seconds that one run took."""
    cuda = ranks.device.type == "cuda"
    held = 0
    if cuda:
        torch.cuda.synchronize(ranks.device)
        held = torch.cuda.memory_allocated(ranks.device) - sum(x.untyped_storage().nbytes() for x in (*leaves, dout))
        torch.cuda.reset_peak_memory_stats(ranks.device)
    start = time.perf_counter()
    step(function, leaves, dout)
    peak = 0
    if cuda:
        torch.cuda.synchronize(ranks.device)
        peak = torch.cuda.max_memory_allocated(ranks.device) - held
    found = slowest(torch.tensor([time.perf_counter() - start, peak], dtype=torch.float64), ranks).tolist()
    return (int(found[1]) if cuda else None), found[0]
