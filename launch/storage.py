"""How torch.distributed.checkpoint reads and writes here: safetensors and JSON, whole or not there at all.

A checkpoint is a folder: `rank-00000.safetensors`, ... with each rank's shards, `index.json` (which tensor lies where),
`state.json` (what is no tensor) and `manifest.json` (size and SHA-256 of the others). It is written under another name
and renamed when all of it is on the disk. No file is a pickle, so reading one runs no code.
"""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

INDEX, STATE, MANIFEST = "index.json", "state.json", "manifest.json"


class SafeWriter(StorageWriter):
    """Writes one checkpoint to `target` by way of `partial`; all ranks see the same folder.

    Args:
        partial: folder to write to, new or empty; it becomes `target` when every rank has written its part.
        rank: names this rank's file.
        state: numbers and strings to keep beside the tensors; rank 0's are written.
    """

    def __init__(self, partial: Path, target: Path, rank: int, state: dict[str, Any]) -> None:
        self.partial, self.target, self.rank, self.state = partial, target, rank, state

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors to one file, on the disk when this returns."""
        file = self.partial / f"rank-{self.rank:05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            value = planner.resolve_data(item)
            if not isinstance(value, Tensor):
                raise TypeError(f"{item.index.fqn}: only tensors are kept in checkpoints, not {type(value).__name__}")
            tensors[_key(item.index)] = value.detach().cpu().contiguous()
        done: Future[list[WriteResult]] = Future()
        if not tensors:
            done.set_result([])
            return done
        save_file(tensors, file)
        about = {"file": file.name, **describe_file(file)}
        sync(file)
        done.set_result([WriteResult(item.index, tensors[_key(item.index)].nbytes, about) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On one rank, when all have written: index, state and manifest, then the rename that makes it a checkpoint."""
        written = [result for part in results for result in part]
        where = {result.index: result.storage_data["file"] for result in written}
        _write_json(self.partial / INDEX, _encode(metadata, where))
        _write_json(self.partial / STATE, self.state)
        files = {about["file"]: {"bytes": about["bytes"], "sha256": about["sha256"]}
                 for about in (result.storage_data for result in written)}
        files |= {name: describe_file(self.partial / name) for name in (INDEX, STATE)}
        _write_json(self.partial / MANIFEST, {"files": files})
        sync(self.partial)
        self.partial.rename(self.target)
        sync(self.target.parent)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Always False: the folders are given to the constructor."""
        return False


class SafeReader(StorageReader):
    """Reads the folder that `SafeWriter` left; ranks may be more or fewer, and tensors cut in other ways."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept between checkpoints."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = json.loads((self.folder / INDEX).read_text())
        return Metadata({name: _decode(entry) for name, entry in index.items()}, storage_data={
            MetadataIndex(name, chunk["offsets"]): chunk["file"]
            for name, entry in index.items() for chunk in entry["chunks"]})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the pieces that this rank needs into its tensors."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    key = _key(item.storage_index)
                    cut = tuple(slice(at, at + size) for at, size in zip(item.storage_offsets, item.lengths))
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(file.get_slice(key)[cut] if cut else file.get_tensor(key))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Always False: the folder is given to the constructor."""
        return False


def problem_with(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Each of `ranks` ranks reads its share of the files."""
    name = MANIFEST
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, wanted in sorted(files.items())[rank::ranks]:
            if Path(name).name != name:
                return f"{MANIFEST} names a file outside the folder, {name!r}"
            found = (folder / name).stat().st_size
            if found != wanted["bytes"]:
                return f"{name} has {found} bytes, not {wanted['bytes']}"
            if describe_file(folder / name) != wanted:
                return f"{name} is not what was written: its checksum differs"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no manifest"
    return None


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
    sync(path)


def _key(index: MetadataIndex) -> str:
    """The name of a piece in its file."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _encode(metadata: Metadata, where: dict[MetadataIndex, str]) -> dict[str, Any]:
    """Tensors, their shapes and pieces, as JSON has them."""
    index = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        chunks = [{"offsets": list(chunk.offsets), "sizes": list(chunk.sizes),
                   "file": where[MetadataIndex(name, chunk.offsets)]} for chunk in entry.chunks]
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        index[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
    return index


def _decode(entry: dict[str, Any]) -> TensorStorageMetadata:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{INDEX}: {entry['dtype']!r} is no dtype")
    chunks = [ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
              for chunk in entry["chunks"]]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry["size"]), chunks)
