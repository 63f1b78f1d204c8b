"""Shards of a batch and the loss over all of them, without processes."""
from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from muse_dist.layout import Layout
from muse_dist.sequence_loss import LOSS_ROWS, pad_batch, shard_batch, shared_mean_loss

WORDS = 11


def batch(tokens, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (rows, tokens), generator=generator)
    kept = torch.rand(rows, tokens, generator=generator) < torch.linspace(0.05, 1, tokens)
    return ids, ids.where(kept, -100)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_joined_shards_are_the_sequence_with_the_next_tokens_labels(layout):
    ids, labels = batch(48)
    split = Layout(layout, 3, 48, 4)
    parts = [shard_batch(ids, labels, split, rank) for rank in range(3)]
    tokens, wanted, positions = (split.join(list(x), 1) for x in zip(*parts))
    assert torch.equal(tokens, ids)
    assert torch.equal(positions, torch.arange(48).expand(2, -1))
    assert torch.equal(wanted[:, :-1], labels[:, 1:]) and (wanted[:, -1] == -100).all()


def test_padding_has_no_labels_and_lies_behind():
    ids, labels = batch(50)
    longer, wanted = pad_batch(ids, labels, 16, token=7)
    assert longer.shape == wanted.shape == (2, 64)
    assert torch.equal(longer[:, :50], ids) and (longer[:, 50:] == 7).all()
    assert torch.equal(wanted[:, :50], labels) and (wanted[:, 50:] == -100).all()
    assert pad_batch(ids, labels, 25, token=7)[0] is not None and pad_batch(ids, labels, 25, 7)[0].shape == (2, 50)


def shards_of_loss(split, tokens=None, empty=None, dtype=torch.float64):
    """(loss, gradient of the logits) of every rank, and those of the whole sequence."""
    ids, labels = batch(split.tokens)
    if empty is not None:  # a rank none of whose tokens has a label
        labels[:, (split.positions(empty) + 1).clamp(max=split.tokens - 1)] = -100
    logits = torch.randn(2, split.tokens, WORDS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = logits.to(dtype)
    whole = logits.clone().requires_grad_()
    wanted = cross_entropy(whole[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(),
                           reduction="mean" if tokens is None else "sum") / (tokens or 1)
    wanted.backward()
    parts = [split.shard(logits, rank, 1).requires_grad_() for rank in range(split.ranks)]
    targets = [shard_batch(ids, labels, split, rank)[1] for rank in range(split.ranks)]
    sums = []  # a first pass stands for the exchange: what every rank would have added
    for part, target in zip(parts, targets):
        shared_mean_loss(part, target, lambda x: (sums.append(x.clone()), x)[1], 1.0)
    total = torch.stack(sums).sum(0)
    losses = [shared_mean_loss(part, target, lambda x: x.copy_(total), 3.0, tokens)
              for part, target in zip(parts, targets)]
    for loss in losses:
        loss.backward()
    return losses, split.join([part.grad for part in parts], 1), wanted, whole.grad


@pytest.mark.parametrize("tokens, empty", [(None, None), (40, None), (None, 0), (None, 1)])
def test_loss_and_gradients_are_those_of_the_whole_sequence(tokens, empty):
    losses, grad, wanted, wanted_grad = shards_of_loss(Layout("zigzag", 2, 32, 4), tokens, empty)
    for loss in losses:
        torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, 3 * wanted_grad)  # the weight, for whoever divides by it


def test_losses_of_many_tokens_are_summed_in_parts(monkeypatch):
    seen = []
    import muse_dist.sequence_loss as module

    part_loss = module._part_loss
    monkeypatch.setattr(module, "_part_loss", lambda x, y: (seen.append(len(x)), part_loss(x, y))[1])
    losses, grad, wanted, wanted_grad = shards_of_loss(Layout("contiguous", 1, LOSS_ROWS, 64))
    assert max(seen) == LOSS_ROWS and len(seen) > 2
    torch.testing.assert_close(losses[0], wanted)
    torch.testing.assert_close(grad, 3 * wanted_grad)


def test_bf16_logits_lose_nothing_more():
    losses, grad, wanted, wanted_grad = shards_of_loss(Layout("zigzag", 2, 64, 8), dtype=torch.bfloat16)
    assert losses[0].dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert losses[0].item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(grad.float(), 3 * wanted_grad.float(), rtol=2e-2, atol=1e-6)


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 8, WORDS, requires_grad=True)
    loss = shared_mean_loss(logits, torch.full((1, 8), -100), lambda x: x, 1.0)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"logits \[1, 8, 11\] and labels \[1, 9\]"):
        shared_mean_loss(torch.randn(1, 8, WORDS), torch.zeros(1, 9, dtype=torch.long), lambda x: x, 1.0)
