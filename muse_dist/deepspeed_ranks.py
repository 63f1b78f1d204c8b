"""The processes of a DeepSpeed run and their groups, in the form DeepSpeed asks for them."""
from __future__ import annotations

import atexit
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_PORT = "29500"  # DeepSpeed's and torchrun's own default


@dataclass(frozen=True)
class Ranks:
    """Consecutive ranks share a sequence, `context_size` of them. DeepSpeed reads the methods as its `mpu`.

    There is no `get_data_parallel_group` on purpose: ZeRO-3 would shard parameters over that group, and every rank
    holds all of them. The groups have a timeout of their own, which those DeepSpeed makes itself do not get.
    """

    context: dist.ProcessGroup  # ranks that share this rank's sequence
    everyone: dist.ProcessGroup  # all ranks: gradients are summed over them, ZeRO shards over them
    alone: dist.ProcessGroup  # this rank
    device: torch.device

    @property
    def context_size(self) -> int:
        return self.context.size()

    @property
    def context_rank(self) -> int:
        return self.context.rank()

    @property
    def data_size(self) -> int:
        """How many sequences (or micro-batches of them) are read at once."""
        return self.everyone.size() // self.context.size()

    @property
    def data_rank(self) -> int:
        """Which of them this rank reads: seed the data by it, not by the rank."""
        return self.everyone.rank() // self.context.size()

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        dist.all_reduce(x, group=self.everyone)
        return x

    def initialize_sequence_parallel(self) -> None:
        """DeepSpeed looks for this name to tell sequence-parallel ranks from tensor-parallel ones; it never calls."""

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.context

    def get_sequence_parallel_world_size(self) -> int:
        return self.context_size

    def get_sequence_parallel_rank(self) -> int:
        return self.context_rank

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return self.everyone

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.everyone.size()

    def get_sequence_data_parallel_rank(self) -> int:
        return self.everyone.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def join_processes(context_size: int, timeout_seconds: float) -> Ranks:
    """Join the processes that `deepspeed`, `torchrun` or `mpirun` started, and make the groups. All must call it.

    Raises:
        ValueError: `context_size` does not divide the number of processes, or nothing says which GPU is this one's.
        ImportError: started by none of them, or by mpirun, and mpi4py is missing.
    """
    import deepspeed

    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized() and "RANK" not in os.environ:
        _discover_by_mpi()
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != "cpu":
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("LOCAL_RANK is not set, which says the GPU of this process: start the run with torchrun, "
                             "deepspeed or mpirun, or set it to the process's number on its node")
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    _init_distributed(timeout)
    size, rank = dist.get_world_size(), dist.get_rank()
    if size % context_size:
        raise ValueError(f"muse.context_parallel_size={context_size} does not divide the {size} processes of the run; "
                         f"take a divisor of {size}, or start a multiple of {context_size} processes")
    everyone = dist.new_group(list(range(size)), timeout=timeout)
    contexts = [dist.new_group(list(range(first, first + context_size)), timeout=timeout)
                for first in range(0, size, context_size)]
    alone = dist.new_group([rank], timeout=timeout, use_local_synchronization=True)
    return Ranks(contexts[rank // context_size], everyone, alone, torch.device(accelerator.current_device_name()))


def leave_processes() -> None:
    """End the process groups once every rank is here: a rank that leaves early can abort the others' exit."""
    dist.barrier()
    dist.destroy_process_group()


def is_failed_exchange(error: BaseException) -> bool:
    """Whether an exception says that an exchange with other ranks failed. Gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "nccl", "exchange '")))


def _init_distributed(timeout: timedelta) -> None:
    """`deepspeed.init_distributed` without its shared-memory collectives for CPUs.

    They wait in an endless loop for the other ranks (csrc/cpu/comm/shm.cpp), so that no timeout could end a run with a
    stuck rank; and they are compiled at every first start.
    """
    import deepspeed

    compatible, name = deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm"
    before = compatible.get(name)
    compatible[name] = False
    try:
        deepspeed.init_distributed(dist_backend=deepspeed.get_accelerator().communication_backend_name(),
                                   auto_mpi_discovery=False, timeout=timeout, verbose=False)
    finally:
        compatible[name] = before


def _discover_by_mpi() -> None:
    """Set what torch's rendezvous reads from MPI's ranks. DeepSpeed's own discovery overwrites MASTER_ADDR and PORT.

    From here on an exception that nobody catches ends all ranks.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError("the ranks are not known: start the run with torchrun, with deepspeed, or with mpirun and "
                          "mpi4py installed (pip install 'muse_dist[mpi]')") from error
    atexit.register(_end_all_if_failed, MPI)
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = world.bcast(os.environ.get("MASTER_ADDR") or socket.gethostname())
    os.environ.update(RANK=str(world.Get_rank()), WORLD_SIZE=str(world.Get_size()), LOCAL_RANK=str(local.Get_rank()),
                      MASTER_ADDR=address, MASTER_PORT=os.environ.get("MASTER_PORT", DEFAULT_PORT))


def _end_all_if_failed(mpi: Any) -> None:
    """At this rank's exit: end all ranks if it was an exception that nobody caught.

    MPI's end waits for every rank, so that without this one that is stuck would keep the others for ever.
    """
    # Python keeps such an exception here before it shows it. By now it is shown, by whichever hook: torch's collects
    # what those before it print, which would be lost if one of them ended the process.
    if hasattr(sys, "last_value") and not mpi.Is_finalized():
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(1)
