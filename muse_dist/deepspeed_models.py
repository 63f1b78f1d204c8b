"""Which layers of a model attend with MuSe when DeepSpeed trains it."""
from __future__ import annotations

import copy
import dataclasses
import logging

from torch import nn

from muse_dist.comm import ProcessGroup
from muse_dist.config import MuseConfig
from muse_dist.deepspeed_section import ALL, MuseSection
from muse_dist.layer import MuseAttention
from muse_dist.layout import LayoutName

LOG = logging.getLogger("muse_dist")
EVERY_BLOCK = 2 ** 20  # as a halo: more blocks than any sequence has


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


def register_once(config: MuseConfig, group: ProcessGroup, layout: LayoutName) -> str:
    """Register attention with transformers under a name no other engine of this process uses; returns the name."""
    from transformers import AttentionInterface

    from muse_dist.huggingface import register

    taken = AttentionInterface().valid_keys()
    name = next(name for i in range(len(taken) + 1) if (name := f"muse_deepspeed_{i}") not in taken)
    register(config, name, group=group, layout=layout)
    return name


def _exact(section: MuseSection, group: ProcessGroup) -> str:
    """The name of exact attention: torch's own on one rank; else MuSe that gathers all keys and reads all blocks."""
    if group.size() == 1:
        return "sdpa"
    config = dataclasses.replace(section.muse, exchange="kv", halo=EVERY_BLOCK, opened=0, sinks=0)
    return register_once(config, group, section.layout)


def _check_own(model: nn.Module, section: MuseSection, group: ProcessGroup) -> None:
    if not any(isinstance(module, MuseAttention) and module.group is group for module in model.modules()):
        raise ValueError("model: is not of Hugging Face transformers and has no MuSe layer of these ranks; build it "
                         "with parallel.attention() of parallel = muse_dist.deepspeed.join(config)")
    if section.layers != ALL:
        raise ValueError("muse.layers: is for models of transformers; in a model of your own give MuSe to the layers "
                         "you choose, and leave it out")
