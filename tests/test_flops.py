"""What torch's tools see of the operators: FlopCounterMode counts them, selective checkpointing keeps their outputs."""
import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from muse_dist import MuseConfig, muse_attention
from muse_dist.attention import near_only
from muse_dist.flops import FILLED, attention_pairs
from muse_dist.kernels.limits import probe_count
from muse_dist.layout import is_far

SMALL = {"block": 16, "leaf": 4, "group": 8, "anchors": 2, "remote_leaf": 4, "opened": 3, "sinks": 1}
CONFIGS = {
    "causal": MuseConfig(**SMALL),
    "acausal": MuseConfig(**{**SMALL, "causal": False, "halo": 0}),
    "nothing opened": MuseConfig(**{**SMALL, "opened": 0, "sinks": 0, "halo": 2}),
    "all opened": MuseConfig(**{**SMALL, "opened": 99}),
    "opened where moments err": MuseConfig(**{**SMALL, "opened": 16, "tolerance": 0.1}),
}


def inputs(tokens, batch=2, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, h, tokens, dim, generator=generator, requires_grad=True)
            for h in (heads, kv_heads, kv_heads)]


def counted_pairs(config, heads, kv_heads, tokens):
    """`attention_pairs`, query by query; a causal query and its own key are half a pair."""
    found = dict.fromkeys(("near field", "opened leaves", "far field", "moments", "choice"), 0.0)
    blocks = range(-(-tokens // config.block))
    for i in blocks:
        rows = [t for t in range(tokens) if t // config.block == i]
        far = [t for t in range(tokens) if is_far(i, t // config.block, config)]
        leaves = {t // config.leaf for t in far}
        sinks = {leaf for leaf in leaves if leaf < config.sinks}
        opened = len(sinks) + min(config.opened * (FILLED if config.tolerance else 1), len(leaves - sinks))
        near = [t for t in range(tokens) if t not in set(far) and (t // config.block <= i or not config.causal)]
        for row in rows:
            seen = [t for t in range(tokens) if (t <= row or not config.causal) and t not in set(far)]
            found["near field"] += heads * (len(seen) - config.causal / 2)
            found["opened leaves"] += heads * min(opened * config.leaf, len(far))
            found["far field"] += heads * len(leaves)
        found["moments"] += kv_heads * config.anchors * len(far)
        if config.opened:
            weighed = len(far) + (len(near) if config.tolerance and far else 0)
            probes = probe_count(config.group, config.tolerance > 0)
            found["choice"] += heads * len(rows) * probes / config.group * weighed
    return found


@pytest.mark.parametrize("tokens", [16, 96, 104])
@pytest.mark.parametrize("name", CONFIGS)
def test_pairs_are_those_counted_one_by_one(name, tokens):
    assert attention_pairs(CONFIGS[name], 4, 2, tokens) == pytest.approx(counted_pairs(CONFIGS[name], 4, 2, tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_flop_counters_see_forward_and_backward(name):
    config, (q, k, v) = CONFIGS[name], inputs(104)
    pairs = counted_pairs(config, 4, 2, 104)
    one = 2 * 2 * 8  # operations of a product: two a multiplication and addition, sequences, head dim
    exact = pairs["near field"] + pairs["opened leaves"] + pairs["far field"]
    moments = 6 if config.tolerance else 3  # once more where their errors decide
    with FlopCounterMode(display=False) as forward:
        out = muse_attention(q, k, v, config=config)
    assert forward.get_total_flops() == pytest.approx(one * (2 * exact + moments * pairs["moments"] + pairs["choice"]))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == pytest.approx(one * (5 * exact + 9 * pairs["moments"]))


def test_without_a_far_field_only_the_near_field_counts():
    q, k, v = inputs(96)
    with FlopCounterMode(display=False) as exact:
        muse_attention(q, k, v, config=MuseConfig(**{**SMALL, "block": 128}))
    assert exact.get_total_flops() == 2 * 2 * 2 * 4 * 8 * 96 ** 2 // 2
    with FlopCounterMode(display=False) as near:
        near_only(q, k, v, config=CONFIGS["causal"])
    assert near.get_total_flops() == 2 * 2 * 2 * 8 * attention_pairs(CONFIGS["causal"], 4, 2, 96)["near field"]


def test_selective_checkpoints_keep_what_the_operators_gave():
    """The forward of both runs once; with plain checkpoints twice. Gradients are the same bits."""
    kept = {torch.ops.muse_dist.plan.default, torch.ops.muse_dist.attend.default}

    def policy(context, op, *args, **options):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q, k, v):
        return muse_attention(q.sin(), k.cos(), v.sin(), config=CONFIGS["causal"]).sin()

    def step(run):
        leaves = inputs(104)
        with FlopCounterMode(display=False) as counter:
            grads = torch.autograd.grad(run(*leaves).sum(), leaves)
        return counter.get_flop_counts()["Global"], grads

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    runs = {
        "none": step(layer),
        "plain": step(lambda *x: checkpoint(layer, *x, use_reentrant=False)),
        "selective": step(lambda *x: checkpoint(layer, *x, use_reentrant=False, context_fn=contexts)),
    }
    counts = {name: [found[op] for op in (torch.ops.muse_dist.plan, torch.ops.muse_dist.attend,
                                          torch.ops.muse_dist.attend_backward)] for name, (found, _) in runs.items()}
    plan, attend, backward = counts["none"]
    assert min(counts["none"]) > 0
    assert counts["plain"] == [2 * plan, 2 * attend, backward] and counts["selective"] == [plan, attend, backward]
    for _, grads in runs.values():
        assert all(torch.equal(a, b) for a, b in zip(grads, runs["none"][1], strict=True))
