"""What MuSe cannot be combined with: every problem of a run, each with its fix, in one message."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from muse_dist.config import MuseConfig
from muse_dist.layout import Layout


class Rule(NamedTuple):
    """A setting of Megatron's that MuSe cannot serve for some values."""

    name: str  # of TransformerConfig, and where Megatron-LM has an option for it, of its parsed arguments
    bad: Callable[[Any], bool]
    problem: str
    fix: str


# Settings that a version of Megatron-core does not have are not set in it.
MODEL_RULES = (
    Rule("attention_dropout", lambda x: x > 0, "MuSe has no attention dropout",
         "pass --attention-dropout 0 (attention_dropout=0.0)"),
    Rule("window_size", lambda x: x is not None, "sliding windows are not served", "leave --window-size out"),
    Rule("softmax_type", lambda x: x != "vanilla", "sinks in the softmax are not served",
         "pass --softmax-type vanilla"),
    Rule("multi_latent_attention", bool, "MLA's keys and values are not served",
         "leave --multi-latent-attention out"),
    Rule("experimental_attention_variant", lambda x: x is not None, "it is another attention",
         "leave --experimental-attention-variant out"),
    Rule("fp8_dot_product_attention", bool, "FP8 attention is not served", "set fp8_dot_product_attention=False"),
    Rule("fp8_multi_head_attention", bool, "FP8 attention is not served", "set fp8_multi_head_attention=False"),
    Rule("enable_cuda_graph", bool, "ranks agree on their settings on the host, which graphs cannot record",
         "leave --enable-cuda-graph out; --muse-cuda-graphs records MuSe's own kernels"),
    Rule("external_cuda_graph", bool, "ranks agree on their settings on the host, which graphs cannot record",
         "leave --external-cuda-graph out; --muse-cuda-graphs records MuSe's own kernels"),
    Rule("cuda_graph_impl", lambda x: x not in (None, "none"),
         "ranks agree on their settings on the host, which graphs cannot record",
         "pass --cuda-graph-impl none; --muse-cuda-graphs records MuSe's own kernels"),
    Rule("qk_clip", bool, "the largest logit is never computed", "leave --qk-clip out"),
    Rule("log_max_attention_logit", bool, "the largest logit is never computed",
         "leave --log-max-attention-logit out"),
    Rule("flash_decode", bool, "it reads a cache past this layer, exactly", "leave --flash-decode out"),
    Rule("hybrid_context_parallel", bool, "ranks must share every sequence in the same way",
         "leave --hybrid-context-parallel out"),
    Rule("attention_backend", lambda x: getattr(x, "name", x) == "local",
         "it puts Megatron's own attention back in place", "leave --attention-backend out"),
    Rule("use_kitchen_attention", bool, "it is another attention", "leave --use-kitchen-attention out"),
)
# Options of Megatron-LM that no TransformerConfig knows of.
SCRIPT_RULES = (
    Rule("sft", bool, "packed sequences: MuSe would let one document read another", "leave --sft out"),
    Rule("reset_attention_mask", bool, "packed sequences: MuSe would let one document read another",
         "leave --reset-attention-mask out"),
    Rule("dataloader_inter_document_masking", bool, "packed sequences: MuSe would let one document read another",
         "leave --dataloader-inter-document-masking out"),
    Rule("perform_rl_step", bool, "packed sequences and inference with a cache are not served",
         "train with the exact attention"),
    Rule("create_attention_mask_in_dataloader", bool, "a mask of N x N bytes that MuSe does not read",
         "pass --no-create-attention-mask-in-dataloader"),
    Rule("transformer_impl", lambda x: x == "inference_optimized", "its layers are for inference with a cache",
         "pass --transformer-impl local or transformer_engine"),
    Rule("use_legacy_models", bool, "legacy models have no layer spec", "leave --use-legacy-models out"),
    Rule("yaml_cfg", lambda x: x is not None, "it replaces all options, --attention among them",
         "give the options on the command line"),
)


def config_problems(config: Any, muse: MuseConfig) -> list[str]:
    """Problems of a `TransformerConfig`, or of parsed arguments of the same names, with MuSe of these settings."""
    problems = _broken(MODEL_RULES, config)
    if not muse.causal:
        problems.append("causal=False: a GPT predicts the next token and must not see it; leave --no-muse-causal out")
    return problems


def argument_problems(args: Any, muse: MuseConfig, layers: frozenset[int] | None) -> list[str]:
    """Problems of Megatron-LM's parsed arguments; what a checkpoint has yet to fill in (None) is not looked at."""
    problems = config_problems(args, muse) + _broken(SCRIPT_RULES, args)
    ranks, tokens = getattr(args, "context_parallel_size", 1), getattr(args, "seq_length", None)
    if tokens is not None and ranks > 1:
        try:
            Layout("zigzag", ranks, tokens, muse.block)
        except ValueError as error:
            problems.append(f"--seq-length {tokens} with --context-parallel-size {ranks}: "
                            + str(error).removeprefix("q: "))
    if layers is not None:
        problems += _layer_problems(args, layers, ranks)
    return problems


def _layer_problems(args: Any, layers: frozenset[int], ranks: int) -> list[str]:
    problems, count = [], getattr(args, "num_layers", None)
    if count is not None and max(layers) > count:
        problems.append(f"--muse-layers: there is no layer {max(layers)}; --num-layers is {count}")
    if getattr(args, "mtp_num_layers", None):
        problems.append("--muse-layers with --mtp-num-layers: the layers that predict further tokens are numbered from "
                        "1 again; leave --muse-layers out")
    others = count is not None and not layers.issuperset(range(1, count + 1))
    if others and ranks > 1 and getattr(args, "transformer_impl", None) == "local":
        problems.append("--muse-layers with --context-parallel-size and --transformer-impl local: Megatron's own "
                        "attention of the other layers cannot share a sequence; leave --muse-layers out, or use "
                        "--transformer-impl transformer_engine")
    return problems


def _broken(rules: Iterable[Rule], settings: Any) -> list[str]:
    found = []
    for rule in rules:
        value = getattr(settings, rule.name, None)
        if value is not None and rule.bad(value):
            found.append(f"{rule.name}={getattr(value, 'name', value)}: {rule.problem}; {rule.fix}")
    return found


def refuse(problems: list[str]) -> None:
    """Raise ValueError with all `problems`, if there are any."""
    if problems:
        raise ValueError("MuSe cannot run like this:" + "".join(f"\n  - {problem}" for problem in problems))
