"""`attn_implementation="muse"`: what it serves is exact or MuSe."""
from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from muse_dist import muse_attention
from muse_dist.huggingface import register
from tests.huggingface_models import BLOCK, BOTH_SIDES, CONFIG, WIDE, build, close, ids, register_both, with_attention


@pytest.fixture(autouse=True)
def registered():
    register_both()


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
