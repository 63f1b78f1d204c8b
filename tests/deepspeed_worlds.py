"""What the DeepSpeed tests do with ranks beyond training: saving, resuming on other numbers of them, doing it wrong."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.deepspeed_runs import (
    OFFLOAD,
    STEPS,
    TOKENS,
    WORDS,
    Case,
    OwnDecoder,
    full_parameters,
    make_model,
    run_cases,
    start_engine,
    train,
)

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.02, "eps": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 6,
                                                     "warmup_type": "linear"}}}


def saved(stage: int, context: int = 2, universal: bool = False) -> Case:
    """A run with an optimizer and a schedule that must be restored, too. The last stage keeps all on the CPU."""
    return Case(stage, context=context, zero=OFFLOAD[3] if stage == 3 else {},
                json={**ADAM, "checkpoint": {"load_universal": universal}})


def save_runs(folder: str) -> list[dict[str, Any]]:
    """At every ZeRO stage: train, save, go on; what came after saving."""
    from muse_dist.deepspeed import save

    found = []
    for stage in range(4):
        engine = start_engine(saved(stage))
        train(engine, saved(stage))
        save(engine, Path(folder, str(stage)), {"sequences": 17})
        found.append(go_on(engine, saved(stage)))
    return found


def resume_runs(folder: str) -> tuple[list[dict[str, Any]], str]:
    """The same after loading, on as many ranks as there are; and what loading without conversion says."""
    from muse_dist.deepspeed import load

    context = int(os.environ["WORLD_SIZE"])
    found = []
    for stage in range(4):
        case = saved(stage, context, universal=stage > 0)
        engine = start_engine(case)
        state = load(engine, Path(folder, str(stage)))
        found.append({**go_on(engine, case), "state": state, "steps": engine.global_steps})
    try:
        load(start_engine(saved(2, context)), Path(folder, "2"))
        problem = ""
    except ValueError as error:
        problem = str(error)
    return found, problem


def go_on(engine: Any, case: Case) -> dict[str, Any]:
    start, rate = full_parameters(engine), engine.get_lr()
    found = train(engine, case, first=STEPS)
    return {**found, "rate": rate, "change": {name: p - start[name] for name, p in full_parameters(engine).items()}}


def refusals() -> dict[str, str]:
    """What this rank is told about what it does wrong."""
    from muse_dist.deepspeed import initialize, join

    rank, config = dist.get_rank(), Case(1).config
    parallel, model = join(config), make_model("llama")
    engine = start_engine(Case(1))
    tokens = torch.arange(TOKENS)[None] % WORDS
    args = argparse.Namespace(deepspeed_config="ds.json")
    tries: dict[str, Callable[[], Any]] = {
        "other tokens": lambda: engine.muse.shard(tokens + rank),
        "other labels": lambda: engine.muse.shard(tokens, tokens.where(torch.tensor(rank == 0), -100)),
        "other length": lambda: engine.muse.shard(tokens[:, :TOKENS // (rank + 1)]),
        "bad length": lambda: engine.muse.shard(tokens[:, :50]),
        "bad length of rank 1": lambda: engine.muse.shard(tokens[:, :TOKENS - rank]),
        "bad shape": lambda: engine.muse.shard(tokens[0]),
        "bad shape of rank 1": lambda: engine.muse.shard(tokens[0] if rank else tokens),
        "no engine": lambda: parallel.loss(torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.long)),
        "too many ranks": lambda: join(Case(1, context=4).config),
        "no MuSe in own model": lambda: initialize(nn.Linear(2, 2), config),
        "layers of own model": lambda: initialize(OwnDecoder(parallel.attention(), "none"), Case(
            1, muse={"layers": "0"}).config, parallel=replace(parallel, section=replace(parallel.section, layers="0"))),
        "too few layers": lambda: initialize(model, Case(1, muse={"layers": "0-2"}).config),
        "other config": lambda: initialize(model, Case(2).config, parallel=parallel),
        "mpu": lambda: initialize(model, config, mpu=object()),
        "args": lambda: initialize(model, config, args=args),
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)
    sequences = list(torch.arange(8)[:, None].expand(-1, TOKENS))  # DeepSpeed asks whether it is true
    loader = initialize(make_model("llama"), Case(1, json=ADAM).config, training_data=sequences)[2]
    loader.num_local_io_workers = 0  # these processes may not start others
    said["loader"] = str([batch[0, 0].item() for batch in loader])
    inputs, labels = engine.muse.shard(tokens[:, :50], pad_token=3)
    said["padded"] = f"{list(inputs['input_ids'].shape)} {int((labels != -100).sum())}"
    return said


def set_environment() -> None:
    """What a launcher would have told this process of a group."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()), RANK=str(dist.get_rank()),
                      WORLD_SIZE=str(dist.get_world_size()))


def on_two_ranks(names: list[str], folder: str) -> tuple[Any, Any, Any]:
    """All that the tests want from two ranks."""
    set_environment()
    return run_cases(names), save_runs(folder), refusals()


def on_more_or_less(names: list[str], folder: str) -> tuple[Any, Any]:
    """All that they want from another number of ranks, after `on_two_ranks`."""
    set_environment()
    return run_cases(names), resume_runs(folder)
