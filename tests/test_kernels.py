"""GPU kernels against their plain twins: on the GPU where there is one, else through Triton's interpreter."""
import pytest
import torch
import triton
import triton.language as tl

from muse_dist.kernels import (
    leaf_readers, plain_blocks, triton_blocks, triton_far, triton_far_backward, triton_moments,
    triton_opened_backward, triton_rows,
)
from muse_dist.kernels.plain_blocks import Moments, Sight
from muse_dist.kernels.triton_common import BackwardTiles, Tile, backward_tile, side
from tests.kernel_cases import DEVICE, DIM, GPU, SCALE, Case, assert_near, merged, normal, tensors, wide

SMALL = Tile(16, 16, 4, 1)
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy's log2(0) is meant

CASES = [
    {"causal": True, "size": 8, "leaf": 12, "slots": 3},
    {"causal": False, "size": 20, "leaf": 16, "slots": 4, "trace": False},
    {"causal": True, "size": 16, "leaf": 5, "slots": 0},
]
LARGE = {"causal": True, "size": 64, "leaf": 64, "slots": 3}
NARROW = [LARGE | {"leaf": 12}, LARGE | {"size": 8}]  # products of 64 rows and few columns: eight warps widen tiles
# (dtype, head dim, settings); the interpreter's tl.dot is wrong in bf16.
COMBINATIONS = [(dtype, DIM, settings) for dtype in (torch.float32, torch.float16) for settings in CASES]
if GPU:
    COMBINATIONS += [(torch.bfloat16, dim, case) for dim in (32, 64, 96, 128, 256) for case in (CASES[0], LARGE)]
    COMBINATIONS += [(dtype, dim, LARGE) for dim in (128, 256) for dtype in (torch.float32, torch.float16)]
    COMBINATIONS += [(*of, case) for of in ((torch.float32, 64), (torch.bfloat16, 128)) for case in NARROW]
every_combination = pytest.mark.parametrize("dtype, dim, settings", COMBINATIONS, ids=str)


@every_combination
def test_moments(dtype, dim, settings):
    case = Case(dtype, dim, **settings)
    got = triton_moments.moments(*case.about())
    want = plain_blocks.moments(*map(wide, case.about()))
    out = case.tolerances()[0]
    for field, tolerance in (("mass", 1e-5), ("key", out), ("value", out), ("trace", max(out / 2, 1e-5))):
        assert_near(case.only_seen(getattr(got, field)), case.only_seen(getattr(want, field)), tolerance)
    assert got.mass.dtype == got.trace.dtype == torch.float32 and got.key.dtype == got.value.dtype == dtype


def test_the_trace_of_close_keys_far_from_the_origin_does_not_cancel():
    case = Case()
    case.k = case.k / 1000 + 100
    got, want = triton_moments.moments(*case.about()), plain_blocks.moments(*map(wide, case.about()))
    assert_near(case.only_seen(got.trace) * 1e6, case.only_seen(want.trace) * 1e6, 1e-3)


@every_combination
def test_moments_backward(dtype, dim, settings):
    case = Case(dtype, dim, **settings)
    grad = case.moment_grads()
    got = triton_moments.moments_backward(grad, *case.about())
    want = plain_blocks.moments_backward(wide(grad), *map(wide, case.about()))
    for x, y, tolerance in zip(got, want, case.tolerances()[2:], strict=True):
        assert x.dtype == dtype
        assert_near(x, y, tolerance)


@every_combination
def test_far_field(dtype, dim, settings):
    case = Case(dtype, dim, **settings)
    leaf = case.moments()
    out, lse = triton_far.far_field(*case.far(leaf), *case.look())
    want, want_lse = plain_blocks.far_field(*map(wide, case.far(leaf)), *case.look())
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_near(out, want, case.tolerances()[0])
    assert_near(lse, want_lse, 1e-5)
    assert lse.isinf().any() == case.causal  # blocks that see nothing


@every_combination
def test_far_field_backward(dtype, dim, settings):
    case = Case(dtype, dim, **settings)
    leaf = case.moments()
    tail = *merged(case, leaf), *case.look()
    dq, grad, *opened = triton_far_backward.far_field_backward(case.dout, *case.far(leaf), *tail)
    want_dq, want_grad, *want_opened = plain_blocks.far_field_backward(
        wide(case.dout), *map(wide, case.far(leaf)), *map(wide, tail))
    _, at_q, at_k, at_v = case.tolerances()
    assert_near(dq, want_dq, at_q)
    for field, tolerance in (("mass", at_k), ("key", at_k), ("value", at_v), ("trace", at_k)):
        assert_near(case.only_seen(getattr(grad, field)), case.only_seen(getattr(want_grad, field)), tolerance)
    if case.opened is None:
        assert opened == want_opened == [None, None]
    else:
        assert_near(opened[0], want_opened[0], at_k)
        assert_near(opened[1], want_opened[1], at_v)


class SharedCase(Case):
    """Anchors that all blocks share: `use` names the one that serves each part. Nothing is opened."""

    def __init__(self, anchors, **settings):
        super().__init__(slots=0, **settings)
        self.anchor = self.q.double().mean((2, 3, 4))[:, :, None].expand(-1, -1, anchors, -1).to(self.dtype)
        self.anchor = self.anchor + 0.2 * normal(*self.anchor.shape, seed=10, dtype=self.dtype)
        part = normal(self.batch, self.heads, self.blocks, self.parts, anchors, seed=11).argmax(-1)
        self.use = part.to(torch.int64)
        everything = Sight(self.sight.query[:1], self.sight.key, -1, False)
        leaf = plain_blocks.moments(*map(wide, (self.anchor[:, :, None], self.k, self.v, everything, SCALE)))
        mass, key, value, trace = (x[:, :, 0] for x in leaf)
        self.leaf = Moments(mass.float(), key.to(self.dtype), value.to(self.dtype), trace.float())

    def arguments(self):
        return self.q, self.anchor, self.leaf, None, None, None


@pytest.mark.parametrize("anchors, causal", [(1, False), (3, False), (1, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_anchors_that_blocks_share(dtype, anchors, causal, monkeypatch):
    case = SharedCase(anchors, dtype=dtype, causal=causal)
    far, tail = case.arguments(), (case.sight, SCALE, True, None, case.use)
    want, lse = plain_blocks.far_field(*map(wide, far), *tail)
    out, got_lse = triton_far.far_field(*far, *tail)
    tolerances = case.tolerances()
    assert_near(out, want, tolerances[0])
    assert_near(got_lse, lse, tolerances[0])
    delta = (case.dout.double() * want).sum(-1)
    back = *far, lse.float(), delta.float(), *tail
    empty = torch.empty
    with monkeypatch.context() as poisoned:
        poisoned.setattr(torch, "empty", lambda *size, dtype, **options: empty(*size, dtype=dtype, **options).fill_(
            torch.nan if dtype.is_floating_point else 0))
        dq, grad, _, _ = triton_far_backward.far_field_backward(case.dout, *back)
    want_q, want_grad, _, _ = plain_blocks.far_field_backward(wide(case.dout), *map(wide, back))
    assert_near(dq, want_q, tolerances[1])
    for got, right in zip(grad, want_grad, strict=True):
        assert_near(got, right, max(tolerances))
        assert got.count_nonzero() == case.only_seen(got).count_nonzero(), "what a block does not see must be 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_rows(dtype):
    a, b = (normal(2, 3, 70, DIM, seed=seed, dtype=dtype) for seed in (1, 2))
    assert_near(triton_rows.row_dots(a, b), plain_blocks.row_dots(a.double(), b.double()), 1e-6)
    a[0, 0, 3, 2], a[1, 1, 69, 0], a[1, 2] = torch.nan, -torch.inf, torch.inf
    valid = normal(2, 3, 70, seed=3) > 0
    valid[0, 1] = False
    for which in (None, valid):
        assert_near(triton_rows.mean_rows(a, which), plain_blocks.mean_rows(a.double(), which),
                    1e-6 if dtype == torch.float32 else 1e-3)


def test_leaves_of_one_key_give_exact_attention():
    case = Case(leaf=1, slots=2)
    case.valid[:] = True
    leaf = case.poisoned(triton_moments.moments(*case.about()))
    out, lse = triton_far.far_field(*case.far(leaf), *case.look())
    keys, values = (x.flatten(2, 3)[:, :, None, None].double() for x in (case.k, case.v))
    logits = (SCALE * case.q.double() @ keys.mT).masked_fill(~case.seen[:, None, None], -torch.inf)
    assert_near(lse, logits.logsumexp(-1), 1e-5)
    assert_near(out, logits.softmax(-1).nan_to_num(0) @ values, 1e-5)


@pytest.mark.parametrize("settings", [
    {"size": 20, "leaf": 20, "slots": 2, "blocks": 4, "per_block": 5, "causal": False, "groups": 2, "parts": 1},
    {"size": 4, "leaf": 4, "blocks": 9, "per_block": 1, "groups": 2},
], ids=["leaves and rows", "anchors"])
def test_small_tiles_change_nothing_but_rounding(settings):
    case = Case(**settings, heads=1)
    leaf = case.moments()
    grad = case.moment_grads()
    shapes = {"far_field_backward": BackwardTiles(SMALL, SMALL, SMALL)}
    for name, args in {
        "moments": case.about(), "moments_backward": (grad, *case.about()),
        "far_field": (*case.far(leaf), *case.look()),
        "far_field_backward": (case.dout, *case.far(leaf), *merged(case, leaf), *case.look()),
    }.items():
        function = getattr(triton_blocks, name)
        small, pinned = (tensors(function(*args, **tile), case)
                         for tile in ({"tile": shapes.get(name, SMALL)}, {}))
        for x, y in zip(small, pinned, strict=True):
            assert_near(x, y, 1e-5)


def test_sides_of_tiles_leave_every_four_warps_16_columns():
    assert [side(*x) for x in ((5, 64, 4), (5, 64, 8), (33, 64, 8), (999, 64, 4), (16, 16, 8))] == [16, 32, 64, 64, 32]


def test_results_are_bitwise_repeatable():
    case = Case(torch.float16)
    leaf = case.moments()
    args = case.dout, *case.far(leaf), *merged(case, leaf), *case.look()
    runs = [tensors(triton_far_backward.far_field_backward(*args), case) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@triton.jit
def _pieces(name, bounds, out, names, cuts, least):
    item = tl.program_id(0)
    leaf, first, last, place = leaf_readers.piece(item, name, bounds, names, cuts, least)
    tl.store(out + 4 * item, leaf)
    tl.store(out + 4 * item + 1, first)
    tl.store(out + 4 * item + 2, last)
    tl.store(out + 4 * item + 3, place)


@pytest.mark.parametrize("cuts, least", [(1000, 1), (1000, 2), (5, 1), (5, 7), (1, 1), (3, 1000)])
def test_readers_of_leaves(cuts, least):
    """Every reader of every leaf is in one piece, in order; pieces have places of their own for partial sums."""
    opened = Case(slots=4).opened.flatten(2, 3).flatten(0, 1)  # [batch, groups, slots]
    batch, groups, slots, leaves = *opened.shape, 12
    readers = leaf_readers.leaf_readers(opened, leaves, cuts, least)
    longest = max(least, -(-(opened >= 0).sum().item() // cuts))
    count = cuts + leaves * batch
    out = torch.full((count, 4), -9, dtype=torch.int32, device=DEVICE)
    _pieces[(count,)](readers.name, readers.bounds, out, leaves * batch, cuts, least)
    pieces = sorted((leaf, first, last, place) for leaf, first, last, place in out.tolist() if leaf >= 0)
    places = [place for *_, place in pieces if place >= 0]
    assert len(set(places)) == len(places) and all(place < 2 * cuts for place in places)
    for b in range(batch):
        for j in range(leaves):
            here = [(range(first, last), place) for leaf, first, last, place in pieces if leaf == j * batch + b]
            slot = [readers.slot[at].item() for run, _ in here for at in run]
            want = [u for u in range(groups) if (opened[b, u] == j).any()]
            assert [at // slots - b * groups for at in slot] == want
            assert all(len(run) <= longest for run, _ in here)
            assert (here[0][1] == -1) == (len(here) == 1)


def test_leaves_with_many_readers_are_shared_by_programs():
    case = Case(slots=4)
    lse, delta = merged(case, case.moments())
    results = []
    for cuts in (20, 1):
        readers = leaf_readers.leaf_readers(case.opened.flatten(2, 3).flatten(0, 1), case.k.shape[2], cuts, 2)
        results.append(triton_opened_backward.opened_backward(
            case.dout, case.q, case.k, case.v, lse, delta, readers, SCALE, case.valid,
            backward_tile(DIM, case.dtype), None))
    for x, y in zip(*results, strict=True):
        assert_near(x, y, 1e-5)


@pytest.mark.parametrize("module", [triton_blocks, plain_blocks], ids=["triton", "plain"])
def test_gradients_are_added_to_what_is_there(module):
    """To the first leaves of longer tensors, which keep the rest; with and without opened leaves."""
    for slots in (3, 0):
        case = Case(slots=slots)
        leaf = case.moments()
        kept = [normal(1, 2, 15, *case.k.shape[3:], seed=seed, dtype=torch.float32) for seed in (12, 13)]
        totals = [x.clone() for x in kept]
        place = tuple(x[:, :, :case.k.shape[2]] for x in totals)
        back = case.dout, *case.far(leaf), *merged(case, leaf), *case.look()
        _, grad, *opened = module.far_field_backward(*back, None, place)
        leaves = module.moments_backward(grad, *case.about(), place)
        assert all(x is y for x, y in zip((*opened, *leaves), place * 2, strict=True))
        parts = [module.moments_backward(grad, *case.about())]
        if slots:
            parts.append(module.far_field_backward(*back)[2:])
        for total, old, *new in zip(totals, kept, *parts):
            assert_near(total[:, :, :12], old[:, :, :12] + sum(new), 1e-5)
            assert torch.equal(total[:, :, 12:], old[:, :, 12:])


@pytest.mark.parametrize("change, message", [
    ({"k": lambda x: x.double(), "v": lambda x: x.double(), "anchor": lambda x: x.double()}, "anchor is torch.float64"),
    ({"v": lambda x: x.half()}, "v is torch.float16"),
    ({"k": lambda x: x.new_zeros(1, 2, 12, 12, 257), "v": lambda x: x.new_zeros(1, 2, 12, 12, 257)}, "head dim 257"),
    ({"k": lambda x: x.new_zeros(1, 2, 15, 999, 24), "v": lambda x: x.new_zeros(1, 2, 15, 999, 24)}, "leaf=999"),
])
def test_what_the_kernels_cannot_run_is_refused(change, message):
    case = Case(dim=24)
    for name, function in change.items():
        setattr(case, name, function(getattr(case, name)))
    with pytest.raises(ValueError, match=message):
        triton_moments.moments(*case.about())


@pytest.mark.skipif(not GPU, reason="synchronisation happens on a GPU only")
def test_nothing_waits_for_the_gpu():
    case = Case(slots=3)
    leaf = triton_moments.moments(*case.about())
    args = case.dout, *case.far(leaf), *merged(case, leaf), *case.look()

    def step():
        triton_far.far_field(*case.far(triton_moments.moments(*case.about())), *case.look())
        _, grad, _, _ = triton_far_backward.far_field_backward(*args)
        triton_moments.moments_backward(grad, *case.about())

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
