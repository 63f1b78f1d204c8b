"""The attention as a module, for models that hold their core attention as one."""
from __future__ import annotations

from torch import Tensor, nn

from muse_dist.attention import muse_attention
from muse_dist.comm import ByteCounter, ProcessGroup
from muse_dist.config import MuseConfig
from muse_dist.layout import LayoutName


class MuseAttention(nn.Module):
    """Multipole semantic attention without parameters or state: put it where softmax(q k^T) v stood."""

    def __init__(
        self, config: MuseConfig, scale: float | None = None, group: ProcessGroup | None = None,
        layout: LayoutName = "contiguous", counter: ByteCounter | None = None,
    ) -> None:
        """Arguments as in `muse_attention`."""
        super().__init__()
        if not isinstance(config, MuseConfig):
            raise TypeError(f"config: must be a MuseConfig, not {type(config).__name__}")
        self.config = config
        self.scale = scale
        self.group = group
        self.layout: LayoutName = layout
        self.counter = counter

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, N, D], k and v [B, K, N, D] -> [B, H, N, D]; errors as in `muse_attention`."""
        return muse_attention(q, k, v, config=self.config, scale=self.scale, group=self.group, layout=self.layout,
                              counter=self.counter)

    def extra_repr(self) -> str:
        ranks = "" if self.group is None else f", ranks={self.group.size()}, layout={self.layout!r}"
        return f"{self.config}, scale={self.scale}{ranks}"
