"""MuSe and every rival at hand side by side: times, memory, errors, and whether each of them is right."""
from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.bench_check import Check, check_muse, check_muse_ranks, check_rival, with_timed
from launch.bench_inputs import Inputs, Shape, TrainedHeads, make_inputs
from launch.bench_exact import Rows, Window, choose_rows, cosines, exact_rows, only_rows, squared_errors
from launch.options import DTYPES, changed, described_device, dtype_name, dtype_of, joined, write_line
from launch.bench_plots import plot
from launch.ranks import Ranks
from launch.bench_rivals import Problem, Unavailable, Variant, muse_variant, rivals
from launch.bench_timing import Attention, measure, step
from launch.bench_traces import record, stages
from muse_dist import MuseConfig, forget_graphs
from muse_dist.backend import backend_for
from muse_dist.compute import working
from muse_dist.config import PRESETS
from muse_dist.layout import Layout
from muse_dist.tree import has_far_field, make_plan

Row = dict[str, Any]


@dataclass
class Bench:
    """Everything that does not depend on the size."""

    ranks: Ranks
    options: argparse.Namespace
    dtype: torch.dtype
    causal: bool
    variants: list[Variant]
    model: TrainedHeads | None
    checks: dict[tuple[str, int, int], Check | str]  # of MuSe, by name, dim and kv heads; a string is an error


def run(options: argparse.Namespace) -> None:
    """The command on the ranks that torchrun started, or on this process alone."""
    with joined(options) as ranks:
        run_ranks(ranks, options)


def run_ranks(ranks: Ranks, options: argparse.Namespace) -> None:
    """Measure every size, print a table a size, append JSON lines, draw; exit with 1 if a check has failed."""
    if options.graphs and ranks.size > 1:
        raise ValueError("--graphs: for one device; ranks replay graphs with --set cuda_graphs=true")
    if options.graphs and ranks.device.type != "cuda":
        raise ValueError("--graphs: needs GPUs; leave it out here")
    bench = _prepare(ranks, options)
    rows: list[Row] = []
    for dim, kv_heads, tokens in product(options.dim, options.kv_heads or [options.heads], options.tokens):
        shape = Shape(options.heads, kv_heads, tokens, dim)
        found = measure_size(bench, Problem(shape, bench.causal, bench.dtype, ranks))
        rows += found
        if ranks.first:
            print(table(found), flush=True)
            for row in found if options.json is not None else ():
                write_line(options.json, row)
        if not _answers(ranks.device):
            break
    if ranks.first and options.out is not None:
        print(*(f"wrote {path}" for path in plot(rows, options.out)), sep="\n")
    bad = {row["variant"] for row in rows
           if not row.get("check", {}).get("passed", True) or (row["config"] and "failed" in row)}
    if bad:
        raise SystemExit(f"failed, or failed the check: {', '.join(sorted(bad))}")


def _prepare(ranks: Ranks, options: argparse.Namespace) -> Bench:
    dtype = dtype_of(options.dtype, ranks.device)
    names = ("moments", "kv") if ranks.size > 1 else ("",)
    muse = {" ".join(filter(None, (preset, exchange))): _config(preset, exchange, options)
            for preset in options.preset for exchange in names}
    windows = list(dict.fromkeys(Window(config.block, config.halo) for config in muse.values()))
    chosen = _chosen(rivals(ranks, windows, options.causal), options.rivals)
    chosen += [muse_variant(name, config, ranks) for name, config in muse.items()]
    if options.baseline is not None and options.baseline not in [variant.name for variant in chosen]:
        raise ValueError(f"--baseline {options.baseline}: is not measured; take one of "
                         f"{', '.join(variant.name for variant in chosen)}")
    model = None if options.model is None else TrainedHeads(options.model, ranks.device, dtype)
    return Bench(ranks, options, dtype, options.causal, chosen, model, {})


def _chosen(known: list[Variant], names: list[str] | None) -> list[Variant]:
    """The rivals called so, all if `names` is None; "flex_window" means every window."""
    families = {rival.name: {rival.name, "flex_window"} if rival.window else {rival.name} for rival in known}
    unknown = set(names or ()) - {"none"}.union(*families.values())
    if unknown:
        raise ValueError(f"--rivals {' '.join(sorted(unknown))}: unknown; known are {', '.join(families)} and none")
    return [rival for rival in known if names is None or families[rival.name] & set(names)]


def _config(preset: str, exchange: str, options: argparse.Namespace) -> MuseConfig:
    changes = [*options.set, f"causal={json.dumps(options.causal)}", *([f"exchange={exchange}"] if exchange else [])]
    return changed(preset, changes)


def measure_size(bench: Bench, problem: Problem) -> list[Row]:
    """A row for each variant at one size, speed-ups included."""
    shape, device = problem.shape, problem.ranks.device
    inputs = make_inputs(shape, bench.model, device, problem.dtype)
    places = choose_rows(shape.tokens, bench.options.error_rows, device)
    sparse = only_rows(inputs.dout, places)
    wanted = exact_rows(inputs.q, inputs.k, inputs.v, sparse, places, problem.causal)
    rows = []
    for variant in bench.variants:
        row = {
            "benchmark": "attention", "variant": variant.name, "about": variant.about, **shape._asdict(),
            "causal": problem.causal, "dtype": dtype_name(problem.dtype), "ranks": problem.ranks.size,
            "layout": variant.layout, "device": described_device(device), "torch": torch.__version__,
            "inputs": inputs.source, "rows_checked": len(places), "graphs": bench.options.graphs,
            "config": None if variant.config is None else json.loads(variant.config.encoded),
            "backend": None if variant.config is None else backend_for(variant.config, inputs.q)}
        try:
            row |= _measure(bench, problem, variant, inputs, places, sparse, wanted)
        except Unavailable as reason:
            row["failed"] = str(reason)
        except Exception as error:  # whatever a rival dies of, the others are still to be measured
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
        if not _answers(device):
            break
        forget_graphs()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _add_ratios(rows, bench.options.baseline)
    return rows


def _answers(device: torch.device) -> bool:
    """Whether a GPU can go on: after an illegal access it cannot, and nothing more can be measured in this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _measure(
    bench: Bench, problem: Problem, variant: Variant, inputs: Inputs, places: Tensor, sparse: Tensor, wanted: Rows
) -> Row:
    """Errors, check, times, memory and stages of one variant."""
    ranks, options = problem.ranks, bench.options
    split = _split(variant, problem)
    *leaves, dout, part = (split.shard(x, ranks.rank, 2).contiguous().detach()
                           for x in (inputs.q, inputs.k, inputs.v, inputs.dout, sparse))
    for leaf in leaves:
        leaf.requires_grad_()
    with variant.open(problem) as attention:
        graphs = variant.config is not None and variant.config.cuda_graphs
        if graphs:
            step(attention, leaves, part)  # from the second call on it is replayed: that is checked and timed
        results = [split.join(ranks.gather(x), 2) for x in step(attention, leaves, part)]
        found = Rows(*(x.index_select(2, places) for x in results[:2]), *results[2:])
        del results
        row: Row = {"error": squared_errors(found, wanted), "cosine": cosines(found, wanted)}
        check = _check(bench, problem, variant, inputs, places, sparse, found, row["error"])
        row["check"] = {"passed": check.passed, "worst": check.worst, "what": check.what}
        del found
        times, peak = measure(attention, leaves, dout, ranks, options.seconds, options.graphs)
        row |= {name: spread._asdict() for name, spread in times._asdict().items()}
        # What a replay allocates says nothing of the memory that its graphs keep.
        row["peak_bytes"] = None if graphs else peak
        if ranks.size == 1 and variant.config is not None:
            row["opened"] = _opened(variant.config, leaves[0], leaves[1])
        if options.profile and variant.config is not None:
            row["stages"] = _stages(attention, leaves, dout, ranks)
    return row


@torch.no_grad()
def _opened(config: MuseConfig, q: Tensor, k: Tensor) -> float:
    """How many leaves a group opens besides the sinks, on average over all groups."""
    if not has_far_field(q.shape[2], config):
        return 0.0
    rows, keys, _ = working(q, k, k, config)
    opened = make_plan(rows, keys, config, q.shape[-1] ** -0.5, q.dtype).opened[..., config.sinks:]
    return (opened >= 0).sum(-1).double().mean().item()


def _split(variant: Variant, problem: Problem) -> Layout:
    """Who holds which tokens; MuSe's chunks are whole blocks, others' only have to be equal."""
    shape, size = problem.shape, problem.ranks.size
    chunks = size * (2 if variant.layout == "zigzag" else 1)
    if size == 1:
        return Layout("contiguous", 1, shape.tokens, 1)
    if variant.config is None and shape.tokens % chunks:
        raise Unavailable(f"{shape.tokens} tokens do not divide by {chunks} chunks")
    return Layout(variant.layout, size, shape.tokens, 1 if variant.config is None else variant.config.block)


def _check(bench: Bench, problem: Problem, variant: Variant, inputs: Inputs, places: Tensor, sparse: Tensor,
           found: Rows, errors: dict[str, float]) -> Check:
    """Of MuSe once a kind of heads on a short sequence, and roughly on the timed inputs; of rivals on these alone."""
    if variant.config is None:
        if variant.window is not None:
            errors = squared_errors(found, exact_rows(
                inputs.q, inputs.k, inputs.v, sparse, places, problem.causal, variant.window))
        return check_rival(errors, problem.dtype, len(places))
    key = (variant.name, problem.shape.dim, problem.shape.kv_heads)
    if key not in bench.checks:
        function = check_muse if problem.ranks.size == 1 else check_muse_ranks
        try:
            bench.checks[key] = function(variant.config, problem)
        except Exception as error:  # it must not be tried again at the next size
            bench.checks[key] = f"the check ended with {type(error).__name__}: {error}".splitlines()[0]
    check = bench.checks[key]
    if isinstance(check, str):
        raise RuntimeError(check)
    return with_timed(check, errors, len(places))


def _stages(attention: Attention, leaves: Sequence[Tensor], dout: Tensor, ranks: Ranks) -> list[Row]:
    """Time of a forward and a backward by stage, with each stage's longest kernels."""
    found = stages(record(lambda: step(attention, leaves, dout), ranks.device))
    return [{"stage": one.name, "seconds": one.seconds, "kernels": one.kernels} for one in found]


def _add_ratios(rows: list[Row], baseline: str | None) -> None:
    """Speed-ups over the baseline and memory over flash attention's, in place; none for what failed its check."""
    good = {row["variant"]: row for row in rows if row.get("check", {}).get("passed")}
    parallel = sorted((row for name, row in good.items() if name.startswith("cp_")), key=_seconds)
    others = [good[name] for name in ("ulysses", "cudnn", "flash") if name in good]
    base = good.get(baseline) if baseline is not None else next(iter([*parallel, *others]), None)
    for row in rows:
        if base is not None and row["variant"] in good:
            row["speedup"], row["speedup_over"] = _seconds(base) / _seconds(row), base["variant"]
        if row.get("peak_bytes") and good.get("flash", {}).get("peak_bytes"):
            row["peak_over_flash"] = row["peak_bytes"] / good["flash"]["peak_bytes"]


def _seconds(row: Row) -> float:
    return row["both"]["median"]  # type: ignore[no-any-return]


def table(rows: Sequence[Row]) -> str:
    """Rows of one size as text."""
    first = rows[0]
    over = next((row["speedup_over"] for row in rows if "speedup_over" in row), None)
    head = (f"\n{first['tokens']} tokens, {first['heads']} heads of {first['dim']}, {first['kv_heads']} key/value "
            f"heads, {first['dtype']}, {'causal' if first['causal'] else 'acausal'}, {first['ranks']} rank(s), "
            f"{first['device']}, inputs: {first['inputs']}\nerrors: relative squared, of {first['rows_checked']} rows, "
            f"against exact attention in fp32; opened: leaves a group reads besides the sinks, on average; check: "
            f"largest error over the largest allowed"
            + (f"; speed-up over {over}" if over else ""))
    lines = [head, f"{'variant':<18}{'forward ms':>11}{'backward':>10}{'both':>10}{'10th':>9}{'90th':>9}{'speed-up':>9}"
                   f"{'MiB':>8}{'/flash':>7}{'opened':>7}{'out':>10}{'dq':>9}{'dk':>9}{'dv':>9}{'check':>7}"]
    return "\n".join([*lines, *map(_line, rows), *(_stage_lines(row) for row in rows if "stages" in row)])


def _line(row: Row) -> str:
    if "failed" in row:
        return f"{row['variant']:<18} {row['failed'][:150]}"
    both, peak, ratio = row["both"], row["peak_bytes"], row.get("peak_over_flash")
    times = [row["forward"]["median"], row["backward"]["median"], both["median"]]
    text = f"{row['variant']:<18}" + "".join(f"{1e3 * t:>{w}.3f}" for t, w in zip(times, (11, 10, 10)))
    text += f"{1e3 * both['low']:>9.3f}{1e3 * both['high']:>9.3f}"
    text += f"{row['speedup']:>8.2f}x" if "speedup" in row else f"{'-':>9}"
    text += f"{peak / 2**20:>8.0f}" if peak else f"{'-':>8}"
    text += f"{ratio:>7.2f}" if ratio else f"{'-':>7}"
    text += f"{row['opened']:>7.2f}" if "opened" in row else f"{'-':>7}"
    text += f"{row['error']['out']:>10.1e}" + "".join(f"{row['error'][name]:>9.1e}" for name in ("dq", "dk", "dv"))
    text += f"{row['check']['worst']:>7.2f}"
    return text if row["check"]["passed"] else f"{text} FAILED: {row['check']['what']}"


def _stage_lines(row: Row) -> str:
    total = sum(stage["seconds"] for stage in row["stages"])
    lines = [f"{row['variant']} by stage:"]
    for stage in row["stages"]:
        share = stage["seconds"] / total if total else 0.0
        lines.append(f"  {stage['stage']:<40}{1e3 * stage['seconds']:>10.3f} ms{share:>7.1%}")
        lines += [f"      {name[:90]:<92}{1e3 * seconds:>8.3f} ms" for name, seconds in stage["kernels"]]
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    """Add `attention` to the subcommands of launch.bench."""
    command = commands.add_parser(
        "attention", help="MuSe and exact attention side by side", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION)
    command.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 65536, 262144],
                         help="of the whole sequence (default: %(default)s)")
    command.add_argument("--dim", type=int, nargs="+", default=[64], help="head dim (default: %(default)s)")
    command.add_argument("--heads", type=int, default=16, help="query heads (default: %(default)s)")
    command.add_argument("--kv-heads", type=int, nargs="+", help="key/value heads (default: as many as query heads)")
    command.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                         help="default: bfloat16 on a GPU, float32 on the CPU")
    sight = command.add_mutually_exclusive_group()
    sight.add_argument("--causal", action="store_true", default=True, help="every token sees those before it (default)")
    sight.add_argument("--acausal", action="store_false", dest="causal", help="every token sees all")
    command.add_argument("--preset", nargs="+", default=list(PRESETS), metavar="NAME",
                         help="presets of MuSe (default: all)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="another field of MuseConfig, in every preset; repeat for more")
    command.add_argument("--rivals", nargs="+", metavar="NAME", help="only these, or none (default: all at hand)")
    command.add_argument("--baseline", metavar="NAME", help="what speed-ups are over (default: the fastest "
                         "context_parallel of torch or Ulysses; cuDNN's kernel or flash attention)")
    command.add_argument("--model", type=Path, metavar="DIR",
                         help="a trained model as in launch.evaluate, for q, k and v (default: Gaussian)")
    command.add_argument("--error-rows", type=int, default=1024, metavar="N",
                         help="query rows whose output and gradients are compared with exact ones "
                              "(default: %(default)s)")
    command.add_argument("--seconds", type=float, default=1.0,
                         help="repeat a variant for so long, three times at least (default: %(default)s)")
    command.add_argument("--graphs", action="store_true", help="on one device, time CUDA graphs of every variant, as "
                         "in training steps that are captured: without the host's time to launch kernels")
    command.add_argument("--profile", action="store_true", help="also split the time by stage")
    command.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag", help="of MuSe's shards")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a row to this file")
    command.add_argument("--out", type=Path, metavar="DIR", help="write time.png and error.png into this folder")
    command.set_defaults(run=run)


DESCRIPTION = """MuSe and exact attention side by side, on one device or, under torchrun, over several ranks.

Every variant gets the same q, k and v. Forward and backward are timed apart: medians, 10th and 90th percentiles, of the
slowest rank. Errors are those of the output and of the gradients of a loss over some query rows (--error-rows), against
exact attention in fp32. Peak memory is that of a forward and a backward, with q, k, v and the output's gradient. A
speed-up is printed only for what has passed its check in the same process; the JSON lines say what was checked.
"""
