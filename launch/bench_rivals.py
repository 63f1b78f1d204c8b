"""Attentions to measure side by side: MuSe, exact attention of every library at hand, and a sliding window.

Each opens as a context manager that gives a function of q [B, H, S, D], k and v [B, K, S, D] to [B, H, S, D]; forward
and backward run inside the context. `Unavailable` says what is missing where it cannot run.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch.bench_inputs import Shape
from launch.bench_exact import Window
from launch.ranks import Ranks
from launch.bench_timing import Attention
from muse_dist import MuseConfig, muse_attention
from muse_dist.layout import LayoutName

TILE = 128  # of FlexAttention's block masks
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


class Unavailable(Exception):
    """A rival that this machine, this installation or this shape does not let run; the message says what is missing."""


@dataclass(frozen=True)
class Problem:
    """What is to be computed, and by whom."""

    shape: Shape  # of the whole sequence
    causal: bool
    dtype: torch.dtype
    ranks: Ranks

    @property
    def grouped(self) -> bool:
        return self.shape.heads != self.shape.kv_heads


@dataclass(frozen=True)
class Variant:
    """One line of the benchmark."""

    name: str
    about: str
    open: Callable[[Problem], AbstractContextManager[Attention]]
    layout: LayoutName = "contiguous"  # of the shards it takes
    config: MuseConfig | None = None  # of MuSe
    window: Window | None = None  # what its queries see, if not everything


def muse_variant(name: str, config: MuseConfig, ranks: Ranks) -> Variant:
    """MuSe with `config`, over the group if there is one."""
    return Variant(name, f"MuSe, blocks of {config.block}", _open_muse(config), ranks.layout, config)


def rivals(ranks: Ranks, windows: Sequence[Window], causal: bool) -> list[Variant]:
    """Everything MuSe is compared with, on one device or over several ranks; `windows` are those of near fields."""
    if ranks.size == 1:
        return [
            *(Variant(name, f"exact, {name} kernel of torch", partial(sdpa, name)) for name in BACKENDS),
            Variant("flash_attn", "exact, package flash_attn", partial(packaged_flash, "flash_attn")),
            Variant("flash_attn_3", "exact, package flash_attn_interface",
                    partial(packaged_flash, "flash_attn_interface")),
            *(Variant(_window_name(window, windows),
                      f"FlexAttention, near field only: block {window.block}, halo {window.halo}",
                      partial(flex_window, window), window=window) for window in windows),
        ]
    # torch balances causal work by the same pairs of chunks as "zigzag".
    layout: LayoutName = "zigzag" if causal else "contiguous"
    return [
        *(Variant(f"cp_{method}_{name}", f"exact, torch's context_parallel, {method}, {name} kernel",
                  partial(torch_context_parallel, method, name), layout)
          for method in ("allgather", "alltoall") for name in ("cudnn", "flash")),
        Variant("ulysses", "exact, DeepSpeed-Ulysses", ulysses),
    ]


def _window_name(window: Window, windows: Sequence[Window]) -> str:
    """By its block, and by its halo where that alone tells windows apart."""
    alike = [other for other in windows if other.block == window.block]
    return f"flex_window_{window.block}" + (f"_halo_{window.halo}" if len(alike) > 1 else "")


def _open_muse(config: MuseConfig) -> Callable[[Problem], AbstractContextManager[Attention]]:
    @contextmanager
    def opened(problem: Problem) -> Iterator[Attention]:
        ranks = problem.ranks
        yield partial(muse_attention, config=config, group=ranks.group, layout=ranks.layout)

    return opened


@contextmanager
def sdpa(name: str, problem: Problem) -> Iterator[Attention]:
    """torch's scaled_dot_product_attention held to one kernel; key/value heads repeated where it cannot group them."""
    _need_kernel(name, problem)
    repeats = problem.grouped and not _groups_heads(name, problem)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeats:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=q.shape[1] != k.shape[1])

    with sdpa_kernel(BACKENDS[name]):
        yield attention


def _need_kernel(name: str, problem: Problem) -> None:
    if problem.ranks.device.type != "cuda" and name != "flash":
        raise Unavailable(f"torch's {name} kernel needs a CUDA GPU")


def _groups_heads(name: str, problem: Problem) -> bool:
    """Whether a kernel takes fewer key/value heads than query heads."""
    device = problem.ranks.device
    if device.type != "cuda":
        return True
    q, k, v = (torch.empty(1, heads, TILE, problem.shape.dim, device=device, dtype=problem.dtype, requires_grad=True)
               for heads in (problem.shape.heads, problem.shape.kv_heads, problem.shape.kv_heads))
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, problem.causal, True)
    can: Callable[..., bool] = getattr(torch.backends.cuda, f"can_use_{name}_attention")
    return can(asked, False)


@contextmanager
def packaged_flash(package: str, problem: Problem) -> Iterator[Attention]:
    """The packages of FlashAttention 2 (flash_attn) and 3 (flash_attn_interface)."""
    function = _imported(package).flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=problem.causal)
        out = out[0] if isinstance(out, tuple) else out  # some versions give the log-sum-exp too
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    yield attention


@contextmanager
def flex_window(window: Window, problem: Problem) -> Iterator[Attention]:
    """FlexAttention over the own block of tokens and its halo, compiled for this shape."""
    if problem.ranks.device.type != "cuda":
        raise Unavailable("FlexAttention has a backward on CUDA GPUs only")
    from torch.nn.attention.flex_attention import flex_attention

    mask = window_mask(window, problem.shape.tokens, problem.causal, problem.ranks.device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    try:
        yield partial(compiled, block_mask=mask, enable_gqa=problem.grouped)
    finally:
        torch.compiler.reset()  # the next shape is compiled anew, and counts against no limit


def window_mask(window: Window, tokens: int, causal: bool, device: torch.device) -> Any:
    """FlexAttention's block mask of a near field, from tiles: masks of single tokens would not fit at 256k tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    if window.block % TILE or tokens % TILE:
        raise Unavailable(f"FlexAttention's tiles of {TILE} tokens need blocks and sequences of a multiple of {TILE}, "
                          f"not {window.block} and {tokens}")
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query // window.block - key // window.block).abs() <= window.halo
        return near & (query >= key) if causal else near

    tile = torch.arange(tokens // TILE, device=device)
    whole = seen(tile, tile, tile[:, None] * TILE, tile * TILE)
    partly = whole & (tile[:, None] == tile) & causal
    (part_counts, part_places), (counts, places) = _listed(partly), _listed(whole & ~partly)
    return BlockMask.from_kv_blocks(part_counts, part_places, counts, places, BLOCK_SIZE=TILE, mask_mod=seen)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool [T, T] -> how many tiles of keys a tile of queries sees [1, 1, T], and which, those first [1, 1, T, T]."""
    places = tiles.int().argsort(stable=True, dim=-1, descending=True)
    return tiles.sum(-1, dtype=torch.int32)[None, None], places.int()[None, None]


@contextmanager
def torch_context_parallel(
    method: Literal["allgather", "alltoall"], name: str, problem: Problem
) -> Iterator[Attention]:
    """torch's ring attention: keys and values gathered after the first step, or passed on by all-to-all."""
    if problem.ranks.device.type != "cuda":
        raise Unavailable("torch's context_parallel needs CUDA GPUs")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import _attention, context_parallel

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=problem.grouped)

    ranks, options = problem.ranks, _attention._cp_options
    assert ranks.group is not None
    mesh = DeviceMesh.from_group(ranks.group, "cuda")
    _attention.set_rotate_method(method)
    balance, options.enable_load_balance = options.enable_load_balance, problem.causal  # acausal work is balanced
    # The context wants a tensor to split; q, k and v come split, so that this costs the measurement nothing.
    unused = torch.empty(problem.shape.tokens, device=ranks.device)
    try:
        with sdpa_kernel(BACKENDS[name]), context_parallel(
                mesh, buffers=[unused], buffer_seq_dims=[0], no_restore_buffers={unused}):
            yield attention
    finally:
        options.enable_load_balance = balance


@contextmanager
def ulysses(problem: Problem) -> Iterator[Attention]:
    """DeepSpeed's DistributedAttention around exact attention, cuDNN's on GPUs: heads change hands for tokens."""
    layer, comm = _imported("deepspeed.sequence.layer"), _imported("deepspeed.comm")
    ranks, shape = problem.ranks, problem.shape
    if shape.heads % ranks.size or shape.kv_heads % ranks.size:
        raise Unavailable(f"{shape.heads} query and {shape.kv_heads} key/value heads do not divide by {ranks.size}")
    cuda = ranks.device.type == "cuda"
    comm.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=problem.grouped)
        return out.transpose(1, 2)

    distributed = layer.DistributedAttention(local, ranks.group, scatter_idx=2, gather_idx=1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, S, H, D]
        return distributed(q, k, v, 0).transpose(1, 2)  # type: ignore[no-any-return]

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if cuda else SDPBackend.FLASH_ATTENTION):
        yield attention


def _imported(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{package} is not installed" if error.name == package else
                          f"{package} does not import: {error}") from error
