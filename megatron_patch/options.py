"""Options of the command line: one for every field of MuseConfig, made from it, and which layers use MuSe."""
from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args, get_type_hints

from muse_dist.config import MuseConfig

PREFIX = "muse_"


class Choice(NamedTuple):
    """What the command line asks for."""

    config: MuseConfig
    layers: frozenset[int] | None  # numbered from 1; None: all


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --attention and the --muse-* options. What is not given is None: the preset's or the file's value, then."""
    group = parser.add_argument_group("MuSe", "multipole semantic attention (muse_dist)")
    group.add_argument("--attention", choices=("exact", "muse"), default="exact",
                       help="attention of the self-attention layers: Megatron's own, or MuSe")
    group.add_argument("--muse-layers", metavar="2-30,32", help="layers that use MuSe, numbered from 1; the others "
                       "keep exact attention (default: all layers)")
    group.add_argument("--muse-config", metavar="FILE.toml", help="settings of MuSe, in a table [muse] or at the top; "
                       "other --muse-* options override it")
    group.add_argument("--muse-preset", metavar="NAME", help="settings to start from: paper, fast or accurate; other "
                       "--muse-* options override it")
    types = get_type_hints(MuseConfig)
    for field in dataclasses.fields(MuseConfig):
        kind: dict[str, Any] = {"type": int, "metavar": "N"}
        if types[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif types[field.name] is float:
            kind = {"type": float, "metavar": "X"}
        elif types[field.name] is str:
            kind = {"metavar": "TEXT"}
        elif get_args(types[field.name]):
            kind = {"choices": get_args(types[field.name])}
        text = field.metadata["help"].replace("%", "%%")
        group.add_argument(f"--{PREFIX}{field.name}".replace("_", "-"), default=None,
                           help=f"{text} (default: {field.default})", **kind)
    return parser


def read_options(args: argparse.Namespace) -> Choice | None:
    """The choice that parsed arguments make; None: exact attention.

    Raises:
        ValueError, TypeError or OSError that names the option or the field, and the fix.
    """
    given = {name: value for name, value in vars(args).items() if name.startswith(PREFIX) and value is not None}
    if args.attention == "exact":
        if given:
            options = ", ".join(_option(name) for name in given)
            raise ValueError(f"{options}: no effect on exact attention; add --attention muse, or leave it out")
        return None
    fields = {name.removeprefix(PREFIX): value for name, value in given.items()}
    layers, path, preset = (fields.pop(name, None) for name in ("layers", "config", "preset"))
    if path is not None and preset is not None:
        raise ValueError("--muse-config and --muse-preset: give one of them; the file may name a preset")
    if path is not None:
        config = dataclasses.replace(MuseConfig.from_toml(path), **fields)
    else:
        config = MuseConfig.from_dict(fields if preset is None else {**fields, "preset": preset})
    return Choice(config, None if layers is None else parse_layers(layers))


def parse_layers(text: str) -> frozenset[int]:
    """"2-4,8" -> {2, 3, 4, 8}; ValueError if it is not such a list of numbers from 1."""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low, high = (int(x) if x.strip().isdecimal() else 0 for x in (first, last if dash else first))
        if not 1 <= low <= high:
            raise ValueError(f"--muse-layers={text!r}: {part!r} is no layer or range; write 2-30 or 1,3,5, from 1 up")
        layers.update(range(low, high + 1))
    return frozenset(layers)


def show_layers(layers: Iterable[int]) -> str:
    """The inverse of `parse_layers`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
