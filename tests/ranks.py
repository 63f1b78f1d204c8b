"""Processes that form a gloo group: start them, run one function on each, collect what they returned or raised.

Every wait has a limit, and no process outlives the call that started it. The processes are forked from a server that
has imported everything once, so that a start takes a fraction of a second.
"""
from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = str(Path(__file__).resolve().parents[1])
PRELOADED = ["hypothesis", "pytest", "torch", "torch.distributed.device_mesh", "muse_dist", "muse_dist.emulation"]


@dataclass(frozen=True)
class Outcome:
    """What became of one rank. `died` is true where it neither returned nor raised."""

    value: Any = None
    error: str | None = None  # "ValueError: message"
    trace: str = ""
    seconds: float = 0.0  # from the group's formation to the return or the error
    died: bool = False


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Any]:
    """`function(*args)` on every rank of a new group of `ranks` processes; what each returned, in rank order.

    `function` must lie at the top of a module. It finds its rank by `dist.get_rank()`, the group is `dist.group.WORLD`.

    Raises:
        AssertionError with the tracebacks of all ranks if any raised, died or took longer than `limit` seconds.
    """
    found = outcomes(ranks, function, *args, limit=limit)
    bad = [f"rank {rank}: {'died or was late' if o.died else o.trace}" for rank, o in enumerate(found)
           if o.died or o.error is not None]
    assert not bad, "\n".join(bad)
    return [o.value for o in found]


def outcomes(
    ranks: int, function: Callable[..., Any], *args: Any, limit: float = 120.0, lost: int | None = None,
) -> list[Outcome]:
    """As `run_ranks`, for functions that are meant to fail: what became of every rank, in rank order.

    Rank `lost` is not waited for: it is meant to die or to hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [_context().Process(target=_child, args=(rank, ranks, folder, function, args), daemon=True)
                     for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + limit
            # A rank that is done stays until all are: others may still read what it has sent.
            while time.monotonic() < deadline and any(
                    rank != lost and process.is_alive() and not _file(folder, rank).exists()
                    for rank, process in enumerate(processes)):
                time.sleep(0.01)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [_read(_file(folder, rank)) for rank in range(ranks)]


@functools.cache
def _context() -> Any:
    if ROOT not in sys.path:  # the processes import the functions by name
        sys.path.append(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _child(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks,
                            timeout=datetime.timedelta(seconds=60))
    start = time.monotonic()
    try:
        found = Outcome(function(*args), seconds=time.monotonic() - start)
    except Exception as error:
        found = Outcome(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc(),
                        seconds=time.monotonic() - start)
    # A file instead of a pipe: tensors in a pipe need their sender alive. Renamed, so that it is whole or not there.
    torch.save(found, f"{folder}/{rank}.part")
    os.rename(f"{folder}/{rank}.part", _file(folder, rank))
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # it ends all ranks at once; if it dies itself, the wait is over too


def _file(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.pt")


def _read(path: Path) -> Outcome:
    return torch.load(path, weights_only=False) if path.exists() else Outcome(died=True)
