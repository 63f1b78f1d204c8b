"""Who holds which tokens and blocks, and what ranks need of each other, counted a second time token by token."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from muse_dist import MuseConfig
from muse_dist.layout import (
    Layout,
    block_count,
    chunk_pairs,
    halo_blocks,
    is_far,
    is_near,
    near_pairs,
    needs_sinks,
)

NAMES = st.sampled_from(["contiguous", "zigzag"])


@st.composite
def layouts(draw):
    name, ranks = draw(NAMES), draw(st.integers(1, 6))
    block, blocks = draw(st.sampled_from([1, 2, 4, 6])), draw(st.integers(1, 3))
    return Layout(name, ranks, ranks * (2 if name == "zigzag" else 1) * blocks * block, block)


def config(block, **changes):
    return MuseConfig(block=block, leaf=block, group=block, remote_leaf=block, anchors=1, **changes)


configs = st.builds(dict, halo=st.integers(0, 4), causal=st.booleans(), sinks=st.integers(0, 1))


def test_contiguous_ranks_hold_their_part():
    layout = Layout("contiguous", 3, 24, 4)
    assert [layout.positions(r).tolist() for r in range(3)] == [list(range(8 * r, 8 * r + 8)) for r in range(3)]
    assert [layout.blocks_of(r) for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert (layout.chunks, layout.chunk_blocks, layout.chunks_per_rank) == (3, 2, 1)


def test_zigzag_ranks_hold_chunk_r_and_its_mirror():
    layout = Layout("zigzag", 3, 12, 2)
    assert [layout.chunks_of(r) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [layout.owner(c) for c in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [layout.positions(r).tolist() for r in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert layout.positions(0).dtype == torch.int64


@given(layouts())
@settings(deadline=None, max_examples=60)
def test_every_token_has_one_owner(layout):
    held = [layout.positions(rank).tolist() for rank in range(layout.ranks)]
    assert sorted(sum(held, [])) == list(range(layout.tokens))
    for rank, tokens in enumerate(held):
        assert len(tokens) == layout.tokens // layout.ranks
        blocks = layout.blocks_of(rank)
        assert [t // layout.block for t in tokens[::layout.block]] == blocks
        assert all(layout.block_owner(j) == rank for j in blocks)
        assert blocks == sum((layout.blocks_of_chunk(chunk) for chunk in layout.chunks_of(rank)), [])
        assert all(layout.owner(chunk) == rank for chunk in layout.chunks_of(rank))


@given(layouts(), st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_join_is_the_inverse_of_shard(layout, dim):
    shape = [2, 3, 2]
    shape[dim] = layout.tokens
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = [layout.shard(x, rank, dim) for rank in range(layout.ranks)]
    assert torch.equal(layout.join(shards, dim), x)
    assert torch.equal(layout.join([s.movedim(dim, -1) for s in shards], -1), x.movedim(dim, -1))
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, x.index_select(dim, layout.positions(rank)))


@given(layouts())
@settings(deadline=None, max_examples=30)
def test_join_and_shard_take_entries_of_blocks(layout):
    """Any dimension that the chunks divide: here one entry a block."""
    x = torch.arange(layout.tokens // layout.block)[None]
    shards = [layout.shard(x, rank, 1) for rank in range(layout.ranks)]
    assert [shard[0].tolist() for shard in shards] == [layout.blocks_of(rank) for rank in range(layout.ranks)]
    assert torch.equal(layout.join(shards, 1), x)


class OnlyCopies(TorchDispatchMode):
    """Refuses what makes or reads indices: on a GPU those would come from the host, which waits to copy them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func in (torch.ops.aten.split.Tensor, torch.ops.aten.cat.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_join_and_shard_need_no_indices(name):
    layout, x = Layout(name, 2, 16, 2), torch.randn(3, 16)
    with OnlyCopies():
        layout.join([layout.shard(x, rank, 1) for rank in range(2)], 1)


def test_join_and_shard_are_differentiable():
    layout = Layout("zigzag", 2, 16, 2)
    x = torch.randn(1, 16, 3, dtype=torch.float64, requires_grad=True)
    y = layout.join([(rank + 1) * layout.shard(x, rank, 1) for rank in range(2)], 1)
    y.sum().backward()
    want = torch.empty(16, dtype=torch.float64)
    for rank in range(2):
        want[layout.positions(rank)] = rank + 1.0
    assert torch.equal(x.grad, want[None, :, None].expand(1, 16, 3))


@given(st.integers(0, 20), st.integers(0, 20), configs)
def test_near_and_far_share_out_what_is_visible(i, j, changes):
    """A pair of blocks is near, far, or later in the sequence; near means within `halo` blocks."""
    c = config(4, **changes)
    visible = j <= i or not c.causal
    assert is_near(i, j, c) + is_far(i, j, c) == visible
    assert is_near(i, j, c) == (visible and abs(i - j) <= c.halo)


@given(layouts(), configs)
@settings(deadline=None, max_examples=60)
def test_near_pairs_and_halo_cover_what_is_read_exactly(layout, changes):
    c, blocks = config(layout.block, **changes), range(layout.tokens // layout.block)
    for rank in range(layout.ranks):
        mine, halo = layout.blocks_of(rank), list(halo_blocks(layout, rank, c))
        assert halo == sorted(set(halo)) and not set(halo) & set(mine)
        found = set()
        for keys in (mine, halo):
            for i, j, diagonal in near_pairs(mine, keys, c):
                assert diagonal == (c.causal and mine[i] == keys[j])
                found.add((mine[i], keys[j]))
        assert found == {(i, j) for i in mine for j in blocks if is_near(i, j, c)}
        assert {j for _, j in found} >= set(halo), "a halo block that nobody reads"


@given(layouts(), configs)
@settings(deadline=None, max_examples=60)
def test_moments_sent_cover_all_far_pairs_of_other_ranks(layout, changes):
    c, size = config(layout.block, **changes), layout.chunk_blocks
    for target in range(layout.ranks):
        mine = layout.blocks_of(target)
        far = {(i // size, j // size) for i in mine for j in range(layout.chunks * size)
               if is_far(i, j, c) and layout.block_owner(j) != target}
        found = [(theirs, mine) for source in range(layout.ranks)
                 for mine, theirs in chunk_pairs(layout, source, target, c)]
        assert set(found) == far and len(found) == len(far)
        for source in range(layout.ranks):
            pairs = chunk_pairs(layout, source, target, c)
            assert all(layout.owner(a) == source and layout.owner(b) == target for a, b in pairs)
        sinks = c.sinks > 0 and layout.block_owner(0) != target and any(is_far(i, 0, c) for i in mine)
        assert needs_sinks(layout, target, c) == sinks


def test_under_zigzag_the_halo_is_not_always_the_neighbours():
    """Rank 1 of 4 holds chunks 1 and 6: their halo blocks are those of chunk 0 (rank 0) and chunk 5 (rank 2)."""
    layout = Layout("zigzag", 4, 16, 2)
    assert list(halo_blocks(layout, 1, config(2))) == [0, 5]
    assert [layout.block_owner(j) for j in (0, 5)] == [0, 2]
    assert list(halo_blocks(layout, 3, config(2))) == [2]  # chunk 4 reads chunk 3, which is its own
    assert list(halo_blocks(layout, 0, config(2, causal=False))) == [1, 6]


@pytest.mark.parametrize("tokens", [12, 4, 0, -16, 23])
def test_tokens_that_make_no_whole_blocks(tokens):
    with pytest.raises(ValueError, match=f"q: {tokens} tokens over 2 ranks.*blocks of 4.*4 zigzag.*multiple of 16"):
        Layout("zigzag", 2, tokens, 4)


def test_names_and_ranks_that_do_not_exist():
    with pytest.raises(ValueError, match="layout='ring': must be one of 'contiguous', 'zigzag'"):
        Layout("ring", 2, 16, 4)
    with pytest.raises(ValueError, match="0 ranks"):
        Layout("contiguous", 0, 16, 4)


@given(st.integers(0, 100), st.integers(1, 20))
def test_block_count(tokens, block):
    assert block_count(tokens, block) == len(range(0, tokens, block))
