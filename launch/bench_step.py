"""Training steps of a Llama under DeepSpeed, one attention after the other, on the same GPUs.

    python -m launch.bench step --config configs/1b.toml --stage 1

Each attention trains in processes of its own, one a GPU, which share every sequence: one that runs out of memory or
hangs is a row that says so, and the next starts afresh. Everything else is the same for all: weights, sequences,
DeepSpeed's engine, loss, activation checkpointing.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.config import RunConfig
from launch.failures import first_failure
from launch.options import pick_device, setting, write_line
from muse_dist.deepspeed_section import read_config
from muse_dist.layout import Layout

EXACT = ("ulysses", "torch-cp")  # DeepSpeed's, and torch's own context parallelism
ATTENTIONS = ("moments", "kv", *EXACT)
SAME_LOSS = 0.01  # nats between the first losses of exact attentions in bf16, which differ by rounding alone


def add_command(commands: Any) -> None:
    """Add `step` to the benchmarks of `launch.bench`; its options carry `run`, the function to call with them."""
    command = commands.add_parser("step", help="training steps under DeepSpeed with MuSe and its exact rivals",
                                  description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--config", type=Path, default=Path("configs/1b.toml"),
                         help="shape of the model, random weights; context and settings of MuSe (default: %(default)s)")
    command.add_argument("--tokens", type=int, help="of a sequence, instead of the config's context")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="a field of MuseConfig, or preset, instead of the config's; repeat for more")
    command.add_argument("--ranks", type=int, help="that share a sequence; one a GPU by default, 2 on the CPU")
    command.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=1, help="of ZeRO (default: %(default)s)")
    command.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), metavar="NAME",
                         help=f"of {', '.join(ATTENTIONS)} (default: all)")
    command.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True,
                         help="activation checkpointing of every layer")
    command.add_argument("--warmup", type=int, default=2, help="steps that are not timed (default: %(default)s)")
    command.add_argument("--steps", type=int, default=5, help="timed steps; the median counts (default: %(default)s)")
    command.add_argument("--seconds", type=float, metavar="N", help="begin no further timed step once the processes of "
                         "an attention have run so long; one is timed at least (default: all)")
    command.add_argument("--limit", type=float, default=600.0, metavar="SECONDS",
                         help="for one attention, after which it is ended without a measurement (default: %(default)s)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a row to this file")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure a row an attention and print the table. ValueError for options that cannot be."""
    device = pick_device(options.device)
    for name in ("warmup", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
    ranks = options.ranks or (torch.cuda.device_count() if device.type == "cuda" else 2)
    jobs = [make_job(options, name, ranks, device.type) for name in options.attention]
    for job in jobs:  # what cannot be is said before anything runs
        section, _ = read_config(deepspeed_config(job))
        Layout(section.layout, ranks, run_config(job).data.context, section.muse.block)
    rows = []
    for job in jobs:
        rows.append(measure(job, options.limit))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if options.json is not None:
            write_line(options.json, rows[-1])
    print(step_table(rows))


def make_job(options: argparse.Namespace, attention: str, ranks: int, device: str) -> dict[str, Any]:
    """What the processes of a row are told."""
    changes = {f"muse.{name}": value for name, value in map(setting, options.set)}
    if options.tokens is not None:
        changes["data.context"] = options.tokens
    return {"attention": attention, "ranks": ranks, "device": device, "config": str(options.config), "changes": changes,
            "timeout_seconds": options.limit / 2, "stage": options.stage, "recompute": options.recompute,
            "warmup": options.warmup, "steps": options.steps, "seconds_at_most": options.seconds}


def run_config(job: dict[str, Any]) -> RunConfig:
    """The settings of model, sequences and MuSe; ValueError, TypeError or OSError as `RunConfig.from_toml`."""
    return RunConfig.from_toml(job["config"], changes=job["changes"])


def deepspeed_config(job: dict[str, Any]) -> dict[str, Any]:
    """The same for all: rivals get their attention after DeepSpeed has started with MuSe's."""
    muse = json.loads(run_config(job).muse.encoded)
    if job["attention"] not in EXACT:
        muse["exchange"] = job["attention"]
    layout = "contiguous" if job["attention"] == "ulysses" else "zigzag"  # Ulysses gathers chunks in rank order
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "steps_per_print": 10 ** 9,
        "bf16": {"enabled": job["device"] == "cuda"}, "zero_optimization": {"stage": job["stage"]},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "muse": {**muse, "context_parallel_size": job["ranks"], "layout": layout,
                 "timeout_seconds": job["timeout_seconds"]}}


def measure(job: dict[str, Any], limit: float) -> dict[str, Any]:
    """One row: what the first of the processes reports, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        row, log = Path(folder, "row.json"), Path(folder, "log")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job["ranks"]),
                   "-m", "launch.step_row", json.dumps(job), str(row)]
        with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its processes
                status = None
        if status == 0 and row.exists():
            return {**job, **json.loads(row.read_text())}
        text = log.read_text()
    late = [f"not done in {limit:g} s"] if status is None else []
    return {**job, "error": "; ".join([*late, first_failure(text)])}


def step_table(rows: list[dict[str, Any]]) -> str:
    """Rows as text, with tokens/s relative to the fastest exact attention whose first loss agrees with another's."""
    exact = [row for row in rows if row["attention"] in EXACT and "error" not in row]
    wrong = exact and max(row["loss"] for row in exact) - min(row["loss"] for row in exact) > SAME_LOSS
    best = max((row["tokens_per_second"] for row in exact), default=None)
    lines = [f"{'attention':<16}{'step s':>9}{'fastest':>9}{'slowest':>9}{'tokens/s':>12}{'GiB':>8}{'first loss':>12}"
             f"{'speed-up':>10}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['attention']:<16}{row['error']}")
            continue
        gain = "-" if wrong or best is None else f"{row['tokens_per_second'] / best:.2f}x"
        memory = "-" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
        lines.append(f"{row['attention']:<16}{row['step_seconds']:>9.3f}{min(row['seconds']):>9.3f}"
                     f"{max(row['seconds']):>9.3f}{row['tokens_per_second']:>12,.0f}{memory:>8}{row['loss']:>12.4f}"
                     f"{gain:>10}")
    if wrong:
        lines.append(f"the first losses of the exact attentions differ by more than {SAME_LOSS} nats: no speed-up")
    return "\n".join(lines)
