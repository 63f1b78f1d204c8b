"""Groups, modules and callers' habits: what surrounds attention over ranks in a training job."""
import dataclasses
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from muse_dist import MuseAttention, muse_attention
from tests.brute import assert_close, error
from tests.ranks import run_ranks
from tests.sharded import Case, joined, small

MODES = pytest.mark.parametrize("exchange", ["moments", "kv"])


def interleaved(world_case, pair_cases):
    """Forwards of the world, this rank's pair and the world; backwards in the opposite order. All as `Case.step`."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine = dist.get_rank() % 2
    calls = [(world_case, dist.group.WORLD), (pair_cases[mine], pairs[mine]), (world_case, dist.group.WORLD)]
    shards = [[x.clone().requires_grad_() for x in case.shard(group)[:3]] for case, group in calls]
    outs = [muse_attention(*shard, config=case.config, layout=case.layout, group=group)
            for shard, (case, group) in zip(shards, calls)]
    grads = [torch.autograd.grad(out, shard, case.shard(group)[3])
             for out, shard, (case, group) in list(zip(outs, shards, calls))[::-1]][::-1]
    return [(out.detach(), *grad) for out, grad in zip(outs, grads)]


@MODES
def test_several_groups_alive_at_once(exchange):
    """The world and two pairs, whose ranks differ from those of the world, with calls in between each other."""
    world = Case(small(exchange=exchange), 64, "zigzag")
    pairs = [Case(small(exchange=exchange, opened=1), 64, "contiguous", seed=1), Case(small(), 96, "zigzag", seed=2)]
    found = run_ranks(4, interleaved, world, pairs)
    for place in (0, 2):
        assert_close(joined([x[place] for x in found], "zigzag"), world.reference(4), 1e-9)
    for first, case in enumerate(pairs):
        assert_close(joined([x[1] for x in found[first::2]], case.layout), case.reference(2), 1e-9)


def mesh_steps(case):
    """A step in the context-parallel dimension of a mesh, with every collective's group; data-parallel rank differs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    group = mesh["cp"].get_group()
    case = dataclasses.replace(case, seed=mesh["dp"].get_local_rank())
    used = []

    def watched(function):
        def call(*args, **kwargs):
            used.append(kwargs.get("group") is group)
            return function(*args, **kwargs)
        return call

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    names = (gather, "all_to_all_single", "all_gather_object")
    with mock.patch.multiple("muse_dist.comm.dist", **{name: watched(getattr(dist, name)) for name in names}):
        return case.step(group), used


@MODES
def test_a_group_of_a_device_mesh_and_no_other(exchange):
    case = Case(small(exchange=exchange), 64, "zigzag")
    found = run_ranks(4, mesh_steps, case)
    for seed in (0, 1):
        parts = [step for step, _ in found[2 * seed:2 * seed + 2]]
        assert_close(joined(parts, "zigzag"), dataclasses.replace(case, seed=seed).reference(2), 1e-9)
    assert all(len(used) >= 4 and all(used) for _, used in found)


def one_rank(case):
    group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    return case.step(group)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_group_of_one_rank_is_one_device(exchange, layout):
    case = Case(small(exchange=exchange), 64, layout)
    kv = dataclasses.replace(case, config=small(exchange="kv"))
    for step in run_ranks(2, one_rank, case):
        assert all(torch.equal(a, b) for a, b in zip(step, kv.reference(1)))


class Layer(nn.Module):
    """Projections around the attention, as in a decoder."""

    def __init__(self, config, layout):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 12, 12, generator=random, dtype=torch.float64) / 3)
        self.attention = MuseAttention(config, scale=0.5, group=dist.group.WORLD, layout=layout)

    def forward(self, x):
        q, k, v = ((x @ w).unflatten(-1, (3, 4)).transpose(1, 2) for w in self.weight)
        return self.attention(q, k[:, :1], v[:, :1]).transpose(1, 2).flatten(2)


def layer_outputs(cases):
    """Output and gradients of a layer, plain and compiled (with a graph break where the exchanges are)."""
    found = []
    for case, compiled in itertools.product(cases, (False, True)):
        layer = Layer(case.config, case.layout)
        call = torch.compile(layer, backend="aot_eager") if compiled else layer
        x = case.shard()[0].transpose(1, 2).flatten(2).requires_grad_()
        for _ in range(2):  # the second call runs from the cache
            out = call(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, layer.weight.grad))
        assert "ranks=2" in repr(layer.attention) and case.layout in repr(layer.attention)
    return found


def test_inside_a_module_and_compiled():
    cases = [Case(small(exchange=exchange), 64, "zigzag", heads=3, dim=4) for exchange in ("moments", "kv")]
    for found in run_ranks(2, layer_outputs, cases):
        for plain, compiled in zip(found[::2], found[1::2]):
            assert_close(compiled, plain, 1e-12)


def habits(case):
    """Calls as training code makes them; returns the differences to a plain step and what became of the inputs."""
    plain = case.step()
    *inputs, dout = case.shard()
    options = {"config": case.config, "layout": case.layout, "group": dist.group.WORLD}
    found = {}
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    out = muse_attention(*strided, **options)
    grads = torch.autograd.grad(out, strided, dout.transpose(1, 2).contiguous().transpose(1, 2), retain_graph=True)
    found["strided"] = max(error(a, b) for a, b in zip((out, *grads), plain))
    again = torch.autograd.grad(out, strided, dout)
    found["backward twice"] = max(error(a, b) for a, b in zip(again, grads))
    found["inputs"] = max((a - b).abs().max().item() for a, b in zip(strided, inputs))
    ones = [x.clone().requires_grad_() for x in inputs]
    muse_attention(*ones, **options).sum().backward()
    expanded = torch.autograd.grad(muse_attention(*strided, **options), strided, torch.ones_like(dout))
    found["expanded gradient"] = max(error(x.grad, b) for x, b in zip(ones, expanded))
    with torch.no_grad():
        found["no_grad"] = error(muse_attention(*inputs, **options), plain[0])
    with torch.inference_mode():
        found["inference_mode"] = error(muse_attention(*inputs, **options), plain[0])
    only_q = inputs[0].clone().requires_grad_()
    muse_attention(only_q, *inputs[1:], **options).backward(dout)
    found["frozen keys"] = error(only_q.grad, plain[1])
    return found


@MODES
def test_what_callers_do(exchange):
    """Strided inputs and gradients, two backwards, no gradients; nothing is changed in place."""
    for found in run_ranks(3, habits, Case(small(exchange=exchange), 96, "zigzag")):
        assert max(found.values()) <= 1e-12, found


def second_gradient(case):
    *inputs, dout = (x.requires_grad_() for x in case.shard())
    out = muse_attention(*inputs, config=case.config, group=dist.group.WORLD)
    try:
        grads = torch.autograd.grad(out, inputs, dout, create_graph=True)
        torch.autograd.grad(grads[0].sum(), inputs)
    except RuntimeError as error:
        return str(error)
    return ""


@MODES
def test_second_derivatives_are_refused(exchange):
    """As on one device: there is no formula for them, and a wrong result would be silent."""
    assert all(run_ranks(2, second_gradient, Case(small(exchange=exchange), 64)))


def under_autocast(case):
    inputs = [x.requires_grad_() for x in case.shard()[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        out = muse_attention(*inputs, config=case.config, group=dist.group.WORLD, layout=case.layout)
    out.float().square().sum().backward()
    return out.detach(), [x.grad.dtype for x in inputs]


@MODES
def test_autocast(exchange):
    """fp32 in, bf16 inside and out, fp32 gradients: as torch's own attention."""
    case = Case(small(exchange=exchange), 64, dtype=torch.float32, dim=8)
    found = run_ranks(2, under_autocast, case)
    half = run_ranks(2, Case.step, dataclasses.replace(case, dtype=torch.bfloat16))
    for (out, dtypes), step in zip(found, half):
        assert out.dtype == torch.bfloat16 and torch.equal(out, step[0])
        assert dtypes == [torch.float32] * 3
