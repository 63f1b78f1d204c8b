"""The numbers of every step as JSON lines, each step once, however often the run was interrupted."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """`metrics.jsonl`: one line a step, in order.

    Args:
        path: the file.
        done: steps that are behind; lines of later ones, which are about to be done again, are dropped.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= done] if done and path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(path)
        self._file = path.open("ab", buffering=0)
        self._late = b""  # lines that a full disk did not take

    def write(self, row: dict[str, Any]) -> str | None:
        """Append a line; after this a killed process does not lose it.

        Returns:
            what is wrong, where the disk does not take it: the line is kept and written with a later one.
        """
        self._late += json.dumps(row).encode() + b"\n"
        try:
            while self._late:
                done = self._file.write(self._late)
                self._late = self._late[done:]
        except OSError as error:
            return f"{self._file.name} cannot be written: {error.strerror}"
        return None

    def sync(self) -> None:
        """Have all lines on the disk, before a checkpoint says they are."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; OSError if there are lines it did not take."""
        try:
            while self._late:
                self._late = self._late[self._file.write(self._late):]
        finally:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; a last one that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
