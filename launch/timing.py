"""Where the time of a step goes."""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds of the stages of a step.

    On a GPU it reads events in the stream, which does not make the CPU wait; `read` does, for the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of a `with` block to `stage`."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((stage, start, end))
        else:
            begin = time.perf_counter()
            yield
            self.add(stage, time.perf_counter() - begin)

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        for stage, start, end in self._events:
            end.synchronize()
            self.add(stage, start.elapsed_time(end) / 1e3)
        found, self._seconds, self._events = self._seconds, {}, []
        return found
