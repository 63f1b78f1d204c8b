"""Megatron-core behind the methods of `launch.engine.Engine`: `train.engine` = "megatron".

A GPTModel with MuSe as its core attention, Megatron's data parallelism and its distributed optimizer, whose state is
split over all ranks. Transformer Engine and apex are not needed; Megatron takes their Adam where they are installed.
Weights start as those of PyTorch's engine and are saved under their names, so a run goes on with any engine, on any
number of ranks.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from launch.config import RunConfig, TrainConfig
from launch.engine import TorchEngine, cut
from launch.megatron_model import MegatronLosses, attentions, build_gpt, data_parallel, pieces, transformer_config
from launch.model import build_model
from launch.optimizer import BETAS, allocate_state, set_rate, set_steps
from launch.probe import Captured
from launch.ranks import Ranks
from launch.timing import Stopwatch
from muse_dist import ByteCounter
from muse_dist.kernels.limits import ceil_div

WEIGHT = "param"  # what Megatron's optimizer calls the fp32 weights
KEPT = ("exp_avg", "exp_avg_sq")  # what Adam keeps of every parameter, beside the number of its steps


class MegatronEngine(TorchEngine):
    """Megatron-core with context parallelism, in bf16 with fp32 weights in the optimizer.

    Arguments and errors are those of `TorchEngine`.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, vocabulary: int, counter: ByteCounter | None = None
    ) -> None:
        check_ranks(ranks)
        assert ranks.gradients is not None
        dtype = compute_dtype(ranks.device)
        self._share(config, ranks)
        _initialize(ranks, config.train)
        self.model = build_model(config, ranks.device, ranks, counter, vocabulary).cpu()
        self.parameters = self.model.num_parameters()
        llama = self.model.config
        settings = transformer_config(
            config.model, ranks.size, dtype, "full" if config.train.recompute else "none",
            layernorm_epsilon=llama.rms_norm_eps, perform_initialization=False)
        self.gpt = build_gpt(config, settings, llama.vocab_size)
        self.attentions = attentions(self.gpt, config, counter)
        self.ddp = data_parallel(self.gpt)
        self.module = MegatronLosses(self.ddp, self.gpt)
        self.zero = _distributed_optimizer(self.ddp, config.train, dtype)
        self.optimizer = self.zero.optimizer  # Adam, of this rank's part
        allocate_state(self.optimizer)
        weights = dict(self.model.named_parameters())
        for name, parameter in self.gpt.named_parameters():
            self._set(parameter, WEIGHT, self._pack(name, parameter, weights.__getitem__))
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.model.to("meta").tie_weights()  # nothing asks for its numbers from now on
        self.mesh = DeviceMesh.from_group(ranks.gradients, ranks.device.type)
        self._lent: dict[str, Tensor] = {}  # what `tensors` returned

    def read_with(self, attention: str) -> None:
        """Use "muse" or "exact" attention from now on."""
        for layer, core in zip(self.gpt.decoder.layers, self.attentions[attention]):
            layer.self_attention.core_attention = core

    @contextmanager
    def capture(self, layers: Sequence[int]) -> Iterator[dict[int, Captured]]:
        """Keep what the attention of `layers`, numbered from 0, is given while `module` runs."""
        found: dict[int, Captured] = {}

        def keep(layer: int, given: tuple[Tensor, ...]) -> None:
            q, k, v = (x[:, :1].permute(1, 2, 0, 3) for x in given[:3])
            found[layer] = Captured(q, k, v, q.shape[-1] ** -0.5)

        cores = {layer: self.gpt.decoder.layers[layer].self_attention.core_attention for layer in layers}
        hooks = [core.register_forward_pre_hook(lambda _, given, layer=layer: keep(layer, given))
                 for layer, core in cores.items()]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def gradients(self, sequences: Tensor, watch: Stopwatch) -> Tensor:
        """Add up the gradients of this rank's sequences int64 [B, n]. Returns its share of the loss, a 0-d tensor."""
        from megatron.core.distributed import finalize_model_grads

        share = super().gradients(sequences, watch)
        with watch("backward"):
            finalize_model_grads([self.ddp])
        return share

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.ddp.no_sync()

    def clip(self) -> Tensor:
        """Scale the gradients to a norm of at most `train.clip`. Returns the norm they had, a 0-d tensor."""
        self.zero.prepare_grads()
        return torch.as_tensor(self.zero.clip_grad_norm(self.config.train.clip))

    def update(self, rate: float) -> None:
        """Take the step with this learning rate."""
        set_rate(self.optimizer, rate)
        self.zero.step_with_ready_grads()
        self.updates += 1

    def forget(self) -> None:
        """Drop the gradients."""
        self.ddp.zero_grad_buffer()
        self.zero.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `TorchEngine`, gathered one after the other and cut into equal parts, as copies."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.gpt.named_parameters():
            for kind in (WEIGHT, *KEPT):
                for part, view in pieces(name, self._whole(parameter, kind), self.config.model).items():
                    found[_saved_name(part, kind)] = cut(view.reshape(self.shapes[part]), self.ranks, self.mesh)
        for part in self.shapes:
            found[_saved_name(part, "step")] = torch.tensor(float(self.updates))
        self._lent = found
        return found

    def go_on(self, updates: int) -> None:
        """Take over what the tensors of the last `tensors` have been overwritten with."""
        for name, parameter in self.gpt.named_parameters():
            for kind in (WEIGHT, *KEPT):
                self._set(parameter, kind, self._pack(name, parameter, partial(self._taken_over, kind)))
        for kept in self.optimizer.state.values():
            if "step" in kept:
                kept["step"].fill_(updates)
        set_steps(self.optimizer, updates)
        self.updates, self._lent = updates, {}

    def _taken_over(self, kind: str, name: str) -> Tensor:
        part = self._lent[_saved_name(name, kind)]
        assert isinstance(part, DTensor)
        return part.full_tensor()

    def save_model(self, folder: Path) -> None:
        """Write the whole model as transformers reads it, on one rank."""
        whole = {}
        for name, parameter in self.gpt.named_parameters():
            weight = self._whole(parameter, WEIGHT)
            if self.ranks.first:
                for part, view in pieces(name, weight, self.config.model).items():
                    whole[part] = view.reshape(self.shapes[part]).cpu()
        if self.ranks.first:
            self.model.save_pretrained(folder, state_dict=whole)

    def _pack(self, name: str, parameter: nn.Parameter, read: Callable[[str], Tensor]) -> Tensor:
        """Megatron's form, fp32, of the Llama's tensors that `read` returns by name."""
        whole = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        with torch.no_grad():
            for part, view in pieces(name, whole, self.config.model).items():
                view.copy_(read(part).reshape(view.shape))
        return whole

    def _part(self, parameter: nn.Parameter) -> tuple[slice, dict[str, Tensor]] | None:
        """Which of a flat parameter's numbers this rank's optimizer has, and what of them; None if it has none."""
        if parameter not in self.zero.model_param_gbuf_map:
            return None
        mine = self.zero._get_model_param_range_map(parameter)["param"]
        return slice(mine.start, mine.end), self.zero._get_main_param_and_optimizer_states(parameter)

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The fp32 weights, or what Adam keeps of them, put together from the parts of all ranks."""
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        part = self._part(parameter)
        if part is not None:
            place, kept = part
            whole[place] = kept[kind].detach()
        return self.ranks.sum(whole).view(parameter.shape)

    def _set(self, parameter: nn.Parameter, kind: str, whole: Tensor) -> None:
        """Take over fp32 numbers: what the optimizer has of them, and for weights what the model computes with."""
        if kind == WEIGHT:
            parameter.data.copy_(whole)
        part = self._part(parameter)
        if part is not None:
            place, kept = part
            kept[kind].data.copy_(whole.flatten()[place])


def check_ranks(ranks: Ranks) -> None:
    """Raise ValueError if Megatron cannot train on these ranks: one alone, no GPUs, or not installed."""
    if ranks.gradients is None:
        raise ValueError("train.engine='megatron' splits the optimizer over ranks, and there is one; start it with "
                         "torchrun, or take 'torch'")
    compute_dtype(ranks.device)
    try:
        import megatron.core  # noqa: F401
    except ImportError as error:
        raise ValueError("train.engine='megatron': megatron-core is not installed; pip install 'muse_dist[megatron]', "
                         "or take 'torch'") from error


def compute_dtype(device: torch.device) -> torch.dtype:
    """What Megatron computes in: bf16. ValueError for a device other than a GPU, which it asks for everywhere."""
    if device.type != "cuda":
        raise ValueError(f"train.engine='megatron' trains on GPUs only, and the run is on {device.type}; take "
                         "--device cuda where there is one, or 'torch'")
    return torch.bfloat16


def _initialize(ranks: Ranks, settings: TrainConfig) -> None:
    """Megatron's own groups, of the same ranks as those of `ranks`: neighbours share sequences."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()  # of an engine before this one
    parallel_state.initialize_model_parallel(
        context_parallel_size=ranks.size, distributed_timeout_minutes=ceil_div(settings.timeout + 60, 60),
        create_gloo_process_groups=False)
    assert parallel_state.get_context_parallel_rank() == ranks.rank
    tensor_parallel.model_parallel_cuda_manual_seed(settings.seed)


def _distributed_optimizer(ddp: nn.Module, settings: TrainConfig, dtype: torch.dtype) -> Any:
    """Megatron's distributed AdamW for all parameters; weight decay on matrices only."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    chain = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=settings.lr, weight_decay=settings.weight_decay, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        clip_grad=settings.clip, bf16=dtype == torch.bfloat16, params_dtype=dtype, use_distributed_optimizer=True),
        [ddp], use_gloo_process_groups=False)
    (optimizer,) = chain.chained_optimizers  # others would be for experts
    for group in optimizer.optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]  # as Megatron's scheduler would
    return optimizer


def _saved_name(parameter: str, kind: str) -> str:
    """The name that `TorchEngine` gives a tensor in a checkpoint."""
    return f"model.{parameter}" if kind == WEIGHT else f"optimizer.{parameter}.{kind}"
