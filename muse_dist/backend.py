"""Which kernels run: the plain ones in PyTorch, or the Triton ones for GPUs."""
from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from muse_dist.config import MuseConfig
from muse_dist.kernels.limits import DTYPES, MOST_DIM, largest_leaf, padded


Operators = ModuleType | SimpleNamespace  # the functions of `plain_blocks`, by whichever kernels


def kernels_for(config: MuseConfig, q: Tensor) -> Operators:
    """The functions that run for queries [..., D]; with backend="auto" the choice is logged once.

    `plain_blocks` and `triton_blocks` hold functions of the same names and signatures.
    """
    name = backend_for(config, q)
    if config.backend == "auto":
        _say_backend(name, q.device.type, triton_problem(config, q) if q.is_cuda and name == "torch" else None)
    if name == "triton":
        from muse_dist.kernels import triton_blocks

        if not config.tiles:
            return triton_blocks
        from muse_dist.kernels.tiles import tuned_blocks

        return tuned_blocks(triton_blocks, config.tiles, q.device, q.dtype, q.shape[-1], config.leaf, config.group)
    from muse_dist.kernels import plain_blocks

    return plain_blocks


def backend_for(config: MuseConfig, q: Tensor) -> str:
    """'torch' or 'triton'. Auto takes Triton wherever it can run."""
    if config.backend != "auto":
        return config.backend
    return "triton" if q.is_cuda and triton_problem(config, q) is None else "torch"


def triton_problem(config: MuseConfig, q: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why backend="triton" cannot run for queries [..., D] cast to `dtype`, with the fix; None if it can."""
    return _triton_problem(config, q.device, dtype or q.dtype, q.shape[-1])


@functools.lru_cache(maxsize=256)  # asked many times a call, and on a GPU host time counts
def _triton_problem(config: MuseConfig, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "backend='triton': triton is not installed; `pip install triton`, or take backend='torch'"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "backend='triton': needs an Ampere GPU or a newer one; take backend='torch'"
    elif not interpreted():
        return f"backend='triton': does not run on {device.type}; move the tensors to a GPU or take backend='torch'"
    if dtype not in DTYPES:
        return f"backend='triton': does not compute in {dtype}; cast to bfloat16, float16 or float32, or take 'torch'"
    if dim > MOST_DIM:
        return f"backend='triton': takes head dims up to {MOST_DIM}, not {dim}; take backend='torch'"
    most = largest_leaf(dim, dtype, device)
    if not most:
        return f"backend='triton': keys of {dim} numbers in {dtype} do not fit on this GPU's chip; take backend='torch'"
    for name in ("leaf", "remote_leaf"):
        if padded(getattr(config, name)) > most:
            return (f"backend='triton': {name}={getattr(config, name)} with head dim {dim} in {dtype} does not fit "
                    f"on the chip; take at most {most}, or backend='torch'")
    return None


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's own interpreter (TRITON_INTERPRET=1): for tests."""
    from triton.runtime.interpreter import InterpretedFunction

    from muse_dist.kernels import triton_rows

    return isinstance(triton_rows.row_dots_kernel, InterpretedFunction)


@functools.cache
def _say_backend(name: str, device: str, problem: str | None) -> None:
    """Say once what was chosen; a GPU that cannot run the kernels is slow enough for a warning."""
    log = logging.getLogger("muse_dist")
    if problem is None:
        log.info("backend 'auto' takes '%s' on %s", name, device)
    else:
        log.warning("backend 'auto' takes '%s' on %s, which is much slower: %s", name, device, problem)
