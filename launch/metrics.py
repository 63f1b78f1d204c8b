"""The numbers of every step as JSON lines, each step once, however often the run was interrupted."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

AVERAGED = 20  # losses are shown as means of such a part of the steps: batches differ more than attentions do


class MetricsFile:
    """`metrics.jsonl`: one line a step, in order.

    Args:
        path: the file.
        done: steps that are behind; lines of later ones, which are about to be done again, are dropped.
    Attributes:
        missing: how many of the steps behind have no line: somebody removed or damaged it.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= done] if done and path.exists() else []
        self.missing = done - len(rows)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(strict_json(row) + "\n" for row in rows))
        partial.replace(path)
        self._file = path.open("ab", buffering=0)
        self._late = b""  # lines that a full disk did not take

    def write(self, row: dict[str, Any]) -> str | None:
        """Append a line; after this a killed process does not lose it.

        Returns:
            what is wrong, where the disk does not take it: the line is kept and written with a later one.
        """
        self._late += strict_json(row).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            return f"{self._file.name} cannot be written: {error.strerror}"
        return None

    def sync(self) -> str | None:
        """Have all lines on the disk, before a checkpoint says they are. Returns what `write` does."""
        try:
            self._flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # network file systems say only here that they are full
            return f"{self._file.name} cannot be written: {error.strerror}"
        return None

    def close(self) -> None:
        """Close the file; OSError if there are lines it did not take."""
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        while self._late:
            self._late = self._late[self._file.write(self._late):]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of the file, null as NaN; lines that are none, such as a last one that was cut off, are left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def averages(values: Sequence[float] | np.ndarray) -> tuple[int, list[float]]:
    """(n, the means of every n values in a row) for n = 1/`AVERAGED` of them; the first mean ends at value n."""
    window = max(len(values) // AVERAGED, 1)
    return window, np.convolve(values, np.ones(window) / window, "valid").tolist() if len(values) else []


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON as everyone reads it: NaN and infinity, for which it has no numbers, are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
