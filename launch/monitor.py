"""What a training run shows while it goes: a progress bar or plain lines, TensorBoard events, wandb."""
from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from launch.config import RunConfig


class Monitor:
    """Takes the numbers of every step. A context manager: leaving it closes the files.

    Args:
        config: the run; its steps, tokens a step and name.
        folder: the run's folder; events go to `tensorboard/` and `wandb/` below it.
        wandb: "off", "offline" (files only, no account) or "online".
    Raises:
        ValueError: wandb is asked for and not installed.
    """

    def __init__(self, config: RunConfig, folder: Path, wandb: str = "off") -> None:
        self._wandb = _start_wandb(config, folder, wandb) if wandb != "off" else None
        self._events = SummaryWriter(str(folder / "tensorboard"))
        self._steps, self._tokens = config.train.steps, config.train.batch * config.data.context
        self._line_every = max(config.train.steps // 20, 1)
        self._start = time.perf_counter()
        self._name = config.name
        self._bar: tqdm[Any] | None = None

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show and log the metrics of step 1, 2, ...; "loss" must be among them."""
        elapsed = time.perf_counter() - self._start
        rate = step * self._tokens / elapsed
        for name, value in metrics.items():
            self._events.add_scalar(f"train/{name}", value, step)
        self._events.add_scalar("train/tokens_per_second", rate, step)
        if self._wandb is not None:
            self._wandb.log({**metrics, "tokens_per_second": rate}, step=step)
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            self._bar.update(self._tokens)
        elif step % self._line_every == 0 or step in (1, self._steps):
            left = tqdm.format_interval((self._steps - step) * elapsed / step)
            print(f"step {step}/{self._steps}  loss {metrics['loss']:.3f}  {rate:,.0f} tokens/s  {left} left",
                  flush=True)

    def summary(self, values: dict[str, float]) -> None:
        """Log the numbers of the end of the run."""
        for name, value in values.items():
            self._events.add_scalar(f"held_out/{name}", value, self._steps)
        if self._wandb is not None:
            self._wandb.summary.update({f"held_out/{name}": value for name, value in values.items()})

    def close_bar(self) -> None:
        """End the progress bar, so that what is printed next starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Monitor:
        """The clock and the bar start here, when training does."""
        self._start = time.perf_counter()
        if sys.stdout.isatty():
            self._bar = tqdm(total=self._steps * self._tokens, unit=" tokens", unit_scale=True, file=sys.stdout,
                             desc=self._name, dynamic_ncols=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close_bar()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


class Silent:
    """The monitor of ranks that leave showing to another."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing."""

    def summary(self, values: dict[str, float]) -> None:
        """Nothing."""

    def close_bar(self) -> None:
        """Nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""


def _start_wandb(config: RunConfig, folder: Path, mode: str) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(f"--wandb {mode}: wandb is not installed; pip install 'muse_dist[wandb]', "
                         "or leave the option out") from error
    return wandb.init(project="muse_dist", name=config.name, mode=mode, dir=str(folder),
                      config=dataclasses.asdict(config))
