"""Run a module on ranks that mpirun started, with the variables that torchrun would set for it.

    launch/mpirun.sh -np 8 python -m launch.mpi launch.train --config configs/125m.toml

MASTER_ADDR and MASTER_PORT are where the ranks meet: by default the first rank's host name, and 29500. SIGUSR1 to
mpirun is SIGTERM to the ranks, and has launch.train save and end.
"""
from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

PORT = "29500"  # torchrun's default


def main(arguments: Sequence[str]) -> None:
    """The command: a module and its arguments.

    A rank that ends with an error ends all of them: in MPI the others would wait for it at their end.
    """
    if not arguments:
        raise SystemExit("usage: python -m launch.mpi MODULE [ARGUMENT]...")
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise SystemExit("launch.mpi: mpi4py is missing: pip install 'muse_dist[mpi]'") from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = world.bcast(os.environ.get("MASTER_ADDR") or socket.gethostname())
    port = world.bcast(os.environ.get("MASTER_PORT") or PORT)
    os.environ.update(RANK=str(world.Get_rank()), WORLD_SIZE=str(world.Get_size()), LOCAL_RANK=str(local.Get_rank()),
                      LOCAL_WORLD_SIZE=str(local.Get_size()), MASTER_ADDR=address, MASTER_PORT=port)
    sys.argv = list(arguments)
    # mpirun that gets SIGTERM itself kills the ranks a quarter of a second later. SIGUSR1 it only hands on.
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            _abort(world, stop.code if isinstance(stop.code, int) else 1)
        raise
    except BaseException:
        traceback.print_exc()
        _abort(world, 1)


def _abort(world: object, status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    world.Abort(status)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(sys.argv[1:])
