"""The structure: orders, anchors and opened leaves against their definitions."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_dist import MuseConfig, muse_attention
from muse_dist.attention import attend
from muse_dist.tree import has_far_field, make_plan
from tests.brute import assert_close, far_blocks, leaf_tokens, random_inputs


def small(**changes):
    values = {"block": 8, "halo": 1, "leaf": 2, "group": 4, "anchors": 2, "opened": 2, "sinks": 1, **changes}
    return MuseConfig(remote_leaf=values["block"], **values)


def plan_for(q, k, config, scale=0.4):
    return make_plan(q.unflatten(1, (k.shape[1], -1)), k, config, scale)


def assert_permutations(order, n):
    assert torch.equal(order.sort(-1).values, torch.arange(n).expand_as(order))


def assert_well_formed(plan, q, k, config):
    """What every plan must satisfy, whatever the values in q and k. q [B, H, N, D], k [B, K, N, D]."""
    batch, kv_heads, length, dim = k.shape
    pool = q.shape[1] // kv_heads
    blocks, groups = math.ceil(length / config.block), pool * config.block // config.group
    assert plan.key_order.shape == (batch, kv_heads, blocks, config.block)
    assert plan.query_order.shape == (batch, kv_heads, blocks, pool * config.block)
    assert plan.anchors.shape == (batch, kv_heads, blocks, config.anchors, dim)
    assert plan.opened.shape[:4] == (batch, kv_heads, blocks, groups)
    assert_permutations(plan.key_order, config.block)
    assert_permutations(plan.query_order, pool * config.block)
    pinned = config.sinks * config.leaf
    assert torch.equal(plan.key_order[:, :, 0, :pinned], torch.arange(pinned).expand(batch, kv_heads, -1))
    in_last = length - (blocks - 1) * config.block
    there = torch.arange(config.block) < in_last
    for order, pooled in ((plan.key_order, 1), (plan.query_order, pool)):  # padding stands last
        assert there.repeat(pooled)[order[:, :, -1, :pooled * in_last]].all()
    assert not any(field.requires_grad for field in plan)
    assert torch.isfinite(plan.anchors).all()
    for b in range(batch):
        for h in range(kv_heads):
            assert_opened(plan.opened[b, h], plan.key_order[b, h], length, config)


def assert_opened(opened, key_order, length, config):
    """The opened leaves [n, U, O] of one head: distinct, far, with the sinks, and as many as there are to open."""
    per_block = config.block // config.leaf
    for i, groups in enumerate(opened):
        far = {j * per_block + part for j in far_blocks(i, len(opened), config.halo, config.causal)
               for part in range(per_block)}
        full = {leaf for leaf in far if leaf_tokens(key_order, leaf, config.leaf, length)}
        sinks = set(range(config.sinks)) & far
        for group in groups.tolist():
            found = [leaf for leaf in group if leaf != -1]
            assert len(set(found)) == len(found) and set(found) <= far, (i, group)
            assert sinks <= set(found), (i, group)
            assert len(set(found) - sinks) == min(config.opened, len(full - sinks)), (i, group)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(sizes=st.sampled_from([(8, 2, 4), (8, 1, 8), (8, 8, 2), (12, 3, 6), (4, 2, 2), (16, 4, 4)]),
       length=st.integers(1, 70), heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]), dim=st.integers(1, 6),
       halo=st.integers(0, 2), opened=st.sampled_from([0, 1, 5, 99]), sinks=st.integers(0, 2),
       anchors=st.sampled_from([1, 2, 4]), causal=st.booleans(), seed=st.integers(0, 10**6))
def test_every_plan_is_well_formed(sizes, length, heads, dim, halo, opened, sinks, anchors, causal, seed):
    block, leaf, group = sizes
    config = small(block=block, leaf=leaf, group=group, halo=halo, opened=opened, causal=causal,
                   sinks=min(sinks, block // leaf), anchors=min(anchors, block // group))
    q, k, _ = random_inputs(seed, 2, *heads, length, dim)
    assert has_far_field(length, config) == (length > block * (1 + halo))
    if has_far_field(length, config):
        assert_well_formed(plan_for(q, k, config), q, k, config)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", ["zero", "constant", "huge", "nan query", "nan key", "inf key", "all nan"])
def test_plans_of_degenerate_values_are_well_formed(case, causal):
    config = small(causal=causal, opened=3)
    q, k, _ = random_inputs(0, 2, 4, 2, 45, 4, torch.float32)
    if case == "zero":
        q, k = torch.zeros_like(q), torch.zeros_like(k)
    elif case == "constant":
        k = torch.full_like(k, 3.0)
    elif case == "huge":
        k = k * 1e25
    elif case == "nan query":
        q[0, 1, 44], q[1, 0, 3, 2] = math.nan, math.nan
    elif case == "nan key":
        k[0, 1, 2, 0], k[1, 0, 30], k[1, 1, 42] = math.nan, math.nan, math.nan
    elif case == "inf key":
        k[0, 1, 2, 0], k[1, 0, 30], k[1, 1, 42] = math.inf, -math.inf, math.inf
    else:
        q, k = torch.full_like(q, math.nan), torch.full_like(k, math.nan)
    assert_well_formed(plan_for(q, k, config), q, k, config)


@pytest.mark.parametrize("length", [45, 48])
def test_an_anchor_is_the_mean_query_of_its_part(length):
    config = small(anchors=2)
    q, k, _ = random_inputs(1, 2, 4, 2, length, 4)
    plan = plan_for(q, k, config)
    pooled = 2 * config.block
    for b, h, i, a in torch.cartesian_prod(*(torch.arange(n) for n in plan.anchors.shape[:4])).tolist():
        if i < 1 + config.halo:
            continue  # nothing is far: no use for an anchor
        part = plan.query_order[b, h, i, a * pooled // 2:(a + 1) * pooled // 2].tolist()
        rows = [(2 * h + row // config.block, i * config.block + row % config.block) for row in part]
        there = [q[b, head, t] for head, t in rows if t < length]
        if there:
            assert_close(plan.anchors[b, h, i, a], torch.stack(there).mean(0), 1e-12)


def test_leaves_and_groups_are_semantic_clusters():
    """Keys and query rows that come in well separated clusters of the right size are put together."""
    config = small(block=32, leaf=8, group=8, anchors=1, halo=0, sinks=0)
    random = torch.Generator().manual_seed(0)
    label = torch.cat([torch.arange(4).repeat_interleave(8)[torch.randperm(32, generator=random)] for _ in range(4)])
    turned = torch.linalg.qr(torch.randn(6, 6, generator=random, dtype=torch.float64)).Q[:2]
    centres = torch.tensor([[5, 2], [5, -2], [-5, 2], [-5, -2]], dtype=torch.float64) @ turned
    points = centres[label] + 0.05 * torch.randn(128, 6, generator=random, dtype=torch.float64)
    plan = plan_for(points[None, None], points[None, None], config)
    for order in (plan.key_order, plan.query_order):
        for i in range(4):
            found = label.view(4, 32)[i][order[0, 0, i]].view(4, 8)
            assert (found == found[:, :1]).all(), (i, found)


@pytest.mark.parametrize("causal", [True, False])
def test_the_leaf_with_the_mass_is_opened(causal):
    """All queries point at one cluster of far keys: every group must open the leaf that holds it."""
    config = small(block=16, leaf=4, group=4, anchors=2, halo=0, sinks=0, opened=1, causal=causal)
    random = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 1, 80, 8, generator=random, dtype=torch.float64) for _ in range(2))
    along = torch.nn.functional.normalize(torch.randn(8, generator=random, dtype=torch.float64), dim=0)
    place = torch.arange(16)[torch.randperm(16, generator=random)] // 4  # block 1: four clusters along a line
    k[0, 0, 16:32] = (4 * place - 6).double()[:, None] * along + 0.1 * k[0, 0, 16:32]
    planted = [16 + t for t in range(16) if place[t] == 3]
    q += 3 * along
    plan = plan_for(q, k, config, scale=1.0)
    for i in range(2, 5):
        for group in plan.opened[0, 0, i].tolist():
            opened = [n for leaf in group if leaf != -1 for n in leaf_tokens(plan.key_order[0, 0], leaf, 4, 80)]
            assert sorted(opened) == planted


def test_a_plan_uses_no_randomness_and_leaves_its_inputs_alone():
    config = small()
    q, k, _ = random_inputs(2, 2, 4, 2, 45, 4, torch.float32)
    before = q.clone(), k.clone()
    plans = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        plans.append(plan_for(q, k, config))
        assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*plans, strict=True))
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_each_batch_element_and_head_has_its_own_plan():
    config = small()
    q, k, _ = random_inputs(3, 2, 4, 2, 45, 4)
    plan = plan_for(q, k, config)
    q2, k2 = q.clone(), k.clone()
    q2[1, 2:], k2[1, 1] = 5 * q2[1, 2:].flip(-1), -k2[1, 1]
    other = plan_for(q2, k2, config)
    for a, b in zip(plan, other, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, 0], b[1, 0])
    assert not torch.equal(plan.anchors[1, 1], other.anchors[1, 1])


@pytest.mark.parametrize("changed", [1, 3, 5])
def test_a_causal_plan_knows_nothing_of_later_blocks(changed):
    config = small(opened=3)
    q, k, _ = random_inputs(4, 1, 4, 2, 48, 4)
    plan = plan_for(q, k, config)
    q, k = q.clone(), k.clone()
    q[:, :, changed * 8:] *= -4
    k[:, :, changed * 8:] = 9 * k[:, :, changed * 8:].flip(-1) + 1
    for a, b in zip(plan, plan_for(q, k, config), strict=True):
        assert torch.equal(a[:, :, :changed], b[:, :, :changed])


def test_the_plan_follows_the_order_of_meaning_not_of_position():
    """Shuffling the keys of a far block regroups the same keys into the same leaves."""
    config = small(block=16, leaf=4, sinks=1)
    q, k, _ = random_inputs(6, 1, 2, 1, 64, 6)
    shuffle = torch.cat([torch.arange(4), 4 + torch.randperm(12, generator=torch.Generator().manual_seed(0))])
    moved = k.clone()
    moved[:, :, :16] = k[:, :, shuffle]

    def leaves(plan, tokens):
        return [sorted(tokens[plan.key_order[0, 0, 0, p:p + 4]].tolist()) for p in range(0, 16, 4)]

    assert leaves(plan_for(q, k, config), torch.arange(16)) == leaves(plan_for(q, moved, config), shuffle)


def test_opening_more_leaves_never_closes_one():
    q, k, _ = random_inputs(7, 1, 2, 1, 64, 4)
    before = set()
    for opened in range(1, 5):
        now = set(plan_for(q, k, small(opened=opened)).opened[0, 0, 7, 0].tolist()) - {-1}
        assert before < now
        before = now


@pytest.mark.parametrize("length", [1, 7, 8, 16])
def test_a_short_sequence_needs_no_plan(length):
    config = small()
    assert not has_far_field(length, config)
    q, k, v = random_inputs(8, 1, 2, 1, length, 4)
    assert torch.equal(muse_attention(q, k, v, config=config),
                       muse_attention(q, k, v, config=small(anchors=1, leaf=8, opened=0, sinks=0)))


def test_one_group_a_block_keeps_the_strides_that_compilers_expect():
    """The order of a block that needs no split is a view of one range; the operator must not return that."""
    config = small(group=8, anchors=1)
    q, k, _ = random_inputs(3, 2, 2, 2, 45, 5)
    torch.library.opcheck(torch.ops.muse_dist.plan, (q, k, 0.4, config.encoded))


@pytest.mark.parametrize("length", [32, 45])
def test_queries_that_need_no_order_keep_theirs(length):
    """One anchor a block and nothing to choose: any order of the queries gives the same, so none is looked for."""
    config = small(anchors=1, opened=0)
    q, k, v = random_inputs(length, 2, 4, 2, length, 6)
    plan = plan_for(q, k, config, 0.4)
    assert_well_formed(plan, q, k, config)
    assert torch.equal(plan.query_order[:, :, 0], torch.arange(16).expand(2, 2, -1))
    other = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(length // 8)])
    moved = plan.query_order.clone()
    moved[:, :, :len(other)] = other
    out, again = (attend(q, k, v, x, config, 0.4) for x in (plan, plan._replace(query_order=moved)))
    assert_close(out, again, 1e-12)
