"""Recorded calls: exchanges run at every replay, and on GPUs replays equal calls without graphs, bit by bit."""
import dataclasses
import datetime
import functools
import gc
import os
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from muse_dist import ByteCounter, MuseConfig, muse_attention
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


def on_the_cpu():
    q = torch.zeros(1, 2, 1024, 16)
    muse_attention(q, q, q, config=CONFIG, group=dist.group.WORLD)


def test_graphs_are_refused_where_there_is_no_gpu():
    for found in outcomes(2, on_the_cpu):
        assert found.error is not None and found.error.startswith("ValueError")
        assert "cuda_graphs=True: needs tensors on a GPU, not on cpu; take cuda_graphs=False" in found.error


def test_one_device_takes_no_notice():
    q, k, v = torch.randn(3, 1, 2, 1024, 16)
    same = muse_attention(q, k, v, config=dataclasses.replace(CONFIG, cuda_graphs=False))
    assert torch.equal(muse_attention(q, k, v, config=CONFIG), same)


def results_of_layers(layer, step, shape, kv_heads):
    """Outputs and gradients of three layers, whose forwards all come before the first backward."""
    torch.manual_seed(step)
    layers, found = [], []
    for number in range(3):
        q, k, v = (torch.randn(1, heads, *shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                   for heads in (4, kv_heads, kv_heads))
        # A strided input, and a layer whose forward runs again before its backward.
        strided = q.transpose(1, 2).contiguous().transpose(1, 2)
        out = checkpoint(layer, q, k, v, use_reentrant=False) if number == 1 else layer(strided, k, v)
        layers.append(((q, k, v), out))
    for leaves, out in reversed(layers):
        found += [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]
    return found


def compare_on_gpus(mode, layout, tokens, kv_heads, settings):
    """Largest differences of out, dq, dk and dv with graphs and without, in a few steps; whether the bytes are the
    same and the group is gone afterwards."""
    torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=60))
    config = dataclasses.replace(CONFIG, exchange=mode, **settings)
    worst, counters = [0.0] * 4, [ByteCounter(), ByteCounter()]
    for step in range(4):
        results = []
        for graphs, counter in zip((True, False), counters):
            layer = functools.partial(muse_attention, config=dataclasses.replace(config, cuda_graphs=graphs),
                                      group=group, layout=layout, counter=counter)
            results.append(results_of_layers(layer, step, (tokens // 2, 64), kv_heads))
        for place, (a, b) in enumerate(zip(*results, strict=True)):
            worst[place % 4] = max(worst[place % 4], ((a - b).float().norm() / b.float().norm()).item())
    torch.cuda.synchronize()
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    del group, layer, results, a, b  # outputs know the group, for their backward
    gc.collect()
    return worst, counters[0].received == counters[1].received, gone() is None


@needs_two
@pytest.mark.parametrize("mode, layout, tokens, kv_heads, settings", [
    ("moments", "zigzag", 16384, 4, {}), ("kv", "zigzag", 16384, 2, {}),
    ("moments", "contiguous", 8192, 2, {"causal": False}), ("moments", "zigzag", 16384, 4, {"trace": False})])
def test_replays_equal_calls_without_graphs(mode, layout, tokens, kv_heads, settings):
    for worst, counted, gone in run_ranks(2, compare_on_gpus, mode, layout, tokens, kv_heads, settings, limit=200):
        # cuDNN's backward adds dq with atomics; everything else gives the same bits.
        assert worst[0] == 0 and max(worst[1:]) < 2e-3, worst
        assert counted and gone
