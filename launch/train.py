"""Train a decoder with multipole semantic attention; by default on the Python standard library's own sources.

    python -m launch.train --config configs/tiny.toml
    torchrun --standalone --nproc-per-node 2 -m launch.train --config configs/tiny.toml

Under torchrun ranks share every sequence: each reads its part of the tokens, and they exchange what `muse.exchange`
says. The same command goes on with a run that was interrupted, also on more or fewer ranks; SIGTERM saves and ends it
with status 0.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from launch.checkpoint import Checkpoints
from launch.compare import compare_first_steps, measure, received
from launch.config import RunConfig
from launch.corpus import Corpus, load_corpus
from launch.engine import make_engine
from launch.guard import StopSignal, Watchdog, only_run
from launch.metrics import read_metrics
from launch.monitor import Monitor, Silent, Wandb
from launch.options import add_run_options, pick_device, run_changes
from launch.ranks import Ranks, join_ranks, started_processes
from launch.report import table, write_report
from launch.trainer import Trainer
from muse_dist import ByteCounter

# What a run leaves in its folder and --fresh removes.
LEFT_BEHIND = ("checkpoints", "tensorboard", "wandb", "wandb-id", "metrics.jsonl", "results.json", "model",
               "bad-step-*.json")
FINISHED = "finished"  # in the folder once all steps are done: launch/deepspeed.sh looks for it


def main(arguments: list[str] | None = None) -> int:
    """The command: train, measure on held-out text, write plots, tables and the model. Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with StopSignal().listening() as stop:
        try:
            config = RunConfig.from_toml(options.config, name=options.name, changes=run_changes(options))
            device = pick_device(options.device)
            started_processes(config.train.context_parallel)
            corpus = load_corpus(config.data)
        except (OSError, TypeError, ValueError) as error:
            parser.error(str(error))
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process is no mistake
        # DeepSpeed and Megatron call what newer versions of PyTorch have renamed.
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        # Every rank of Megatron would say so several times; it needs neither.
        warnings.filterwarnings("ignore", ".*(Apex|Transformer Engine).* not installed")
        warnings.filterwarnings("ignore", "full scope is deprecated")  # of CUDA graphs, which it does not record
        settings = config.train
        # A rank that hangs says so itself, before the exchange that waits for it gives up.
        with (join_ranks(device, config.layout, settings.context_parallel, settings.timeout + 60) as ranks,
              ExitStack() as held):
            try:
                ranks.on_first(lambda: held.enter_context(only_run(options.out / config.name, patience=_patience())))
                run = _Run(config, corpus, ranks, options)
            except (OSError, ValueError) as error:
                parser.error(str(error))
            return run.go(stop)


class _Run:
    """One rank of a run, from the opening of its folder to its report; one rank writes and prints."""

    def __init__(self, config: RunConfig, corpus: Corpus, ranks: Ranks, options: argparse.Namespace) -> None:
        """Raises ValueError or OSError, on every rank alike, for what cannot be."""
        self.config, self.corpus, self.ranks = config, corpus, ranks
        self.folder = options.out / config.name
        self.counter = ByteCounter()
        if ranks.size > 1:
            ranks.split(config.data.context, config.muse.block)
        ranks.on_first(lambda: _open(self.folder, options.fresh))
        checkpoints = Checkpoints(self.folder / "checkpoints", ranks, config.log.keep)
        self.done, self.skipped = checkpoints.newest()
        ranks.on_first(lambda: _check_results(self.folder, self.done))
        self.first_steps: dict[str, Any] = {}
        if self.finished:
            return
        if config.train.compare and ranks.size > 1 and self.done is None:
            self.first_steps = compare_first_steps(corpus, config, ranks)
        self.engine = make_engine(config, ranks, corpus.vocabulary, self.counter)
        self.trainer = Trainer(self.engine, corpus, config, ranks, Silent(), checkpoints, self.counter, self.folder)
        if self.done is not None:
            self.trainer.resume(self.done)
        monitor = ranks.on_first(lambda: _monitor(config, self.folder, options.wandb, self.done or 0))
        self.trainer.monitor = monitor or Silent()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, not even the report."""
        return (self.done is not None and self.done >= self.config.train.steps
                and (self.folder / "results.json").exists())

    def go(self, stop: StopSignal) -> int:
        """Train, measure and report. Returns the exit status."""
        if self.finished:
            if self.ranks.first:
                (self.folder / FINISHED).touch()
                print(f"{self.folder} is finished after {self.done} steps. --steps takes more, --fresh starts again")
            return 0
        dog = Watchdog(self.config.train.timeout, self.ranks.world_rank)  # for what comes after the last step
        with self.trainer.monitor as monitor, dog:
            self._say_hello(monitor)
            ended = self.trainer.run(stop=stop)
            monitor.close_bar()
            if self.first_steps:
                self.first_steps["traffic"][self.config.muse.exchange] = received(self.counter, self.trainer.step)
            if not ended:
                monitor.say(f"stopped by SIGTERM after step {self.trainer.step}; the same command goes on")
                return 0
            results = measure(self.engine, self.corpus, self.config, self.ranks, dog)
            monitor.summary(results["loss"])
            dog.feed("the writing of the model")
            self.engine.save_model(self.folder / "model")
        self._report(results)
        return 0

    def _say_hello(self, monitor: Monitor | Silent) -> None:
        for line in self.skipped:
            monitor.say(f"warning: {line}")
        monitor.say(f"{self.config.name}: {self.engine.parameters:,} parameters on {self.ranks.world} x "
                    f"{self.ranks.device.type}, {len(self.corpus.train):,} tokens to train on"
                    + ("" if self.done is None else f"; going on after step {self.done}"))

    def _report(self, results: dict[str, Any]) -> None:
        """Write what there is beside the model, on one rank."""
        config = self.config
        if not self.ranks.first:
            return
        rows = read_metrics(self.folder / "metrics.jsonl")
        history = {name: [row[name] for row in rows] for name in ("loss", "lr", "gradient_norm", "seconds")}
        if self.first_steps:
            self.first_steps["loss"]["this run"] = history["loss"][:len(self.first_steps["loss"]["one rank"])]
        results = {"name": config.name, "device": self.ranks.device.type, "ranks": self.ranks.world,
                   "torch": torch.__version__, **results, "parameters": self.engine.parameters,
                   "config": dataclasses.asdict(config), "first_steps": self.first_steps, "history": history}
        write_report(results, self.folder)
        (self.folder / FINISHED).touch()
        print(f"\n{table(results)}\n\nplots, results and model: {self.folder}")


def _patience() -> float:
    """Seconds that a run waits for its folder. One that torchrun starts again may come before a network file system
    knows that the host of the one before is gone."""
    return 120.0 if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else 0.0


def _open(folder: Path, fresh: bool) -> None:
    (folder / FINISHED).unlink(missing_ok=True)
    for path in [found for name in LEFT_BEHIND for found in folder.glob(name)] if fresh else ():
        _remove(path)


def _remove(path: Path) -> None:
    """A file, or a folder with all that is in it; of a link to a folder on another disk, all that is in that one."""
    if path.is_symlink() and path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_results(folder: Path, done: int | None) -> None:
    if done is None and (folder / "results.json").exists():
        raise ValueError(f"{folder} has the results of a run and no checkpoint to go on from; take another --name, or "
                         "--fresh to replace them")


def _monitor(config: RunConfig, folder: Path, wandb: Wandb, done: int) -> Monitor:
    """The monitor of the rank that shows; the settings beside what it writes."""
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "results.json").unlink(missing_ok=True)  # of fewer steps: the run is not finished any more
    return Monitor(config, folder, wandb, done)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.train", description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run of that name left, and start "
                        "again; else an unfinished one goes on")
    parser.add_argument("--wandb", choices=("off", "offline", "online"), default="off",
                        help="log to Weights & Biases too (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
