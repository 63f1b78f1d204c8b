"""What runs the steps: the model spread over the ranks, its gradients and its optimizer, behind a few methods.

`launch.deepspeed_engine` and `launch.megatron_engine` have those of `train.engine` = "deepspeed" and "megatron".
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from launch.config import RunConfig
from launch.model import ATTENTIONS, LossModel, build_model, recompute_activations
from launch.optimizer import allocate_state, make_optimizer, set_rate, set_steps
from launch.probe import Captured, capture
from launch.ranks import Ranks
from launch.timing import Stopwatch
from muse_dist import ByteCounter


class Engine(Protocol):
    """What the training loop asks of whatever runs its steps. All ranks call every method, in the same order."""

    model: LlamaForCausalLM  # the shape of what is trained, and where the engine does not say otherwise, the weights
    module: nn.Module  # module(sequences [B, n], positions) runs the model: losses fp32
    parameters: int  # numbers in the whole model
    updates: int  # how often the weights have changed

    def read_with(self, attention: str) -> None:
        """Use "muse" or "exact" attention from now on."""

    def capture(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, Captured]]:
        """Keep what the attention of `layers`, numbered from 0, is given while `module` runs."""

    def gradients(self, sequences: Tensor, watch: Stopwatch) -> Tensor:
        """Add up the gradients of this rank's sequences int64 [B, n]. Returns its share of the loss, a 0-d tensor."""

    def clip(self) -> Tensor:
        """Scale the gradients to a norm of at most `train.clip`. Returns the norm they had, a 0-d tensor."""

    def update(self, rate: float) -> None:
        """Take the step with this learning rate."""

    def forget(self) -> None:
        """Drop the gradients."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by names that do not depend on the ranks, to be saved or overwritten."""

    def go_on(self, updates: int) -> None:
        """Continue where the weights had changed so many times; `tensors` have been overwritten."""

    def save_model(self, folder: Path) -> None:
        """Write the whole model as transformers reads it."""


def make_engine(config: RunConfig, ranks: Ranks, vocabulary: int, counter: ByteCounter | None = None) -> Engine:
    """The engine that `train.engine` names; arguments and errors as `TorchEngine` has them."""
    if config.train.engine == "torch":
        return TorchEngine(config, ranks, vocabulary, counter)
    if config.train.engine == "megatron":
        from launch.megatron_engine import MegatronEngine

        return MegatronEngine(config, ranks, vocabulary, counter)
    from launch.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(config, ranks, vocabulary, counter)


def check_engine(name: str, ranks: Ranks) -> None:
    """Raise ValueError if `train.engine` = `name` cannot run on these ranks: one alone, their device, a package."""
    if name == "megatron":
        from launch.megatron_engine import check_ranks
    elif name == "deepspeed":
        from launch.deepspeed_engine import check_ranks
    else:
        return
    check_ranks(ranks)


class TorchEngine(Engine):
    """PyTorch's own: DistributedDataParallel, or FSDP2 with `train.shard`.

    Args:
        config: the run.
        ranks: who shares the sequences and the work.
        vocabulary: of the data.
        counter: counts what the attention receives.
    Raises:
        ValueError: settings that do not fit the ranks or each other.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, vocabulary: int, counter: ByteCounter | None = None
    ) -> None:
        self._build(config, ranks, vocabulary, counter)
        self.module = self._wrapped(LossModel(self.model))
        self.optimizer = make_optimizer(self.model, config.train)
        allocate_state(self.optimizer)  # a checkpoint has it from the first step on

    def _build(self, config: RunConfig, ranks: Ranks, vocabulary: int, counter: ByteCounter | None) -> None:
        """The model, whole on every rank."""
        self._share(config, ranks)
        self.model = build_model(config, ranks.device, ranks, counter, vocabulary)
        self.parameters = self.model.num_parameters()
        if config.train.recompute:
            recompute_activations(self.model)

    def _share(self, config: RunConfig, ranks: Ranks) -> None:
        """Who reads which tokens."""
        self.config, self.ranks, self.updates = config, ranks, 0
        if config.train.batch % ranks.replicas:
            raise ValueError(f"train.batch={config.train.batch} must be a multiple of the {ranks.replicas} sets of "
                             "ranks, which each read their own sequences")
        self.positions: Tensor | None = None
        if ranks.size > 1:
            self.positions = ranks.split(config.data.context, config.muse.block).positions(ranks.rank)

    def _wrapped(self, losses: LossModel) -> nn.Module:
        if self.config.train.shard:
            return self._sharded(losses)
        if self.ranks.gradients is None:
            return losses
        return DistributedDataParallel(losses, process_group=self.ranks.gradients)

    def _sharded(self, losses: LossModel) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if self.ranks.gradients is None:
            raise ValueError("train.shard=true splits the weights over ranks, and there is one; start it with torchrun")
        kind = self.ranks.device.type
        mesh = DeviceMesh.from_group(self.ranks.gradients, kind)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if kind == "cuda" else MixedPrecisionPolicy()
        for layer in losses.model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(losses, mesh=mesh, mp_policy=policy)
        return losses

    def read_with(self, attention: str) -> None:
        """Use "muse" or "exact" attention from now on."""
        name = "exact on ranks" if attention == "exact" and self.ranks.size > 1 else attention
        if self.model.config._attn_implementation != ATTENTIONS[name]:
            self.model.set_attn_implementation(ATTENTIONS[name])

    def capture(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, Captured]]:
        """Keep what the attention of `layers`, numbered from 0, is given while `module` runs."""
        return capture(self.model, layers)

    def gradients(self, sequences: Tensor, watch: Stopwatch) -> Tensor:
        """Add up the gradients of this rank's sequences int64 [B, n]. Returns its share of the loss, a 0-d tensor."""
        settings = self.config.train
        count = settings.batch * self.config.data.context
        parts = sequences.split(settings.micro_batch or len(sequences))
        total = torch.zeros((), device=self.ranks.device)
        self.module.train()
        for i, part in enumerate(parts):
            with self._exchanging(i == len(parts) - 1):
                with watch("forward"):
                    share = self.module(part, self.positions).sum() / count
                with watch("backward"):
                    self._backward(share * self.ranks.world)  # gradients are averaged over the ranks, shares added
            total += share.detach()
        return total

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients in the last backward of a step only."""
        if isinstance(self.module, DistributedDataParallel):
            return nullcontext() if last else self.module.no_sync()
        if self.config.train.shard:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def clip(self) -> Tensor:
        """Scale the gradients to a norm of at most `train.clip`. Returns the norm they had, a 0-d tensor."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def update(self, rate: float) -> None:
        """Take the step with this learning rate."""
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.updates += 1

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and what the optimizer keeps of them, by names that do not depend on the ranks."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{name}.{key}"] = value
        return found

    def go_on(self, updates: int) -> None:
        """Continue where the weights had changed so many times."""
        set_steps(self.optimizer, updates)
        self.updates = updates

    def save_model(self, folder: Path) -> None:
        """Write the whole model as transformers reads it, on one rank."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        if not self.config.train.shard:
            if self.ranks.first:
                self.model.save_pretrained(folder)
            return
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.ranks.first:
            self.model.save_pretrained(folder, state_dict=whole)


def cut(whole: Tensor, ranks: Ranks, mesh: DeviceMesh) -> DTensor:
    """This rank's part, a copy, of a tensor that every rank has; the first dimension is split over all `ranks`."""
    parts = whole.chunk(ranks.world)
    mine = parts[ranks.world_rank].clone() if ranks.world_rank < len(parts) else whole[:0].clone()
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
