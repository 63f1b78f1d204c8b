"""The plan's counts against counting itself, its fit against rows of known origin and against measured ones."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch import plan
from launch.config import DataConfig, ModelConfig, RunConfig
from launch.model import build_model
from launch.plan_attention import PRODUCTS, Case, attention_work
from launch.plan_machine import GPUS, Machine, known_machine
from launch.plan_model import Shape, memory
from launch.plan_rates import assumed_rates, fit, fit_with_starts, layer_seconds
from launch.plan_rows import Exchange, fit_links, fit_rates, read_rows, split_rows
from launch.plan_step import (
    fit_steps, known_terms, layer_traffic, other_work, overtakes, predict, scaling_step, setup_of,
)
from muse_dist import MuseConfig, traffic
from muse_dist.kernels import reference
from muse_dist.layout import Layout, chunk_pairs, is_far, is_near
from muse_dist.tree import make_plan

SMALL = MuseConfig(block=32, leaf=8, group=8, anchors=2, remote_leaf=4, opened=3, halo=1, sinks=1)
H200 = known_machine("H200", 8, 50e9)
MODEL = ModelConfig(layers=3, width=64, heads=4, kv_heads=2, mlp=160, vocabulary=300)
RESULTS = Path(__file__).parents[1] / "launch" / "results"


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
    assert found == 2 * PRODUCTS["choice"][0] * dim * anchors * reference.PROBES * leaves * size


def small_model():
    config = RunConfig("small", model=MODEL, data=DataConfig(context=128), muse=SMALL)
    return build_model(config, torch.device("cpu"))


@pytest.mark.parametrize("recompute", [False, True])
def test_parameters_and_operations_are_those_of_the_model(recompute):
    model, shape, tokens = small_model(), Shape.of(MODEL), torch.arange(128)[None]
    assert shape.parameters == model.num_parameters()
    model.set_attn_implementation("eager")
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
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
    one = memory(shape, None, 512, world=1, sharded=False, recompute=False)
    many = memory(shape, None, 512, world=8, sharded=True, recompute=True)
    assert one.state == 16 * shape.parameters and many.state == one.state / 8
    assert many.activations < one.activations
    assert one.total == one.state + one.copies + one.activations + one.logits
    longer = memory(shape, None, 1024, world=1, sharded=False, recompute=False)
    assert longer.activations == 2 * one.activations


# ---------------------------------------------------------------------------------------------------------------- fit


def true_rates():
    """Rates that are not the assumed ones."""
    rates, rng = assumed_rates(H200), np.random.default_rng(1)

    def other(table):
        return {name: value * rng.uniform(0.4, 2.5) for name, value in sorted(table.items())}

    return replace(rates, forward=other(rates.forward), backward=other(rates.backward), step=other(rates.step),
                   hidden=0.5)


def layer_row(case, rates, noise, **more):
    forward, backward = (seconds * noise() for seconds in layer_seconds(case, rates))
    return {"benchmark": "attention", "variant": "flash" if case.muse is None else "muse", "heads": case.heads,
            "kv_heads": case.kv_heads, "dim": case.dim, "tokens": case.tokens, "causal": True, "ranks": 1,
            "layout": "contiguous", "device": "NVIDIA H200", "check": {"passed": True},
            "config": None if case.muse is None else json.loads(case.muse.encoded),
            "forward": {"median": forward}, "backward": {"median": backward}, **more}


def made_rows(noise):
    """Rows as the benchmarks write them, of a GPU whose rates are `true_rates`."""
    rates = true_rates()
    settings = [None, MuseConfig.fast(), MuseConfig.accurate(), MuseConfig()]
    rows = [layer_row(Case(16, heads, 64, tokens, muse), rates, noise) for muse in settings
            for tokens in (16384, 32768, 65536, 131072, 262144) for heads in (16, 4)]
    rows += [layer_row(Case(16, 16, 64, 65536, MuseConfig.fast()), rates, lambda: 9.0, **bad) for bad in (
        {"failed": "out of memory"}, {"check": {"passed": False}}, {"causal": False}, {"device": "NVIDIA A100"})]
    for layers, width in ((12, 768), (24, 1024), (16, 2048)):
        for context in (16384, 65536, 131072):
            for attention in ("muse", "exact"):
                rows.append(step_row(layers, width, context, attention, rates, noise))
    return rows


def step_row(layers, width, context, attention, rates, noise):
    model = {"layers": layers, "width": width, "heads": width // 64, "kv_heads": width // 64, "mlp": 3 * width,
             "rope_theta": 1e4, "vocabulary": 0}
    train = {"batch": 2, "micro_batch": 1, "recompute": width > 1000, "context_parallel": 0}
    row = {"benchmark": "scaling", "model": f"{layers}x{width}", "attention": attention, "context": context, "ranks": 1,
           "vocabulary": 50304, "device": "NVIDIA H200", "memory_bytes": 10 ** 10,
           "config": {"model": model, "train": train, "data": {"context": context},
                      "muse": json.loads(MuseConfig.fast().encoded)}}
    setup = scaling_step({**row, "seconds": 1.0}).setup
    return {**row, "seconds": predict(setup, H200, rates).seconds * noise()}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fit_finds_the_rates_behind_the_rows(tmp_path):
    rows = read_rows([write_rows(tmp_path / "rows.jsonl", made_rows(lambda: 1.0))], "H200")
    assert len(rows.layers) == 40 and len(rows.steps) == 18
    wanted = true_rates()
    machine, rates = fit_rates(H200, rows, 64)
    for tokens in (24576, 524288):  # between the rows, and beyond them
        for muse in (None, MuseConfig.fast(), MuseConfig.accurate(halo=1, opened=20)):
            case = Case(16, 8, 64, tokens, muse)
            assert layer_seconds(case, rates) == pytest.approx(layer_seconds(case, wanted), rel=0.02)
    rates = fit_steps(machine, rates, rows.steps)
    for step in rows.steps:
        assert predict(step.setup, machine, rates).seconds == pytest.approx(step.seconds, rel=0.02)
        assert step.memory == 10 ** 10 and step.engine == "torch"


def deepspeed_row(tokens, attention, ranks, **more):
    """As `launch.bench step` writes it."""
    return {"attention": attention, "ranks": ranks, "device": "cuda", "config": "configs/1b.toml",
            "changes": {"data.context": tokens, "muse.block": 2048}, "stage": 1, "recompute": True, "tokens": tokens,
            "step_seconds": 1.0, "memory_gib": 10.0, "processor": "NVIDIA H200", **more}


def test_steps_of_deepspeed_have_a_fit_of_their_own(tmp_path):
    made = [deepspeed_row(tokens, attention, ranks) for tokens in (65536, 131072) for ranks in (2, 4)
            for attention in ("moments", "kv", "torch-cp", "ulysses")]
    made.append({key: value for key, value in deepspeed_row(65536, "kv", 2, error="out of memory").items()
                 if key not in ("step_seconds", "processor")})
    steps = read_rows([write_rows(tmp_path / "rows.jsonl", made)], "H200").steps
    assert len(steps) == 12, "ulysses is not planned"
    assert {(step.setup.exact, step.setup.muse.exchange) for step in steps} == {
        (False, "moments"), (False, "kv"), (True, "moments")}
    assert all(step.setup.batch == 1 and step.setup.cp == step.setup.world and step.setup.recompute for step in steps)
    true = replace(assumed_rates(H200), step=true_rates().step)
    timed = [replace(step, seconds=predict(step.setup, H200, true).seconds) for step in steps]
    rates = fit_steps(H200, assumed_rates(H200), timed)
    for step in timed:
        assert predict(step.setup, H200, rates).seconds == pytest.approx(step.seconds, rel=0.02)
    mixed = [*timed, replace(timed[0], engine="torch")]
    assert fit_steps(H200, assumed_rates(H200), mixed).rows["steps"] == 1, "launch.train's own come first"


def test_graphs_count_only_where_there_is_nothing_else(tmp_path):
    case = Case(16, 16, 64, 65536, MuseConfig.fast())
    rows = [layer_row(case, true_rates(), lambda: 1.0, graphs=captured) for captured in (False, True)]
    both = read_rows([write_rows(tmp_path / "both.jsonl", rows)], "H200").layers
    assert [layer.graph for layer in both] == [False]
    assert [layer.graph for layer in read_rows([write_rows(tmp_path / "one.jsonl", rows[1:])], "H200").layers] == [True]


def test_error_of_rows_held_out_is_what_they_scatter(tmp_path):
    rng = np.random.default_rng(0)
    path = write_rows(tmp_path / "rows.jsonl", made_rows(lambda: rng.uniform(0.95, 1.05)))
    errors = plan.held_out_errors(H200, read_rows([path], "H200"))
    assert len(errors["layers"]) == 16 and len(errors["steps"]) == 6
    for found in errors.values():
        assert 0.0 < np.abs(found).max() < 0.12
    text = plan.calibration_text(H200, read_rows([path], "H200"), 64)
    assert "fitted to 40 layers" in text and "held out: median" in text
    assert "no exchange was measured: the links' speeds are assumed" in text and "no step was" not in text
    assert "none has this model's head dim of 128" in plan.calibration_text(H200, read_rows([path], "H200"), 128)


def test_rows_held_out_are_of_every_kind(tmp_path):
    rows = read_rows([write_rows(tmp_path / "rows.jsonl", made_rows(lambda: 1.0))], "H200")
    kept, held = split_rows(rows)
    for whole, parts in ((rows.layers, (kept.layers, held.layers)), (rows.steps, (kept.steps, held.steps))):
        assert len(whole) == sum(map(len, parts)) and all(one in parts[0] or one in parts[1] for one in whole)
    assert {layer.case.muse for layer in held.layers} == {layer.case.muse for layer in rows.layers}
    assert {layer.case.muse for layer in kept.layers} == {layer.case.muse for layer in rows.layers}
    assert kept.exchanges == rows.exchanges


def test_fit_is_never_negative_and_leaves_unseen_stages_alone():
    known = {"a": 1.0, "b": 1.0, "c": 5.0}
    found = fit([{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 4.0, "b": 1.0}], [1.0, 2.1, 4.1], known)
    assert found["b"] >= 0 and found["a"] == pytest.approx(1.0, rel=0.05) and found["c"] == 5.0
    down = fit([{"a": n, "b": 1.0} for n in (1.0, 2.0, 4.0)], [1.0, 2.3, 5.0], known)  # a line with a negative start
    assert down["b"] == 0.0 and down["a"] == pytest.approx(1.15, rel=0.05)


def test_rows_that_wait_for_the_host_are_told_from_those_that_compute():
    """Times are the longer of 3 ms and the work, or, of another kind, of 1 ms and the work."""
    work = [{"a": amount, "b": 1.0} for amount in (1.0, 2.0, 4.0, 8.0, 16.0)] * 2
    starts, known = ["start"] * 5 + ["start exact"] * 5, {"a": 1e-3, "b": 1e-3, "start": 1e-4, "start exact": 1e-4}
    true = {"start": 3e-3, "start exact": 1e-3}
    seconds = [max(true[start], 0.5e-3 * one["a"] + 0.2e-3) for one, start in zip(work, starts)]
    found = fit_with_starts(work, starts, seconds, known)
    assert found["start"] == pytest.approx(3e-3, rel=0.01) and found["start exact"] == pytest.approx(1e-3, rel=0.01)
    assert found["a"] == pytest.approx(0.5e-3, rel=0.02) and found["b"] == pytest.approx(0.2e-3, rel=0.1)
    found = fit_with_starts(work[3:5], starts[3:5], seconds[3:5], {**known, "start": 9.0})
    assert found["start"] <= min(seconds[3:5]), "nothing waits for longer than it takes"


def test_a_step_waits_for_the_host_only_where_that_takes_longer():
    rates, short = assumed_rates(H200), large()(1, context=4096, batch=1)
    slow = {name: {**table, "start": 1.0} for name, table in (("forward", rates.forward), ("backward", rates.backward))}
    assert predict(large()(1), H200, rates).terms["waiting for the host"] == 0.0
    waits = predict(short, H200, replace(rates, **slow))
    assert waits.seconds == pytest.approx(16 * (2 + 1)) and waits.binds == "waiting for the host"


def test_links_are_read_from_exchanges_alone():
    exchanges = [Exchange(size, 50e-6 + size / 2e11) for size in (1e5, 1e6, 1e7, 1e8, 1e9)]
    machine = fit_links(H200, exchanges)
    assert machine.start == pytest.approx(50e-6, rel=0.02) and machine.intra == pytest.approx(2e11, rel=0.02)
    assert machine.inter == H200.inter
    assert fit_links(H200, []) == H200


def test_rows_that_are_none_name_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"benchmark": "other"}\n{"bench')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: is no JSON"):
        read_rows([path], "H200")


@pytest.mark.parametrize("device", [*GPUS, "CPU"])
def test_measured_rows_held_out_are_predicted_within_a_fifth(device):
    """Against what launch.bench and launch.scaling measured on real devices."""
    rows = read_rows([RESULTS], device)
    machine = known_machine(device, 8, 50e9) if device in GPUS else Machine("CPU", 5e10, 1e10, 1e10, 1e9, 1e9)
    errors = plan.held_out_errors(machine, rows)
    if not errors:
        pytest.skip(f"launch/results has no rows of launch.bench attention, exchange or scaling measured on {device}")
    for kind, found in errors.items():
        assert np.abs(found).max() < 0.2, (kind, found)


# --------------------------------------------------------------------------------------------------------------- plans


def large(**changes):
    config = RunConfig.from_toml("configs/1b.toml", changes=changes)
    return lambda world, exact=False, **more: setup_of(config, world, exact=exact, **more)


def test_exchange_time_follows_the_slowest_link():
    machine = Machine("m", 1e15, 1e12, 1e11, intra=100e9, inter=10e9, per_node=4, start=0.0)
    assert machine.exchange_seconds(7e9, 1) == 0.0
    assert machine.exchange_seconds(3e9, 4) == pytest.approx(0.03)
    assert machine.exchange_seconds(7e9, 8) == pytest.approx(4e9 / 10e9)  # four of the seven others are outside
    assert machine.ring_seconds(3e9, 4) == pytest.approx(0.03)
    assert machine.ring_seconds(3e9, 8) == pytest.approx(0.3)
    assert replace(machine, start=1e-3).ring_seconds(0, 2, 5) == pytest.approx(5e-3)


def test_traffic_is_that_of_the_layer():
    setup = large()(4)
    found = traffic(setup.muse, (1, 32, 8, 65536, 64), 4)
    forward, backward = layer_traffic(setup)
    again = sum(count for name, count in found.moments.items() if "gradients" not in name)
    assert forward + backward == sum(found.moments.values()) + again, "recomputation sends it again"
    assert sum(layer_traffic(replace(setup, recompute=False))) == sum(found.moments.values())
    exact = replace(setup, exact=True, recompute=False)
    assert sum(layer_traffic(exact)) == found.kv["keys and values"] + found.kv["keys and values gradients"]
    assert predict(setup, H200, assumed_rates(H200)).received["context"] == 8 * 16 * (forward + backward)


def test_terms_add_up_and_change_with_what_they_depend_on():
    setup, rates = large()(8), assumed_rates(H200)
    one = predict(setup, H200, rates)
    assert one.seconds == pytest.approx(sum(one.terms.values()))
    assert one.terms[one.binds] == max(one.terms.values())
    assert one.tokens_per_second == pytest.approx(8 * 65536 / one.seconds)
    slow = predict(setup, replace(H200, intra=H200.intra / 100), rates)
    assert slow.terms["context exchange"] > 50 * one.terms["context exchange"] - 1
    assert slow.terms["dense"] == one.terms["dense"]
    hidden = predict(setup, H200, replace(rates, hidden=0.9))
    assert hidden.terms["context exchange"] == pytest.approx(0.1 * one.terms["context exchange"], rel=1e-6)
    assert known_terms(large()(1), H200, rates).keys() >= {"near field", "far field", "moments", "choice"}
    assert "context exchange" not in known_terms(large()(1), H200, rates)
    two = large(**{"train.context_parallel": 4})
    assert other_work(two(8))["dense"] == other_work(two(4))["dense"] / 2, "another set of GPUs halves the work"


def test_muse_overtakes_exact_attention_where_its_steps_become_shorter():
    setup, rates = large()(1), assumed_rates(H200)
    layer, step = overtakes(setup, H200, rates)
    assert layer and step
    for context, faster in ((step, True), (step // 2, False)):
        muse, exact = (predict(replace(setup, context=context, exact=exact), H200, rates).seconds
                       for exact in (False, True))
        assert (muse < exact) == faster
    dear = replace(rates, forward={**rates.forward, "near field": 1.0})
    assert overtakes(setup, H200, dear) == (None, None)


def test_command_prints_a_plan_and_writes_rows(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", made_rows(lambda: 1.0))
    out = tmp_path / "plan.jsonl"
    assert plan.main(["--config", "configs/1b.toml", "--nodes", "1", "4", "--context", "65536", "--rows", str(rows),
                      "--context-parallel", "8", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "fitted to 40 layers" in text and "MuSe is faster than exact attention: the layer from" in text
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["ranks"], row["attention"]) for row in found] == [(8, "muse"), (8, "exact"), (32, "muse"),
                                                                   (32, "exact")]
    assert all(row["seconds"] == pytest.approx(sum(row["terms"].values())) for row in found)
    assert plan.main(["--config", "configs/1b.toml", "--nodes", "1", "--rows"]) == 0
    assert "no measured rows" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--set", "model.vocabulary=0"], "model.vocabulary=0 takes the size from the data"),
    (["--context", "65000"], "do not make whole blocks"),
    (["--context-parallel", "3"], "must divide"),
    (["--inter", "0"], "inter=0.0 of H200 must be positive"),
    (["--rows", "missing.jsonl"], "missing.jsonl"),
])
def test_command_names_what_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(["--config", "configs/1b.toml", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
