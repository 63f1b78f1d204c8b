"""Train a small decoder with multipole semantic attention on the Python standard library's own sources.

    python -m launch.train --config configs/tiny.toml
    torchrun --standalone --nproc-per-node 2 -m launch.train --config configs/tiny.toml

Under torchrun the ranks share every sequence: each reads its part of the tokens, and they exchange what `muse.exchange`
says.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from launch.config import RunConfig
from launch.data import Corpus, load_corpus
from launch.model import ATTENTIONS, attention, build_model, held_out_losses, make_optimizer, seconds, token_losses
from launch.monitor import Monitor, Silent
from launch.ranks import Ranks, join_ranks
from launch.report import table, write_report
from muse_dist import ByteCounter, traffic

FIRST_STEPS = 3  # compared between one rank and all of them


def main(arguments: list[str] | None = None) -> None:
    """The command: train, measure on held-out text, write plots, tables and the model."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = RunConfig.from_toml(options.config, name=options.name, steps=options.steps, seed=options.seed)
        device = pick_device(options.device)
        corpus = load_corpus(config.data)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    transformers_logging.disable_progress_bar()
    with join_ranks(device, config.layout) as ranks:
        try:
            monitor = _prepare(config, ranks, options)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        _run(config, corpus, ranks, options.out / config.name, monitor)


def _prepare(config: RunConfig, ranks: Ranks, options: argparse.Namespace) -> Monitor | Silent:
    """Check what depends on the ranks, and make the folder and the monitor of the one that writes and prints."""
    if ranks.size > 1:
        ranks.split(config.data.context, config.muse.block)
    if not ranks.first:
        return Silent()
    folder = _fresh_folder(options.out / config.name)
    (folder / "config.toml").write_text(config.to_toml())
    return Monitor(config, folder, options.wandb)


def _run(config: RunConfig, corpus: Corpus, ranks: Ranks, folder: Path, monitor: Monitor | Silent) -> None:
    """Train, measure and report; one rank writes and prints."""
    first_steps = compare_first_steps(corpus, config, ranks) if ranks.size > 1 else {}
    counter = ByteCounter()
    model = build_model(config, ranks.device, ranks, counter)
    if ranks.first:
        print(f"{config.name}: {model.num_parameters():,} parameters on {ranks.size} x {ranks.device.type}, "
              f"{len(corpus.train):,} tokens to train on", flush=True)
    with monitor:
        history = train(model, corpus, config, monitor, ranks)
        monitor.close_bar()
        if first_steps:
            first_steps["traffic"][config.muse.exchange] = received(counter, config.train.steps)
            first_steps["loss"]["this run"] = history["loss"][:FIRST_STEPS]
        results = measure(model, corpus, config, ranks)
        monitor.summary(results["loss"])
    if ranks.first:
        results = {"name": config.name, "device": ranks.device.type, "ranks": ranks.size, "torch": torch.__version__,
                   **results, "parameters": model.num_parameters(), "config": dataclasses.asdict(config),
                   "first_steps": first_steps, "history": history}
        model.save_pretrained(folder / "model")
        write_report(results, folder)
        print(f"\n{table(results)}\n\nplots, results and model: {folder}")


def train(
    model: LlamaForCausalLM, corpus: Corpus, config: RunConfig, monitor: Monitor | Silent,
    ranks: Ranks | None = None, stop: int | None = None,
) -> dict[str, list[float]]:
    """Train in place. Returns the loss (nats), learning rate and gradient norm of every step, and its seconds.

    The batches are drawn from `train.seed`: on one machine the same seed gives the same curve. `ranks` share every
    sequence; `stop` ends after that many steps of the same schedule.

    Raises:
        FloatingPointError: a loss that is no number, with the step.
    """
    settings = config.train
    ranks = ranks or Ranks(0, 1, model.device, config.layout)
    split = ranks.split(config.data.context, config.muse.block) if ranks.size > 1 else None
    positions = None if split is None else split.positions(ranks.rank)
    wrapped = model if ranks.gradients is None else DistributedDataParallel(model, process_group=ranks.gradients)
    count = settings.batch * config.data.context
    optimizer = make_optimizer(model, config)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    history: dict[str, list[float]] = {"loss": [], "lr": [], "gradient_norm": [], "seconds": []}
    model.train()
    for step in range(1, (settings.steps if stop is None else stop) + 1):
        start = time.perf_counter()
        part = token_losses(wrapped, corpus.sequences(settings.batch, generator), positions).sum() / count
        loss = ranks.sum(part.detach().clone())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of step {step} is {loss.item()}; try a smaller train.lr")
        (part * ranks.size).backward()  # DistributedDataParallel averages over the ranks, which each hold a part
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        metrics = {"loss": loss.item(), "lr": schedule.get_last_lr()[0], "gradient_norm": norm.item()}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        monitor.step(step, metrics)
        for name, value in {**metrics, "seconds": time.perf_counter() - start}.items():
            history[name].append(value)
    return history


def compare_first_steps(corpus: Corpus, config: RunConfig, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Losses of the first steps from the same seed on one rank and on all with exchange="kv", which must agree.

    Returns:
        "loss" (nats) by run, and "traffic", the bytes a rank receives a step: measured for kv, predicted for ring
        attention.
    """
    counter, muse = ByteCounter(), config.muse
    alone = Ranks(0, 1, ranks.device, ranks.layout)
    model = build_model(config, ranks.device)
    losses = {"one rank": train(model, corpus, config, Silent(), alone, FIRST_STEPS)["loss"]}
    gathered = dataclasses.replace(config, muse=dataclasses.replace(muse, exchange="kv"))
    model = build_model(gathered, ranks.device, ranks, counter)
    losses[f"{ranks.size} ranks, kv"] = train(model, corpus, gathered, Silent(), ranks, FIRST_STEPS)["loss"]
    shape = config.model
    size = (config.train.batch, shape.heads, shape.kv_heads, config.data.context, shape.width // shape.heads)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    ring = traffic(muse, size, ranks.size, layout=ranks.layout, dtype=dtype).ring
    return {"loss": losses, "traffic": {"kv": received(counter, FIRST_STEPS),
                                        "ring": {k: v * shape.layers for k, v in ring.items()}}}


def received(counter: ByteCounter, steps: int) -> dict[str, int]:
    """Bytes a step, by exchange."""
    return {name: count // steps for name, count in counter.received.items()}


def measure(
    model: LlamaForCausalLM, corpus: Corpus, config: RunConfig, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Read the held-out text with every attention, and time a training step (forward and backward) with each.

    MuSe runs on all `ranks`; exact attention and the near field alone run on one, each rank doing the same.

    Returns:
        "loss" and "far_loss" (nats a token, over all positions and over those that have a far field), "step_seconds",
        "position_loss" (nats at every position), each by attention, "unigram_entropy" and "near_reach".
    """
    model.eval()
    sequences = corpus.held_out_sequences(config.data.held_out_sequences)
    batch = corpus.sequences(config.train.batch, torch.Generator().manual_seed(config.train.seed))
    reach = config.near_reach
    results: dict[str, Any] = {"loss": {}, "far_loss": {}, "step_seconds": {}, "position_loss": {}}
    for name in ATTENTIONS:
        shared = ranks if ranks is not None and ranks.size > 1 and name == "muse" else None
        split = None if shared is None else shared.split(config.data.context, config.muse.block)
        positions = None if shared is None or split is None else split.positions(shared.rank)
        with attention(model, name):
            losses = held_out_losses(model, sequences, split, shared)
            results["loss"][name] = losses.mean().item()
            results["far_loss"][name] = losses[:, reach:].mean().item() if reach < losses.shape[1] else None
            results["position_loss"][name] = losses.mean(0).tolist()
            results["step_seconds"][name] = seconds(
                partial(_backward, model, batch, positions), model.device)
    model.zero_grad()
    return {**results, "unigram_entropy": corpus.held_out_entropy(), "near_reach": reach}


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU; take --device cpu")
    return torch.device(name)


def _backward(model: LlamaForCausalLM, batch: Tensor, positions: Tensor | None) -> None:
    token_losses(model, batch, positions).mean().backward()


def _fresh_folder(folder: Path) -> Path:
    """A run replaces an earlier one of the same name, of whose events TensorBoard would draw a second curve."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="TOML file with the run's settings")
    parser.add_argument("--name", help="folder of the run below --out; the config's file name by default")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs go (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="train this many steps instead of the config's")
    parser.add_argument("--seed", type=int, help="of the weights and the batches, instead of the config's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--wandb", choices=("off", "offline", "online"), default="off",
                        help="log to Weights & Biases too (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
