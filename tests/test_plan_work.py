"""The plan's counts of operations, bytes and parameters against counting itself."""
import functools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.config import DataConfig, ModelConfig, RunConfig
from launch.model import build_model, recompute_activations
from launch.plan_attention import PRODUCTS, Case, attention_work
from launch.plan_model import Shape, memory
from muse_dist import MuseConfig, flops
from muse_dist.kernels import reference
from muse_dist.kernels.limits import PROBES
from muse_dist.layout import Layout, chunk_pairs, is_far, is_near
from muse_dist.tree import make_plan

SMALL = MuseConfig(block=32, leaf=8, group=8, anchors=2, remote_leaf=4, opened=3, halo=1, sinks=1)
MODEL = ModelConfig(layers=3, width=64, heads=4, kv_heads=2, mlp=160, vocabulary=300)


def pairs_of(case):
    """Pairs of the forward by stage, as the plan counts them."""
    work = attention_work(case).forward
    return {stage: work[stage] / (2 * PRODUCTS[stage][0] * case.dim) for stage in PRODUCTS if stage in work}


def enumerated(case, rank):
    """The same, block pair by block pair."""
    config, split = case.muse, Layout(case.layout, case.ranks, case.tokens, case.muse.block)
    mine, count = set(split.blocks_of(rank)), split.chunks * split.chunk_blocks
    here = set(range(count)) if config.exchange == "kv" else mine
    found = dict.fromkeys(("near field", "opened leaves", "far field", "moments", "remote moments", "choice"), 0)
    for i in mine:
        far = [j for j in range(count) if is_far(i, j, config)]
        rows, keys = case.heads * config.block, sum(config.block for j in far if j in here)
        found["near field"] += sum(rows * config.block * (0.5 if i == j else 1)
                                   for j in range(count) if is_near(i, j, config))
        found["far field"] += rows * sum(config.block // (config.leaf if j in here else config.remote_leaf)
                                         for j in far)
        candidates = keys // config.leaf - (config.sinks if 0 in far and 0 in here else 0)
        found["opened leaves"] += rows * config.leaf * (
            min(config.opened, candidates) + (config.sinks if far else 0))
        found["moments"] += case.kv_heads * config.anchors * keys
        found["choice"] += rows // config.group * 4 * keys
    if config.exchange == "moments":
        sent = sum(len(chunk_pairs(split, rank, other, config)) for other in range(case.ranks))
        found["remote moments"] = case.kv_heads * config.remote_anchors * sent * split.chunk_blocks * config.block
    return found


@pytest.mark.parametrize("exchange", ["moments", "kv"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("halo", [0, 1, 2])
def test_pairs_are_those_of_the_blocks(exchange, layout, ranks, halo):
    config = replace(SMALL, exchange=exchange, halo=halo)
    case = Case(4, 2, 16, 512, config, ranks, layout)
    all_ranks = [enumerated(case, rank) for rank in range(ranks)]
    found = pairs_of(case)
    assert any(found == {stage: n for stage, n in wanted.items() if n} for wanted in all_ranks)
    busiest = max(sum(wanted.values()) for wanted in all_ranks)
    assert sum(found.values()) == pytest.approx(busiest, rel=0.1), "not one of the busiest ranks"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_exact_pairs_are_half_the_square(layout):
    assert pairs_of(Case(3, 1, 8, 1000)) == {"exact": 3 * 1000 * 1000 / 2}
    last = pairs_of(Case(3, 1, 8, 1000, ranks=4, layout=layout))["exact"]
    assert last == 3 * 1e6 / 2 / 4 if layout == "zigzag" else last == 3 * 250 ** 2 * 3.5


def test_opened_pairs_are_those_the_method_opens():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 2, 256, 16), torch.randn(1, 2, 256, 16)
    opened = (make_plan(q, k, SMALL, 0.25).opened >= 0).sum().item()
    case = Case(4, 2, 16, 256, SMALL)
    assert pairs_of(case)["opened leaves"] == opened * SMALL.group * SMALL.leaf


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return counter.get_total_flops(), result


def test_products_of_a_pair_are_those_of_the_reference():
    torch.manual_seed(0)
    dim, rows, leaves, size, anchors = 64, 24, 6, 8, 2
    q, k, v = torch.randn(1, 1, 1, rows, dim), torch.randn(1, 1, 16, dim), torch.randn(1, 1, 16, dim)
    unmasked = [(0, 0, False)]
    forward, (out, lse) = counted(reference.near_field, q, k, v, 0.1, unmasked, 32)
    backward, _ = counted(reference.near_field_backward, q, q, k, v, out, lse, 0.1, unmasked, 32)
    assert (forward, backward) == tuple(2 * n * dim * rows * 16 for n in PRODUCTS["near field"])

    anchor, leaf_k = torch.randn(anchors, dim), torch.randn(leaves, size, dim)
    forward, leaf = counted(reference.moments, anchor, leaf_k, leaf_k, 0.1)
    backward, _ = counted(reference.moments_backward, leaf, anchor, leaf_k, leaf_k, leaf, 0.1)
    pairs = anchors * leaves * size
    assert forward == pytest.approx(2 * PRODUCTS["moments"][0] * dim * pairs, rel=0.01)
    assert backward == pytest.approx(2 * PRODUCTS["remote moments"][1] * dim * pairs, rel=0.01)
    assert forward + backward == pytest.approx(2 * PRODUCTS["moments"][1] * dim * pairs, rel=0.01)

    grouped = torch.randn(anchors, 12, dim)  # one group an anchor
    forward, (out, lse) = counted(reference.far_field, grouped, anchor, leaf, None, 0.1, False)
    backward, _ = counted(reference.far_field_backward, out, grouped, anchor, leaf, None, lse, lse, 0.1, False)
    assert (forward, backward) == tuple(2 * n * dim * anchors * 12 * leaves for n in PRODUCTS["far field"])

    choice = torch.tensor([[0, 1], [2, 3]])
    forward, (out, lse) = counted(reference.opened_leaves, grouped, leaf_k, leaf_k, choice, 0.1)
    backward, _ = counted(reference.opened_leaves_backward, out, grouped, leaf_k, leaf_k, choice, lse, lse, 0.1)
    assert (forward, backward) == tuple(2 * n * dim * anchors * 12 * 2 * size for n in PRODUCTS["opened leaves"])

    found, _ = counted(reference.open_leaves, grouped, leaf_k, torch.ones(leaves, dtype=torch.bool), 2, 0, 0.1)
    assert found == 2 * PRODUCTS["choice"][0] * dim * anchors * PROBES * leaves * size


def small_model():
    config = RunConfig("small", model=MODEL, data=DataConfig(context=128), muse=SMALL)
    return build_model(config, torch.device("cpu"))


@pytest.mark.parametrize("recompute", [False, True])
def test_parameters_and_operations_are_those_of_the_model(recompute):
    model, shape, tokens = small_model(), Shape.of(MODEL), torch.arange(128)[None]
    assert shape.parameters == model.num_parameters()
    model.set_attn_implementation("eager")
    if recompute:
        recompute_activations(model)
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    found = counter.get_flop_counts()["Global"]
    matrices = sum(found.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert matrices == shape.step_flops(128, 128, recompute)
    if not recompute:  # eager attention reads the whole square, and keeps its weights for the backward
        case = Case(MODEL.heads, MODEL.kv_heads, shape.dim, 128)
        whole = 2 * 2 * shape.dim * MODEL.heads * 128 ** 2 * 3 * MODEL.layers
        assert found[torch.ops.aten.bmm] == pytest.approx(whole, rel=0.01)
        assert attention_work(case).forward["exact"] == whole / 3 / MODEL.layers / 2


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, width=128, heads=2, kv_heads=1, mlp=192)])
def test_bytes_kept_by_a_layer_are_those_autograd_keeps(model):
    """Two models that differ by a layer: what one more keeps, under the autocast of training."""
    kept = []
    for layers in (1, 2):
        shaped = replace(model, layers=layers)
        config = RunConfig("small", model=shaped, data=DataConfig(context=512), muse=SMALL)
        llama = build_model(config, torch.device("cpu"))
        llama.set_attn_implementation("sdpa")
        weights = {p.shape for p in llama.parameters()} | {p.mT.shape for p in llama.parameters() if p.dim() == 2}
        seen = {}

        def keep(x, seen=seen, weights=weights):
            if x.shape not in weights:
                seen[x.untyped_storage().data_ptr()] = x
            return x

        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16)):
            hidden = llama.model(torch.randint(300, (1, 512))).last_hidden_state
        kept.append(sum(x.untyped_storage().nbytes() for x in seen.values()))
        del hidden
    assert (kept[1] - kept[0]) / 512 == pytest.approx(Shape.of(model).layer_bytes(None), rel=0.01)


def test_memory_shards_the_state_and_recomputes_the_rest():
    shape = Shape.of(MODEL)
    found = functools.partial(memory, shape, None)
    one = found(512, world=1, scheme="whole", recompute=False, passes=2)
    many = found(512, world=8, scheme="sharded", recompute=True, passes=2)
    assert one.state == 16 * shape.parameters and many.state == one.state / 8
    assert many.activations < one.activations
    assert one.total == one.state + one.copies + one.activations + one.logits
    longer = found(1024, world=1, scheme="whole", recompute=False, passes=2)
    assert longer.activations == 2 * one.activations
    # At the loss of a single pass there are no gradients; in a recomputed layer's backward there are no logits.
    assert found(512, world=1, scheme="whole", recompute=False).state == 12 * shape.parameters
    late = found(65536, world=1, scheme="whole", recompute=True)
    assert late.state == 16 * shape.parameters and late.logits == 0


def test_graphs_copy_and_ranks_exchange():
    """On one device the choice takes q and k, the attention q, k, v, and gives out; the backward dq, dk, dv too."""
    recorded = replace(SMALL, cuda_graphs=True)
    bytes_of = {"q": 2 * 8 * 4 * 6 * SMALL.block, "k": 2 * 8 * 2 * 6 * SMALL.block}
    moved = [2 * (3 * bytes_of["q"] + 3 * bytes_of["k"]), 2 * (4 * bytes_of["q"] + 4 * bytes_of["k"])]
    alone = attention_work(Case(4, 2, 8, 6 * SMALL.block, recorded))
    assert [alone.forward["copies"], alone.backward["copies"]] == moved and "stops" not in alone.forward
    assert "copies" not in attention_work(Case(4, 2, 8, 6 * SMALL.block, SMALL)).forward
    for muse, wanted in ((replace(SMALL, exchange="moments"), (3, 2)), (replace(SMALL, exchange="kv"), (2, 2)),
                         (None, (1, 2))):
        work = attention_work(Case(4, 2, 8, 8 * SMALL.block, muse, 2))
        assert (work.forward["stops"], work.backward["stops"]) == wanted
    ranks = attention_work(Case(4, 2, 8, 12 * SMALL.block, recorded, 2))
    assert ranks.forward["copies"] == moved[0] * 2 / 3 and ranks.backward["copies"] == moved[1]


@pytest.mark.parametrize("changes", [{}, {"tolerance": 0.1}, {"tolerance": 0.1, "halo": 5}, {"opened": 0}], ids=str)
def test_one_device_does_what_the_operators_count(changes):
    """Of whole blocks; the moments that a choice is made by, too, and nothing where nothing is far."""
    config = replace(SMALL, **changes)
    work = attention_work(Case(4, 2, 8, 6 * config.block, config))
    q, k = (1, 4, 6 * config.block, 8), (1, 2, 6 * config.block, 8)
    order = (1,) if config.halo < 5 else (0,)
    wanted = flops.attend_flops(q, k, k, order, order, order, order, 1.0, config.encoded)
    wanted += flops.plan_flops(q, k, 1.0, config.encoded)
    assert sum(n for stage, n in work.forward.items() if stage != "ordering") == pytest.approx(wanted)
