"""The `"muse"` section of a DeepSpeed JSON config: read, checked, and taken out."""
from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from muse_dist.config import MuseConfig
from muse_dist.layout import LayoutName

ALL = "all"
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class MuseSection:
    """What the section says.

    `layers` are the numbers of the layers that use MuSe, numbered from 0, as in transformers: "2-30" or "0,4-7"; the
    others keep exact attention. (Megatron counts from 1.)
    `timeout_seconds` is how long a rank waits for another one before it gives up.
    """

    muse: MuseConfig
    context_parallel_size: int = 1
    layers: str = ALL
    layout: LayoutName = "zigzag"
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if type(self.context_parallel_size) is not int or self.context_parallel_size < 1:
            raise ValueError(f"muse.context_parallel_size={self.context_parallel_size!r}: must be a whole number of "
                             "ranks, at least 1")
        if self.layout not in get_args(LayoutName):
            raise ValueError(f"muse.layout={self.layout!r}: must be one of {', '.join(get_args(LayoutName))}")
        seconds = self.timeout_seconds
        if type(seconds) not in (int, float) or not 0 < seconds < float("inf"):
            raise ValueError(f"muse.timeout_seconds={seconds!r}: must be a positive number of seconds")
        _ranges(self.layers)

    def chosen_layers(self, count: int) -> set[int]:
        """Numbers of the layers that use MuSe in a model of `count` layers; ValueError if it has not as many."""
        if self.layers == ALL:
            return set(range(count))
        chosen = {layer for first, last in _ranges(self.layers) for layer in range(first, last + 1)}
        if max(chosen) >= count:
            raise ValueError(f"muse.layers={self.layers!r}: the model has {count} layers, 0 to {count - 1}")
        return chosen


def read_config(config: str | Path | Mapping[str, Any]) -> tuple[MuseSection, dict[str, Any]]:
    """The section of a DeepSpeed config, and the config without it, for DeepSpeed itself.

    Args:
        config: path of a JSON (or HJSON) file, base64 text of one, or a dict, as `deepspeed.initialize` takes it. It is
            not changed.
    Raises:
        ValueError, TypeError: no section, unknown keys (with the nearest right one), bad values, and settings of
            DeepSpeed that do not work with ranks that share a sequence.
    """
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    values: Mapping[str, Any] = config if isinstance(config, Mapping) else load_ds_config(str(config))
    rest = copy.deepcopy(dict(values))
    if "muse" not in rest:
        near = difflib.get_close_matches("muse", map(str, rest), n=1)
        hint = f"is {near[0]!r} meant to be it?" if near else 'add "muse": {"preset": "fast"}'
        raise ValueError(f'the DeepSpeed config has no section "muse"; {hint}')
    section = _section(rest.pop("muse"))
    problems = _problems(rest, section.context_parallel_size)
    if problems:
        raise ValueError("the DeepSpeed config does not work with MuSe: " + "; ".join(problems))
    return section, rest


def without_total(config: dict[str, Any], replicas: int) -> dict[str, Any]:
    """A DeepSpeed config whose batch is given by rank alone: without "train_batch_size", which counts ranks.

    `deepspeed.zero.Init` is not told that `replicas` sequences are read at once by more ranks, and would refuse it.

    Raises:
        ValueError: the sizes do not fit together.
    """
    total, micro, steps = (config.get(key) for key in BATCH)
    if total is None or any(type(size) is not int or size < 1 for size in (total, micro, steps) if size is not None):
        return config  # nothing to do, or DeepSpeed says what is wrong
    if steps is None:
        steps = 1 if micro is None else max(total // (micro * replicas), 1)
    if micro is None:
        micro = max(total // (steps * replicas), 1)
    if total != micro * steps * replicas:
        raise ValueError(f"train_batch_size={total} is not {micro} (train_micro_batch_size_per_gpu) * {steps} "
                         f"(gradient_accumulation_steps) * {replicas} (ranks / muse.context_parallel_size); leave out "
                         "train_batch_size, it follows from the others")
    return {**{key: value for key, value in config.items() if key != BATCH[0]}, BATCH[1]: micro, BATCH[2]: steps}


def _section(values: Any) -> MuseSection:
    if not isinstance(values, Mapping):
        raise TypeError(f'"muse" must be a section {{...}}, not {type(values).__name__}')
    own = {f.name for f in dataclasses.fields(MuseSection)} - {"muse"}
    layer = {f.name for f in dataclasses.fields(MuseConfig)} | {"preset"}
    for key in values:
        if key not in own | layer:
            near = difflib.get_close_matches(str(key), sorted(own | layer), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(own | layer))}"
            raise ValueError(f'unknown key {key!r} in the section "muse"; {hint}')
    muse = MuseConfig.from_dict({key: value for key, value in values.items() if key in layer})
    return MuseSection(muse, **{key: value for key, value in values.items() if key in own})


def _ranges(layers: Any) -> list[tuple[int, int]]:
    """The first and last layer of each range of "0,4-7"."""
    if layers == ALL:
        return []
    problem = ValueError(f'muse.layers={layers!r}: must be "all", or numbers and ranges such as "2-30" or "0,4-7"')
    if not isinstance(layers, str):
        raise problem
    found = []
    for part in layers.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isdecimal() for end in ends) or int(ends[0]) > int(ends[-1]):
            raise problem
        found.append((int(ends[0]), int(ends[-1])))
    return found


def _problems(config: Mapping[str, Any], ranks: int) -> list[str]:
    """Settings of DeepSpeed that would give wrong gradients or are not known to give right ones, each with its fix."""
    zero = _table(config, "zero_optimization")
    found = [f'"{key}": use muse.context_parallel_size instead'
             for key in ("sequence_parallel_size", "data_parallel_size") if key in config]
    if _table(config, "activation_checkpointing").get("partition_activations"):
        found.append("activation_checkpointing.partition_activations: ranks hold different tokens, leave it out")
    if (_table(config, "tensor_parallel").get("autotp_size") or 0) > 1:
        found.append("tensor_parallel.autotp_size: tensor parallelism is not supported, leave it out")
    # DeepSpeed sorts the parameters another way then, but not the names of their fp32 copies.
    if zero.get("round_robin_gradients"):
        found.append("zero_optimization.round_robin_gradients: DeepSpeed then saves parameters under each other's "
                     "names, leave it out")
    if _table(config, "checkpoint").get("writer") is not None:
        found.append("checkpoint.writer: does not know ranks that share a sequence, leave it out")
    if config.get("datastates_ckpt", False) is not False:  # as DeepSpeed reads it
        found.append("datastates_ckpt: is still writing when muse_dist.deepspeed.save calls a checkpoint whole, leave "
                     "it out")
    if ranks == 1:
        return found
    # What averages gradients with another weight than the rest of the stage does, or over other groups.
    if zero.get("stage", 0) == 3 and zero.get("reduce_scatter") is False:
        found.append("zero_optimization.reduce_scatter=false: stage 3 then weighs large parameters differently, "
                     "leave it at true")
    for key, neutral in (("zero_hpz_partition_size", 1), ("mics_shard_size", -1), ("zero_quantized_gradients", False)):
        if zero.get(key, neutral) != neutral:
            found.append(f"zero_optimization.{key}: not supported with context_parallel_size > 1, leave it out")
    if config.get("gradient_predivide_factor", 1.0) != 1.0:
        found.append("gradient_predivide_factor: not supported with context_parallel_size > 1, leave it at 1.0")
    if str(config.get("gradient_allreduce_op", "mean")).lower() != "mean":
        found.append('gradient_allreduce_op: the loss is scaled for "mean", leave it out')
    return found


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of DeepSpeed's, empty where it is missing or null; TypeError for what is no section."""
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise TypeError(f'"{key}" must be a section {{...}} of the DeepSpeed config, not {found!r}; write it out, or '
                        "leave it out")
    return found
