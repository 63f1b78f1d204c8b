"""A GPT of megatron-core on long sequences, with MuSe or with exact attention: step time, memory and loss.

    torchrun --standalone --nproc-per-node 4 -m launch.megatron_bench --attention muse --muse-preset fast
    torchrun --standalone --nproc-per-node 4 -m launch.megatron_bench --attention exact

All ranks share every sequence (context parallelism, zigzag), unless --context-parallel says that fewer do. Both runs
start from the same weights and read the same text: a folder that `launch.data` wrote, by default the Python standard
library a byte a token. Needs megatron-core, but neither Transformer Engine nor apex. Megatron's own attention then
neither shares sequences between ranks nor fits long ones in memory; exact attention here is `launch.megatron_exact`,
which equals it.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.config import DataConfig, ModelConfig
from launch.corpus import Corpus, load_corpus
from launch.megatron_model import transformer_config
from muse_dist.layout import Layout
from muse_dist.megatron_patch.options import Choice, add_options, read_options

Batch = tuple[Tensor, Tensor, Tensor]
WARMUP = 2  # steps that compile kernels and are not in the median


def model_config(options: argparse.Namespace) -> Any:
    """Megatron's settings for the model; bf16 unless `options.fp32`."""
    from megatron.core.distributed import finalize_model_grads

    shape = ModelConfig(options.layers, options.width, options.heads, options.kv_heads, options.mlp)
    return transformer_config(
        shape, options.context_parallel, torch.float32 if options.fp32 else torch.bfloat16, options.recompute,
        # Ranks may hold unequal numbers of tokens that count: only this weighs them right.
        calculate_per_token_loss=True, finalize_model_grads_func=finalize_model_grads)


def build_model(config: Any, corpus: Corpus, choice: Choice | None, fp32: bool) -> Any:
    """The model in Megatron's data-parallel wrapper, with MuSe, or with exact attention if `choice` is None."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.module import Float16Module

    from launch.megatron_exact import ExactCoreAttention
    from muse_dist.megatron_patch.spec import use_muse

    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = ExactCoreAttention
    if choice is not None:
        spec = use_muse(spec, choice.config, choice.layers)
    model = GPTModel(config, spec, corpus.vocabulary, corpus.context, position_embedding_type="rope",
                     rotary_base=500_000).to(torch.cuda.current_device())
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True),
                                   model if fp32 else Float16Module(config, model))


def build_optimizer(model: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Adam with fp32 main weights, and a schedule of the learning rate: linear warm-up, then a cosine to a tenth."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=options.lr, min_lr=options.lr / 10, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0,
        bf16=not options.fp32, params_dtype=torch.float32 if options.fp32 else torch.bfloat16), [model],
        use_gloo_process_groups=False)  # of which only checkpoints of a distributed optimizer make use
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=options.lr, min_lr=options.lr / 10,
        lr_warmup_steps=max(1, options.steps // 10), lr_decay_steps=max(2, options.steps), lr_decay_style="cosine",
        start_wd=0.1, end_wd=0.1, wd_incr_steps=options.steps, wd_incr_style="constant")
    schedule.step(increment=1)  # the first step is not wasted on a rate of zero
    return optimizer, schedule


def batches(options: argparse.Namespace, corpus: Corpus) -> Iterator[list[Batch]]:
    """For every step the sequences this rank reads its part of: tokens, labels and positions, int64 [1, S] each."""
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_context_parallel_rank(), options.context_parallel
    places = torch.arange(options.tokens)
    if ranks > 1:
        places = Layout("zigzag", ranks, options.tokens, 1).positions(rank)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    device = torch.cuda.current_device()
    for step in range(options.steps):
        mine = corpus.sequences(step * options.batch, options.batch, options.seed)[replica::replicas].to(device)
        yield [(x[None, places], x[None, places + 1], places[None].to(device)) for x in mine]


def forward_step(sequences: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """A forward pass as Megatron's schedules call it."""
    tokens, labels, positions = next(sequences)
    return model(tokens, positions, None, labels=labels), _summed_loss


def _summed_loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    total = losses.float().sum()
    return total, count, {"loss": torch.stack([total.detach(), count.float()])}


def train(options: argparse.Namespace, choice: Choice | None) -> dict[str, Any]:
    """Train, and return what was measured: loss and gradient norm of every step, seconds, bytes at the peak.

    All `options.steps`, or as many as `options.seconds` allow, but at least the first two and one that counts.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    begun = time.perf_counter()
    tensor_parallel.model_parallel_cuda_manual_seed(options.seed)
    torch.manual_seed(options.seed)
    corpus = load_corpus(DataConfig(path=options.data, context=options.tokens))
    model = build_model(model_config(options), corpus, choice, options.fp32)
    optimizer, schedule = build_optimizer(model, options)
    step = partial(get_forward_backward_func(), forward_step_func=forward_step, model=[model],
                   seq_length=options.tokens, micro_batch_size=1, forward_only=False)
    losses, norms, seconds = [], [], []
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.cuda.reset_peak_memory_stats()
    for sequences in batches(options, corpus):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        parts = step(data_iterator=iter(sequences), num_microbatches=len(sequences))
        _, norm, _ = optimizer.step()
        schedule.step(increment=1)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        total = torch.stack([part["loss"] for part in parts]).sum(0)
        # Ranks must stop after the same step: all of them once one is late.
        late = options.seconds is not None and time.perf_counter() - begun > options.seconds
        total = torch.cat([total, total.new_tensor([late])])
        dist.all_reduce(total, group=group)
        losses.append((total[0] / total[1]).item())
        norms.append(float(norm))
        if options.verbose and dist.get_rank() == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.4f}, norm {norms[-1]:.3f}, {seconds[-1]:.3f} s", flush=True)
        if total[2] > 0 and len(losses) > WARMUP:
            break
    return {"loss": losses, "grad_norm": norms, "seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated(),
            "parameters": sum(p.numel() for p in model.parameters())}


def main(arguments: list[str] | None = None) -> None:
    """The command; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m launch.megatron_bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    options = add_options(_add_sizes(parser)).parse_args(arguments)
    try:
        choice = read_options(options)
        if not torch.cuda.is_available():
            raise ValueError("megatron-core trains on GPUs only, and there is none")
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("start it with torchrun --standalone --nproc-per-node 1 -m launch.megatron_bench")
        world = int(os.environ["WORLD_SIZE"])
        options.context_parallel = options.context_parallel or world
        check_sizes(options, world, choice)
    except (TypeError, ValueError, OSError) as error:
        parser.error(str(error))
    from megatron.core import parallel_state

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=timedelta(minutes=options.timeout_minutes))
    parallel_state.initialize_model_parallel(
        context_parallel_size=options.context_parallel, distributed_timeout_minutes=options.timeout_minutes,
        create_gloo_process_groups=False)
    row = describe(options, choice, world) | train(options, choice)
    # After an error the groups are left as they are: ending them would wait for ranks that wait for this one.
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print(summary(row))
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _add_sizes(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("model and training; the defaults are a model of about 350 million parameters")
    for name, value, text in (
        ("tokens", 65536, "of a sequence"), ("layers", 24, "of the model"), ("width", 1024, "of the model"),
        ("mlp", 3328, "width of the MLP"),
        ("heads", 16, "query heads"), ("kv-heads", 16, "key/value heads"), ("batch", 1, "sequences a step"),
        ("steps", 50, "to train"), ("seed", 0, "of weights and data"),
    ):
        group.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    group.add_argument("--seconds", type=float, metavar="N", help="begin no further step once building and training "
                       "have taken so long; at least three are done (default: all steps)")
    group.add_argument("--timeout-minutes", type=int, default=3, metavar="N", help="a rank that waits so long for "
                       "another gives up (default: %(default)s)")
    group.add_argument("--context-parallel", type=int, metavar="N", help="ranks that share a sequence (default: all)")
    group.add_argument("--data", default="", metavar="FOLDER", help="text to train on, written by launch.data "
                       "(default: the Python standard library)")
    group.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (default: %(default)s)")
    group.add_argument("--recompute", choices=("none", "selective", "full"), default="none",
                       help="activations computed again in the backward (default: %(default)s)")
    group.add_argument("--fp32", action="store_true", help="train in fp32 instead of bf16")
    group.add_argument("--verbose", action="store_true", help="print every step")
    group.add_argument("--json", type=Path, metavar="FILE", help="append what was measured to this file, one JSON line")
    return parser


def check_sizes(options: argparse.Namespace, world: int, choice: Choice | None) -> None:
    """Raise ValueError that names the option for sizes that do not divide."""
    ranks = options.context_parallel
    if ranks < 1 or world % ranks:
        raise ValueError(f"--context-parallel {ranks} must divide the {world} processes")
    if options.batch % (world // ranks):
        raise ValueError(f"--batch {options.batch} must be a multiple of the {world // ranks} groups of ranks that "
                         "read different sequences")
    for name in ("steps", "batch", "timeout_minutes"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if ranks > 1:
        try:
            Layout("zigzag", ranks, options.tokens, 1 if choice is None else choice.config.block)
        except ValueError as error:
            raise ValueError(str(error).replace("q: ", "--tokens: ")) from error


def describe(options: argparse.Namespace, choice: Choice | None, world: int) -> dict[str, Any]:
    """What a row says about its run."""
    import megatron.core

    settings = {name: value for name, value in vars(options).items()
                if value is not None and not name.startswith("muse") and name not in ("json", "verbose")}
    return settings | {
        "muse": None if choice is None else json.loads(choice.config.encoded), "ranks": world,
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "megatron_core": megatron.core.__version__}


def summary(row: dict[str, Any]) -> str:
    """A row in words. The first steps, which compile kernels, are not in the median."""
    seconds = statistics.median(row["seconds"][WARMUP:] or row["seconds"])
    return (f"{row['attention']}: {row['parameters'] / 1e6:.0f}M parameters, {row['tokens']} tokens on "
            f"{row['context_parallel']} of {row['ranks']} ranks: {seconds:.3f} s a step "
            f"(median of {len(row['seconds'][WARMUP:]) or len(row['seconds'])}), "
            f"{row['peak_bytes'] / 2**30:.1f} GiB at the peak, loss {row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}")


if __name__ == "__main__":
    main()
