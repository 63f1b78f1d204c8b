"""MuSe in Megatron-core's layer specs, what it refuses there, and the exact attention it is compared with."""
import argparse
import dataclasses
import warnings

import pytest
import torch

from muse_dist import MuseConfig
from muse_dist.attention import muse_attention
from muse_dist.layout import Layout
from muse_dist.megatron_patch.options import Choice
from tests.megatron_cpu import TOKENS, Case, build_gpt, cuda_as_cpu, transformer_config
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="needs pip install muse_dist[megatron]")

CONFIG = MuseConfig(block=16, leaf=4, group=8, anchors=2, remote_leaf=4, opened=2)
CASE = Case(CONFIG)


def core_attention(model=(), **changes):
    """A core attention as Megatron's self-attention builds it, on one rank, in a model with other settings `model`."""
    from megatron.core.transformer.enums import AttnMaskType

    from muse_dist.megatron_patch.core_attention import MuseCoreAttention

    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self",
                 "cp_comm_type": None, "softmax_scale": None, "muse": CONFIG, "pg_collection": None}
    config = transformer_config(CASE)
    for name, value in dict(model).items():
        setattr(config, name, value)  # past Megatron's own checks
    return MuseCoreAttention(config, **arguments | changes)


def heads(count=4, tokens=64):
    """[S, B, H, D], a view as Megatron's split of one projection is."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(tokens, 2, count, 16, generator=generator, dtype=torch.float64)[..., :8]


def test_shapes_heads_and_scale():
    query, key, value = heads(4), heads(2), heads(2) + 1
    for scale in (None, 0.3):
        out = core_attention(softmax_scale=scale)(query, key, value, None)
        wanted = muse_attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), config=CONFIG, scale=scale)
        assert torch.equal(out, wanted.permute(2, 0, 1, 3).reshape(64, 2, 32)), scale


def test_every_problem_of_a_model_in_one_message():
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    bad = {"attention_dropout": 0.1, "window_size": (8, 0), "softmax_type": "learnable", "multi_latent_attention": True,
           "fp8_dot_product_attention": True, "fp8_multi_head_attention": True, "enable_cuda_graph": True,
           "external_cuda_graph": True, "cuda_graph_impl": "local", "qk_clip": True, "log_max_attention_logit": True,
           "flash_decode": True, "attention_backend": AttnBackend.local, "experimental_attention_variant": "dsa"}
    config = transformer_config(CASE)
    bad = {name: value for name, value in bad.items() if hasattr(config, name)}
    assert len(bad) >= 9  # 0.13 has so many of them
    with pytest.raises(ValueError) as error:
        core_attention(bad, attn_mask_type=AttnMaskType.padding, muse=dataclasses.replace(CONFIG, causal=False))
    lines = str(error.value).splitlines()[1:]
    for name in bad:
        assert any(line.startswith(f"  - {name}=") and ";" in line for line in lines), name
    assert any("padding" in line for line in lines)
    assert any("--no-muse-causal" in line for line in lines)
    assert len(lines) == len(bad) + 2
    core_attention()  # none of these is set by default


def test_cross_attention_is_refused():
    with pytest.raises(ValueError, match="cross attention"):
        core_attention(attention_type="cross")


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"attention_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool)}, "--no-create-attention-mask-in-dataloader"),
    ({"attention_bias": torch.ones(1)}, "attention_bias"),
    ({"packed_seq_params": object()}, "packed_seq_params"),
    ({"query": heads(4, 1)}, "1 queries and 64 keys, as in inference with a cache"),
    ({"attn_mask_type": "no_mask"}, "attn_mask_type=no_mask"),
])
def test_calls_that_are_not_plain_causal_attention(changes, wanted):
    from megatron.core.transformer.enums import AttnMaskType

    if "attn_mask_type" in changes:
        changes = {"attn_mask_type": AttnMaskType[changes["attn_mask_type"]]}
    arguments = {"query": heads(4), "key": heads(2), "value": heads(2), "attention_mask": None} | changes
    with pytest.raises(ValueError, match=wanted):
        core_attention()(**arguments)


def test_how_exact_attention_communicates_is_not_passed_over_in_silence():
    with pytest.warns(UserWarning, match="cp_comm_type='a2a'"):
        core_attention(cp_comm_type="a2a")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        core_attention(cp_comm_type="p2p")
    assert not any("cp_comm_type" in str(warning.message) for warning in said)


def test_arguments_of_an_unknown_version_are_refused():
    from muse_dist.megatron_patch.versions import context_parallel_group

    group = object()
    for name in ("pg_collection", "model_comm_pgs"):
        assert context_parallel_group({name: argparse.Namespace(cp=group)}) is group
    with pytest.raises(TypeError, match="new_thing"):
        context_parallel_group({"pg_collection": None, "new_thing": 1})


def test_a_spec_is_copied_and_its_layers_chosen():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from muse_dist.megatron_patch.spec import use_muse

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    exact = spec.submodules.self_attention.submodules.core_attention
    changed = use_muse(spec, CONFIG, layers=range(2, 4))
    assert spec.submodules.self_attention.submodules.core_attention is exact
    assert changed.submodules.self_attention.submodules.core_attention is not exact
    assert changed.submodules.mlp is spec.submodules.mlp
    with pytest.raises(ValueError, match="MuSe already"):
        use_muse(changed, CONFIG)
    with pytest.raises(TypeError, match="self_attention"):
        use_muse(spec.submodules.self_attention, CONFIG)
    with pytest.raises(TypeError, match="config"):
        use_muse(spec, {"block": 16})
    for layers in ([], [0], [1.0], ["1"]):
        with pytest.raises(ValueError, match="layers"):
            use_muse(spec, CONFIG, layers)


def kinds_of_attention():
    """Class names of the core attentions of models built in the ways there are."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from muse_dist.megatron_patch.spec import layer_spec, muse_layer_spec, use_muse

    def kinds(model):
        return [type(layer.self_attention.core_attention).__name__ for layer in model.decoder.layers]

    with cuda_as_cpu():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        local = {"num_layers": 4}
        if hasattr(transformer_config(CASE), "transformer_impl"):
            local["transformer_impl"] = "local"
        config = transformer_config(CASE, **local)
        chosen = build_gpt(dataclasses.replace(CASE, layers=frozenset({2, 3})), config)
        found = {"chosen": kinds(chosen), "exact": kinds(build_gpt(Case(None), config))}
        keys = {name: sorted(build_gpt(case, config).state_dict()) for name, case in
                (("muse", CASE), ("exact", Case(None)))}
        mixed = transformer_config(CASE, **local, num_moe_experts=2, moe_layer_freq=2)
        block = get_gpt_decoder_block_spec(mixed, use_transformer_engine=False, normalization="RMSNorm")
        found["block"] = kinds(GPTModel(mixed, use_muse(block, CONFIG), 64, TOKENS, position_embedding_type="rope"))
        if hasattr(config, "transformer_impl"):  # before, Megatron-LM's own options say it
            small = layer_spec(CONFIG, layers=[1])
            found["spec"] = kinds(GPTModel(config, small, 64, TOKENS, position_embedding_type="rope"))
            model = GPTModel(config, muse_layer_spec, 64, TOKENS, position_embedding_type="rope")
            found["default"] = kinds(model)
            assert model.decoder.layers[0].self_attention.core_attention.muse == MuseConfig()
            try:
                GPTModel(mixed, muse_layer_spec, 64, TOKENS)
            except ValueError as error:
                found["mixed"] = str(error)
        tokens = torch.arange(64)[None] % 7
        logits = chosen.double()(tokens, tokens, None)
        parallel_state.destroy_model_parallel()
    return found, keys, logits.shape


def test_models_built_from_specs():
    (found, keys, shape), = run_ranks(1, kinds_of_attention)
    muse, exact = "MuseCoreAttention", "DotProductAttention"
    assert found["chosen"] == [exact, muse, muse, exact]
    assert found["exact"] == [exact] * 4
    assert found["block"] == [muse] * 4
    assert keys["muse"] == keys["exact"], "checkpoints of the two are the same"
    assert shape == (1, 64, 64)
    if "spec" in found:
        assert found["spec"] == [muse, exact, exact, exact]
        assert found["default"] == [muse] * 4
        assert "moe_layer_freq" in found["mixed"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_gathered_shards_are_put_in_order(ranks):
    from launch.megatron_exact import in_order

    layout = Layout("zigzag", ranks, 48, 3)
    whole = torch.arange(96).view(48, 2)
    assert torch.equal(in_order(torch.cat([layout.shard(whole, rank, 0) for rank in range(ranks)]), ranks), whole)


def bench(names):
    """launch.megatron_bench at a toy size on two ranks that share every sequence."""
    from megatron.core import parallel_state

    from launch.megatron_bench import train

    options = argparse.Namespace(
        tokens=256, layers=2, width=32, mlp=64, heads=4, kv_heads=2, batch=2, steps=3, seed=0, context_parallel=2,
        lr=1e-2, recompute="full", fp32=True, verbose=False, data="", seconds=None)
    near = MuseConfig(block=16, leaf=4, group=8, anchors=2, remote_leaf=4, halo=15, exchange="kv")
    choices = {"exact": None, "near": Choice(near, None), "muse": Choice(CONFIG, None)}
    with cuda_as_cpu():
        parallel_state.initialize_model_parallel(context_parallel_size=2)
        found = {name: train(options, choices[name]) for name in names}
        options.steps, options.seconds = 5, 0.0 if torch.distributed.get_rank() else 1000.0
        return found | {"late": train(options, None)}


def test_the_benchmark_compares_muse_with_exact_attention():
    found = run_ranks(2, bench, ("exact", "near", "muse"))[0]
    for name in ("loss", "grad_norm"):
        assert found["near"][name] == pytest.approx(found["exact"][name], rel=1e-4)
    assert found["muse"]["loss"][1:] != pytest.approx(found["exact"]["loss"][1:], rel=1e-6)
    assert found["muse"]["loss"] == pytest.approx(found["exact"]["loss"], rel=0.05)
    assert found["muse"]["loss"][-1] < found["muse"]["loss"][0]
    assert all(len(row["seconds"]) == 3 and row["parameters"] > 0 for row in found.values()), "one rank's time was over"


@pytest.mark.parametrize(("changes", "choice", "wanted"), [
    ({"context_parallel": 3}, None, "--context-parallel 3 must divide the 4 processes"),
    ({"batch": 1}, None, "--batch 1 must be a multiple of the 2 groups"),
    ({"steps": 0}, None, "--steps 0: must be at least 1"),
    ({"timeout_minutes": 0}, None, "--timeout-minutes 0: must be at least 1"),
    ({"tokens": 72}, Choice(CONFIG, None), "--tokens: 72 tokens over 2 ranks do not make whole blocks of 16"),
    ({"tokens": 72}, None, None),
])
def test_sizes_of_the_benchmark_that_do_not_divide(changes, choice, wanted):
    from launch.megatron_bench import check_sizes

    options = argparse.Namespace(**{"context_parallel": 2, "batch": 2, "steps": 1, "tokens": 64, "timeout_minutes": 1}
                                 | changes)
    if wanted is None:
        return check_sizes(options, 4, choice)
    with pytest.raises(ValueError, match=wanted):
        check_sizes(options, 4, choice)
