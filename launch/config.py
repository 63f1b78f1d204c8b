"""The settings of a training run: one TOML file with the tables of `TABLES`."""
from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from muse_dist import MuseConfig
from muse_dist.layout import LayoutName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES = ("model", "train", "deepspeed", "data", "log", "muse")
Table = TypeVar("Table")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder, a Llama with tied embeddings.

    `vocabulary` is the size of the embedding; 0 for as many tokens as the data has.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    rope_theta: float = 10_000.0
    vocabulary: int = 0

    def __post_init__(self) -> None:
        _at_least(self, layers=1, width=1, heads=1, kv_heads=1, mlp=1, vocabulary=0)
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
    another machine. Small models gain little from more than one.
    `context_parallel` ranks share every sequence, as `layout` says; 0 for all ranks. `shard` splits weights, gradients
    and optimizer state over all ranks (FSDP2), `recompute` keeps no activations inside layers, and `micro_batch`
    sequences (0: all of them) go through the model at a time.
    `engine` runs the steps: "torch", "deepspeed", whose settings are in the table [deepspeed], or "megatron".
    `attention` is "muse" or "exact"; the first `exact_first` of the steps (a fraction) use exact attention either way,
    and once MuSe has taken over, it stays when the run goes on with more steps.
    A step whose loss or gradient is no number, or whose loss lies `spike` nats above the median of the last 32 (0: no
    such check), stops the run, or with `bad_step` = "skip" is left out, at most `max_skipped` in a row. A rank that
    gets no further for `timeout` seconds prints what it is waiting for and ends.
    `compare` runs the first steps on one rank too, and measures the trained weights with exact attention and with the
    near field alone: a rank must then be able to read a whole sequence.
    """

    steps: int = 200
    batch: int = 2
    micro_batch: int = 0
    lr: float = 2e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    optimizer: str = "adamw"
    seed: int = 0
    threads: int = 0
    context_parallel: int = 0
    layout: str = "zigzag"
    engine: str = "torch"
    shard: bool = False
    recompute: bool = False
    attention: str = "muse"
    exact_first: float = 0.0
    bad_step: str = "stop"
    spike: float = 0.0
    max_skipped: int = 10
    timeout: int = 600
    compare: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("layout", get_args(LayoutName)), ("optimizer", ("adamw", "apex")),
                              ("engine", ("torch", "deepspeed", "megatron")), ("attention", ("muse", "exact")),
                              ("bad_step", ("stop", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"train.{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        _at_least(self, steps=1, batch=1, micro_batch=0, warmup=0, seed=0, threads=0, weight_decay=0,
                  context_parallel=0, exact_first=0, spike=0, max_skipped=1, timeout=1)
        for name in ("lr", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be positive")
        if self.engine != "torch":
            self._check_engine()
        elif self.compare and self.shard:
            raise ValueError("train.compare=true reads with the whole model on one rank, which train.shard=true does "
                             "not have; turn one of them off")
        if self.exact_first > 1:
            raise ValueError(f"train.exact_first={self.exact_first} is a fraction of the steps: at most 1")

    def _check_engine(self) -> None:
        megatron = self.engine == "megatron"
        split = ": Megatron splits the optimizer's state itself" if megatron else ", and deepspeed.stage=3"
        refused = [text for bad, text in (
            (self.compare, "train.compare=true, which reads with the whole model on one rank; set it to false"),
            (self.shard, f"train.shard=true, PyTorch's way to split weights; set it to false{split}"),
            (self.optimizer != "adamw", f"train.optimizer={self.optimizer!r}; take 'adamw'"),
            (megatron and self.layout != "zigzag", f"train.layout={self.layout!r}; take 'zigzag', Megatron's only one"),
        ) if bad]
        if refused:
            raise ValueError(f"train.engine={self.engine!r} does not work with\n  - " + "\n  - ".join(refused))

    @property
    def exact_steps(self) -> int:
        """How many steps at the start use exact attention."""
        return self.steps if self.attention == "exact" else round(self.exact_first * self.steps)


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What DeepSpeed's ZeRO splits over all ranks: optimizer state (`stage` 1), gradients (2) and weights (3) too.

    With `overlap`, gradients are exchanged while the backward goes on. Read where `train.engine` = "deepspeed"; the
    rest of its settings follow from the other tables.
    """

    stage: int = 2
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"deepspeed.stage={self.stage} must be 1, 2 or 3; without ZeRO take train.engine='torch'")


@dataclass(frozen=True)
class DataConfig:
    """Which text: sequences of `context` tokens of a folder that `launch.data` wrote, `path`.

    Without a path it is the Python standard library's own sources, one token a byte; of the files in path order every
    `held_out_every`-th is held out. The end of the run measures `held_out_sequences` sequences of held-out tokens.
    """

    path: str = ""
    context: int = 2048
    held_out_every: int = 10
    held_out_sequences: int = 8

    def __post_init__(self) -> None:
        _at_least(self, context=2, held_out_every=2, held_out_sequences=1)
        if self.path and self.held_out_every != DataConfig.held_out_every:
            raise ValueError(f"data.held_out_every={self.held_out_every} is not read with data.path: what token "
                             "files hold out was decided by --held-out-every of launch.data; leave it out")


@dataclass(frozen=True)
class LogConfig:
    """What is kept of a run: a checkpoint every `checkpoint_every` steps, of which the last `keep` stay.

    A checkpoint is also written when the run ends or is told to stop; 0 for these alone. Every `probe_every` steps (0:
    never) `probe_layers` layers, spread evenly, say how far their attention is from the exact one.
    """

    checkpoint_every: int = 500
    keep: int = 3
    probe_every: int = 0
    probe_layers: int = 3

    def __post_init__(self) -> None:
        _at_least(self, checkpoint_every=0, keep=1, probe_every=0, probe_layers=1)


@dataclass(frozen=True)
class RunConfig:
    """All of it. `name` is the folder below the output folder that the run writes to."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    log: LogConfig = field(default_factory=LogConfig)
    muse: MuseConfig = field(default_factory=MuseConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @classmethod
    def from_toml(
        cls, path: str | Path, *, name: str | None = None, changes: Mapping[str, Any] | None = None
    ) -> RunConfig:
        """Read a file; `changes`, such as {"train.steps": 10}, override it. The name defaults to the file's own.

        Raises:
            ValueError or TypeError naming the key, for keys not known here and for values that cannot be.
        """
        tables = _read_tables(Path(path))
        for key, value in (changes or {}).items():
            table, _, entry = key.partition(".")
            if not entry:
                raise ValueError(f"{key!r} must name a table and a key, such as 'train.steps'")
            tables.setdefault(table, {})[entry] = value
        unknown = sorted(set(tables) - set(TABLES))
        if unknown:
            raise ValueError(f"{path}: unknown table or key {unknown[0]!r}; known: "
                             + ", ".join(f"[{table}]" for table in TABLES))
        kinds = {"model": ModelConfig, "train": TrainConfig, "deepspeed": DeepSpeedConfig, "data": DataConfig,
                 "log": LogConfig}
        built: dict[str, Any] = {table: from_mapping(kind, tables.get(table, {}), table)  # type: ignore[type-var]
                                 for table, kind in kinds.items()}
        return cls(name=Path(path).stem if name is None else name, muse=MuseConfig.from_dict(tables.get("muse", {})),
                   **built)

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
        for table in TABLES:
            # JSON writes integers, floats, booleans and plain strings as TOML does.
            values = dataclasses.asdict(getattr(self, table))
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
        return "\n".join(lines)

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be the name of a folder, without separators")
        if not self.muse.causal:
            raise ValueError("muse.causal=false: a decoder predicts the next token and must not see it")
        if self.train.engine != "deepspeed" and self.deepspeed != DeepSpeedConfig():
            raise ValueError(f"[deepspeed] has settings that train.engine={self.train.engine!r} does not read: leave "
                             "them out, or take train.engine='deepspeed'")


def _read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ValueError that names it if it is none, or has no table where one belongs."""
    try:
        tables = tomllib.loads(path.read_bytes().decode())
    except ValueError as error:  # of UTF-8 too
        raise ValueError(f"{path} is no TOML file: {error}") from error
    for name, table in tables.items():
        if name in TABLES and not isinstance(table, dict):
            raise ValueError(f"{path}: {name} must be a table, which starts with the line [{name}]")
    return tables


def parse_changes(words: Sequence[str]) -> dict[str, Any]:
    """Words such as `train.lr=1e-3` or `muse.exchange=kv` as {"train.lr": 0.001, "muse.exchange": "kv"}.

    Raises ValueError for a word without `=`. A value that TOML does not know is a string.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} must be KEY=VALUE, such as train.lr=1e-3")
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value
    return changes


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
    """Raise ValueError for a number that is too low, and for any of the table that is NaN or infinite."""
    where = type(table).__name__.removesuffix("Config").lower()
    for name, value in vars(table).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}.{name}={value} must be a finite number")
    for name, low in lows.items():
        if getattr(table, name) < low:
            raise ValueError(f"{where}.{name}={getattr(table, name)} must be at least {low}")

