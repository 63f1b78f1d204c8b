"""The acceptance criterion of opened leaves, on the GPU or through Triton's interpreter, against dense arithmetic."""
import dataclasses
import functools
import math

import pytest
import torch

from muse_dist import MuseConfig, muse_attention
from muse_dist.kernels import plain_blocks, reference, triton_moments, triton_open
from muse_dist.kernels.plain_blocks import Acceptance, Moments
from muse_dist.kernels.limits import JUDGES
from muse_dist.kernels.reference import UNSEEN
from muse_dist.kernels.triton_common import Tile
from muse_dist.tree import make_plan
from tests.kernel_cases import QUIET
from tests.test_kernels_open import DEVICE, GPU, LARGE, SCALE, Case

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *QUIET]


class Judged(Case):
    """A `Case` whose keys are all finite, with anchors to take moments about."""

    def __init__(self, dtype=torch.float32, dim=24, parts=1, trace=True, **settings):
        super().__init__(dtype, dim, **settings)
        self.k.nan_to_num_()
        self.trace = trace
        make = torch.Generator().manual_seed(5)
        anchor = torch.randn(*self.q.shape[:3], parts, dim, generator=make, dtype=torch.float64)
        self.anchor = (0.5 * anchor).to(DEVICE, dtype)

    @functools.cached_property
    def errors(self):
        """The mean over the probes of the error of every leaf, from the formulas: fp64 [B, K, n, U, J]."""
        runs = JUDGES if self.q.shape[-2] % JUDGES == 0 else 1
        rows = self.q.double().unflatten(-2, (runs, -1))
        exists = self.row_valid.unflatten(-1, (runs, -1))
        use = exists & rows.isfinite().all(-1)
        probe = rows.masked_fill(~use[..., None], 0).sum(-2) / use.sum(-1, keepdim=True).clamp(min=1)
        k, anchor = self.k.double(), self.anchor.double()
        valid = torch.ones(k.shape[2:4], dtype=torch.bool, device=DEVICE) if self.valid is None else self.valid
        weight = torch.where(valid, torch.einsum("bknad,bkjmd->bknajm", SCALE * anchor, k).exp(), 0.0)
        mass = weight.sum(-1)
        p = weight / mass.clamp(min=1e-300)[..., None]
        mean = torch.einsum("bknajm,bkjmd->bknajd", p, k)
        spread = torch.einsum("bknajm,bkjm->bknaj", p, k.square().sum(-1)) - mean.square().sum(-1)
        step = probe - anchor.repeat_interleave(probe.shape[3] // anchor.shape[3], 3)[:, :, :, :, None]  # [.., U, r, D]
        mass, mean, spread = (x.repeat_interleave(probe.shape[3] // anchor.shape[3], 3) for x in (mass, mean, spread))
        guess = mass.log()[..., None, :] + SCALE * torch.einsum("bknurd,bknujd->bknurj", step, mean)
        if self.trace:
            guess += SCALE**2 / 2 / k.shape[-1] * step.square().sum(-1)[..., None] * spread[..., None, :]
        place = self.sight.query[:, None] - self.sight.key
        hand = (place >= 0 if self.sight.causal else place == place).repeat_interleave(valid.shape[0] // len(place), 1)
        logit = SCALE * torch.einsum("bknurd,bkjmd->bknurjm", probe, k)
        logit = logit.masked_fill(~(valid & hand[:, None, None, :, None]), -torch.inf)
        share = logit.flatten(-2).softmax(-1).unflatten(-1, k.shape[2:4]).sum(-1)
        whole = logit.flatten(-2).logsumexp(-1)[..., None]
        error = ((guess - whole).exp().clamp(max=1) - share).abs() + UNSEEN * share
        some = exists.any(-1)[..., None]
        error = error.masked_fill(~some, 0).sum(-2) / some.sum(-2).clamp(min=1)
        return error.masked_fill(~self.candidate[:, None], -1.0)

    def slack(self):
        """How much of an error rounding explains: of products in the dtype, against UNSEEN of a share."""
        unit = 1e-6 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps
        return 20 / UNSEEN * unit + 1e-4

    def triton(self, tolerance, **tile):
        leaf = triton_moments.moments(self.anchor, self.k, self.k, self.sight, SCALE, self.valid)
        accept = Acceptance(self.anchor, leaf, self.trace, tolerance)
        return triton_open.open_leaves(*self.args(), accept, **tile)

    def plain(self, tolerance):
        anchor, k = self.anchor.double(), self.k.double()
        leaf = plain_blocks.moments(anchor, k, k, self.sight, SCALE, self.valid)
        return plain_blocks.open_leaves(*self.args(torch.float64), Acceptance(anchor, leaf, self.trace, tolerance))

    def middle(self):
        """A tolerance in the middle of the errors, where the next error on both sides is far."""
        errors = self.errors[self.errors > 0].sort()[0]
        some = errors[len(errors) // 2:len(errors) * 9 // 10]
        at = (some[1:] / some[:-1]).argmax()
        return (some[at] * some[at + 1]).sqrt().item()


CASES = [{}, {"causal": False, "size": 6, "leaf": 5, "opened": 4, "sinks": 0},
         {"groups": 4, "parts": 2, "trace": False}, {"size": 16, "leaf": 16, "sinks": 4, "short": False, "opened": 2}]
COMBINATIONS = [(dtype, 24, case) for dtype in (torch.float32, torch.float16) for case in CASES]
if GPU:
    COMBINATIONS += [(torch.bfloat16, dim, LARGE | {"causal": causal, "parts": 2}) for dim in (32, 64, 96, 128, 256)
                     for causal in (True, False)]
    COMBINATIONS += [(dtype, dim, LARGE) for dim in (64, 256) for dtype in (torch.float16, torch.float32)]
    COMBINATIONS += [(torch.bfloat16, 64, LARGE | {"leaf": 128, "opened": 32, "parts": 1})]


def assert_accepted(got, case, tolerance):
    """Open are leaves that err by the tolerance or more, the worst first: all of them, or as many as slots."""
    error, slack = case.errors, case.slack()
    chosen = got[..., case.sinks:]
    assert torch.equal(chosen >= 0, (chosen >= 0).sort(-1, descending=True)[0]), "empty slots come last"
    here = error.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, torch.nan)
    assert not (here < tolerance * (1 - slack)).any()
    assert not (here[..., 1:] > here[..., :-1] * (1 + slack)).any()
    taken = torch.zeros(*error.shape[:-1], error.shape[-1] + 1, dtype=torch.int64, device=DEVICE)
    taken.scatter_add_(-1, torch.where(chosen < 0, error.shape[-1], chosen), torch.ones_like(chosen))
    assert taken[..., :-1].max() == 1
    rest = error.masked_fill(taken[..., :-1].bool(), -1).max(-1)[0]
    least = here.nan_to_num(torch.inf).min(-1)[0]
    full = (chosen >= 0).all(-1)
    assert (rest <= torch.where(full, least, tolerance) * (1 + slack)).all()
    assert (chosen >= 0).any() and ((chosen < 0) & (case.candidate.sum(-1) > 0)[:, None, None]).any()


@pytest.mark.parametrize("dtype, dim, settings", COMBINATIONS, ids=str)
def test_leaves_open_where_moments_err(dtype, dim, settings):
    case = Judged(dtype, dim, **settings)
    tolerance = case.middle()
    got, want = case.triton(tolerance), case.plain(tolerance)
    assert got.dtype == torch.int64 and got.shape == want.shape
    assert torch.equal(got[..., :case.sinks], want[..., :case.sinks])
    assert_accepted(want, case, tolerance)
    assert_accepted(got, case, tolerance)


def test_slabs_and_tiles_change_nothing(monkeypatch):
    case = Judged(heads=3, blocks=3, groups=2, per_block=2, causal=False, parts=2)
    tolerance = case.middle()
    whole = case.triton(tolerance)
    assert torch.equal(whole, case.plain(tolerance))
    one_block = JUDGES * 2 * 6 * 4
    for size in (1, 2 * one_block, 7 * one_block):  # a block at a time, two of one head, two heads
        monkeypatch.setattr(triton_open, "SCRATCH_BYTES", size)
        assert torch.equal(case.triton(tolerance, tile=Tile(16, 16, 4, 1)), whole)


def test_a_leaf_that_is_no_number_stays_closed():
    case = Judged()
    tolerance = case.middle()
    case.k[:, :, 2, 0, 0] = torch.nan  # and with it every group that sees it has no total
    got = case.triton(tolerance)
    assert torch.equal(got, case.plain(tolerance)) and (got[:, :, -1, :, case.sinks:] == -1).all()


def test_one_probe_by_hand():
    """Two far leaves and a near one, one probe in the direction of the keys: the far leaf of unequal keys is opened."""
    k = torch.tensor([[[1.0], [1.0]], [[0.0], [2.0]], [[0.0], [0.0]]], dtype=torch.float64)  # [J, m, D]
    q = torch.full((1, 4, 1), 3.0, dtype=torch.float64)  # [U, g, D]
    anchor = torch.zeros(1, 1, dtype=torch.float64)
    leaf = reference.moments(anchor, k, k, 1.0)
    seen, near = torch.tensor([True, True, False]), torch.tensor([False, False, True])
    e = torch.tensor(3.0, dtype=torch.float64).exp()
    whole = 2 * e + (1 + e * e) + 2
    right, wrong = 2 * e / whole, ((2 * e).log() + 4.5).exp() / whole  # kappa 1, tau 1, |q - a|^2 9 / 2
    errors = [UNSEEN * right, (wrong.clamp(max=1) - (1 + e * e) / whole).abs() + UNSEEN * (1 + e * e) / whole]
    for tolerance, opened in ((0.99 * errors[0], [1, 0]), (1.01 * errors[0], [1, -1]), (0.99 * errors[1], [1, -1]),
                              (1.01 * errors[1], [-1, -1])):
        accept = Acceptance(anchor, Moments(*leaf), True, tolerance.item())
        assert reference.open_leaves(q, k, seen, 2, 0, 1.0, None, None, accept, near).tolist() == [opened]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_opens_what_it_needs(backend):
    """A few keys that only some queries look for: nearer to opening everything than as many leaves for every group."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 16, generator=make).to(DEVICE) for _ in range(3))
    k[:, :, 8:24] *= 4
    q[:, :, 128:] *= torch.linspace(0.1, 2, 128, device=DEVICE)[:, None]
    every = MuseConfig(block=32, leaf=8, group=8, anchors=1, remote_leaf=8, opened=28, sinks=0, backend=backend)
    some = dataclasses.replace(every, tolerance=0.01)
    count = (make_plan(q[:, :, None], k, some, 0.25).opened >= 0).float().sum(-1).mean().item()
    assert 1 < count < 8
    alike = dataclasses.replace(every, opened=math.ceil(count))
    exact, adapted, fixed = (muse_attention(q, k, v, config=config) for config in (every, some, alike))
    assert (adapted - exact).norm() < 0.8 * (fixed - exact).norm()
