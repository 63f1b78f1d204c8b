"""The parts that `launch.data` made, put together: token files to train on, held-out ones, and what they are."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.data_encode import EXAMPLES, Encoding, note, read_part
from launch.data_sources import Bad
from launch.indexed import token_dtype, write_index


class Stream(NamedTuple):
    """One of the two token files while it is written."""

    name: str
    file: Any
    lengths: list[int]
    digest: Any


def join_parts(folder: Path, parts: Path, count: int, encoding: Encoding, held_out_every: int,
               skipped: Iterable[Bad] = ()) -> dict[str, Any]:
    """Write train.bin, held_out.bin, their indexes and data.json to `folder`, from `count` parts in order.

    Args:
        held_out_every: every so many-th document, of all, goes to held_out.
        skipped: files and folders that were not read, for data.json.
    Returns:
        the content of data.json.
    Raises:
        ValueError: no document is held out. Nothing is written, and the parts stay for another try.
    """
    _check_held_out(parts, count, held_out_every)
    dtype = token_dtype(encoding.vocabulary)
    bad: Counter[str] = Counter()
    left: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for one in skipped:
        note(one, left, examples)
    streams = [Stream(name, (folder / f"{name}.bin.partial").open("wb"), [], hashlib.sha256())
               for name in ("train", "held_out")]
    number = 0
    for i in range(count):
        data = parts / f"part-{i:06}.bin"
        about = read_part(data.with_suffix(".json"), data)
        with data.open("rb") as file:
            for length in about["lengths"]:
                number += 1
                _copy(file.read(length * dtype.itemsize), length, streams[number % held_out_every == 0])
        bad.update(about["bad"])
        for why, where in about["examples"].items():
            examples[why] = [*examples.get(why, []), *where][:EXAMPLES]
    (folder / "data.json").unlink(missing_ok=True)  # of earlier tokens, which are replaced one by one from here on
    for stream in streams:
        _finish(folder, stream, dtype)
    about = {"vocabulary": encoding.vocabulary, "separator": encoding.separator,
             "tokenizer": "tokenizer.json" if encoding.tokenizer else "bytes", "dtype": dtype.name,
             "digest": hashlib.sha256(b"".join(stream.digest.digest() for stream in streams)).hexdigest(),
             **{stream.name: {"documents": len(stream.lengths), "tokens": sum(stream.lengths),
                              "sha256": stream.digest.hexdigest()} for stream in streams},
             "bad": dict(bad), "skipped": dict(left), "examples": examples}
    partial = folder / "data.json.partial"
    partial.write_text(json.dumps(about, indent=1) + "\n")
    partial.replace(folder / "data.json")  # last: with it the folder is complete
    shutil.rmtree(parts)
    return about


def _check_held_out(parts: Path, count: int, held_out_every: int) -> None:
    documents = sum(len(read_part(data.with_suffix(".json"), data)["lengths"])
                    for data in (parts / f"part-{i:06}.bin" for i in range(count)))
    if documents < held_out_every:
        raise ValueError(f"--held-out-every {held_out_every}: there are {documents} documents, so none would be held "
                         f"out to measure by; " + (f"take at most {documents}" if documents > 1 else "give more"))


def _copy(content: bytes, length: int, stream: Stream) -> None:
    stream.file.write(content)
    stream.digest.update(content)
    stream.lengths.append(length)


def _finish(folder: Path, stream: Stream, dtype: np.dtype[Any]) -> None:
    stream.file.flush()
    os.fsync(stream.file.fileno())
    stream.file.close()
    (folder / f"{stream.name}.bin.partial").replace(folder / f"{stream.name}.bin")
    write_index(folder / f"{stream.name}.idx", stream.lengths, dtype)
