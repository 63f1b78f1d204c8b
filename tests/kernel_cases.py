"""Inputs of the kernels of the far field, and how near to their twins in fp64 results must be.

Half precision is held to what exact attention in that precision makes of the same inputs: at most twice its error.
"""
import pytest
import torch
import torch.nn.functional as F

from muse_dist.kernels import plain_blocks
from muse_dist.kernels.plain_blocks import Moments, Sight

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DIM = 64 if GPU else 24
SCALE = 0.3
QUIET = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # numpy's log2(0) is meant
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # and so are numbers that are none
]


def normal(*shape, seed, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device=DEVICE, dtype=dtype)


def wide(x):
    """fp64, also of every tensor of a tuple; integers and None as they are."""
    if isinstance(x, Moments):
        return Moments(*map(wide, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


class Case:
    """Inputs of every kernel: blocks of a few leaves, a short last block, some slots of `opened` empty."""

    def __init__(self, dtype=torch.float32, dim=DIM, causal=True, trace=True, size=8, leaf=12, slots=3,
                 batch=1, heads=2, blocks=4, groups=4, parts=2, per_block=3):
        self.dtype, self.causal, self.trace, self.leaf = dtype, causal, trace, leaf
        self.batch, self.heads, self.blocks, self.groups, self.parts = batch, heads, blocks, groups, parts
        self.per_block = per_block
        lead, leaves = (self.batch, self.heads), self.blocks * self.per_block
        spread = (24 / dim) ** 0.5  # logits of one size for every head dim
        self.q = (spread * (normal(*lead, self.blocks, self.groups, size, dim, seed=1) + 0.5)).to(dtype)
        self.anchor = self.q.double().unflatten(3, (self.parts, -1)).mean((4, 5)).to(dtype)
        self.k = (normal(*lead, leaves, leaf, dim, seed=2) + 1).to(dtype)
        self.v = normal(*lead, leaves, leaf, dim, seed=3, dtype=dtype)
        self.valid = torch.ones(leaves, leaf, dtype=torch.bool, device=DEVICE)
        self.valid[-2, leaf // 2:] = False
        self.valid[-1] = False
        place = torch.arange(self.blocks, dtype=torch.int32, device=DEVICE)
        self.sight = Sight(place, place, 1, causal)
        self.seen = plain_blocks.seen_blocks(self.sight).repeat_interleave(self.per_block, 1)
        self.opened = self._choose(slots) if slots else None
        self.dout = normal(*self.q.shape, seed=4, dtype=dtype)

    def _choose(self, slots):
        """The first leaf, as sinks are, and others at random; the last group has an empty slot."""
        rank = normal(*self.q.shape[:4], self.seen.shape[1], seed=5)
        rank[..., 0] = 9
        best, leaf = rank.masked_fill(~self.seen[:, None], -9).sort(descending=True)
        chosen = torch.where(best > -9, leaf, -1)[..., :slots].clone()
        chosen[..., -1, -1] = -1
        return chosen

    def about(self):
        return self.anchor, self.k, self.v, self.sight, SCALE, self.valid

    def far(self, leaf):
        keys = (self.k, self.v) if self.opened is not None else (None, None)
        return self.q, self.anchor, leaf, *keys, self.opened

    def look(self):
        return self.sight, SCALE, self.trace, self.valid

    def only_seen(self, x):
        """The entries [seen, ...] of one field of the moments."""
        return x[self.seen[:, None].expand(self.batch, self.heads, -1, self.parts, -1)]

    def poisoned(self, leaf):
        """Moments with NaN wherever a block does not see a leaf."""
        seen = self.seen[:, None]
        return Moments(*(torch.where(seen if x.dim() == 5 else seen[..., None], x, torch.nan) for x in leaf))

    def moments(self):
        """The twin's, rounded to the case's dtype, NaN out of sight."""
        leaf = plain_blocks.moments(*map(wide, self.about()))
        return self.poisoned(Moments(leaf.mass.float(), leaf.key.to(self.dtype), leaf.value.to(self.dtype),
                                     leaf.trace.float()))

    def moment_grads(self):
        shape = (*self.anchor.shape[:4], self.k.shape[2])
        grads = [normal(*shape, seed=6), normal(*shape, self.k.shape[-1], seed=7),
                 normal(*shape, self.k.shape[-1], seed=8), normal(*shape, seed=9)]
        return self.poisoned(Moments(grads[0].float(), grads[1].to(self.dtype), grads[2].to(self.dtype),
                                     grads[3].float()))

    def tolerances(self):
        """Relative RMS errors allowed for (out, dq, dk, dv)."""
        if self.dtype == torch.float32:
            return 1e-5, 1e-5, 1e-5, 1e-5
        inputs = [x.flatten(2, -2) for x in (self.q, self.k, self.v)]
        dout = self.dout.flatten(2, -2)
        half, exact = (_exact(inputs, dout, dtype) for dtype in (self.dtype, torch.float64))
        return tuple(2 * rms_error(a, b) for a, b in zip(half, exact, strict=True))


def _exact(inputs, dout, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = F.scaled_dot_product_attention(*inputs, scale=SCALE)
    return out.detach(), *torch.autograd.grad(out, inputs, dout.to(dtype))


def rms_error(got, want):
    assert got.shape == want.shape
    size = want.double().square().mean().sqrt().item()
    return (got.double() - want.double()).square().mean().sqrt().item() / max(size, 1e-3)


def assert_near(got, want, tolerance):
    """Equal infinities, and a relative RMS error of the rest of at most `tolerance`."""
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite) and not got.isnan().any()
    error = rms_error(got.masked_fill(infinite, 0), want.masked_fill(infinite, 0))
    assert error <= tolerance, f"relative error {error} above {tolerance}"


def merged(case, leaf):
    """Log-sum-exp and delta of a softmax over the far field and a little more; the last row of groups is taken out."""
    out, lse = plain_blocks.far_field(*map(wide, case.far(leaf)), *case.look())
    lse = (lse + 0.1).float()
    lse[..., -1] = torch.inf
    return lse, (case.dout.double() * out).sum(-1).float()


def tensors(results, case):
    """Flat list of what a kernel returned; of moments only what is seen."""
    found = []
    for x in [results] if isinstance(results, Moments) else results:
        found += [case.only_seen(field) for field in x] if isinstance(x, Moments) else [x]
    return found
