"""The GPU kernels on ranks that share a sequence, through Triton's interpreter: equal to plain PyTorch on one."""
import dataclasses

import pytest
import torch
import torch.distributed as dist

from muse_dist import muse_attention
from tests.brute import error
from tests.ranks import run_ranks
from tests.sharded import Case, joined, small

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets kernels only where no GPU is")

def steps(cases):
    return [case.step() for case in cases]


def test_equals_the_plain_kernels():
    """Both exchanges and layouts, causal and not; several anchors a chunk, so that blocks share anchors."""
    cases = []
    for exchange, causal, layout in (("moments", True, "zigzag"), ("moments", False, "contiguous"),
                                     ("kv", True, "zigzag")):
        config = small(block=16, leaf=8, group=8, remote_leaf=8, remote_anchors=2, halo=0, exchange=exchange,
                       causal=causal, backend="triton")
        cases.append(Case(config, 64, layout, 1, 1, dim=8, dtype=torch.float32, seed=len(cases)))
    found = run_ranks(2, steps, cases, limit=600)
    for i, case in enumerate(cases):
        plain = dataclasses.replace(case, config=dataclasses.replace(case.config, backend="torch"))
        want = plain.reference(2)
        for a, b in zip(joined([x[i] for x in found], case.layout), want, strict=True):
            assert error(a, b) <= 1e-4, case


def value_gradient(exchange, halo, least):
    """Gradient of the first value: 1 from its own query, `least` each from the next block and from the other rank.

    All queries are 0, so that each reads all keys alike. The block beside is near or far, as `halo` says.
    """
    config = small(block=16, leaf=8, group=8, remote_leaf=8, halo=halo, exchange=exchange, backend="triton")
    reads = 1 / torch.arange(1, 65, dtype=torch.float64)  # of the first key, by query
    dout = torch.zeros(64, dtype=torch.float64)
    dout[0] = 1.0
    for part in (slice(16, 32), slice(32, 64)):
        dout[part] = least / reads[part].sum()
    mine = slice(32 * dist.get_rank(), 32 * dist.get_rank() + 32)
    q, v = (torch.zeros(1, 1, 32, 8, dtype=torch.float16).requires_grad_() for _ in range(2))
    k = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0)).to(q.dtype)[:, :, mine].requires_grad_()
    out = muse_attention(q, k, v, config=config, group=dist.group.WORLD)
    dv = torch.autograd.grad(out, v, dout[mine, None].expand(1, 1, 32, 8).to(q.dtype))[0]
    return dv[0, 0, 0]


@pytest.mark.parametrize(("exchange", "halo"), [("moments", 0), ("kv", 1)])
def test_sums_of_half_precision_are_rounded_once(exchange, halo):
    """Two terms of which neither alone, but both together, move a gradient of 1 to the next number."""
    step = torch.finfo(torch.float16).eps
    first, _ = run_ranks(2, value_gradient, exchange, halo, 0.375 * step, limit=600)
    assert first.tolist() == [1 + step] * 8
