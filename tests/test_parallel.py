"""Attention over ranks against one device and the emulation: outputs, and all gradients summed over ranks."""
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from muse_dist import muse_attention
from muse_dist.comm import Pending
from muse_dist.emulation import emulate_ranks
from tests.brute import assert_close, error
from tests.ranks import run_ranks
from tests.sharded import Case, join, joined, small

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
MODES = pytest.mark.parametrize("exchange", ["moments", "kv"])
# In fp32 one device itself is up to 3e-5 from fp64 at these shapes, and ranks sum in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Settings that the cases of the full product take in turn.
SETTINGS = [
    {},
    {"remote_leaf": 1, "halo": 0, "remote_anchors": 2},
    {"remote_leaf": 4, "halo": 2, "trace": False, "sinks": 2},
    {"leaf": 4, "group": 8, "anchors": 1, "opened": 0, "sinks": 0},
]
GRADIENTS = {"moments": ["moments gradients", "halo and sinks gradients"], "kv": ["keys and values gradients"]}


def steps(cases):
    return [case.step() for case in cases]


def assert_all_equal_reference(ranks, cases):
    """Runs the cases on ranks and compares output and gradients with the reference; names the first case that fails."""
    found = run_ranks(ranks, steps, cases)
    for i, case in enumerate(cases):
        got, want = joined([x[i] for x in found], case.layout), case.reference(ranks)
        errors = [error(a, b) for a, b in zip(got, want, strict=True)]
        assert max(errors) <= TOLERANCE[case.dtype], (errors, case)


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_reference(ranks, layout):
    """Causal and not, equal and grouped heads, one sequence and two, fp64 and fp32, both exchanges."""
    cases = []
    for exchange, causal, (i, ((heads, kv_heads), batch)), dtype in itertools.product(
            ["moments", "kv"], [True, False], enumerate(itertools.product([(2, 2), (4, 2)], [1, 2])), TOLERANCE):
        config = small(exchange=exchange, causal=causal, **SETTINGS[(i + ranks + len(cases) // 2) % len(SETTINGS)])
        cases.append(Case(config, 16 * ranks, layout, heads, kv_heads, batch, dtype=dtype, seed=len(cases)))
    assert_all_equal_reference(ranks, cases)


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize("ranks", [2, 3])
def test_long_chunks(ranks, tolerance):
    """Several blocks a chunk, several anchors a chunk, odd sizes that leave buffers unaligned."""
    cases = []
    for layout, exchange, causal in itertools.product(["contiguous", "zigzag"], ["moments", "kv"], [True, False]):
        config = small(remote_anchors=2, exchange=exchange, causal=causal, remote_leaf=8, sinks=3, tolerance=tolerance)
        cases.append(Case(config, 48 * ranks, layout, 3, 1, 1, dim=7, seed=len(cases)))
    assert_all_equal_reference(ranks, cases)


EXACT = {
    "leaves of one key": {"leaf": 1, "remote_leaf": 1, "opened": 0, "sinks": 0, "halo": 0},
    "near field covers everything": {"halo": 99},
    "all local leaves opened, remote leaves of one key": {"leaf": 4, "opened": 99, "remote_leaf": 1},
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_exact_cases(ranks):
    """Where the method is exact it is exact on ranks too, in both exchanges."""
    cases = [Case(small(causal=causal, exchange=exchange, **changes), 32 * ranks, layout)
             for changes, causal, exchange, layout in itertools.product(
                 EXACT.values(), [True, False], ["moments", "kv"], ["contiguous", "zigzag"])]
    found = run_ranks(ranks, steps, cases)
    for i, case in enumerate(cases):
        assert_close(joined([x[i] for x in found], case.layout), case.exact(), 1e-9)


def steps_without(names, cases):
    """The steps, with the exchanges in `names` delivering zeros: gradients that nobody adds up."""
    wait = Pending.wait

    def lost(pending):
        return [x * 0 if pending.name in names else x for x in wait(pending)]

    with mock.patch.object(Pending, "wait", lost):
        return [case.step() for case in cases]


@LAYOUTS
@MODES
def test_gradients_are_summed_over_ranks(exchange, layout):
    """dk and dv hold what the queries of other ranks add; a backward that forgets to reduce is noticed."""
    ranks = 3
    cases = [Case(small(exchange=exchange, causal=causal), 32 * ranks, layout) for causal in (True, False)]
    found = {None: run_ranks(ranks, steps, cases)}
    for name in GRADIENTS[exchange]:
        found[name] = run_ranks(ranks, steps_without, [name], cases)
    nothing_summed = run_ranks(ranks, steps_without, GRADIENTS[exchange], cases)
    for i, case in enumerate(cases):
        want, local = case.reference(ranks), case.local_only(ranks)
        assert_close(joined([x[i] for x in found[None]], layout), want, 1e-9)
        for name in GRADIENTS[exchange]:
            out, dq, dk, dv = joined([x[i] for x in found[name]], layout)
            assert_close((out, dq), want[:2], 1e-9)
            assert error(dk, want[2]) > 1e-3 and error(dv, want[3]) > 1e-3, name
        for rank in range(ranks):
            assert_close(nothing_summed[rank][i][2:], local[rank], 1e-9)
            read_by_others = layout == "zigzag" or not case.config.causal or rank < ranks - 1
            for got, alone in zip(found[None][rank][i][2:], local[rank]):
                assert (error(got, alone) > 1e-3) == read_by_others


@LAYOUTS
@MODES
def test_bitwise_repeatable(exchange, layout):
    """In one process, and from one start of the ranks to the next."""
    case = Case(small(exchange=exchange, remote_anchors=2), 96, layout, dtype=torch.float32)
    runs = [x for _ in range(2) for x in zip(*run_ranks(3, steps, [case, case]))]
    for run in runs[1:]:
        for first, again in zip(runs[0], run):
            assert all(torch.equal(a, b) for a, b in zip(first, again))


@MODES
def test_half_precision(exchange):
    """bf16 and fp16 travel over gloo; sums stay in fp32, so that the result is near that of the emulation."""
    cases = [Case(small(exchange=exchange), 96, layout, dim=8, dtype=dtype)
             for layout in ("contiguous", "zigzag") for dtype in (torch.bfloat16, torch.float16)]
    found = run_ranks(3, steps, cases)
    for i, case in enumerate(cases):
        got, want = joined([x[i] for x in found], case.layout), case.reference(3)
        assert all(x.dtype == case.dtype for x in got)
        assert_close(got, want, 0.1 if case.dtype == torch.bfloat16 else 0.02)


def large_keys(case):
    """A forward with keys of several hundred, whose squares fp16 cannot hold."""
    q, k, v, _ = case.shard()
    return muse_attention(q / 300, 300 * k, v, config=case.config, group=dist.group.WORLD, layout=case.layout)


def test_variances_that_half_precision_cannot_hold_travel():
    case = Case(small(), 64, dtype=torch.float16, dim=8)
    q, k, v, _ = case.inputs()
    want = emulate_ranks(q / 300, 300 * k, v, config=case.config, ranks=2)
    assert (300 * k).float().square().amax() > torch.finfo(torch.float16).max
    # Keys and values are rounded on the way: some of them at 1000, where a rounding moves a logit by about 1e-3.
    assert error(join(run_ranks(2, large_keys, case), case.layout), want) <= 5 * torch.finfo(torch.float16).eps
