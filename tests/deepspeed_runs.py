"""Short DeepSpeed runs for the tests: the same training in one process of plain PyTorch and shared among ranks.

As a program, in the processes a launcher started, `python deepspeed_runs.py FOLDER CASE...` runs cases and writes what
came of them to FOLDER/CASE.pt.
"""
from __future__ import annotations

import copy
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from muse_dist import MuseAttention, MuseConfig
from muse_dist.emulation import emulate_ranks
from muse_dist.huggingface import register

MUSE = {"block": 8, "leaf": 4, "group": 4, "remote_leaf": 4, "anchors": 2, "opened": 2, "exchange": "kv"}
TOKENS, WORDS, STEPS, RATE = 64, 64, 3, 0.5
SMALL = {"reduce_bucket_size": 700, "allgather_bucket_size": 700, "stage3_prefetch_bucket_size": 700,
         "sub_group_size": 900, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 5000}
OFFLOAD = {stage: {"offload_optimizer": {"device": "cpu"}} for stage in (1, 2)}
OFFLOAD[3] = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@dataclass(frozen=True)
class Case:
    """One short training run. `model`: "llama" of transformers, or "own" with the layer handed out."""

    stage: int
    context: int = 2
    model: str = "llama"
    accumulation: int = 1
    clip: float = 100.0  # a norm no gradient here reaches
    recompute: str = "none"  # or "torch", "deepspeed"
    zero: dict[str, Any] = field(default_factory=dict)
    muse: dict[str, Any] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)
    sharded_start: bool = False  # build the model under zero.Init

    @property
    def config(self) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        return {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip, "zero_allow_untested_optimizer": True, "steps_per_print": 10 ** 9,
            "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": self.stage, **self.zero},
            "muse": {**MUSE, "context_parallel_size": self.context, "timeout_seconds": 60, **self.muse}, **self.json}


class OwnDecoder(nn.Module):
    """A decoder that is not of transformers, with learned positions and a tied head."""

    def __init__(self, attention: MuseAttention, recompute: str) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 32), nn.Embedding(TOKENS, 32)
        nn.init.normal_(self.words.weight, std=0.3)
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.attention, self.recompute = attention, recompute

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(position_ids)
        if self.recompute == "deepspeed":
            import deepspeed

            x = deepspeed.checkpointing.checkpoint(self._layer, x)
        else:
            x = self._layer(x)
        return x @ self.words.weight.T

    def _layer(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attention(8 * q, k, v).transpose(1, 2).flatten(2))


def make_model(kind: str, attention: Any = None, recompute: str = "none") -> nn.Module:
    """The same weights every time, with attention far from uniform."""
    torch.manual_seed(0)
    if kind == "own":
        return OwnDecoder(attention, recompute)
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, use_cache=False,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2))


def batches(data_size: int, accumulation: int, steps: int = STEPS, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels [data_size, TOKENS] of every micro-batch, few of them labelled in some places and sequences."""
    for number in range(first * accumulation, (first + steps) * accumulation):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(WORDS, (data_size, TOKENS), generator=generator)
        kept = torch.rand(data_size, TOKENS, generator=generator) < torch.linspace(0.05, 1, TOKENS)
        kept[1::2, : TOKENS // 2] = False
        yield tokens, tokens.where(kept, -100)


def alone(case: Case, data_size: int = 1) -> dict[str, Any]:
    """The run in this process with whole sequences and plain PyTorch; nothing of DeepSpeed or its adapter."""
    model = alone_model(case)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    master = [p.detach().clone() for p in model.parameters()]  # of bf16 weights; else the weights' equals
    if "bf16" in case.json:
        model.bfloat16()
    found: dict[str, Any] = {"loss": [], "norm": []}
    for number, (tokens, labels) in enumerate(batches(data_size, case.accumulation), 1):
        positions = torch.arange(TOKENS).expand(data_size, -1)
        loss = unshifted_loss(logits_of(model(input_ids=tokens, position_ids=positions)).float(), labels)
        found["loss"].append(loss.item())
        (loss / case.accumulation).backward()
        if number % case.accumulation == 0:
            found["norm"].append(nn.utils.clip_grad_norm_(model.parameters(), case.clip).item())
            with torch.no_grad():
                for full, p in zip(master, model.parameters()):
                    full -= RATE * p.grad.float()
                    p.copy_(full)
            model.zero_grad()
    found["change"] = {name: full - start[name] for full, name in zip(master, start)}
    return found


def alone_model(case: Case) -> Any:
    """The model with the attention of one device, or, for moments, with what ranks compute without any."""
    config = MuseConfig(**{**MUSE, **{k: v for k, v in case.muse.items() if k == "exchange"}})
    if case.model == "own":
        return make_model("own", MuseAttention(config))
    model = make_model(case.model)
    emulated = partial(emulate_ranks, ranks=case.context, layout="zigzag")
    register(config, "muse-alone", emulated if config.exchange == "moments" else None)
    model.set_attn_implementation("muse-alone")
    if "layers" in case.muse:  # the first is left out
        first = model.model.layers[0].self_attn
        first.config = copy.copy(first.config)
        first.config._attn_implementation = "sdpa"
    return model


def unshifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all labelled tokens of whole sequences."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def shared(case: Case) -> dict[str, Any]:
    """The run in this process of several, shared with the others through DeepSpeed."""
    engine = start_engine(case)
    start = full_parameters(engine)
    found = train(engine, case)
    found["change"] = {name: p - start[name] for name, p in full_parameters(engine).items()}
    return found


def start_engine(case: Case, optimizer: Any = torch.optim.SGD) -> Any:
    import deepspeed

    from muse_dist.deepspeed import initialize, join

    parallel = None
    if case.sharded_start:
        parallel = join(case.config)
        with deepspeed.zero.Init(config_dict_or_path=parallel.deepspeed_config):
            model = make_model(case.model)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.load_state_dict(make_model(case.model).state_dict())  # zero.Init draws other weights
    elif case.model == "own":
        parallel = join(case.config)
        model = make_model("own", parallel.attention(), case.recompute)
    else:
        model = make_model("llama")
    if case.recompute == "torch":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {} if "optimizer" in case.json else {"optimizer": optimizer(model.parameters(), lr=RATE)}
    return initialize(model=model, config=case.config, parallel=parallel, **options)[0]


def train(engine: Any, case: Case, steps: int = STEPS, first: int = 0) -> dict[str, Any]:
    """Losses of the micro-batches and norms of the steps."""
    found: dict[str, Any] = {"loss": [], "norm": []}
    here = engine.muse.data_rank
    for number, (tokens, labels) in enumerate(batches(engine.muse.data_size, case.accumulation, steps, first), 1):
        inputs, labels = engine.muse.shard(tokens[here:here + 1], labels[here:here + 1])
        loss = engine.muse.loss(logits_of(engine(**inputs)), labels)
        found["loss"].append(loss.item())
        engine.backward(loss)
        last = number % case.accumulation == 0
        if last and case.stage == 0:  # which reports no norm; the gradients are reduced and not yet clipped
            found["norm"].append(torch.stack([p.grad.norm() for p in engine.module.parameters()]).norm().item())
        engine.step()
        if last and case.stage > 0:
            found["norm"].append(float(engine.get_global_grad_norm()))
    return found


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """All parameters in fp32, gathered where ZeRO shards them."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


CASES: dict[str, Case] = {
    **{f"stage {stage}, accumulation, clipping": Case(stage, accumulation=2, clip=0.3) for stage in range(4)},
    **{f"stage {stage}, small buckets": Case(stage, zero=SMALL) for stage in (1, 2, 3)},
    **{f"stage {stage}, offload": Case(stage, zero=OFFLOAD[stage], clip=0.3) for stage in (1, 2, 3)},
    "stage 3, offload of parameters alone": Case(
        3, zero={**SMALL, "offload_param": OFFLOAD[3]["offload_param"]}, accumulation=2, clip=0.3),
    **{f"stage {stage}, own model, DeepSpeed recomputes": Case(stage, model="own", recompute="deepspeed")
       for stage in range(4)},
    "stage 0, torch recomputes": Case(0, recompute="torch"),
    "stage 1, torch recomputes, contiguous": Case(1, recompute="torch", muse={"layout": "contiguous"}),
    "stage 3, torch recomputes, zero.Init": Case(3, recompute="torch", sharded_start=True),
    "stage 3, zero.Init, three batch sizes, accumulation, clipping": Case(
        3, sharded_start=True, accumulation=2, clip=0.3, json={"train_batch_size": 2}),
    "stage 1, one layer": Case(1, muse={"layers": "1"}),
    "stage 2, moments": Case(2, recompute="torch", muse={"exchange": "moments"}),
    **{f"stage {stage}, bf16": Case(stage, clip=0.3, json={"bf16": {"enabled": True}}) for stage in range(4)},
}
CASES_OF_FOUR: dict[str, Case] = {
    **{f"2 x 2, stage {stage}": Case(stage, accumulation=2, clip=0.3, zero=SMALL) for stage in range(4)},
    "2 x 2, stage 2, own model, DeepSpeed recomputes": Case(2, model="own", accumulation=2, clip=0.3,
                                                             recompute="deepspeed"),
    "2 x 2, stage 3, torch recomputes": Case(3, accumulation=2, clip=0.3, recompute="torch"),
    "context 4, stage 3": Case(3, context=4),
}
CASES |= CASES_OF_FOUR


def run_cases(names: list[str]) -> dict[str, dict[str, Any]]:
    """`shared` of several cases, one after the other in the same processes."""
    return {name: shared(CASES[name]) for name in names}


def hang(engine: Any, where: str, how: str) -> None:
    """Train; in the second step the last rank gets stuck, before it takes part in what `where` names.

    `how`: "sleep", out of which a signal wakes it, or "stop", in which only SIGKILL reaches it.
    """
    from muse_dist.deepspeed import running

    stick = {"sleep": lambda: time.sleep(1000), "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP)}[how]
    tokens = next(batches(1, 1))[0]
    with running(engine):
        for step in range(STEPS):
            stuck = step == 1 and engine.muse.ranks.context_rank == 1
            if stuck and where == "shard":
                stick()
            inputs, labels = engine.muse.shard(tokens)
            engine.backward(engine.muse.loss(engine(**inputs), labels))
            if stuck and where == "step":
                stick()
            engine.step()
            print(f"done {step} {time.time()}", flush=True)


def main() -> None:
    """The program: FOLDER CASE... runs cases; `hang` FOLDER STAGE WHERE HOW and `sleep` do what their names say.

    `hang` writes nothing; its FOLDER is for others to know the process by.
    """
    if sys.argv[1] == "sleep":
        time.sleep(1000)
    from muse_dist.deepspeed_ranks import leave_processes

    torch.set_num_threads(1)
    if sys.argv[1] == "hang":
        case = Case(int(sys.argv[3]), model="own", muse={"timeout_seconds": 10})
        hang(start_engine(case), *sys.argv[4:])
        return
    for name, found in run_cases(sys.argv[2:]).items():
        if dist.get_rank() == 0:
            torch.save(found, Path(sys.argv[1], f"{name}.pt"))
            Path(sys.argv[1], "finished").touch()
    leave_processes()


if __name__ == "__main__":
    main()
