"""Train every combination of model, context, ranks and attention for a while, and report how it scales.

    python -m launch.scaling --config configs/125m.toml configs/350m.toml --context 16384 65536 --ranks 1 2 4 \\
        --steps 20 --out runs/scaling
    python -m launch.scaling --config configs/1b.toml --ranks 1 2 4 --speed-only --side-by-side 4 --steps 5
    python -m launch.scaling --report --out runs/scaling --page launch/results/scaling.md

Every run is `launch.train` under torchrun on this node, whose ranks share every sequence unless
`--set train.context_parallel=N` says otherwise. With --speed-only nothing is learned: runs on as many ranks time steps
over random tokens in the same processes. OUT/rows.jsonl gets a line a run, also for one that failed, with the log that
says why; the same command goes on where it was interrupted, without --speed-only inside a run too, and refuses rows of
other settings. launch.plan takes the rows to calibrate itself.
"""
from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from threading import Event, Lock
from typing import Any

from launch.config import RunConfig, parse_changes
from launch.failures import reason
from launch.flops import step_flops
from launch.monitor import load_wandb
from launch.options import described_device, pick_device, positive, whole_number, write_line
from launch.scaling_report import log_report, write_report
from launch.scaling_row import Row, measured
from launch.scaling_runs import Slot, ending, run, side_by_side, slots

ROWS = "rows.jsonl"
BULKY = ("checkpoints", "model", "tensorboard")  # of a finished run


@dataclass(frozen=True)
class Job:
    """One run of the sweep; it is told apart by these fields, and a row is not measured twice."""

    model: str
    context: int
    ranks: int
    attention: str

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.model}-{self.context}-{self.ranks}-{self.attention}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the head of this file. Returns 1 if a run failed, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        wandb = None if options.wandb == "off" else load_wandb(options.wandb)
        rows = read_done(options.out / ROWS)
        if not options.report:
            options.out.mkdir(parents=True, exist_ok=True)
            with ending():
                rows = sweep(options, rows)
        if not rows:
            raise ValueError(f"{options.out / ROWS} has no rows; start without --report")
        page = options.page or options.out / "report.md"
        print(write_report(list(rows.values()), page))
        if wandb is not None:
            log_report(wandb, list(rows.values()), page, options.out, options.wandb)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    return int(any("failed" in row for row in rows.values()))


def read_done(path: Path) -> dict[Job, Row]:
    """The last row of every job; a last line that was cut off is dropped from the file, and its run goes on.

    Raises:
        ValueError: another line is no row of this command.
    """
    if not path.exists():
        return {}
    lines, rows = path.read_bytes().splitlines(keepends=True), {}
    if lines and not lines[-1].endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:-1])))
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[Job(row["model"], row["context"], row["ranks"], row["attention"])] = row
            if "losses" in row:  # null where a step that was left out had none
                row["losses"] = [math.nan if loss is None else loss for loss in row["losses"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is no row of launch.scaling; move the file away") from error
    return rows


class Sweep:
    """What all runs have in common, and their rows."""

    def __init__(self, options: argparse.Namespace, rows: dict[Job, Row], configs: dict[str, Path]) -> None:
        self.options, self.rows, self.configs = options, rows, configs
        self.device = pick_device(options.device)
        self._lock = Lock()

    def add(self, job: Job, row: Row) -> None:
        """Keep what is known of a run now, and print it."""
        row = {"benchmark": "scaling", **asdict(job), "device": described_device(self.device),
               "side_by_side": self.options.side_by_side, "asked": self.asked(job), **row}
        with self._lock:
            write_line(self.options.out / ROWS, row)
            self.rows[job] = row
            print(f"{job.name}: {format_row(row)}", file=sys.stderr, flush=True)

    def fail(self, job: Job, status: int | None, log: Path, more: str = "") -> None:
        """Keep why a run has no measurement; `status` is that of its processes, None if they took too long."""
        why = reason(log.read_text(errors="replace"), status) if status is not None else (
            f"not done in {self.options.limit:g} s{more}")
        self.add(job, {"failed": why, "log": str(log)})

    def changes(self, job: Job) -> list[str]:
        """Settings of a run that are not the file's. One rank has nobody to split weights with."""
        return [f"data.context={job.context}", *self.options.set, *(["train.shard=false"] if job.ranks == 1 else [])]

    def asked(self, job: Job) -> Row:
        """What the command line says of a run, which has to be the same for its row to count."""
        options = self.options
        return {"changes": self.changes(job), "data": options.data, "steps": options.steps, "skip": options.skip,
                "speed_only": options.speed_only, "engine": self.config(job).train.engine}

    def config(self, job: Job) -> RunConfig:
        """The settings of a run."""
        return RunConfig.from_toml(self.configs[job.model], changes={
            **parse_changes(self.changes(job)), "train.attention": job.attention})

    def differences(self, job: Job) -> list[str]:
        """What was asked when this run's row was made, where it is not what is asked now; none without a row."""
        if job not in self.rows:
            return []
        then = self.rows[job].get("asked", {})
        return [f"{name} was {then.get(name)} and is now {value}" for name, value in self.asked(job).items()
                if then.get(name) != value]

    def train(self, job: Job, slot: Slot, stop: Event) -> None:
        """A run of launch.train."""
        options, folder = self.options, self.options.out / job.name
        folder.mkdir(exist_ok=True)
        command = ["launch.train", "--config", str(self.configs[job.model]), "--out", str(options.out),
                   "--name", job.name, "--attention", job.attention, "--steps", str(options.steps),
                   "--device", options.device, "--wandb", options.wandb,
                   *(["--fresh"] if self.differences(job) else []),
                   *(["--data", options.data] if options.data else []), "--set", *self.changes(job)]
        log = folder / "log.txt"
        status = run(_torchrun(job.ranks, command), log, options.limit, slot, stop)
        if status != 0 or not (folder / "results.json").exists():
            self.fail(job, status, log, "; --retry goes on with it")
        else:
            self.add(job, measured(folder, options.skip))
            for name in () if options.keep else BULKY:
                shutil.rmtree(folder / name, ignore_errors=True)

    def time(self, jobs: list[Job], slot: Slot, stop: Event) -> None:
        """Runs on as many ranks that time their steps one after the other; where one fails the rest start afresh."""
        options, left = self.options, list(jobs)
        folder = options.out / "speed" / jobs[0].name
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / ROWS

        def collect() -> int:
            done = read_done(rows)
            for job in [job for job in left if job in done]:
                left.remove(job)
                self.add(job, done[job])
            return len(left)

        while left:
            rows.unlink(missing_ok=True)
            log = folder / f"{left[0].name}.log"  # one a start: the next would write over what this one says
            task = {"device": options.device, "skip": options.skip, "rows": str(rows), "jobs": [
                {"row": asdict(job), "config": str(self.configs[job.model]), "changes": [
                    *self.changes(job), f"train.attention={job.attention}", f"train.steps={options.steps}",
                    "train.bad_step=stop", "log.probe_every=0"]} for job in left]}
            status = run(_torchrun(jobs[0].ranks, ["launch.scaling_speed", json.dumps(task)]), log, options.limit,
                         slot, stop, collect)
            collect()
            if left:
                self.fail(left.pop(0), status, log)


def sweep(options: argparse.Namespace, rows: dict[Job, Row]) -> dict[Job, Row]:
    """Run what is not there yet, and with --retry what failed. Returns all rows."""
    if not 0 <= options.skip < options.steps:
        raise ValueError(f"--skip {options.skip} leaves none of the {options.steps} steps; take more --steps")
    if options.speed_only and (options.data or options.keep):
        raise ValueError("--speed-only reads random tokens and leaves nothing but rows: leave --data and --keep out")
    named = {"data.context": "--context", "data.path": "--data", "train.attention": "--attention",
             "train.steps": "--steps"}
    for key in parse_changes(options.set).keys() & named.keys():
        raise ValueError(f"--set {key}: rows are told apart by what {named[key]} says; say it there")
    whole = Sweep(options, rows, _configs(options.config))
    jobs = _jobs(options, whole.configs)
    other = {job: found for job in jobs if (found := whole.differences(job))}
    if other and not options.retry:
        job, found = next(iter(other.items()))
        raise ValueError(f"{options.out / ROWS} has {len(other)} of these runs with other settings ({job.name}: "
                         f"{', '.join(found)}); take another --out, or --retry to run them again")
    todo = [job for job in jobs if job not in rows or (options.retry and (job in other or "failed" in rows[job]))]
    print(f"{len(todo)} of {len(jobs)} runs to do", file=sys.stderr, flush=True)
    for ranks in dict.fromkeys(job.ranks for job in todo):
        places = slots(whole.device, ranks, options.side_by_side)
        mine = [job for job in todo if job.ranks == ranks]
        work: Callable[[Any, Slot, Event], None] = whole.time if options.speed_only else whole.train
        batches: Sequence[Any] = shares(mine, len(places), partial(_cost, whole)) if options.speed_only else mine
        side_by_side(batches, places, work)
    return rows


def _jobs(options: argparse.Namespace, configs: dict[str, Path]) -> list[Job]:
    """All runs, in the order of the command's words; the first number of ranks comes first, then the first context."""
    contexts = {model: options.context or [RunConfig.from_toml(path).data.context] for model, path in configs.items()}
    lengths = dict.fromkeys(context for found in contexts.values() for context in found)
    return [Job(model, context, ranks, attention)
            for ranks, context, model, attention in product(options.ranks, lengths, configs, options.attention)
            if context in contexts[model]]


def shares(jobs: Sequence[Job], count: int, cost: Callable[[Job], float]) -> list[list[Job]]:
    """Jobs dealt out, each to the share that has the least to do, in their order."""
    found: list[list[Job]] = [[] for _ in range(count)]
    load = [0.0] * count
    for job in jobs:
        place = load.index(min(load))
        found[place].append(job)
        load[place] += cost(job)
    return [share for share in found if share]


def _cost(whole: Sweep, job: Job) -> float:
    """Operations of a run's steps."""
    config = whole.config(job)
    return step_flops(config.model, config.model.vocabulary, config.train.batch * job.context, job.context,
                      config.muse if job.attention == "muse" else None)


def _torchrun(ranks: int, command: Sequence[str]) -> list[str]:
    """`python -m COMMAND` as one process, or by torchrun."""
    many = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *many, *command]


def format_row(row: Row) -> str:
    """What a run reached, or why it failed and where that is said, in a line."""
    if "failed" in row:
        return f"{row['failed']} (log: {row['log']})"
    return f"{row['seconds']:.3f} s a step, {row['tokens_per_second'] / row['ranks']:,.0f} tokens/s a rank"


def _configs(paths: Sequence[Path]) -> dict[str, Path]:
    """By name; ValueError for a file that is no configuration, or two of a name."""
    if not paths:
        raise ValueError("--config: give at least one, or --report to read what was measured")
    found = {path.stem: path for path in paths}
    if len(found) < len(paths):
        raise ValueError("--config: two files have the same name, and runs are told apart by it")
    for path in paths:
        RunConfig.from_toml(path)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.scaling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=[], help="TOML files of launch.train: the models")
    parser.add_argument("--context", type=whole_number, nargs="+", help="tokens of a sequence (default: each config's)")
    parser.add_argument("--ranks", type=whole_number, nargs="+", default=[1], help="processes, one a GPU (default: 1)")
    parser.add_argument("--attention", nargs="+", choices=("muse", "exact"), default=["muse", "exact"])
    parser.add_argument("--steps", type=whole_number, default=20, help="of every run (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=3, help="first steps whose time does not count "
                        "(default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="TABLE.KEY=VALUE", action="extend",
                        help="another setting of launch.train, for all runs")
    parser.add_argument("--data", metavar="FOLDER", help="tokens that launch.data wrote (default: each config's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--limit", type=positive, default=3600.0, metavar="SECONDS", help="for one run "
                        "(default: %(default)s)")
    parser.add_argument("--retry", action="store_true", help="run again what has failed, or was run with "
                        "other settings")
    parser.add_argument("--keep", action="store_true", help="keep models and checkpoints of finished runs")
    parser.add_argument("--speed-only", action="store_true", help="time steps over random tokens, with no loss, "
                        "checkpoint or model; runs on as many ranks share the start of their processes")
    parser.add_argument("--side-by-side", type=whole_number, default=1, metavar="RUNS", help="at most so many at a "
                        "time, each on GPUs of its own (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the report there, with its plots and rows "
                        "beside it (default: OUT/report.md)")
    parser.add_argument("--wandb", choices=("off", "offline", "online"), default="off",
                        help="log the report's table and plots to Weights & Biases, and without --speed-only the "
                        "curves of every run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
