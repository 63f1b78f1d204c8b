"""Tokenizers, and the work of one process of `launch.data`: a unit of input to a part of the token files."""
from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from launch.corpus import SEPARATOR, VOCABULARY
from launch.data_sources import Bad, Unit, read_unit
from launch.indexed import token_dtype

END = "<|endoftext|>"  # stands behind every document
# What known tokenizers call it, in the order they are looked for.
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
BATCH = 512  # documents that the tokenizer takes at a time
EXAMPLES = 5  # of each kind of bad input, for the report


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens: a tokenizer's file, or "" for bytes."""

    tokenizer: str
    vocabulary: int
    separator: int
    key: str

    @property
    def digest(self) -> str:
        """Of all of it, the tokenizer's content too: parts made otherwise are not used again."""
        content = Path(self.tokenizer).read_bytes() if self.tokenizer else b""
        return hashlib.sha256(repr((self.vocabulary, self.separator, self.key)).encode() + content).hexdigest()


def byte_encoding(key: str) -> Encoding:
    """One token a byte of UTF-8, and one more behind every document."""
    return Encoding("", VOCABULARY, SEPARATOR, key)


def file_encoding(path: Path, key: str) -> Encoding:
    """A tokenizer.json of Hugging Face.

    Raises:
        ValueError: it is none, or has no token for the end of a document.
    """
    tokenizer = _tokenizer(path)
    for end in ENDS:
        number = tokenizer.token_to_id(end)
        if number is not None:
            # Numbers may have gaps: the largest counts, not how many there are.
            return Encoding(str(path), 1 + max(tokenizer.get_vocab(with_added_tokens=True).values()), number, key)
    raise ValueError(f"{path} has no token for the end of a document; one of {', '.join(ENDS)} is needed")


def train_tokenizer(units: list[Unit], key: str, vocabulary: int, sample: int, path: Path) -> None:
    """Train byte-level BPE on about `sample` bytes of text, spread evenly over the units, and write tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_sample(units, key, sample), trainer)
    partial = path.with_suffix(".partial")
    tokenizer.save(str(partial))
    partial.replace(path)


def _sample(units: list[Unit], key: str, sample: int) -> Iterator[str]:
    share = max(sample // len(units), 1)
    for unit in units:
        left = share
        for text in read_unit(unit, key):
            if isinstance(text, str):
                yield text
                left -= len(text)
            if left <= 0:
                break


def encode_unit(number: int, unit: Unit, encoding: Encoding, folder: Path) -> int:
    """Write the tokens of a unit to `folder`/part-NUMBER.bin and what is to know of them to the .json beside it.

    A part that is there already, made of the same input in the same way, stays. Returns the unit's bytes.
    """
    made_of = {"unit": list(asdict(unit).values()), "encoding": encoding.digest, "dates": [
        os.stat(path).st_mtime_ns for path in unit.paths]}
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    data, about = folder / f"part-{number:06}.bin", folder / f"part-{number:06}.json"
    if read_part(about, data).get("made_of") == name:
        return unit.size
    dtype, encode = token_dtype(encoding.vocabulary), _encoder(encoding)
    lengths: list[int] = []
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    partial = data.with_suffix(f".bin.{os.getpid()}.partial")  # of no process but this one
    with partial.open("wb") as file:
        for tokens in encode(_good(read_unit(unit, encoding.key), counts, examples)):
            np.append(tokens, encoding.separator).astype(dtype).tofile(file)
            lengths.append(len(tokens) + 1)
    about.unlink(missing_ok=True)  # of other input
    partial.replace(data)
    partial = about.with_suffix(f".json.{os.getpid()}.partial")
    partial.write_text(json.dumps({"made_of": name, "lengths": lengths, "bad": dict(counts), "examples": examples}))
    partial.replace(about)
    return unit.size


def read_part(about: Path, data: Path) -> dict[str, Any]:
    """What is known of a finished part; empty if it is not finished."""
    try:
        return dict(json.loads(about.read_text())) if data.exists() else {}
    except (OSError, ValueError):
        return {}


def _good(texts: Iterator[str | Bad], counts: Counter[str], examples: dict[str, list[str]]) -> Iterator[str]:
    """The documents alone; the others are counted."""
    for text in texts:
        if isinstance(text, str):
            yield text
            continue
        note(text, counts, examples)


def note(bad: Bad, counts: Counter[str], examples: dict[str, list[str]]) -> None:
    """Count what is no document, and keep the first places of each kind."""
    counts[bad.why] += 1
    kept = examples.setdefault(bad.why, [])
    if len(kept) < EXAMPLES:
        kept.append(bad.where)


def _encoder(encoding: Encoding) -> Callable[[Iterator[str]], Iterator[np.ndarray]]:
    """A function from documents to their tokens, int64 or uint8 [tokens]."""
    if not encoding.tokenizer:
        return lambda texts: (np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts)
    tokenizer = _tokenizer(Path(encoding.tokenizer))

    def encode(texts: Iterator[str]) -> Iterator[np.ndarray]:
        while batch := list(islice(texts, BATCH)):
            for found in tokenizer.encode_batch(batch, add_special_tokens=False):
                yield np.array(found.ids, np.int64)

    return encode


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path} is no tokenizer.json: {error}") from error
    # Files of models that were published often say how to cut and fill a batch: here that would lose and add text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # what a document spells out is text: only its real end becomes its token
    return tokenizer
