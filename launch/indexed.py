"""Token files in Megatron's indexed format: `NAME.bin` holds the tokens, `NAME.idx` where each document lies.

The layout of an index, little-endian: magic, version, dtype code, the number of sequences, the number of document
bounds, then the length of every sequence (int32), the byte at which it starts (int64) and the bounds of documents among
the sequences (int64). Here every document is one sequence.
"""
from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The dtype Megatron would take for so many tokens: uint16 as long as it holds them, else int32."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)


def write_index(path: Path, lengths: Iterable[int], dtype: np.dtype[Any]) -> None:
    """Write `path`, the index of a .bin file that holds documents of these lengths (tokens), one after the other."""
    sizes = np.fromiter(lengths, np.int32)
    starts = np.zeros(len(sizes), np.int64)
    np.cumsum(sizes[:-1], dtype=np.int64, out=starts[1:])
    code = next(code for code, kind in CODES.items() if np.dtype(kind) == dtype)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, len(sizes), len(sizes) + 1))
        for column in (sizes, starts * dtype.itemsize, np.arange(len(sizes) + 1, dtype=np.int64)):
            file.write(column.astype(column.dtype.newbyteorder("<")).tobytes())
        file.flush()
        os.fsync(file.fileno())


class IndexedTokens:
    """All tokens of a .bin file as one stream, documents in the order of the file.

    Args:
        prefix: path of the two files without `.bin` and `.idx`.
        vocabulary: every token is below it; None where that is not known.
    Raises:
        ValueError that names the file: it is no index, is cut off, or does not fit the other file.
        OSError: a file cannot be read.
    """

    def __init__(self, prefix: Path, vocabulary: int | None = None) -> None:
        self.vocabulary = vocabulary
        self.path = prefix.with_name(prefix.name + ".bin")
        index = prefix.with_name(prefix.name + ".idx")
        self.dtype, self.starts = _read_index(index)
        self._file = os.open(self.path, os.O_RDONLY)
        there, wanted = os.fstat(self._file).st_size, len(self) * self.dtype.itemsize
        if there != wanted:
            raise ValueError(f"{self.path} has {there} bytes, and its index {index.name} says {wanted}: it is cut off "
                             "or belongs to another index; make both again with python -m launch.data")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from place `start`. Read with pread: a file that breaks raises OSError, not SIGBUS.

        So does one with a token that cannot be, before it crashes a GPU's kernel that looks it up.
        """
        size = self.dtype.itemsize
        data = bytearray()
        while len(data) < count * size:
            piece = os.pread(self._file, count * size - len(data), start * size + len(data))
            if not piece:
                raise OSError(f"{self.path} ends before token {start + count}: it was cut off while it was in use")
            data += piece
        tokens = np.frombuffer(bytes(data), self.dtype)
        if self.vocabulary is not None and count and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocabulary))[0])
            raise OSError(f"{self.path} is damaged: token {start + place} is {tokens[place]}, and the vocabulary has "
                          f"{self.vocabulary}; write the tokens again with python -m launch.data")
        return tokens

    def document(self, start: int) -> tuple[int, int]:
        """(number of the document that token `start` is in, the token's place in it)."""
        number = int(np.searchsorted(self.starts, start, "right")) - 1
        return number, start - int(self.starts[number])

    def close(self) -> None:
        """Close the file; `read` fails from then on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


def _read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray]:
    """The dtype, and the first token of every document with the number of all tokens behind: int64 [documents + 1]."""
    data = path.read_bytes()
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise ValueError(f"{path} is no index of token files: it does not start with {MAGIC[:7].decode()}")
    _, version, code, sequences, documents = HEADER.unpack_from(data)
    if version != VERSION or code not in CODES:
        raise ValueError(f"{path}: version {version} with dtype code {code} is not read here; known are version "
                         f"{VERSION} and codes {', '.join(map(str, CODES))}")
    at = HEADER.size + 12 * sequences
    if len(data) != at + 8 * documents:
        raise ValueError(f"{path} is cut off: {len(data)} bytes, and {at + 8 * documents} for {sequences} sequences")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
    starts = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", documents, at)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    dtype = np.dtype(CODES[code])
    if (starts != ends[:-1] * dtype.itemsize).any() or bounds.min(initial=0) < 0 or bounds.max(initial=0) > sequences:
        raise ValueError(f"{path}: its sequences do not lie one after the other, which is all that is read here")
    return dtype, ends[bounds]
