"""Optimizers and the learning rate: PyTorch's fused AdamW, or FusedAdam of NVIDIA's apex where that is installed."""
from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from launch.config import TrainConfig

BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; weight decay on matrices only.

    Raises:
        ValueError: apex is asked for and its fused kernels are not there, or cannot be used.
    """
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True)
    for device in {p.device for p in model.parameters()}:
        check_optimizer(config, device)
    return fused_adam()(groups, lr=config.lr, betas=BETAS, adam_w_mode=True)


def check_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError if the optimizer that `config` names cannot run on this device, or is not installed."""
    if config.optimizer == "adamw":
        return
    if config.shard:
        raise ValueError("train.optimizer='apex' does not know sharded weights (train.shard=true); take 'adamw'")
    if device.type != "cuda":
        raise ValueError("train.optimizer='apex' needs a GPU; take 'adamw'")
    fused_adam()


def fused_adam() -> Any:
    """FusedAdam of NVIDIA's apex, which is known by its compiled module `amp_C`: the registry's `apex` has none.

    Raises:
        ValueError: it is not installed, or does not load.
    """
    if importlib.util.find_spec("amp_C") is None:
        there = importlib.util.find_spec("apex") is not None
        raise ValueError("train.optimizer='apex': " + (
            "the apex that is installed is not NVIDIA's, or was built without its CUDA extensions (no module amp_C). "
            "pip's apex is another project; uninstall it and build " if there else "apex is not installed; build ")
            + "https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext, or take 'adamw'")
    try:
        importlib.import_module("amp_C")  # FusedAdam would only say so in its first step
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise ValueError(f"train.optimizer='apex': it is installed and does not load ({error}), as when it was built "
                         "for another PyTorch, or its parts are of two projects; uninstall it and build "
                         "https://github.com/NVIDIA/apex again with --cpp_ext --cuda_ext, or take 'adamw'") from error


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 1, 2, ...: linear warm-up, then a cosine that would reach zero after the last step."""
    if step < config.warmup:
        return config.lr * step / config.warmup
    start = max(config.warmup, 1)
    progress = min((step - start) / (config.steps - start + 1), 1.0) if config.steps >= start else 0.0
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make what it keeps of every parameter, as it is before the first step, by one of size zero."""
    set_rate(optimizer, 0.0)  # every step sets its own
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for kept in optimizer.state.values():
        for value in kept.values():
            if isinstance(value, Tensor):
                value.zero_()
    set_steps(optimizer, 0)


def set_steps(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell an optimizer that counts its steps by group, as apex does, how many there were."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = updates
