"""Time, memory and traffic of a training step of `launch.train` on a cluster, term by term."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.config import DataConfig, DeepSpeedConfig, ModelConfig, RunConfig, TrainConfig
from launch.plan_attention import Case, attention_work, exchange_counts
from launch.plan_machine import Machine
from launch.plan_model import OPTIMIZER_BYTES, SCHEMES, Memory, Shape, memory
from launch.plan_rates import ELEMENTWISE_MOVES, Rates, layer_seconds
from muse_dist import MuseConfig, traffic
from muse_dist.kernels.limits import ceil_div
from muse_dist.layout import LayoutName


AFTERWARDS = ("optimizer", "fixed")  # terms of a step that begin when the backward has ended


@dataclass(frozen=True)
class Setup:
    """A step: `batch` sequences of `context` tokens on `world` GPUs, `cp` of which share a sequence.

    `muse` describes the blocks that ranks cut sequences into, with `exact` too.

    Raises:
        ValueError: the sets of GPUs do not divide the batch, or `cp` the GPUs.
    """

    shape: Shape
    muse: MuseConfig
    exact: bool
    context: int
    batch: int
    micro: int  # sequences that go through the model at a time
    world: int
    cp: int
    scheme: str  # one of SCHEMES
    recompute: bool
    layout: LayoutName = "zigzag"

    def __post_init__(self) -> None:
        if self.world % self.cp:
            raise ValueError(f"train.context_parallel={self.cp} must divide the {self.world} GPUs")
        if self.batch % self.sets:
            raise ValueError(f"train.batch={self.batch} must be a multiple of the {self.sets} sets of GPUs")

    @property
    def sets(self) -> int:
        """Sets of GPUs, which read different sequences."""
        return self.world // self.cp

    @property
    def passes(self) -> int:
        """How often a step goes forward and backward."""
        return ceil_div(ceil_div(self.batch, self.sets), self.micro)

    @property
    def case(self) -> Case:
        """One layer's attention."""
        return Case(self.shape.heads, self.shape.kv_heads, self.shape.dim, self.context,
                    None if self.exact else self.muse, self.cp, self.layout)


def setup_of(config: RunConfig, world: int, *, exact: bool, context: int | None = None, cp: int | None = None,
             batch: int | None = None) -> Setup:
    """The step that `launch.train` does with these settings on `world` GPUs.

    Raises:
        ValueError: it cannot.
    """
    train = config.train
    size = cp or train.context_parallel or world
    batch = batch or train.batch
    mine = max(batch // max(world // size, 1), 1)
    return Setup(Shape.of(config.model), config.muse, exact, context or config.data.context, batch,
                 min(train.micro_batch or mine, mine), world, size, scheme_of(config, world), train.recompute,
                 config.layout)


def scheme_of(config: RunConfig, world: int) -> str:
    """How the engine splits weights, gradients and optimizer over `world` GPUs: a name of SCHEMES."""
    engine, stage = config.train.engine, config.deepspeed.stage
    if engine == "megatron":
        return engine
    if engine == "deepspeed" and stage < 3:
        return f"zero{stage}"
    return "sharded" if world > 1 and (config.train.shard or engine == "deepspeed") else "whole"


@dataclass(frozen=True)
class Step:
    """A measured step; the speeds of engines are not compared."""

    setup: Setup
    seconds: float
    memory: float | None  # bytes a rank
    engine: str


def scaling_step(row: Mapping[str, Any]) -> Step:
    """The step that a row of launch.scaling measured."""
    settings = row["config"]
    config = RunConfig("row", model=ModelConfig(**{**settings["model"], "vocabulary": row["vocabulary"]}),
                       train=TrainConfig(**settings["train"]), data=DataConfig(**settings["data"]),
                       muse=MuseConfig(**settings["muse"]),
                       deepspeed=DeepSpeedConfig(**settings.get("deepspeed", {})))
    setup = setup_of(config, row["ranks"], exact=row["attention"] == "exact")
    return Step(setup, row["seconds"], row["memory_bytes"], config.train.engine)


def bench_step(row: Mapping[str, Any]) -> Step:
    """The step that a row of `launch.bench step` measured: one sequence that all ranks share, under DeepSpeed.

    Raises:
        OSError: the file of the model's settings, which the row names, is not there.
    """
    path = Path(row["config"])
    changes = dict(row["changes"])
    if row["attention"] in ("moments", "kv"):
        changes["muse.exchange"] = row["attention"]
    config = RunConfig.from_toml(path if path.is_absolute() else Path(__file__).parents[1] / path, changes=changes)
    train = replace(config.train, batch=1, micro_batch=1, shard=row["stage"] == 3, recompute=row["recompute"],
                    context_parallel=0)
    setup = setup_of(replace(config, train=train), row["ranks"], exact=row["attention"] == "torch-cp")
    memory = row["memory_gib"]
    return Step(setup, row["step_seconds"], None if memory is None else memory * 2**30, "deepspeed")


@dataclass(frozen=True)
class Prediction:
    """Seconds by term, bytes of memory, and bytes a GPU receives in a step by exchange."""

    setup: Setup
    terms: dict[str, float]
    memory: Memory
    received: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.terms.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.setup.batch * self.setup.context / self.seconds

    @property
    def binds(self) -> str:
        """The term that takes the longest."""
        return max(self.terms, key=lambda name: self.terms[name])


def predict(setup: Setup, machine: Machine, rates: Rates) -> Prediction:
    """What a step takes.

    Raises:
        ValueError: the context does not divide into blocks over the ranks.
    """
    work, known = other_work(setup), known_terms(setup, machine, rates)
    terms = {**{name: amount * rates.step[name] for name, amount in work.items()}, **known}
    # The host starts forward and backward while they run; clipping waits for both.
    meanwhile = sum(seconds for name, seconds in terms.items() if name not in AFTERWARDS)
    terms["waiting for the host"] = max(0.0, host_seconds(setup, rates) - meanwhile)
    local = setup.context // setup.cp
    held = memory(setup.shape, None if setup.exact else setup.muse, setup.micro * local, world=setup.world,
                  scheme=setup.scheme, recompute=setup.recompute, passes=setup.passes)
    received = {"context": _sequences(setup) * setup.shape.layers * sum(layer_traffic(setup)),
                "weights and gradients": sum(_state_traffic(setup))}
    return Prediction(setup, terms, held, received)


def other_work(setup: Setup) -> dict[str, float]:
    """What is not attention or exchange, by term, in the units of `Rates.step`, on one GPU."""
    shape, local = setup.shape, setup.context // setup.cp
    tokens = _sequences(setup) * local
    kept = shape.layer_bytes(None if setup.exact else setup.muse)
    moves = ELEMENTWISE_MOVES * (4 / 3 if setup.recompute else 1.0)
    return {"dense": shape.step_flops(tokens, local, setup.recompute),
            "elementwise": moves * shape.layers * kept * tokens,
            "optimizer": OPTIMIZER_BYTES * shape.parameters / (1 if setup.scheme == "whole" else setup.world),
            "fixed": 1.0}


def _sequences(setup: Setup) -> int:
    """Sequences that one set of GPUs reads in a step."""
    return setup.batch // setup.sets


def known_terms(setup: Setup, machine: Machine, rates: Rates) -> dict[str, float]:
    """Seconds of the attention by stage, and of the exchanges that computing does not hide."""
    terms: dict[str, float] = {}
    work = attention_work(setup.case)
    again = 2 if setup.recompute else 1
    for amounts, speeds, times in ((work.forward, rates.forward, again), (work.backward, rates.backward, 1)):
        for stage, amount in amounts.items():
            layers = _sequences(setup) * setup.shape.layers
            terms[stage] = terms.get(stage, 0.0) + amount * speeds[stage] * times * layers
    if setup.cp > 1:
        terms["context exchange"] = _context_seconds(setup, machine, rates)
    if setup.world > 1:
        terms["weights and gradients"] = _state_seconds(setup, machine, rates)
    return terms


def host_seconds(setup: Setup, rates: Rates) -> float:
    """Time in which the host starts the kernels of forward and backward, which take that at least."""
    start, times = attention_work(setup.case).start, 2 if setup.recompute else 1
    layer = times * (rates.forward[start] + rates.host) + rates.backward[start] + 2 * rates.host
    return setup.passes * setup.shape.layers * layer


def layer_traffic(setup: Setup) -> tuple[float, float]:
    """Bytes a GPU receives for one sequence and layer, forward (again with recomputation) and backward."""
    if setup.cp == 1:
        return 0.0, 0.0
    again = 2 if setup.recompute else 1
    forward, backward = _layer_traffic(setup.case, setup.muse, setup.exact)
    return again * forward, backward


@lru_cache(maxsize=1024)
def _layer_traffic(case: Case, muse: MuseConfig, exact: bool) -> tuple[float, float]:
    found: Any = traffic(muse, (1, case.heads, case.kv_heads, case.tokens, case.dim), case.ranks, layout=case.layout)
    if exact or muse.exchange == "kv":  # half of the keys and values come in the backward
        half = found.kv["keys and values"] / 2
        return (half + (0 if exact else found.kv["key order"]), half + found.kv["keys and values gradients"])
    back = sum(count for name, count in found.moments.items() if name.endswith("gradients"))
    return sum(found.moments.values()) - back, back


def _context_seconds(setup: Setup, machine: Machine, rates: Rates) -> float:
    """Exposed time of what context-parallel ranks send each other."""
    gathers = setup.exact or setup.muse.exchange == "kv"
    seconds = machine.ring_seconds if gathers else machine.exchange_seconds
    again = 2 if setup.recompute else 1
    total = 0.0
    for received, work, times, exchanges in zip(layer_traffic(setup), layer_seconds(setup.case, rates), (again, 1),
                                                exchange_counts(setup.case)):
        travel = seconds(received / times, setup.cp, exchanges)
        total += times * max(travel * (1 - rates.hidden), travel - work)
    return total * _sequences(setup) * setup.shape.layers


def _state_traffic(setup: Setup) -> tuple[float, float]:
    """Bytes of weights and of gradients that a GPU receives in a step."""
    share = (setup.world - 1) / setup.world * setup.shape.parameters
    scheme = SCHEMES[setup.scheme]
    return scheme.weights * share * (setup.passes if setup.scheme == "sharded" else 1), scheme.gradients * share


def _state_seconds(setup: Setup, machine: Machine, rates: Rates) -> float:
    """Exposed time: all travels while the step computes, except one layer's share, which comes first or last.

    Weights that only the optimizer splits travel when it is done.
    """
    weights, gradients = _state_traffic(setup)
    after = 0.0
    if setup.scheme not in ("whole", "sharded"):
        after, weights = machine.ring_seconds(weights, setup.world, 1), 0.0
    travel = machine.ring_seconds(weights + gradients, setup.world, setup.shape.layers)
    work = other_work(setup)
    computing = work["dense"] * rates.step["dense"] + work["elementwise"] * rates.step["elementwise"]
    if setup.scheme != "sharded":
        computing *= 2 / 3 / setup.passes  # gradients wait for the last backward
    return after + max(travel / setup.shape.layers, travel - computing)


def overtakes(setup: Setup, machine: Machine, rates: Rates, longest: int = 1 << 22) -> tuple[int | None, int | None]:
    """The shortest context from which on MuSe is faster than exact attention: of the layer, and of the step.

    Looked for among multiples of the smallest context that divides into blocks over the ranks, up to `longest`; None
    where there is none.
    """
    unit = setup.muse.block * setup.cp * (2 if setup.layout == "zigzag" and setup.cp > 1 else 1)
    shortest: list[int | None] = [None, None]
    ahead = [True, True]  # at every longer context
    for context in sorted(_counts(longest // unit), reverse=True):
        muse, exact = (replace(setup, context=context * unit, exact=exact) for exact in (False, True))
        ahead[0] &= sum(layer_seconds(muse.case, rates)) < sum(layer_seconds(exact.case, rates))
        ahead[1] &= predict(muse, machine, rates).seconds < predict(exact, machine, rates).seconds
        shortest = [context * unit if leads else found for leads, found in zip(ahead, shortest)]
    return shortest[0], shortest[1]


def _counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`."""
    return sorted({n << k for k in range(most.bit_length()) for n in (1, 3) if n << k <= most})
