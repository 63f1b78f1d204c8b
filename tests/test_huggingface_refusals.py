"""`attn_implementation="muse"`: what it cannot serve it refuses."""
from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import create_chunked_causal_mask

from muse_dist.huggingface import register
from tests.huggingface_models import BOTH_SIDES, CONFIG, SHAPE, build, close, ids, register_both


@pytest.fixture(autouse=True)
def registered():
    register_both()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padded", [slice(0, 3), slice(97, 100)])
def test_padding_is_refused(padded, use_cache):
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, padded] = 0
    with pytest.raises(ValueError, match="labels of the padding to -100"):
        build()(ids(100, batch=2), attention_mask=mask, use_cache=use_cache)
    with pytest.raises(ValueError, match="prompts of one length"):
        build().generate(ids(100, batch=2), attention_mask=mask, max_new_tokens=2, pad_token_id=0)


def test_right_padding_without_a_mask_changes_no_real_token():
    model, tokens = build(attention="muse-wide"), ids(100)
    padded = F.pad(tokens, (0, 28))
    assert close(model(padded).logits[:, :100], model(tokens).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_positions_are_refused(use_cache):
    positions = torch.arange(50).repeat(2)[None]
    with pytest.raises(ValueError, match="packed sequences"):
        build()(ids(100), position_ids=positions, use_cache=use_cache)
    assert build()(ids(100), position_ids=torch.arange(100)[None] + 7, use_cache=use_cache).logits.isfinite().all()


def test_packed_lengths_are_refused():
    lengths = torch.tensor([0, 50, 100], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q.*packed"):
        build()(ids(100), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=50, max_length_k=50)


@pytest.mark.parametrize("tokens", [64, 100])
def test_sliding_windows_are_refused(tokens):
    with pytest.raises(ValueError, match=r"sliding window.*64"):
        build(MistralForCausalLM, MistralConfig, sliding_window=64)(ids(tokens))
    with pytest.raises(ValueError, match=r"sliding window.*64"):
        build(Qwen3ForCausalLM, Qwen3Config, head_dim=32, use_sliding_window=True, sliding_window=64,
              layer_types=["full_attention", "sliding_attention"])(ids(tokens))


def test_a_layer_with_a_window_is_refused_where_its_model_makes_no_window_mask():
    layer = build().model.layers[0].self_attn
    q, k = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    with pytest.raises(ValueError, match=r"sliding_window=64"):
        call(layer, q, k, sliding_window=64)
    assert call(layer, q, k, sliding_window=65).shape == (1, 64, 4, 16)


def test_chunked_attention_is_refused():
    config = LlamaConfig(**SHAPE, attn_implementation="muse")
    config.attention_chunk_size = 32
    embeddings = torch.zeros(1, 100, 64)
    with pytest.raises(ValueError, match="chunks of 32"):
        create_chunked_causal_mask(config, embeddings, None, None)
    assert create_chunked_causal_mask(config, embeddings[:, :30], None, None) is None


def test_soft_caps_are_refused():
    model = build(Gemma2ForCausalLM, Gemma2Config, head_dim=16, attn_logit_softcapping=50.0)
    with pytest.raises(ValueError, match="softcap"):
        model(ids(100))


def test_learned_sinks_are_refused():
    model = build(GptOssForCausalLM, GptOssConfig, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
                  layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    with pytest.raises(ValueError, match=r"s_aux.*sinks"):
        model(ids(100))


def test_dropout_is_refused_in_training_only():
    model = build(attention_dropout=0.1)
    assert model(ids(100)).logits.isfinite().all()
    with pytest.raises(ValueError, match="attention_dropout=0"):
        model.train()(ids(100))


def test_custom_masks_are_refused():
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"\[1, 1, 100, 100\].*custom masks"):
        build()(ids(100), attention_mask=mask)


def test_mask_shorter_than_the_tokens_is_refused():
    with pytest.raises(ValueError, match="shorter than the 100 tokens"):
        build()(ids(100), attention_mask=torch.ones(1, 60, dtype=torch.long), past_key_values=DynamicCache())


def test_other_causality_is_refused():
    register(BOTH_SIDES, "muse-both-sides")
    with pytest.raises(ValueError, match="causal=False"):
        build(attention="muse-both-sides")(ids(100))
    with pytest.raises(ValueError, match="causal=True"):
        build(BertModel, BertConfig)(ids(100))
    layer = build().model.layers[0].self_attn
    with pytest.raises(ValueError, match="is_causal=False"):  # where no mask function is asked, the layer still is
        call(layer, torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16), is_causal=False)


def test_cross_attention_is_refused():
    register(BOTH_SIDES, "muse-both-sides")
    layer = types.SimpleNamespace(is_causal=False)
    with pytest.raises(ValueError, match="cross attention of 20 queries to 30 keys"):
        call(layer, torch.randn(1, 4, 20, 16), torch.randn(1, 2, 30, 16), name="muse-both-sides")


def call(layer, q, k, name: str = "muse", **options):
    from transformers import AttentionInterface

    return AttentionInterface()[name](layer, q, k, k, None, scaling=0.25, **options)[0]


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "", "kernels/muse", "my-flash"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="name="):
        register(CONFIG, name)


def test_config_must_be_one():
    with pytest.raises(TypeError, match="config must be a MuseConfig, not dict"):
        register({"block": 64})
