"""The one place where a MuSe layer is configured."""
from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from muse_dist.kernels.limits import ceil_div

Exchange = Literal["moments", "kv"]
Backend = Literal["auto", "torch", "triton"]
PRESETS = ("paper", "fast", "accurate")  # methods of MuseConfig


def _option(default: Any, text: str) -> Any:
    """A field whose documentation other front ends (command lines, JSON sections) can read."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MuseConfig:
    """Settings of multipole semantic attention. Each field's `metadata["help"]` says what it costs and buys.

    Raises `ValueError` or `TypeError`, naming the field and the fix, for values that cannot work together.
    A sequence of N tokens is cut into blocks, the keys of a block into leaves, its queries into groups.
    """

    block: int = _option(4096, (
        "tokens in a block: every query reads its own block exactly. Cost of the near field grows as N * block, "
        "accuracy with it; must be `leaf` times a power of two"))
    halo: int = _option(1, (
        "blocks next to the own one that are read exactly too (before it; on both sides when not causal). "
        "Each adds N * block to the near field; the first one matters most for accuracy"))
    leaf: int = _option(64, (
        "keys in a leaf, the cluster that far queries see as one key. Smaller leaves are more accurate; "
        "the far field costs N * N / leaf"))
    group: int = _option(64, (
        "query rows that choose their opened leaves together. Smaller groups choose better and read more memory; "
        "`block` must be `group` times a power of two"))
    anchors: int = _option(4, (
        "parts of a block's queries, per key/value head, whose means the moments are taken about. More anchors, "
        "shorter extrapolation, more memory for moments; a power of two, at most block / group"))
    remote_anchors: int = _option(1, (
        "anchors of a rank's contiguous chunk, per key/value head, for the moments other ranks send it. The traffic "
        "grows in proportion; a power of two, at most `anchors`"))
    remote_leaf: int = _option(32, (
        "keys in the leaves whose moments ranks send each other. The traffic shrinks in proportion; "
        "`block` must be `remote_leaf` times a power of two"))
    opened: int = _option(16, (
        "leaves each group reads exactly at most, besides the sinks: the ones with the largest estimated mass or, with "
        "`tolerance`, error. Costs N * opened * leaf at most; the main lever on accuracy after block and halo"))
    tolerance: float = _option(0.0, (
        "a leaf is opened only where its moments are estimated to get this share of a group's attention wrong, "
        "or more: few where the moments serve, up to `opened` where they do not. 0 opens `opened` leaves everywhere"))
    sinks: int = _option(1, (
        "leading leaves of the sequence that every group reads exactly. Some heads keep almost all their mass on the "
        "first tokens; 0 saves little and can cost much accuracy"))
    trace: bool = _option(True, (
        "add the isotropic second-order term to far logits. Costs one number a leaf and anchor, improves accuracy; "
        "without it a far logit is a lower bound of the leaf's true log mass"))
    causal: bool = _option(True, "each query sees the keys up to its own position; false: all keys")
    exchange: Exchange = _option("moments", (
        "what context-parallel ranks send each other: 'moments' of their leaves, or 'kv', all keys and values "
        "(the one-device result, at the traffic of exact attention)"))
    backend: Backend = _option("auto", (
        "'triton': GPU kernels, from Ampere on; 'torch': plain PyTorch, on any device, fp64 too; 'auto': GPU kernels "
        "wherever they can run, and says once what it took"))
    tiles: str = _option("", (
        "a file of launch shapes of the GPU kernels that `python -m launch.bench tiles` tuned on this kind of GPU, "
        "which a process reads once; "
        "empty: those pinned in the code, measured on an H200"))
    cuda_graphs: bool = _option(False, (
        "record the kernels of a thread's second call with a shape and replay them afterwards: saves the host's time, "
        "which is most of a call of 16k tokens and 16 heads of 64, and keeps the memory of a forward and a backward. "
        "With the GPU kernels only, and not beside torch.compile's own graphs (mode='reduce-overhead'); a graph that "
        "you capture around the call takes in everything itself"))

    # JSON of the fields, for operators of PyTorch, which take numbers and strings. Not a field: every instance has its
    # own, made once, because torch.compile cannot trace json.
    encoded: ClassVar[str]

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if type(f.default) is float and type(value) is int:  # such as 0, of a file or a command line
                object.__setattr__(self, f.name, float(value))
            _check_type(f.name, getattr(self, f.name), f.default)
        for name, low in {"block": 1, "halo": 0, "leaf": 1, "group": 1, "anchors": 1, "remote_anchors": 1,
                          "remote_leaf": 1, "opened": 0, "sinks": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {low}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}: must be a share of the attention, from 0 to below 1")
        for name in ("leaf", "group", "remote_leaf"):
            part = getattr(self, name)
            if not _power_of_two_times(self.block, part):
                raise ValueError(
                    f"block={self.block} is not {name}={part} times a power of two; with this {name} "
                    f"take block={_nearest_block(self.block, part)}")
        for name, most, why in (("anchors", self.block // self.group, "block / group"),
                                ("remote_anchors", self.anchors, "anchors")):
            count = getattr(self, name)
            if count & (count - 1) or count > most:
                raise ValueError(f"{name}={count}: must be a power of two, at most {why} = {most}")
        if self.sinks > self.block // self.leaf:
            raise ValueError(f"sinks={self.sinks}: must lie in the first block, at most block / leaf = "
                             f"{self.block // self.leaf}")
        for name, allowed in (("exchange", get_args(Exchange)), ("backend", get_args(Backend))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}")
        object.__setattr__(self, "encoded", json.dumps(dataclasses.asdict(self)))

    def plain(self) -> MuseConfig:
        """The same attention in plain PyTorch: without what only the GPU kernels can do."""
        return dataclasses.replace(self, backend="torch", tiles="", cuda_graphs=False)

    @classmethod
    @functools.lru_cache(maxsize=64)
    def decode(cls, encoded: str) -> MuseConfig:
        """The configuration whose `encoded` this is."""
        return cls(**json.loads(encoded))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MuseConfig:
        """Build from a mapping of field names; `preset` names a preset to start from. Unknown keys are refused."""
        values = dict(values)
        preset = values.pop("preset", None)
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}, preset"
                raise ValueError(f"unknown key {key!r} in the MuSe settings; {hint}")
        if preset is None:
            return cls(**values)
        return cls.preset(preset, **values)

    @classmethod
    def from_toml(cls, path: str | Path) -> MuseConfig:
        """Read a TOML file: its `[muse]` table if there is one, else its top level."""
        with open(path, "rb") as file:
            values = _toml().load(file)
        table = values.get("muse", values)
        if not isinstance(table, dict):
            raise TypeError(f"{path}: muse must be a table [muse], not {type(table).__name__}")
        return cls.from_dict(table)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MuseConfig:
        """The preset called `name`, one of PRESETS, with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r}: unknown; take one of {', '.join(PRESETS)}")
        made: MuseConfig = getattr(cls, name)(**changes)
        return made

    @classmethod
    def paper(cls, **changes: Any) -> MuseConfig:
        """The setting of the 2025 paper: blocks of 8192, 64 clusters a block, no halo, no sinks, nothing opened."""
        block = changes.get("block", 8192)
        _check_type("block", block, 8192)
        part = max(1, block // 64)
        return cls(**{"block": 8192, "halo": 0, "leaf": part, "group": part, "anchors": 64, "remote_leaf": part,
                      "opened": 0, "sinks": 0, "trace": False, **changes})

    @classmethod
    def fast(cls, **changes: Any) -> MuseConfig:
        """Within 0.02 nats of exact attention without retraining, up to 64k tokens on one model (launch/results)."""
        return cls(**{"block": 1024, "leaf": 128, "anchors": 1, "opened": 32, "tolerance": 0.003, **changes})

    @classmethod
    def accurate(cls, **changes: Any) -> MuseConfig:
        """Within 0.008 nats of exact attention without retraining, up to 64k tokens on one model (launch/results)."""
        return cls(**{"leaf": 128, "anchors": 2, "opened": 16, "tolerance": 0.004, **changes})

    def exact(self, tokens: int, chunk: int) -> MuseConfig:
        """These settings with which nothing is far: attention over `tokens` tokens is exact, on ranks too.

        `chunk` is how many tokens in a row a rank holds. Of the blocks that divide it the largest take the fewest
        kernels.
        """
        block = self.block
        while block < chunk and chunk % (2 * block) == 0:
            block *= 2
        return dataclasses.replace(self, block=block, halo=ceil_div(tokens, block), exchange="kv")


def _check_type(name: str, value: Any, default: Any) -> None:
    """Booleans are integers to Python; here they are not."""
    wanted = type(default)
    if type(value) is not wanted:
        raise TypeError(f"{name}={value!r}: must be {wanted.__name__}, not {type(value).__name__}")


def _power_of_two_times(whole: int, part: int) -> bool:
    ratio = whole // part
    return whole % part == 0 and ratio & (ratio - 1) == 0


def _nearest_block(block: int, part: int) -> int:
    """The largest `part` times a power of two that is at most `block`, or `part` itself."""
    size = part
    while size * 2 <= block:
        size *= 2
    return size


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib
