"""Text to make tokens of: files, JSON lines (also compressed) and source trees, read as documents in a fixed order."""
from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
UNIT = 32 << 20  # bytes of input that one process takes at a time


@dataclass(frozen=True)
class Unit:
    """A piece of the input, the work of one process.

    "files": whole files, a document each. "lines": the lines that begin in bytes `start` to `end` of one file of JSON
    lines; of a compressed one, all.
    """

    kind: str
    paths: tuple[str, ...]
    size: int
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Bad:
    """Something of the input that is no document, or that was skipped before it was read."""

    where: str
    why: str


def list_units(inputs: list[Path], suffixes: tuple[str, ...]) -> tuple[list[Unit], list[Bad]]:
    """The input cut into units, in the order of the arguments and of the paths in a folder, and what is skipped.

    Args:
        inputs: text files, files of JSON lines, or folders. Of a folder every file is taken, those of JSON lines line
            by line, except hidden ones; with `suffixes` only those that end like that.
    Raises:
        ValueError: nothing is found. OSError: an input is not there, or a folder cannot be listed.
    """
    units: list[Unit] = []
    files: list[tuple[str, int]] = []
    skipped: list[Bad] = []
    for path in (found for given in inputs for found in _walk(given, suffixes)):
        if isinstance(path, Bad):
            skipped.append(path)
            continue
        size = path.stat().st_size
        if path.name.endswith(LINES) and size:  # an empty one is a document without text, which reading it counts
            units += [*_file_units(files), *_line_units(path, size)]
            files = []
        else:
            files.append((str(path), size))
    units += _file_units(files)
    if not units:
        raise ValueError(f"no file to read in {', '.join(map(str, inputs))}"
                         + (f" that ends in {' or '.join(suffixes)}" if suffixes else ""))
    return units, skipped


def _walk(given: Path, suffixes: tuple[str, ...]) -> Iterator[Path | Bad]:
    """A file itself; of a folder all files, those of one directory together: the order of a repository's listing."""
    if not given.is_dir():
        given.stat()
        yield given
        return
    for folder, folders, names in os.walk(given, onerror=_fail):
        walked = []
        for name in sorted(folders):
            why = _skipped_folder(Path(folder, name))
            if why:
                yield Bad(str(Path(folder, name)), why)
            else:
                walked.append(name)
        folders[:] = walked
        for name in sorted(names):
            path = Path(folder, name)
            why = _skipped_file(path, suffixes)
            yield Bad(str(path), why) if why else path


def _fail(error: OSError) -> None:
    """os.walk leaves out a folder that it cannot list, unless told to fail."""
    raise error


def _skipped_folder(path: Path) -> str:
    """Why a folder inside a folder is not walked through; "" if it is."""
    if path.name.startswith("."):
        return "hidden folder"
    return "link to a folder" if path.is_symlink() else ""  # it may lead back here


def _skipped_file(path: Path, suffixes: tuple[str, ...]) -> str:
    """Why a file in a folder is not read; "" if it is."""
    if path.name.startswith("."):
        return "hidden file"
    if suffixes and not path.name.endswith(suffixes):
        return f"file that does not end in {' or '.join(suffixes)}"
    if path.is_file():
        return ""
    return "broken link" if path.is_symlink() and not path.exists() else "no regular file"


def _file_units(files: list[tuple[str, int]]) -> list[Unit]:
    """Consecutive files put together to units of about `UNIT` bytes."""
    units: list[Unit] = []
    paths: list[str] = []
    size = 0
    for path, bytes_ in files:
        paths.append(path)
        size += bytes_
        if size >= UNIT:
            units.append(Unit("files", tuple(paths), size))
            paths, size = [], 0
    return [*units, Unit("files", tuple(paths), size)] if paths else units


def _line_units(path: Path, size: int) -> list[Unit]:
    if path.suffix in (".gz", ".zst"):
        return [Unit("lines", (str(path),), size)]
    return [Unit("lines", (str(path),), min(UNIT, size - at), at, min(at + UNIT, size)) for at in range(0, size, UNIT)]


def read_unit(unit: Unit, key: str) -> Iterator[str | Bad]:
    """The documents of a unit in order, and what is none.

    Args:
        key: of the text in a JSON line.
    Raises:
        OSError: a file cannot be read.
    """
    if unit.kind == "files":
        for path in unit.paths:
            yield _document(path)
    else:
        yield from _lines(unit, key)


def _document(path: str) -> str | Bad:
    content = Path(path).read_bytes()
    if not content:
        return Bad(path, "empty file")
    if b"\0" in content:
        return Bad(path, "not text: it has zero bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return Bad(path, f"not UTF-8 ({error.reason})")


def _lines(unit: Unit, key: str) -> Iterator[str | Bad]:
    """Lines that begin in the unit: the first whole one behind `start`, up to the one that reaches over `end`."""
    path = unit.paths[0]
    with _open(path) as file:
        at = unit.start
        if at:  # the line that reaches in here belongs to the unit before
            file.seek(at - 1)
            at += len(file.readline()) - 1
        while not unit.end or at < unit.end:
            begin = at
            try:
                line = file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield Bad(f"{path}, behind byte {begin}", f"compressed data cut off or damaged ({error})")
                return
            except Exception as error:
                if not type(error).__name__.startswith("Zstd"):
                    raise
                yield Bad(f"{path}, behind byte {begin}", f"compressed data cut off or damaged ({error})")
                return
            if not line:
                return
            at += len(line)
            if line.strip():
                yield _text(line, key, f"{path}, byte {begin}")


def _text(line: bytes, key: str, where: str) -> str | Bad:
    try:
        row: Any = json.loads(line)
    except UnicodeDecodeError:
        return Bad(where, "not UTF-8")
    except ValueError:
        return Bad(where, "not JSON")
    except RecursionError:
        return Bad(where, "nested too deeply")
    if not isinstance(row, dict) or key not in row:
        return Bad(where, f"no key {key!r}")
    if not isinstance(row[key], str):
        return Bad(where, f"{key!r} is no string")
    try:
        row[key].encode()
    except UnicodeEncodeError:  # JSON can spell them, and UTF-8 has no bytes for them
        return Bad(where, f"{key!r} has half a surrogate pair")
    return row[key] or Bad(where, f"{key!r} is empty")


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    elif path.endswith(".zst"):
        with open(path, "rb") as packed, io.BufferedReader(_Frames(packed), 1 << 20) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


class _Frames(io.RawIOBase):
    """The content of zstandard frames, one after the other. The library's own reader takes a cut-off file for whole."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._library = packed, _zstandard()
        self._frame: Any = None
        self._rest = self._content = b""  # packed bytes not looked at, content not given

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError if the file ends in the middle of a frame."""
        while not self._content:
            piece = self._rest or self._packed.read(1 << 17)
            if not piece:
                if self._frame is not None:
                    raise EOFError("the last frame is not whole")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            self._content, self._rest = self._frame.decompress(piece), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count


def _zstandard() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ValueError("files that end in .zst need zstandard: pip install 'muse_dist[launch]'") from error
    return zstandard
