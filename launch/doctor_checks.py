"""What can be wrong with versions, limits, settings, data and disks."""
from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from launch.config import RunConfig, TrainConfig
from launch.corpus import load_corpus
from launch.engine import check_engine
from launch.flops import peak_flops
from launch.optimizer import check_optimizer
from launch.plan import calibrated
from launch.plan_machine import known_gpu, known_machine
from launch.plan_model import Shape
from launch.plan_rows import read_rows
from launch.plan_step import predict, setup_of
from launch.ranks import Ranks
from muse_dist.backend import backend_for
from muse_dist.kernels.limits import ceil_div
from muse_dist.layout import Layout

# What else decides what an engine computes; Megatron takes kernels of the last two where they are installed.
ENGINE_PACKAGES = {"torch": (), "deepspeed": ("deepspeed",),
                   "megatron": ("megatron-core", "transformer-engine", "apex")}
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton")
LEAST_TORCH = (2, 6)
LEAST_FILES = 4096  # that a process may have open: sockets to other ranks are files
LEAST_SHARED = 1 << 30  # bytes of /dev/shm, through which NCCL's ranks of a node meet
SLOW_CHECKPOINT = 300.0  # seconds
FULL = "there is no room"
NCCL_BRAKES = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "1"}
CHECKPOINT_BYTES = 12  # of a parameter: fp32 weight and two moments of AdamW

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` says what to do where it is not well."""

    level: Level
    check: str
    text: str
    mend: str = ""

    def on(self, ranks: Sequence[int]) -> Finding:
        """The same, of some ranks only."""
        shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        return replace(self, text=f"{self.text} (rank {shown})")


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", check, text)


def warning(check: str, text: str, mend: str) -> Finding:
    """It will run, but perhaps not as hoped."""
    return Finding("warning", check, text, mend)


def problem(check: str, text: str, mend: str) -> Finding:
    """It will not run, or not to the end."""
    return Finding("problem", check, text, mend)


# ---------------------------------------------------------------------------------------------------------- every rank


def check_host(ranks: Ranks) -> list[Finding]:
    """Limits of this process and variables that slow it down."""
    found = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < LEAST_FILES and ranks.world > 8:
        found.append(warning("limits", f"a process may open {files} files, and every rank it talks to is one",
                             f"ulimit -n {LEAST_FILES} before the start, or LimitNOFILE of Slurm's daemon"))
    if ranks.device.type == "cuda":
        found += check_shared(shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0, ranks)
    found += check_brakes(os.environ)
    return found or [ok("host", "limits and environment")]


def check_shared(size: int, ranks: Ranks) -> list[Finding]:
    """Shared memory of the node."""
    if ranks.world == 1 or size >= LEAST_SHARED:
        return []
    return [problem("limits", f"/dev/shm has {size >> 20} MiB, too little for NCCL between the ranks of a node",
                    "start the container with --shm-size 8g or --ipc host")]


def check_brakes(environment: Any) -> list[Finding]:
    """Variables that somebody set to find an error and forgot."""
    return [warning("environment", f"{name}={value} makes everything slower", f"unset {name}")
            for name, value in NCCL_BRAKES.items() if environment.get(name) == value]


def check_settings(config: RunConfig, ranks: Ranks) -> list[Finding]:
    """Whether the settings fit the ranks; what launch.train would refuse."""
    train, found = config.train, []
    size = train.context_parallel or ranks.world
    if ranks.world % size:
        return [problem("settings", f"train.context_parallel={size} does not divide {ranks.world} ranks",
                        "take a divisor, or start another number of ranks")]
    sets = ranks.world // size
    if train.batch % sets:
        found.append(problem("settings", f"train.batch={train.batch} is no multiple of the {sets} sets of ranks",
                             f"take train.batch={ceil_div(train.batch, sets) * sets}"))
    if size > 1:
        found += _check_split(config, size)
    found += _check_parts(train, ranks)
    if train.shard and ranks.world == 1:
        found.append(problem("settings", "train.shard=true with one rank", "start it with torchrun, or turn it off"))
    if train.attention == "muse" and config.data.context <= config.near_reach:
        found.append(warning("settings", f"data.context={config.data.context} has no far field: the near field reaches "
                             f"to {config.near_reach}", "take a smaller muse.block, or longer sequences"))
    if not config.log.checkpoint_every:
        found.append(warning("settings", "log.checkpoint_every=0: a node that dies loses everything",
                             "write a checkpoint every few hundred steps"))
    if train.attention == "muse":
        q = torch.empty(1, 1, 1, config.model.width // config.model.heads, device=ranks.device,
                        dtype=torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)
        found.append(ok("attention", f"runs on backend {backend_for(config.muse, q)}"))
    return found or [ok("settings", f"{ranks.world} rank(s), {size} of which share a sequence")]


def _check_parts(train: TrainConfig, ranks: Ranks) -> list[Finding]:
    """Whether engine and optimizer are installed and can work on these ranks."""
    found = []
    for check in (lambda: check_engine(train.engine, ranks), lambda: check_optimizer(train, ranks.device)):
        try:
            check()
        except ValueError as error:
            text, _, mend = str(error).partition("; ")
            found.append(problem("settings", text, mend))
    return found


def _check_split(config: RunConfig, size: int) -> list[Finding]:
    try:
        Layout(config.layout, size, config.data.context, config.muse.block)
    except ValueError as error:
        return [problem("settings", str(error).removeprefix("q: "), "change data.context, muse.block or "
                        "train.context_parallel")]
    return []


def check_data(config: RunConfig) -> list[Finding]:
    """Whether this rank can read the tokens, and whether they last."""
    try:
        corpus = load_corpus(config.data)
        corpus.sequences(0, 1, config.train.seed)
    except (OSError, ValueError) as error:
        return [problem("data", str(error), "the folder must be there on every node: python -m launch.data writes it")]
    if 0 < config.model.vocabulary < corpus.vocabulary:
        return [problem("data", f"it has {corpus.vocabulary} tokens, model.vocabulary={config.model.vocabulary}",
                        f"take model.vocabulary={corpus.vocabulary} or more")]
    wanted, there = config.train.steps * config.train.batch * config.data.context, len(corpus.train)
    text = f"{there:,} tokens, of which the run reads {wanted:,}"
    if wanted > 4 * there:
        return [warning("data", f"{text}: each {wanted / there:.0f} times", "fewer steps, or more text")]
    return [ok("data", text)]


# -------------------------------------------------------------------------------------------------- all ranks together


def check_versions(ranks: Ranks, engine: str = "torch") -> list[Finding]:
    """Python and packages, those of `train.engine` too, and whether all ranks have the same."""
    packages = (*PACKAGES, *ENGINE_PACKAGES[engine])
    mine = {"python": platform.python_version(), **{name: _version(name) for name in packages},
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if ranks.device.type == "cuda" else "none"}
    return compare_versions(ranks.collect(mine))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def compare_versions(everyone: Sequence[dict[str, str]]) -> list[Finding]:
    """Findings about the versions of all ranks."""
    found = []
    for name in everyone[0]:
        values = [one[name] for one in everyone]
        odd = [rank for rank, value in enumerate(values) if value != max(set(values), key=values.count)]
        if odd:
            found.append(problem("versions", f"{name} is {' and '.join(sorted(set(values)))}",
                                 "install the same everywhere: the ranks exchange what their versions make").on(odd))
    torch_version = tuple(int(part) for part in everyone[0]["torch"].split("+")[0].split(".")[:2])
    if torch_version < LEAST_TORCH:
        found.append(problem("versions", f"torch {everyone[0]['torch']} is too old", "install torch 2.6 or newer"))
    if everyone[0]["nccl"] != "none" and everyone[0]["triton"] == "none":
        found.append(problem("versions", "triton is missing, without which there are no GPU kernels",
                             "pip install triton, of the version that torch asks for"))
    return found or [ok("versions", ", ".join(f"{name} {value}" for name, value in everyone[0].items()))]


def check_disk(config: RunConfig, folder: Path, ranks: Ranks, megabytes: int) -> list[Finding]:
    """Whether all ranks see the folder of the checkpoints, how much fits into it, and how fast it is."""
    try:
        token = ranks.collect(ranks.on_first(lambda: _make_token(folder)))[0]
    except ValueError as error:  # every rank gets the first one's
        return [problem("disk", str(error), "choose another folder with --out, or its owner")]
    mine: float | str
    try:
        mine = _try_disk(folder, token, ranks.world_rank, megabytes)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mine = f"{FULL}: {error.strerror}" if full else f"{error.strerror}: {error.filename}"
    results = ranks.collect(mine)
    if ranks.first:
        (folder / token).unlink(missing_ok=True)
    lost = [rank for rank, result in enumerate(results) if isinstance(result, str)]
    short = [rank for rank in lost if str(results[rank]).startswith(FULL)]
    if short:
        return [problem("disk", f"{folder}: {results[short[0]]} before each of {ranks.world} rank(s) had written "
                        f"{megabytes} MB", "make room, raise the quota, or choose another with --out").on(short)]
    if lost:
        return [problem("disk", f"{folder}: {results[lost[0]]}", "all ranks must write to one shared folder: mount it "
                        "on every node, or choose another with --out").on(lost)]
    free, parameters = ranks.collect((shutil.disk_usage(folder).free, _parameters(config)))[0]
    return judge_disk(folder, free, sum(results), CHECKPOINT_BYTES * parameters, config.log.keep)


def _make_token(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"doctor-{os.getpid()}-{time.time_ns()}.token"
    (folder / name).write_text("seen")
    return name


def _try_disk(folder: Path, token: str, rank: int, megabytes: int) -> float:
    """Bytes/s that this rank writes, on the disk; OSError if it cannot, or does not see the first rank's file."""
    (folder / token).read_text()
    path, piece = folder / f"{token}-{rank}.partial", os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return megabytes * len(piece) / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def judge_disk(folder: Path, free: int, speed: float, checkpoint: int, keep: int) -> list[Finding]:
    """Findings about free bytes and the bytes/s of all ranks together, for checkpoints of so many bytes."""
    needed, seconds = checkpoint * (keep + 1), checkpoint / speed
    found = []
    if free < needed:
        found.append(problem("disk", f"{folder} has {free / 1e9:.1f} GB free; {keep} checkpoints and one being written "
                             f"take {needed / 1e9:.1f} GB", "make room, lower log.keep, or choose another --out"))
    if seconds > SLOW_CHECKPOINT:
        found.append(warning("disk", f"a checkpoint of {checkpoint / 1e9:.1f} GB takes {seconds:.0f} s at "
                             f"{speed / 1e6:.0f} MB/s", "a faster folder, or a larger log.checkpoint_every"))
    return found or [ok("disk", f"{folder}: {free / 1e9:.0f} GB free, {speed / 1e6:.0f} MB/s; a checkpoint has "
                                f"{checkpoint / 1e9:.2f} GB")]


def _parameters(config: RunConfig) -> int:
    """Of the model; without its embedding where that is as large as data that cannot be read."""
    model, words = config.model, config.model.vocabulary
    if not words:
        with suppress(OSError, ValueError):  # the check of the data says so
            words = load_corpus(config.data).vocabulary
    return Shape(model.layers, model.width, model.heads, model.kv_heads, model.mlp, words).parameters


def check_prediction(config: RunConfig, ranks: Ranks, per_node: int | None = None) -> list[Finding]:
    """Predicted memory and step time on these GPUs."""
    if ranks.device.type != "cuda" or peak_flops(ranks.device) is None:
        return [ok("prediction", f"none: the speed of this {ranks.device.type} is not known to launch.plan")]
    name = torch.cuda.get_device_name(ranks.device)
    known = known_gpu(name)
    if known is None:
        return [ok("prediction", f"none: {name} is not known to launch.plan")]
    return predicted(config, known, ranks.world, per_node or torch.cuda.device_count(),
                     torch.cuda.mem_get_info(ranks.device)[1])


def predicted(config: RunConfig, gpu: str, world: int, per_node: int, there: int) -> list[Finding]:
    """Findings about a step on `world` GPUs with `there` bytes of memory each."""
    machine = known_machine(gpu, per_node, 50e9)
    results = Path(__file__).parent / "results"
    rows = read_rows([results] if results.is_dir() else [], gpu)
    machine, rates = calibrated(machine, rows, config.model.width // config.model.heads, config.train.engine)
    try:
        step = predict(setup_of(config, world, exact=config.train.attention == "exact"), machine, rates)
    except ValueError as error:
        return [warning("prediction", f"none: {error}", "see the other findings")]
    text = (f"{step.memory.total / 2**30:.0f} of {there / 2**30:.0f} GiB and {step.seconds:.2f} s a step, most of it "
            f"{step.binds}" + ("" if len(rows) else "; speeds are assumed, none was measured"))
    if step.memory.total > there:
        return [problem("prediction", text, "train.recompute=true, train.shard=true, a smaller train.micro_batch, or "
                        "more GPUs a sequence")]
    if step.memory.total > 0.9 * there:
        return [warning("prediction", text, "little room is left: see train.recompute, train.shard, train.micro_batch")]
    return [ok("prediction", text)]
