"""Megatron-core's distributed checkpoints on CPU ranks, also of its distributed optimizer with torch's Adam."""
from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


FORMAT = "fully_reshardable"


def _states(models: list[Any], optimizer: Any, loading: bool) -> dict[str, Any]:
    (model,) = models
    shards = {"model": model.module.sharded_state_dict()}
    distributed = {"metadata": {"distrib_optim_sharding_type": FORMAT}}
    options = distributed if optimizer.config.use_distributed_optimizer else {}
    state = optimizer.sharded_state_dict(shards["model"], is_loading=loading, **options)
    return shards | {"optimizer": state}


def can_restore_distributed() -> bool:
    """Whether this megatron-core writes its distributed optimizer in a form for any number of ranks."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return FORMAT in getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())


def save(folder: str, models: list[Any], optimizer: Any) -> None:
    """All ranks must call."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    # Its writers are children of the rank, which as a daemon of the test may have none, and report to a server process
    # that would outlive the rank: here it ends with the block.
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False), \
            multiprocessing.get_context("fork").Manager() as manager, \
            mock.patch.object(filesystem_async, "_results_queue", manager.Queue()):
        dist_checkpointing.save(_states(models, optimizer, False), folder)


def restore(folder: str, models: list[Any], optimizer: Any) -> None:
    """What `save` wrote, on as many ranks or not."""
    from megatron.core import dist_checkpointing

    with _torch_adam(optimizer):
        states = dist_checkpointing.load(_states(models, optimizer, True), folder)
        models[0].module.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])


@contextlib.contextmanager
def _torch_adam(optimizer: Any) -> Iterator[None]:
    """What the distributed optimizer lacks to be restored with torch's Adam in place of Transformer Engine's or apex's.

    It reads its state before there is any; it looks for the number of steps, which it restores elsewhere, in the state
    of every parameter; and it gives all of them one tensor to count in.
    """
    if not optimizer.config.use_distributed_optimizer:
        yield
        return
    (inner,) = optimizer.chained_optimizers
    for parameter in (p for group in inner.optimizer.param_groups for p in group["params"]):
        inner.optimizer.state[parameter] = {
            "step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    stock = inner._set_main_param_and_optimizer_states

    def set_states(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, place = inner.model_param_group_index_map[parameter]
        state = inner.optimizer.state[inner.optimizer.param_groups[group]["params"][place]]
        stock(parameter, {"step": state["step"], **tensors})

    with mock.patch.object(inner, "_set_main_param_and_optimizer_states", set_states):
        yield
    for state in inner.optimizer.state.values():
        state["step"] = state["step"].clone()
