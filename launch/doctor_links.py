"""What can be wrong with GPUs, the links between ranks, and clocks."""
from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from launch.doctor_checks import Finding, ok, problem, warning
from launch.plan_machine import GPUS, LINK_SHARE, known_gpu
from launch.ranks import Ranks
from muse_dist.kernels.limits import ceil_div

PAIR_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
REPEATS = 3  # of which the fastest counts
MOST_ROUNDS = 63  # with more ranks, every rank talks to so many others
SLOW_LINK = 0.5  # of what is expected, or of the median
SLOW_GPU = 0.85  # of the median
BUSY = 0.05  # of a GPU's memory that others hold
MATRIX = 8192
MOST_SKEW = 2.0  # seconds


class Link(NamedTuple):
    """Bytes/s each way between two ranks."""

    low: int
    high: int
    speed: float


# -------------------------------------------------------------------------------------------------------------- devices


class DeviceState(NamedTuple):
    """What a rank says of its GPU."""

    name: str
    identity: str  # host and serial id: two ranks must not have the same
    capability: tuple[int, int]
    free_share: float  # of its memory, before this process takes any
    speed: float  # FLOP/s of a bf16 matrix product


def check_devices(ranks: Ranks) -> list[Finding]:
    """Whether every rank has a GPU of its own, all are the same, free, and equally fast."""
    if ranks.device.type != "cuda":
        return [ok("devices", f"{ranks.world} rank(s) on the CPU, {torch.get_num_threads()} thread(s) each")]
    free, total = torch.cuda.mem_get_info(ranks.device)
    about = torch.cuda.get_device_properties(ranks.device)
    identity = f"{socket.gethostname()} {getattr(about, 'uuid', ranks.device.index)}"
    mine = DeviceState(about.name, identity, (about.major, about.minor), free / total, _matrix_speed(ranks.device))
    return judge_devices([DeviceState(*one) for one in ranks.collect(tuple(mine))])


def _matrix_speed(device: torch.device) -> float:
    x = torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(2 * REPEATS):  # the first are warm-up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            x @ x
        torch.cuda.synchronize(device)
        best = max(best, 20 * MATRIX ** 3 / (time.perf_counter() - start))
    return best


def judge_devices(states: Sequence[DeviceState]) -> list[Finding]:
    """Findings about the GPUs of all ranks."""
    found = []
    names = sorted({state.name for state in states})
    if len(names) > 1:
        found.append(warning("devices", f"different GPUs: {', '.join(names)}", "the slowest sets the pace of all"))
    shared = [rank for rank, state in enumerate(states)
              if sum(state.identity == other.identity for other in states) > 1]
    if shared:
        found.append(problem("devices", "ranks share a GPU", "start one process a GPU: --nproc-per-node").on(shared))
    old = [rank for rank, state in enumerate(states) if state.capability < (8, 0)]
    if old:
        found.append(problem("devices", "GPUs older than Ampere, for which there are no kernels",
                             "other GPUs, or muse.backend=torch").on(old))
    busy = [rank for rank, state in enumerate(states) if state.free_share < 1 - BUSY]
    if busy:
        found.append(warning("devices", f"other processes hold up to "
                             f"{1 - min(state.free_share for state in states):.0%} of a GPU's memory",
                             "nvidia-smi shows them; end what an earlier run has left").on(busy))
    middle = statistics.median(state.speed for state in states)
    slow = [rank for rank, state in enumerate(states) if state.speed < SLOW_GPU * middle]
    if slow:
        slowest = min(state.speed for state in states)
        found.append(problem("devices", f"matrix products at {slowest / 1e12:.0f} TFLOP/s, {middle / 1e12:.0f} "
                             "elsewhere", "all wait for the slowest: nvidia-smi -q -d PERFORMANCE "
                             "names the reason; leave that node out").on(slow))
    return found or [ok("devices", f"{len(states)} x {names[0]}, {middle / 1e12:.0f} TFLOP/s in matrix products")]


# ---------------------------------------------------------------------------------------------------------------- links


def check_sums(ranks: Ranks) -> list[Finding]:
    """Whether a sum over all ranks is right: memory or a link that flips bits shows here, or nowhere."""
    if ranks.world == 1:
        return []
    x = torch.arange(1 << 20, device=ranks.device, dtype=torch.float32) % 1024 + ranks.world_rank
    wanted = ranks.world * (torch.arange(1 << 20, device=ranks.device) % 1024) + ranks.world * (ranks.world - 1) // 2
    wrong = int((ranks.sum(x) != wanted).sum().item())
    bad = [rank for rank, count in enumerate(ranks.collect(wrong)) if count]
    if bad:
        return [problem("sums", "a sum over all ranks is wrong", "do not train on this allocation: run the vendor's "
                        "diagnostics (dcgmi diag -r 3)").on(bad)]
    return [ok("sums", "a sum over all ranks is right")]


def check_links(ranks: Ranks, intra: float | None, inter: float | None) -> list[Finding]:
    """Speed between all pairs of ranks against what is expected: GB/s inside a node and between nodes."""
    if ranks.world == 1:
        return []
    hosts = ranks.collect(socket.gethostname())
    mine = [_time_pair(ranks, peer) for peer in rounds(ranks.world, ranks.world_rank)]
    links = [Link(*link) for one in ranks.collect([tuple(link) for link in mine if link is not None]) for link in one]
    if intra is None and ranks.device.type == "cuda":
        known = known_gpu(torch.cuda.get_device_name(ranks.device))
        intra = None if known is None else GPUS[known][-1] / 1e9
    return judge_links(links, hosts, None if intra is None else LINK_SHARE * intra * 1e9,
                       None if inter is None else LINK_SHARE * inter * 1e9)


def rounds(world: int, rank: int) -> list[int | None]:
    """Whom a rank meets in each round of a tournament in which all pairs meet once; None: it waits.

    With many ranks only some of the rounds, evenly spread.
    """
    size = world + world % 2
    every = ceil_div(size - 1, MOST_ROUNDS)
    return [_opponent(size, world, rank, number) for number in range(0, size - 1, every)]


def _opponent(size: int, world: int, rank: int, number: int) -> int | None:
    """The circle method: the last stays, the others turn."""
    last = size - 1
    if rank == last:
        peer = next(i for i in range(last) if 2 * i % last == number)
    else:
        peer = (number - rank) % last
        peer = last if peer == rank else peer
    return peer if peer < world else None


def _time_pair(ranks: Ranks, peer: int | None) -> Link | None:
    """Send and receive at once with `peer`, after all have come to this round; the lower rank keeps the result."""
    ranks.collect(None)
    if peer is None:
        return None
    send = torch.ones(PAIR_BYTES[ranks.device.type], dtype=torch.uint8, device=ranks.device)
    receive = torch.empty_like(send)
    seconds = min(_swap(send, receive, peer) for _ in range(1 + REPEATS))
    return Link(ranks.world_rank, peer, send.numel() / seconds) if ranks.world_rank < peer else None


def _swap(send: Tensor, receive: Tensor, peer: int) -> float:
    start = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, send, peer), dist.P2POp(dist.irecv, receive, peer)]):
        work.wait()
    if send.is_cuda:
        torch.cuda.synchronize(send.device)
    return time.perf_counter() - start


def judge_links(
    links: Sequence[Link], hosts: Sequence[str], intra: float | None, inter: float | None
) -> list[Finding]:
    """Findings about the links: those inside nodes, and those between, each against its expectation and median."""
    found = []
    for where, inside, expected in (("inside nodes", True, intra), ("between nodes", False, inter)):
        here = [link for link in links if (hosts[link.low] == hosts[link.high]) == inside]
        if here:
            found += _judge(here, hosts, where, expected)
    return found


def _judge(links: Sequence[Link], hosts: Sequence[str], where: str, expected: float | None) -> list[Finding]:
    middle = statistics.median(link.speed for link in links)
    wanted = max(middle, expected or 0.0)
    slow = sorted((link for link in links if link.speed < SLOW_LINK * wanted), key=lambda link: link.speed)
    text = f"{len(links)} pairs {where}: median {middle / 1e9:.2f} GB/s" + (
        "" if expected is None else f", expected about {expected / 1e9:.2f}")
    if not slow:
        return [ok("links", text)]
    worst = "; ".join(f"ranks {link.low} ({hosts[link.low]}) and {link.high} ({hosts[link.high]}): "
                      f"{link.speed / 1e9:.2f} GB/s" for link in slow[:4])
    mend = ("nvidia-smi topo -m and nvidia-smi nvlink --status show broken links; " if where == "inside nodes" else
            "NCCL_DEBUG=INFO shows which network it takes (IB or RoCE, not the management network); ") + (
            "leave out the node that all slow pairs have in common; --intra and --inter correct the expectation")
    return [problem("links", f"{text}; {len(slow)} are slow: {worst}", mend) if expected is not None
            else warning("links", f"{text}; {len(slow)} are slow: {worst}", mend)]


# --------------------------------------------------------------------------------------------------------------- clocks


def check_clocks(ranks: Ranks, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Whether the clocks of all ranks agree, to the time that a meeting of all takes."""
    if ranks.world == 1:
        return []
    best: list[float] = []
    for _ in range(REPEATS + 1):
        ranks.collect(None)
        times = ranks.collect(clock())
        if not best or max(times) - min(times) < max(best) - min(best):
            best = times
    return judge_clocks(best)


def judge_clocks(times: Sequence[float]) -> list[Finding]:
    """Findings about clocks that were read at one moment, in seconds."""
    middle = statistics.median(times)
    odd = [rank for rank, seconds in enumerate(times) if abs(seconds - middle) > MOST_SKEW / 2]
    skew = max(times) - min(times)
    if skew <= MOST_SKEW:
        return [ok("clocks", f"{skew:.3f} s apart at most")]
    return [warning("clocks", f"{skew:.1f} s apart: logs of different nodes cannot be compared",
                    "start a time service (chrony) on every node").on(odd)]
