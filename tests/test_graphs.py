"""Recorded calls: exchanges run at every replay, and on GPUs replays equal calls without graphs, bit by bit."""
import contextlib
import dataclasses
import datetime
import functools
import gc
import os
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from muse_dist import ByteCounter, MuseConfig, exchange_kv, exchange_moments, forget_graphs, graphs, muse_attention
from muse_dist.comm import Communicator
from tests.ranks import outcomes, run_ranks

GPUS = torch.cuda.device_count()
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
CONFIG = MuseConfig(block=512, leaf=64, anchors=2, opened=4, cuda_graphs=True)


def record_exchanges():
    """Two exchanges, recorded once and run twice; what arrived each time, the bytes of both, and the order of work."""
    comm, steps = Communicator(dist.group.WORLD), []
    comm.between = steps.append
    x, spec = torch.zeros(4), [((4,), torch.float32)]
    other = 1 - comm.rank
    gathered = comm.all_gather("gathered", x)
    sent = comm.all_to_all("sent", [[x] if rank == other else [] for rank in range(2)],
                           [spec if rank == other else [] for rank in range(2)], x.device)
    found = [*gathered.wait(), *sent.wait()]
    comm.between = None
    seen = []
    for value in (1.0, 2.0):
        counter = ByteCounter()
        later = Communicator(dist.group.WORLD, counter)
        for pending in (gathered, sent):  # what a graph would compute
            pending.sent.view(torch.float32).fill_(value + 10 * comm.rank)
        for step in steps:
            step(later)
        seen.append(([x.clone() for x in found], dict(counter.received)))
    return seen, len(steps), comm.counter


def test_a_recorded_exchange_runs_at_every_replay():
    for rank, (seen, steps, counter) in enumerate(run_ranks(2, record_exchanges)):
        assert steps == 4 and counter is None
        for value, (found, received) in zip((1.0, 2.0), seen):
            wanted = [value, value + 10, value + 10 * (1 - rank)]
            assert [x.tolist() for x in found] == [[number] * 4 for number in wanted]
            assert received == {"gathered": 16, "sent": 16}


def replay_after_a_death():
    comm, steps = Communicator(dist.new_group(timeout=datetime.timedelta(seconds=5))), []
    comm.all_gather("first", torch.zeros(4)).wait()  # the ranks have met
    comm.between = steps.append
    comm.all_gather("keys", torch.zeros(4)).wait()
    comm.between = None
    if comm.rank == 1:
        os._exit(1)
    for step in steps:
        step(comm)


def test_a_replay_names_the_exchange_that_failed():
    found = outcomes(2, replay_after_a_death, limit=40, lost=1)[0]
    assert found.error is not None and "exchange 'keys'" in found.error and "rank 0 of 2" in found.error


REFUSED = "cuda_graphs=True: needs tensors on a GPU, not on cpu; take cuda_graphs=False"


def on_the_cpu():
    q = torch.zeros(1, 2, 1024, 16)
    muse_attention(q, q, q, config=CONFIG, group=dist.group.WORLD)


def test_graphs_are_refused_where_there_is_no_gpu():
    for found in outcomes(2, on_the_cpu):
        assert found.error is not None and found.error.startswith("ValueError")
        assert REFUSED in found.error


def test_one_device_refuses_as_ranks_do():
    q = torch.zeros(1, 2, 1024, 16)
    with pytest.raises(ValueError, match=REFUSED):
        muse_attention(q, q, q, config=CONFIG)
    with pytest.raises(ValueError, match=REFUSED):
        torch.compile(functools.partial(muse_attention, config=CONFIG), backend="aot_eager", fullgraph=True)(q, q, q)


class Fake:
    """A recording, a stream and an event where there is no GPU: says what was asked of it."""

    made: list = []
    fails: list = []

    def __init__(self, comm, function, inputs, pool, stream):
        Fake.made.append(tuple(inputs))
        if Fake.fails:
            raise Fake.fails.pop()

    def replay(self, comm, inputs):
        return [-x for x in inputs]


class Nothing:
    def __getattr__(self, name):
        return lambda *arguments: None


def replay_with_fakes(alone):
    """What becomes of calls: run, recorded, replayed; and of errors while they run or are recorded."""
    comm, x, said = Communicator(dist.group.WORLD), torch.ones(2), []
    given = None if alone else comm
    graphs.Recording = Fake
    graphs._RECORDED[comm.group] = recorded = graphs.Recorded(None, Nothing(), last=Nothing())
    graphs._DEVICES[x.device] = recorded
    torch.cuda.empty_cache = torch.cuda.device = lambda *device: contextlib.nullcontext()
    torch.cuda.current_stream = lambda *device: Nothing()
    torch.cuda.graph_pool_handle = object
    torch.cuda.is_current_stream_capturing = lambda: False

    def call(key, function):
        try:
            return graphs.replayed(key, function, [x], given)[0].tolist()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def double(x):
        return [2 * x]

    def breaks(x):
        raise torch.OutOfMemoryError("too large")

    said.append([call("a", double) for _ in range(3)])
    said.append([call("b", breaks), call("b", double), call("b", double)])  # a failed call has not warmed anything up
    said.append(len(Fake.made))
    Fake.fails = [torch.OutOfMemoryError("full")]
    said.append([call("c", double), call("c", double), len(Fake.made)])
    Fake.fails = [ValueError("a cause")]
    said.append([call("d", double), call("d", double)])
    with ThreadPoolExecutor(1) as thread:
        thread.submit(call, "f", double).result()
    said.append([call("f", double), call("f", double)])
    with ThreadPoolExecutor(1) as thread:
        said[-1].append(thread.submit(call, "f", double).result())
    for number in range(graphs.MOST):
        call(number, double)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        said.append([call(number, double) for number in range(graphs.MOST)])
    said.append([str(warning.message) for warning in found])
    Fake.fails = 2 * [torch.OutOfMemoryError("full")]
    forget_graphs()
    graphs._RECORDED[comm.group] = graphs._DEVICES[x.device] = graphs.Recorded(None, Nothing(), last=Nothing())
    said.append([call("e", double), call("e", double), call("e", double)])
    forget_graphs()
    said.append([len(graphs._RECORDED), len(graphs._DEVICES)])
    return said


@pytest.mark.parametrize("alone", [False, True])
def test_the_second_call_is_recorded(alone):
    once, broken, made, full, failed, threads, many, warned, never, left = run_ranks(1, replay_with_fakes, alone)[0]
    assert once == [[2, 2], [-1, -1], [-1, -1]]
    assert broken == ["OutOfMemoryError: too large", [2, 2], [-1, -1]] and made == 2
    assert full == [[2, 2], [-1, -1], 4], "memory that is cached is given back, and the call recorded again"
    assert failed[1] == ("RuntimeError: cuda_graphs=True: the call could not be recorded (ValueError: a cause); take "
                         "cuda_graphs=False")
    assert threads == [[2, 2], [-1, -1], [-1, -1]], "a thread runs a call before it records it, and replays any"
    # Four are recorded already; what finds no place runs.
    assert many == (graphs.MOST - 4) * [[-1, -1]] + 4 * [[2, 2]]
    assert len(warned) == 4 and all(f"cuda_graphs=True: {graphs.MOST} calls are recorded" in text for text in warned)
    assert never == [[2, 2], "OutOfMemoryError: full", [-1, -1]], "named as what it is; the next call tries again"
    assert left == [0, 0]


def results_of_layers(layer, step, shape, kv_heads):
    """Outputs and gradients of three layers, whose forwards all come before the first backward."""
    torch.manual_seed(step)
    layers, found = [], []
    for number in range(3):
        q, k, v = (torch.randn(1, heads, *shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                   for heads in (4, kv_heads, kv_heads))
        # A strided input, a layer whose forward runs again before its backward, and a gradient of one number.
        strided = q.transpose(1, 2).contiguous().transpose(1, 2)
        out = checkpoint(layer, q, k, v, use_reentrant=False) if number == 1 else layer(strided, k, v)
        dout = torch.randn_like(out) if number else out.new_ones(1).expand_as(out)
        layers.append(((q, k, v), out, dout))
    for leaves, out, dout in reversed(layers):
        found += [out, *torch.autograd.grad(out, leaves, dout)]
    return found


def compare_on_gpus(mode, layout, tokens, kv_heads, settings):
    """Whether steps with graphs give the bits of steps without, for two lengths and in two groups, and count as many
    bytes; how often the Python of a forward and a backward ran; whether groups and recordings are gone afterwards."""
    torch.cuda.set_device(dist.get_rank())
    # cuDNN's backward adds dq with atomics, and FlashAttention's does unless errors, not warnings, are asked for.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    groups = [dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=60)) for _ in range(2)]
    plain = dataclasses.replace(CONFIG, exchange=mode, cuda_graphs=False, **settings)
    module = exchange_moments if mode == "moments" else exchange_kv
    same, counters = True, [ByteCounter(), ByteCounter()]
    with mock.patch.object(module, "forward", wraps=module.forward) as forward, \
            mock.patch.object(module, "backward", wraps=module.backward) as backward:
        entered = [0, 0]
        for step, (group, length) in enumerate(4 * list(product(groups, (tokens, tokens // 2)))):
            results = []
            for config, counter in zip((dataclasses.replace(plain, cuda_graphs=True), plain), counters):
                before = forward.call_count, backward.call_count
                layer = functools.partial(muse_attention, config=config, group=group, layout=layout, counter=counter)
                with torch.inference_mode():  # a recording made here must serve training too
                    q = torch.randn(1, kv_heads, length // 2, 64, device="cuda", dtype=torch.bfloat16)
                    for _ in range(2):
                        layer(q, q, q)
                results.append(results_of_layers(layer, step, (length // 2, 64), kv_heads))
                if config.cuda_graphs:
                    entered = [a + b - c for a, b, c in zip(entered, (forward.call_count, backward.call_count), before)]
            same &= all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.cuda.synchronize()
    gone = [weakref.ref(x) for group in groups for x in (group, *graphs._RECORDED[group].found.values())]
    for group in groups:
        dist.destroy_process_group(group)
    del group, groups, layer, results, forward, backward  # outputs know the group, for their backward
    gc.collect()
    return same, counters[0].received == counters[1].received, entered, len(gone), all(x() is None for x in gone)


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens, kv_heads, settings", [
    (8192, 4, {}), (4099, 2, {}), (4096, 2, {"causal": False, "trace": False, "tolerance": 0.004}), (700, 4, {})])
def test_one_device_replays_what_it_computes(tokens, kv_heads, settings, compiled, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    forget_graphs()
    counts = []
    torch.use_deterministic_algorithms(True)  # cuDNN's backward adds dq with atomics
    try:
        config = dataclasses.replace(CONFIG, **settings)
        layers = [functools.partial(muse_attention, config=dataclasses.replace(config, cuda_graphs=graphed))
                  for graphed in (True, False)]
        if compiled:
            layers = [torch.compile(layer, fullgraph=True) for layer in layers]
        with mock.patch.object(graphs, "Recording", wraps=graphs.Recording) as recording:
            for step in range(4):
                found, wanted = (results_of_layers(layer, step, (tokens, 64), kv_heads) for layer in layers)
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
                counts.append(recording.call_count)
        # Three layers of a shape: the first step runs and records each operator, and no plan where all is near.
        assert counts == 4 * [2 if tokens == 700 else 3]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_memory_that_runs_out_while_a_call_is_recorded():
    forget_graphs()
    fails = [True]

    def double(x):
        y = 2 * x
        if torch.cuda.is_current_stream_capturing() and fails:
            fails.pop()
            raise torch.OutOfMemoryError("full")
        return [y]

    for number in range(4):
        x = torch.full((2,), number, device="cuda")
        assert graphs.replayed("double", double, [x])[0].tolist() == 2 * [2 * number]
    assert not fails


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_threads_take_turns():
    forget_graphs()
    plain = dataclasses.replace(CONFIG, cuda_graphs=False)
    inputs = [torch.randn(1, 4, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(40)]
    wanted = [muse_attention(x, x, x, config=plain) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda x: muse_attention(x, x, x, config=CONFIG), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_memory_of_graphs_that_are_forgotten_comes_back():
    q = torch.randn(1, 4, 8192, 64, device="cuda", dtype=torch.bfloat16)
    muse_attention(q, q, q, config=dataclasses.replace(CONFIG, cuda_graphs=False))

    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    forget_graphs()
    before = reserved()
    for _ in range(3):
        muse_attention(q, q, q, config=CONFIG)
    assert reserved() > before
    forget_graphs()
    assert reserved() == before


@needs_two
@pytest.mark.parametrize("mode, layout, tokens, kv_heads, settings", [
    ("moments", "zigzag", 16384, 4, {}), ("kv", "zigzag", 16384, 2, {}),
    ("moments", "contiguous", 8192, 2, {"causal": False}), ("moments", "zigzag", 16384, 4, {"trace": False})])
def test_replays_equal_calls_without_graphs(mode, layout, tokens, kv_heads, settings):
    for same, counted, entered, kept, gone in run_ranks(2, compare_on_gpus, mode, layout, tokens, kv_heads, settings,
                                                        limit=200):
        assert same and counted
        # Two groups and two lengths, each run once and recorded once, and where the heads are as many in both calls one
        # forward the less often.
        shapes = 4 if kv_heads == 4 else 8
        assert entered == [2 * shapes, 2 * 4] and kept == 2 + shapes + 4 and gone
