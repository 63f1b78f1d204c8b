"""The near field against its plain twin: on the GPU where there is one, else by Triton's interpreter.

Half precision is held to what exact attention in that precision makes of the same inputs: at most twice its error.
"""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from muse_dist.kernels import exact_kernels, reference, triton_exact, triton_merge, triton_near
from muse_dist.kernels.exact_kernels import Exact, exact_name
from muse_dist.kernels.triton_common import Tile
from muse_dist.kernels.triton_near import Run, find_runs
from tests.kernel_cases import DEVICE, GPU, SCALE, assert_near, normal, rms_error

BLOCK = 128 if GPU else 32

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy's log2(0) is meant


def near_pairs(count, halo, causal):
    return [(i, j, causal and i == j) for i in range(count) for j in range(count)
            if (0 <= i - j <= halo if causal else abs(i - j) <= halo)]


class Case:
    """A near field that is part of a softmax with a little more mass, given by its output and log-sum-exp."""

    def __init__(self, dtype=torch.float32, dim=24, batch=1, heads=2, group=2, tokens=None, keys=None, halo=1,
                 causal=True, pairs=None):
        tokens = 3 * BLOCK if tokens is None else tokens
        keys = tokens if keys is None else keys
        self.dtype, self.block = dtype, BLOCK
        spread = (24 / dim) ** 0.25  # logits of one size for every head dim
        self.q = (spread * normal(batch, heads, group, tokens, dim, seed=1)).to(dtype)
        self.k = (spread * normal(batch, heads, keys, dim, seed=2)).to(dtype)
        self.v = normal(batch, heads, keys, dim, seed=3, dtype=dtype)
        self.pairs = near_pairs(-(-tokens // BLOCK), halo, causal) if pairs is None else pairs
        more, lse = normal(*self.q.shape, seed=4), normal(*self.q.shape[:-1], seed=5) + 2
        merged, lse = reference.merge([self.twin(), (more, lse)])
        self.out, self.lse = merged.to(dtype), lse.float()
        self.dout = normal(*self.q.shape, seed=6, dtype=dtype)

    def look(self):
        return SCALE, self.pairs, self.block

    def twin(self):
        return reference.near_field(*(x.double() for x in (self.q, self.k, self.v)), *self.look())

    def twin_backward(self):
        tensors = self.dout, self.q, self.k, self.v, self.out, self.lse
        return reference.near_field_backward(*(x.double() for x in tensors), *self.look())

    def near_field(self, **options):
        return triton_near.near_field(self.q, self.k, self.v, *self.look(), **options)

    def near_field_backward(self, **options):
        return triton_near.near_field_backward(
            self.dout, self.q, self.k, self.v, self.out, self.lse, *self.look(), **options)

    def tolerances(self):
        """Relative RMS errors allowed for (out, dq, dk, dv)."""
        if self.dtype == torch.float32:
            return 1e-5, 1e-5, 1e-5, 1e-5
        half, exact = (self.exact(dtype) for dtype in (self.dtype, torch.float64))
        return tuple(2 * rms_error(a, b) for a, b in zip(half, exact, strict=True))

    def exact(self, dtype):
        """Exact attention to all keys: out, dq, dk, dv."""
        q, k, v = (x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        copies = [x[:, :, None].expand(-1, -1, q.shape[2], -1, -1).flatten(1, 2) for x in (k, v)]
        out = F.scaled_dot_product_attention(q.flatten(1, 2), *copies, scale=SCALE)
        return out.detach(), *torch.autograd.grad(out, [q, k, v], self.dout.flatten(1, 2).to(dtype))

    def check(self, **options):
        at_out, *at_grads = self.tolerances()
        out, lse = self.near_field(**options)
        want, want_lse = self.twin()
        assert out.dtype == self.dtype and lse.dtype == torch.float32
        assert_near(out, want, at_out)
        assert_near(lse, want_lse, 1e-5)
        grads = self.near_field_backward(**options)
        for grad, want_grad, tolerance in zip(grads, self.twin_backward(), at_grads, strict=True):
            assert grad.dtype == self.dtype
            assert_near(grad, want_grad, tolerance)


SHAPES = {
    "causal": {"tokens": 2 * BLOCK},
    "acausal, two beside, short block": {"tokens": 3 * BLOCK - 7, "halo": 2, "causal": False, "heads": 1, "group": 1},
    "batch, one head a group": {"tokens": BLOCK + 5, "batch": 2, "heads": 1, "group": 1},
    "some rows without pairs, other keys": {
        "tokens": 4 * BLOCK, "keys": 2 * BLOCK + 8, "heads": 1, "pairs": [(1, 0, False), (3, 1, False), (3, 2, False)]},
    "a halo block, and sinks that all blocks read": {
        "tokens": 3 * BLOCK - 3, "keys": BLOCK + 8, "group": 1,
        "pairs": [(0, 0, False), (0, 1, False), (1, 1, False), (2, 1, False)]},
}
COMBINATIONS = [(dtype, 24, shape) for dtype in (torch.float32, torch.float16) for shape in SHAPES]
if GPU:
    COMBINATIONS += [(torch.bfloat16, dim, shape) for dim in (24, 32, 64, 96, 128, 256) for shape in SHAPES]
    COMBINATIONS += [(dtype, dim, "causal") for dim in (128, 256) for dtype in (torch.float32, torch.float16)]
    COMBINATIONS += [(torch.bfloat16, 20, "causal")]
else:
    COMBINATIONS += [(torch.float32, dim, "batch, one head a group") for dim in (20, 96, 256)]


@pytest.mark.parametrize("dtype, dim, shape", COMBINATIONS, ids=str)
def test_near_field(dtype, dim, shape):
    Case(dtype, dim, **SHAPES[shape]).check()


@pytest.mark.skipif(not GPU, reason="the choice among several kernels is a GPU's")
@pytest.mark.parametrize("name, dtype, dim", [
    (name, dtype, dim) for name in ("flash", "triton") for dtype in (torch.bfloat16, torch.float16)
    for dim in (32, 64, 96, 128, 256)
])
def test_the_kernels_that_others_are_preferred_to(name, dtype, dim, monkeypatch):
    monkeypatch.setattr(exact_kernels, "exact_name", lambda *_: name)
    for shape in SHAPES.values():
        Case(dtype, dim, **shape).check()


@pytest.mark.parametrize("name, module, twin, extra", [
    ("near_field", triton_near, reference, ["exact"]),
    ("near_field_backward", triton_near, reference, ["exact"]),
    ("merge", triton_merge, reference, []),
])
def test_a_kernel_takes_what_its_twin_takes(name, module, twin, extra):
    kernel, plain = (inspect.signature(getattr(x, name)) for x in (module, twin))
    parameters = list(kernel.parameters.values())
    assert parameters[:len(plain.parameters)] == list(plain.parameters.values())
    more = parameters[len(plain.parameters):]
    assert [x.name for x in more] == extra and all(x.kind == x.KEYWORD_ONLY and x.default is None for x in more)
    assert kernel.return_annotation == plain.return_annotation


def test_small_tiles_change_nothing_but_rounding():
    small = {"tile": Tile(16, 16, 4, 1)}
    exact = Exact(lambda *args: triton_exact.exact_attention(*args, **small),
                  lambda *args: triton_exact.exact_attention_backward(*args, **small))
    Case(tokens=BLOCK + 9, heads=1).check(exact=exact)


def test_any_strides():
    case = Case(batch=2, tokens=2 * BLOCK)
    for name in ("q", "k", "v", "dout"):  # as of a projection: tokens first, the heads of a token together
        x = getattr(case, name)
        setattr(case, name, x.movedim(-2, 1).contiguous().movedim(1, -2))
        assert not getattr(case, name).is_contiguous()
    case.check()


def test_rows_that_must_not_count():
    case = Case(tokens=2 * BLOCK)
    case.lse[..., 3] = math.inf
    case.lse[..., BLOCK + 1] = -math.inf
    got = case.near_field_backward()
    assert not got[0][..., [3, BLOCK + 1], :].any()
    case.lse[..., BLOCK + 1] = math.inf  # the twin has no -inf where there are keys
    for x, y in zip(got, case.twin_backward(), strict=True):
        assert_near(x, y, 1e-5)


def test_without_pairs_there_is_nothing():
    case = Case(pairs=[], keys=5)
    out, lse = case.near_field()
    assert not out.any() and (lse == -math.inf).all()
    assert [(x.shape, x.any().item()) for x in case.near_field_backward()] == [
        (x.shape, False) for x in (case.q, case.k, case.v)]


def test_results_are_bitwise_repeatable():
    case = Case(torch.float16, tokens=BLOCK + 5, heads=1)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [(*case.near_field(), *case.near_field_backward()) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_what_the_kernels_cannot_run_is_refused():
    case = Case()
    case.v = case.v.half()
    for call in (case.near_field, case.near_field_backward):
        with pytest.raises(ValueError, match="v is torch.float16"):
            call()


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_long_near_field_is_a_few_runs():
    assert find_runs(tuple(near_pairs(50, 1, True)), 8, 400, 400) == [
        Run(0, 0, 50, True, 8, 8), Run(1, 0, 49, False, 8, 8)]
    assert len(find_runs(tuple(near_pairs(50, 2, True)), 8, 400, 400)) == 3
    assert len(find_runs(tuple(near_pairs(50, 2, False)), 8, 400, 400)) == 5


def test_a_short_block_is_a_run_of_its_own():
    assert find_runs(tuple(near_pairs(3, 1, True)), 8, 19, 19) == [
        Run(0, 0, 2, True, 8, 8), Run(1, 0, 1, False, 8, 8), Run(2, 1, 1, False, 3, 8), Run(2, 2, 1, True, 3, 3)]


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 3, 2), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_tensors_that_are_too_large_are_taken_in_parts(shape, most, monkeypatch):
    """`most` query heads at a time: the same result, and no part is larger."""
    batch, heads, group = shape
    case = Case(batch=batch, heads=heads, group=group, tokens=BLOCK + 5, dim=20)
    monkeypatch.setattr(triton_near, "MOST", most * case.q[0, 0, 0].numel())
    parts = triton_near._parts(case.q, case.k)
    assert all(max(case.q[part].numel(), case.k[part[:2]].numel()) <= triton_near.MOST for part in parts)
    seen = torch.zeros(shape)
    for part in parts:
        seen[part] += 1
    assert (seen == 1).all() and (len(parts) > 1) == (seen.numel() > most)
    case.check()


def test_runs_of_two_chunks_of_one_rank_that_are_apart():
    within = [(i, j, i == j) for i, j in [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)]]
    assert find_runs(tuple(within), 4, 16, 16) == [
        Run(0, 0, 4, True, 4, 4), Run(1, 0, 1, False, 4, 4), Run(3, 2, 1, False, 4, 4)]


def test_blocks_that_all_read_the_same_short_block_are_one_run():
    """As those of a rank read its halo and the sinks, which another rank sent."""
    pairs = [(0, 0, False), *((i, 1, False) for i in range(5))]
    assert find_runs(tuple(pairs), 8, 37, 11) == [
        Run(0, 1, 4, False, 8, 3, shared=True), Run(0, 0, 1, False, 8, 8), Run(4, 1, 1, False, 5, 3)]
    apart = [(i, 1, False) for i in (0, 1, 3, 4)]
    assert find_runs(tuple(apart), 8, 40, 11) == [
        Run(0, 1, 2, False, 8, 3, shared=True), Run(3, 1, 2, False, 8, 3, shared=True)]


@pytest.mark.parametrize("queries, keys, halo, causal", [(37, 37, 1, True), (40, 40, 3, False), (64, 64, 2, True)])
def test_runs_are_the_pairs(queries, keys, halo, causal):
    pairs = near_pairs(-(-queries // 8), halo, causal)
    runs = find_runs(tuple(pairs[::-1]), 8, queries, keys)
    found = [(run, run.query + n, run.key + (0 if run.shared else n)) for run in runs for n in range(run.blocks)]
    assert sorted((i, j, run.diagonal) for run, i, j in found) == sorted(pairs)
    for run, i, j in found:
        assert run.rows == min(8, queries - 8 * i) and run.keys == min(8, keys - 8 * j)


@pytest.mark.skipif(GPU, reason="the exact attention that it watches is a CPU's")
def test_a_run_is_one_call_and_views():
    case, calls = Case(batch=2, tokens=3 * BLOCK, group=1), []
    inside = {x.untyped_storage().data_ptr() for x in (case.q, case.k, case.v, case.out, case.dout)}

    def forward(q, k, v, scale, causal):
        calls.append(causal)
        assert all(x.untyped_storage().data_ptr() in inside for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    def backward(dout, q, k, v, out, lse, scale, causal):
        calls.append(causal)
        assert all(x.untyped_storage().data_ptr() in inside for x in (dout, q, k, v, out))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale)

    case.check(exact=Exact(forward, backward))
    assert calls == [True, False] * 2


def strides(x):
    """Of the dimensions that have any."""
    return [step for step, size in zip(x.stride(), x.shape) if size > 1]


@pytest.mark.skipif(GPU, reason="the exact attention that it watches is a CPU's")
@pytest.mark.parametrize("moved", [("q",), ("dout",), ("out",), ("q", "dout"), ("q", "dout", "out"), ()], ids=str)
def test_exact_kernels_get_output_and_gradient_in_the_strides_of_the_queries(moved):
    """PyTorch knows cuDNN's plans by those of the queries alone, and takes one of another length for the same."""
    case, seen = Case(tokens=2 * BLOCK), []
    for name in moved:  # as a model makes queries: the heads of a token lie together
        x = getattr(case, name)
        setattr(case, name, x.movedim(3, 1).contiguous().movedim(1, 3))

    def forward(q, k, v, scale, causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, *(x.repeat_interleave(2, 1) for x in (k, v)), 0.0, causal, scale=scale)

    def backward(dout, q, k, v, out, lse, scale, causal):
        seen.append(strides(q) == strides(dout) == strides(out))
        return triton_exact.exact_attention_backward(dout, q, k, v, out, lse, scale, causal)

    case.check(exact=Exact(forward, backward))
    assert len(seen) == 2 and all(seen)


@pytest.mark.skipif(not GPU, reason="cuDNN's plans are a GPU's")
def test_a_length_after_another():
    """Queries whose blocks have the same strides at both lengths, and an output whose blocks have not."""
    for count in (16, 4):
        case = Case(torch.bfloat16, 64, heads=4, tokens=count * BLOCK, pairs=[(1, 0, False), (count - 1, 0, False)])
        case.q = case.q.movedim(3, 1).contiguous().movedim(1, 3)
        case.check()
        torch.cuda.empty_cache()  # what is read outside of its memory is not there any more


# --------------------------------------------------------------------------------------------------- choice of kernels


@pytest.mark.parametrize("changes, name", [
    ({}, "cudnn"), ({"dim": 128, "dtype": torch.float16}, "cudnn"), ({"capability": (10, 0)}, "cudnn"),
    ({"dim": 136}, "flash"), ({"dim": 256}, "flash"), ({"repeatable": True}, "flash"), ({"tokens": 1000}, "flash"),
    ({"capability": (8, 0)}, "flash"), ({"capability": (8, 9)}, "flash"), ({"capability": (12, 0)}, "flash"),
    ({"capability": (8, 9), "dim": 200}, "triton"), ({"capability": (8, 0), "dim": 200}, "flash"),
    ({"capability": (8, 9), "dim": 256}, "flash"),
    ({"dtype": torch.float32}, "triton"), ({"dim": 60}, "triton"), ({"dim": 264}, "triton"),
    ({"capability": None}, "triton"), ({"capability": (7, 5)}, "triton"),
])
def test_choice_of_kernels(changes, name):
    usual = {"dtype": torch.bfloat16, "dim": 64, "tokens": 2048, "capability": (9, 0), "repeatable": False}
    assert exact_name(**usual | changes) == name


def test_the_kernels_of_a_cpu_are_tritons():
    assert exact_kernels.exact_kernels(torch.zeros(2, 64, dtype=torch.bfloat16), 64).forward \
        is triton_exact.exact_attention


def test_the_rank_of_cudnns_log_sum_exp_is_found_without_a_gpu():
    assert exact_kernels._cudnn_lse_dims() in (3, 4)


@pytest.mark.skipif(not GPU, reason="synchronisation happens on a GPU only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_waits_for_the_gpu(dtype):
    case = Case(dtype, 64, tokens=3 * BLOCK - 5)
    case.near_field(), case.near_field_backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_merge.merge([case.near_field()] * 2)
        case.near_field_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 100 * 2**30, reason="needs a GPU of 100 GiB")
@pytest.mark.parametrize("name", ["cudnn", "triton"])
def test_more_than_two_to_the_31_elements(name, monkeypatch):
    monkeypatch.setattr(exact_kernels, "exact_name", lambda *_: name)
    heads, block, count, dim = 65, 4096, 64, 128
    q, k, v, dout = (torch.randn(1, heads, count * block, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    q, dout = q[:, :, None], dout[:, :, None]
    pairs = near_pairs(count, 1, True)[-3:]  # all keys that the last two blocks read are in these two
    end = (slice(None), slice(-1, None), ..., slice(-2 * block, None), slice(None))
    alone = [x[end].contiguous() for x in (dout, q, k, v)]
    tail = SCALE, [(0, 0, True), (1, 0, False), (1, 1, True)], block
    out, lse = triton_near.near_field(q, k, v, SCALE, pairs, block)
    want, want_lse = triton_near.near_field(*alone[1:], *tail)
    assert_near(lse[..., None][end], want_lse[..., None].double(), 1e-5)
    assert_near(out[end], want.double(), 1e-3)
    grads = triton_near.near_field_backward(dout, q, k, v, out, lse, SCALE, pairs, block)
    for x, y in zip(grads, triton_near.near_field_backward(*alone, want, want_lse, *tail), strict=True):
        assert_near(x[end], y.double(), 1e-3)
