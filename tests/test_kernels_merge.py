"""Joining partial softmaxes against the plain twin: on the GPU where there is one, else by Triton's interpreter."""
import math

import pytest
import torch

from muse_dist.kernels import plain_blocks, reference, triton_blocks, triton_merge
from tests.kernel_cases import GPU, assert_near, normal

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy's log2(0) is meant


def parts_of(count, shape=(2, 2, 70, 20), dtype=torch.float32):
    """Partial softmaxes, some rows of some empty, the first row of all; NaN stands where nothing is."""
    parts = []
    for i in range(count):
        out, lse = normal(*shape, seed=2 * i, dtype=dtype), 3 * normal(*shape[:-1], seed=2 * i + 1).float()
        empty = normal(*shape[:-1], seed=100 + i) > 0.5
        empty[..., 0] = True
        parts.append((out.masked_fill(empty[..., None], math.nan), lse.masked_fill(empty, -math.inf)))
    return parts


@pytest.mark.parametrize("count", [2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merge(count, dtype):
    parts = parts_of(count, dtype=dtype)
    out, lse = triton_merge.merge(parts)
    want, want_lse = reference.merge([(x.nan_to_num(0).double(), y.double()) for x, y in parts])
    assert out.dtype == dtype and lse.dtype == torch.float32
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert_near(lse, want_lse, 1e-6)
    assert_near(out, want, rounding)
    assert not out[..., 0, :].any()


def test_merge_takes_views():
    parts = parts_of(2, shape=(2, 70, 3, 20))
    views = [(out.transpose(1, 2), lse.transpose(1, 2)) for out, lse in parts]
    for got, want in zip(triton_merge.merge(views), triton_merge.merge(parts), strict=True):
        assert torch.equal(got.transpose(1, 2), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parts_are_added_to_the_rows_they_cover(dtype):
    total, part = normal(3, 50, 24, seed=1).to(dtype), normal(21, 3, 24, seed=2).to(dtype).transpose(0, 1)
    want = total.clone()
    want[:, 17:38] += part
    triton_merge.add_part(total, part, 17)
    assert torch.equal(total, want)


@pytest.mark.parametrize("ops", [triton_blocks, plain_blocks], ids=["triton", "plain"])
@pytest.mark.parametrize("count", [1, 3, 4, 6, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_are_rounded_once(ops, count, dtype):
    """Also of and to some rows of longer tensors; what is around them stays."""
    if ops is triton_blocks and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter does not round bf16 to nearest")
    long = [normal(2, 3, 50, 20, seed=i).to(dtype) for i in range(count)]
    parts = [long[0][:, :, 7:40].contiguous(), *(x[:, :, 7:40] for x in long[1:])]
    want = torch.stack([x.double() for x in parts]).sum(0)
    half_a_unit = {torch.float32: 0.0, torch.float16: 2 ** -11, torch.bfloat16: 2 ** -8}[dtype]  # in the last place
    found = ops.add_up(parts)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=half_a_unit, atol=1e-6 * want.abs().max().item())
    total = torch.full_like(long[0], 7.0)
    assert torch.equal(ops.add_up(parts, total[:, :, 7:40]), found)
    assert torch.equal(total[:, :, 7:40], found) and (total[:, :, :7] == 7).all() and (total[:, :, 40:] == 7).all()
