"""`attn_implementation="muse"`: what it serves is exact or MuSe, what it cannot serve it refuses."""
from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import create_chunked_causal_mask

from muse_dist import MuseConfig, muse_attention
from muse_dist.huggingface import register

SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 4096}
BLOCK = 32
CONFIG = MuseConfig(block=BLOCK, halo=0, leaf=8, group=8, remote_leaf=8, anchors=1, opened=1)
WIDE = MuseConfig(block=4096)  # every sequence of these tests is one block: exact
BOTH_SIDES = MuseConfig(block=64, anchors=1, causal=False)


def ids(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def build(kind=LlamaForCausalLM, config=LlamaConfig, attention: str = "muse", **changes):
    """A small decoder with weights large enough that its attention is far from uniform."""
    torch.manual_seed(0)
    model = kind(config(**{**SHAPE, **changes}, attn_implementation=attention))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return model.eval()


@pytest.fixture(autouse=True)
def registered():
    register(CONFIG)
    register(WIDE, "muse-wide")


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def with_attention(model, name: str):
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other


# ------------------------------------------------------------------------------------------------------ what is served


def test_a_sequence_in_one_block_is_exact_and_a_longer_one_is_muse():
    model = build()
    exact = with_attention(model, "sdpa")
    short, long = ids(BLOCK, batch=2), ids(150, batch=2)
    assert close(model(short).logits, exact(short).logits)
    assert not close(model(long).logits, exact(long).logits, 1e-3)
    assert close(with_attention(model, "muse-wide")(long).logits, exact(long).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_layers_hand_over_unrepeated_heads_and_the_config(use_cache):
    calls = []

    def spy(q, k, v, *, config, scale):
        calls.append((q.shape, k.shape, v.shape, config, scale))
        return muse_attention(q, k, v, config=config, scale=scale)

    register(CONFIG, "muse-spy", spy)
    logits = build(attention="muse-spy")(ids(100), use_cache=use_cache).logits
    assert calls == [((1, 4, 100, 16), (1, 2, 100, 16), (1, 2, 100, 16), CONFIG, 0.25)] * 2
    assert torch.equal(logits, build()(ids(100)).logits)


def test_registering_again_replaces_the_attention_of_a_loaded_model():
    model = build()
    before = model(ids(100)).logits
    register(WIDE)
    assert close(model(ids(100)).logits, with_attention(model, "sdpa")(ids(100)).logits)
    register(CONFIG)
    assert torch.equal(model(ids(100)).logits, before)


def test_qwen3_and_short_mistral_are_exact_in_one_block():
    for kind, config, changes in ((Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
                                  (MistralForCausalLM, MistralConfig, {"sliding_window": 64})):
        model = build(kind, config, "muse-wide", **changes)
        assert close(model(ids(60)).logits, with_attention(model, "sdpa")(ids(60)).logits)


def test_encoder_with_an_acausal_config():
    register(BOTH_SIDES, "muse-both-sides")
    encoder = build(BertModel, BertConfig, "muse-both-sides")
    tokens, ones = ids(50, batch=2), torch.ones(2, 50, dtype=torch.long)
    exact = with_attention(encoder, "sdpa")(tokens).last_hidden_state
    assert close(encoder(tokens).last_hidden_state, exact)
    assert close(encoder(tokens, attention_mask=ones).last_hidden_state, exact)


def test_mask_of_ones_is_accepted():
    model, tokens = build(), ids(100, batch=2)
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)).logits, model(tokens).logits)


def test_gradients_in_one_block_are_those_of_exact_attention():
    tokens = ids(100)
    grads = []
    for name in ("muse-wide", "sdpa"):
        model = build(attention=name).train()
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(close(a, b, 1e-4) for a, b in zip(*grads, strict=True))


def test_gradient_checkpointing_repeats_the_same_bits():
    tokens = ids(100)
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads[0])


def test_save_and_load(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="muse")
    assert loaded.config._attn_implementation == "muse"
    assert torch.equal(loaded(ids(100)).logits, model(ids(100)).logits)
    with pytest.raises(ValueError, match="not-registered"):
        LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="not-registered")


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("attention, small", [("muse", True), ("eager", False)])
def test_no_tensor_grows_with_the_square_of_the_length(attention, small):
    tokens = ids(1024)
    with torch.no_grad(), Largest() as largest:
        build(attention=attention)(tokens, attention_mask=torch.ones_like(tokens))
    assert (largest.numel < 1024 * 1024 / 4) == small


# -------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
@pytest.mark.parametrize("prompt", [1, 20])
def test_generate_in_one_block_equals_exact(options, prompt):
    model = build(attention="muse-wide")
    prompts = ids(prompt, batch=2)
    settings = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0,
                "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True, **options}
    ours, exact = model.generate(prompts, **settings), with_attention(model, "sdpa").generate(prompts, **settings)
    assert torch.equal(ours.sequences, exact.sequences)
    assert close(torch.stack(ours.logits), torch.stack(exact.logits), 1e-4)


@pytest.mark.parametrize("piece", [1, 5, BLOCK])
@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_on_a_cache_are_exact(piece, cache_type, masked):
    """The prompt is approximated, and the step after it is exact attention to the keys the prompt left."""
    model = build()
    tokens = ids(100 + piece, batch=2)
    cache = DynamicCache() if cache_type is DynamicCache else StaticCache(config=model.config, max_cache_len=160)
    ones = torch.ones_like(tokens) if masked else None
    with torch.no_grad():
        prompt = model(tokens[:, :100], past_key_values=cache, attention_mask=ones[:, :100] if masked else None).logits
        other = copy.deepcopy(cache)
        step = model(tokens[:, 100:], past_key_values=cache, attention_mask=ones).logits
        exact = with_attention(model, "sdpa")(tokens[:, 100:], past_key_values=other, attention_mask=ones).logits
        assert torch.equal(prompt, model(tokens[:, :100]).logits)
    assert close(step, exact)


def test_a_long_piece_on_a_cache_is_refused():
    model, tokens = build(), ids(200)
    cache = model(tokens[:, :100]).past_key_values
    with pytest.raises(ValueError, match=f"at most {BLOCK}.*pieces"):
        model(tokens[:, 100:], past_key_values=cache)


# ------------------------------------------------------------------------------------------------------------- refusals


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


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_layers(fresh_compiler):
    tokens = ids(100)
    plain, compiled = build(), build()
    for layer in compiled.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert close(compiled(tokens, use_cache=False).logits, plain(tokens).logits)
    with pytest.raises(RuntimeError, match="packed sequences"):
        compiled(tokens, position_ids=torch.arange(50).repeat(2)[None])


def test_compiled_model(fresh_compiler):
    tokens = ids(100)
    expected = build()(tokens).logits
    model = torch.compile(build(), backend="eager")
    assert close(model(tokens).logits, expected)
    assert close(model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits, expected)
    with pytest.raises(ValueError, match=r"under torch.compile|packed sequences"):
        model(tokens, use_cache=False)
