"""How fast a GPU does each part of a step: assumed from its data sheet, or fitted to measured rows."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from launch.plan_attention import Case, Work, attention_work
from launch.plan_machine import Machine

# Shares of the data sheet's speed, forward and backward, where nothing was measured. Assumptions, not measurements.
ASSUMED = {"exact": (0.6, 0.45), "near field": (0.5, 0.4), "opened leaves": (0.3, 0.2), "far field": (0.3, 0.2),
           "moments": (0.2, 0.15), "remote moments": (0.2, 0.15), "choice": (0.25, 0.25), "ordering": (0.5, 0.5)}
ASSUMED_STEP = {"dense": 0.6, "elementwise": 0.5, "optimizer": 0.7}
ASSUMED_START = 500e-6  # seconds a layer's forward takes however short the sequence
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
    rows: dict[str, int] = field(default_factory=dict)  # how many measured rows of each kind stand behind it


def assumed_rates(machine: Machine) -> Rates:
    """Of a machine that nobody measured."""
    passes = []
    for i in (0, 1):
        speeds = {stage: share[i] * (machine.memory_speed if stage == "ordering" else machine.peak)
                  for stage, share in ASSUMED.items()}
        passes.append({**{stage: 1 / speed for stage, speed in speeds.items()}, "start": ASSUMED_START * (1 + i)})
    step = {"dense": 1 / (ASSUMED_STEP["dense"] * machine.peak), "fixed": ASSUMED_FIXED,
            **{name: 1 / (ASSUMED_STEP[name] * machine.memory_speed) for name in ("elementwise", "optimizer")}}
    return Rates(passes[0], passes[1], step)


def layer_seconds(case: Case, rates: Rates) -> tuple[float, float]:
    """Forward and backward of a layer on the busiest rank, without its exchanges."""
    work = attention_work(case)
    return priced(work.forward, rates.forward), priced(work.backward, rates.backward)


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
    """The x >= 0 with the least |a x - b|, by coordinate descent; the columns of `a` are independent."""
    gram, target = a.T @ a, a.T @ b
    x = np.ones(a.shape[1])
    for _ in range(20_000):
        before = x.copy()
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
        if np.abs(x - before).max() < 1e-10:
            break
    return x


def fit_layers(rates: Rates, rows: Sequence[tuple[Case, float, float]]) -> Rates:
    """Rates of the stages from layers (case, seconds forward, seconds backward) measured without exchanges."""
    works: list[Work] = [attention_work(case) for case, _, _ in rows]
    forward = fit([work.forward for work in works], [row[1] for row in rows], rates.forward)
    backward = fit([work.backward for work in works], [row[2] for row in rows], rates.backward)
    return replace(rates, forward=forward, backward=backward)
