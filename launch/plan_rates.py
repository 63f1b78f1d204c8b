"""How fast a GPU does each part of a step: assumed from its data sheet, or fitted to measured rows."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from launch.plan_attention import Case, Work, attention_work
from launch.plan_machine import Machine

# Shares of the data sheet's speed, forward and backward, where nothing was measured. Assumptions, not measurements.
ASSUMED = {"exact": (0.6, 0.45), "near field": (0.5, 0.4), "opened leaves": (0.3, 0.2), "far field": (0.3, 0.2),
           "moments": (0.2, 0.15), "remote moments": (0.2, 0.15), "choice": (0.25, 0.25), "ordering": (0.5, 0.5),
           "copies": (0.7, 0.7)}
IN_BYTES = ("ordering", "copies")  # the others are in operations
ASSUMED_STEP = {"dense": 0.6, "elementwise": 0.5, "optimizer": 0.7}
ASSUMED_STOP = 50e-6  # seconds
# Seconds in which the host starts the kernels of a layer's forward; a backward takes it twice as long.
ASSUMED_STARTS = {"start exact": 50e-6, "start": 2e-3, "start ranks": 4e-3, "start replay": 5e-4}
ASSUMED_HOST = 0.5e-3  # the same for everything else in a layer
ASSUMED_FIXED = 10e-3  # seconds of a step that do not depend on its size
ELEMENTWISE_MOVES = 6  # how often what a layer keeps goes through memory, forward and backward
PRIOR_WEIGHT = 1e-3  # of an assumed speed against one measured row: it decides only what no row tells apart


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of work, by stage; `hidden` is the share of an exchange that computing hides."""

    forward: dict[str, float]
    backward: dict[str, float]
    step: dict[str, float]  # of operations ("dense"), bytes ("elementwise", "optimizer") and steps ("fixed")
    hidden: float = 0.0
    host: float = ASSUMED_HOST  # seconds in which the host starts what is not attention in a layer's forward
    rows: dict[str, int] = field(default_factory=dict)  # how many measured rows of each kind stand behind it


def assumed_rates(machine: Machine) -> Rates:
    """Of a machine that nobody measured."""
    passes = []
    for i in (0, 1):
        speeds = {stage: share[i] * (machine.memory_speed if stage in IN_BYTES else machine.peak)
                  for stage, share in ASSUMED.items()}
        passes.append({**{stage: 1 / speed for stage, speed in speeds.items()},
                       "stops": ASSUMED_STOP,
                       **{name: seconds * (1 + i) for name, seconds in ASSUMED_STARTS.items()}})
    step = {"dense": 1 / (ASSUMED_STEP["dense"] * machine.peak), "fixed": ASSUMED_FIXED,
            **{name: 1 / (ASSUMED_STEP[name] * machine.memory_speed) for name in ("elementwise", "optimizer")}}
    return Rates(passes[0], passes[1], step)


def layer_seconds(case: Case, rates: Rates) -> tuple[float, float]:
    """Forward and backward of a layer on the busiest rank, without its exchanges."""
    work = attention_work(case)
    return (max(priced(work.forward, rates.forward), rates.forward[work.start]),
            max(priced(work.backward, rates.backward), rates.backward[work.start]))


def priced(work: dict[str, float], rates: dict[str, float]) -> float:
    """Seconds of work by stage."""
    return sum(amount * rates[stage] for stage, amount in work.items())


def fit(
    work: Sequence[dict[str, float]], seconds: Sequence[float], known: dict[str, float],
    besides: Sequence[float] | None = None,
) -> dict[str, float]:
    """Seconds a unit by stage that fit measured times best, by relative error; none is negative.

    Args:
        work: of every row, by stage; a stage that no row has keeps its known rate.
        seconds: of every row, what the work took.
        known: assumed rates, which decide where rows do not tell stages apart.
        besides: of every row, seconds in it that are known already.
    """
    stages = sorted({stage for row in work for stage in row})
    if not stages:
        return dict(known)
    assumed = np.array([known[stage] for stage in stages])
    times = np.asarray(seconds)
    table = np.array([[row.get(stage, 0.0) for stage in stages] for row in work]) * assumed / times[:, None]
    target = np.ones(len(table)) if besides is None else 1 - np.asarray(besides) / times
    # Unknowns are the ratios to the assumed rates; each prefers 1 a little.
    hold = np.sqrt(PRIOR_WEIGHT) * np.eye(len(stages))
    ratios = _nonnegative(np.vstack([table, hold]), np.concatenate([target, hold.sum(1)]))
    return {**known, **dict(zip(stages, (ratios * assumed).tolist()))}


def _nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |a x - b|: the active-set method of Lawson and Hanson (1974)."""
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    while True:
        slope = np.where(free, -np.inf, a.T @ (b - a @ x))
        if slope.max() < 1e-12:
            return x
        free[slope.argmax()] = True
        while True:
            best = np.zeros_like(x)
            best[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            below = free & (best <= 0)
            if not below.any():
                break
            x = x + min(x[below] / (x[below] - best[below])) * (best - x)  # as far as all stay above zero
            free &= x > 1e-14
        x = best


def fit_layers(rates: Rates, rows: Sequence[tuple[Case, float, float]]) -> Rates:
    """Rates of the stages from layers (case, seconds forward, seconds backward) measured without exchanges."""
    works: list[Work] = [attention_work(case) for case, _, _ in rows]
    starts = [work.start for work in works]
    forward = fit_with_starts([work.forward for work in works], starts, [row[1] for row in rows], rates.forward)
    backward = fit_with_starts([work.backward for work in works], starts, [row[2] for row in rows], rates.backward)
    return replace(rates, forward=forward, backward=backward)


def fit_with_starts(
    work: Sequence[dict[str, float]], starts: Sequence[str], seconds: Sequence[float], known: dict[str, float]
) -> dict[str, float]:
    """As `fit`, where a row takes the longer of its work and of a start, the name of whose rate `starts` gives.

    Tries for each start how many of the fastest rows of its kind wait for the host, and keeps what fits best.
    """
    times = np.asarray(seconds)
    order = {start: sorted((i for i, name in enumerate(starts) if name == start), key=lambda i: seconds[i])
             for start in dict.fromkeys(starts)}

    def attempt(waiting: dict[str, int]) -> tuple[float, dict[str, float]]:
        out = {i for start, count in waiting.items() for i in order[start][:count]}
        here = [i for i in range(len(work)) if i not in out]
        rates = fit([work[i] for i in here], times[here].tolist(), known) if here else dict(known)
        for start, count in waiting.items():
            some = times[order[start][:count]]  # the least squares of start / seconds - 1
            # If nothing waits, a start is at most what the fastest row takes.
            rates[start] = ((1 / some).sum() / (1 / some**2).sum() if count
                            else min(known[start], times[order[start][0]]))
        found = [max(priced(one, rates), rates[start]) for one, start in zip(work, starts)]
        return float(((np.array(found) / times - 1) ** 2).sum()), rates

    waiting = dict.fromkeys(order, 0)
    best, rates = attempt(waiting)
    for start in [*order, *order]:
        for count in range(len(order[start]) + 1):
            error, found = attempt({**waiting, start: count})
            if error < 0.99 * best:  # not for nothing
                best, rates, waiting = error, found, {**waiting, start: count}
    return rates
