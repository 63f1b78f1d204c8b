"""Make token files of text: python -m launch.data INPUT ... --out FOLDER

INPUT is a text file, a file of JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) or a folder, such as a source tree. Documents
keep their order: files of one directory stay side by side, so that long contexts see what belongs together. FOLDER gets
train.bin, train.idx, held_out.bin and held_out.idx, in Megatron's indexed format, the tokenizer, and data.json, with
counts, with what was no text, and with what was skipped: hidden files and folders, broken links, links to folders,
files of other suffixes than --suffix, and what is no regular file. Special tokens that a document spells out are text.
Started again after an interruption, the command goes on.

    python -m launch.data src/ --out tokens --tokenizer bpe --vocabulary 16384
    python -m launch.train --config configs/30m.toml --data tokens
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.corpus import VOCABULARY
from launch.data_encode import Encoding, byte_encoding, encode_unit, file_encoding, train_tokenizer
from launch.data_join import join_parts
from launch.data_sources import Unit, list_units
from launch.guard import only_run


def main(arguments: list[str] | None = None) -> int:
    """The command; see the head of this file. Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        about = make(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in ("train", "held_out"):
        print(f"{name:<9}{about[name]['documents']:>12,} documents {about[name]['tokens']:>16,} tokens")
    for word, table in (("left out", "bad"), ("skipped", "skipped")):
        for why, count in sorted(about[table].items()):
            print(f"{word:<9}{count:>12,} {why}: {_places(about['examples'][why], count)}")
    print(f"vocabulary of {about['vocabulary']:,}, {about['dtype']}: {options.out}")
    return 0


def _places(examples: list[str], count: int) -> str:
    """Where some of `count` things are. Names of files may have bytes that are no UTF-8, which cannot be printed."""
    text = "; ".join(examples) + (" ..." if count > len(examples) else "")
    return text.encode(errors="backslashreplace").decode()


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says. Returns the content of data.json."""
    if options.held_out_every < 2:
        raise ValueError(f"--held-out-every {options.held_out_every}: must be at least 2")
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: must be at least 1")
    if options.tokenizer == "bpe" and options.vocabulary < VOCABULARY:
        raise ValueError(f"--vocabulary {options.vocabulary}: must be at least {VOCABULARY}, a token for each byte and "
                         "one for the end of a document")
    if options.train_bytes < 1:
        raise ValueError(f"--train-bytes {options.train_bytes}: must be at least 1")
    units, skipped = list_units(options.input, tuple(options.suffix))
    parts = options.out / "parts"
    with only_run(options.out, "--out"):
        parts.mkdir(exist_ok=True)
        encoding = _encoding(options, units)
        _show(units, _encode_all(units, encoding, parts, options.workers))
        return join_parts(options.out, parts, len(units), encoding, options.held_out_every, skipped)


def _show(units: list[Unit], sizes: Iterator[int]) -> None:
    """Take the bytes of each unit as they are done: a bar, or a line every tenth of them where there is no terminal."""
    with tqdm(total=sum(unit.size for unit in units), unit="B", unit_scale=True, desc="tokens", file=sys.stdout,
              disable=not sys.stdout.isatty()) as bar:
        for done, size in enumerate(sizes, 1):
            bar.update(size)
            if bar.disable and (done * 10 // len(units) > (done - 1) * 10 // len(units)):
                print(f"{done} of {len(units)} pieces of the input", flush=True)


def _encode_all(units: list[Unit], encoding: Encoding, parts: Path, workers: int) -> Iterator[int]:
    """Make all parts. Yields the bytes of each unit, in order; parts that are there already cost nothing.

    Raises:
        ChildProcessError: a process was killed.
    """
    numbers, same, where = range(len(units)), [encoding] * len(units), [parts] * len(units)
    if workers == 1 or len(units) == 1:
        yield from map(encode_unit, numbers, units, same, where)
        return
    # Started anew, not forked: the tokenizer's threads do not survive a fork.
    with ProcessPoolExecutor(min(workers, len(units)), multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            yield from pool.map(encode_unit, numbers, units, same, where)
        except BrokenProcessPool as error:
            raise ChildProcessError("one of the processes was killed, as the system does when memory runs out: take "
                                    f"fewer than --workers {workers}. The same command keeps the finished pieces"
                                    ) from error


def _end_with_parent() -> None:
    """Have this process end when the one that started it was killed: it would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encoding(options: argparse.Namespace, units: list[Unit]) -> Encoding:
    """The tokenizer asked for, in the output folder; trained if it is not there yet."""
    kept = options.out / "tokenizer.json"
    if options.tokenizer == "bytes":
        return byte_encoding(options.key)
    if options.tokenizer != "bpe":
        file_encoding(Path(options.tokenizer), options.key)
        if not (kept.exists() and kept.samefile(options.tokenizer)):
            shutil.copyfile(options.tokenizer, kept)
    elif not kept.exists():
        print(f"training a tokenizer of {options.vocabulary} tokens", flush=True)
        train_tokenizer(units, options.key, options.vocabulary, options.train_bytes, kept)
    encoding = file_encoding(kept, options.key)
    if options.tokenizer == "bpe" and encoding.vocabulary > options.vocabulary:
        raise ValueError(f"--vocabulary {options.vocabulary}: {kept} is there already and has {encoding.vocabulary} "
                         "tokens; remove it, or take another --out")
    return encoding


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, nargs="+", metavar="INPUT", help="file or folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the token files go")
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|bpe|FILE",
                        help="one token a byte; BPE trained on the input; or a tokenizer.json (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=16384, help="of the BPE (default: %(default)s)")
    parser.add_argument("--train-bytes", type=int, default=100_000_000,
                        help="text the BPE is trained on, about (default: %(default)s)")
    parser.add_argument("--key", default="text", help="of the text in JSON lines (default: %(default)s)")
    parser.add_argument("--suffix", nargs="+", default=[], metavar=".EXT", help="of a folder take only such files")
    parser.add_argument("--held-out-every", type=int, default=100, metavar="N",
                        help="every N-th document is held out (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
