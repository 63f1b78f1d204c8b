"""Inference with Megatron-core's caches: refused in layers with MuSe, exact where Megatron never asks for them."""
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from muse_dist import MuseConfig
from muse_dist.megatron_patch.options import Choice
from tests.megatron_cpu import Case, build_gpt, cuda_as_cpu, transformer_config
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="needs pip install muse_dist[megatron]")

CONFIG = MuseConfig(block=16, leaf=4, group=8, anchors=2, remote_leaf=4, opened=2)
TOKENS = 64


def told(model, tokens, **options):
    try:
        model(tokens, tokens, None, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def use_a_cache():
    """What models with MuSe everywhere, in one layer and nowhere say to a prompt for a cache, and to none."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.transformer.attention import SelfAttention

    from muse_dist.megatron_patch.__main__ import _build_with
    from muse_dist.megatron_patch.core_attention import MuseCoreAttention

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    launched = mock.patch.object(SelfAttention, "__init__", _build_with(SelfAttention.__init__, Choice(CONFIG, None)))
    tokens = torch.arange(TOKENS)[None] % 7
    said, kinds = {}, {}
    for name, muse, layers, place in (
            ("all", CONFIG, None, nullcontext()), ("second", CONFIG, frozenset({2}), nullcontext()),
            ("launched", None, None, launched), ("exact", None, None, nullcontext())):
        case = Case(muse, layers=layers, dtype=torch.float32)
        with place:
            model = build_gpt(case, transformer_config(case)).eval()
        kinds[name] = [isinstance(layer.self_attention.core_attention, MuseCoreAttention)
                       for layer in model.decoder.layers]
        with torch.no_grad():
            cache = StaticInferenceContext(1, 2 * TOKENS)
            said[name] = told(model, tokens, inference_context=cache, runtime_gather_output=True)
            said[f"{name} without"] = told(model, tokens)
        said[f"{name} in training"] = told(model.train(), tokens)
    parallel_state.destroy_model_parallel()
    return said, kinds


def on_a_cpu():
    with cuda_as_cpu():
        return use_a_cache()


def test_a_prompt_for_a_cache_is_refused():
    (said, kinds), = run_ranks(1, on_a_cpu)
    assert kinds == {"all": [True, True], "second": [False, True], "launched": [True, True], "exact": [False, False]}
    for name, text in said.items():
        if name in ("all", "second", "launched"):
            assert text.startswith("inference_context: MuSe would approximate the prompt"), (name, text)
            assert "generate with the exact layer spec, whose checkpoints are the same" in text
        else:
            assert text == "nothing", (name, text)
