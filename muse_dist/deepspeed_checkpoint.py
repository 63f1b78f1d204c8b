"""Saving and resuming DeepSpeed runs whose ranks share sequences."""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = logging.getLogger("muse_dist")
KEY = "muse_dist"  # of what is saved here in DeepSpeed's client state
RESHARD = ("python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder}/{tag} "
           '--output_folder {folder}/{tag}_universal, and "checkpoint": {{"load_universal": true}} in the config')


def save(engine: Any, folder: str | Path, state: Mapping[str, Any] | None = None, tag: str | None = None) -> str:
    """`engine.save_checkpoint`, with how the run was shared among ranks. All ranks must call.

    Args:
        folder: of the run's checkpoints. `latest` in it names the last one that is whole.
        state: what else to restore, such as the position in the data. It must be the same on all ranks.
    Returns:
        The tag, `global_step<N>` by default.
    """
    tag = tag or f"global_step{engine.global_steps}"
    client_state = {KEY: {"run": _described(engine), "state": dict(state or {})}}
    # DeepSpeed would write `latest` before the other ranks have written their parts. This call ends with a barrier.
    engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    if engine.global_rank == 0:
        part = Path(folder, "latest.part")
        part.write_text(tag)
        part.replace(Path(folder, "latest"))
    return tag


def load(engine: Any, folder: str | Path, tag: str | None = None) -> dict[str, Any] | None:
    """`engine.load_checkpoint` of what `save` wrote: the last whole checkpoint, or the one of `tag`.

    A checkpoint of another number of ranks has to be made universal first; the error says how. One of the same number
    with another `context_parallel_size`, layout or exchange needs nothing.

    Returns:
        The `state` given to `save`, empty for a checkpoint of `engine.save_checkpoint`. None if there is no checkpoint
        in `folder` and none was asked for by `tag`.
    Raises:
        ValueError: saved by another number of ranks; or the config asks for universal checkpoints, and the last one
            in `folder` is not made universal. FileNotFoundError: no checkpoint `tag`.
    """
    if tag is None:
        tag = _last(Path(folder), engine.load_universal_checkpoint())
        if tag is None:
            return None
    if not (Path(folder) / tag).is_dir():
        raise FileNotFoundError(f"{folder} has no checkpoint {tag!r}")
    try:
        path, state = engine.load_checkpoint(str(folder), tag=tag)
    except Exception as error:
        if "world size" not in str(error):
            raise
        raise ValueError(f"{folder}/{tag} was saved by another number of ranks than the {engine.seq_dp_world_size} "
                         "here: run " + RESHARD.format(folder=folder, tag=tag)) from error
    if path is None:
        raise FileNotFoundError(f"{folder}/{tag} holds no checkpoint of DeepSpeed that is whole")
    found = state.get(KEY, {"run": {}, "state": {}})
    saved, now = found["run"], _described(engine)
    changed = [f"{name}: {saved[name]} -> {now[name]}" for name in now if saved.get(name, now[name]) != now[name]]
    if changed:
        LOG.warning("resumed %s/%s with other settings than it was saved with: %s", folder, tag, ", ".join(changed))
    return found["state"]


def _last(folder: Path, universal: bool) -> str | None:
    """The tag of the last checkpoint; None if there is none."""
    last, converted = (file.read_text().strip() if (file := folder / name).exists() else None
                       for name in ("latest", "latest_universal"))
    if not universal:
        return last
    if last is not None and converted != f"{last}_universal":
        # Left in the config after a resumption, the setting would throw away all steps since.
        raise ValueError(f"the config says load_universal, but the last checkpoint in {folder}, {last}, is not "
                         f"universal ({converted or 'none'} is): if as many ranks wrote it as there are here, take "
                         "load_universal out of the config; otherwise run " + RESHARD.format(folder=folder, tag=last))
    return converted


def _described(engine: Any) -> dict[str, Any]:
    """How a run is shared among ranks, as numbers and strings."""
    section = engine.muse.section
    return {"context_parallel_size": section.context_parallel_size, "data_parallel_size": engine.muse.data_size,
            "layout": section.layout, "layers": section.layers, **dataclasses.asdict(section.muse)}
