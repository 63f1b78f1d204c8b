"""Tokens to train on: what `launch.data` wrote, or the Python standard library's own sources, one token a byte."""
from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from launch.config import DataConfig
from launch.indexed import IndexedTokens

SEPARATOR = 256  # ends every file; the other tokens are the bytes themselves
VOCABULARY = 257
# Tests repeat the modules they test, and installed packages differ between machines.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
ENTROPY_TOKENS = 1 << 24  # of the held-out tokens, at most so many are counted


class Tokens(Protocol):
    """A stream of tokens made of documents."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from place `start`; OSError if they cannot be read."""

    def document(self, start: int) -> tuple[int, int]:
        """(number of the document that token `start` is in, the token's place in it)."""


@dataclass(frozen=True)
class ArrayTokens:
    """Tokens in memory: [tokens], with the first token of every document [documents]."""

    array: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.array[start:start + count]

    def document(self, start: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.starts, start, "right")) - 1
        return number, start - int(self.starts[number])


@dataclass(frozen=True)
class Corpus:
    """The tokens to train on and the held-out ones, cut into sequences of `context` tokens and one more.

    Sequences to train on are numbered 0, 1, 2, ... without end. Every window of the stream comes once an epoch, in an
    order that depends on the seed and the epoch alone: a run that knows how many it has read can go on at the very
    token, on any number of ranks.
    """

    train: Tokens
    held_out: Tokens
    context: int
    vocabulary: int = VOCABULARY
    name: str = "array"  # what the tokens are, for the check that a run goes on with the same

    @property
    def windows(self) -> int:
        """Sequences an epoch. What is left at the end of the stream is skipped by a shift that changes every epoch."""
        return (len(self.train) - 1) // self.context

    def start(self, number: int, seed: int) -> int:
        """Place in the training stream at which sequence `number` starts."""
        epoch, place = divmod(number, self.windows)
        left_over = (len(self.train) - 1) % self.context
        shift = _hash(seed, epoch, "shift") % (left_over + 1)
        return permuted(place, self.windows, seed, epoch) * self.context + shift

    def sequences(self, first: int, count: int, seed: int) -> Tensor:
        """Sequences `first`, `first` + 1, ...: int64 [count, context + 1]."""
        return torch.stack([self._cut(self.train, self.start(n, seed)) for n in range(first, first + count)])

    def describe(self, number: int, seed: int) -> dict[str, int]:
        """Where a sequence comes from, for a person who looks for it."""
        start = self.start(number, seed)
        document, place = self.train.document(start)
        return {"sequence": number, "token": start, "document": document, "token_in_document": place}

    def held_out_sequences(self, count: int) -> Tensor:
        """`count` sequences spread evenly over the held-out tokens, int64 [count, context + 1]; the same every time."""
        last = len(self.held_out) - self.context - 1
        return torch.stack([self._cut(self.held_out, last * i // max(count - 1, 1)) for i in range(count)])

    def held_out_entropy(self) -> float:
        """Entropy of the held-out tokens' frequencies in nats: no model that ignores context has a smaller loss."""
        tokens = self.held_out.read(0, min(len(self.held_out), ENTROPY_TOKENS))
        frequency = np.bincount(tokens) / len(tokens)
        frequency = frequency[frequency > 0]
        return float(-(frequency * np.log(frequency)).sum())

    def fingerprint(self) -> dict[str, int | str]:
        """What must be the same for sequence numbers to mean the same tokens."""
        return {"name": self.name, "tokens": len(self.train), "context": self.context}

    def _cut(self, stream: Tokens, start: int) -> Tensor:
        return torch.from_numpy(stream.read(start, self.context + 1).astype(np.int64))


def permuted(place: int, count: int, seed: int, epoch: int) -> int:
    """The image of `place` under a permutation of range(count) that depends on the seed and the epoch alone.

    A Feistel network of keyed hashes: no table of `count` places is kept, and no library's update changes the order.
    """
    half = max(((count - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    while True:  # the network permutes a power of four places: walk on until the image is one of ours
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(seed, epoch, turn, right) & mask)
        place = left << half | right
        if place < count:
            return place


def _hash(*values: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def load_corpus(config: DataConfig, folder: Path | None = None) -> Corpus:
    """The tokens that `config` names; without `data.path` the Python files below `folder`, or the standard library's.

    Raises:
        ValueError: fewer tokens than one sequence to train on or held out, or files that do not fit each other.
        OSError: a file cannot be read.
    """
    if config.path:
        corpus = _from_files(config, Path(config.path))
        where = config.path
    else:
        folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
        corpus = _from_sources(config, folder)
        where = f"{folder} (Python files)"
    for part in ("train", "held_out"):
        tokens = len(getattr(corpus, part))
        if tokens <= config.context:
            fewer = "" if part == "train" else ", or hold out more documents, with a smaller " + (
                "--held-out-every of launch.data" if config.path else "data.held_out_every")
            raise ValueError(f"{where} has {tokens} tokens for {part}; data.context={config.context} needs more than "
                             f"that: take a smaller context{fewer}")
    return corpus


def _from_files(config: DataConfig, folder: Path) -> Corpus:
    """Files of `launch.data`: train.bin, held_out.bin, their indexes, and data.json, which says what they are."""
    if not (folder / "data.json").exists():
        raise FileNotFoundError(f"{folder} has no data.json, with which a folder of tokens is complete: "
                                "python -m launch.data writes one")
    about = _read_about(folder / "data.json")
    streams = {part: IndexedTokens(folder / part, about["vocabulary"]) for part in ("train", "held_out")}
    for part, tokens in streams.items():
        if len(tokens) != about[part]["tokens"]:
            raise ValueError(f"{folder}: {part} has {len(tokens)} tokens, and data.json says {about[part]['tokens']}: "
                             "they are not of one run of launch.data; write them again")
    return Corpus(streams["train"], streams["held_out"], config.context, about["vocabulary"], about["digest"])


def _read_about(path: Path) -> dict[str, Any]:
    """data.json of a folder of tokens; ValueError that names it if it is cut off, or says less than is needed."""
    again = "; write the tokens again with python -m launch.data"
    try:
        about = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut off or no JSON ({error}){again}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} is no table of what the tokens are{again}")
    for key, kind in (("vocabulary", int), ("digest", str), ("train", dict), ("held_out", dict)):
        if not isinstance(about.get(key), kind):
            raise ValueError(f"{path} has no {kind.__name__} {key!r}{again}")
    for part in ("train", "held_out"):
        if not isinstance(about[part].get("tokens"), int):
            raise ValueError(f"{path} has no int 'tokens' in {part!r}{again}")
    return about


def _from_sources(config: DataConfig, folder: Path) -> Corpus:
    files = sorted(path for path in folder.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(folder).parts))
    held_out = files[config.held_out_every - 1::config.held_out_every]
    chosen = set(held_out)
    train = _stream([path for path in files if path not in chosen])
    return Corpus(train, _stream(held_out), config.context,
                  name="sources " + hashlib.sha256(train.array.tobytes()).hexdigest()[:16])


def _stream(files: list[Path]) -> ArrayTokens:
    parts = [np.append(np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16), np.uint16(SEPARATOR))
             for path in files]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    return ArrayTokens(np.concatenate(parts) if parts else np.empty(0, np.uint16), starts)
