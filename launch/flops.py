"""Floating-point operations a training step needs, and what GPUs can do."""
from __future__ import annotations

import torch

from launch.config import ModelConfig
from muse_dist import MuseConfig
from muse_dist.flops import attention_pairs

# Dense bf16 peak in FLOP/s by a part of the device's name, from NVIDIA's data sheets. The first that fits counts.
PEAKS = {"GB200": 2.5e15, "B200": 2.25e15, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12,
         "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, or None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def step_flops(model: ModelConfig, vocabulary: int, tokens: int, context: int, muse: MuseConfig | None) -> float:
    """Operations of forward and backward of a step, as model-FLOP utilisation counts them: nothing twice.

    Args:
        tokens: of the step.
        context: tokens of a sequence.
        muse: settings of the attention; None for exact causal attention.
    """
    dim = model.width // model.heads
    weights = model.layers * model.width * (
        (2 * model.heads + 2 * model.kv_heads) * dim + 3 * model.mlp) + model.width * vocabulary
    read = keys_read(context, muse)
    # Two matrix products (q k and p v) of 2 * dim operations a key and head; backward takes twice the forward.
    return 6.0 * weights * tokens + 3.0 * 4.0 * dim * model.heads * model.layers * read * tokens


def keys_read(context: int, muse: MuseConfig | None) -> float:
    """Keys, or leaves seen as one, that a query reads in the mean over a sequence, causal without `muse`."""
    if muse is None:
        return context / 2
    pairs = attention_pairs(muse, 1, 1, context)
    return (sum(pairs.values()) - pairs["choice"]) / context
