"""Rates of what is not attention, from measured steps."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from launch.plan_attention import attention_work
from launch.plan_machine import Machine
from launch.plan_rates import Rates, fit
from launch.plan_step import AFTERWARDS, Step, host_seconds, other_work, predict

FACTORS = 2.0 ** np.arange(-4, 4.25, 0.25)  # of an assumed time of the host, among which the best is looked for
FACTOR_WEIGHT = 1e-4  # of a factor's squared logarithm against a row's squared relative error
ROUNDS = 2
MOST = 0.8  # of a data sheet's speed, which large matrix products reach and nothing exceeds by much


def fit_steps(machine: Machine, rates: Rates, steps: Sequence[Step], engine: str = "torch") -> Rates:
    """Rates fitted to the steps of one engine: `engine`, or where there are none PyTorch's, DeepSpeed's or Megatron's.

    How fast the GPU is follows by least squares, how fast the host is by search: it counts only where it is the slower
    of the two. The time to start MuSe's kernels is looked for too where no measured layer was so short that it shows.
    """
    measured = [[step for step in steps if step.engine == name] for name in (engine, "torch", "deepspeed", "megatron")]
    steps = next(filter(None, measured), [])
    if not steps:
        return rates
    starts = {attention_work(step.setup.case).start for step in steps} - {"start exact"}
    best = dict.fromkeys(["host", *sorted(start for start in starts if not rates.rows.get(start))], 1.0)
    error, found = _attempt(machine, rates, steps, best)
    for name in [*best] * ROUNDS:
        for factor in FACTORS:
            other = {**best, name: float(factor)}
            attempt = _attempt(machine, rates, steps, other)
            if attempt[0] < error:
                best, (error, found) = other, attempt
    return replace(found, rows={**rates.rows, "steps": len(steps)})


def _slower(rates: Rates, factors: Mapping[str, float]) -> Rates:
    """Rates whose times of the host are multiplied: "host" and those of plan_attention.STARTS."""
    forward, backward = ({name: rate * factors.get(name, 1.0) for name, rate in table.items()}
                         for table in (rates.forward, rates.backward))
    return replace(rates, host=rates.host * factors["host"], forward=forward, backward=backward)


def _attempt(
    machine: Machine, rates: Rates, steps: Sequence[Step], factors: Mapping[str, float]
) -> tuple[float, Rates]:
    """The squared relative errors that remain with these factors, and the rates."""
    rates, assumed = _slower(rates, factors), rates.step
    for _ in range(3):  # which steps wait for the host depends on what the GPU takes
        work, besides = [], []
        for step in steps:
            terms, amounts = predict(step.setup, machine, rates).terms, other_work(step.setup)
            if terms["waiting for the host"]:
                amounts = {name: amounts[name] for name in AFTERWARDS}
                besides.append(host_seconds(step.setup, rates))
            else:
                besides.append(sum(seconds for name, seconds in terms.items() if name not in amounts))
            work.append(amounts)
        # Rows that do not tell matrices from the rest must not make either faster than the GPU can be.
        least = {"dense": 1 / (MOST * machine.peak), "elementwise": 1 / (MOST * machine.memory_speed)}
        besides = [known + sum(least.get(name, 0.0) * amount for name, amount in amounts.items())
                   for known, amounts in zip(besides, work)]
        above = {name: rate - least.get(name, 0.0) for name, rate in assumed.items()}
        found = fit(work, [step.seconds for step in steps], above, besides)
        rates = replace(rates, step={name: rate + least.get(name, 0.0) for name, rate in found.items()})
    errors = [predict(step.setup, machine, rates).seconds / step.seconds - 1 for step in steps]
    distance = np.log2([*factors.values()])
    return float(np.square(errors).sum() + FACTOR_WEIGHT * np.square(distance).sum()), rates
