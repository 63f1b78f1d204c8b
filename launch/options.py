"""What command lines have in common: settings of a run and of MuSe, devices and dtypes."""
from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from launch.config import parse_changes
from launch.metrics import strict_json
from launch.ranks import Ranks, join_ranks
from muse_dist import MuseConfig

DTYPES = ("float32", "bfloat16", "float16")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which run: those of launch.train, which launch.doctor is to be given the same way."""
    parser.add_argument("--config", type=Path, required=True, help="TOML file with the run's settings")
    parser.add_argument("--name", help="folder of the run below --out; the config's file name by default")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs go (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="train this many steps instead of the config's")
    parser.add_argument("--seed", type=int, help="of the weights and the batches, instead of the config's")
    parser.add_argument("--engine", help="torch, deepspeed for its ZeRO, or megatron, instead of the config's")
    parser.add_argument("--attention", help="muse, or exact for the baseline, instead of the config's")
    parser.add_argument("--optimizer", help="adamw, or apex for NVIDIA's fused one, instead of the config's")
    parser.add_argument("--context-parallel", type=int, metavar="RANKS", help="that share a sequence, 0 for all, "
                        "instead of the config's")
    parser.add_argument("--data", metavar="FOLDER", help="tokens that python -m launch.data wrote, instead of the "
                        "config's")
    parser.add_argument("--set", nargs="+", default=[], metavar="TABLE.KEY=VALUE", action="extend",
                        help="any other setting, such as muse.opened=8 train.shard=true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run_changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says instead of the file, as `RunConfig.from_toml` takes it; ValueError for a bad --set."""
    named = {"train.steps": options.steps, "train.seed": options.seed,
             "train.engine": options.engine, "train.attention": options.attention,
             "train.optimizer": options.optimizer, "train.context_parallel": options.context_parallel,
             "data.path": options.data}
    return {**parse_changes(options.set), **{key: value for key, value in named.items() if value is not None}}


def whole_number(text: str) -> int:
    """The type of an option that is a number of something, at least 1.

    Raises ArgumentTypeError, to which argparse adds the option's name.
    """
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def positive(text: str) -> float:
    """The type of an option that is a size or a speed: finite, above 0. ArgumentTypeError as of `whole_number`."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number") from error
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{value} must be a finite number above 0")
    return value


def setting(text: str) -> tuple[str, Any]:
    """The name and value of NAME=VALUE; ValueError if there is no '='."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: write NAME=VALUE, such as opened=8 or trace=false")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def changed(preset: str, changes: Sequence[str]) -> MuseConfig:
    """A preset with the changes NAME=VALUE; ValueError or TypeError for what MuseConfig refuses."""
    return MuseConfig.from_dict({"preset": preset, **dict(map(setting, changes))})


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU; take --device cpu")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As on a command line."""
    return str(dtype).removeprefix("torch.")


def described_device(device: torch.device) -> str:
    """The model of a GPU, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def write_line(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(strict_json(row) + "\n")


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone, for a command with the options `device` and `layout`.

    The first rank prints what the package has to say, such as which backend "auto" took.
    """
    logger, handler = logging.getLogger("muse_dist"), logging.StreamHandler(sys.stdout)
    before = logger.level
    with join_ranks(pick_device(options.device), options.layout) as ranks:
        if ranks.first:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield ranks
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)
