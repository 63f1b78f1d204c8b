"""Predict step time, memory and traffic of training on a cluster, before it is rented.

    python -m launch.plan --config configs/1b.toml --nodes 1 8 16 128
    python -m launch.plan --config configs/8b.toml --context 131072 262144 --inter 50 --rows launch/results rows.jsonl

Work is counted: operations of the matrices and of every stage of the attention, bytes of weights, activations and
exchanges. Rows that launch.bench and launch.scaling measured on the same kind of GPU say how fast each part is; a third
of them is held out and shows the error. Without rows the speeds are shares of the data sheet's, and the output says so.
The batch is the config's, or as many sequences more as there have to be for every set of GPUs to read equally many.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.config import RunConfig, parse_changes
from launch.options import positive, whole_number, write_line
from launch.plan_fit import fit_steps
from launch.plan_machine import GPUS, Machine, known_machine
from launch.plan_rates import Rates
from launch.plan_rows import Rows, fit_rates, layer_errors, read_rows, split_rows
from launch.plan_step import Prediction, Setup, overtakes, predict, setup_of
from muse_dist.kernels.limits import ceil_div

RESULTS = Path(__file__).parent / "results"
GROUPS = {  # columns of the table, and the terms they add up
    "attention": ("exact", "near field", "opened leaves", "far field", "moments", "remote moments", "choice",
                  "ordering", "copies", "stops", "waiting for the host"),
    "dense": ("dense",), "other": ("elementwise", "optimizer", "fixed"),
    "exchange": ("context exchange",), "state": ("weights and gradients",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the head of this file. Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = RunConfig.from_toml(options.config, changes=parse_changes(options.set))
        machine = known_machine(options.gpu, options.per_node, options.inter * 1e9,
                                None if options.intra is None else options.intra * 1e9)
        rows = read_rows(options.rows if options.rows is not None else _results(), options.gpu)
        dim = config.model.width // config.model.heads
        print(calibration_text(machine, rows, dim, config.train.engine))
        said = machine.intra
        machine, rates = calibrated(machine, rows, dim, config.train.engine)
        if options.intra is not None:
            machine = replace(machine, intra=said)
        for context in options.context or [config.data.context]:
            found = plan(config, machine, rates, options.nodes, context, options.context_parallel)
            print(table(config, found, context, machine))
            print(crossover_text(found[0].setup, machine, rates))
            for one in found if options.json is not None else ():
                write_line(options.json, as_row(config, one, machine))
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    return 0


def _results() -> list[Path]:
    """The rows that came with the package, where it is a checkout."""
    return [RESULTS] if RESULTS.is_dir() else []


def calibrated(machine: Machine, rows: Rows, dim: int, engine: str = "torch") -> tuple[Machine, Rates]:
    """Machine and rates with everything that was measured; of the steps, those of one engine as `fit_steps` chooses."""
    machine, rates = fit_rates(machine, rows, dim)
    return machine, fit_steps(one_node(machine, rows), rates, rows.steps, engine)


def one_node(machine: Machine, rows: Rows) -> Machine:
    """The machine on which the rows were measured: all ranks stood on one node, however small those planned are."""
    return replace(machine, per_node=max([machine.per_node, *(step.setup.world for step in rows.steps)]))


def held_out_errors(machine: Machine, rows: Rows) -> dict[str, np.ndarray]:
    """Relative errors of rows that the fit has not seen: "layers", and the steps of each engine."""
    kept, held = split_rows(rows)
    machine = one_node(machine, rows)
    errors: dict[str, list[float]] = {}
    for dim in sorted({layer.case.dim for layer in held.layers}):
        _, rates = fit_rates(machine, kept, dim)
        errors.setdefault("layers", []).extend(layer_errors(rates, [x for x in held.layers if x.case.dim == dim]))
    for engine, kind in (("torch", "steps"), ("deepspeed", "deepspeed steps"), ("megatron", "megatron steps")):
        same = replace(kept, steps=[step for step in kept.steps if step.engine == engine])
        steps = [step for step in held.steps if step.engine == engine]
        for dim in sorted({step.setup.shape.dim for step in steps}):
            there, rates = calibrated(machine, same, dim, engine)
            errors.setdefault(kind, []).extend(predict(step.setup, there, rates).seconds / step.seconds - 1
                                               for step in steps if step.setup.shape.dim == dim)
    return {kind: np.array(found) for kind, found in errors.items()}


def calibration_text(machine: Machine, rows: Rows, dim: int, engine: str = "torch") -> str:
    """Which rows the prediction of an engine's steps rests on, and how far it is from rows held out."""
    if not len(rows):
        return (f"{machine.name}: no measured rows. Speeds are assumed shares of the data sheet's: expect errors of "
                "a factor, and compare only roughly. launch.bench and launch.scaling write rows")
    others = "" if any(x.case.dim == dim for x in rows.layers) or not rows.layers else (
        f"; none has this model's head dim of {dim}, so those of {sorted({x.case.dim for x in rows.layers})} stand in")
    lines = [f"{machine.name}: fitted to {len(rows.layers)} layers, {len(rows.exchanges)} exchanges and "
             f"{len(rows.steps)} steps that were measured{others}"]
    for name, there, assumed in (("layer", rows.layers, "the attention's speeds"),
                                 ("step", rows.steps, "all speeds but the attention's"),
                                 ("exchange", rows.exchanges, "the links' speeds")):
        if not there:
            lines.append(f"  no {name} was measured: {assumed} are assumed, and may be wrong by a factor")
    for kind, errors in held_out_errors(machine, rows).items():
        size = np.abs(errors)
        lines.append(f"  error of {len(errors)} {kind} held out: median {np.median(size):.1%}, largest "
                     f"{size.max():.1%}, mean {errors.mean():+.1%}")
    lines += _engine_lines(machine, rows, dim, engine) + _memory_lines(machine, rows)
    return "\n".join(lines)


def _engine_lines(machine: Machine, rows: Rows, dim: int, engine: str) -> list[str]:
    """What the errors above do not say: that none of the engine's steps was held out, or that there is none."""
    mine = [step for step in rows.steps if step.engine == engine]
    if not mine:
        return [f"  none of these steps is of {engine}: those of another engine stand in"] if rows.steps else []
    if any(step.engine == engine for step in split_rows(rows)[1].steps):
        return []
    there, rates = calibrated(one_node(machine, rows), rows, dim, engine)
    size = np.abs([predict(step.setup, there, rates).seconds / step.seconds - 1 for step in mine])
    return [f"  error of {len(mine)} {engine} steps, too few alike to hold any out: median {np.median(size):.1%}, "
            f"largest {size.max():.1%}"]


def _memory_lines(machine: Machine, rows: Rows) -> list[str]:
    size = np.abs(memory_errors(machine, rows))
    if not len(size):
        return []
    return [f"  error of the memory of {len(size)} steps: median {np.median(size):.1%}, largest {size.max():.1%}"]


def memory_errors(machine: Machine, rows: Rows) -> np.ndarray:
    """Predicted over measured memory, less 1, of the steps of launch.train."""
    there, rates = calibrated(machine, rows, 0)
    return np.array([predict(step.setup, there, rates).memory.total / step.memory - 1
                     for step in rows.steps if step.memory and step.engine == "torch"])


def plan(config: RunConfig, machine: Machine, rates: Rates, nodes: Sequence[int], context: int,
         cp: int | None = None) -> list[Prediction]:
    """A prediction for MuSe and for exact attention on every number of nodes.

    The batch is the config's, or as many sequences as there are sets of GPUs where those are more. Where neither `cp`
    nor the config says how many GPUs share a sequence, it is as many as one node has and the context's blocks allow.
    """
    found = []
    for count in nodes:
        world = count * machine.per_node
        size = cp or config.train.context_parallel or most_sharing(config, context, machine.per_node)
        sets = max(world // size, 1)
        batch = ceil_div(config.train.batch, sets) * sets
        for exact in (False, True):
            found.append(predict(setup_of(config, world, exact=exact, context=context, cp=size, batch=batch), machine,
                                 rates))
    return found


def most_sharing(config: RunConfig, context: int, most: int) -> int:
    """The largest power of two of GPUs that can share a sequence, and of which `most` GPUs are whole sets."""
    size, chunks = 1, 2 if config.layout == "zigzag" else 1
    while most % (2 * size) == 0 and context % (2 * size * config.muse.block * chunks) == 0:
        size *= 2
    return size


def table(config: RunConfig, found: Sequence[Prediction], context: int, machine: Machine) -> str:
    """Predictions as text; seconds by group of terms, and the term that takes the longest."""
    parameters = found[0].setup.shape.parameters
    lines = [f"\n{config.name}: {parameters:,} parameters, {context} tokens, on {machine.per_node} x {machine.name} "
             f"a node, {machine.intra / 1e9:.0f} GB/s inside and {machine.inter / 1e9:.0f} GB/s a GPU between nodes",
             f"{'GPUs':>6}{'shared by':>10}{'batch':>7}  {'attention':<10}{'step s':>9}"
             + "".join(f"{name:>10}" for name in GROUPS)
             + f"{'tokens/s/GPU':>14}{'GiB a GPU':>11}{'GB received':>13}  binds"]
    for one in found:
        setup = one.setup
        seconds = [sum(one.terms.get(term, 0.0) for term in terms) for terms in GROUPS.values()]
        full = " (does not fit)" if one.memory.total > machine.memory else ""
        lines.append(f"{setup.world:>6}{setup.cp:>10}{setup.batch:>7}  {'exact' if setup.exact else 'muse':<10}"
                     f" {one.seconds:>8.3f}" + "".join(f" {x:>9.3f}" for x in seconds)
                     + f"{one.tokens_per_second / setup.world:>14,.0f}{one.memory.total / 2**30:>11.1f}"
                     f"{sum(one.received.values()) / 1e9:>13.1f}  {one.binds}{full}")
    return "\n".join(lines)


def crossover_text(setup: Setup, machine: Machine, rates: Rates) -> str:
    """From which context on MuSe is predicted to be faster, on the GPUs that share a sequence."""
    alone = replace(setup, world=setup.cp, batch=setup.batch // setup.sets,
                    scheme="whole" if setup.scheme == "sharded" and setup.cp == 1 else setup.scheme)
    layer, step = overtakes(alone, machine, rates)
    words = ["never up to 4M tokens" if tokens is None else f"from {tokens} tokens on" for tokens in (layer, step)]
    return (f"{setup.cp} GPU(s) a sequence: MuSe is faster than exact attention: the layer {words[0]}, the step "
            f"{words[1]}")


def as_row(config: RunConfig, one: Prediction, machine: Machine) -> dict[str, Any]:
    """A prediction as a JSON line."""
    setup = one.setup
    return {"benchmark": "plan", "model": config.name, "device": machine.name, "context": setup.context,
            "ranks": setup.world, "context_parallel": setup.cp, "batch": setup.batch,
            "attention": "exact" if setup.exact else "muse", "muse": json.loads(setup.muse.encoded),
            "seconds": one.seconds, "tokens_per_second": one.tokens_per_second, "terms": one.terms,
            "binds": one.binds, "memory_bytes": one.memory.total, "received_bytes": one.received}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of launch.train")
    parser.add_argument("--set", nargs="+", default=[], metavar="TABLE.KEY=VALUE", action="extend",
                        help="another setting, such as muse.opened=8 train.batch=32")
    parser.add_argument("--context", type=whole_number, nargs="+", help="tokens of a sequence (default: the config's)")
    parser.add_argument("--context-parallel", type=whole_number, metavar="GPUS",
                        help="GPUs that share a sequence (default: the config's; where that is 0, the largest power of "
                        "two that divides a node's and the context's blocks allow)")
    parser.add_argument("--nodes", type=whole_number, nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    parser.add_argument("--per-node", type=whole_number, default=8, metavar="GPUS", help="(default: %(default)s)")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H200", help="(default: %(default)s)")
    parser.add_argument("--intra", type=positive, metavar="GB/S", help="a GPU receives from its node, nominal "
                        "(default: what was measured, or NVLink's)")
    parser.add_argument("--inter", type=positive, default=50.0, metavar="GB/S",
                        help="a GPU receives from other nodes, nominal (default: %(default)s, a 400 Gbit/s adapter)")
    parser.add_argument("--rows", type=Path, nargs="*", metavar="FILE",
                        help="JSON lines, or folders of them, to calibrate by (default: launch/results)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a prediction to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
