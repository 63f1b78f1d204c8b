"""Floating-point operations of the attention on one device, counted from its blocks: for torch's FlopCounterMode.

A pair is one query of one head with one key, or with one leaf. The operations of a pair follow from the matrix products
of `kernels/reference.py`, each of 2 * head dim operations; what grows slower than the pairs is left out.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muse_dist.config import MuseConfig
from muse_dist.kernels.limits import ceil_div, probe_count
from muse_dist.layout import block_count, is_far

# Matrix products of a pair, forward and backward. Backward computes the logits again, and the moments with them.
PRODUCTS = {
    "near field": (2, 5),  # q k and p v; then q k, dout v, dq, dk, dv
    "opened leaves": (2, 5),
    "far field": (2, 5),  # q key and p value; then these logits, dout value, dq, dkey, dvalue
    "moments": (3, 9),  # a k, p k, p v; then all again, and a k, dkey k, dvalue v, dlogit a, p dkey, p dvalue
    "choice": (1, 0),  # probes with keys
}


# Of the leaves that a group may open where a tolerance decides, the share that it does: only the device knows. At 64k
# tokens of the trained model of launch/results/2026-11-22-kernels.md the presets opened 1/8 and 1/12 of them.
FILLED = 1 / 8


def opened_at_most(config: MuseConfig) -> float:
    """Leaves that a group opens besides the sinks if it sees so many; with a tolerance, on average."""
    return config.opened * (FILLED if config.tolerance else 1.0)


def attention_pairs(config: MuseConfig, heads: int, kv_heads: int, tokens: int) -> dict[str, float]:
    """Pairs of one sequence by stage. Of a causal block with itself, half the square."""
    found = dict.fromkeys(PRODUCTS, 0.0)
    count = block_count(tokens, config.block)
    probes = probe_count(config.group, config.tolerance > 0)
    sizes = [min(config.block, tokens - i * config.block) for i in range(count)]
    for i, rows in enumerate(sizes):
        last = i if config.causal else i + config.halo
        near = sum(sizes[max(0, i - config.halo):last + 1])
        far = (sum(sizes[:i + 1]) if config.causal else tokens) - near
        leaves, sinks = ceil_div(far, config.leaf), config.sinks if is_far(i, 0, config) else 0
        opened = min(far, (sinks + min(opened_at_most(config), leaves - sinks)) * config.leaf)
        weighed = far + near if config.tolerance and far else far
        found["near field"] += heads * rows * (near - rows / 2 if config.causal else near)
        found["opened leaves"] += heads * rows * opened
        found["far field"] += heads * rows * leaves
        found["moments"] += kv_heads * config.anchors * far
        found["choice"] += heads * rows / config.group * probes * weighed if config.opened else 0.0
    return found


def _operations(
    stages: Sequence[str], backward: bool, q: Sequence[int], k: Sequence[int], settings: str
) -> int:
    """Of some stages for queries of shape `q` [B, H, N, D] and keys of shape `k` [B, K, N, D]."""
    pairs = attention_pairs(MuseConfig.decode(settings), q[1], k[1], q[2])
    return round(2 * q[0] * q[3] * sum(PRODUCTS[stage][backward] * pairs[stage] for stage in stages))


def _stages(key_order: Sequence[int]) -> list[str]:
    """What the attention computes for a structure whose key orders have this shape: an empty one has no far field."""
    return [stage for stage in PRODUCTS if stage != "choice"] if 0 not in key_order else ["near field"]


def plan_flops(q: Sequence[int], k: Sequence[int], scale: float, settings: str, **_: Any) -> int:
    """Of the operator `muse_dist::plan`, given the shapes of its tensors."""
    config = MuseConfig.decode(settings)
    judged = ["moments"] if config.tolerance and config.opened else []  # their errors decide
    return _operations(["choice", *judged], False, q, k, settings)


def attend_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], key_order: Sequence[int], query_order: Sequence[int],
    anchors: Sequence[int], opened: Sequence[int], scale: float, settings: str, **_: Any,
) -> int:
    """Of the operator `muse_dist::attend`, given the shapes of its tensors."""
    return _operations(_stages(key_order), False, q, k, settings)


def attend_backward_flops(
    dout: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], out: Sequence[int], lse: Sequence[int],
    key_order: Sequence[int], query_order: Sequence[int], anchors: Sequence[int], opened: Sequence[int], scale: float,
    settings: str, **_: Any,
) -> int:
    """Of the operator `muse_dist::attend_backward`, given the shapes of its tensors."""
    return _operations(_stages(key_order), True, q, k, settings)
