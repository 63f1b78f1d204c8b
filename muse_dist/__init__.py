"""muse_dist: context-parallel multipole semantic attention for long-context pretraining."""
from muse_dist.attention import muse_attention
from muse_dist.config import MuseConfig
from muse_dist.layer import MuseAttention

__all__ = ["MuseAttention", "MuseConfig", "muse_attention"]
__version__ = "0.1.0"
