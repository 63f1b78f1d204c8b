"""muse_attention against exact attention where they agree, and against a brute-force evaluation everywhere else."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_dist import MuseConfig, attention, muse_attention
from muse_dist.attention import attend
from muse_dist.tree import has_far_field, make_plan
from tests import brute
from tests.brute import assert_close, exact_attention, gradients, random_inputs

BOTH = pytest.mark.parametrize("causal", [True, False], ids=["causal", "acausal"])
TOLERANCE = 1e-9


def small(**changes):
    values = {"block": 8, "halo": 1, "leaf": 2, "group": 4, "anchors": 2, "opened": 1, "sinks": 1, **changes}
    return MuseConfig(remote_leaf=values["block"], **values)


def plan_for(q, k, config, scale):
    """The structure of the far field in at least fp32, None where there is none. q [B, H, N, D], k [B, K, N, D]."""
    if not has_far_field(q.shape[2], config):
        return None
    wide = torch.promote_types(q.dtype, torch.float32)
    return make_plan(q.detach().to(wide).unflatten(1, (k.shape[1], -1)), k.detach().to(wide), config, scale)


# Exact cases

EXACT = {
    "leaf of one key": {"leaf": 1, "opened": 0, "sinks": 0},
    "leaf of one key, trace off": {"leaf": 1, "opened": 0, "sinks": 0, "trace": False},
    "leaf of one key, some opened": {"leaf": 1, "opened": 3, "sinks": 2, "halo": 0},
    "everything opened": {"leaf": 2, "opened": 999},
    "everything opened, no halo, no sinks": {"leaf": 4, "opened": 999, "sinks": 0, "halo": 0},
    "halo covers everything": {"halo": 5},
    "halo beyond the ends": {"halo": 100, "opened": 0},
    "one block": {"block": 64, "leaf": 4, "halo": 0},
}


@BOTH
@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
def test_exact_cases(changes, causal, heads, kv_heads):
    config = small(causal=causal, **changes)
    inputs = random_inputs(0, 2, heads, kv_heads, 45, 5)
    got = gradients(lambda *x: muse_attention(*x, config=config, scale=0.6), inputs)
    assert_close(got, gradients(lambda *x: exact_attention(*x, 0.6, causal), inputs), TOLERANCE)


@BOTH
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_a_sequence_of_one_block_is_exact(length, causal):
    inputs = random_inputs(1, 2, 4, 2, length, 5)
    got = gradients(lambda *x: muse_attention(*x, config=small(halo=0, causal=causal)), inputs)
    assert_close(got, gradients(lambda *x: exact_attention(*x, 5 ** -0.5, causal), inputs), TOLERANCE)


@BOTH
@pytest.mark.parametrize(("length", "block"), [(64, 64), (48, 16), (45, 8)])
def test_layers_without_muse_are_exact_in_the_largest_blocks(length, block, causal, monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "muse_attention", lambda *x, config, **options: (
        taken.append(config), muse_attention(*x, config=config, **options))[1])
    inputs = random_inputs(1, 1, 4, 2, length, 5)
    got = gradients(lambda *x: attention.exact_attention(*x, config=small(halo=0, causal=causal), scale=0.6), inputs)
    assert_close(got, gradients(lambda *x: exact_attention(*x, 0.6, causal), inputs), TOLERANCE)
    assert {config.block for config in taken} == {block}


@BOTH
@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("sinks", [0, 1])
def test_identical_keys_in_each_leaf_are_exact(causal, trace, sinks):
    """Such a leaf has one logit: the output, dq and dv are exact, dk once summed over the leaf's equal keys."""
    config = small(block=16, leaf=4, halo=0, opened=0, anchors=2, causal=causal, trace=trace, sinks=sinks)
    q, k, v = random_inputs(2, 1, 4, 2, 64, 5)
    label = torch.cat([4 * j + torch.randperm(16, generator=torch.Generator().manual_seed(j)) // 4 for j in range(4)])
    if sinks:
        label[:16] = torch.cat([torch.zeros(4, dtype=torch.int64), 1 + torch.arange(12) % 3])
    k = k[:, :, label]
    plan = plan_for(q, k, config, 0.6)
    leaves = label.view(4, 16)[torch.arange(4)[:, None], plan.key_order].view(-1, 4)
    assert (leaves == leaves[:, :1]).all(), "equal keys were put into different leaves"
    got = gradients(lambda *x: muse_attention(*x, config=config, scale=0.6), (q, k, v))
    want = gradients(lambda *x: exact_attention(*x, 0.6, causal), (q, k, v))
    out, dq, dk, dv = got
    assert_close((out, dq, dv), (want[0], want[1], want[3]), TOLERANCE)
    summed = [torch.zeros(1, 2, 16, 5, dtype=dk.dtype).index_add_(2, label, x) for x in (dk, want[2])]
    assert_close(*summed, TOLERANCE)


# Everything else: the brute-force evaluation with the same structure

@st.composite
def cases(draw):
    leaf = draw(st.integers(1, 4))
    block = draw(st.sampled_from([b for b in (leaf * 2 ** i for i in range(5)) if 4 <= b <= 16]))
    group = draw(st.sampled_from([g for g in (block >> i for i in range(5)) if 2 <= g <= 8 and block % g == 0]))
    config = MuseConfig(
        block=block, leaf=leaf, group=group, remote_leaf=block, halo=draw(st.integers(0, 2)),
        anchors=draw(st.sampled_from([a for a in (1, 2, 4) if a <= block // group])), opened=draw(st.integers(0, 5)),
        sinks=draw(st.integers(0, min(2, block // leaf))), trace=draw(st.booleans()), causal=draw(st.booleans()))
    kv_heads = draw(st.integers(1, 2))
    shape = (draw(st.integers(1, 2)), kv_heads * draw(st.integers(1, 3)), kv_heads, draw(st.integers(1, 70)),
             draw(st.integers(2, 8)))
    return config, shape, draw(st.sampled_from([0.2, 0.5, 1.0])), draw(st.integers(0, 10**6))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(cases())
def test_output_and_gradients_are_those_of_the_definition(case):
    config, shape, scale, seed = case
    inputs = random_inputs(seed, *shape)
    plan = plan_for(*inputs[:2], config, scale)
    got = gradients(lambda *x: attend(*x, plan, config, scale), inputs)
    assert_close(got, gradients(lambda *x: brute.attend(*x, plan, config, scale), inputs), TOLERANCE)


@BOTH
@pytest.mark.parametrize("trace", [True, False])
def test_gradcheck_with_the_structure_held_fixed(causal, trace):
    config = small(block=4, leaf=2, group=2, anchors=2, halo=1, opened=1, sinks=1, causal=causal, trace=trace)
    q, k, v = random_inputs(3, 1, 2, 1, 15, 2, gradients=True)
    plan = plan_for(q, k, config, 0.6)
    assert (plan.opened >= 1).any(), "nothing is opened beside the sinks"
    assert torch.autograd.gradcheck(lambda *x: attend(*x, plan, config, 0.6), (q, k, v))


@BOTH
@pytest.mark.parametrize("heads", [2, 6])
def test_far_anchors_and_a_short_last_block(causal, heads):
    """Queries with a large component that keys lack: the second-order term of places without a query is huge."""
    config = small(causal=causal, opened=0)
    q, k, v = random_inputs(15, 1, heads, 2, 61, 5)
    q[..., 0], k[..., 0] = 150.0, 0.0
    inputs = q, k, v
    plan = plan_for(*inputs[:2], config, 0.6)
    got = gradients(lambda *x: attend(*x, plan, config, 0.6), inputs)
    assert_close(got, gradients(lambda *x: brute.attend(*x, plan, config, 0.6), inputs), TOLERANCE)


def test_the_brute_force_evaluation_is_exact_attention_when_everything_is_read():
    """Otherwise agreement with it would prove little."""
    inputs = random_inputs(4, 2, 4, 2, 29, 3)
    for causal in (True, False):
        want = gradients(lambda *x: exact_attention(*x, 0.6, causal), inputs)  # noqa: B023
        for config in (small(leaf=1, opened=0, causal=causal), small(opened=99, causal=causal)):
            plan = plan_for(*inputs[:2], config, 0.6)
            got = gradients(lambda *x: brute.attend(*x, plan, config, 0.6), inputs)  # noqa: B023
            assert_close(got, want, TOLERANCE)


@BOTH
def test_muse_attention_is_attend_with_its_plan(causal):
    config = small(causal=causal)
    inputs = random_inputs(5, 2, 4, 2, 45, 5)
    plan = plan_for(*inputs[:2], config, 5 ** -0.5)
    got = gradients(lambda *x: muse_attention(*x, config=config), inputs)
    want = gradients(lambda *x: attend(*x, plan, config, 5 ** -0.5), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_for_some_inputs_only(wanted):
    inputs = random_inputs(6, 1, 4, 2, 45, 5)
    everything = gradients(lambda *x: muse_attention(*x, config=small()), inputs)
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    muse_attention(*leaves, config=small()).backward(weight)
    for i, x in enumerate(leaves):
        assert (x.grad is None) == (i not in wanted)
        assert x.grad is None or torch.equal(x.grad, everything[1 + i])


def test_second_derivatives_are_refused():
    """There is no formula for them: an error, never a wrong number."""
    q, k, v = random_inputs(7, 1, 1, 1, 13, 2, gradients=True)
    config = small(block=4, leaf=2, group=2)
    first, = torch.autograd.grad(muse_attention(q, k, v, config=config).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first.sum(), q)


# What may depend on what

@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("changed", [8, 24, 40])
def test_later_blocks_never_reach_earlier_outputs(changed, trace):
    """Causal, bitwise. Gradients too: nothing flows back from outputs that a token cannot reach."""
    config = small(trace=trace, opened=2)
    q, k, v = random_inputs(8, 2, 4, 2, 45, 5, torch.float32)
    before = muse_attention(q, k, v, config=config)
    later = [torch.cat([x[:, :, :changed], 5 * x[:, :, changed:].flip(-1) + 1], 2) for x in (q, k, v)]
    after = muse_attention(*later, config=config)
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.equal(before[:, :, changed:], after[:, :, changed:])
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for x in torch.autograd.grad(muse_attention(q, k, v, config=config)[:, :, :changed].sum(), (q, k, v)):
        assert (x[:, :, changed:] == 0).all() and (x[:, :, :changed] != 0).any()


@pytest.mark.parametrize("length", [24, 40])
def test_a_prefix_of_whole_blocks_gives_the_prefix_of_the_output(length):
    config = small(opened=2)
    q, k, v = random_inputs(9, 1, 4, 2, 45, 5)
    whole = muse_attention(q, k, v, config=config)
    part = muse_attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], config=config)
    assert_close(part, whole[:, :, :length], TOLERANCE)


@BOTH
def test_batch_elements_and_heads_are_independent(causal):
    config = small(causal=causal)
    q, k, v = random_inputs(10, 2, 4, 2, 45, 5)
    whole = muse_attention(q, k, v, config=config)
    for b in range(2):
        for h in range(2):
            one = muse_attention(q[b:b + 1, 2 * h:2 * h + 2], k[b:b + 1, h:h + 1], v[b:b + 1, h:h + 1], config=config)
            assert_close(one, whole[b:b + 1, 2 * h:2 * h + 2], TOLERANCE)


@BOTH
@pytest.mark.parametrize("sinks", [0, 1])
def test_the_order_of_keys_inside_a_far_block_does_not_matter(causal, sinks):
    config = small(block=16, leaf=4, sinks=sinks, causal=causal, opened=2)
    q, k, v = random_inputs(11, 2, 4, 2, 77, 5)
    shuffle = 4 * sinks + torch.randperm(16 - 4 * sinks, generator=torch.Generator().manual_seed(0))
    shuffle = torch.cat([torch.arange(4 * sinks), shuffle, torch.arange(16, 77)])
    got = muse_attention(q, k[:, :, shuffle], v[:, :, shuffle], config=config)
    assert_close(got[:, :, 32:], muse_attention(q, k, v, config=config)[:, :, 32:], TOLERANCE)


def test_a_constant_added_to_values_is_added_to_the_output():
    """The weights of one softmax over near keys, opened keys and leaves sum to one."""
    q, k, v = random_inputs(12, 1, 4, 2, 45, 5)
    out = muse_attention(q, k, v, config=small())
    assert_close(muse_attention(q, k, v + 7, config=small()), out + 7, TOLERANCE)
    assert_close(muse_attention(q, k, torch.ones_like(v), config=small()), torch.ones_like(out), TOLERANCE)


def test_the_far_field_and_opening_leaves_reduce_the_error():
    """Opening more leaves approaches exact attention; a plan that opened the wrong ones would not."""
    q, k, v = random_inputs(13, 1, 4, 2, 256, 8)
    want = exact_attention(q, k, v, 0.6, True)
    errors = [(muse_attention(q, k, v, config=small(block=32, leaf=4, group=8, halo=0, opened=opened), scale=0.6)
               - want).square().mean() for opened in (0, 4, 16, 64)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[3] < 1e-18


# Precision

def rms_errors(got, want):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


@BOTH
@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_is_like_that_of_exact_attention(dtype, trace, causal):
    """The error against fp64 on the same inputs and structure, next to PyTorch's own attention in this dtype."""
    config = small(block=32, leaf=8, group=8, halo=1, opened=2, causal=causal, trace=trace)
    inputs = random_inputs(14, 1, 4, 2, 250, 32, dtype)
    scale = 32 ** -0.5
    plan = plan_for(*inputs[:2], config, scale)
    wide = tuple(x.double() for x in inputs)
    got = gradients(lambda *x: attend(*x, plan, config, scale), inputs)
    assert all(x.dtype == dtype for x in got)
    want = gradients(lambda *x: attend(*x, plan._replace(anchors=plan.anchors.double()), config, scale), wide)
    theirs = gradients(lambda *x: torch.nn.functional.scaled_dot_product_attention(
        *x, is_causal=causal, scale=scale, enable_gqa=True), inputs)
    usual = rms_errors(theirs, gradients(lambda *x: exact_attention(*x, scale, causal), wide))
    for name, ours, other in zip(("out", "dq", "dk", "dv"), rms_errors(got, want), usual, strict=True):
        assert ours <= 3 * other, (name, ours, other)
