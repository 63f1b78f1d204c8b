"""What ranks send, when, and how much of it: overlap, recomputation, the content of the buffers and their sizes."""
import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from muse_dist import ByteCounter, muse_attention, traffic
from muse_dist.comm import Communicator, Pending
from muse_dist.kernels import plain_blocks
from tests.brute import far_blocks, is_near
from tests.brute_ranks import blocks_held
from tests.ranks import run_ranks
from tests.sharded import Case, small, tokens_held

MODES = pytest.mark.parametrize("exchange", ["moments", "kv"])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
POSTS = {"moments": (["halo and sinks", "anchors", "moments"], ["moments gradients", "halo and sinks gradients"]),
         "kv": (["keys and values", "key order"], ["keys and values", "keys and values gradients"])}


@contextlib.contextmanager
def watched():
    """Collects what happens: ("post", exchange), ("wait", exchange), kernels, the near field by whose keys it reads.

    The far field is told apart by what it reads: ("kernel", "opened") has leaves to open, ("kernel", "far") has none.
    """
    events = []

    def note(function, kind, name_of):
        def call(*args):
            events.append((kind, name_of(args)))
            return function(*args)
        return call

    def near(place):  # the own blocks hold the causal diagonal, those of other ranks never do
        return lambda args: "own" if any(diagonal for *_, diagonal in args[place]) else "others"

    def far(place):
        return lambda args: "far" if args[place] is None else "opened"

    kernels = {name: note(getattr(plain_blocks, name), "kernel", lambda _, name=name: name)
               for name in ("moments", "moments_backward")}
    kernels["far_field"] = note(plain_blocks.far_field, "kernel", far(5))
    kernels["far_field_backward"] = note(plain_blocks.far_field_backward, "kernel", far(6))
    kernels["near_field"] = note(plain_blocks.near_field, "near", near(4))
    kernels["near_field_backward"] = note(plain_blocks.near_field_backward, "near", near(7))
    posts = {name: note(getattr(Communicator, name), "post", lambda args: args[1])
             for name in ("all_gather", "all_to_all")}
    with mock.patch.multiple(plain_blocks, **kernels), mock.patch.multiple(Communicator, **posts), \
            mock.patch.object(Pending, "wait", note(Pending.wait, "wait", lambda args: args[0].name)):
        yield events


def events_of_a_step(case):
    """Events of the forward and of the backward."""
    q, k, v, dout = (x.requires_grad_() for x in case.shard())
    found = []
    with watched() as events:
        out = muse_attention(q, k, v, config=case.config, group=dist.group.WORLD, layout=case.layout)
        found.append(list(events))
        events.clear()
        out.backward(dout.detach())
        return *found, events


def posts(events):
    return [name for kind, name in events if kind == "post"]


def assert_hidden(events, name, work):
    """The exchange is posted once, awaited once, and `work` runs in between."""
    assert events.count(("post", name)) == events.count(("wait", name)) == 1, (name, events)
    between = events[events.index(("post", name)):events.index(("wait", name))]
    assert set(work) <= set(between), f"{name} is awaited without {work} since it was posted: {events}"


@LAYOUTS
def test_moments_travel_behind_compute(layout):
    """Halo and anchors behind the own near field, moments behind the halo and the local far field; back likewise."""
    found = run_ranks(3, events_of_a_step, Case(small(), 96, layout))
    for forward, backward in found:
        assert (posts(forward), posts(backward)) == POSTS["moments"]
        for name in ("halo and sinks", "anchors"):
            assert_hidden(forward, name, [("near", "own")])
        assert_hidden(forward, "moments", [("near", "others")])
        assert_hidden(backward, "moments gradients", [("near", "own"), ("near", "others")])
        assert_hidden(backward, "halo and sinks gradients", [("near", "own")])
    if layout == "zigzag":  # every rank has a local far field
        for forward, backward in found:
            assert_hidden(forward, "moments", [("kernel", "opened")])
            assert_hidden(backward, "moments gradients", [("kernel", "opened")])


@LAYOUTS
def test_keys_travel_behind_the_near_field(layout):
    for forward, backward in run_ranks(3, events_of_a_step, Case(small(exchange="kv"), 96, layout)):
        assert (posts(forward), posts(backward)) == POSTS["kv"]
        for name in ("keys and values", "key order"):
            assert_hidden(forward, name, [("near", "own")])
        kinds = [kind for kind, _ in backward]
        assert_hidden(backward, "keys and values", [])
        for name in ("keys and values", "keys and values gradients"):
            between = kinds[backward.index(("post", name)):backward.index(("wait", name))]
            assert {"near", "kernel"} & set(between), f"nothing hides {name}: {backward}"


def with_checkpoints(case):
    """Output, gradients and order of exchanges of two layers: plain, and recomputed in both ways."""
    found = []
    for reentrant in (None, True, False):
        q, k, v, dout = (x.requires_grad_() for x in case.shard())

        def layer(q, k, v):
            return muse_attention(q, k, v, config=case.config, group=dist.group.WORLD, layout=case.layout)

        with watched() as events:
            out = q
            for _ in range(2):
                out = layer(out, k, v) if reentrant is None else checkpoint(layer, out, k, v, use_reentrant=reentrant)
            grads = torch.autograd.grad(out, (q, k, v), dout.detach()) if not reentrant else _grads(out, q, k, v, dout)
        found.append(((out.detach(), *grads), posts(events)))
    return found


def _grads(out, q, k, v, dout):
    """Reentrant checkpoints work with .backward() only."""
    out.backward(dout.detach())
    return q.grad, k.grad, v.grad


@LAYOUTS
@MODES
def test_activation_checkpointing(exchange, layout):
    """Bitwise the same, and the exchanges of the forward run again, in the same order on all ranks."""
    found = run_ranks(3, with_checkpoints, Case(small(exchange=exchange), 48, layout, dtype=torch.float32))
    forward, backward = POSTS[exchange]
    for (plain, order), *recomputed in found:
        assert order == 2 * forward + 2 * backward
        for results, order in recomputed:
            assert all(torch.equal(a, b) for a, b in zip(plain, results))
            assert order == 2 * forward + 2 * (forward + backward)


def gather_single():
    """The collective that gathers into one tensor, under the name it has in this version of torch."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextlib.contextmanager
def wire():
    """Collects what is handed to torch.distributed: (collective, bytes for every rank, bytes received, own share)."""
    sent = []

    def gather(received, send, group, async_op):
        assert received.numel() == group.size() * send.numel()
        sent.append(("all_gather", [send.clone()] * group.size(), received.numel() - send.numel()))
        return gather_single()(received, send, group=group, async_op=async_op)

    def exchange(received, data, receive_sizes, send_sizes, group, async_op):
        assert receive_sizes[group.rank()] == send_sizes[group.rank()] == 0
        assert (sum(receive_sizes), sum(send_sizes)) == (received.numel(), data.numel())
        sent.append(("all_to_all", list(data.clone().split(send_sizes)), received.numel()))
        return dist.all_to_all_single(received, data, receive_sizes, send_sizes, group=group, async_op=async_op)

    with mock.patch("muse_dist.comm.dist") as fake:
        fake.all_gather_single, fake.all_to_all_single = gather, exchange
        fake.all_gather_object = dist.all_gather_object
        fake.GroupMember = dist.GroupMember
        yield sent


def bytes_of_a_step(case):
    """What a step hands to torch.distributed, and what the counter says; this rank's keys and values."""
    counter = ByteCounter()
    with wire() as sent:
        case.step(counter=counter)
    return sent, counter.received, case.shard()[1:3]


def read_exactly(case, ranks, owner, reader):
    """Places in `owner`'s shard that `reader` reads one by one: halo blocks, then sinks."""
    config, blocks = case.config, case.tokens // case.config.block
    mine, theirs = (blocks_held(case.layout, ranks, rank, blocks) for rank in (owner, reader))
    tokens = [j * config.block + i for j in sorted(mine) for i in range(config.block)
              if any(is_near(q, j, config.halo, config.causal) for q in theirs)]
    if 0 in mine and any(0 in far_blocks(q, blocks, config.halo, config.causal) for q in theirs):
        tokens += range(config.sinks * config.leaf)
    places = {int(t): place for place, t in enumerate(tokens_held(case.layout, ranks, owner, case.tokens))}
    return [places[t] for t in tokens]


@LAYOUTS
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "acausal"])
def test_only_halo_and_sinks_leave_their_rank(causal, layout):
    """By value: no number of any other key or value is in any buffer, forward or backward."""
    ranks, case = 3, Case(small(causal=causal, remote_leaf=4, sinks=2), 96, layout, batch=2)
    for owner, (sent, _, (k, v)) in enumerate(run_ranks(ranks, bytes_of_a_step, case)):
        assert [kind for kind, *_ in sent] == ["all_to_all", "all_gather", "all_to_all", "all_to_all", "all_to_all"]
        for reader in set(range(ranks)) - {owner}:
            exact = read_exactly(case, ranks, owner, reader)
            halo = sent[0][1][reader].view(torch.float64)
            want = [x[:, :, exact].flatten() for x in (k, v)]
            assert torch.equal(halo, torch.cat(want)), (owner, reader)
            far = sorted(set(range(k.shape[2])) - set(exact))
            secret = set(torch.cat([k[:, :, far].flatten(), v[:, :, far].flatten()]).tolist())
            for _, parts, _ in sent:
                assert not secret & set(parts[reader].view(torch.float64).tolist())


@MODES
def test_one_collective_for_all_heads_and_sequences(exchange):
    """And buffers of the same sizes at every step, whatever the data."""
    shapes = [(1, 2, 1), (3, 4, 4), (3, 4, 4)]
    cases = [Case(small(exchange=exchange), 48, "zigzag", heads, kv, batch, seed=seed)
             for seed, (batch, heads, kv) in enumerate(shapes)]
    for found in zip(*(run_ranks(3, bytes_of_a_step, case) for case in cases)):
        kinds = [[kind for kind, *_ in sent] for sent, *_ in found]
        assert kinds[0] == kinds[1] == kinds[2] and len(kinds[0]) == len(sum(POSTS[exchange], []))
        small_, *same = [[([x.numel() for x in parts], count) for _, parts, count in sent] for sent, *_ in found]
        assert same[0] == same[1] != small_


def count_bytes(cases):
    found = []
    for case in cases:
        sent, counted, _ = bytes_of_a_step(case)
        found.append((sum(count for *_, count in sent), counted))
    return found


@MODES
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_predicted_traffic_is_what_goes_over_the_wire(ranks, exchange):
    """By exchange, for every rank: what torch.distributed is handed, what the counter says and what is predicted."""
    settings = [{}, {"halo": 0, "sinks": 0, "trace": False, "remote_anchors": 2},
                {"halo": 3, "remote_leaf": 8, "causal": False, "sinks": 3},
                {"halo": 99}]  # nothing is far: no order travels
    cases = [Case(small(exchange=exchange, **changes), 32 * ranks, layout, batch=1 + place % 2, dim=5 + place,
                  heads=4, kv_heads=2 - place % 2,
                  dtype=[torch.float32, torch.bfloat16, torch.float64, torch.float32][place])
             for place, changes in enumerate(settings) for layout in ("contiguous", "zigzag")]
    tiny = small(exchange=exchange, block=2, leaf=1, group=1, anchors=1, remote_leaf=1)
    cases += [Case(tiny, 4 * ranks, layout, heads=2, kv_heads=1, dim=dim, dtype=torch.float16)
              for layout in ("contiguous", "zigzag") for dim in (1, 3)]  # every tensor is padded
    found = run_ranks(ranks, count_bytes, cases)
    for rank, results in enumerate(found):
        for case, (handed, counted) in zip(cases, results, strict=True):
            predicted = getattr(traffic(
                case.config, (case.batch, case.heads, case.kv_heads, case.tokens, case.dim), ranks,
                layout=case.layout, dtype=case.dtype, rank=rank), exchange)
            assert {name: count for name, count in predicted.items() if count} == \
                {name: count for name, count in counted.items() if count}, (rank, case)
            assert handed == sum(counted.values()) == sum(predicted.values())
            assert (handed > 0) == (ranks > 1)
