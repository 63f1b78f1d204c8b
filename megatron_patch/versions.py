"""What differs between megatron-core 0.13 and 0.19: all of it is here."""
from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from muse_dist.comm import ProcessGroup

# The process groups of a layer: the argument's name since 0.15, and before.
GROUPS = ("pg_collection", "model_comm_pgs")


def context_parallel_group(groups: dict[str, Any]) -> ProcessGroup:
    """The ranks that share a sequence, from what a layer passes its core attention under one of `GROUPS`.

    Raises:
        TypeError for arguments that no known version passes.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise TypeError(f"unexpected arguments {', '.join(sorted(unknown))}: this megatron-core is newer than the ones "
                        "muse_dist was tested with, 0.13 to 0.19; install one of those")
    given = next((value for value in groups.values() if value is not None), None)
    return parallel_state.get_context_parallel_group() if given is None else given.cp


def transformer_impl(config: TransformerConfig) -> str:
    """"local" or "transformer_engine": a setting of the model since 0.14, before that of Megatron-LM's options only."""
    if hasattr(config, "transformer_impl"):
        return config.transformer_impl
    from megatron.training import get_args

    return get_args().transformer_impl
