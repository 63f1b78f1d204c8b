"""Named ranges `muse_dist::...` around the stages of a call, which profilers show."""
from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

# torch.profiler.record_function dispatches an operator at both ends, and a call has many stages.
from torch._C._profiler import _RecordFunctionFast

Function = TypeVar("Function", bound=Callable[..., Any])


def stage(name: str) -> AbstractContextManager[object]:
    """A range named `muse_dist::NAME`, for torch.profiler and torch.autograd.profiler.emit_nvtx."""
    return _RecordFunctionFast(f"muse_dist::{name}")


def staged(name: str) -> Callable[[Function], Function]:
    """Have every call of a function be such a range."""
    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def inside(*args: Any, **options: Any) -> Any:
            with stage(name):
                return function(*args, **options)

        return inside  # type: ignore[return-value]

    return decorate
