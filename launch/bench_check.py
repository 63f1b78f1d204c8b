"""Is what the benchmarks time also right? Checks in the same process, before any speed-up is printed.

Every check compares with plain PyTorch in fp64 on the same inputs: output and the gradients of q, k and v.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench_inputs import Shape, make_inputs
from launch.bench_exact import relative
from launch.ranks import Ranks
from launch.bench_rivals import Problem
from launch.bench_timing import Attention, step
from muse_dist import MuseConfig, muse_attention
from muse_dist.attention import attend
from muse_dist.emulation import emulate_ranks
from muse_dist.tree import Plan

WIDE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; half precision is held to exact attention's
RANKS_TOLERANCE = 1e-9  # relative, in fp64
SQUARED_TOLERANCE = {torch.float64: 1e-16, torch.float32: 1e-8}  # of exact rivals; 1e-3 in half precision
PLAN_SLACK = 1.2  # how much further from exact attention clusters found by kernels may be than those of the twin


@dataclass(frozen=True)
class Check:
    """What was checked and found; `worst` is the largest error over the largest one allowed."""

    what: str
    worst: float

    @property
    def passed(self) -> bool:
        return self.worst <= 1  # false for NaN


def check_rival(errors: dict[str, float], dtype: torch.dtype, rows: int) -> Check:
    """Of exact attention and windows: relative squared errors against plain fp32 arithmetic on the timed inputs."""
    allowed = SQUARED_TOLERANCE.get(dtype, 1e-3)
    return Check(f"relative squared error of out, dq, dk and dv of {rows} rows at most {allowed:.0e}",
                 _largest([error / allowed for error in errors.values()]))


def with_timed(check: Check, errors: dict[str, float], rows: int) -> Check:
    """`check`, failed unless the timed output and gradients are nearer to exact attention than zeros would be."""
    worst = [check.worst, *(torch.inf if error >= 1 else error for error in errors.values())]
    return Check(f"{check.what}; relative squared error of the timed out, dq, dk and dv of {rows} rows below 1",
                 _largest(worst))


def check_muse(config: MuseConfig, problem: Problem) -> Check:
    """Of MuSe's backend on one device, with `config` scaled down to short blocks.

    With the same clusters and opened leaves, the backend's error against the plain twin in fp64 is at most twice that
    of exact attention in the same half precision (1e-4 in fp32); with its own, it is about as far from exact attention
    as the twin with the twin's.
    """
    small = scaled(config)
    tensors = _inputs(problem, (4 + 2 * small.halo) * small.block + small.block // 2 + 3)
    for _ in range(2 if small.cuda_graphs else 1):  # the second call replays
        found = step(lambda q, k, v: muse_attention(q, k, v, config=small), _leaves(tensors), tensors[3])
    plan = Plan(*torch.ops.muse_dist.plan(tensors[0], tensors[1], problem.shape.dim ** -0.5, small.encoded))
    twin = small.plain()
    wide = [x.double() for x in tensors]
    given = plan._replace(anchors=plan.anchors.double())
    same = step(lambda q, k, v: attend(q, k, v, given, twin, problem.shape.dim ** -0.5), _leaves(wide), wide[3])
    own = step(lambda q, k, v: muse_attention(q, k, v, config=twin), _leaves(wide), wide[3])
    exact, allowed = _exact(problem, tensors)
    worst = [error / most for error, most in zip(map(relative, found, same), allowed)]
    # Their own clusters: where there is no far field both are exact, up to what is allowed.
    worst += [relative(a, e) / (PLAN_SLACK * relative(b, e) + most)
              for a, b, e, most in zip(found, own, exact, allowed)]
    return Check(f"backend against backend='torch' in fp64 at {tensors[0].shape[2]} tokens, blocks of {small.block}: "
                 "out, dq, dk, dv with the same clusters, and the distance to exact attention with its own",
                 _largest(worst))


def check_muse_ranks(config: MuseConfig, problem: Problem) -> Check:
    """Of MuSe over ranks, against one process that emulates them in fp64, with `config` scaled down.

    In fp64 the exchanges must give the same numbers. In the timed dtype and backend "kv" must give those of one
    device, up to what exact attention's may differ. "moments" have no such twin: they may differ from fp64 by a quarter
    of MuSe's own error more, since rounding can move a key into another cluster.
    """
    ranks, small = problem.ranks, scaled(config)
    tensors = _inputs(problem, 4 * ranks.size * small.block)
    wide = [x.double() for x in tensors]
    twin = small.plain()
    wanted = step(_emulation(twin, ranks), _leaves(wide), wide[3])
    exact, allowed = _exact(problem, tensors)
    same = _over_ranks(twin, ranks, wide)
    for _ in range(2 if small.cuda_graphs else 1):  # the second call replays
        found = _over_ranks(small, ranks, tensors)
    worst = [relative(a, b) / RANKS_TOLERANCE for a, b in zip(same, wanted)]
    if config.exchange == "kv":
        alone = step(lambda q, k, v: muse_attention(q, k, v, config=small), _leaves(tensors), tensors[3])
        worst += [relative(a, b) / most for a, b, most in zip(found, alone, allowed)]
    else:
        worst += [relative(a, b) / (most + 0.25 * relative(b, e))
                  for a, b, e, most in zip(found, wanted, exact, allowed)]
    return Check(f"{ranks.size} ranks against one process in fp64 at {tensors[0].shape[2]} tokens, blocks of "
                 f"{small.block}: out, dq, dk, dv; exchanges in fp64, and the timed dtype and backend", _largest(worst))


def scaled(config: MuseConfig) -> MuseConfig:
    """The same leaves, groups and opened leaves in the shortest blocks that hold four of each."""
    block = min(config.block, 4 * max(config.leaf, config.group, config.remote_leaf))
    anchors = min(config.anchors, block // config.group)
    return dataclasses.replace(config, block=block, anchors=anchors, sinks=min(config.sinks, block // config.leaf),
                               remote_anchors=min(config.remote_anchors, anchors))


def _inputs(problem: Problem, tokens: int) -> list[Tensor]:
    """q, k, v and the output's gradient: two key/value heads, grouped as in the timed shape."""
    shape = problem.shape
    small = Shape(2 * shape.heads // shape.kv_heads, 2, tokens, shape.dim)
    made = make_inputs(small, None, problem.ranks.device, problem.dtype)
    return [made.q, made.k, made.v, made.dout]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors[:3]]


def _exact(problem: Problem, tensors: list[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Exact attention in fp64, and the relative errors allowed: twice those of exact attention in half precision."""
    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal)

    wide = [x.double() for x in tensors]
    wanted = step(exact, _leaves(wide), wide[3])
    if problem.dtype in WIDE_TOLERANCE:
        return wanted, [WIDE_TOLERANCE[problem.dtype]] * 4
    narrow = step(exact, _leaves(tensors), tensors[3])
    return wanted, [2 * relative(a, b) for a, b in zip(narrow, wanted)]


def _emulation(config: MuseConfig, ranks: Ranks) -> Attention:
    if config.exchange == "kv":
        return lambda q, k, v: muse_attention(q, k, v, config=config)
    return lambda q, k, v: emulate_ranks(q, k, v, config=config, ranks=ranks.size, layout=ranks.layout)


def _over_ranks(config: MuseConfig, ranks: Ranks, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of all ranks, joined."""
    split = ranks.split(tensors[0].shape[2], config.block)
    parts = [split.shard(x, ranks.rank, 2).contiguous() for x in tensors]
    results = step(lambda q, k, v: muse_attention(q, k, v, config=config, group=ranks.group, layout=ranks.layout),
                   _leaves(parts), parts[3])
    return [split.join(ranks.gather(x), 2) for x in results]


def _largest(values: list[float]) -> float:
    """The largest value, NaN if any is."""
    return torch.tensor(values, dtype=torch.float64).max().item()
