"""Which layers of a model attend with MuSe when DeepSpeed trains it."""
from __future__ import annotations

import copy
import logging
from collections.abc import Callable

from torch import Tensor, nn

from muse_dist.attention import exact_attention
from muse_dist.comm import ProcessGroup
from muse_dist.config import MuseConfig
from muse_dist.deepspeed_section import ALL, MuseSection
from muse_dist.layer import MuseAttention
from muse_dist.layout import LayoutName

LOG = logging.getLogger("muse_dist")


def install(model: nn.Module, section: MuseSection, group: ProcessGroup) -> None:
    """Make the attention of a model of transformers MuSe; make sure that another model has it.

    Raises:
        ValueError: the model is neither, or `section.layers` names layers it does not have.
    """
    if not hasattr(model, "set_attn_implementation"):
        _check_own(model, section, group)
        return
    attentions = [module for module in model.modules()
                  if hasattr(module, "layer_idx") and getattr(module, "config", None) is not None]
    count = 1 + max((int(module.layer_idx) for module in attentions), default=-1)  # type: ignore[arg-type]
    chosen = section.chosen_layers(count)
    model.set_attn_implementation(register_once(section.muse, group, section.layout))  # type: ignore[operator]
    exact = [module for module in attentions if module.layer_idx not in chosen]
    if exact:
        name = _exact(section, group)
        for module in exact:
            module.config = copy.copy(module.config)  # layers share one config with the model
            module.config._attn_implementation = name  # type: ignore[union-attr]
    LOG.info("MuSe in %d of %d layers, %d ranks a sequence", count - len({m.layer_idx for m in exact}), count,
             group.size())


def register_once(
    config: MuseConfig, group: ProcessGroup, layout: LayoutName, function: Callable[..., Tensor] | None = None
) -> str:
    """Register MuSe, or `function`, with transformers under a name no other engine of this process uses; returns it."""
    from transformers import AttentionInterface

    from muse_dist.huggingface import register

    taken = AttentionInterface().valid_keys()
    name = next(name for i in range(len(taken) + 1) if (name := f"muse_deepspeed_{i}") not in taken)
    register(config, name, function, group=group, layout=layout)
    return name


def _exact(section: MuseSection, group: ProcessGroup) -> str:
    """The name of exact attention: torch's own on one rank; else over keys gathered from all."""
    if group.size() == 1:
        return "sdpa"
    return register_once(section.muse, group, section.layout, exact_attention)


def _check_own(model: nn.Module, section: MuseSection, group: ProcessGroup) -> None:
    if not any(isinstance(module, MuseAttention) and module.group is group for module in model.modules()):
        raise ValueError("model: is not of Hugging Face transformers and has no MuSe layer of these ranks; build it "
                         "with parallel.attention() of parallel = muse_dist.deepspeed.join(config)")
    if section.layers != ALL:
        raise ValueError("muse.layers: is for models of transformers; in a model of your own give MuSe to the layers "
                         "you choose, and leave it out")
