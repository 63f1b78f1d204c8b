"""Why runs failed: from logs of ranks that really failed under torchrun, and from logs that are made up."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.failures import exceptions, first_failure, reason

ROOT = Path(__file__).parents[1]
# Rank 1 ends as it is told; rank 0 waits for it in an exchange, and fails there.
RANKS = """
import os, sys
import torch
import torch.distributed as dist
from launch.failures import said_at_once

dist.init_process_group("gloo")
with said_at_once(dist.get_rank()):
    if dist.get_rank() == 1:
        exec(sys.argv[1])
    dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("end, wanted", [
    ("raise ValueError('q [1, 2]: too short')", "ValueError: q [1, 2]: too short"),
    ("assert False", "AssertionError"),
    ("class OutOfResources(Exception): pass\nraise OutOfResources('shared memory')",
     "OutOfResources: shared memory"),
    ("os.kill(os.getpid(), 9)", "rank 1 died of SIGKILL"),
    ("from launch.guard import Watchdog; import time; Watchdog(0.1, 1).feed('step 3'); time.sleep(60)",
     "rank 1 ended with status 70: rank 1: no progress for 0.1 s in step 3")])
def test_the_rank_that_failed_is_named_not_those_that_waited_for_it(end, wanted, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "ranks.py"), end]
    found = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100)
    assert found.returncode == 1 and "ChildFailedError" in found.stdout
    assert reason(found.stdout, found.returncode) == f"exit status 1: {wanted}", found.stdout


REPORT = """Traceback (most recent call last):
  File "run.py", line 1, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
[0]:
  rank      : 2 (local_rank: 2)
  exitcode  : {status} (pid: 7)
"""
# Rank 1 ended, and rank 0 noticed before torchrun looked.
AT_ONCE = """[rank0]: Traceback (most recent call last):
[rank0]: RuntimeError: Connection closed by peer
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : {status} (pid: 8)
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : -6 (pid: 7)
"""
CHAINED = """[rank1]: Traceback (most recent call last):
[rank0]: Traceback (most recent call last):
[rank1]:   File "a.py", line 1
[rank1]: KeyError: 'a'
[rank1]: The above exception was the direct cause of the following exception:
[rank1]: Traceback (most recent call last):
[rank0]: late.Unlucky: second
[rank1]: RuntimeError: no 'a'; other
"""
ABORTED = """terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [Rank 2] watchdog: CUDA error: an illegal memory access was encountered
"""


@pytest.mark.parametrize("log, wanted", [
    ("usage: x\n[rank0]: torch.OutOfMemoryError: no room\nmore\nRuntimeError: late", "torch.OutOfMemoryError: no room"),
    ("[rank1]: Traceback (most recent call last):\n[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried\n"
     "[rank0]: RuntimeError: another rank died\nChildFailedError:\n",
     "torch.OutOfMemoryError: CUDA out of memory. Tried"),
    (CHAINED, "late.Unlucky: second"), (CHAINED.replace("late.Unlucky", "  at"), "RuntimeError: no 'a'; other"),
    (ABORTED + REPORT.format(status=-6),
     "rank 2 died of SIGABRT: [Rank 2] watchdog: CUDA error: an illegal memory access was encountered"),
    ("[rank0]: RuntimeError: a rank died\n" + REPORT.format(status=70), "rank 2 ended with status 70"),
    ("[rank2]: RuntimeError: mine\n" + REPORT.format(status=-9), "RuntimeError: mine"),
    ("OSError: before there were ranks\n" + REPORT.format(status=1), "OSError: before there were ranks"),
    ("torch.distributed.elastic.multiprocessing.api.SignalException: got signal: 15",
     "torch.distributed.elastic.multiprocessing.api.SignalException: got signal: 15"),
    ("Fatal Python error: Segmentation fault\n\nThread 1", "Fatal Python error: Segmentation fault"),
    ("just\n[rank0]: ended\n\n", "ended"), ("", "no output")])
def test_the_line_that_says_it(log, wanted):
    assert first_failure(log) == wanted
    assert reason(log, 3) == f"exit status 3: {wanted}"


def test_a_refused_command_and_a_signal_are_said():
    assert reason("train: error: q: 48 tokens\nValueError: x", 2) == "exit status 2: q: 48 tokens"
    assert reason("step 1", -11) == "exit status -11 (SIGSEGV): step 1"
    assert reason("", -40) == "exit status -40 (signal 40): no output"
    assert len(reason("ValueError: " + 400 * "x", 1)) < 330


def test_exceptions_belong_to_ranks():
    assert exceptions(CHAINED) == [("late.Unlucky: second", 0), ("RuntimeError: no 'a'; other", 1)]


def test_a_rank_without_a_word_is_named_also_where_another_was_seen_first():
    assert first_failure(AT_ONCE.format(status=70)) == "rank 1 ended with status 70"
    assert first_failure(AT_ONCE.format(status=-9)) == "rank 1 died of SIGKILL"
    assert first_failure(AT_ONCE.format(status=-15)) == "RuntimeError: Connection closed by peer", "torchrun ended it"
    for status in (-6, -9):  # NCCL's watchdog, or torchrun, ended the other one, whose fault it was not
        log = AT_ONCE.format(status=status).replace("RuntimeError: Connection closed by peer", "ValueError: data.path")
        assert first_failure(log) == "ValueError: data.path"
