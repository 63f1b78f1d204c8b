"""Training on sequences that ranks share: each rank's part of a batch, and a loss that counts every token once."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, nll_loss, pad
from torch.utils.checkpoint import checkpoint

from muse_dist.layout import Layout

IGNORED = -100  # the label of a token that does not count, as in torch and transformers
LOSS_ROWS = 4096  # tokens whose logits are in fp32 at once


def shift_labels(labels: Tensor) -> Tensor:
    """Labels [B, N] of the tokens themselves -> the label of each token's successor; the last has none."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def shard_batch(tokens: Tensor, labels: Tensor, layout: Layout, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's part of whole sequences int64 [B, N]: tokens, labels and positions, each [B, N / P].

    `labels` are those of the tokens themselves, as transformers takes them; the ones returned are of the next token,
    also where that token is another rank's. Positions are the places in the whole sequence.
    """
    positions = layout.positions(rank).to(tokens.device)
    return (tokens.index_select(1, positions), shift_labels(labels).index_select(1, positions),
            positions.expand(len(tokens), -1))


def pad_batch(tokens: Tensor, labels: Tensor, multiple: int, token: int) -> tuple[Tensor, Tensor]:
    """Sequences and labels [B, N] made longer, to a multiple, by a token on the right that has no label."""
    missing = -tokens.shape[1] % multiple
    return pad(tokens, (0, missing), value=token), pad(labels, (0, missing), value=IGNORED)


def shared_mean_loss(
    logits: Tensor, labels: Tensor, total: Callable[[Tensor], Tensor], weight: float, tokens: float | None = None
) -> Tensor:
    """Cross entropy in nats, averaged over the labelled tokens of all ranks: the same fp32 number on every rank.

    Args:
        logits: [B, S, V], this rank's; labels: int64 [B, S], already shifted, -100 for tokens that do not count.
        total: sums a tensor over all ranks, in place.
        weight: factor of the gradients, to undo how whoever reduces them divides.
        tokens: what to divide by instead of the number of labelled tokens on all ranks.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {list(logits.shape)} and labels {list(labels.shape)}: must be [B, S, V] and [B, S] "
                         "of this rank's tokens, as shard(...) returned the labels")
    return _SharedMean.apply(_summed_loss(logits, labels), (labels != IGNORED).sum(), total, weight, tokens)


def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy in fp32, a part of the tokens at a time: fp32 copies of all logits would not fit."""
    parts = zip(logits.flatten(0, 1).split(LOSS_ROWS), labels.flatten().split(LOSS_ROWS))
    losses = [checkpoint(_part_loss, part, wanted, use_reentrant=False) for part, wanted in parts]
    return torch.stack(losses).sum()


def _part_loss(logits: Tensor, labels: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)  # on a GPU without a copy of the logits in it
    return nll_loss(log_softmax(logits, -1, dtype=dtype), labels, ignore_index=IGNORED, reduction="sum")


class _SharedMean(torch.autograd.Function):
    """The mean over all ranks, whose gradient reaches this rank's sum alone."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: Tensor, count: Tensor, total: Callable[[Tensor], Tensor], weight: float, tokens: float | None
    ) -> Tensor:
        loss_and_count = total(torch.stack([loss.double(), count.double()]))
        # A batch without any label has loss 0 and no gradient.
        ctx.tokens = loss_and_count[1].clamp(min=1) if tokens is None else loss_and_count.new_tensor(tokens)
        ctx.weight = weight
        return (loss_and_count[0] / ctx.tokens).to(loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (grad * (ctx.weight / ctx.tokens)).to(grad.dtype), None, None, None, None
