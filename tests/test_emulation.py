"""emulate_ranks, which the exchanges are compared with, against exact attention and loops over the definition."""
import pytest
import torch

from muse_dist import MuseConfig, muse_attention
from muse_dist.emulation import emulate_ranks
from tests.brute import assert_close, exact_attention, gradients, random_inputs
from tests.brute_ranks import attend_ranks, blocks_held, structure

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
BOTH = pytest.mark.parametrize("causal", [True, False], ids=["causal", "acausal"])
TOLERANCE = 1e-9


def small(**changes):
    return MuseConfig(**{"block": 8, "halo": 1, "leaf": 2, "group": 4, "anchors": 2, "remote_anchors": 1,
                         "remote_leaf": 2, "opened": 1, "sinks": 1, **changes})


# name: (ranks, tokens, heads, key/value heads, batch, settings)
CASES = {
    "two ranks": (2, 32, 2, 1, 1, {}),
    "three ranks, grouped heads, batch": (3, 48, 2, 1, 2, {}),
    "three ranks, two chunk anchors, no halo": (3, 48, 2, 2, 1, {"halo": 0, "remote_anchors": 2, "anchors": 2}),
    "four ranks": (4, 64, 1, 1, 1, {"halo": 0, "trace": False}),
    "fine remote leaves": (3, 48, 2, 1, 1, {"leaf": 4, "remote_leaf": 2, "opened": 1}),
    "coarse remote leaves, which the sinks cut": (3, 48, 2, 1, 1, {"leaf": 2, "remote_leaf": 8, "halo": 0}),
    "no sinks, nothing opened": (2, 64, 2, 1, 1, {"sinks": 0, "opened": 0}),
    "long chunks, two chunk anchors": (2, 96, 2, 1, 1, {"remote_anchors": 2, "sinks": 2, "halo": 2}),
}


@LAYOUTS
@BOTH
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_brute_force(case, causal, layout):
    ranks, tokens, heads, kv_heads, batch, changes = case
    config = small(causal=causal, **changes)
    inputs = random_inputs(ranks, batch, heads, kv_heads, tokens, 3)
    got = gradients(lambda *x: emulate_ranks(*x, config=config, ranks=ranks, layout=layout, scale=0.7), inputs)
    want = gradients(lambda *x: attend_ranks(*x, config, ranks, layout, 0.7), inputs)
    assert_close(got, want, TOLERANCE)


EXACT = {
    "leaves of one key": {"leaf": 1, "remote_leaf": 1, "opened": 0, "sinks": 0, "halo": 0},
    "leaves of one key, trace off, several anchors": {"leaf": 1, "remote_leaf": 1, "trace": False,
                                                      "remote_anchors": 2, "sinks": 3},
    "near field covers everything": {"halo": 99, "remote_leaf": 8},
    "all local leaves opened, remote leaves of one key": {"leaf": 4, "opened": 99, "remote_leaf": 1, "halo": 0},
    "the same without sinks": {"leaf": 4, "opened": 99, "remote_leaf": 1, "sinks": 0},
}


@LAYOUTS
@BOTH
@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_exact_cases(changes, causal, layout):
    config = small(causal=causal, **changes)
    for ranks, tokens in ((2, 64), (3, 48)):
        inputs = random_inputs(ranks, 2, 4, 2, tokens, 5)
        got = gradients(lambda *x: emulate_ranks(*x, config=config, ranks=ranks, layout=layout), inputs)  # noqa: B023
        assert_close(got, gradients(lambda *x: exact_attention(*x, 5 ** -0.5, causal), inputs), TOLERANCE)


@LAYOUTS
@BOTH
def test_one_rank_is_one_device(causal, layout):
    """Up to the order of summation: the emulation is dense."""
    config = small(causal=causal, remote_leaf=8)
    inputs = random_inputs(5, 2, 4, 2, 64, 5)
    got = gradients(lambda *x: emulate_ranks(*x, config=config, ranks=1, layout=layout), inputs)
    assert_close(got, gradients(lambda *x: muse_attention(*x, config=config), inputs), TOLERANCE)


def test_equal_keys_in_every_remote_leaf_are_exact():
    """One direction carries all keys of a leaf: their moments are the keys', whatever the anchor."""
    config = small(leaf=2, remote_leaf=4, opened=99, halo=0, sinks=0)
    q, k, v = random_inputs(6, 1, 2, 1, 48, 3)
    k = k[:, :, torch.arange(48) // 4 * 4]
    got = emulate_ranks(q, k, v, config=config, ranks=3, scale=0.7)
    assert_close(got, exact_attention(q, k, v, 0.7, True), TOLERANCE)


@LAYOUTS
def test_without_other_ranks_far_keys_do_not_matter(layout):
    """remote=False: only the near field, the sinks and the own shard count."""
    config = small(halo=0)
    q, k, v = random_inputs(7, 1, 2, 1, 96, 3)
    base = emulate_ranks(q, k, v, config=config, ranks=3, layout=layout, remote=False)
    last = blocks_held(layout, 3, 2, 12)[-1]
    rows = slice(last * 8, (last + 1) * 8)
    far = next(j for j in blocks_held(layout, 3, 1, 12) if j < last)
    moved = v.clone()
    moved[:, :, far * 8:(far + 1) * 8] += 1.0
    change = {remote: emulate_ranks(q, k, moved, config=config, ranks=3, layout=layout, remote=remote)
              - (base if not remote else emulate_ranks(q, k, v, config=config, ranks=3, layout=layout))
              for remote in (False, True)}
    if layout == "contiguous":
        assert torch.equal(change[False][:, :, rows], torch.zeros_like(base[:, :, rows]))
    assert change[True][:, :, rows].abs().max() > 1e-3


@LAYOUTS
def test_structure_is_what_the_design_says(layout):
    """Chunk anchors are means of the block anchors they serve, equally many each; rank 0 opens the sinks."""
    config = small(remote_anchors=2, anchors=2, sinks=2, halo=0)
    q, k, _ = random_inputs(8, 2, 4, 2, 96, 3)
    for rank in range(3):
        plan, anchors = structure(q, k, rank, 3, layout, config, 0.7)
        chunks = 2 if layout == "zigzag" else 1
        points = plan.anchors.unflatten(2, (chunks, -1)).flatten(3, 4)  # [B, K, C, n / C * R, D]
        part = anchors.part.flatten(3, 4)
        for a in range(2):
            serves = (part == a)[..., None]
            assert (serves.sum(3) == points.shape[3] // 2).all()
            assert_close(anchors.anchor[:, :, :, a], (points * serves).sum(3) / serves.sum(3), 1e-12)
        held = blocks_held(layout, 3, rank, 12)
        for place, block in enumerate(held):
            opened = plan.opened[:, :, place]
            if rank == 0 and any(j < block for j in held):
                assert (opened[..., :2] == torch.arange(2)).all()
            far = {i * 4 + leaf for i, j in enumerate(held) if j < block for leaf in range(4)}
            assert set(opened.flatten().tolist()) <= far | {-1}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision(dtype, tolerance):
    config = small()
    q, k, v = random_inputs(9, 1, 2, 1, 64, 8, dtype)
    got = emulate_ranks(q, k, v, config=config, ranks=4)
    assert got.dtype == dtype
    wide = emulate_ranks(q.double(), k.double(), v.double(), config=config, ranks=4)
    assert_close(got, wide, tolerance)


def test_errors_name_the_argument():
    q, k, v = random_inputs(10, 1, 2, 1, 48, 3)
    with pytest.raises(ValueError, match="48 tokens over 4 ranks"):
        emulate_ranks(q, k, v, config=small(), ranks=4)
    with pytest.raises(ValueError, match="layout='ring'"):
        emulate_ranks(q, k, v, config=small(), ranks=2, layout="ring")
    with pytest.raises(TypeError, match="config"):
        emulate_ranks(q, k, v, config=None, ranks=2)
