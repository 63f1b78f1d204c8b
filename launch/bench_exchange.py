"""What context-parallel ranks send each other: bytes, the time it takes alone, and how much of it computing hides."""
from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from launch.bench_check import Check, check_muse_ranks
from launch.bench_comm import Recorder, Silent
from launch.bench_inputs import Shape, make_inputs
from launch.options import DTYPES, changed, described_device, dtype_name, dtype_of, joined, write_line
from launch.ranks import Ranks
from launch.bench_rivals import Problem
from launch.bench_timing import Spread, mark, measure, spread, step, timed
from launch.bench_traces import overlap, record
from muse_dist import ByteCounter, MuseConfig, traffic
from muse_dist.comm import Communicator
from muse_dist.parallel import ParallelAttention, make_shard

ALONE = 10  # repetitions of an exchange
PHASES = ("bench::forward", "bench::backward")


def run(options: argparse.Namespace) -> None:
    """The command on the ranks that torchrun started, or on this process alone."""
    with joined(options) as ranks:
        run_ranks(ranks, options)


def run_ranks(ranks: Ranks, options: argparse.Namespace) -> None:
    """Check, measure, print a table; append JSON lines and write a trace if asked."""
    if ranks.size == 1:
        raise ValueError("exchange: one rank exchanges nothing; start it with torchrun --nproc-per-node 2 or more")
    configs = [changed(options.preset, [*options.set, f"exchange={exchange}"]) for exchange in ("moments", "kv")]
    dtype = dtype_of(options.dtype, ranks.device)
    heads = options.heads, options.kv_heads or options.heads
    checks = [check_muse_ranks(config, Problem(Shape(*heads, 0, options.dim), config.causal, dtype, ranks))
              for config in configs]
    for config, check in zip(configs, checks):
        _say(ranks, f"{config.exchange}: {'ok' if check.passed else 'FAILED'}, {check.worst:.2g} of what is allowed; "
                    f"{check.what}")
    if not all(check.passed for check in checks):
        raise ValueError("the ranks do not compute what one process does: no times are printed")
    failures = []
    for tokens in options.tokens:
        counts = {}
        for config, check in zip(configs, checks):
            problem = Problem(Shape(*heads, tokens, options.dim), config.causal, dtype, ranks)
            row = layer_row(problem, config, check, options.seconds)
            counts[config.exchange] = _of_far_fields(row["received"])
            _say(ranks, exchange_table(row))
            if options.trace is not None:
                path = options.trace.with_stem(f"{options.trace.stem}-{tokens}-{config.exchange}")
                row["overlap"] = trace_overlap(problem, config, path)
                _say(ranks, overlap_text(row["overlap"], path))
                failures += [f"{tokens} tokens, {config.exchange}, {phase}" for phase, share in row["overlap"].items()
                             if share == 0]
            if ranks.first and options.json is not None:
                write_line(options.json, {"benchmark": "exchange", "preset": options.preset, **row})
        _say(ranks, f"all but halo and sinks, moments / kv: {counts['moments'] / counts['kv']:.2%}")
    # Only the first rank has a trace: the others would wait for it.
    ranks.agree(f"no compute kernel runs while data travels: {'; '.join(failures)}" if failures else None)


def layer_row(problem: Problem, config: MuseConfig, check: Check, seconds: float) -> dict[str, Any]:
    """Bytes and times of one layer; times are those of the slowest rank, in seconds."""
    ranks, shape = problem.ranks, problem.shape
    assert ranks.group is not None
    leaves, dout = _shard(problem, config)
    counter = ByteCounter()
    recorder = Recorder(ranks.group, counter)
    step(_layer(dataclasses.replace(config, cuda_graphs=False), recorder, ranks), leaves, dout)
    received = dict(counter.received)
    alone = _times_alone(recorder, ranks)
    del recorder  # and the buffers it holds
    layers = {"layer": Communicator(ranks.group), "silent": Silent(ranks.group)}
    times = {}
    for name, comm in layers.items():
        for _ in range(2):  # from the second call on ranks replay, if the settings say so
            step(_layer(config, comm, ranks), leaves, dout)
        times[name], _ = measure(_layer(config, comm, ranks), leaves, dout, ranks, seconds)
    with_all, without = times["layer"].both.median, times["silent"].both.median
    together = sum(one.median for one in alone.values())
    wanted = getattr(traffic(config, (1, shape.heads, shape.kv_heads, shape.tokens, shape.dim), ranks.size,
                             layout=ranks.layout, dtype=problem.dtype, rank=ranks.rank), config.exchange)
    predicted = {k: n for k, n in wanted.items() if n} == {k: n for k, n in received.items() if n}
    return {"tokens": shape.tokens, "exchange": config.exchange, "heads": shape.heads, "kv_heads": shape.kv_heads,
            "dim": shape.dim, "dtype": dtype_name(problem.dtype), "ranks": ranks.size, "layout": ranks.layout,
            "device": described_device(ranks.device), "torch": torch.__version__, "config": json.loads(config.encoded),
            "check": {"what": check.what, "worst": check.worst}, "received": received, "as_predicted": predicted,
            "alone": {name: one._asdict() for name, one in alone.items()},
            **{name: {"forward": t.forward._asdict(), "backward": t.backward._asdict(), "both": t.both._asdict()}
               for name, t in times.items()},
            "alone_seconds": together, "exposed_seconds": with_all - without,
            "exposed_share": (with_all - without) / with_all,
            "hidden_share": 1 - min(max(with_all - without, 0.0) / together, 1.0)}


def _layer(config: MuseConfig, comm: Communicator, ranks: Ranks) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`muse_attention` over the ranks with a communicator of one's own."""
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shard = make_shard(q, k, v, config, q.shape[-1] ** -0.5, comm, ranks.layout, None)
        return ParallelAttention.apply(q, k, v, shard)  # type: ignore[no-untyped-call, no-any-return]

    return attention


def _shard(problem: Problem, config: MuseConfig) -> tuple[list[Tensor], Tensor]:
    """This rank's q, k and v, which require gradients, and the output's gradient."""
    ranks = problem.ranks
    made = make_inputs(problem.shape, None, ranks.device, problem.dtype)
    split = ranks.split(problem.shape.tokens, config.block)
    q, k, v, dout = (split.shard(x, ranks.rank, 2).contiguous() for x in (made.q, made.k, made.v, made.dout))
    return [x.requires_grad_() for x in (q, k, v)], dout


def _times_alone(recorder: Recorder, ranks: Ranks) -> dict[str, Spread]:
    """Time of every exchange with nothing else going on."""
    def run(name: str) -> list[torch.cuda.Event | float]:
        start = mark(ranks.device)
        recorder.repeat(name)
        return [start, mark(ranks.device)]

    return {name: spread([seconds for seconds, in timed(partial(run, name), ranks, ALONE)]) for name in recorder.names}


def exchange_table(row: dict[str, Any]) -> str:
    """One row as text: bytes and milliseconds of every exchange, halo and sinks apart; then the layer."""
    lines = [f"{row['tokens']} tokens, {row['exchange']}, {row['ranks']} ranks, {row['heads']} heads of {row['dim']}, "
             f"{row['kv_heads']} key/value heads, {row['dtype']}",
             f"  {'exchange':<28}{'bytes received':>16}{'alone ms':>11}{'10th':>9}{'90th':>9}"]
    for name, count in row["received"].items():
        alone = row["alone"].get(name)
        times = "" if alone is None else (f"{1e3 * alone['median']:>11.3f}{1e3 * alone['low']:>9.3f}"
                                          f"{1e3 * alone['high']:>9.3f}")
        lines.append(f"  {name:<28}{count:>16,}{times}")
    lines.append(f"  {'all but halo and sinks':<28}{_of_far_fields(row['received']):>16,}")
    lines.append(f"  {'all':<28}{sum(row['received'].values()):>16,}{1e3 * row['alone_seconds']:>11.3f}"
                 + ("" if row["as_predicted"] else "  not as predicted"))
    lines.append(f"  {'':<28}{'forward ms':>16}{'backward':>11}{'both':>9}")
    for key, name in (("layer", "layer"), ("silent", "layer without exchanges")):
        parts = [1e3 * row[key][part]["median"] for part in ("forward", "backward", "both")]
        lines.append(f"  {name:<28}{parts[0]:>16.3f}{parts[1]:>11.3f}{parts[2]:>9.3f}")
    lines.append(f"  exposed {1e3 * row['exposed_seconds']:.3f} ms, {row['exposed_share']:.1%} of the layer; "
                 f"hidden {row['hidden_share']:.1%} of the exchanges' time alone")
    return "\n".join(lines)


def _of_far_fields(received: dict[str, int]) -> int:
    """Bytes of what is not halo and sinks."""
    return sum(count for name, count in received.items() if not name.startswith("halo"))


def trace_overlap(problem: Problem, config: MuseConfig, path: Path) -> dict[str, float | None]:
    """Profile a forward and a backward; the share of NCCL's time in which compute kernels ran, by phase.

    None where the trace has no NCCL kernels. The first rank writes its trace to `path`.
    """
    ranks = problem.ranks
    assert ranks.group is not None
    (q, k, v), dout = _shard(problem, config)
    attention = _layer(config, Communicator(ranks.group), ranks)
    for _ in range(2):
        step(attention, (q, k, v), dout)

    def phases() -> None:
        with record_function(PHASES[0]):
            _occupy(ranks)
            out = attention(q, k, v)
            _finish(ranks)
        with record_function(PHASES[1]):
            _occupy(ranks)
            torch.autograd.grad(out, [q, k, v], dout)
            _finish(ranks)

    _finish(ranks)
    if not ranks.first:
        phases()
        return {}
    events = record(phases, ranks.device, path)
    found: dict[str, float | None] = {}
    for phase in PHASES:
        travel, hidden = overlap(events, phase)
        found[phase.removeprefix("bench::")] = hidden / travel if travel else None
    return found


def _occupy(ranks: Ranks) -> None:
    """Give the GPU some milliseconds of work, so that the host is ahead of it, as in training.

    Without it the host launches what computes after a short exchange is over.
    """
    if ranks.device.type == "cuda":
        x = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=ranks.device)
        for _ in range(20):
            torch.mm(x, x)


def _finish(ranks: Ranks) -> None:
    """Wait for the GPU, so that the kernels of a phase lie inside its range."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def overlap_text(shares: dict[str, float | None], path: Path) -> str:
    """What a trace shows, in words."""
    parts = [f"{phase} no NCCL kernels" if share is None else f"{phase} {share:.1%}" for phase, share in shares.items()]
    return f"  compute kernels run during this share of NCCL's time: {', '.join(parts)} ({path})"


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, flush=True)


def add_command(commands: Any) -> None:
    """Add `exchange` to the subcommands of launch.bench."""
    command = commands.add_parser(
        "exchange", help="what ranks send each other, and how much of the time it takes is hidden",
        formatter_class=argparse.RawDescriptionHelpFormatter, description=DESCRIPTION)
    command.add_argument("--tokens", type=int, nargs="+", default=[65536], help="of the whole sequence")
    command.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    command.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
    command.add_argument("--dim", type=int, default=64, help="head dim (default: %(default)s)")
    command.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                         help="default: bfloat16 on a GPU, float32 on the CPU")
    command.add_argument("--preset", default="fast", help="of MuseConfig (default: %(default)s)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="another field of MuseConfig; repeat for more")
    command.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag")
    command.add_argument("--seconds", type=float, default=1.0,
                         help="repeat a layer for so long, three times at least (default: %(default)s)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a row to this file")
    command.add_argument("--trace", type=Path, metavar="FILE",
                         help="profile a step, write the first rank's Chrome traces beside FILE (-TOKENS-EXCHANGE in "
                              "the name), and check that computing goes on while data travels")
    command.set_defaults(run=run)


DESCRIPTION = """What context-parallel ranks send each other with exchange="moments" and "kv"; start it with torchrun.

Bytes a rank receives in a forward and a backward of one layer, measured and predicted; the time of each exchange alone,
the same collectives on the same buffers; the time of the layer, and of the same layer with its exchanges taken out. The
difference of the two is the communication that computing does not hide. Times are those of the slowest rank.
"""
