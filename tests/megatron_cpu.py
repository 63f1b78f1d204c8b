"""Megatron-core on CPU ranks: a shim for the places where it asks for CUDA, and a training loop of all its parts."""
from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from muse_dist import MuseConfig
from muse_dist.layout import Layout
from tests.megatron_checkpoints import restore, save

TOKENS, VOCABULARY, BATCH = 256, 64, 4
RATE = 1e-2


FACTORIES = ("arange", "empty", "full", "ones", "rand", "tensor", "zeros")


@contextlib.contextmanager
def cuda_as_cpu() -> Iterator[None]:
    """Let Megatron-core run on a machine without a GPU: what it asks of CUDA happens on the CPU.

    Functions are replaced one by one; a TorchFunctionMode would do it too, and slow every operation tenfold.
    """
    import megatron.core.tensor_parallel.random as megatron_random

    def same(tensor, *_, **__):
        return tensor

    def nothing(*_, **__):
        return None

    def state(*_, **__):
        return torch.get_rng_state()

    def set_state(value, *_, **__):
        torch.set_rng_state(value)

    replaced = {
        torch.cuda: {"current_device": lambda: torch.device("cpu"), "synchronize": nothing,
                     "current_stream": mock.MagicMock(), "stream": contextlib.nullcontext,
                     "reset_peak_memory_stats": nothing, "manual_seed": torch.manual_seed, "get_rng_state": state,
                     "set_rng_state": set_state},
        megatron_random: {"_get_cuda_rng_state": state, "_set_cuda_rng_state": set_state},
        torch: {name: _on_cpu(getattr(torch, name)) for name in FACTORIES},
        torch.Tensor: {"cuda": same, "pin_memory": same, "to": _on_cpu(torch.Tensor.to),
                       "type": _cuda_types(torch.Tensor.type)},
    }
    with contextlib.ExitStack() as stack:
        for place, functions in replaced.items():
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(place, name, function))
        _define_what_needs_transformer_engine(stack)
        yield


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every device that is CUDA's replaced, and no pinned memory."""
    def is_cuda(x: Any) -> bool:
        return str(x).split(":")[0] == "cuda" if isinstance(x, (str, torch.device)) else False

    def call(*args: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        args = tuple("cpu" if is_cuda(x) else x for x in args)
        return function(*args, **{name: "cpu" if is_cuda(x) else x for name, x in options.items()})

    return call


def _cuda_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type, which converts or says a name: the optimizer sorts by CUDA's names, and clips its fp32 only."""
    def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if args or options:
            return function(tensor, *args, **options)
        return f"torch.cuda.{'BFloat16' if tensor.dtype == torch.bfloat16 else 'Float'}Tensor"

    return call


def _define_what_needs_transformer_engine(stack: contextlib.ExitStack) -> None:
    """0.15 and 0.16 ask whether this name is None in their experts, but define it with Transformer Engine only."""
    from megatron.core.transformer.moe import moe_utils

    stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))


@contextlib.contextmanager
def full_cross_entropy() -> Iterator[None]:
    """Megatron rounds logits to fp32, with exact attention too: its tensor parallelism then changes losses by that."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    rounded = VocabParallelCrossEntropy.calculate_logits_max

    def calculate_logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (logits.clone(), logits.amax(-1)) if logits.dtype == torch.float64 else rounded(logits)

    with mock.patch.object(VocabParallelCrossEntropy, "calculate_logits_max", staticmethod(calculate_logits_max)):
        yield


@dataclass(frozen=True)
class Case:
    """One way to train the model for three steps. `muse` None: Megatron's own exact attention."""

    muse: MuseConfig | None
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vp: int | None = None
    layers: frozenset[int] | None = None
    masked: bool = False  # leave tokens out of the loss, most of them early in the sequence
    distributed_optimizer: bool = False
    dtype: torch.dtype = torch.float64
    model: dict[str, Any] = field(default_factory=dict)  # further settings of the TransformerConfig
    save: str | None = None  # folder for a checkpoint after the second step
    load: str | None = None  # folder of the checkpoint to go on from


@dataclass(frozen=True)
class Trained:
    """What a rank has after training: loss (None before the last stage) and gradient norm a step, its parameters."""

    history: list[tuple[float | None, float]]
    parameters: dict[str, tuple[torch.Tensor, int | None]]  # by name in the whole model; the dimension TP splits
    tp_rank: int


def train_cases(cases: dict[str, Case]) -> dict[str, Trained]:
    """Every case in turn, on the ranks of the running world."""
    with cuda_as_cpu(), full_cross_entropy():
        return {name: _train(case) for name, case in cases.items()}


def _train(case: Case) -> Trained:
    from megatron.core import parallel_state as state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    state.destroy_model_parallel()
    state.initialize_model_parallel(case.tp, case.pp, case.vp, context_parallel_size=case.cp)
    models, optimizer, schedule = build(case)
    steps = range(2, 3) if case.load else range(3)
    if case.load:
        restore(case.load, models, optimizer)
        schedule.step(increment=2)
    history = []
    for step in steps:
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        batches = _batches(case, step)
        parts = get_forward_backward_func()(
            forward_step_func=_forward, data_iterator=[iter(batches) for _ in models] if case.vp else iter(batches),
            model=models, num_microbatches=len(batches), seq_length=TOKENS, micro_batch_size=1, forward_only=False)
        _, norm, _ = optimizer.step()
        schedule.step(increment=1)
        history.append((_mean_loss(parts), float(norm)))
        if case.save and step == 1:
            save(case.save, models, optimizer)
    return Trained(history, _parameters(models), state.get_tensor_model_parallel_rank())


def build(case: Case) -> tuple[list[Any], Any, Any]:
    """Models (one a virtual stage) in Megatron's data-parallel wrapper, optimizer and schedule."""
    from megatron.core import parallel_state as state
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(case)
    models = []
    for stage in range(case.vp or 1):
        if case.vp:
            state.set_virtual_pipeline_model_parallel_rank(stage)
        model = build_gpt(case, config, stage if case.vp else None)
        _fill(model.to(case.dtype))
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=case.distributed_optimizer, grad_reduce_in_fp32=config.bf16)
        models.append(DistributedDataParallel(config, ddp, Float16Module(config, model) if config.bf16 else model,
                                              disable_bucketing=stage > 0))
    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=RATE, min_lr=RATE / 10, weight_decay=0.1, clip_grad=1.0, params_dtype=case.dtype,
        bf16=config.bf16, use_distributed_optimizer=case.distributed_optimizer), models)
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=RATE / 2, max_lr=RATE, min_lr=RATE / 10, lr_warmup_steps=1, lr_decay_steps=10,
        lr_decay_style="cosine", start_wd=0.1, end_wd=0.1, wd_incr_steps=10, wd_incr_style="constant")
    return models, optimizer, schedule


def transformer_config(case: Case, **changes: Any) -> Any:
    """RMSNorm, two query heads a key/value head, no dropout; weights that let attention matter."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64,
        "tensor_model_parallel_size": case.tp, "context_parallel_size": case.cp,
        "pipeline_model_parallel_size": case.pp, "virtual_pipeline_model_parallel_size": case.vp,
        "normalization": "RMSNorm", "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "use_cpu_initialization": True, "params_dtype": case.dtype, "pipeline_dtype": case.dtype,
        "bf16": case.dtype == torch.bfloat16, "gradient_accumulation_fusion": False, "persist_layer_norm": False,
        "calculate_per_token_loss": True, "finalize_model_grads_func": finalize_model_grads,
    }
    return TransformerConfig(**settings | case.model | changes)


def build_gpt(case: Case, config: Any, stage: int | None = None) -> Any:
    """The GPTModel of this rank, or of one of its virtual stages, from Megatron's local spec."""
    from megatron.core import parallel_state as state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from muse_dist.megatron_patch.spec import use_muse

    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    if case.muse is not None:
        spec = use_muse(spec, case.muse, case.layers)
    ends = {"ignore_virtual": False, "vp_stage": stage} if stage is not None else {}
    with norms_of_sequence_parts():
        return GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="rope",
                        pre_process=state.is_pipeline_first_stage(**ends),
                        post_process=state.is_pipeline_last_stage(**ends), vp_stage=stage)


@contextlib.contextmanager
def norms_of_sequence_parts() -> Iterator[None]:
    """Sequence parallelism with torch's norms, for which Megatron asks for Transformer Engine or apex."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    stock = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **options: Any) -> torch.nn.Module:
        norm = stock(cls, dataclasses.replace(config, sequence_parallel=False), *args, **options)
        norm.weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over tensor-parallel ranks
        return norm

    with mock.patch.object(WrappedTorchNorm, "__new__", new):
        yield


def _named(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters under the names they have in the model that is on one rank."""
    for name, parameter in model.named_parameters():
        head, layers, tail = name.partition("decoder.layers.")
        if layers:
            place, _, rest = tail.partition(".")
            name = f"{head}{layers}{model.decoder.layers[int(place)].layer_number - 1}.{rest}"
        yield name, parameter


def _fill(model: Any) -> None:
    """The same weights however the model is split: drawn for the whole, by name, then cut."""
    from megatron.core import parallel_state as state

    for name, parameter in _named(model):
        if parameter.dim() == 1:
            continue  # norms start at one
        dim, ranks = _split(parameter), state.get_tensor_model_parallel_world_size()
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= ranks
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator, dtype=torch.float64) * (0.4 if "qkv" in name else 0.2)
        part = whole if dim is None else whole.chunk(ranks, dim)[state.get_tensor_model_parallel_rank()]
        parameter.data.copy_(part)


def _split(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def _parameters(models: list[Any]) -> dict[str, tuple[torch.Tensor, int | None]]:
    inner = [model.module for model in models]
    inner = [getattr(model, "module", model) for model in inner]
    return {name: (p.detach().clone(), _split(p)) for model in inner for name, p in _named(model)}


def _batches(case: Case, step: int) -> list[tuple[torch.Tensor, ...]]:
    """This rank's part of the step's sequences: text in which every token depends on the one 64 places before."""
    from megatron.core import parallel_state as state

    generator = torch.Generator().manual_seed(step)
    text = torch.randint(VOCABULARY, (BATCH, 64), generator=generator).repeat(1, TOKENS // 64 + 1)[:, :TOKENS + 1]
    counts = torch.ones(BATCH, TOKENS)
    if case.masked:
        likely = torch.linspace(0.05, 1, TOKENS) / torch.arange(1, BATCH + 1)[:, None]
        counts = (torch.rand(BATCH, TOKENS, generator=generator) < likely).float()
    places = torch.arange(TOKENS)
    if case.cp > 1:
        places = Layout("zigzag", case.cp, TOKENS, 1).positions(state.get_context_parallel_rank())
    mine = slice(state.get_data_parallel_rank(), None, state.get_data_parallel_world_size())
    return [(x[None, places], x[None, places + 1], places[None], count[None, places])
            for x, count in zip(text[mine], counts[mine])]


def _forward(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
    tokens, labels, places, counts = next(batches)

    def loss(losses):
        total, count = (losses.double() * counts).sum(), counts.sum().int()
        return total, count, {"loss": torch.stack([total.detach(), count.double()])}

    return model(tokens, places, None, labels=labels), loss


def _mean_loss(parts: list[dict[str, torch.Tensor]]) -> float | None:
    from megatron.core import parallel_state as state

    if not parts:
        return None
    total = torch.stack([part["loss"] for part in parts]).sum(0)
    dist.all_reduce(total, group=state.get_data_parallel_group(with_context_parallel=True))
    return (total[0] / total[1]).item()
