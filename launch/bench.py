"""Benchmarks that run side by side what is to be compared.

    torchrun --standalone --nproc-per-node 4 -m launch.bench exchange --tokens 65536 262144

`exchange`: bytes a rank receives a layer and step with exchange="moments" and "kv", predicted and measured, the time
of each exchange alone, and of a forward and a backward of the layer. It first checks, in the same processes, that the
ranks compute what one process does, and prints no times if they do not.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.ranks import Ranks, join_ranks
from launch.train import pick_device
from muse_dist import ByteCounter, MuseConfig, muse_attention, traffic
from muse_dist.emulation import emulate_ranks

TOLERANCE = 1e-9  # relative, in fp64


def check(ranks: Ranks, exchange: str) -> float:
    """Largest relative error of output and gradients against one process, in fp64 on a short sequence."""
    config = MuseConfig(block=64, leaf=8, group=16, remote_leaf=8, opened=4, exchange=exchange)  # type: ignore[arg-type]
    split = ranks.split(ranks.size * 256, config.block)
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(1, h, split.tokens, 32, generator=generator, dtype=torch.float64).to(ranks.device)
            for h in (4, 2, 2, 4)]
    parts = [split.shard(x, ranks.rank, 2) for x in full]
    emulated = exchange == "moments" and ranks.size > 1

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if emulated:
            return emulate_ranks(q, k, v, config=config, ranks=ranks.size, layout=ranks.layout)
        return muse_attention(q, k, v, config=config)

    wanted = [split.shard(x, ranks.rank, 2) for x in _with_gradients(whole, full)]
    found = _with_gradients(
        lambda q, k, v: muse_attention(q, k, v, config=config, group=ranks.group, layout=ranks.layout), parts)
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted))


def _with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients for q, k, v and the output's gradient."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def layer_row(ranks: Ranks, options: argparse.Namespace, tokens: int, exchange: str) -> dict[str, Any]:
    """Bytes and times of one layer on this rank's shard."""
    config = MuseConfig.preset(options.preset, exchange=exchange)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    counter = ByteCounter()
    q, k, v, dout = (torch.randn(1, options.heads, tokens // ranks.size, options.dim, device=ranks.device, dtype=dtype)
                     for _ in range(4))
    times: list[tuple[float, float]] = []
    for _ in range(options.repeats + 1):
        counter.received.clear()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        start = _now(ranks)
        out = muse_attention(*leaves, config=config, group=ranks.group, layout=ranks.layout, counter=counter)
        middle = _now(ranks)
        torch.autograd.grad(out, leaves, dout)
        times.append((middle - start, _now(ranks) - middle))
    shape = (1, options.heads, options.heads, tokens, options.dim)
    wanted = getattr(traffic(config, shape, ranks.size, layout=ranks.layout, dtype=dtype, rank=ranks.rank), exchange)
    forward, backward = (statistics.median(column) for column in zip(*times[1:]))
    alone = {name: exchange_seconds(ranks, count, options.repeats) for name, count in counter.received.items()}
    return {"tokens": tokens, "exchange": exchange, "heads": options.heads, "dim": options.dim, "ranks": ranks.size,
            "layout": ranks.layout, "device": ranks.device.type, "torch": torch.__version__, "preset": options.preset,
            "received": dict(counter.received), "as_predicted": {k: n for k, n in wanted.items() if n} == {
                k: n for k, n in counter.received.items() if n},
            "forward_seconds": forward, "backward_seconds": backward, "alone_seconds": alone}


def exchange_seconds(ranks: Ranks, count: int, repeats: int) -> float:
    """Median time of an all-to-all in which every rank receives what the one that receives most does, `count` here."""
    most = max(int(x) for x in ranks.gather(torch.tensor(count, device=ranks.device)))
    send = torch.zeros(most // (ranks.size - 1) * ranks.size, dtype=torch.uint8, device=ranks.device)
    receive, times = torch.empty_like(send), []
    for _ in range(repeats + 1):
        start = _now(ranks)
        dist.all_to_all_single(receive, send, group=ranks.group)
        times.append(_now(ranks) - start)
    return statistics.median(times[1:])


def _now(ranks: Ranks) -> float:
    """A clock that all ranks read together, once their work is done."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    if ranks.group is not None:
        dist.barrier(group=ranks.group)
    return time.perf_counter()


def exchange_table(rows: list[dict[str, Any]]) -> str:
    """Rows as text: bytes and milliseconds an exchange."""
    lines = [f"{'tokens':>8} {'exchange':<9}{'what':<28}{'bytes':>14}{'alone ms':>10}"]
    for row in rows:
        for name, count in row["received"].items():
            lines.append(f"{row['tokens']:>8} {row['exchange']:<9}{name:<28}{count:>14,}"
                         f"{1e3 * row['alone_seconds'][name]:>10.3f}")
        lines.append(f"{row['tokens']:>8} {row['exchange']:<9}{'all; layer forward, backward':<28}"
                     f"{sum(row['received'].values()):>14,}{1e3 * row['forward_seconds']:>10.1f}"
                     f"{1e3 * row['backward_seconds']:>8.1f}" + ("" if row["as_predicted"] else "  not as predicted"))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    command = commands.add_parser("exchange", help="what ranks send each other, and how long it takes")
    command.add_argument("--tokens", type=int, nargs="+", default=[65536], help="of the whole sequence")
    command.add_argument("--heads", type=int, default=8, help="query and key/value heads (default: %(default)s)")
    command.add_argument("--dim", type=int, default=64, help="head dim (default: %(default)s)")
    command.add_argument("--preset", default="fast", help="of MuseConfig (default: %(default)s)")
    command.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag")
    command.add_argument("--repeats", type=int, default=5, help="timed runs; medians are printed")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a row to this file")
    options = parser.parse_args(arguments)
    try:
        with join_ranks(pick_device(options.device), options.layout) as ranks:
            _exchange(ranks, options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _exchange(ranks: Ranks, options: argparse.Namespace) -> None:
    if ranks.size == 1:
        raise ValueError("exchange: one rank exchanges nothing; start it with torchrun --nproc-per-node 2 or more")
    worst = ranks.sum(torch.tensor([check(ranks, "moments"), check(ranks, "kv")], device=ranks.device)).tolist()
    if ranks.first:
        print(f"error against one process (relative, fp64): moments {worst[0]:.1e}, kv {worst[1]:.1e}")
    if max(worst) > TOLERANCE:
        raise ValueError("the ranks do not compute what one process does: no times are printed")
    rows = [layer_row(ranks, options, tokens, exchange) for tokens in options.tokens for exchange in ("moments", "kv")]
    if ranks.first:
        print(exchange_table(rows))
        if options.json is not None:
            with options.json.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
