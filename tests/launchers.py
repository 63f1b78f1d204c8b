"""Starts programs on two ranks as users do, with torchrun, deepspeed or mpirun, and leaves none of their processes."""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(folder, *program):
    """The command that starts a program, given as its file or as -m and a module, with its arguments."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]


def deepspeed(folder, *program):
    """As `torchrun`; the program must leave a file `finished` in the folder if it ends well."""
    _need("deepspeed", "deepspeed")
    module = ["--module"] if program[0] == "-m" else []
    return [str(ROOT / "launch" / "deepspeed.sh"), str(folder), "--num_gpus", "2", "--master_port", free_port(),
            *module, *program[len(module):]]


def mpirun(folder, *program):
    """As `torchrun`."""
    _need("mpi4py", "mpirun")
    return ["env", f"MASTER_PORT={free_port()}", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
            str(ROOT / "launch" / "mpirun.sh"), "-np", "2", "--oversubscribe", "-x", "MASTER_PORT", sys.executable,
            *program]


def _need(package, launcher):
    """Skip the test where a launcher is not installed."""
    if find_spec(package) is None or shutil.which(launcher, path=_path()) is None:
        pytest.skip(f"there is no {package}, or no {launcher}")


def _path():
    """Where commands are looked for: where this Python's are first."""
    return f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"


def start(command):
    """A launcher in a process group of its own; what it and its ranks say goes to one pipe."""
    variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": _path()}
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def finish(*processes, limit=200):
    """The output of launchers that must end; whatever they leave behind is killed."""
    try:
        return [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


@contextmanager
def started(launcher, folder, *program):
    """`start` of a program with the folder as one of its arguments, by which all of its processes are known.

    Raises AssertionError if any of them, even one that has lost its launcher, is left at the end. They are killed.
    """
    run = start(launcher(folder, *program))
    try:
        yield run
    finally:
        left = psutil.wait_procs(processes_of(folder), timeout=5)[1]
        said = [_asked(process.cmdline, "ended late") for process in left]
        for process in left:
            _asked(process.kill, None)
        run.communicate()
    assert not left, said


def processes_of(folder):
    """Those with the folder in their command line: launchers and ranks."""
    return [process for process in psutil.process_iter() if str(folder) in _asked(process.cmdline, [])]


def rank_process(folder, rank):
    """The process of a rank, None if there is none (yet). Launchers themselves know no rank."""
    for process in processes_of(folder):
        variables = _asked(process.environ, {})
        if str(rank) in (variables.get("RANK"), variables.get("OMPI_COMM_WORLD_RANK")):
            return process
    return None


def _asked(what, otherwise):
    """What a process says of itself, or `otherwise` if it has just ended."""
    try:
        return what()
    except psutil.Error:
        return otherwise
