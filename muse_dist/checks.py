"""What a caller can get wrong, said before anything runs."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from muse_dist.backend import backend_for, triton_problem
from muse_dist.config import MuseConfig

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, config: MuseConfig, scale: float | None) -> float:
    """Check the arguments of `muse_attention` and return the softmax scale.

    Raises:
        ValueError or TypeError that names the argument and the fix. Values are not looked at: a GPU would have to wait.
    """
    found = check_tensors(q, k, v, config, scale)
    if not torch.compiler.is_compiling():  # which cannot read files nor look for packages: then the operators check
        check_backend(q, config, cast_dtype(q))
    return found


def check_tensors(q: Tensor, k: Tensor, v: Tensor, config: MuseConfig, scale: float | None) -> float:
    """`check_inputs` of what plain PyTorch computes, whichever kernels `config` asks for."""
    if not isinstance(config, MuseConfig):
        raise TypeError(f"config: must be a MuseConfig, not {type(config).__name__}; MuseConfig.from_dict makes one")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, q)
    batch, heads, tokens, dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)}: must have the same shape [B, K, N, D]")
    for name, place, wanted in (("batch size", 0, batch), ("length", 2, tokens), ("head dim", 3, dim)):
        if k.shape[place] != wanted:
            raise ValueError(f"k and v: {name} {k.shape[place]} differs from q's {wanted}; "
                             "q is [B, H, N, D], k and v are [B, K, N, D]")
    if 0 in q.shape or k.shape[1] == 0:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}: must not be empty; skip the call for empty sequences")
    if heads % k.shape[1]:
        raise ValueError(f"q: {heads} heads are not divisible by the {k.shape[1]} heads of k and v; "
                         "each key/value head serves the same number of query heads")
    return _check_scale(scale, dim)


def check_backend(q: Tensor, config: MuseConfig, dtype: torch.dtype) -> None:
    """ValueError if this machine cannot do as `config` says with queries like q cast to `dtype`."""
    if config.backend == "triton":
        problem = triton_problem(config, q, dtype)
        if problem is not None:
            raise ValueError(problem)
    if config.tiles:
        _check_tiles(q, config, dtype)
    if config.cuda_graphs:
        _check_recordable(q, config, dtype)


def _check_tiles(q: Tensor, config: MuseConfig, dtype: torch.dtype) -> None:
    """ValueError if the file of tiles cannot be used for queries like q."""
    if backend_for(config, q) == "torch" or triton_problem(config, q, dtype) is not None:
        raise ValueError(f"tiles={config.tiles!r}: only the GPU kernels have tiles; leave it empty here")
    from muse_dist.kernels import triton_blocks
    from muse_dist.kernels.tiles import tuned_blocks

    tuned_blocks(triton_blocks, config.tiles, q.device, dtype, q.shape[-1], config.leaf, config.group)


def _check_recordable(q: Tensor, config: MuseConfig, dtype: torch.dtype) -> None:
    """ValueError if calls with queries like q cannot be replayed as CUDA graphs, with the reason and the fix."""
    fix = "take cuda_graphs=False"
    if not q.is_cuda:
        raise ValueError(f"cuda_graphs=True: needs tensors on a GPU, not on {q.device.type}; {fix}")
    if config.backend != "triton":
        problem = "backend='torch'" if config.backend == "torch" else triton_problem(config, q, dtype)
        if problem is not None:
            reason = problem.partition(";")[0].removeprefix("backend='triton': ")
            raise ValueError(f"cuda_graphs=True: needs the GPU kernels ({reason}); {fix}")


def cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype `muse_attention` computes in: under autocast, as in torch's own attention, its dtype; fp64 stays."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def _check_tensor(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: must have 4 dimensions [batch, heads, tokens, head dim], not shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {x.dtype} is not supported; use float32, bfloat16, float16 or float64")
    if x.device != q.device:
        raise ValueError(f"{name}: is on {x.device} but q is on {q.device}; move them to one device")
    if x.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(f"{name}: dtype {x.dtype} differs from q's {q.dtype}; cast them to one dtype")


def _check_scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return dim ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: must be a number or None, not {type(scale).__name__}")
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale={scale}: must be finite and positive; None means 1 / sqrt(head dim)")
    return float(scale)
