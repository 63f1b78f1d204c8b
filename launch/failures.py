"""Why a command that was started failed: what the log of its processes says."""
from __future__ import annotations

import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

LENGTH = 300  # characters of a reason
ENDED = re.compile(r"^ *rank +: (\d+).*?^ *exitcode +: (-?\d+)", re.DOTALL | re.MULTILINE)  # in torchrun's report
# What PyTorch puts before the lines of a rank.
RANK = re.compile(r"\[rank(\d+)\]: ?")
TRACEBACK = "Traceback (most recent call last):"
# Python shows what an exception came from before the exception itself.
CAUSE = ("The above exception was the direct cause", "During handling of the above exception")
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: .*|:?$)")
NAMED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)(:|$)")
# What ranks say that had to do with another one, which was gone.
LOST = re.compile(r"[Cc]onnection|DistBackendError|DistNetworkError|another rank died|exchange '")
TORCHRUN = "torch.distributed.elastic."  # its own exceptions say only that a rank failed
# Of processes that end without an exception: C++ (NCCL's watchdog too), Python itself, and launch.guard.
LAST_WORDS = re.compile(r"\s*what\(\): *(.+)|(Fatal Python error: .+)|(rank \d+: no progress for .+?)\. Where each")


class Said(NamedTuple):
    """A line of a log that names an exception, and the rank that wrote it; None where the log does not tell."""

    line: str
    rank: int | None


@contextmanager
def said_at_once(rank: int) -> Iterator[None]:
    """Show an exception and make it the exit status 1, while the process groups still stand.

    Leaving them may end a process whose GPU has failed before Python has said why, and lets the other ranks fail.
    """
    try:
        yield
    except Exception:
        text = traceback.format_exc().splitlines()
        print(*(f"[rank{rank}]: {line}" for line in text), sep="\n", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def reason(log: str, status: int) -> str:
    """Why a run failed that ended with this status, below 0 if by a signal."""
    died = f" ({_signal(-status)})" if status < 0 else ""
    refused = [line.split(": error: ")[-1] for line in log.splitlines() if ": error: " in line]  # argparse's
    return f"exit status {status}{died}: {refused[0][:LENGTH] if refused else first_failure(log)}"


def first_failure(log: str) -> str:
    """The first exception of a log, or how a rank ended without one; torchrun's report of it only says which rank."""
    every = exceptions(log)
    said = [found for found in every if not found.line.startswith(TORCHRUN)]
    lines = [RANK.sub("", line) for line in log.splitlines() if line.strip()]
    # Once a rank is gone the others fail in their exchanges: what they say counts only if that rank spoke too.
    found = (_died(log, said), *(one.line for one in said), _last_words(log), *(one.line for one in every), *lines[-1:])
    return next(filter(None, found), "no output").strip()[:LENGTH]


def exceptions(log: str) -> list[Said]:
    """The exceptions that a log shows, in order, without those that others came from."""
    found: list[Said] = []
    inside: dict[int | None, bool] = {}  # ranks in the middle of a traceback
    for text in log.splitlines():
        prefix = RANK.match(text)
        rank, line = (int(prefix[1]), text[prefix.end():]) if prefix else (None, text)
        if line.startswith(TRACEBACK):
            inside[rank] = True
        elif line.startswith(CAUSE):
            last = next((old for old in reversed(found) if old.rank == rank), None)
            found = [old for old in found if old is not last]
        elif NAMED.match(line) or (inside.get(rank) and EXCEPTION.match(line)):
            found.append(Said(line, rank))
            inside[rank] = False
    return found


def _died(log: str, said: list[Said]) -> str | None:
    """How the rank that torchrun saw fail first ended, or another that failed, if that rank has said nothing itself.

    Ranks that wait in an exchange fail at once when another is gone: torchrun may see them first, but they do say so.
    """
    root = ENDED.search(log, log.find("Root Cause")) if "Root Cause" in log else None
    # An exception without a rank was raised before there was a group; it may be that of any of them.
    if root is None or any(found.rank is None for found in said):
        return None
    words_of_root = [found.line for found in said if found.rank == int(root[1])]
    ends = [root.groups()] if not words_of_root else []
    if words_of_root and LOST.search(words_of_root[0]):
        ends = [end for end in ENDED.findall(log) if int(end[1]) != -signal.SIGTERM]  # torchrun ends the rest so
    silent = [end for end in ends if all(found.rank != int(end[0]) for found in said)]
    if not silent:
        return None
    rank, status = silent[0][0], int(silent[0][1])
    how = f"died of {_signal(-status)}" if status < 0 else f"ended with status {status}"
    words = _last_words(log)
    return f"rank {rank} {how}{f': {words}' if words else ''}"


def _last_words(log: str) -> str | None:
    found = LAST_WORDS.search(log)
    return None if found is None else next(group for group in found.groups() if group is not None)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals, which have no names
        return f"signal {number}"
