"""The choice of opened leaves on the GPU, or through Triton's interpreter, against its plain twin in fp64."""
import inspect

import pytest
import torch

from muse_dist.kernels import plain_blocks, triton_open
from muse_dist.kernels.plain_blocks import Sight
from muse_dist.kernels.limits import PROBES
from muse_dist.kernels.triton_common import Tile
from tests.kernel_cases import QUIET

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SCALE = 0.3

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *QUIET]


class Case:
    """Blocks of a few leaves, the last one short; groups with few rows and with none; NaN where nothing may be read."""

    def __init__(self, dtype=torch.float32, dim=24, causal=True, size=8, leaf=12, opened=3, sinks=1, batch=1, heads=2,
                 blocks=4, groups=3, per_block=3, short=True):
        def normal(*shape, seed):
            x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            return x.to(DEVICE)

        self.dtype, self.opened, self.sinks = dtype, opened, sinks
        spread = 2 * (24 / dim) ** 0.5  # logits of one size for every head dim
        leaves = blocks * per_block
        self.q = (spread * normal(batch, heads, blocks, groups, size, dim, seed=1)).to(dtype)
        self.k = (normal(batch, heads, leaves, leaf, dim, seed=2) + 0.5).to(dtype)
        self.row_valid = torch.ones(self.q.shape[:-1], dtype=torch.bool, device=DEVICE)
        self.row_valid[:, :, -1, 0, size // 2:] = False
        self.row_valid[:, :, -1, -1] = False
        self.q[~self.row_valid] = torch.nan
        self.q[:, :, -2, 0, 0, 0] = torch.inf  # an existing row that must not reach others
        self.valid = torch.ones(leaves, leaf, dtype=torch.bool, device=DEVICE) if short else None
        if short:
            self.valid[-2, leaf // 2:] = False
            self.valid[-1] = False
            self.k[:, :, ~self.valid] = torch.nan
        place = torch.arange(blocks, dtype=torch.int32, device=DEVICE)
        self.sight = Sight(place, place, 1, causal)
        seen = plain_blocks.seen_blocks(self.sight).repeat_interleave(per_block, 1)
        self.k[:, :, ~seen.any(0)] = torch.nan
        self.candidate = seen & (torch.arange(leaves, device=DEVICE) >= sinks)
        if short:
            self.candidate &= self.valid.any(-1)

    def args(self, work=None):
        q, k = (x if work is None else x.to(work) for x in (self.q, self.k))
        return q, k, self.sight, self.opened, self.sinks, SCALE, self.row_valid, self.valid

    def triton(self, **tile):
        return triton_open.open_leaves(*self.args(), **tile)

    def plain(self):
        return plain_blocks.open_leaves(*self.args(torch.float64))

    def scores(self):
        """Log of the summed shares [B, K, n, U, J], -inf for what cannot be chosen; and a bound on rounding errors."""
        runs = PROBES if self.q.shape[-2] % PROBES == 0 else 1
        rows = self.q.double().unflatten(-2, (runs, -1))
        exists = self.row_valid.unflatten(-1, (runs, -1))
        use = exists & rows.isfinite().all(-1)
        probe = rows.masked_fill(~use[..., None], 0).sum(-2) / use.sum(-1, keepdim=True).clamp(min=1)
        keys = self.k.double().nan_to_num().flatten(2, 3)[:, :, None, None].mT
        logit = (SCALE * probe @ keys).unflatten(-1, self.k.shape[2:4])  # [B, K, n, U, runs, J, m]
        if self.valid is not None:
            logit = logit.masked_fill(~self.valid, -torch.inf)
        share = logit.logsumexp(-1).masked_fill(~self.candidate[:, None, None], -torch.inf).softmax(-1)
        score = share.masked_fill(~exists.any(-1)[..., None], 0).nan_to_num().sum(-2).log()
        # Rounding a probe, or products right to about 1e-6, change a logit by at most `unit` times the sum of the sizes
        # of its terms, a share by twice that, and the difference of two scores by twice that again.
        unit = 1e-6 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps / 2 + 1e-6
        return score, 4 * unit * (SCALE * probe.abs() @ keys.abs()).max().item() + 1e-5


def assert_best(got, case):
    """The chosen leaves can be chosen, are different, and score as the best ones do, one after the other."""
    score, bound = case.scores()
    got = got[..., case.sinks:]
    count = case.candidate.sum(-1)[:, None, None].expand(-1, got.shape[3], 1)
    assert torch.equal(got >= 0, (torch.arange(got.shape[-1], device=DEVICE) < count).expand(got.shape))
    taken = torch.zeros(*got.shape[:-1], score.shape[-1] + 1, dtype=torch.int64, device=DEVICE)
    taken.scatter_add_(-1, torch.where(got < 0, score.shape[-1], got), torch.ones_like(got))
    taken = taken[..., :-1]
    assert taken.max() <= 1 and not (taken.bool() & ~case.candidate[:, None]).any()
    best = score.sort(-1, descending=True)[0][..., :got.shape[-1]]
    here = score.gather(-1, got.clamp(min=0))
    compared = (got >= 0) & best.isfinite()
    assert compared.any()
    worst = (here - best)[compared].abs().max().item()
    assert worst <= bound, f"a leaf scores {worst} less than another that was passed over; rounding explains {bound}"


CASES = [
    {"causal": True},
    {"causal": False, "size": 6, "leaf": 5, "opened": 4, "sinks": 0},
    {"causal": False, "size": 16, "leaf": 16, "sinks": 4, "per_block": 2, "short": False},
    {"causal": True, "leaf": 80, "heads": 1, "per_block": 2},
]
LARGE = {"size": 64, "leaf": 64, "blocks": 6, "groups": 32, "per_block": 32, "opened": 16, "batch": 2}
COMBINATIONS = [(dtype, 24, case) for dtype in (torch.float32, torch.float16) for case in CASES]
if GPU:
    COMBINATIONS += [(torch.bfloat16, dim, LARGE | {"causal": causal}) for dim in (32, 64, 96, 128, 256)
                     for causal in (True, False)]
    COMBINATIONS += [(dtype, dim, LARGE) for dim in (64, 128, 256) for dtype in (torch.float16, torch.float32)]
    COMBINATIONS += [(torch.bfloat16, 64, LARGE | change) for change in (
        {"leaf": 16}, {"leaf": 48}, {"leaf": 200, "per_block": 4}, {"leaf": 512, "per_block": 4}, {"size": 98},
        {"short": False}, {"opened": 64}, {"groups": 1})]
    COMBINATIONS += [(torch.float32, 16, LARGE | {"leaf": 1024, "per_block": 4})]


def test_the_kernel_takes_what_its_twin_takes_and_a_tile():
    kernel, twin = (inspect.signature(module.open_leaves) for module in (triton_open, plain_blocks))
    *shared, tile = kernel.parameters.values()
    assert shared == list(twin.parameters.values()) and kernel.return_annotation == twin.return_annotation
    assert tile.name == "tile" and tile.kind == tile.KEYWORD_ONLY and tile.default is None


@pytest.mark.parametrize("dtype, dim, settings", COMBINATIONS, ids=str)
def test_the_best_leaves_are_chosen(dtype, dim, settings):
    case = Case(dtype, dim, **settings)
    got, want = case.triton(), case.plain()
    assert got.dtype == want.dtype == torch.int64 and got.shape == want.shape
    assert torch.equal(got[..., :case.sinks], want[..., :case.sinks])
    assert_best(got, case)
    assert_best(want, case)


@pytest.mark.parametrize("settings", CASES[:2], ids=str)
def test_the_choice_is_the_twins_where_scores_differ_clearly(settings):
    case = Case(**settings)
    score, bound = case.scores()
    gap = -score.sort(-1, descending=True)[0].diff(dim=-1)
    assert gap[gap.isfinite()].min() > 2 * bound
    assert torch.equal(case.triton(), case.plain())


def test_all_rows_exist_by_default():
    case = Case(short=False)
    case.q.nan_to_num_(nan=0, posinf=0)
    case.row_valid[:] = True
    want = case.triton()
    case.row_valid = None
    assert torch.equal(case.triton(), want) and torch.equal(case.plain(), want)


@pytest.mark.parametrize("opened, sinks", [(0, 2), (0, 0), (2, 0), (99, 5)])
def test_any_number_of_leaves_and_sinks(opened, sinks):
    case = Case(opened=opened, sinks=sinks, heads=1)
    got = case.triton()
    assert got.shape[-1] == sinks + min(opened, 12)
    assert torch.equal(got, case.plain())


def test_equal_leaves_are_chosen_in_their_order():
    case = Case(opened=6, short=False)
    case.k[:, :, [2, 3, 4]] = 0
    case.k[:, :, 5] = case.k[:, :, 1]
    case.k[:, :, :6].round_()  # means of few integers: the twin, too, finds exact ties
    case.q.nan_to_num_(posinf=0).round_()
    got = case.triton()
    assert torch.equal(got, case.plain())
    equal = [[(got[0, 0, -1, 0] == j).nonzero().item() for j in some] for some in ([2, 3, 4], [1, 5])]
    assert all(b == a + 1 for places in equal for a, b in zip(places, places[1:]))


def test_a_leaf_that_is_no_number_leaves_the_order_of_the_leaves():
    case = Case()
    case.k[:, :, 2, 0, 0] = torch.nan
    got = case.triton()
    assert torch.equal(got, case.plain())
    assert got[0, 0, -1, 0].tolist() == [0, 1, 2, 3]


def test_probes_without_rows_have_no_say():
    case = Case(causal=False)
    case.q *= 0.3
    case.row_valid[..., 2:] = False  # one probe of four is left; those that are not there would count keys
    case.valid = torch.rand(case.valid.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.3
    case.k.nan_to_num_()
    assert torch.equal(case.triton(), case.plain())


@pytest.mark.parametrize("short", [False, True])
def test_keys_that_are_not_there_have_no_mass(short):
    case = Case(causal=False, leaf=5, short=short)
    case.q[..., 0] = 1
    case.k[..., 0] -= 12 / SCALE  # a key of zeros would outweigh all others
    assert torch.equal(case.triton(), case.plain())


def test_shares_too_small_for_fp32_still_rank():
    case = Case(opened=12, heads=1, per_block=6, short=False)
    case.q[:], case.k[:] = 0, 0
    case.q[..., 0] = 1
    case.k[..., 0] = -12 / SCALE * torch.arange(24, device=DEVICE).flip(0)[:, None]  # twelve nats from leaf to leaf
    got = case.triton()
    assert torch.equal(got, case.plain())
    assert got[0, 0, -1, 0].tolist() == [0, *range(11, 0, -1), -1]


@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 1), Tile(32, 32, 8, 2)], ids=str)
def test_tiles_change_nothing_where_scores_differ_clearly(tile):
    case = Case(**CASES[1])
    assert torch.equal(case.triton(tile=tile), case.triton())


def test_slabs_change_nothing(monkeypatch):
    case = Case(heads=3, blocks=3, groups=1, per_block=2, causal=False)
    whole = case.triton()
    one_block = PROBES * 6 * 4
    for size in (1, 2 * one_block, 7 * one_block):  # a block at a time, two of one head, two heads
        monkeypatch.setattr(triton_open, "SCRATCH_BYTES", size)
        assert torch.equal(case.triton(), whole)


@pytest.mark.parametrize("size", [4, 6], ids=["4 probes", "1 probe"])
def test_more_leaves_than_a_program_holds(size):
    case = Case(heads=1, leaf=1, size=size, groups=2, blocks=4, per_block=700, short=False, opened=5)
    assert_best(case.triton(), case)


def test_the_first_leaves_of_a_longer_tensor_are_read_where_they_are():
    case = Case(batch=2, short=False)
    few = Sight(case.sight.query, case.sight.key[:2], 1, True)
    q, k, *_ = case.args()
    got = triton_open.open_leaves(q, k[:, :, :6], few, 3, 1, SCALE, case.row_valid)
    assert torch.equal(got, triton_open.open_leaves(q, k[:, :, :6].contiguous(), few, 3, 1, SCALE, case.row_valid))


def test_the_choice_is_repeatable():
    case = Case(torch.float16)
    assert torch.equal(case.triton(), case.triton())


def test_what_the_kernels_cannot_run_is_refused():
    case = Case()
    with pytest.raises(ValueError, match="q is torch.float64"):
        triton_open.open_leaves(*case.args(torch.float64))
    case.k = case.k.half()
    with pytest.raises(ValueError, match="k is torch.float16"):
        case.triton()


@pytest.mark.skipif(not GPU, reason="synchronisation happens on a GPU only")
def test_nothing_waits_for_the_gpu():
    case = Case()
    case.triton()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.triton()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30, reason="takes 20 GB")
def test_more_than_2_to_the_31_elements():
    blocks, heads = 64, 65
    make = torch.Generator(DEVICE).manual_seed(0)
    q = torch.randn(1, heads, blocks, 64, 64, 128, generator=make, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(1, heads, blocks * 64, 64, 128, generator=make, device=DEVICE, dtype=torch.bfloat16)
    place = torch.arange(blocks, dtype=torch.int32, device=DEVICE)
    rest = Sight(place, place, 1, True), 4, 1, SCALE
    row_valid = torch.ones(q.shape[:-1], dtype=torch.bool, device=DEVICE)
    got = triton_open.open_leaves(q, k, *rest, row_valid)
    assert torch.equal(got[:, -1:], triton_open.open_leaves(q[:, -1:], k[:, -1:], *rest, row_valid[:, -1:]))
