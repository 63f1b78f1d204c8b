"""DeepSpeed's ZeRO behind the methods of `launch.engine.Engine`: `train.engine` = "deepspeed".

Weights are fp32, and computed with as PyTorch's engine does. Checkpoints are those of that engine, with the same names:
a run goes on with either, with any ZeRO stage and number of ranks. DeepSpeed's own checkpoints would be pickles.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from launch.config import RunConfig
from launch.engine import TorchEngine, cut
from launch.model import LossModel
from launch.optimizer import allocate_state, make_optimizer, set_rate
from launch.ranks import Ranks
from muse_dist import ByteCounter
from muse_dist.kernels.limits import ceil_div

KEPT = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside the number of its steps


class DeepSpeedEngine(TorchEngine):
    """ZeRO 1, 2 or 3, over all ranks.

    To DeepSpeed every rank has a batch of its own; that ranks share sequences is between the model and `ranks`.
    Arguments and errors are those of `TorchEngine`.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, vocabulary: int, counter: ByteCounter | None = None
    ) -> None:
        check_ranks(ranks)
        assert ranks.gradients is not None
        import deepspeed

        from muse_dist.deepspeed_ranks import join_processes

        self._build(config, ranks, vocabulary, counter)
        self.mesh = DeviceMesh.from_group(ranks.gradients, ranks.device.type)
        self.module: Any  # DeepSpeed's engine
        self.module, self.zero, *_ = deepspeed.initialize(
            model=LossModel(self.model), optimizer=make_optimizer(self.model, config.train),
            config=deepspeed_settings(config, ranks), dist_init_required=False,
            mpu=join_processes(1, config.train.timeout + 60))
        self.optimizer = self.zero.optimizer  # PyTorch's, of this rank's part
        self.sharded = config.deepspeed.stage == 3
        self._allocate_state()
        self._pending = False  # gradients that no update has used
        self._lent: dict[str, Tensor] = {}  # what `tensors` returned

    def _allocate_state(self) -> None:
        """Have what the optimizer keeps before the first step, which is when DeepSpeed would make it."""
        if self.sharded:
            self.zero._set_fp32_optimizer_param_groups()
            allocate_state(self.optimizer)
            self.zero._clear_fp32_optimizer_param_groups()
        else:
            allocate_state(self.optimizer)
            self.zero._lazy_init_hp_params_optimizer_state()

    def _backward(self, loss: Tensor) -> None:
        self._lent = {}
        self._pending = True
        self.module.backward(loss, scale_wrt_gas=False)

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """The sum of a step's gradients is complete after its last backward."""
        self.module.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def clip(self) -> Tensor:
        """The gradients' norm, a 0-d tensor, infinite where any is no number. They are scaled in `update`."""
        if not self.sharded:
            return torch.as_tensor(self.zero.scaled_global_norm())
        from deepspeed.utils import safe_get_local_grad

        mine = torch.stack([safe_get_local_grad(p).norm() for p in self.model.parameters()]).norm()
        return self.ranks.sum(mine.square()).sqrt()

    def update(self, rate: float) -> None:
        """Clip the gradients and take the step with this learning rate."""
        set_rate(self.optimizer, rate)
        self.module.step()
        self._pending = False
        self.updates += 1

    def forget(self) -> None:
        """Drop the gradients, if no update used them: DeepSpeed does so itself in a step that is not finite."""
        if not self._pending:
            return
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        spoiled = next(self.model.parameters())
        if self.sharded:
            safe_set_local_grad(spoiled, torch.full_like(spoiled.ds_tensor, torch.nan))
        else:
            safe_set_full_grad(spoiled, torch.full_like(spoiled, torch.nan))
        with _silent():  # it would report an overflow
            self.module.step()
        self._pending = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `TorchEngine`, gathered one after the other and cut into equal parts, as copies."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = cut(safe_get_full_fp32_param(parameter), self.ranks, self.mesh)
            for key in KEPT:
                whole = safe_get_full_optimizer_state(parameter, key)
                found[f"optimizer.{name}.{key}"] = cut(whole, self.ranks, self.mesh)
            found[f"optimizer.{name}.step"] = torch.tensor(float(self.updates))
        self._lent = found
        return found

    def go_on(self, updates: int) -> None:
        """Take over what the tensors of the last `tensors` have been overwritten with."""
        for name, parameter in self.model.named_parameters():
            self._set_parameter(parameter, self._whole(f"model.{name}"))
            for key in KEPT:
                self._set_kept(parameter, self._whole(f"optimizer.{name}.{key}"), key)
        for kept in self.optimizer.state.values():
            kept["step"].fill_(updates)
        self.updates, self._lent = updates, {}

    def _whole(self, name: str) -> Tensor:
        part = self._lent[name]
        assert isinstance(part, DTensor)
        return part.full_tensor()

    def _set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Both DeepSpeed's copy that the optimizer changes, and the one that the model computes with."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
        from deepspeed.runtime.zero import GatheredParameters

        if self.sharded:
            safe_set_local_fp32_param(parameter, self._padded_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)
        with GatheredParameters([parameter], modifier_rank=0, enabled=self.sharded):
            parameter.data.copy_(value)

    def _set_kept(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.sharded:
            safe_set_local_optimizer_state(parameter, self._padded_part(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _padded_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's piece of ZeRO-3's equal pieces of a flat parameter, the last filled up with zeros."""
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # ZeRO-3 adds it
        flat = nn.functional.pad(value.flatten(), (0, size * self.ranks.world - value.numel()))
        return flat.narrow(0, size * self.ranks.world_rank, size)

    def save_model(self, folder: Path) -> None:
        """Write the whole model as transformers reads it, on one rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = {}
        for name, parameter in self.model.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            if self.ranks.first:
                whole[name] = value.cpu()
        if self.ranks.first:
            self.model.save_pretrained(folder, state_dict=whole)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep DeepSpeed's warnings out of the log for a while."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_ranks(ranks: Ranks) -> None:
    """Raise ValueError if DeepSpeed cannot train on these ranks: one alone, another device, or not installed."""
    if ranks.gradients is None:
        raise ValueError("train.engine='deepspeed' splits the optimizer over ranks, and there is one; start it with "
                         "torchrun, or take 'torch'")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("train.engine='deepspeed': DeepSpeed is not installed; pip install 'muse_dist[deepspeed]', "
                         "or take 'torch'") from error
    kind = deepspeed.get_accelerator().device_name()
    if kind != ranks.device.type:
        raise ValueError(f"train.engine='deepspeed' computes on {kind} here, and the run is on {ranks.device.type}; "
                         f"set DS_ACCELERATOR={ranks.device.type}, or take another --device")


def deepspeed_settings(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's own settings, as its JSON files have them."""
    settings = config.train
    mine = settings.batch // ranks.replicas
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch or mine,
        "gradient_accumulation_steps": ceil_div(mine, settings.micro_batch or mine),
        "gradient_clipping": settings.clip,
        "steps_per_print": None,  # the monitor prints
        "zero_optimization": {"stage": config.deepspeed.stage, "overlap_comm": config.deepspeed.overlap},
    }
