"""Train a small decoder with multipole semantic attention on the Python standard library's own sources.

    python -m launch.train --config configs/tiny.toml
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from launch.config import RunConfig
from launch.data import Corpus, load_corpus
from launch.model import ATTENTIONS, attention, build_model, held_out_losses, make_optimizer, seconds, token_losses
from launch.monitor import Monitor
from launch.report import table, write_report


def main(arguments: list[str] | None = None) -> None:
    """The command: train, measure on held-out text, write plots, tables and the model."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = RunConfig.from_toml(options.config, name=options.name, steps=options.steps, seed=options.seed)
        device = pick_device(options.device)
        corpus = load_corpus(config.data)
        folder = _fresh_folder(options.out / config.name)
        (folder / "config.toml").write_text(config.to_toml())
        monitor = Monitor(config, folder, options.wandb)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    transformers_logging.disable_progress_bar()
    model = build_model(config, device)
    print(f"{config.name}: {model.num_parameters():,} parameters on {device}, {len(corpus.train):,} tokens to train on")
    with monitor:
        history = train(model, corpus, config, monitor)
        monitor.close_bar()
        results = measure(model, corpus, config)
        monitor.summary(results["loss"])
    results = {"name": config.name, "device": str(device), "torch": torch.__version__, **results,
               "parameters": model.num_parameters(), "config": dataclasses.asdict(config), "history": history}
    model.save_pretrained(folder / "model")
    write_report(results, folder)
    print(f"\n{table(results)}\n\nplots, results and model: {folder}")


def train(model: LlamaForCausalLM, corpus: Corpus, config: RunConfig, monitor: Monitor) -> dict[str, list[float]]:
    """Train in place. Returns the loss (nats), learning rate and gradient norm of every step, and its seconds.

    The batches are drawn from `train.seed`: on one machine the same seed gives the same curve.

    Raises:
        FloatingPointError: a loss that is no number, with the step.
    """
    settings = config.train
    optimizer = make_optimizer(model, config)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    history: dict[str, list[float]] = {"loss": [], "lr": [], "gradient_norm": [], "seconds": []}
    model.train()
    for step in range(1, settings.steps + 1):
        start = time.perf_counter()
        loss = token_losses(model, corpus.sequences(settings.batch, generator)).mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of step {step} is {loss.item()}; try a smaller train.lr")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        metrics = {"loss": loss.item(), "lr": schedule.get_last_lr()[0], "gradient_norm": norm.item()}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        monitor.step(step, metrics)
        for name, value in {**metrics, "seconds": time.perf_counter() - start}.items():
            history[name].append(value)
    return history


def measure(model: LlamaForCausalLM, corpus: Corpus, config: RunConfig) -> dict[str, Any]:
    """Read the held-out text with every attention, and time a training step (forward and backward) with each.

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
        with attention(model, name):
            losses = held_out_losses(model, sequences)
            results["loss"][name] = losses.mean().item()
            results["far_loss"][name] = losses[:, reach:].mean().item() if reach < losses.shape[1] else None
            results["position_loss"][name] = losses.mean(0).tolist()
            results["step_seconds"][name] = seconds(lambda: _backward(model, batch), model.device)
    model.zero_grad()
    return {**results, "unigram_entropy": corpus.held_out_entropy(), "near_reach": reach}


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU; take --device cpu")
    return torch.device(name)


def _backward(model: LlamaForCausalLM, batch: Tensor) -> None:
    token_losses(model, batch).mean().backward()


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
