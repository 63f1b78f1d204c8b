"""The exact attention that MuSe is compared with on Megatron: Megatron's own, on one rank and on several."""
import pytest
import torch

from muse_dist.layout import Layout
from tests.megatron_cpu import Case, cuda_as_cpu, transformer_config
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="needs pip install muse_dist[megatron]")

TOKENS, BATCH, HEADS, KV_HEADS, DIM = 48, 2, 4, 2, 8
RANKS = 2


def inputs():
    """q, k, v and the gradient of the output, of whole sequences: [N, B, heads, D], and [N, B, H * D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM), (HEADS * DIM,))
    return [torch.randn(TOKENS, BATCH, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def places(rank, ranks):
    return torch.arange(TOKENS) if ranks == 1 else Layout("zigzag", ranks, TOKENS, 1).positions(rank)


def attend(core, rank, ranks):
    """The output of this rank's tokens and the gradients of its q, k and v."""
    from megatron.core.transformer.enums import AttnMaskType

    *leaves, dout = (x[places(rank, ranks)] for x in inputs())
    leaves = [x.requires_grad_() for x in leaves]
    out = core(*leaves, None, attn_mask_type=AttnMaskType.causal)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def exact(scale):
    """launch.megatron_bench's attention on the ranks of this world, and on one of them Megatron's own."""
    import torch.distributed as dist
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from launch.megatron_exact import ExactCoreAttention

    rank, ranks = dist.get_rank(), dist.get_world_size()
    with cuda_as_cpu():
        state.initialize_model_parallel(context_parallel_size=ranks)
        model_parallel_cuda_manual_seed(1)
        config = transformer_config(Case(None, cp=ranks), masked_softmax_fusion=False)
        arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self",
                     "softmax_scale": scale}
        kinds = (ExactCoreAttention, DotProductAttention) if ranks == 1 else (ExactCoreAttention,)
        return [attend(kind(config=config, **arguments), rank, ranks) for kind in kinds]


@pytest.mark.parametrize("scale", [None, 0.2])
def test_it_is_megatrons_own_attention_on_one_rank_and_the_same_on_two(scale):
    (one, own), = run_ranks(1, exact, scale)
    for found, wanted in zip(one, own, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for rank, (found,) in enumerate(run_ranks(RANKS, exact, scale)):
        for mine, whole in zip(found, one, strict=True):
            torch.testing.assert_close(mine, whole[places(rank, RANKS)], rtol=1e-10, atol=1e-12)
