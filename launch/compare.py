"""What a run is compared with: one rank in its first steps, and other attentions with the trained weights."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from launch.config import RunConfig
from launch.corpus import Corpus
from launch.engine import Engine, TorchEngine
from launch.guard import Watchdog
from launch.model import attention, held_out_losses, seconds, token_losses
from launch.monitor import Silent
from launch.ranks import Ranks
from launch.timing import Stopwatch
from launch.trainer import Trainer
from muse_dist import ByteCounter, traffic

FIRST_STEPS = 3


def compare_first_steps(corpus: Corpus, config: RunConfig, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Losses of the first steps from the same seed on one rank and on all with exchange="kv", which must agree.

    Returns:
        "loss" (nats) by run, and "traffic", the bytes a rank receives a step: measured for kv, predicted for ring
        attention.
    """
    counter, muse = ByteCounter(), config.muse
    alone = Ranks(0, 1, ranks.device, ranks.layout)
    gathered = dataclasses.replace(config, muse=dataclasses.replace(muse, exchange="kv"))
    losses = {"one rank": _losses(corpus, config, alone),
              f"{ranks.world} ranks, kv": _losses(corpus, gathered, ranks, counter)}
    shape = config.model
    size = (config.train.batch // ranks.replicas, shape.heads, shape.kv_heads, config.data.context,
            shape.width // shape.heads)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    ring = traffic(muse, size, ranks.size, layout=ranks.layout, dtype=dtype).ring
    return {"loss": losses, "traffic": {"kv": received(counter, FIRST_STEPS),
                                        "ring": {k: v * shape.layers for k, v in ring.items()}}}


def _losses(corpus: Corpus, config: RunConfig, ranks: Ranks, counter: ByteCounter | None = None) -> list[float]:
    rows: list[dict[str, Any]] = []
    engine = TorchEngine(config, ranks, corpus.vocabulary, counter)
    Trainer(engine, corpus, config, ranks, Silent(rows)).run(min(FIRST_STEPS, config.train.steps))
    return [row["loss"] for row in rows]


def received(counter: ByteCounter, steps: int) -> dict[str, int]:
    """Bytes a step, by exchange."""
    return {name: count // steps for name, count in counter.received.items()} if steps else {}


def measure(engine: Engine, corpus: Corpus, config: RunConfig, ranks: Ranks, dog: Watchdog) -> dict[str, Any]:
    """Read the held-out tokens, and time forward and backward of a step, with the attention of the run.

    With `train.compare` also with the others; these run on one rank, each rank doing the same.

    Args:
        dog: is fed with every sequence and step.
    Returns:
        "loss" and "far_loss" (nats a token, over all positions and over those that have a far field), "step_seconds",
        "position_loss" (nats at every position), each by attention, "unigram_entropy" and "near_reach".
    """
    sequences = corpus.held_out_sequences(config.data.held_out_sequences)
    reach, trained = config.near_reach, config.train.attention
    results: dict[str, Any] = {"loss": {}, "far_loss": {}, "step_seconds": {}, "position_loss": {}}
    engine.read_with(trained)
    for name in ("muse", "exact", "near"):
        if name == trained:
            losses, cost = _as_trained(engine, sequences, corpus, config, ranks, dog)
        elif config.train.compare:
            losses, cost = _on_one_rank(engine, name, sequences, corpus, config, dog)
        else:
            continue
        results["loss"][name] = losses.mean().item()
        results["far_loss"][name] = losses[:, reach:].mean().item() if reach < losses.shape[1] else None
        results["position_loss"][name] = losses.mean(0).tolist()
        results["step_seconds"][name] = cost
    engine.forget()
    return {**results, "unigram_entropy": corpus.held_out_entropy(), "near_reach": reach}


def _as_trained(
    engine: Engine, sequences: torch.Tensor, corpus: Corpus, config: RunConfig, ranks: Ranks, dog: Watchdog
) -> tuple[torch.Tensor, float]:
    """Losses fp32 [count, n] of the held-out sequences, and the seconds of a step without its update."""
    split = ranks.split(config.data.context, config.muse.block) if ranks.size > 1 else None
    engine.module.eval()
    losses = held_out_losses(_fed(engine.module, dog), sequences, split, ranks)
    batch = corpus.sequences(0, config.train.batch // ranks.replicas, config.train.seed)
    return losses, seconds(_fed(lambda: engine.gradients(batch, Stopwatch(ranks.device)), dog), ranks.device)


def _on_one_rank(
    engine: Engine, name: str, sequences: torch.Tensor, corpus: Corpus, config: RunConfig, dog: Watchdog
) -> tuple[torch.Tensor, float]:
    """The same with another attention, on this rank alone."""
    read = _fed(partial(token_losses, engine.model), dog)
    batch = corpus.sequences(0, config.train.batch, config.train.seed)
    engine.model.eval()
    with attention(engine.model, name):
        losses = held_out_losses(read, sequences)
        return losses, seconds(lambda: read(batch).mean().backward(), engine.model.device)


def _fed(function: Callable[..., Any], dog: Watchdog) -> Callable[..., Any]:
    """The function, which tells `dog` of each call."""
    def call(*arguments: Any) -> Any:
        dog.feed("the measuring at the end")
        return function(*arguments)

    return call
