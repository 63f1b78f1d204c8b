"""Which exact attention computes the near field: cuDNN's, FlashAttention's (both through torch) or our own in Triton.

All three take q [n, H, S, D] and k, v [n, K, T, D] with any strides but 1 between the columns, query head h reading key
head h * K // H, and give log-sum-exps (natural logarithm) as fp32 [n, H, S].
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from muse_dist.kernels.triton_exact import exact_attention, exact_attention_backward

HALF = (torch.bfloat16, torch.float16)


class Exact(NamedTuple):
    """Exact attention, forward and backward."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, scale, causal) -> out [n, H, S, D], lse [n, H, S]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (dout, q, k, v, out, lse, scale, causal) -> dq, dk, dv


def exact_kernels(q: Tensor, tokens: int) -> Exact:
    """The kernels that run on this machine for queries like q [..., D] in blocks of `tokens` queries and keys."""
    capability = None
    if q.is_cuda and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(q.device)
    repeatable = torch.are_deterministic_algorithms_enabled()
    return {
        "cudnn": Exact(_cudnn, _cudnn_backward), "flash": Exact(_flash, _flash_backward),
        "triton": Exact(exact_attention, exact_attention_backward),
    }[exact_name(q.dtype, q.shape[-1], tokens, capability, repeatable)]


def exact_name(
    dtype: torch.dtype, dim: int, tokens: int, capability: tuple[int, int] | None, repeatable: bool
) -> str:
    """The fastest kernels that can run: "cudnn", "flash" or "triton".

    Args:
        tokens: queries and keys in a block; their common divisor, where these differ.
        capability: of an NVIDIA GPU; None for any other device.
        repeatable: whether the gradients must be bitwise repeatable (`torch.use_deterministic_algorithms`): cuDNN's
            are not, and torch cannot ask cuDNN for others; FlashAttention's are under that switch.
    """
    if dtype not in HALF or dim % 8 or dim > 256 or capability is None or capability < (8, 0):
        return "triton"
    if capability[0] in (9, 10) and dim <= 128 and tokens % 64 == 0 and not repeatable:
        return "cudnn"  # where torch itself prefers it; whole tiles only, which every version of cuDNN can run
    small = capability not in ((8, 0), (9, 0), (10, 0), (10, 3))  # shared memory too small for the backward's tiles
    return "triton" if small and 192 < dim <= 224 else "flash"


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse.view(q.shape[:-1])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.contiguous()  # other strides give wrong results
    if _cudnn_lse_dims() == 4:
        lse = lse[..., None]
    dropout = _no_dropout(q)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, dropout, dropout, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale)


@functools.cache
def _cudnn_lse_dims() -> int:
    """3 or 4: torch's versions differ in whether cuDNN's log-sum-exp has a last dimension of 1."""
    x = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="meta")
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dropout = _no_dropout(q)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, dropout, dropout,
        scale=scale)


def _no_dropout(q: Tensor) -> Tensor:
    """State of the random numbers that a backward takes and, without dropout, does not read."""
    return torch.empty(2, dtype=torch.int64, device=q.device)
