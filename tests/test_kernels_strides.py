"""Views of longer tensors, as slabs of heads and query blocks are, give what copies of them give."""
import dataclasses

import pytest
import torch

from muse_dist import MuseConfig, muse_attention
from muse_dist.kernels import triton_blocks
from muse_dist.kernels.plain_blocks import Moments
from tests.kernel_cases import DEVICE, QUIET, Case

pytestmark = QUIET


def view(x):
    """The same numbers inside a tensor with more heads and blocks, with NaN around them, or the largest integer."""
    if not isinstance(x, torch.Tensor) or x.dim() < 5:
        return x
    around = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    shape = x.shape[0], x.shape[1] + 2, x.shape[2] + 2, *x.shape[3:]
    whole = torch.full(shape, around, dtype=x.dtype, device=x.device)
    part = whole[:, 1:-1, 1:-1]
    part.copy_(x)
    return part


def results(case, change):
    leaf = case.moments()
    shared = [change(x) for x in (case.anchor, Moments(*map(change, leaf)), case.k, case.v, case.opened)]
    out, lse = triton_blocks.far_field(change(case.q), *shared, *case.look())
    delta = (out.float() * case.dout.float()).sum(-1)
    grads = triton_blocks.far_field_backward(
        change(case.dout), change(case.q), *shared, change(lse), change(delta), *case.look())
    moments = triton_blocks.moments_backward(Moments(*map(change, grads[1])), change(case.anchor), *case.about()[1:])
    return [out, lse, grads[0], *(case.only_seen(x) for x in grads[1]), *grads[2:], *moments]


@pytest.mark.parametrize("slots", [3, 0])
def test_views_of_the_far_field(slots):
    case = Case(slots=slots, batch=2)
    for want, got in zip(results(case, lambda x: x), results(case, view), strict=True):
        assert (want is None and got is None) or torch.equal(want, got)


@pytest.mark.parametrize("settings", [
    {"leaf": 4, "group": 2, "halo": 2, "opened": 0},  # sinks alone
    {"leaf": 2, "group": 2, "halo": 1, "opened": 2},
    {"leaf": 2, "group": 2, "halo": 0, "opened": 4, "tolerance": 0.01, "causal": False},
], ids=str)
def test_two_sequences_in_slabs_of_query_blocks(settings):
    """So few heads that one is cut into slabs of its query blocks: these are views, and of two sequences with a gap."""
    config = MuseConfig(**{"block": 4, "anchors": 2, "remote_leaf": 4, "sinks": 1, "remote_anchors": 1, **settings})
    make = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 1, 40, 16, generator=make).to(DEVICE) for _ in range(4))
    found = []
    for backend in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = muse_attention(*leaves, config=dataclasses.replace(config, backend=backend))
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
