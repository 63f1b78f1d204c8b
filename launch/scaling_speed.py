"""The processes that `launch.scaling --speed-only` starts: they time the steps of one run after the other.

Tokens are random, nothing is saved and nothing is measured afterwards: starting the processes is most of a short run,
and several runs share it.
"""
from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.config import RunConfig, parse_changes
from launch.corpus import VOCABULARY, ArrayTokens, Corpus
from launch.engine import make_engine
from launch.failures import said_at_once
from launch.monitor import Silent
from launch.options import described_device, pick_device, write_line
from launch.ranks import Ranks, join_ranks
from launch.scaling_row import Row, speed_row
from launch.trainer import Trainer
from muse_dist import ByteCounter, forget_graphs


def main() -> None:
    """The command: `scaling_speed TASK`, JSON with "device", "skip", "rows" (a file) and "jobs".

    A job has "row", what its line begins with, "config", a TOML file, and "changes", words as of --set. All have the
    same `train.context_parallel` and `train.timeout`.
    """
    task = json.loads(sys.argv[1])
    device = pick_device(task["device"])
    configs = [RunConfig.from_toml(job["config"], changes=parse_changes(job["changes"])) for job in task["jobs"]]
    train = configs[0].train
    if device.type == "cpu":
        torch.set_num_threads(1)
    meeting = join_ranks(device, configs[0].layout, train.context_parallel, train.timeout + 60)
    with meeting as ranks, said_at_once(ranks.world_rank):
        for job, config in zip(task["jobs"], configs):
            row = {**job["row"], "device": described_device(ranks.device),
                   **time_steps(config, dataclasses.replace(ranks, layout=config.layout), task["skip"])}
            if ranks.first:
                write_line(Path(task["rows"]), row)
            _forget(ranks.device)


def time_steps(config: RunConfig, ranks: Ranks, skip: int) -> Row:
    """Train on random tokens and say what the steps after the first `skip` took.

    Raises:
        ValueError: as `launch.train` does, for what cannot be.
    """
    if ranks.size > 1:
        ranks.split(config.data.context, config.muse.block)
    counter, rows = ByteCounter(), list[dict[str, Any]]()
    corpus = random_tokens(config)
    engine = make_engine(config, ranks, corpus.vocabulary, counter)
    Trainer(engine, corpus, config, ranks, Silent(rows), counter=counter).run()
    return speed_row(rows, skip, dataclasses.asdict(config), engine.parameters)


def random_tokens(config: RunConfig) -> Corpus:
    """Enough tokens for a few steps."""
    vocabulary = config.model.vocabulary or VOCABULARY
    tokens = np.random.default_rng(0).integers(0, vocabulary, 4 * config.data.context + 1, np.int32)
    stream = ArrayTokens(tokens, np.zeros(1, np.int64))
    return Corpus(stream, stream, config.data.context, vocabulary, "random")


def _forget(device: torch.device) -> None:
    """Give back the memory of a run, so that the next one's peak is its own."""
    forget_graphs()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


if __name__ == "__main__":
    main()
