"""One row of `launch.bench step`: the processes that torchrun starts for one attention."""
from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

from launch.bench_step import EXACT, deepspeed_config, run_config
from launch.model import build_model, recompute_activations
from launch.options import described_device
from muse_dist.deepspeed import initialize, running


def main() -> None:
    """The command: `step_row JOB FILE`, a job of `bench_step.make_job` and the file for what the first rank found."""
    begun = time.perf_counter()
    job, file = json.loads(sys.argv[1]), Path(sys.argv[2])
    if job["device"] == "cpu":
        torch.set_num_threads(1)
    device = torch.device(job["device"], int(os.environ["LOCAL_RANK"])) if job["device"] == "cuda" else "cpu"
    with torch.device(device):  # a billion weights are drawn faster there
        model = build_model(run_config(job), torch.device(device))
    if job["recompute"]:
        recompute_activations(model)
    engine, *_ = initialize(model, deepspeed_config(job))
    with running(engine), rival(engine, job):
        found = time_steps(engine, job, begun)
        if engine.muse.ranks.everyone.rank() == 0:
            file.write_text(json.dumps(found))


@contextmanager
def rival(engine: Any, job: dict[str, Any]) -> Iterator[None]:
    """Exchange MuSe for the exact attention of the job, if it is one."""
    name = job["attention"]
    if name not in EXACT:
        yield
        return
    exact = AttentionInterface()["sdpa"]
    function = _ulysses(engine, exact) if name == "ulysses" else exact
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda **options: None)  # causal, and no N x N mask
    engine.module.set_attn_implementation(name)
    # cuDNN's kernels are the fastest on Hopper, and not what PyTorch prefers in every version.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        if name == "ulysses":
            yield
            return
        with _torch_context_parallel(engine, job):
            yield


@contextmanager
def _torch_context_parallel(engine: Any, job: dict[str, Any]) -> Iterator[None]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    if job["device"] != "cuda":
        raise NotImplementedError("torch's context_parallel has no attention for the CPU")
    mesh = DeviceMesh.from_group(engine.muse.group, "cuda")
    # It shards the buffers given, as `shard` has done already with the tokens, and replaces torch's attention.
    place = torch.zeros(1, run_config(job).data.context, device="cuda")
    with context_parallel(mesh, buffers=[place], buffer_seq_dims=[1]):
        yield


def _ulysses(engine: Any, exact: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed-Ulysses of these ranks around torch's attention."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    config = engine.module.config
    ulysses = UlyssesSPAttentionHF(
        exact, 1, config.num_attention_heads, config.hidden_size // config.num_attention_heads,
        config.num_key_value_heads, config.num_hidden_layers, engine.muse.group, seq_length_is_variable=True)

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        return ulysses(module, q, k, v, None, **options)

    return attention


def time_steps(engine: Any, job: dict[str, Any], begun: float) -> dict[str, Any]:
    """Seconds of every timed step, and what follows from them; memory is the largest of all ranks.

    `begun` is when this process started, for `seconds_at_most` of the job.
    """
    words, count = engine.module.config.vocab_size, run_config(job).data.context
    seconds, losses = [], []
    for step in range(job["warmup"] + job["steps"]):
        if step > job["warmup"] and _late(engine, job, begun):
            break
        tokens = torch.randint(words, (1, count), generator=torch.Generator().manual_seed(step))
        start = _now(engine)
        inputs, labels = engine.muse.shard(tokens)
        loss = engine.muse.loss(engine(**inputs).logits, labels)
        engine.backward(loss)
        engine.step()
        seconds.append(_now(engine) - start)
        losses.append(loss.item())
    timed = seconds[job["warmup"]:]
    middle = statistics.median(timed)
    return {"tokens": count, "seconds": timed, "step_seconds": middle, "tokens_per_second": count / middle,
            "loss": losses[0], "losses": losses, "memory_gib": _memory(engine, job),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
            "torch": torch.__version__, "deepspeed": version("deepspeed"),
            "processor": described_device(engine.muse.ranks.device)}


def _memory(engine: Any, job: dict[str, Any]) -> float | None:
    """The most memory any rank's tensors took, in GiB; None on the CPU, where nobody counts it."""
    if job["device"] == "cpu":
        return None
    ranks = engine.muse.ranks
    each = torch.zeros(job["ranks"], dtype=torch.float64, device=ranks.device)
    each[ranks.context_rank] = torch.cuda.max_memory_allocated()  # the sum over ranks then holds every rank's
    return ranks.sum(each).max().item() / 2 ** 30


def _late(engine: Any, job: dict[str, Any], begun: float) -> bool:
    """Whether the time is over on any rank: all of them must stop at the same step."""
    most = job["seconds_at_most"]
    if most is None:
        return False
    late = torch.tensor(float(time.perf_counter() - begun > most), device=engine.muse.ranks.device)
    return engine.muse.ranks.sum(late).item() > 0


def _now(engine: Any) -> float:
    """A clock that all ranks read together, once their work is done."""
    engine.muse.ranks.sum(torch.zeros(1, device=engine.muse.ranks.device)).item()
    return time.perf_counter()


if __name__ == "__main__":
    main()
