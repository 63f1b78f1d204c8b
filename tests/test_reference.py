"""kernels/reference.py piece by piece: bisection, moments, merging, and partial softmaxes against autograd."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_dist.kernels import reference
from tests.brute import assert_close, leaf_moments

SCALE = 0.7


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_permutation(order, n):
    assert order.dtype == torch.int64 and order.shape[-1] == n
    assert torch.equal(order.sort(-1).values, torch.arange(n).expand_as(order))


def separated(low, high):
    """Whether one axis keeps all of `low` [n, c] at or below all of `high` [m, c], or the reverse."""
    return bool(((low.max(0).values <= high.min(0).values) | (high.max(0).values <= low.min(0).values)).any())


# Bisection

def assert_bisected(points, part):
    """At every level the two halves (at the last: an odd number of parts) are separated along some axis."""
    parts = len(points) // part
    pieces = 2 if parts % 2 == 0 else parts
    if pieces == 1:
        return
    runs = points.chunk(pieces)
    assert any(all((low[:, axis].max() <= high[:, axis].min()) for low, high in itertools.pairwise(runs))
               for axis in range(points.shape[1])), (parts, pieces)
    if pieces == 2:
        for half in runs:
            assert_bisected(half, part)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(part=st.integers(1, 5), parts=st.integers(1, 12), axes=st.integers(1, 4), seed=st.integers(0, 10**6),
       levels=st.sampled_from([0, 2, 5]))
def test_every_level_of_the_tree_separates_its_runs(part, parts, axes, seed, levels):
    x = normal(2, part * parts, axes, seed=seed)
    if levels:  # few distinct values: many ties
        x = (x * levels / 2).round()
    order = reference.bisect(x, part)
    assert_permutation(order, part * parts)
    for points, places in zip(x, order, strict=True):
        assert_bisected(points[places], part)


def test_splits_run_along_the_widest_axis():
    x = normal(64, 3) * torch.tensor([1.0, 50.0, 0.1])
    by_axis = x[reference.bisect(x, 32)][:, 1]
    assert by_axis[:32].max() <= by_axis[32:].min()
    by_axis = x[reference.bisect(x, 16)][:, 1]  # 25 wide still against 1
    for left, right in itertools.pairwise(by_axis.split(16)):
        assert left.max() <= right.min()


def test_clusters_of_the_right_size_are_found():
    centres = torch.tensor(list(itertools.product([0.0, 8.0], [0.0, 20.0], [0.0, 50.0]))) + 1
    label = torch.arange(8).repeat_interleave(16)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    order = reference.bisect(centres[label] + 0.5 * normal(128, 3, dtype=torch.float32), 16)
    found = label[order].view(8, 16)
    assert (found == found[:, :1]).all() and len(set(found[:, 0].tolist())) == 8


@pytest.mark.parametrize("pinned", [0, 3, 6, 24])
@pytest.mark.parametrize("exists", [1, 7, 24])
def test_pinned_points_stay_first_and_missing_ones_go_last(pinned, exists):
    x = normal(2, 3, 24, 4)
    valid = torch.arange(24) < exists
    order = reference.bisect(x, 3, min(pinned, exists), valid)
    assert_permutation(order, 24)
    pinned = min(pinned, exists)
    assert torch.equal(order[..., :pinned], torch.arange(pinned).expand(2, 3, -1))
    assert (order[..., :exists] < exists).all()
    for anything in (math.inf, 1e30):  # what does not exist cannot matter
        x[..., exists:, :] = anything
        assert torch.equal(reference.bisect(x, 3, pinned, valid), order)
        assert torch.equal(reference.bisect(x.float(), 3, pinned, valid), order)  # 1e30 squared overflows


def test_the_free_points_are_bisected_around_pinned_ones():
    x = normal(32, 2)
    rest = x[reference.bisect(x, 4, pinned=4)][16:]  # the second half holds no pinned point
    for size in (8, 4):
        for pair in rest.split(2 * size):
            assert separated(*pair.split(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["constant", "equal", "huge", "mixed", "nan", "inf", "all nan"])
def test_degenerate_points_still_give_whole_leaves(case, dtype):
    x = normal(2, 32, 3, seed=3, dtype=dtype)
    big = 1e30 if dtype == torch.float32 else 1e200  # squares overflow
    if case == "constant":
        x = torch.full_like(x, 2.5)
    elif case == "equal":
        x[:, ::2] = x[:, :1]
    elif case == "huge":
        x = big * x
        assert x.square().isinf().any()
    elif case == "mixed":
        x[:, 5] = big
    elif case == "nan":
        x[0, 7, 1] = math.nan
        x[1, 0] = math.nan
    elif case == "inf":
        x[0, 7, 1], x[1, 9, 0], x[1, 11, 0] = math.inf, -math.inf, math.inf
    else:
        x = torch.full_like(x, math.nan)
    for pinned in (0, 4):
        order = reference.bisect(x, 4, pinned)
        assert_permutation(order, 32)
        assert torch.equal(order[:, :pinned], torch.arange(pinned).expand(2, -1))
        assert torch.equal(order, reference.bisect(x.clone(), 4, pinned))
    if case == "huge":
        for points in x:
            assert_bisected(points[reference.bisect(points, 4)], 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_coordinates_that_are_not_finite_count_as_zero(bad):
    """They must neither pass the points that do not exist nor the pinned ones."""
    x, valid = normal(2, 32, 3), torch.arange(32) < 27
    x[:, [2, 9, 20, 26]], x[0, 11, 1] = 0.0, 0.0
    want = reference.bisect(x, 4, 4, valid)
    x[:, [2, 9, 20, 26]], x[0, 11, 1] = bad, bad
    assert torch.equal(reference.bisect(x, 4, 4, valid), want)


def test_batched_points_are_ordered_one_by_one_and_inputs_are_left_alone():
    x = normal(3, 2, 40, 3)
    before = x.clone()
    order = reference.bisect(x, 5)
    assert torch.equal(x, before)
    for b, h in itertools.product(range(3), range(2)):
        assert torch.equal(order[b, h], reference.bisect(x[b, h].clone(), 5))


# Moments

def stacked_moments(anchor, k, v, scale, valid=None):
    """`reference.moments` for anchor [A, D], k and v [J, m, D], by loops; no empty leaves."""
    found = [[leaf_moments(a, k[j] if valid is None else k[j][valid[j]], v[j] if valid is None else v[j][valid[j]],
                           scale) for j in range(len(k))] for a in anchor]
    mass, key, value, trace = (torch.stack([torch.stack([leaf[i] for leaf in row]) for row in found])
                               for i in range(4))
    return reference.Moments(mass=mass, key=key, value=value, trace=trace)


@pytest.mark.parametrize("missing", [False, True])
def test_moments_are_those_of_the_definition(missing):
    anchor, k, v = normal(2, 3, 5), normal(2, 6, 4, 5, seed=1), normal(2, 6, 4, 5, seed=2)
    valid = None
    if missing:
        valid = torch.ones(6, 4, dtype=torch.bool)
        valid[-1, 1:] = False
    got = reference.moments(anchor, k, v, SCALE, valid)
    for b in range(2):
        assert_close(tuple(x[b] for x in got), stacked_moments(anchor[b], k[b], v[b], SCALE, valid), 1e-12)


def test_an_empty_leaf_has_no_mass_and_missing_keys_do_not_matter():
    anchor, k, v = normal(3, 5), normal(4, 2, 5, seed=1), normal(4, 2, 5, seed=2)
    valid = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    got = reference.moments(anchor, k, v, SCALE, valid)
    assert (got.mass[:, 3] == -math.inf).all()
    assert all(torch.isfinite(x[:, 3]).all() for x in (got.key, got.value, got.trace))
    k[~valid], v[~valid] = 1e30, -1e30
    assert all(torch.equal(a, b) for a, b in zip(got, reference.moments(anchor, k, v, SCALE, valid), strict=True))


def test_the_anchor_zero_gives_plain_centroids():
    k, v = normal(6, 4, 5, seed=1), normal(6, 4, 5, seed=2)
    got = reference.moments(torch.zeros(1, 5, dtype=k.dtype), k, v, SCALE)
    want = torch.full_like(got.mass[0], math.log(4)), k.mean(1), v.mean(1), k.var(1, correction=0).mean(-1)
    assert_close(tuple(x[0] for x in got), want, 1e-12)


def test_logits_beyond_the_range_of_exp_are_fine():
    anchor, k, v = 40 * normal(3, 5), 40 * normal(6, 4, 5, seed=1), normal(6, 4, 5, seed=2)
    got = reference.moments(anchor, k, v, SCALE)
    true = SCALE * torch.einsum("ad,jmd->ajm", anchor, k)
    assert true.abs().max() > 1000
    assert_close(got.mass, true.logsumexp(-1), 1e-12)
    assert_close(got.value, torch.einsum("ajm,jmd->ajd", true.softmax(-1), v), 1e-12)
    assert (got.trace >= 0).all()


def test_moments_backward_is_autograd_of_the_definition():
    anchor, k, v = normal(3, 5), normal(6, 4, 5, seed=1).requires_grad_(), normal(6, 4, 5, seed=2).requires_grad_()
    want = stacked_moments(anchor, k, v, SCALE)
    weight = reference.Moments(*(normal(*x.shape, seed=i) for i, x in enumerate(want)))
    grads = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weight, want, strict=True)), (k, v))
    out = reference.Moments(*(x.detach() for x in want))
    got = reference.moments_backward(weight, anchor, k.detach(), v.detach(), out, SCALE)
    assert_close(got, grads, 1e-12)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(1, 8), keys=st.integers(1, 8), size=st.sampled_from([0.1, 1.0, 5.0]))
def test_without_trace_a_logit_is_a_lower_bound_tight_at_the_anchor(seed, dim, keys, size):
    anchor, k = size * normal(2, dim, seed=seed), size * normal(7, keys, dim, seed=seed + 1)
    q = torch.cat([size * normal(20, dim, seed=seed + 2), anchor])
    got = reference.moments(anchor, k, k, 0.5)
    step = q[:, None] - anchor  # [rows, A, D]
    logit = got.mass + 0.5 * torch.einsum("rad,ajd->raj", step, got.key)
    true = (0.5 * torch.einsum("rd,jmd->rjm", q, k)).logsumexp(-1)[:, None]
    room = 1e-12 * (1 + true.abs().max())
    assert (logit <= true + room).all()
    for a in range(2):
        assert ((logit - true)[20 + a, a].abs() <= room).all(), "not tight at the anchor"


def test_trace_is_the_second_order_term_where_there_is_one_dimension():
    """In one dimension Z + s(q-a)kappa + s^2/2 (q-a)^2 tau is the Taylor series: halve the step, an eighth is left."""
    anchor, k = normal(1, 1), normal(5, 6, 1, seed=1)
    got = reference.moments(anchor, k, k, SCALE)
    left = []
    for step in (0.02, 0.01):
        logit = got.mass + SCALE * step * got.key[..., 0] + SCALE ** 2 / 2 * step ** 2 * got.trace
        left.append((logit - (SCALE * (anchor + step) * k[..., 0]).logsumexp(-1)).abs())
    assert (left[0] / left[1] > 7).all() and (left[0] / left[1] < 9).all()


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7), (8, 1)])
def test_merged_moments_are_those_of_the_union(sizes):
    anchor, k, v = 2 * normal(2, 3, 5), normal(2, 6, sum(sizes), 5, seed=1), normal(2, 6, sum(sizes), 5, seed=2)
    parts = [reference.moments(anchor, a, b, SCALE) for a, b in
             zip(k.split(sizes, -2), v.split(sizes, -2), strict=True)]
    assert_close(tuple(reference.merge_moments(*parts)), tuple(reference.moments(anchor, k, v, SCALE)), 1e-12)


def test_single_keys_merge_up_a_tree_to_the_whole():
    anchor, k, v = normal(3, 5), normal(1, 8, 5, seed=1), normal(1, 8, 5, seed=2)
    level = [reference.moments(anchor, k[:, i:i + 1], v[:, i:i + 1], SCALE) for i in range(8)]
    while len(level) > 1:
        level = [reference.merge_moments(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    assert_close(tuple(level[0]), tuple(reference.moments(anchor, k, v, SCALE)), 1e-12)


def test_merging_with_an_empty_leaf_changes_nothing():
    anchor, k = normal(3, 5), normal(2, 4, 5, seed=1)
    full = reference.moments(anchor, k, k, SCALE)
    empty = reference.moments(anchor, k, k, SCALE, torch.zeros(2, 4, dtype=torch.bool))
    for pair in ((full, empty), (empty, full)):
        assert_close(tuple(reference.merge_moments(*pair)), tuple(full), 1e-14)
    none = reference.merge_moments(empty, empty)
    assert (none.mass == -math.inf).all() and not any(x.isnan().any() for x in none)


# Partial softmaxes

def partial(logits, values):
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def test_merge_is_the_softmax_over_all_parts():
    logits, values = 5 * normal(2, 7, 12), normal(2, 12, 4, seed=1)
    parts = [partial(x, y) for x, y in zip(logits.split((3, 1, 8), -1), values.split((3, 1, 8), -2), strict=True)]
    assert_close(reference.merge(parts), partial(logits, values), 1e-12)
    assert_close(reference.merge(parts[:1]), parts[0], 1e-15)
    far_apart = [(out, lse + shift) for (out, lse), shift in zip(parts, (0, 1e4, -1e4), strict=True)]
    assert_close(reference.merge(far_apart)[0], parts[1][0], 1e-12)


def test_merge_leaves_out_empty_parts():
    out, lse = partial(normal(7, 12), normal(12, 4, seed=1))
    empty = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for parts in ([(out, lse), empty], [empty, (out, lse)]):
        assert_close(reference.merge(parts), (out, lse), 1e-15)
    nothing = reference.merge([empty, empty])
    assert (nothing[0] == 0).all() and (nothing[1] == -math.inf).all()
