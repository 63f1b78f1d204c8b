"""Measured rows, as launch.bench and launch.scaling write them, and what a plan takes from them."""
from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from launch.plan_attention import Case, attention_work
from launch.plan_machine import Machine, in_name
from launch.plan_rates import Rates, assumed_rates, fit, fit_layers, layer_seconds, priced
from launch.plan_step import Step, bench_step, scaling_step
from muse_dist import MuseConfig

Row = dict[str, Any]
Kind = TypeVar("Kind")
HOLD_OUT = 3


@dataclass(frozen=True)
class Layer:
    """A measured attention layer: seconds of a forward and of a backward, exchanges left out."""

    case: Case
    forward: float
    backward: float
    name: str
    graph: bool = False  # a CUDA graph, which takes the host no time


@dataclass(frozen=True)
class Exchange:
    """A measured exchange alone: bytes a rank received, and seconds."""

    received: float
    seconds: float


@dataclass(frozen=True)
class Rows:
    """What was measured on one kind of device, in a fixed order."""

    layers: list[Layer]
    exchanges: list[Exchange]
    hidden: list[float]  # shares of exchanges' time that computing hid
    steps: list[Step]

    def __len__(self) -> int:
        return len(self.layers) + len(self.exchanges) + len(self.steps)


def read_rows(paths: Iterable[Path], device: str) -> Rows:
    """The usable rows of JSON-lines files (or of folders of them) whose device's name has the word `device`.

    Left out are rows that failed, or failed their check, and what is not planned: attention that is not causal,
    windows, rivals over several ranks but torch's context parallelism in a step; and CUDA graphs beside other rows.

    Raises:
        ValueError: a line is no JSON object. OSError: a file cannot be read.
    """
    found = [row for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
             for row in _lines(file)]
    rows = [row for row in found
            if in_name(device, str(row.get("processor") or row.get("device"))) and "failed" not in row]
    layers = [layer for row in rows if (layer := _layer(row)) is not None]
    layers = [layer for layer in layers if not layer.graph] or layers  # launch.train does not capture its steps
    layers = _fastest_exact(layers)
    layers.sort(key=lambda x: (x.case.dim, x.case.ranks, x.case.tokens, x.name, x.forward))
    steps = [step for row in rows if (step := _step(row)) is not None]
    steps.sort(key=lambda x: (x.engine, x.setup.shape.parameters, x.setup.exact, x.setup.context, x.setup.world,
                              x.seconds))
    exchanges = [one for row in rows for one in _exchanges(row)]
    hidden = [row["hidden_share"] for row in rows if row.get("benchmark") == "exchange"]
    return Rows(layers, sorted(exchanges, key=lambda x: (x.received, x.seconds)), hidden, steps)


def _lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object")
        rows.append(row)
    return rows


def _layer(row: Row) -> Layer | None:
    """The layer of an attention row on one rank, or the one without exchanges of an exchange row."""
    kind = row.get("benchmark")
    if kind not in ("attention", "exchange"):
        return None
    muse = None if row["config"] is None else MuseConfig(**row["config"])
    if muse is not None and not muse.causal:
        return None
    case = Case(row["heads"], row["kv_heads"], row["dim"], row["tokens"], muse, row["ranks"],
                row.get("layout", "zigzag"))
    if kind == "exchange":
        return Layer(case, row["silent"]["forward"]["median"], row["silent"]["backward"]["median"], row["exchange"])
    if row["ranks"] > 1 or not row["causal"] or not row["check"]["passed"] or row["variant"].startswith("flex_window"):
        return None
    return Layer(case, row["forward"]["median"], row["backward"]["median"], row["variant"], row.get("graphs", False))


def _step(row: Row) -> Step | None:
    """The step of a row of launch.scaling, or of `launch.bench step` with an attention that is planned."""
    if row.get("benchmark") == "scaling":
        return scaling_step(row)
    if "step_seconds" in row and row["attention"] in ("moments", "kv", "torch-cp"):
        return bench_step(row)
    return None


def _fastest_exact(layers: Sequence[Layer]) -> list[Layer]:
    """MuSe is compared with the fastest exact attention: of several on the same problem the others are left out."""
    best: dict[Case, Layer] = {}
    for layer in layers:
        if layer.case.muse is None:
            other = best.get(layer.case)
            if other is None or layer.forward + layer.backward < other.forward + other.backward:
                best[layer.case] = layer
    return [layer for layer in layers if layer.case.muse is not None or best[layer.case] is layer]


def _exchanges(row: Row) -> list[Exchange]:
    if row.get("benchmark") != "exchange":
        return []
    return [Exchange(row["received"][name], one["median"]) for name, one in row["alone"].items()
            if row["received"].get(name)]


def split_rows(rows: Rows) -> tuple[Rows, Rows]:
    """Rows to fit and layers and steps to judge the fit by.

    Held out is every third of those that differ only in length and ranks, from the second on; of two, none.
    """
    layers = _split(rows.layers, lambda x: replace(x.case, tokens=1, ranks=1))
    steps = _split(rows.steps, lambda x: (x.engine, x.setup.shape, x.setup.exact, x.setup.muse))
    return (Rows(layers[0], rows.exchanges, rows.hidden, steps[0]), Rows(layers[1], [], [], steps[1]))


def _split(rows: Sequence[Kind], alike: Callable[[Kind], object]) -> tuple[list[Kind], list[Kind]]:
    """Rows to fit and rows held out, in the order given."""
    groups: dict[object, list[Kind]] = {}
    for row in rows:
        groups.setdefault(alike(row), []).append(row)
    held = {id(row) for group in groups.values() if len(group) > 2 for row in group[1::HOLD_OUT]}
    return [row for row in rows if id(row) not in held], [row for row in rows if id(row) in held]


def fit_links(machine: Machine, exchanges: Sequence[Exchange]) -> Machine:
    """The machine with the speed and the start of the links inside a node that exchanges alone show.

    The least squares of relative errors, as in `fit`; the links between nodes keep their speed.
    """
    if not exchanges:
        return machine
    found = fit([{"start": 1.0, "byte": one.received} for one in exchanges], [one.seconds for one in exchanges],
                {"start": machine.start, "byte": 1 / machine.intra})
    speed = 1 / found["byte"] if found["byte"] else machine.intra
    return replace(machine, start=found["start"], intra=speed)


def fit_rates(machine: Machine, rows: Rows, dim: int) -> tuple[Machine, Rates]:
    """Machine and rates as measured; rows of other head dims count where there are none of this one."""
    machine = fit_links(machine, rows.exchanges)
    rates = assumed_rates(machine)
    layers = [layer for layer in rows.layers if layer.case.dim == dim] or rows.layers
    if layers:
        rates = fit_layers(rates, [(x.case, x.forward, x.backward) for x in layers])
    hidden = min(max(statistics.median(rows.hidden), 0.0), 1.0) if rows.hidden else 0.0
    return machine, replace(rates, hidden=hidden, rows={
        "layers": len(layers), "exchanges": len(rows.exchanges), **_waiting(rates, layers)})


def _waiting(rates: Rates, layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers wait for the host, by the name of the start: only these show how long it takes."""
    works = [attention_work(layer.case) for layer in layers]
    return Counter(work.start for work in works if priced(work.forward, rates.forward) < rates.forward[work.start])


def layer_errors(rates: Rates, layers: Sequence[Layer]) -> np.ndarray:
    """Relative errors (predicted / measured - 1) of forward and backward together, layer by layer."""
    return np.array([sum(layer_seconds(x.case, rates)) / (x.forward + x.backward) - 1 for x in layers])
