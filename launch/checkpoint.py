"""Checkpoints of a run: sharded, written while training goes on, the last few kept, broken ones skipped.

`torch.distributed.checkpoint` cuts, deduplicates and puts together; `launch.storage` is the format. Tensors are the
parameters and what the optimizer keeps of each, under names that do not depend on the number of ranks.
"""
from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from launch.ranks import Ranks
from launch.storage import INDEX, STATE, SafeReader, SafeWriter, problem_with

NAME = re.compile(r"step-(\d{9})")


class Checkpoints:
    """The checkpoints below one folder, which all ranks see.

    All ranks call `save`, `newest`, `load` and `discard_after`, in the same order.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self._writing: tuple[int, Future[Any]] | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, whole or not, in order. Names count, not the clock of the files."""
        found = [NAME.fullmatch(path.name) for path in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:09}"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> list[str]:
        """Copy the tensors and write them in the background. Returns what became of the checkpoint before, if bad."""
        troubles = self.wait()
        partial = self.folder / f"step-{step:09}.partial"
        writer = SafeWriter(partial, self.path(step), self.ranks.world_rank, state)
        response: Any = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self.ranks.files)
        self._writing = step, getattr(response, "upload_completion", response)
        return troubles

    def poll(self) -> list[str]:
        """As `wait`, but only if there is nothing left to wait for."""
        return self.wait() if self._writing is not None and self._writing[1].done() else []

    def wait(self) -> list[str]:
        """Wait for the checkpoint being written, if any, and drop the oldest. Returns what went wrong, for a person."""
        if self._writing is None:
            return []
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:  # the checkpoints before are still there
            if self.ranks.first:
                shutil.rmtree(self.folder / f"step-{step:09}.partial", ignore_errors=True)
            left = self.steps()
            return [f"the checkpoint of step {step} could not be written: {_reason(error)}. "
                    + (f"The newest whole one is that of step {left[-1]}" if left else "There is none yet")]
        if self.ranks.first:
            for old in self.steps()[:-self.keep]:
                _remove(self.path(old))
        return []

    def newest(self) -> tuple[int | None, list[str]]:
        """The newest checkpoint that is whole, or None, and why those after it are not.

        Raises:
            ValueError: there are checkpoints, and none is whole.
        """
        if self.ranks.first:
            for path in self.folder.glob("*.partial"):  # of a run that was killed
                shutil.rmtree(path)
        skipped: list[str] = []
        # One rank's view of the folder is everyone's: shared file systems show new names late.
        steps = self.ranks.collect(self.steps())[0]
        for step in reversed(steps):
            problems = self.ranks.collect(problem_with(self.path(step), self.ranks.world_rank, self.ranks.world))
            bad = [problem for problem in problems if problem is not None]
            if not bad:
                return step, skipped
            skipped.append(f"{self.path(step)} is skipped: {bad[0]}")
        if steps:
            raise ValueError("no checkpoint is whole; --fresh starts again without them.\n" + "\n".join(skipped))
        return None, skipped

    def state(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors."""
        return dict(json.loads((self.path(step) / STATE).read_text()))

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Read a checkpoint into `tensors`, in place, however many ranks wrote it.

        Raises:
            ValueError: it has other tensors than these, or other shapes.
        """
        index = json.loads((self.path(step) / INDEX).read_text())
        _check_same({name: entry["size"] for name, entry in index.items()},
                    {name: list(x.shape) for name, x in tensors.items()}, self.path(step))
        with torch.no_grad():
            dcp.load(tensors, storage_reader=SafeReader(self.path(step)), process_group=self.ranks.files)

    def discard_after(self, step: int) -> None:
        """Remove broken checkpoints of later steps, so that new ones can take their places."""
        if self.ranks.first:
            for later in self.steps():
                if later > step:
                    _remove(self.path(later))
        self.ranks.collect(None)


def _remove(path: Path) -> None:
    """Remove a folder; killed on the way, it leaves nothing that looks like a checkpoint."""
    away = path.with_name(f"{path.name}.removed.partial")
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _check_same(saved: dict[str, list[int]], wanted: dict[str, list[int]], path: Path) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(f"{path} is of another model: {name} has shape {saved.get(name, 'none')} there and "
                             f"{wanted.get(name, 'none')} here. Take the settings it was made with, or another --name")


def _reason(error: BaseException) -> str:
    """The first failure inside DCP's exception, which wraps one a rank."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (inner, *_) = sorted(failures.items())[0]
        return f"rank {rank}: {type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
