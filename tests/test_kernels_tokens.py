"""Copies between tokens and the sorted rows of blocks: the kernels and their plain twins against indexing by hand."""
import pytest
import torch

from muse_dist.kernels import plain_blocks, triton_tokens

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BOTH = pytest.mark.parametrize("ops", [triton_tokens, plain_blocks], ids=["triton", "plain"])
# Key/value heads, heads each, blocks, tokens a block, tokens missing in the last block.
SHAPES = pytest.mark.parametrize("shape", [(2, 1, 3, 8, 0), (1, 3, 2, 20, 7), (2, 2, 1, 40, 39)], ids=str)
DTYPES = pytest.mark.parametrize("dtype, dim", [
    (torch.float32, 1), (torch.float16, 24), (torch.bfloat16, 64), (torch.float32, 256)], ids=str)


def case(shape, dtype, dim, batch=2):
    """Tokens x [B, K, G, N, D], orders of every block's rows, the head and token that stand at each sorted place."""
    kv_heads, heads, blocks, block, missing = shape
    generator = torch.Generator().manual_seed(dim + block)
    x = torch.randn(batch, kv_heads, heads, blocks * block - missing, dim, generator=generator).to(DEVICE, dtype)
    order = torch.rand(batch, kv_heads, blocks, heads * block, generator=generator).argsort(-1).to(DEVICE)
    place = torch.arange(blocks, device=DEVICE)[:, None] * block + order % block
    return x, order, order // block, place


@BOTH
@SHAPES
@DTYPES
def test_tokens_are_gathered_scattered_and_added(ops, shape, dtype, dim):
    x, order, head, place = case(shape, dtype, dim)
    batch, kv_heads, heads, tokens, _ = x.shape
    rows = ops.gather_tokens(x, order)
    exists = place < tokens
    b, k, *_ = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in order.shape), indexing="ij")
    want = x[b, k, head, place.clamp(max=tokens - 1)]
    assert rows.dtype == dtype and torch.equal(rows, torch.where(exists[..., None], want, 0.0))
    assert torch.equal(ops.scatter_tokens(rows, order, heads, tokens), x)
    if dtype != torch.bfloat16 or GPU:  # which the interpreter does not round to nearest
        total = torch.ones_like(x)
        ops.add_tokens(total, rows, order)
        assert torch.equal(total, x + 1)


@BOTH
def test_some_heads_of_longer_tensors(ops):
    """Slices of heads are read, and written where they stand; what is between them stays."""
    x, order, _, _ = case((4, 2, 2, 8, 3), torch.float32, 16)
    some = slice(1, 3)
    rows = ops.gather_tokens(x[:, some], order[:, some])
    assert torch.equal(rows, ops.gather_tokens(x, order)[:, some])
    assert torch.equal(ops.gather_tokens(x.transpose(0, 1).contiguous().transpose(0, 1), order),
                       ops.gather_tokens(x, order))
    total = x.clone()
    ops.add_tokens(total[:, some], rows, order[:, some])
    want = x.clone()
    want[:, some] *= 2
    assert torch.equal(total, want)


@BOTH
def test_some_blocks_of_longer_tensors(ops):
    """Slices of heads and tokens are read, and written where they stand; what is around them stays."""
    x, order, _, _ = case((4, 3, 5, 8, 0), torch.float32, 16)
    heads, blocks, tokens = slice(1, 3), slice(1, 4), slice(8, 32)
    rows = ops.gather_tokens(x[:, heads, :, tokens], order[:, heads, blocks])
    assert torch.equal(rows, ops.gather_tokens(x, order)[:, heads, blocks])
    total = torch.full_like(x, 7.0)
    ops.put_tokens(total[:, heads, :, tokens], rows, order[:, heads, blocks])
    want = torch.full_like(x, 7.0)
    want[:, heads, :, tokens] = x[:, heads, :, tokens]
    assert torch.equal(total, want)


@pytest.mark.skipif(not GPU, reason="needs the memory of a GPU")
def test_more_than_2_to_the_31_elements():
    tokens = 1 << 20
    x = torch.zeros(1, 1, 33, tokens, 64, dtype=torch.bfloat16, device=DEVICE)
    x[:, :, -1, :, 0] = torch.arange(tokens, device=DEVICE).remainder(256).bfloat16()
    order = torch.arange(33 * 4096 - 1, -1, -1, device=DEVICE).expand(1, 1, tokens // 4096, -1)
    rows = triton_tokens.gather_tokens(x, order)
    assert torch.equal(rows[0, 0, -1, :4096], x[0, 0, -1, -4096:].flip(0))
    assert torch.equal(triton_tokens.scatter_tokens(rows, order, 33, tokens), x)
