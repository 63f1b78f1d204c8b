"""The settings of a training run: one TOML file with the tables [model], [train], [data] and [muse]."""
from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from muse_dist import MuseConfig
from muse_dist.layout import LayoutName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = TypeVar("Table")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder, a Llama with tied embeddings."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        _at_least(self, layers=1, width=1, heads=1, kv_heads=1, mlp=1)
        if self.width % (2 * self.heads):
            raise ValueError(f"model.width={self.width} must be heads={self.heads} times an even head dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.rope_theta <= 0:
            raise ValueError(f"model.rope_theta={self.rope_theta} must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """How it is optimised: AdamW, linear warm-up, then a cosine to zero. `batch` is in sequences, `clip` a norm.

    `threads` are PyTorch's on the CPU, 0 for its own choice. Sums depend on their number: fix it to repeat a curve on
    another machine. Small models gain little from more than one. `layout`: how ranks share a sequence.
    """

    steps: int = 200
    batch: int = 2
    lr: float = 2e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    threads: int = 0
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        if self.layout not in get_args(LayoutName):
            raise ValueError(f"train.layout={self.layout!r} must be one of {', '.join(get_args(LayoutName))}")
        _at_least(self, steps=1, batch=1, warmup=0, seed=0, threads=0, weight_decay=0)
        for name in ("lr", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class DataConfig:
    """Which text: sequences of `context` tokens; of the files in path order every `held_out_every`-th is held out.

    The table at the end is measured on `held_out_sequences` sequences of the held-out files.
    """

    context: int = 2048
    held_out_every: int = 10
    held_out_sequences: int = 8

    def __post_init__(self) -> None:
        _at_least(self, context=2, held_out_every=2, held_out_sequences=1)


@dataclass(frozen=True)
class RunConfig:
    """All of it. `name` is the folder below the output folder that the run writes to."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    muse: MuseConfig = field(default_factory=MuseConfig)

    @classmethod
    def from_toml(cls, path: str | Path, *, name: str | None = None, steps: int | None = None,
                  seed: int | None = None) -> RunConfig:
        """Read a file; what is given here overrides it. The name defaults to the file's own without its suffix.

        Raises:
            ValueError or TypeError naming the key, for keys not known here and for values that cannot be.
        """
        with open(path, "rb") as file:
            tables = tomllib.load(file)
        unknown = sorted(set(tables) - {"model", "train", "data", "muse"})
        if unknown:
            raise ValueError(f"{path}: unknown table or key {unknown[0]!r}; known: [model], [train], [data], [muse]")
        train = dict(tables.get("train", {}))
        train.update({key: value for key, value in {"steps": steps, "seed": seed}.items() if value is not None})
        return cls(name=Path(path).stem if name is None else name,
                   model=from_mapping(ModelConfig, tables.get("model", {}), "model"),
                   train=from_mapping(TrainConfig, train, "train"),
                   data=from_mapping(DataConfig, tables.get("data", {}), "data"),
                   muse=MuseConfig.from_dict(tables.get("muse", {})))

    @property
    def layout(self) -> LayoutName:
        """`train.layout`, checked."""
        return "zigzag" if self.train.layout == "zigzag" else "contiguous"

    @property
    def near_reach(self) -> int:
        """Position of the first token that has a far field."""
        return self.muse.block * (1 + self.muse.halo)

    def to_toml(self) -> str:
        """The text of a file that `from_toml` reads back as these settings."""
        lines = []
        for table in ("model", "train", "data", "muse"):
            # JSON writes integers, floats, booleans and plain strings as TOML does.
            values = dataclasses.asdict(getattr(self, table))
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
        return "\n".join(lines)

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be the name of a folder, without separators")
        if not self.muse.causal:
            raise ValueError("muse.causal=false: a decoder predicts the next token and must not see it")


def from_mapping(table: type[Table], values: Mapping[str, Any], where: str) -> Table:
    """Build a flat dataclass whose fields all have defaults; unknown keys and wrong types are refused."""
    known = {f.name: type(f.default) for f in dataclasses.fields(table)}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r} in [{where}]; {hint}")
        if known[key] is float and type(value) is int:
            value = float(value)
        if type(value) is not known[key]:
            raise TypeError(f"{where}.{key}={value!r} must be {known[key].__name__}, not {type(value).__name__}")
        checked[key] = value
    return table(**checked)


def _at_least(table: Any, **lows: int) -> None:
    where = type(table).__name__.removesuffix("Config").lower()
    for name, low in lows.items():
        if getattr(table, name) < low:
            raise ValueError(f"{where}.{name}={getattr(table, name)} must be at least {low}")

