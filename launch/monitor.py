"""What a training run shows while it goes: a bar or plain lines, JSON lines, TensorBoard events, wandb."""
from __future__ import annotations

import dataclasses
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from launch.config import RunConfig
from launch.metrics import MetricsFile

Wandb = Literal["off", "offline", "online"]


class Monitor:
    """Takes the numbers of every step. A context manager: leaving it closes the files.

    Args:
        config: the run; its steps, tokens a step and name.
        folder: the run's folder; events go to `tensorboard/` and `wandb/` below it, lines to `metrics.jsonl`.
        wandb: "off", "offline" (files only, no account) or "online".
        done: steps that are behind; what is logged of later ones is replaced.
    Raises:
        ValueError: wandb is asked for and not installed.
    """

    def __init__(self, config: RunConfig, folder: Path, wandb: Wandb = "off", done: int = 0) -> None:
        self._wandb = _start_wandb(config, folder, wandb) if wandb != "off" else None
        self._events: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._file = MetricsFile(folder / "metrics.jsonl", done)
        self._steps, self._tokens = config.train.steps, config.train.batch * config.data.context
        self._done = done
        self._line_every = max(config.train.steps // 20, 1)
        self._start = time.perf_counter()
        self._name = config.name
        self._bar: tqdm[Any] | None = None
        self._complained = False
        if self._file.missing:
            self.say(f"warning: metrics.jsonl has no line of {self._file.missing} of the {done} steps before; tables "
                     "and plots leave them out")

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show and log the metrics of step 1, 2, ...; "loss" must be among them. Tables of numbers may be nested."""
        elapsed = time.perf_counter() - self._start
        here = step - self._done
        rate = here * self._tokens / elapsed
        numbers = flat(metrics)
        self._complain(self._file.write({"step": step, **metrics}))
        self._complain(self._add_events({f"train/{name}": value for name, value in numbers.items()}, step))
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            self._bar.update(self._tokens)
        elif step % self._line_every == 0 or here == 1 or step == self._steps:
            left = tqdm.format_interval((self._steps - step) * elapsed / here)
            print(f"step {step}/{self._steps}  loss {metrics['loss']:.3f}  {rate:,.0f} tokens/s  {left} left"
                  + cost_of(metrics), flush=True)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def _complain(self, problem: str | None) -> None:
        """Say once that the disk does not take what is logged: training need not stop for it."""
        if problem is not None and not self._complained:
            self._complained = True
            self.say(f"warning: {problem}")

    def _add_events(self, values: dict[str, float], step: int) -> str | None:
        """Numbers for TensorBoard. Its writer does not recover from an error, so that is the end of its events."""
        if self._events is None:
            return None
        try:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            self._events = None
            return f"TensorBoard's events end before step {step}: {error.strerror}"
        return None

    def sync(self) -> None:
        """Have the metrics on the disk."""
        self._complain(self._file.sync())

    def summary(self, values: dict[str, float]) -> None:
        """Log the numbers of the end of the run."""
        self._complain(self._add_events({f"held_out/{name}": value for name, value in values.items()}, self._steps))
        if self._wandb is not None:
            self._wandb.summary.update({f"held_out/{name}": value for name, value in values.items()})

    def close_bar(self) -> None:
        """End the progress bar, so that what is printed next starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Monitor:
        """The clock and the bar start here, when training does."""
        self._start = time.perf_counter()
        if sys.stdout.isatty():
            self._bar = tqdm(total=self._steps * self._tokens, initial=self._done * self._tokens, unit=" tokens",
                             unit_scale=True, file=sys.stdout, desc=self._name, dynamic_ncols=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close_bar()
        if self._events is not None:
            self._events.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


class Silent:
    """The monitor of ranks that leave showing to another; with `rows` it remembers."""

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self._rows = rows

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Remember, if asked to."""
        if self._rows is not None:
            self._rows.append({"step": step, **metrics})

    def say(self, text: str) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def summary(self, values: dict[str, float]) -> None:
        """Nothing."""

    def close_bar(self) -> None:
        """Nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""


def cost_of(metrics: dict[str, Any]) -> str:
    """What is known of a step's cost, for the end of a line."""
    parts = []
    if "flop_utilisation" in metrics:
        parts.append(f"{metrics['flop_utilisation']:.1%} of the peak FLOP/s")
    if "memory_bytes" in metrics:
        parts.append(f"{metrics['memory_bytes'] / 1e9:.2f} GB")
    if metrics.get("received_bytes"):
        parts.append(f"{metrics['received_bytes'] / 1e6:.2f} MB received")
    return "".join(f"  {part}" for part in parts)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested tables of numbers as one, with names such as "stages/forward"; what is no number is left out."""
    return dict(_numbers(values, prefix))


def _numbers(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, float(value)


def load_wandb(mode: Literal["offline", "online"]) -> Any:
    """The module; ValueError if it is not installed."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(f"--wandb {mode}: wandb is not installed; pip install 'muse_dist[wandb]', "
                         "or leave the option out") from error
    return wandb


def _start_wandb(config: RunConfig, folder: Path, mode: Literal["offline", "online"]) -> Any:
    """A wandb run whose id is kept beside the metrics: a run that goes on is one curve there too."""
    wandb = load_wandb(mode)
    kept = folder / "wandb-id"
    if not (kept.exists() and kept.read_text()):  # a run that was killed here left it empty
        kept.write_text(secrets.token_hex(4))
    return wandb.init(project="muse_dist", name=config.name, mode=mode, dir=str(folder), id=kept.read_text(),
                      resume="allow", config=dataclasses.asdict(config))
