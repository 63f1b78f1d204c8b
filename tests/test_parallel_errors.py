"""What goes wrong on some ranks is said on all of them, and nothing waits for ever."""
import datetime
import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from muse_dist import muse_attention
from muse_dist.comm import Communicator
from tests.ranks import outcomes, run_ranks
from tests.sharded import Case, small

SECONDS = 5  # timeout of the groups in which ranks die


# The rank that passes other arguments (None: all do), which ones, and what every rank must be told ("a|b": either).
PROBLEMS = {
    "indivisible length": (None, {"tokens": 12}, ["12|36", "multiple of"]),
    "one block for two chunks": (None, {"tokens": 8, "layout": "zigzag"}, ["zigzag", "multiple of 48"]),
    "unknown layout": (None, {"layout": "ring"}, ["layout='ring'", "zigzag"]),
    "one rank with another length": (1, {"tokens": 32}, ["rank 1: ", "32", "same"]),
    "one rank with an indivisible length": (2, {"tokens": 13}, ["rank 2: ", "multiple of"]),
    "one rank with another batch": (0, {"batch": 2}, ["rank 0: ", "same"]),
    "one rank with more heads": (1, {"heads": 4}, ["rank 1: ", "same"]),
    "one rank with more key/value heads": (1, {"kv_heads": 2}, ["rank 1: ", "same"]),
    "one rank with another head dim": (1, {"dim": 6}, ["rank 1: ", "same"]),
    "one rank in fp32": (2, {"dtype": torch.float32}, ["rank 2: ", "float32", "same"]),
    "one rank with keys in fp32": (2, {"k_dtype": torch.float32}, ["rank 2: k: dtype", "cast"]),
    "one rank with integers": (2, {"dtype": torch.int64}, ["rank 2: q: dtype torch.int64"]),
    "one rank with heads that do not divide": (1, {"heads": 3, "kv_heads": 2}, ["rank 1: q: 3 heads"]),
    "one rank with no tensor": (0, {"q": "text"}, ["rank 0: q: must be a tensor"]),
    "one rank with three dimensions": (0, {"q": torch.zeros(2, 3, 4)}, ["rank 0: q: must have 4 dimensions"]),
    "one rank with another config": (1, {"config": small(opened=1)}, ["rank 1: ", "opened=1", "same"]),
    "one rank with another exchange": (1, {"config": small(exchange="kv")}, ["rank 1: ", "'kv'", "same"]),
    "one rank without a config": (1, {"config": None}, ["rank 1: config: must be a MuseConfig"]),
    "one rank with another layout": (1, {"layout": "zigzag"}, ["rank 1: ", "zigzag", "same"]),
    "one rank with another scale": (1, {"scale": 0.3}, ["rank 1: ", "scale=0.3", "same"]),
    "one rank with a wrong scale": (1, {"scale": -1.0}, ["rank 1: scale=-1.0"]),
    "one rank under autocast": (1, {"autocast": True, "dtype": torch.float32, "others": torch.float32}, ["bfloat16"]),
    "one rank with gradients of v alone": (1, {"v_grad": True}, ["rank 1: ", "backward=True", "same"]),
    "one rank with a counter that is none": (1, {"counter": 5}, ["rank 1: counter"]),
    "two different problems": ({0: {"scale": -1.0}, 2: {"config": 3}}, None, ["rank 0: scale", "rank 2: config"]),
}


def short_group(ranks=None):
    """A group that gives up soon. All ranks of the world must call."""
    return dist.new_group(ranks, timeout=datetime.timedelta(seconds=SECONDS))


def call(tokens=16, batch=1, heads=2, kv_heads=1, dim=4, dtype=torch.float64, k_dtype=None, q=None, autocast=False,
         others=None, v_grad=False, group=None, **options):
    """One call with the arguments given; returns "fine", or what was raised."""
    del others
    k = torch.zeros(batch, kv_heads, tokens, dim, dtype=k_dtype or dtype)
    v = k.clone().requires_grad_(v_grad)
    q = torch.zeros(batch, heads, tokens, dim, dtype=dtype) if q is None else q
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            muse_attention(q, k, v, group=group or dist.group.WORLD, **{"config": small(), **options})
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def call_on_members_only():
    """Ranks 0 and 2 share a group; what every rank gets from a call with it, and after how long."""
    group, start = short_group([0, 2]), time.monotonic()
    return call(group=group), time.monotonic() - start


def test_a_process_outside_the_group_is_told_at_once():
    (first, _), (outside, seconds), (last, _) = run_ranks(3, call_on_members_only)
    assert first == last == "fine"
    assert outside.startswith("ValueError: group: this process is not a member") and seconds < 1


def call_alone():
    """Calls in a group of this rank alone: whole blocks, a short last block, and one block for two chunks."""
    group = [short_group([rank]) for rank in range(2)][dist.get_rank()]
    return [call(group=group, **options) for options in ({}, {"tokens": 12}, {"tokens": 8, "layout": "zigzag"})]


def test_a_group_of_one_rank_wants_whole_blocks_too():
    for said in run_ranks(2, call_alone):
        assert said[0] == "fine"
        assert "multiple of 8 tokens" in said[1] and "multiple of 16 tokens" in said[2]


@pytest.mark.parametrize("group", [0, "world", object], ids=["number", "text", "class"])
def test_what_is_no_group(group):
    x = torch.zeros(1, 1, 16, 4)
    with pytest.raises(TypeError, match="group: must be a torch.distributed.ProcessGroup.*new_group"):
        muse_attention(x, x, x, config=small(), group=group)


def call_with_problems(problems):
    """What became of every problem on this rank, then of a call in which all is well, and the seconds of all."""
    said, start, rank, group = [], time.monotonic(), dist.get_rank(), short_group()
    for who, changes, _ in problems:
        if changes is None:
            mine = who.get(rank, {})
        elif who is None or who == rank:
            mine = changes
        else:
            mine = {"dtype": changes["others"]} if "others" in changes else {}
        said.append(call(group=group, **mine))
    return said, call(group=group), time.monotonic() - start


def test_every_rank_hears_of_every_problem():
    """Before the first call that works; afterwards the group works still."""
    found = run_ranks(3, call_with_problems, list(PROBLEMS.values()))
    for rank, (said, after, seconds) in enumerate(found):
        for (name, (_, _, words)), text in zip(PROBLEMS.items(), said, strict=True):
            assert text.startswith("ValueError: "), (name, rank, text)
            for word in words:
                assert any(part in text for part in word.split("|")), (name, rank, text)
        assert after == "fine" and seconds < 30, (rank, after, seconds)


def ends(name, end):
    """A context in which this process ends by `end` in place of posting the exchange called `name`."""
    def instead(post):
        def call(comm, posted, *args):
            if posted == name:
                end()
            return post(comm, posted, *args)
        return call

    return mock.patch.multiple(Communicator, all_gather=instead(Communicator.all_gather),
                               all_to_all=instead(Communicator.all_to_all))


def leave():
    os._exit(1)


def hang():
    time.sleep(120)


def fail_at(case, who, where, end):
    """A step in which rank `who` ends at `where`: in an exchange, or "between" forward and backward, or at the start.

    Returns the error and the seconds from the step's start.
    """
    group = short_group()
    if where != "start":
        case.step(group)  # the ranks have agreed, as in a running job
    dist.barrier(group)
    mine = dist.get_rank() == who
    start = time.monotonic()
    try:
        if where == "start" and mine:
            end()
        with ends(where if mine else None, end):
            q, k, v, dout = (x.requires_grad_() for x in case.shard(group))
            out = muse_attention(q, k, v, config=case.config, group=group, layout=case.layout)
            if where == "between" and mine:
                end()
            out.backward(dout.detach())
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


def assert_others_fail(exchange, who, where, end, layout, limit):
    found = outcomes(3, fail_at, Case(small(exchange=exchange), 48, layout), who, where, end, limit=30, lost=who)
    assert [o.died for o in found] == [rank == who for rank in range(3)], [o.trace for o in found]
    for rank, outcome in enumerate(found):
        if rank != who:
            assert outcome.error is None, outcome.trace
            message, seconds = outcome.value
            assert message.startswith("exchange '") and f"on rank {rank} of 3" in message, message
            assert seconds < limit


DEATHS = [("moments", "halo and sinks", 0), ("moments", "moments", 1), ("moments", "between", 2),
          ("moments", "halo and sinks gradients", 0), ("moments", "start", 1),
          ("kv", "key order", 1), ("kv", "between", 0), ("kv", "keys and values gradients", 2)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("exchange", "where", "who"), DEATHS)
def test_a_rank_that_dies_makes_the_others_fail(exchange, where, who, layout):
    """They say which exchange was pending, and do not wait for the timeout where the connection tells."""
    assert_others_fail(exchange, who, where, leave, layout, SECONDS + 10)


@pytest.mark.parametrize(("exchange", "where", "who"), [("moments", "between", 0), ("kv", "key order", 2)])
def test_a_rank_that_hangs_makes_the_others_fail_within_the_timeout(exchange, where, who):
    assert_others_fail(exchange, who, where, hang, "contiguous", 2 * SECONDS + 10)


def differ_later(changes):
    """After a call that works, one in which rank 1 differs."""
    group = short_group()
    assert call(group=group) == "fine"
    start = time.monotonic()
    try:
        said = call(group=group, **(changes if dist.get_rank() == 1 else {}))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.monotonic() - start


@pytest.mark.parametrize(("changes", "words"), [
    ({"tokens": 32}, ["RuntimeError: exchange '", "on rank 1 of 3", "[1, 2, 32, 4]"]),
    ({"scale": -1.0}, ["ValueError: scale=-1.0: must be finite and positive"]),
], ids=["another length", "a wrong scale"])
def test_a_rank_that_differs_later(changes, words):
    """Ranks agree once a shape. One that differs later ends with the timeout at the latest, and knows why."""
    found = run_ranks(3, differ_later, changes)
    assert all(word in found[1][0] for word in words), found[1][0]
    for rank, (said, seconds) in enumerate(found):
        assert seconds < 2 * SECONDS + 10
        if rank != 1:
            assert said.startswith("RuntimeError: exchange '") and f"on rank {rank} of 3" in said, said
