"""Text to train on that every machine has: the Python standard library's own sources, one token a byte."""
from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.config import DataConfig

SEPARATOR = 256  # ends every file; the other tokens are the bytes themselves
VOCABULARY = 257
# Tests repeat the modules they test, and installed packages differ between machines.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Token streams, uint16 [tokens]: whole files, each ended by `SEPARATOR`, in path order."""

    train: np.ndarray
    held_out: np.ndarray
    context: int

    def sequences(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` sequences from random places of the training files, int64 [count, context + 1]."""
        starts = torch.randint(len(self.train) - self.context, (count,), generator=generator)
        return torch.stack([self._cut(self.train, int(start)) for start in starts])

    def held_out_sequences(self, count: int) -> Tensor:
        """`count` sequences spread evenly over the held-out files, int64 [count, context + 1]; the same every time."""
        last = len(self.held_out) - self.context - 1
        return torch.stack([self._cut(self.held_out, last * i // max(count - 1, 1)) for i in range(count)])

    def held_out_entropy(self) -> float:
        """Entropy of the held-out tokens' frequencies in nats: no model that ignores context has a smaller loss."""
        frequency = np.bincount(self.held_out) / len(self.held_out)
        frequency = frequency[frequency > 0]
        return float(-(frequency * np.log(frequency)).sum())

    def _cut(self, stream: np.ndarray, start: int) -> Tensor:
        return torch.from_numpy(stream[start:start + self.context + 1].astype(np.int64))


def load_corpus(config: DataConfig, folder: Path | None = None) -> Corpus:
    """Read all Python files below `folder`, by default the standard library of the running interpreter.

    Raises:
        ValueError: fewer tokens than one sequence, in the training or in the held-out files.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = sorted(path for path in folder.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(folder).parts))
    held_out = files[config.held_out_every - 1::config.held_out_every]
    chosen = set(held_out)
    corpus = Corpus(_stream([path for path in files if path not in chosen]), _stream(held_out), config.context)
    for part in ("train", "held_out"):
        tokens = len(getattr(corpus, part))
        if tokens <= config.context:
            raise ValueError(f"{folder} has {tokens} tokens for {part} in {len(files)} Python files; "
                             f"data.context={config.context} needs more than that: take a smaller context")
    return corpus


def _stream(files: list[Path]) -> np.ndarray:
    parts = [np.append(np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16), np.uint16(SEPARATOR))
             for path in files]
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)
