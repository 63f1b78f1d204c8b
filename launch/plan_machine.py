"""What a cluster can do: GPUs, memory, links inside a node and between nodes."""
from __future__ import annotations

import re
from dataclasses import dataclass

# Data sheets of NVIDIA: dense bf16 FLOP/s, bytes/s of memory, bytes of memory, NVLink bytes/s in one direction.
GPUS = {
    "B200": (2.25e15, 8.0e12, 180e9, 900e9),
    "H200": (989e12, 4.8e12, 141e9, 450e9),
    "H100": (989e12, 3.35e12, 80e9, 450e9),
    "A100": (312e12, 2.0e12, 80e9, 300e9),
}
LINK_SHARE = 0.8  # of a link's nominal speed that collectives reach where none was measured
START_SECONDS = 30e-6  # of a collective, where none was measured


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs. `intra` and `inter` are bytes/s a GPU receives from its node, and from other nodes."""

    name: str
    peak: float  # FLOP/s
    memory_speed: float  # bytes/s
    memory: float  # bytes
    intra: float
    inter: float
    per_node: int = 8
    start: float = START_SECONDS  # seconds of any exchange, however small

    def __post_init__(self) -> None:
        for name in ("peak", "memory_speed", "memory", "intra", "inter", "per_node"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} of {self.name} must be positive")

    def exchange_seconds(self, received: float, ranks: int, exchanges: int = 1) -> float:
        """Time for `received` bytes that a GPU gets from the others of `ranks` neighbouring GPUs, in equal parts."""
        if ranks < 2:
            return 0.0
        together = min(ranks, self.per_node)
        outside = (ranks - together) / (ranks - 1)
        return exchanges * self.start + max(received * (1 - outside) / self.intra, received * outside / self.inter)

    def ring_seconds(self, received: float, ranks: int, exchanges: int = 1) -> float:
        """The same for a ring, where all bytes pass every link: the slowest sets the pace.

        Between nodes every GPU has a ring of its own, so the speed is that of one GPU's share.
        """
        if ranks < 2:
            return 0.0
        return exchanges * self.start + received / (self.intra if ranks <= self.per_node else min(self.intra,
                                                                                                  self.inter))


def in_name(part: str, device: str) -> bool:
    """Whether a device's full name has this word: "NVIDIA H200" has "H200", and "NVIDIA GH200 480GB" has not."""
    return part in re.split(r"[^A-Za-z0-9]+", device)


def known_gpu(device: str) -> str | None:
    """Which of `GPUS` a device's full name says, None if it is none of them."""
    return next((gpu for gpu in GPUS if in_name(gpu, device)), None)


def known_machine(name: str, per_node: int, inter: float, intra: float | None = None) -> Machine:
    """A machine with the GPUs called `name` (B200, H200, H100, A100).

    Args:
        inter: nominal bytes/s a GPU gets from other nodes; intra: from its own, None for NVLink's.
    Raises:
        ValueError: the GPU is not known.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: is not known; take one of {', '.join(GPUS)}")
    peak, memory_speed, memory, nvlink = GPUS[name]
    return Machine(name, peak, memory_speed, memory, LINK_SHARE * (nvlink if intra is None else intra),
                   LINK_SHARE * inter, per_node)
