"""Launch shapes of the GPU kernels, timed on this GPU: the best go into a file that `MuseConfig.tiles` names."""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.bench_exact import relative
from launch.bench_inputs import Shape, TrainedHeads, make_inputs
from launch.options import DTYPES, changed, described_device, dtype_of, pick_device
from muse_dist import MuseConfig
from muse_dist.backend import triton_problem
from muse_dist.compute import working
from muse_dist.kernels.limits import padded
from muse_dist.kernels.plain_blocks import Acceptance, Moments
from muse_dist.kernels.tiles import BACKWARD, OPERATORS, gpu_name, read_tiles, shape_class
from muse_dist.kernels.triton_common import Tile, backward_tiles
from muse_dist.slabs import sight_of
from muse_dist.tree import arrange, has_far_field, make_plan

SIDES = (32, 64, 128)  # rows and keys of a tile, up to head dim 128 in half precision; else half of that
LAUNCHES = ((4, 1), (4, 2), (4, 3), (8, 2))  # warps, stages
AREA = range(2048, 8192 + 1)  # rows * keys: smaller tiles keep tensor cores waiting, larger ones spill
AGREE = 0.02  # relative error of results against the pinned tile's: sums in another order, in half precision
WORTH = 0.02  # a tile that saves less of the time than this is not taken for the pinned one
Clock = Callable[[Callable[[], Any]], float]  # milliseconds of a call
Run = Callable[["Tile | None"], Any]  # an operator on fixed arguments, with a tile


class Row(NamedTuple):
    """An operator's time with its pinned tile, and the best."""

    operator: str
    pinned: float  # milliseconds
    best: float
    tile: Tile | None  # None: the pinned one
    tried: int
    unfit: int  # tiles that do not fit on the chip or do not compute the same


def candidates(dim: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles worth trying."""
    cut = 1 if padded(dim) * dtype.itemsize <= 256 else 2
    return [Tile(rows // cut, keys // cut, warps, stages)
            for rows in SIDES for keys in SIDES if rows * keys in AREA
            for warps, stages in LAUNCHES if warps == 4 or padded(dim) > 16]


def operators(
    config: MuseConfig, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[dict[str, Run], Tensor]:
    """Every operator as a function of its tile, None for the pinned one, on what a layer hands it.

    Args:
        q, dout: [B, H, N, D]; k, v: [B, K, N, D].
    Returns:
        The functions, and bool [n, 1, J]: the moments that a query block's anchors see, and the others are unspecified.
    """
    from muse_dist.kernels import triton_blocks as ops

    scale = q.shape[-1] ** -0.5
    rows, keys, values = working(q, k, v, config)
    plan = make_plan(rows, keys, config, scale)
    blocks = arrange(ops, rows, keys, values, plan, config)
    valid = blocks.key_valid
    places = range(plan.key_order.shape[2])
    sight = sight_of(places, places, config, q.device)._replace(gaps=not config.causal)
    leaf = ops.moments(plan.anchors, blocks.k, blocks.v, sight, scale, valid)
    accept = Acceptance(plan.anchors, leaf, config.trace, config.tolerance) if config.tolerance else None
    far = blocks.q, plan.anchors, leaf, blocks.k, blocks.v, plan.opened
    _, lse = ops.far_field(*far, sight, scale, config.trace, valid)
    up = ops.gather_tokens(dout.unflatten(1, rows.shape[1:3]), plan.query_order).unflatten(3, (-1, config.group))
    delta = torch.zeros_like(lse)
    pinned = backward_tiles(q.shape[-1], blocks.q.dtype)

    def backward(part: str, tile: Tile | None) -> Any:
        tiles = pinned if tile is None else pinned._replace(**{part: tile})
        return ops.far_field_backward(up, *far, lse, delta, sight, scale, config.trace, valid, tile=tiles)

    grad = backward("query", None)[1]
    found: dict[str, Run] = {
        "moments": lambda tile: ops.moments(plan.anchors, blocks.k, blocks.v, sight, scale, valid, tile=tile),
        "moments_backward": lambda tile: ops.moments_backward(
            grad, plan.anchors, blocks.k, blocks.v, sight, scale, valid, tile=tile),
        "open_leaves": lambda tile: ops.open_leaves(
            blocks.q, blocks.k, sight, config.opened, config.sinks, scale, blocks.row_valid, valid, accept, tile=tile),
        "far_field": lambda tile: ops.far_field(*far, sight, scale, config.trace, valid, tile=tile)}
    for part in BACKWARD:
        found[part] = lambda tile, part=part: backward(part, tile)  # type: ignore[misc]
    seen = ops.seen_blocks(sight).repeat_interleave(leaf.mass.shape[-1] // len(places), 1)
    return {name: found[name] for name in OPERATORS}, seen[:, None]


def results(found: Any, seen: Tensor) -> list[Tensor]:
    """The tensors of an operator's result, zeros where moments are unspecified."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Moments):
        return [torch.where(seen if x.dim() == found.mass.dim() else seen[..., None], x, 0.0) for x in found]
    return [x for part in found if part is not None for x in results(part, seen)]


def tune(operator: str, run: Run, seen: Tensor, tiles: list[Tile], clock: Clock) -> Row:
    """Time an operator with every tile that fits and gives what the pinned one gives."""
    from triton.runtime.errors import OutOfResources, PTXASError

    wanted = results(run(None), seen)
    pinned = clock(lambda: run(None))
    best, chosen, unfit = pinned * (1 - WORTH), None, 0
    for tile in tiles:
        try:
            got = results(run(tile), seen)
            if not all(_agree(a, b) for a, b in zip(got, wanted, strict=True)):
                unfit += 1
                continue
            time = clock(lambda tile=tile: run(tile))  # type: ignore[misc]
        except (OutOfResources, PTXASError):
            unfit += 1
            continue
        if time < best:
            best, chosen = time, tile
    return Row(operator, pinned, best if chosen else pinned, chosen, len(tiles), unfit)


def _agree(got: Tensor, wanted: Tensor) -> bool:
    if not got.is_floating_point():  # leaves that were chosen: rounding may exchange a few
        used = (got >= 0) | (wanted >= 0)
        return not used.any().item() or (got == wanted)[used].double().mean().item() > 1 - AGREE
    finite = wanted.isfinite()  # log-sum-exps of rows that see nothing are not
    if not torch.equal(got.masked_fill(finite, 0), wanted.masked_fill(finite, 0)):
        return False
    got, wanted = got.masked_fill(~finite, 0), wanted.masked_fill(~finite, 0)
    return torch.equal(got, wanted) or relative(got, wanted) < AGREE


def run(options: argparse.Namespace) -> None:
    """The command: tune, print a table, and merge what was found into the file."""
    device = pick_device(options.device)
    dtype = dtype_of(options.dtype, device)
    config = changed(options.preset, options.set)
    shape = Shape(options.heads, options.kv_heads or options.heads, options.tokens, options.dim)
    if not has_far_field(shape.tokens, config):
        raise ValueError(f"--tokens {shape.tokens}: is all near with block={config.block}; take more")
    model = None if options.model is None else TrainedHeads(options.model, device, dtype)
    inputs = make_inputs(shape, model, device, dtype)
    if config.tolerance and inputs.source == "gaussian":
        raise ValueError("--preset: with a tolerance next to nothing of Gaussian q, k and v is opened; give a --model "
                         "with such heads, or --set tolerance=0 --set opened=N for the N leaves that yours open")
    table = read_tiles(str(options.out)) if options.out.exists() else {}
    problem = triton_problem(config, inputs.q)
    if problem is not None:
        raise ValueError(problem)
    name, gpu = shape_class(shape.dim, dtype, config.leaf, config.group), gpu_name(device)
    print(f"{described_device(device)}; {name}; {shape.tokens} tokens, {shape.heads} heads, {shape.kv_heads} key/value "
          f"heads, {inputs.source}", flush=True)
    print(f"{'operator':<18}{'pinned ms':>10}{'best ms':>10}  tile (rows, keys, warps, stages)", flush=True)
    found = table.setdefault(gpu, {}).setdefault(name, {})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        runs, seen = operators(config, inputs.q, inputs.k, inputs.v, inputs.dout)
        for operator in options.operators:
            row = tune(operator, runs[operator], seen, candidates(shape.dim, dtype), milliseconds)
            text = "as pinned" if row.tile is None else str(list(row.tile))
            print(f"{operator:<18}{row.pinned:>10.3f}{row.best:>10.3f}  {text}; {row.tried} tried, {row.unfit} unfit",
                  flush=True)
            found.pop(operator, None)
            if row.tile is not None:
                found[operator] = list(row.tile)
            options.out.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {options.out}: use it with tiles={str(options.out)!r} in the settings")


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, with a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=5, rep=25, return_mode="median"))


def add_command(commands: Any) -> None:
    """Add `tiles` to the subcommands of launch.bench."""
    command = commands.add_parser("tiles", help="tune the launch shapes of the GPU kernels", description=__doc__)
    command.add_argument("--out", type=Path, required=True, metavar="FILE.json",
                         help="where the best tiles go; those of other GPUs and shapes that it holds stay")
    command.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="NAME",
                         help=f"only these of {', '.join(OPERATORS)}")
    command.add_argument("--tokens", type=int, default=65536, help="of the sequence (default: %(default)s)")
    command.add_argument("--dim", type=int, default=64, help="head dim (default: %(default)s)")
    command.add_argument("--heads", type=int, default=16, help="query heads (default: %(default)s)")
    command.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
    command.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                         help="default: bfloat16 on a GPU, float32 on the CPU")
    command.add_argument("--preset", default="fast", help="settings of MuSe (default: %(default)s)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="another field of MuseConfig; repeat for more")
    command.add_argument("--model", type=Path, metavar="DIR",
                         help="a trained model as in launch.evaluate, for q, k and v (default: Gaussian)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.set_defaults(run=run)
