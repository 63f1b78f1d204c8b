"""The plan's fit against rows of known origin and against measured ones."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch import plan
from launch.plan_attention import Case
from launch.plan_fit import fit_steps
from launch.plan_machine import GPUS, Machine, known_machine
from launch.plan_rates import assumed_rates, fit, fit_with_starts, layer_seconds
from launch.plan_rows import Exchange, Rows, fit_links, fit_rates, read_rows, split_rows
from launch.plan_step import predict
from muse_dist import MuseConfig
from tests.plan_rows import H200, layer_row, made_rows, sweep_rows, true_rates, write_rows

RESULTS = Path(__file__).parents[1] / "launch" / "results"


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
    assert fit_steps(H200, assumed_rates(H200), mixed, "deepspeed").rows["steps"] == len(timed), "unless asked for"
    assert fit_steps(H200, assumed_rates(H200), [replace(timed[0], engine="other")]) == assumed_rates(H200)
    errors = plan.held_out_errors(H200, Rows([], [], [], [*timed, replace(timed[0], engine="torch")]))
    assert errors.keys() == {"deepspeed steps"} and np.abs(errors["deepspeed steps"]).max() < 0.02


def test_rows_are_of_one_node_however_small_the_nodes_planned_are(tmp_path):
    rows = read_rows([write_rows(tmp_path / "rows.jsonl", sweep_rows(lambda: 1.0, slow_host()))], "H200")
    assert {step.setup.world for step in rows.steps} >= {1, 2}
    small = replace(H200, per_node=1, inter=1e9)
    assert plan.held_out_errors(small, rows)["steps"] == pytest.approx(plan.held_out_errors(H200, rows)["steps"])
    machine, rates = plan.calibrated(small, rows, 64)
    assert rates == plan.calibrated(H200, rows, 64)[1] and machine.per_node == 1


def test_the_error_is_said_of_the_engine_that_is_planned(tmp_path):
    made = [*made_rows(lambda: 1.0), *(deepspeed_row(tokens, "kv", 2) for tokens in (65536, 131072))]
    rows = read_rows([write_rows(tmp_path / "rows.jsonl", made)], "H200")
    assert "engine" not in plan.calibration_text(H200, rows, 64)
    assert "error of 2 deepspeed steps, too few alike to hold any out" in plan.calibration_text(
        H200, rows, 64, "deepspeed")
    assert "none of these steps is of megatron: those of another" in plan.calibration_text(H200, rows, 64, "megatron")


def test_rows_of_every_engine_are_read(tmp_path):
    row = made_rows(lambda: 1.0)[-1]

    def of(engine, stage):
        config = {**row["config"], "train": {**row["config"]["train"], "engine": engine}, "deepspeed": {"stage": stage}}
        return {**row, "config": config}

    path = write_rows(tmp_path / "rows.jsonl", [of("torch", 2), of("megatron", 2), of("deepspeed", 1),
                                                of("deepspeed", 3)])
    found = [(step.engine, step.setup.scheme) for step in read_rows([path], "H200").steps]
    assert sorted(found) == [
        ("deepspeed", "whole"), ("deepspeed", "zero1"), ("megatron", "megatron"), ("torch", "whole")]


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


def slow_host(ranks=4.0, host=3.0):
    """Assumed rates, but for what the host takes to start kernels."""
    rates = true_rates()
    return replace(rates, hidden=0.0, host=host * rates.host, forward={
        **rates.forward, "start ranks": ranks * rates.forward["start ranks"]}, backward={
        **rates.backward, "start ranks": ranks * rates.backward["start ranks"]})


@pytest.mark.parametrize("ranks, host", [(4.0, 3.0), (1.0, 1.0), (0.5, 6.0)])
def test_what_the_host_takes_is_found_in_steps(tmp_path, ranks, host):
    rng = np.random.default_rng(0)
    made = sweep_rows(lambda: rng.uniform(0.97, 1.03), slow_host(ranks, host))
    rows = read_rows([write_rows(tmp_path / "rows.jsonl", made)], "H200")
    assert len(rows.steps) == 36
    machine, rates = plan.calibrated(H200, rows, 64)
    waiting = 0
    for step in rows.steps:
        found = predict(step.setup, machine, rates)
        waiting += found.terms["waiting for the host"] > 0.1 * found.seconds
        assert found.seconds == pytest.approx(step.seconds, rel=0.2), step.setup
    assert waiting >= 3, "this test is about the host"
    errors = plan.held_out_errors(H200, rows)
    assert len(errors["steps"]) == 12 and np.abs(errors["steps"]).max() < 0.2
    kept, held = split_rows(rows)
    assert {step.setup.world for step in held.steps} == {2} and not any(step.setup.world == 2 for step in kept.steps)


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
    _, rates = plan.calibrated(machine, rows, 64)
    assert rates.step["dense"] > 1 / machine.peak and rates.step["elementwise"] > 1 / machine.memory_speed
    memory = plan.memory_errors(machine, rows)
    assert not len(memory) or np.abs(memory).max() < 0.2, memory
