"""What callers do to muse_attention: wrong arguments, strides, NaN, overflow, autocast, checkpoints, compilation."""
import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from muse_dist import MuseAttention, MuseConfig, muse_attention
from tests.brute import assert_close, error, exact_attention, gradients, random_inputs

BOTH = pytest.mark.parametrize("causal", [True, False], ids=["causal", "acausal"])


def small(**changes):
    values = {"block": 8, "halo": 1, "leaf": 2, "group": 4, "anchors": 2, "opened": 1, "sinks": 1, **changes}
    return MuseConfig(remote_leaf=values["block"], **values)


def attention(config):
    return lambda q, k, v: muse_attention(q, k, v, config=config)


def assert_same_bits(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Wrong arguments

def change(q=None, k=None, v=None, **others):
    """Arguments of muse_attention, good ones but for the tensors that the given functions change."""
    good = random_inputs(0, 1, 4, 2, 24, 8, torch.float32)
    changed = [x if f is None else f(x) for x, f in zip(good, (q, k, v), strict=True)]
    return changed, {"config": small(), **others}


CUT, NARROW = (lambda x: x[:, :, :23]), (lambda x: x[..., :7])
TWICE, NO_HEAD = (lambda x: x.repeat(2, 1, 1, 1)), (lambda x: x[:, :0])
WRONG = {
    "q rank": (change(q=lambda x: x[0]), ValueError, r"\bq\b.*\[batch, heads, tokens, head dim\]"),
    "k rank": (change(k=lambda x: x[0]), ValueError, r"\bk\b.*\[batch, heads, tokens, head dim\]"),
    "v rank": (change(v=lambda x: x[None]), ValueError, r"\bv\b.*\[batch, heads, tokens, head dim\]"),
    "k batch": (change(k=TWICE), ValueError, r"\bk\b"),
    "v batch": (change(v=TWICE), ValueError, r"\bv\b"),
    "k length": (change(k=CUT), ValueError, r"\bk\b"),
    "v length": (change(v=CUT), ValueError, r"\bv\b"),
    "k and v length": (change(k=CUT, v=CUT), ValueError, r"\bk\b"),
    "q head dim": (change(q=NARROW), ValueError, r"\b[qk]\b"),
    "k head dim": (change(k=NARROW), ValueError, r"\bk\b"),
    "v head dim": (change(v=NARROW), ValueError, r"\bv\b"),
    "v heads": (change(v=lambda x: x[:, :1]), ValueError, r"\bv\b"),
    "heads not divisible": (change(q=lambda x: x[:, :3]), ValueError, r"\bH\b.*\bK\b|heads.*multiple|divi"),
    "more kv heads": (change(q=lambda x: x[:, :1]), ValueError, r"\bH\b.*\bK\b|heads.*multiple|divi"),
    "layout [B, N, H, D]": (change(*[lambda x: x.transpose(1, 2)] * 3), ValueError, r"\[B, H, N, D\]|\bH\b.*\bK\b"),
    "empty sequence": (change(*[lambda x: x[:, :, :0]] * 3), ValueError, r"\bq\b.*empty|empty.*\bq\b"),
    "empty head dim": (change(*[lambda x: x[..., :0]] * 3), ValueError, r"\bq\b.*empty|empty.*\bq\b"),
    "no batch": (change(*[lambda x: x[:0]] * 3), ValueError, r"\bq\b.*empty|empty.*\bq\b"),
    "no heads": (change(*[NO_HEAD] * 3), ValueError, r"\b[qk]\b.*empty|empty.*\b[qk]\b"),
    "no kv heads": (change(k=NO_HEAD, v=NO_HEAD), ValueError, r"\bk\b"),
    "integer": (change(*[torch.Tensor.long] * 3), TypeError, r"\bq\b.*int64"),
    "boolean": (change(*[torch.Tensor.bool] * 3), TypeError, r"\bq\b.*bool"),
    "complex": (change(*[lambda x: x + 0j] * 3), TypeError, r"\bq\b.*complex"),
    "integer k": (change(k=torch.Tensor.int), TypeError, r"\bk\b.*int32"),
    "k dtype": (change(k=torch.Tensor.half), TypeError, r"\bk\b.*float16"),
    "v dtype": (change(v=torch.Tensor.double), TypeError, r"\bv\b.*float64"),
    "k device": (change(k=lambda x: x.to("meta")), (TypeError, ValueError), r"\bk\b.*meta"),
    "v device": (change(v=lambda x: x.to("meta")), (TypeError, ValueError), r"\bv\b.*meta"),
    "q not a tensor": (change(q=torch.Tensor.tolist), TypeError, r"\bq\b.*list"),
    "k not a tensor": (change(k=torch.Tensor.numpy), TypeError, r"\bk\b.*ndarray"),
    "v missing": (change(v=lambda _: None), TypeError, r"\bv\b.*None"),
    "scale zero": (change(scale=0.0), ValueError, "scale"),
    "scale negative": (change(scale=-0.5), ValueError, "scale"),
    "scale nan": (change(scale=math.nan), ValueError, "scale"),
    "scale infinite": (change(scale=math.inf), ValueError, "scale"),
    "scale text": (change(scale="0.5"), TypeError, "scale"),
    "scale tensor": (change(scale=torch.tensor([0.5, 0.5])), TypeError, "scale"),
    "config missing": (change(config=None), TypeError, "config.*MuseConfig"),
    "config a mapping": (change(config={"block": 8}), TypeError, "config.*MuseConfig"),
    "config a class": (change(config=MuseConfig), TypeError, "config.*MuseConfig"),
}


@pytest.mark.parametrize(("arguments", "kind", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(arguments, kind, words):
    tensors, others = arguments
    with pytest.raises(kind, match=words) as refused:
        muse_attention(*tensors, **others)
    assert len(str(refused.value).split()) >= 5, f"says too little to help: {refused.value}"


@pytest.mark.parametrize("scale", [1, 0.125, 3.0])
def test_scale_is_a_number(scale):
    inputs = random_inputs(0, 1, 4, 2, 13, 8)
    assert_close(muse_attention(*inputs, config=small(), scale=scale), exact_attention(*inputs, scale, True), 1e-9)


# The module

def test_module_is_the_function_without_parameters():
    config = small(opened=3)
    module = MuseAttention(config, scale=0.3)
    assert not list(module.parameters()) and not list(module.buffers()) and not module.state_dict()
    assert repr(config) in repr(module) and "0.3" in repr(module)
    inputs = random_inputs(1, 1, 4, 2, 45, 5)
    want = muse_attention(*inputs, config=config, scale=0.3)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
        assert torch.equal(same(*inputs), want)
    assert torch.equal(MuseAttention(config)(*inputs), muse_attention(*inputs, config=config))


@pytest.mark.parametrize("config", [None, {"block": 8}])
def test_module_refuses_what_is_not_a_config(config):
    with pytest.raises(TypeError, match=r"config.*MuseConfig"):
        MuseAttention(config)


# Strides, modes, determinism

LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed head dim": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "offset": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "one of many": lambda x: torch.stack([x, x + 1, x - 1], -1)[..., 0],
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(layout, causal):
    inputs = random_inputs(2, 2, 4, 2, 45, 5)
    views = tuple(layout(x) for x in inputs)
    assert_same_bits(views, inputs)
    assert not any(x.is_contiguous() for x in views)
    want = gradients(attention(small(causal=causal)), inputs)
    assert_close(gradients(attention(small(causal=causal)), views), want, 1e-12)


def test_expanded_keys_and_gradients_are_read_right():
    q, k, v = random_inputs(3, 2, 4, 1, 45, 5)
    want = muse_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), config=small())
    assert_close(muse_attention(q, k.expand(2, 2, 45, 5), v.expand(2, 2, 45, 5), config=small()), want, 1e-12)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    summed = torch.autograd.grad(muse_attention(*inputs, config=small()).sum(), inputs)  # an expanded cotangent
    ones = torch.autograd.grad(muse_attention(*inputs, config=small()), inputs, torch.ones_like(q))
    assert_same_bits(summed, ones)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(mode):
    inputs = random_inputs(4, 1, 4, 2, 45, 5, torch.float32)
    want = muse_attention(*(x.clone().requires_grad_() for x in inputs), config=small())
    with mode():
        got = muse_attention(*inputs, config=small())
    assert torch.equal(got, want) and want.requires_grad and not got.requires_grad


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_inputs_give_the_same_bits(dtype, causal):
    inputs = random_inputs(5, 2, 4, 2, 61, 8, dtype)
    before = tuple(x.clone() for x in inputs)
    first = gradients(attention(small(causal=causal)), inputs)
    assert_same_bits(gradients(attention(small(causal=causal)), inputs), first)
    assert_same_bits(inputs, before)
    for reentrant in (False, True):
        recomputed = partial(checkpoint, attention(small(causal=causal)), use_reentrant=reentrant)
        assert_same_bits(gradients(recomputed, inputs), first)


# NaN and overflow

def nan_rows(out):
    """{(batch, head, token)} of the rows of out [B, H, N, D] that hold a NaN."""
    return {tuple(row) for row in out.isnan().any(-1).nonzero().tolist()}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("token", [0, 3, 21, 44])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_comes_out_only_where_attention_has_it(name, token, dtype, causal):
    q, k, v = (x.to(dtype) for x in random_inputs(6, 2, 4, 2, 45, 5))
    {"q": q, "k": k, "v": v}[name][1, 1, token, 2] = math.nan
    got = nan_rows(muse_attention(q, k, v, config=small(causal=causal, opened=2)))
    want = nan_rows(exact_attention(q.double(), k.double(), v.double(), 5 ** -0.5, causal))
    if name == "q":
        assert got == want == {(1, 1, token)}
        return
    # math-form attention also multiplies a masked NaN value by 0; what never reads the token must not notice it
    attends = {(1, h, t) for h, t in itertools.product((2, 3), range(token if causal else 0, 45))}
    assert attends <= want and got <= want
    first = token // 8 * 8 if causal and name == "v" else token if causal else 0
    assert {row for row in got if row[2] < first} == set()
    assert got >= attends, "a NaN was hidden"


def test_a_nan_query_leaves_the_other_rows_close_to_exact():
    config = small(opened=99)
    q, k, v = random_inputs(7, 1, 4, 2, 45, 5)
    want = exact_attention(q, k, v, 5 ** -0.5, True)
    q[0, 1, 30] = math.nan
    got = muse_attention(q, k, v, config=config)
    got[0, 1, 30] = want[0, 1, 30]
    assert_close(got, want, 1e-9)


@BOTH
def test_products_beyond_half_precision_are_finite_and_right(causal):
    """q.k above 65504, the largest fp16; with everything opened, and with nothing opened against the same in fp64."""
    q, k, v = random_inputs(8, 1, 2, 1, 61, 16, torch.float16)
    q, k = q * 0.2 + 90, k * 0.2 + 90
    assert (q.float() @ k.float().mT).min() > 65504 and ((q @ k.mT).isinf()).all()
    wide = tuple(x.double() for x in (q, k, v))
    want = gradients(lambda *x: exact_attention(*x, 0.25, causal), wide)
    # logits near 32400 are only known to about 2e-3 in fp32: that is the error allowed, times a few
    got = gradients(attention(small(opened=99, causal=causal)), (q, k, v))
    assert_close(got[0], want[0], 2e-2)
    for opened in (0, 2):
        config = small(opened=opened, causal=causal)
        got, same = gradients(attention(config), (q, k, v)), gradients(attention(config), wide)
        assert all(torch.isfinite(x).all() for x in got)
        assert error(got[0], same[0]) < 0.1


@pytest.mark.parametrize("size", [1e4, 1e8])
def test_huge_logits_are_finite(size):
    """One key takes all the weight; no part of the softmax may overflow on the way there."""
    q, k, v = random_inputs(9, 1, 2, 1, 61, 8, torch.float32)
    for x in gradients(attention(small(trace=False)), (q * size, k, v)):
        assert torch.isfinite(x).all()


# Autocast, compilation, operator checks

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_inputs_and_nothing_inside(dtype):
    inputs = random_inputs(10, 1, 4, 2, 61, 8, torch.float32)
    halves = tuple(x.to(dtype) for x in inputs)
    want = gradients(attention(small()), halves)
    with torch.autocast("cpu", dtype):
        assert_same_bits(gradients(attention(small()), halves), want)  # forward and backward under autocast
        wide = gradients(attention(small()), inputs)
        mixed = muse_attention(inputs[0], *halves[1:], config=small())  # fp32 rotary embeddings do this
    assert wide[0].dtype == dtype and all(x.dtype == torch.float32 for x in wide[1:])
    assert_same_bits((wide[0], *(x.to(dtype) for x in wide[1:])), want)
    assert torch.equal(mixed, want[0])


class Model(torch.nn.Module):
    """Projections around the attention, 4 query heads to 2 key/value heads. x [B, N, 16] -> [B, N, 16]."""

    def __init__(self, config):
        super().__init__()
        self.project, self.mix, self.attend = torch.nn.Linear(16, 32), torch.nn.Linear(16, 16), MuseAttention(config)
        random = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=random, dtype=torch.float64) / 4

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (8, 4)).transpose(1, 2).split((4, 2, 2), 1)
        return self.mix(self.attend(q, k, v).transpose(1, 2).flatten(2)).relu()


def losses_and_gradients(model, apply):
    found = []
    for length in (45, 45, 60, 13):
        x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
        model.zero_grad()
        loss = apply(x.requires_grad_()).square().mean()
        loss.backward()
        found += [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
    return tuple(found)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph(dynamic):
    torch.compiler.reset()
    model = Model(small())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_close(losses_and_gradients(model, compiled), losses_and_gradients(model, model), 1e-9)
    torch.compiler.reset()


def test_trains_under_autocast_and_checkpointing():
    model = Model(small(opened=99)).float()  # all leaves: rounding cannot change which are opened
    x = torch.randn(2, 45, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for wrapped in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(model, x, use_reentrant=False) if wrapped else model(x)
        out.float().square().mean().backward()
        found.append((out.detach(), *(p.grad.clone() for p in model.parameters())))
    assert_same_bits(*found)
    assert error(found[0][0], model(x)) < 0.1


@pytest.mark.parametrize(("length", "changes"), [
    (13, {}), (45, {}), (45, {"opened": 99}), (48, {"opened": 0, "sinks": 0})])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_the_checks_of_pytorch(length, changes, dtype):
    """Schema, fake tensors, autograd registration, and compilation, on the arguments of real calls."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "muse_dist":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    inputs = random_inputs(11, 2, 4, 2, length, 5, dtype)
    with Record():
        gradients(attention(small(**changes)), inputs)
    assert {func.name().split("::")[1] for func, _ in seen} >= {"attend", "attend_backward"}
    for func, args in seen:
        args = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(func, args)
        if func.name() == "muse_dist::attend":
            for x in args[:3]:
                x.requires_grad_()
            torch.library.opcheck(func, args)


# Memory

def allocations(length):
    """Bytes of the largest allocation and of the peak in a forward and backward over `length` tokens."""
    config = MuseConfig(block=64, halo=1, leaf=16, group=16, anchors=2, opened=2, remote_leaf=64)
    inputs = random_inputs(12, 1, 2, 1, length, 16, torch.float32, gradients=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        muse_attention(*inputs, config=config).sum().backward()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(sizes), max(itertools.accumulate(sizes))


def test_memory_grows_with_the_length_and_not_with_its_square():
    largest, peak = allocations(4096)
    assert largest < 4096 * 4096, "something of N x N elements, be it of one byte, was allocated"
    shorter = allocations(2048)
    assert largest <= 2.1 * shorter[0] and peak <= 2.1 * shorter[1], (shorter, (largest, peak))
