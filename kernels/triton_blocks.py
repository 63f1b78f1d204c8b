"""The steps of the method over all blocks of a sequence at once, as GPU kernels.

Each function has the name, arguments and results of its plain twin in `plain_blocks`; half precision goes in and comes
out as it is, log-sum-exps and masses are fp32.
"""
from __future__ import annotations

import torch

from muse_dist.kernels.plain_blocks import Acceptance, Moments, Sight, seen_blocks
from muse_dist.kernels.triton_bisection import bisect
from muse_dist.kernels.triton_clustering import principal_axes, project
from muse_dist.kernels.triton_far import far_field
from muse_dist.kernels.triton_far_backward import far_field_backward
from muse_dist.kernels.triton_merge import add_up, merge
from muse_dist.kernels.triton_moments import moments, moments_backward
from muse_dist.kernels.triton_near import near_field, near_field_backward
from muse_dist.kernels.triton_open import open_leaves
from muse_dist.kernels.triton_rows import mean_rows, row_dots
from muse_dist.kernels.triton_tokens import add_tokens, gather_tokens, put_tokens, scatter_tokens

__all__ = [
    "Acceptance", "Moments", "Sight", "add_tokens", "add_up", "bisect", "far_field", "far_field_backward",
    "gather_tokens", "mean_rows", "merge", "moments", "moments_backward", "near_field", "near_field_backward",
    "open_leaves", "principal_axes", "project", "put_tokens", "row_dots", "scatter_tokens", "seen_blocks",
    "working_dtype",
]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of `dtype` are handed over in: as they are; sums are fp32 inside."""
    return dtype
