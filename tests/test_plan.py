"""Predictions of a step, and the command that prints them."""
import json
from dataclasses import replace

import pytest

from launch import plan
from launch.config import RunConfig
from launch.plan_machine import Machine, known_gpu
from launch.plan_rates import assumed_rates
from launch.plan_rows import read_rows
from launch.plan_step import known_terms, layer_traffic, other_work, overtakes, predict, setup_of
from muse_dist import traffic
from tests.plan_rows import H200, made_rows, write_rows


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


def test_gpus_are_told_apart_by_whole_words(tmp_path):
    assert known_gpu("NVIDIA H200") == known_gpu("NVIDIA H200 NVL") == "H200"
    assert known_gpu("NVIDIA A100-SXM4-80GB") == "A100"
    assert known_gpu("NVIDIA GH200 480GB") is None and known_gpu("NVIDIA GB200") is None
    rows = made_rows(lambda: 1.0)
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "device": "NVIDIA GH200 480GB"} for row in rows])
    assert len(read_rows([path], "H200")) == 0


def test_an_engine_is_planned_as_it_splits_the_model():
    zero = {"train.shard": False, "train.engine": "deepspeed", "deepspeed.stage": 3}
    assert large(**zero)(4) == large()(4), "the file shards with PyTorch"
    assert large(**{"train.shard": False})(4).scheme == large(**zero)(1).scheme == "whole"
    found = {}
    for engine, stage in (("torch", 2), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("megatron", 2)):
        setup = large(**{**zero, "train.engine": engine, "deepspeed.stage": stage})(4)
        one = predict(setup, H200, assumed_rates(H200))
        found[setup.scheme] = [one.memory.state / setup.shape.parameters,
                               one.received["weights and gradients"] / setup.shape.parameters / (3 / 4)]
        assert one.terms["optimizer"] == pytest.approx(
            (1 if engine == "torch" else 1 / 4) * predict(large()(1), H200, assumed_rates(H200)).terms["optimizer"])
    passes = large()(4).passes
    # Bytes of a parameter: weights 4 (Megatron 2), gradients 4, AdamW's moments 8, and an fp32 copy to update.
    assert found == {"whole": [16, 8], "zero1": [4 + 4 + 12 / 4, 4 + 4], "zero2": [4 + (4 + 12) / 4, 4 + 4],
                     "sharded": [16 / 4, 4 * passes + 4], "megatron": [2 + 4 + 12 / 4, 2 + 4]}


def test_weights_that_only_the_optimizer_splits_travel_after_it():
    """ZeRO 1 sends as many bytes as sums of gradients do, but half of them with nothing to hide behind."""
    rates = assumed_rates(H200)
    one, other = (predict(large(**{"train.shard": False, "train.engine": engine})(4), H200, rates)
                  for engine in ("torch", "deepspeed"))
    assert sum(other.received.values()) == sum(one.received.values())
    assert other.terms["weights and gradients"] > 2 * one.terms["weights and gradients"]


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
    assert slow.terms["context exchange"] > 10 * one.terms["context exchange"], "some of it is latency"
    assert slow.terms["dense"] == one.terms["dense"]
    hidden = predict(setup, H200, replace(rates, hidden=0.9))
    assert hidden.terms["context exchange"] == pytest.approx(0.1 * one.terms["context exchange"], rel=1e-6)
    assert known_terms(large()(1), H200, rates).keys() >= {"near field", "far field", "moments", "choice"}
    assert "context exchange" not in known_terms(large()(1), H200, rates)
    two = large(**{"train.context_parallel": 4})
    assert other_work(two(8))["dense"] == other_work(two(4))["dense"] / 2, "another set of GPUs halves the work"


def test_a_step_waits_for_the_host_only_where_that_takes_longer():
    rates, short = assumed_rates(H200), large()(1, context=4096, batch=1)
    slow = {name: {**table, "start": 1.0} for name, table in (("forward", rates.forward), ("backward", rates.backward))}
    assert predict(large()(1), H200, rates).terms["waiting for the host"] == 0.0
    waits = predict(short, H200, replace(rates, **slow))
    after = waits.terms["optimizer"] + waits.terms["fixed"]
    assert waits.seconds - after == pytest.approx(16 * (2 + 1 + 4 * rates.host))
    assert waits.binds == "waiting for the host"


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


@pytest.mark.parametrize("name, shared", [("30m", [8, 8]), ("125m", [8, 8]), ("1b", [8, 8]), ("8b", [8, 8])])
def test_every_config_has_a_plan_without_more_words(name, shared, tmp_path, capsys):
    out = tmp_path / "plan.jsonl"
    assert plan.main(["--config", f"configs/{name}.toml", "--nodes", "1", "8", "--rows", "--json", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["context_parallel"] for row in found if row["attention"] == "muse"] == shared
    assert f"{shared[0]} GPU(s) a sequence: MuSe" in capsys.readouterr().out


@pytest.mark.parametrize("per_node, shared", [("1", 1), ("3", 1), ("6", 2), ("12", 4)])
def test_as_many_gpus_share_a_sequence_as_make_whole_sets(per_node, shared, tmp_path, capsys):
    out = tmp_path / "plan.jsonl"
    assert plan.main(["--config", "configs/1b.toml", "--nodes", "1", "2", "--per-node", per_node, "--rows", "--json",
                      str(out)]) == 0
    assert {json.loads(line)["context_parallel"] for line in out.read_text().splitlines()} == {shared}


def test_a_link_that_is_said_counts_though_others_were_measured(tmp_path, capsys):
    exchange = {"benchmark": "exchange", "device": "NVIDIA H200", "hidden_share": 0.0, "heads": 16, "kv_heads": 16,
                "dim": 64, "tokens": 65536, "ranks": 2, "config": None, "exchange": "kv",
                "silent": {"forward": {"median": 1.0}, "backward": {"median": 1.0}},
                "received": {"small": 10**6, "large": 10**10},
                "alone": {"small": {"median": 1e-4}, "large": {"median": 0.1}}}
    rows = write_rows(tmp_path / "rows.jsonl", [exchange])
    for words, speed in (([], " 101 GB/s inside"), (["--intra", "25"], " 20 GB/s inside")):
        assert plan.main(["--config", "configs/1b.toml", "--nodes", "1", "--rows", str(rows), *words]) == 0
        assert speed in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--set", "model.vocabulary=0"], "model.vocabulary=0 takes the size from the data"),
    (["--context", "65000", "--context-parallel", "8"], "do not make whole blocks"),
    (["--context-parallel", "3"], "must divide"),
    *[([option, value], f"argument {option}: {value} must be at least 1")
      for option in ("--nodes", "--per-node", "--context", "--context-parallel") for value in ("0", "-1")],
    (["--nodes", "1", "0"], "argument --nodes: 0 must be at least 1"),
    (["--per-node", "1.5"], "argument --per-node: '1.5' must be a whole number"),
    *[([option, value], f"argument {option}: {float(value)} must be a finite number above 0")
      for option in ("--intra", "--inter") for value in ("0", "-1", "nan", "inf")],
    (["--inter", "fast"], "argument --inter: 'fast' must be a number"),
    (["--rows", "missing.jsonl"], "missing.jsonl"),
])
def test_command_names_what_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(["--config", "configs/1b.toml", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
