"""Moments of leaves in plain PyTorch, the first step of `kernels/reference.py`: shapes and arithmetic as there."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")


class Moments(NamedTuple):
    """What far queries see of a leaf, about an anchor a; p are the weights softmax(scale * a.k) inside the leaf."""

    mass: Tensor  # [..., A, J] log of the sum of exp(scale * a.k); -inf for an empty leaf
    key: Tensor  # [..., A, J, D] mean key under p
    value: Tensor  # [..., A, J, D] mean value under p
    trace: Tensor  # [..., A, J] variance of the keys under p, averaged over the D directions


class Acceptance(NamedTuple):
    """What decides whether a group can do with a leaf's moments: the acceptance criterion of multipole methods."""

    anchor: Tensor  # [..., A, D], anchor a serves groups a*U/A to (a+1)*U/A - 1
    leaf: Moments  # of the leaves about these anchors
    trace: bool  # whether far logits have the second-order term
    tolerance: float  # the share of a group's attention that a leaf's moments may get wrong


def tilt(anchor: Tensor, k: Tensor, scale: float, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax of scale * a.k inside every leaf.

    Args:
        anchor: [..., A, D].
        k: [..., J, m, D].
        valid: bool [J, m], which keys exist; all if None.
    Returns:
        log mass [..., A, J] (-inf for an empty leaf) and weights p [..., A, J, m] (0 there).
    """
    logit = scale * (anchor @ k.flatten(-3, -2).mT).unflatten(-1, k.shape[-3:-1])
    if valid is not None:
        logit = logit.masked_fill(~valid, NEG_INF)
    mass = logit.logsumexp(-1)
    return mass, exp_from(logit, mass[..., None])


def _tilted_mean(p: Tensor, x: Tensor) -> Tensor:
    """p [..., A, J, m], x [..., J, m, D] -> [..., A, J, D]."""
    return (p.transpose(-3, -2) @ x).transpose(-3, -2)


def moments(anchor: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None = None) -> Moments:
    """Moments of every leaf about every anchor.

    Args:
        anchor: [..., A, D]; k, v: [..., J, m, D]; valid: bool [J, m], which keys exist; all if None.
    Returns:
        Moments of shapes [..., A, J] and [..., A, J, D]; an empty leaf has mass -inf and zeros elsewhere.
    """
    mass, p = tilt(anchor, k, scale, valid)
    centre, offset = _from_centre(k, valid)
    step = _tilted_mean(p, offset)
    square = _tilted_mean(p, offset.square().sum(-1, keepdim=True))[..., 0]
    key = (step + centre).masked_fill((mass == NEG_INF)[..., None], 0.0)
    return Moments(mass, key, _tilted_mean(p, v), (square - step.square().sum(-1)) / k.shape[-1])


def moments_backward(
    grad: Moments, anchor: Tensor, k: Tensor, v: Tensor, out: Moments, scale: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `moments` for k and v, given the gradients `grad` of its results `out`. Anchors are constants."""
    mass, p = tilt(anchor, k, scale, valid)
    centre, offset = _from_centre(k, valid)
    step = out.key - centre
    d_square = (grad.trace / k.shape[-1])[..., None]  # [..., A, J, 1], for the mean square offset under p
    d_key = grad.key - 2 * d_square * step
    square = offset.square().sum(-1)[..., None, :, :]  # [..., 1, J, m]
    mean_square = out.trace * k.shape[-1] + step.square().sum(-1)
    constant = grad.mass - (d_key * out.key).sum(-1) - (grad.value * out.value).sum(-1) - d_square[..., 0] * mean_square
    d_logit = p * (constant[..., None] + _dot_leaf(d_key, k) + _dot_leaf(grad.value, v) + d_square * square)
    per_leaf = p.transpose(-3, -2).mT  # [..., J, m, A]
    dk = scale * torch.einsum("...ajm,...ad->...jmd", d_logit, anchor) + per_leaf @ d_key.transpose(-3, -2)
    dk = dk + 2 * offset * (per_leaf @ d_square.transpose(-3, -2))
    return dk, per_leaf @ grad.value.transpose(-3, -2)


def _from_centre(k: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean key of every leaf [..., 1, J, D] and the keys minus it [..., J, m, D].

    The trace is the same about any point; about this one its two terms do not cancel each other's digits.
    """
    exists = k.new_ones(k.shape[-3:-1]) if valid is None else valid.to(k.dtype)
    centre = torch.where(exists[..., None] > 0, k, 0.0).sum(-2) / exists.sum(-1, keepdim=True).clamp(min=1)
    return centre.unsqueeze(-3), k - centre[..., None, :]


def _dot_leaf(x: Tensor, k: Tensor) -> Tensor:
    """x [..., A, J, D], k [..., J, m, D] -> x.k [..., A, J, m]."""
    return (x.transpose(-3, -2) @ k.mT).transpose(-3, -2)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two leaves about the same anchors, exactly. All fields as in `Moments`, equal shapes."""
    mass = torch.logaddexp(a.mass, b.mass)
    wa, wb = exp_from(a.mass, mass), exp_from(b.mass, mass)
    key = wa[..., None] * a.key + wb[..., None] * b.key
    value = wa[..., None] * a.value + wb[..., None] * b.value
    between = wa * wb * (a.key - b.key).square().sum(-1) / key.shape[-1]
    return Moments(mass, key, value, wa * a.trace + wb * b.trace + between)


def exp_from(logit: Tensor, lse: Tensor) -> Tensor:
    """exp(logit - lse), 0 where logit is -inf (also when the whole softmax is empty and lse is -inf)."""
    return torch.where(logit == NEG_INF, 0.0, (logit - lse).exp())
