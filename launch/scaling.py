"""Train every combination of model, context, ranks and attention for a while, and report how it scales.

    python -m launch.scaling --config configs/125m.toml configs/350m.toml --context 16384 65536 --ranks 1 2 4 \\
        --steps 20 --out runs/scaling
    python -m launch.scaling --report --out runs/scaling

Every run is `launch.train` under torchrun on this node, whose ranks share every sequence unless
`--set train.context_parallel=N` says otherwise. OUT/rows.jsonl gets a line a run, also for one that failed; the same
command goes on where it was interrupted, inside a run too. launch.plan takes the rows to calibrate itself.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

from launch.config import RunConfig
from launch.options import described_device, pick_device, write_line
from launch.scaling_report import write_report
from launch.scaling_row import measured, reason

Row = dict[str, Any]
ROWS = "rows.jsonl"
GRACE = 60.0  # seconds from SIGTERM, at which launch.train saves, to SIGKILL
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
        options.out.mkdir(parents=True, exist_ok=True)
        rows = read_done(options.out / ROWS)
        if not options.report:
            with _ending():
                rows = sweep(options, rows)
        if not rows:
            raise ValueError(f"{options.out / ROWS} has no rows; start without --report")
        print(write_report(list(rows.values()), options.out))
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
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is no row of launch.scaling; move the file away") from error
    return rows


def sweep(options: argparse.Namespace, rows: dict[Job, Row]) -> dict[Job, Row]:
    """Run what is not there yet, and with --retry what failed. Returns all rows, in the order of the sweep."""
    device = pick_device(options.device)
    configs = _configs(options.config)
    jobs = [Job(*values) for values in product(configs, options.context or [0], options.ranks, options.attention)]
    if not options.context:
        jobs = [Job(job.model, RunConfig.from_toml(configs[job.model]).data.context, job.ranks, job.attention)
                for job in jobs]
    for number, job in enumerate(jobs, 1):
        before = rows.get(job)
        if before is not None and not (options.retry and "failed" in before):
            continue
        print(f"{number}/{len(jobs)} {job.name}", file=sys.stderr, flush=True)
        row = {"benchmark": "scaling", **asdict(job), "device": described_device(device),
               **run_job(job, configs[job.model], options)}
        write_line(options.out / ROWS, row)
        rows[job] = row
        print(f"  {row.get('failed') or format_speed(row)}", file=sys.stderr, flush=True)
    return rows


def format_speed(row: Row) -> str:
    """What a run reached, in a line."""
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


def run_job(job: Job, config: Path, options: argparse.Namespace) -> Row:
    """Train; what was measured, or "failed" with the reason."""
    folder = options.out / job.name
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    status = _run(_command(job, config, options), log, options.limit)
    if status is None:
        return {"failed": f"not done in {options.limit:g} s; --retry goes on with it"}
    if status or not (folder / "results.json").exists():
        return {"failed": reason(log.read_text(errors="replace"), status)}
    row = measured(folder, options.skip)
    for name in () if options.keep else BULKY:
        shutil.rmtree(folder / name, ignore_errors=True)
    return row


def _command(job: Job, config: Path, options: argparse.Namespace) -> list[str]:
    settings = [f"data.context={job.context}", *options.set]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks),
            "-m", "launch.train", "--config", str(config), "--out", str(options.out), "--name", job.name,
            "--attention", job.attention, "--steps", str(options.steps), "--device", options.device,
            "--wandb", options.wandb, *(["--data", options.data] if options.data else []), "--set", *settings]


def _run(command: Sequence[str], log: Path, limit: float) -> int | None:
    """Exit status, or None if it took longer than `limit` seconds. Nothing it started outlives this call."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to torchrun, which tells its ranks, and after a while SIGKILL to all that is left of its session."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _ending() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the run in progress is ended too."""
    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.scaling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=[], help="TOML files of launch.train: the models")
    parser.add_argument("--context", type=int, nargs="+", help="tokens of a sequence (default: each config's)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="processes, one a GPU (default: 1)")
    parser.add_argument("--attention", nargs="+", choices=("muse", "exact"), default=["muse", "exact"])
    parser.add_argument("--steps", type=int, default=20, help="of every run (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=3, help="first steps whose time does not count "
                        "(default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="TABLE.KEY=VALUE", action="extend",
                        help="another setting of launch.train, for all runs")
    parser.add_argument("--data", metavar="FOLDER", help="tokens that launch.data wrote (default: each config's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="for one run "
                        "(default: %(default)s)")
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument("--keep", action="store_true", help="keep models and checkpoints of finished runs")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report")
    parser.add_argument("--wandb", choices=("off", "offline", "online"), default="off", help="of every run")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
