"""The processes of a scaling sweep: started side by side, each on GPUs of its own, limited in time, and ended."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from types import FrameType
from typing import TypeVar

import torch

GRACE = 60.0  # seconds from SIGTERM, at which launch.train saves, to SIGKILL
VISIBLE = "CUDA_VISIBLE_DEVICES"  # CUDA's own name for the GPUs a process sees

Batch = TypeVar("Batch")
Slot = dict[str, str]  # what the processes of a slot find in their environment


class Stopped(Exception):
    """The sweep is being ended."""


def slots(device: torch.device, ranks: int, count: int) -> list[Slot]:
    """At most `count` places for runs of `ranks` processes; on GPUs as many as there are GPUs for, and at least one."""
    if device.type != "cuda":
        return [{} for _ in range(count)]
    gpus = os.environ[VISIBLE].split(",") if VISIBLE in os.environ else list(map(str, range(torch.cuda.device_count())))
    return [{VISIBLE: ",".join(gpus[i * ranks:(i + 1) * ranks])}
            for i in range(min(count, len(gpus) // ranks))] or [{}]  # too few GPUs: the run says so


def side_by_side(batches: Sequence[Batch], places: Sequence[Slot], work: Callable[[Batch, Slot, Event], None]) -> None:
    """Call work(batch, slot, stop) for all batches, as many at a time as there are slots; an exception ends all.

    `work` has to end its processes and raise `Stopped` soon after `stop` is set.
    """
    stop, free = Event(), SimpleQueue[Slot]()
    for slot in places:
        free.put(slot)

    def one(batch: Batch) -> None:
        slot = free.get()
        try:
            if not stop.is_set():
                work(batch, slot, stop)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(one, batch) for batch in batches]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()


def run(
    command: Sequence[str], log: Path, limit: float, slot: Slot, stop: Event, progress: Callable[[], int] = int
) -> int | None:
    """Exit status, or None if it took longer than `limit` seconds. Nothing it started outlives this call.

    Args:
        progress: asked all the time; the limit starts again whenever it gives another number.
    Raises:
        Stopped: `stop` was set.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, **slot})
        try:
            begun, done = time.monotonic(), progress()
            while time.monotonic() - begun < limit:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(0.1)
                if stop.is_set():
                    raise Stopped
                if progress() != done:
                    begun, done = time.monotonic(), progress()
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to torchrun, which tells its ranks, and after a while SIGKILL to all that is left of its session."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def ending() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that is closed, unwind the stack: the runs in progress are ended too.

    What nohup has switched off stays so.
    """
    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
