"""muse_dist: context-parallel multipole semantic attention for long-context pretraining."""
from muse_dist.attention import muse_attention
from muse_dist.comm import ByteCounter
from muse_dist.config import MuseConfig
from muse_dist.graphs import forget_graphs
from muse_dist.layer import MuseAttention
from muse_dist.traffic import traffic

__all__ = ["ByteCounter", "MuseAttention", "MuseConfig", "forget_graphs", "muse_attention", "traffic"]
__version__ = "0.1.0"
