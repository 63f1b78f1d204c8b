"""The method evaluated a second time: loops over rows and leaves, dense arithmetic, gradients by autograd.

Written from the definition (blocks, leaves, groups, anchors, moments), not from the package's code; it imports nothing
of the package. It takes the structure (orders, anchors, opened leaves) from a plan and does everything else itself.
"""
from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Softmax attention in its textbook form. q [B, H, N, D], k and v [B, K, N, D] -> [B, H, N, D]."""
    copies = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    logits = scale * q @ k.transpose(-1, -2)
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    return logits.softmax(-1) @ v


def leaf_moments(anchor: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Moments of one leaf, keys and values [m, D], about one anchor [D].

    Returns log mass [], key centroid [D], value centroid [D] and isotropic spread [].
    """
    weights = (scale * keys @ anchor).exp()
    mass = weights.sum()
    share = weights / mass
    key = (share[:, None] * keys).sum(0)
    value = (share[:, None] * values).sum(0)
    spread = (share * (keys - key).square().sum(1)).sum() / keys.shape[1]
    return mass.log(), key, value, spread


def is_near(i: int, j: int, halo: int, causal: bool) -> bool:
    """Whether queries of block i read the keys of block j one by one."""
    return 0 <= i - j <= halo if causal else abs(i - j) <= halo


def far_blocks(i: int, blocks: int, halo: int, causal: bool) -> list[int]:
    """Blocks that block i sees and that are not near."""
    return [j for j in range(blocks) if not is_near(i, j, halo, causal) and (j < i or not causal)]


def leaf_tokens(key_order: Tensor, leaf_id: int, leaf: int, length: int) -> list[int]:
    """The existing tokens of a leaf. `key_order` [n, block] is that of one batch element and key/value head."""
    block = key_order.shape[1]
    j, first = divmod(leaf_id * leaf, block)
    tokens = [j * block + int(key_order[j, p]) for p in range(first, first + leaf)]
    return [t for t in tokens if t < length]


def attend(q: Tensor, k: Tensor, v: Tensor, plan, config, scale: float) -> Tensor:
    """The method with its structure given. q [B, H, N, D], k and v [B, K, N, D], any float type -> [B, H, N, D]."""
    batch, heads, length, _ = q.shape
    kv_heads = k.shape[1]
    share = heads // kv_heads
    rows: dict[tuple[int, int, int], Tensor] = {}
    for b, kh in itertools.product(range(batch), range(kv_heads)):
        head = _Head(q[b, kh * share:(kh + 1) * share], k[b, kh], v[b, kh], config, scale,
                     None if plan is None else [field[b, kh] for field in (
                         plan.key_order, plan.query_order, plan.anchors, plan.opened)])
        for (g, t), out in head.rows():
            rows[b, kh * share + g, t] = out
    return torch.stack([torch.stack([torch.stack([rows[b, h, t] for t in range(length)]) for h in range(heads)])
                        for b in range(batch)])


class _Head:
    """One key/value head of one batch element with its query heads: q [G, N, D], k and v [N, D]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, config, scale: float, plan: list[Tensor] | None) -> None:
        self.q, self.k, self.v, self.config, self.scale, self.plan = q, k, v, config, scale, plan
        self.length = k.shape[0]
        self.blocks = math.ceil(self.length / config.block)

    def rows(self):
        """Yields ((query head within the pool, token), output [D]) for every existing query."""
        for i in range(self.blocks):
            pooled = self.q.shape[0] * self.config.block
            order = range(pooled) if self.plan is None else self.plan[1][i].tolist()
            far = far_blocks(i, self.blocks, self.config.halo, self.config.causal)
            assert self.plan is not None or not far
            for anchor, positions in self._parts(i, pooled):
                leaves = self._summaries(far, anchor)
                for p in positions:
                    g, t = divmod(order[p], self.config.block)
                    t += i * self.config.block
                    if t < self.length:
                        opened = set() if not far else set(self.plan[3][i, p // self.config.group].tolist())
                        yield (g, t), self._row(self.q[g, t], i, t, anchor, leaves, opened)

    def _parts(self, i: int, pooled: int):
        """The anchors of block i, each with the sorted positions it serves."""
        if self.plan is None:
            return [(None, range(pooled))]
        anchors = self.plan[2][i]
        width = pooled // anchors.shape[0]
        return [(anchor, range(a * width, (a + 1) * width)) for a, anchor in enumerate(anchors)]

    def _summaries(self, far: list[int], anchor: Tensor | None) -> dict[int, tuple[list[int], tuple[Tensor, ...]]]:
        """For every non-empty far leaf its tokens and its moments about `anchor`."""
        found, per_block = {}, self.config.block // self.config.leaf
        for leaf in (j * per_block + part for j in far for part in range(per_block)):
            tokens = leaf_tokens(self.plan[0], leaf, self.config.leaf, self.length)
            if tokens:
                found[leaf] = tokens, leaf_moments(anchor, self.k[tokens], self.v[tokens], self.scale)
        return found

    def _row(self, query: Tensor, i: int, t: int, anchor: Tensor | None, leaves, opened: set[int]) -> Tensor:
        """One softmax over near keys, opened keys and far leaves."""
        tokens = [n for n in range(self.length) if is_near(i, n // self.config.block, self.config.halo,
                                                           self.config.causal)]
        if self.config.causal:
            tokens = [n for n in tokens if n <= t]
        tokens += [n for leaf in leaves if leaf in opened for n in leaves[leaf][0]]
        logits, values = [self.scale * self.k[tokens] @ query], [self.v[tokens]]
        moments = [m for leaf, (_, m) in leaves.items() if leaf not in opened]
        if moments:
            mass, key, value, spread = (torch.stack(part) for part in zip(*moments, strict=True))
            away = query - anchor
            logit = mass + self.scale * key @ away
            if self.config.trace:
                logit = logit + self.scale ** 2 / 2 * (away @ away) * spread
            logits.append(logit)
            values.append(value)
        return torch.cat(logits).softmax(0) @ torch.cat(values)


def random_inputs(seed: int, batch: int, heads: int, kv_heads: int, length: int, dim: int,
                  dtype: torch.dtype = torch.float64, gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D], k and v [B, K, N, D]; a few directions carry most of the variance, as in trained models."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    widths = torch.linspace(1.6, 0.5, dim, dtype=torch.float64)
    q, k = normal(batch, heads, length, dim) * widths + 0.3, normal(batch, kv_heads, length, dim) * widths - 0.2
    v = normal(batch, kv_heads, length, dim)
    return tuple(x.to(dtype).requires_grad_(gradients) for x in (q, k, v))


def gradients(function, inputs: tuple[Tensor, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """The output of `function(*inputs)` and the gradients of its product with a fixed random tensor."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(weight.to(out.dtype))
    return out.detach(), *(x.grad for x in inputs)


def error(got: Tensor, want: Tensor) -> float:
    """The largest deviation relative to the RMS of `want`; infinite where `got` is not finite.

    Gradients that vanish (one key: the softmax is constant) are held to the size of the inputs, hence the floor.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    if not torch.isfinite(got).all():
        return math.inf
    deviation = (got - want).abs().max().item()
    return deviation / max(want.square().mean().sqrt().item(), 1e-3)


def assert_close(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...], tolerance: float) -> None:
    """Asserts `error(got, want) <= tolerance` for a tensor, or for each of several (an output and its gradients)."""
    pairs = [(got, want)] if isinstance(got, Tensor) else list(zip(got, want, strict=True))
    errors = [error(a, b) for a, b in pairs]
    assert max(errors) <= tolerance, f"relative errors {errors} above {tolerance}"
