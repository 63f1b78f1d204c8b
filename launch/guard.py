"""What stops a run in good order: signals, steps that went wrong, ranks that hang, another run in its folder."""
from __future__ import annotations

import faulthandler
import fcntl
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch.config import TrainConfig

WINDOW = 32  # steps whose losses say what is usual
HUNG = 70  # exit status of a rank that got no further


class StopSignal:
    """Whether this process was asked to stop: Slurm and torchrun send SIGTERM before they kill."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Take note of SIGTERM instead of dying of it. Only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def only_run(folder: Path, option: str = "--name", patience: float = 0.0) -> Iterator[None]:
    """Keep other runs out of a folder, which need not be there yet. The system lets go when this process dies.

    Args:
        option: of the command line, with which another folder can be taken.
        patience: seconds to wait for one that may just be ending.
    Raises:
        ValueError: another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            _lock(file.fileno(), patience)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(f"{folder} is in use by another run, {file.read().strip() or 'which is just starting'}: "
                             f"wait until it has ended, take another {option}, or remove {folder / 'lock'} if its host "
                             "is gone and the file system does not know") from error
        except OSError as error:  # some network file systems have none
            print(f"warning: {folder} cannot be locked ({error.strerror}): see that no other run writes to it",
                  flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _lock(file: int, patience: float) -> None:
    """Lock an open file for this process; BlockingIOError if another still has it after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.2)


class LossGuard:
    """Tells bad steps by their loss and gradient, and remembers what is usual.

    Every rank must give it the same numbers; all then come to the same verdict.
    """

    def __init__(self, config: TrainConfig, recent: Sequence[float] = (), skipped: int = 0) -> None:
        self.config = config
        self.recent = deque(recent, WINDOW)
        self.skipped = skipped  # bad steps in a row

    def problem(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, or None; a good one counts to what is usual."""
        trouble = None
        if not math.isfinite(loss):
            trouble = f"the loss is {loss}"
        elif not math.isfinite(norm):
            trouble = f"the gradient's norm is {norm}"
        elif self.config.spike and len(self.recent) == WINDOW:
            usual = statistics.median(self.recent)
            if loss > usual + self.config.spike:
                trouble = f"the loss of {loss:.4f} is more than train.spike={self.config.spike} above the usual " \
                          f"{usual:.4f}"
        if trouble is None:
            self.recent.append(loss)
            self.skipped = 0
        else:
            self.skipped += 1
        return trouble

    @property
    def gives_up(self) -> bool:
        """Whether a bad step ends the run."""
        return self.config.bad_step == "stop" or self.skipped > self.config.max_skipped

    def state(self) -> dict[str, list[float] | int]:
        """For a checkpoint."""
        return {"recent": list(self.recent), "skipped": self.skipped}


class Watchdog:
    """Prints the stack of every thread and ends the process if it is not fed for `seconds`.

    A rank that waits for another in a collective sits in C code. The thread here prints as long as Python runs;
    faulthandler's own, which needs no Python, follows `reserve` seconds later. A context manager: leaving it stops it.
    """

    def __init__(self, seconds: float, rank: int, reserve: float = 10.0) -> None:
        self.seconds, self.rank, self.reserve = seconds, rank, reserve
        self._what = ""
        self._timer: threading.Timer | None = None

    def feed(self, what: str) -> None:
        """Start counting again; `what` is about to happen."""
        self.stop()
        self._what = what
        faulthandler.dump_traceback_later(self.seconds + self.reserve, exit=True)
        self._timer = threading.Timer(self.seconds, self._bark)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Watchdog:
        """It counts from the first `feed` on."""
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing is expected any more."""
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _bark(self) -> None:
        file = sys.__stderr__
        assert file is not None
        print(f"rank {self.rank}: no progress for {self.seconds:g} s in {self._what}. Where each thread is:", file=file)
        faulthandler.dump_traceback(file=file, all_threads=True)
        print(f"rank {self.rank} ends here. A rank whose stack is not in an exchange is the one the others wait for. "
              "If all were at work, take a longer train.timeout.", file=file, flush=True)
        os._exit(HUNG)
