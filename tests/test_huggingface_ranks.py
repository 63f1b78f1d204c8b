"""Models of transformers on ranks that share a sequence: what every rank is told when one of them stops alone."""
import datetime
import time

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from muse_dist import MuseConfig
from muse_dist.huggingface import register
from muse_dist.layout import Layout
from tests.ranks import run_ranks

CONFIG = MuseConfig(block=8, leaf=4, group=4, remote_leaf=4, anchors=2, opened=2)
TOKENS, SECONDS = 32, 2

# What rank 1 does differently in the second step, and what it is told.
MISTAKES = {
    "padding": ({"attention_mask": (torch.arange(TOKENS // 2) < 12).long()[None]},
                "ValueError: attention_mask has zeros"),
    "no positions": ({"position_ids": None}, "ValueError: position_ids must be the places of this rank's tokens"),
    "another batch": ({"repeat": 2}, "RuntimeError: exchange 'agreement' was pending on rank 1 of 2"),
}


def step(model, positions, repeat=1, **changes):
    tokens = torch.randint(64, (1, TOKENS), generator=torch.Generator().manual_seed(0))[:, positions]
    options = {"position_ids": positions[None], **changes}
    model(tokens.repeat(repeat, 1), use_cache=False, **options).logits.sum().backward()


def make_mistakes():
    """For each: a good step, then one in which rank 1 is wrong; what this rank is told, and after how many seconds."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1))
    positions = Layout("zigzag", 2, TOKENS, CONFIG.block).positions(dist.get_rank())
    told = {}
    for number, (name, (changes, _)) in enumerate(MISTAKES.items()):
        group = dist.new_group(timeout=datetime.timedelta(seconds=SECONDS))
        register(CONFIG, f"muse-{number}", group=group, layout="zigzag")
        model.set_attn_implementation(f"muse-{number}")
        step(model, positions)
        dist.barrier()
        start = time.monotonic()
        try:
            step(model, positions, **(changes if group.rank() else {}))
        except (ValueError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}", time.monotonic() - start
        dist.barrier()  # the other rank still waits
    return told


def test_a_rank_that_stops_says_why_and_the_others_what_they_waited_for():
    first, second = run_ranks(2, make_mistakes)
    for name, (_, message) in MISTAKES.items():
        (waiting, seconds), (mistaken, _) = first[name], second[name]
        assert mistaken.startswith(message), (name, mistaken)
        assert waiting.startswith("RuntimeError: exchange '") and "pending on rank 0 of 2" in waiting, (name, waiting)
        assert "another rank died, hung or left" in waiting and seconds < 2 * SECONDS + 10, (name, waiting)
