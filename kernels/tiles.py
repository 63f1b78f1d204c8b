"""Launch shapes of the kernels that were tuned on a machine, in a file that settings can name.

The file is JSON: by the name of a GPU and a shape class, the tile of every operator that was tuned, as [rows, keys,
warps, stages]; those of operators it leaves out stay as they are pinned in the code. `python -m launch.bench tiles`
writes it.
"""
from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from muse_dist.kernels.limits import padded
from muse_dist.kernels.triton_common import BackwardTiles, Tile, backward_tiles

BACKWARD = BackwardTiles._fields  # parts of the far field's backward, which are tuned apart
OPERATORS = ("moments", "moments_backward", "open_leaves", "far_field", *BACKWARD)


def shape_class(dim: int, dtype: torch.dtype, leaf: int, group: int) -> str:
    """What decides about the best tiles, besides the GPU."""
    return f"{str(dtype).removeprefix('torch.')} head dim {padded(dim)} leaf {padded(leaf)} group {padded(group)}"


def gpu_name(device: torch.device) -> str:
    """As in the file; kernels that Triton interprets have the name of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def read_tiles(path: str) -> dict[str, dict[str, dict[str, list[int]]]]:
    """The file's contents. ValueError that says what is wrong with it."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"tiles={path!r}: cannot be read ({error}); write it with `python -m launch.bench tiles`, or "
                         "leave tiles empty") from None
    classes = [tiles for gpu in found.values() for tiles in gpu.values()] if _is_table(found, 2) else None
    if classes is None or not all(_is_tile(name, tile) for tiles in classes for name, tile in tiles.items()):
        raise ValueError(f"tiles={path!r}: must hold [rows, keys, warps, stages] by GPU, shape class and operator "
                         f"({', '.join(OPERATORS)}), rows and keys powers of two from 16 to 256, warps 4 or 8; write "
                         "it with `python -m launch.bench tiles`")
    return found  # type: ignore[no-any-return]


def _is_table(x: Any, depth: int) -> bool:
    return isinstance(x, dict) and (depth == 0 or all(_is_table(value, depth - 1) for value in x.values()))


def _is_tile(name: str, tile: Any) -> bool:
    if name not in OPERATORS or not isinstance(tile, list) or len(tile) != 4 or any(type(x) is not int for x in tile):
        return False
    rows, keys, warps, stages = tile
    return all(16 <= x <= 256 and not x & (x - 1) for x in (rows, keys)) and warps in (4, 8) and 1 <= stages <= 8


@functools.lru_cache(maxsize=64)
def tuned_blocks(
    blocks: ModuleType, path: str, device: torch.device, dtype: torch.dtype, dim: int, leaf: int, group: int
) -> SimpleNamespace:
    """The functions of `blocks` with a file's tiles; ValueError where it has none for this GPU and these shapes."""
    name, wanted = gpu_name(device), shape_class(dim, dtype, leaf, group)
    tiles = read_tiles(path).get(name, {}).get(wanted)
    if tiles is None:
        raise ValueError(f"tiles={path!r}: has none for {wanted} on {name}; tune them with "
                         "`python -m launch.bench tiles`, or leave tiles empty")
    given = {operator: Tile(*tile) for operator, tile in tiles.items()}
    backward = backward_tiles(dim, dtype)._replace(**{part: given.pop(part) for part in BACKWARD if part in given})
    found = SimpleNamespace(**{key: getattr(blocks, key) for key in blocks.__all__})
    for operator, tile in {**given, "far_field_backward": backward}.items():
        setattr(found, operator, functools.partial(getattr(blocks, operator), tile=tile))
    return found
