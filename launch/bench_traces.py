"""Chrome traces of torch.profiler: where the time goes by stage, and what runs while data travels."""
from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

PREFIX = "muse_dist::"  # of the ranges and operators that name stages
Span = tuple[float, float]


class Event(NamedTuple):
    """One complete event of a trace; times in microseconds."""

    name: str
    kind: str
    start: float
    end: float
    thread: Any
    correlation: Any  # between a kernel and its launch


@dataclass(frozen=True)
class Stage:
    """Time of one stage: of the GPU's kernels launched in it, or of the host where there are none."""

    name: str
    seconds: float
    kernels: list[tuple[str, float]]  # the longest ones, seconds each; empty without a GPU


def record(run: Callable[[], object], device: torch.device, path: Path | None = None) -> list[Event]:
    """Run something under the profiler and read its trace; `path` keeps the trace for a viewer."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = path or Path(folder, "trace.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
        return read(file)


def read(path: Path) -> list[Event]:
    """The complete events of a Chrome trace."""
    events = json.loads(path.read_text())["traceEvents"]
    return [Event(e["name"], e.get("cat", ""), float(e["ts"]), float(e["ts"]) + float(e["dur"]), e.get("tid"),
                  e.get("args", {}).get("correlation"))
            for e in events if e.get("ph") == "X" and "dur" in e]


def stages(events: Sequence[Event], most: int = 8) -> list[Stage]:
    """Time by stage, the innermost range `muse_dist::...` around a kernel's launch; the longest stage first.

    A trace without kernels gives the host's time in each range, without what lies in ranges inside it.
    """
    ranges = sorted((e for e in events if e.name.startswith(PREFIX) and e.kind in ("cpu_op", "user_annotation")),
                    key=lambda e: (e.start, -e.end))
    kernels = _device_work(events)
    times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    if kernels:
        launches = {e.correlation: e for e in events if e.kind in ("cuda_runtime", "cuda_driver")}
        for kernel in kernels:
            times[_innermost(ranges, launches.get(kernel.correlation))][kernel.name] += kernel.end - kernel.start
    else:
        for place, around in enumerate(ranges):
            inside = [(e.start, e.end) for e in ranges[place + 1:] if e.thread == around.thread and e.end <= around.end]
            times[around.name.removeprefix(PREFIX)][""] += around.end - around.start - _length(_union(inside))
    found = [Stage(name, sum(parts.values()) / 1e6, _longest(parts, most)) for name, parts in times.items()]
    return sorted(found, key=lambda stage: -stage.seconds)


def overlap(events: Sequence[Event], phase: str) -> tuple[float, float]:
    """Seconds of NCCL kernels inside the range named `phase`, and how long compute kernels ran at the same time."""
    within = _union((e.start, e.end) for e in events if e.name == phase and e.kind == "user_annotation")
    kernels = _device_work(events)
    travel = _common(_union((e.start, e.end) for e in kernels if "nccl" in e.name.lower()), within)
    compute = _union((e.start, e.end) for e in kernels if e.kind == "kernel" and "nccl" not in e.name.lower())
    return _length(travel) / 1e6, _length(_common(travel, compute)) / 1e6


def _device_work(events: Iterable[Event]) -> list[Event]:
    return [e for e in events if e.kind in ("kernel", "gpu_memcpy", "gpu_memset")]


def _innermost(ranges: Sequence[Event], launch: Event | None) -> str:
    """Name of the last range to begin, of those around a launch on its thread."""
    if launch is None:
        return "elsewhere"
    last = bisect_right(ranges, launch.start, key=lambda e: e.start)
    around = (e for e in reversed(ranges[:last]) if e.thread == launch.thread and launch.start <= e.end)
    found = next(around, None)
    return "elsewhere" if found is None else found.name.removeprefix(PREFIX)


def _longest(parts: dict[str, float], most: int) -> list[tuple[str, float]]:
    named = [(name, time / 1e6) for name, time in parts.items() if name]
    return sorted(named, key=lambda part: -part[1])[:most]


def _union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans that cover the same time, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _common(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """Where two lists of disjoint spans in order overlap."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
