"""The attention probe against dense arithmetic, on one rank and on two; what a step costs; what is logged of it."""
import dataclasses
import errno
import json
import math
import os

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import flops, probe, scaling
from launch.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from launch.engine import TorchEngine
from launch.metrics import MetricsFile, read_metrics
from launch.monitor import Monitor, flat
from launch.options import write_line
from launch.probe import probe_layers, sampled_layers
from launch.ranks import Ranks
from launch.timing import Stopwatch
from muse_dist import MuseConfig, muse_attention
from muse_dist.emulation import emulate_ranks
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TOKENS = 128
MUSE = MuseConfig(block=16, leaf=8, group=8, anchors=1, remote_leaf=8, opened=2)
CONFIG = RunConfig(name="probe", model=ModelConfig(layers=3, width=32, heads=4, kv_heads=2, mlp=32),
                   train=TrainConfig(batch=1), data=DataConfig(context=TOKENS), muse=MUSE)
SEQUENCES = torch.randint(257, (1, TOKENS + 1), generator=torch.Generator().manual_seed(1))


def probed(ranks, layers=(0, 2), **muse):
    """The probe of a model whose attention is sharp, on all tokens."""
    probe.ROWS = 4 * TOKENS
    config = dataclasses.replace(CONFIG, muse=dataclasses.replace(MUSE, **muse))
    engine = TorchEngine(config, ranks, 257)
    with torch.no_grad():
        for layer in engine.model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    return engine, config, probe_layers(engine, SEQUENCES, config, ranks, layers)


def on_a_rank(exchange, layout):
    group = dist.group.WORLD
    ranks = Ranks(dist.get_rank(), 2, CPU, layout, group, dist.new_group(), dist.new_group())
    return probed(ranks, exchange=exchange)[2]


def captured(engine, layer):
    with engine.capture([layer]) as found, torch.no_grad():
        engine.module(SEQUENCES, None)
    return found[layer]


def dense(given):
    """The exact softmax [H, N, N] and output [H, N, D]."""
    k, v = (x[0].repeat_interleave(2, 0) for x in (given.k, given.v))
    logits = given.scale * given.q[0] @ k.mT
    weights = logits.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -math.inf).softmax(-1)
    return weights, weights @ v


def error_of(out, wanted):
    return ((out - wanted).norm() / wanted.norm()).item()


def test_the_probe_says_what_dense_attention_says():
    engine, config, found = probed(Ranks(0, 1, CPU, "zigzag"))
    assert list(found) == ["layer_0", "layer_2"]
    for layer in (0, 2):
        given, numbers = captured(engine, layer), found[f"layer_{layer}"]
        weights, wanted = dense(given)
        out = muse_attention(given.q, given.k, given.v, config=config.muse, scale=given.scale)[0]
        assert numbers["error"] == pytest.approx(error_of(out, wanted), rel=1e-4) and numbers["error"] > 0.01
        block = torch.arange(TOKENS) // 16
        near = (block[:, None] - block <= 1) & (block[:, None] >= block)
        assert numbers["near"] == pytest.approx((weights * near).sum().item() / (4 * TOKENS), rel=1e-5)
        assert numbers["near"] + numbers["opened"] + numbers["far"] == pytest.approx(1, abs=1e-5)
        assert numbers["opened"] > 0.02 and numbers["far"] > 0.02
        assert numbers["q"] == pytest.approx(given.q.square().mean().sqrt().item(), rel=1e-5)
        assert numbers["largest_logit"] == pytest.approx(
            (given.scale * given.q[0] @ given.k[0].repeat_interleave(2, 0).mT).tril().max().item(), rel=1e-4)


def test_what_is_opened_holds_the_most_mass_and_all_of_it_if_all_is_opened():
    alone = Ranks(0, 1, CPU, "zigzag")
    shares = [probed(alone, opened=opened, sinks=0)[2]["layer_2"] for opened in (0, 1, 2, 14)]
    opened = [share["opened"] for share in shares]
    assert opened[0] == 0 and opened == sorted(opened) and len(set(opened)) == 4
    assert shares[-1]["far"] == pytest.approx(0, abs=1e-6) and shares[-1]["error"] < 1e-5
    # A quarter of a block's 14 far leaves at most: by chance they would hold 2/14 of the far mass.
    assert opened[2] / (opened[2] + shares[2]["far"]) > 0.3


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_two_ranks_see_what_one_sees(layout):
    engine, config, alone = probed(Ranks(0, 1, CPU, layout))
    for found in run_ranks(2, on_a_rank, "kv", layout):
        for name, numbers in alone.items():
            assert found[name] == pytest.approx(numbers, rel=1e-4, abs=1e-6), name
    first, second = run_ranks(2, on_a_rank, "moments", layout)
    assert first == second
    for layer in (0, 2):
        numbers, given = first[f"layer_{layer}"], captured(engine, layer)
        if layer == 0:  # deeper layers read another approximation
            out = emulate_ranks(given.q, given.k, given.v, config=config.muse, scale=given.scale, ranks=2,
                                layout=layout)[0]
            assert numbers["error"] == pytest.approx(error_of(out, dense(given)[1]), rel=1e-3)
            assert numbers["near"] == pytest.approx(alone["layer_0"]["near"], rel=1e-4)
        assert numbers["near"] + numbers["opened"] + numbers["far"] == pytest.approx(1, abs=1e-5)
        assert 0 < numbers["opened"] <= alone[f"layer_{layer}"]["opened"] + 0.05, "leaves of other ranks stay closed"


def test_the_probe_reads_what_autocast_computed():
    alone = Ranks(0, 1, CPU, "zigzag")
    engine, config, plain = probed(alone)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), engine.capture([0]) as found:
        engine.model.model(SEQUENCES[:, :-1])
    assert {found[0].q.dtype, found[0].k.dtype, found[0].v.dtype} == {torch.bfloat16}
    split = probe.Layout("contiguous", 1, TOKENS, 16)
    rounded = probe._named(probe._statistics(found[0], split, config.muse, alone)[None], 1)
    assert rounded["near"] == pytest.approx(plain["layer_0"]["near"], abs=0.02)
    assert rounded["error"] == pytest.approx(plain["layer_0"]["error"], abs=0.03)


def test_layers_are_spread_evenly():
    assert sampled_layers(12, 3) == [0, 6, 11] or sampled_layers(12, 3) == [0, 5, 11]
    assert sampled_layers(2, 5) == [0, 1] and sampled_layers(7, 1) == [0]


# ----------------------------------------------------------------------------------------------------- cost and logging


def test_keys_read_are_those_the_method_reads():
    assert flops.keys_read(1024, None) == 512
    assert flops.keys_read(32, MUSE) == 16, "nothing is far: exact"
    # 8 blocks of 16, by hand: the own block, the halo but for the first, opened and sink leaves of 8, leaves, moments.
    far = [0, 0, 16, 32, 48, 64, 80, 96]
    opened = sum(min(keys, 3 * 8) for keys in far) / 8
    assert flops.keys_read(128, MUSE) == pytest.approx(
        8 + 16 * 7 / 8 + opened + sum(far) / 8 / 8 + sum(far) / 8 / 16)


def test_a_step_needs_six_operations_a_weight_and_token():
    shape = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, mlp=128)
    engine = TorchEngine(dataclasses.replace(CONFIG, model=shape), Ranks(0, 1, CPU, "zigzag"), 257)
    matrices = sum(p.numel() for p in engine.model.parameters() if p.ndim == 2)
    # Passes, products, operations, head dim, heads, layers, keys, tokens.
    attention = 3 * 2 * 2 * 16 * 4 * 2 * 64 * 1000
    assert flops.step_flops(shape, 257, 1000, 128, None) == 6 * matrices * 1000 + attention
    assert flops.step_flops(shape, 257, 1000, 128, MUSE) < flops.step_flops(shape, 257, 1000, 128, None)


def test_the_peak_of_a_device(monkeypatch):
    assert flops.peak_flops(CPU) is None
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12),
                       ("Something", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.device("cuda")) == peak


def test_stages_add_up():
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch("forward"):
            sum(range(10_000))
    watch.add("checkpoint", 2.0)
    found = watch.read()
    assert found["checkpoint"] == 2.0 and 0 < found["forward"] < 1 and watch.read() == {}


def test_lines_of_steps_that_are_done_again_are_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        assert file.write({"step": step, "loss": step / 3}) is None
    file.close()
    with path.open("a") as cut:
        cut.write('{"step": 4, "lo')  # killed in the middle of a line
    again = MetricsFile(path, done=2)
    again.write({"step": 3, "loss": 9.0})
    again.close()
    assert read_metrics(path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 9.0}]
    MetricsFile(path).close()
    assert read_metrics(path) == [], "a new run starts a new file"


class FullDisk:
    """A file that takes some bytes and then none, until there is room again."""

    name = "metrics.jsonl"

    def __init__(self, room):
        self.room, self.content = room, b""

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[:self.room]
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def close(self):
        pass


def test_a_full_disk_delays_lines_and_loses_none(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file._file.close()
    file._file = disk = FullDisk(15)
    troubles = [file.write({"step": step}) for step in (1, 2, 3)]
    assert troubles[0] is None and "No space left on device" in troubles[1] and troubles[2] is not None
    disk.room = 1000
    assert file.write({"step": 4}) is None
    assert [json.loads(line)["step"] for line in disk.content.splitlines()] == [1, 2, 3, 4]
    disk.room = 0
    file.write({"step": 5})
    with pytest.raises(OSError, match="No space left"):
        file.close()


def no_room(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_only_when_asked_costs_no_run(tmp_path, monkeypatch, capsys):
    """As network file systems do: writing works, fsync says that nothing was kept."""
    with Monitor(CONFIG, tmp_path) as monitor:
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", no_room)
            monitor.sync()
        assert "metrics.jsonl cannot be written: No space left on device" in capsys.readouterr().out


def test_what_is_no_number_is_null_in_lines(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": math.nan, "stages": {"forward": math.inf}, "probe": [-math.inf, 1.5]})
    file.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "stages": {"forward": None}, "probe": [None, 1.5]}
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])


def test_rows_of_a_sweep_are_strict_json_and_come_back_as_they_were(tmp_path):
    row = {"model": "a", "context": 1, "ranks": 1, "attention": "muse", "losses": [3.0, math.nan, 2.0]}
    write_line(tmp_path / "rows.jsonl", row)
    assert "NaN" not in (tmp_path / "rows.jsonl").read_text()
    (found,) = scaling.read_done(tmp_path / "rows.jsonl").values()
    assert repr(found) == repr(row)


def test_lines_that_are_damaged_or_gone_are_counted_and_the_others_stay(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[1]\n7\n{"step": "x"}\n{"step": 4, "loss": 1.0}\n')
    with Monitor(CONFIG, tmp_path, done=4) as monitor:
        monitor.step(5, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 4, 5]
    assert "warning: metrics.jsonl has no line of 2 of the 4 steps before" in capsys.readouterr().out


def test_nested_numbers_get_names():
    assert flat({"loss": 1, "stages": {"forward": 0.5}, "probe": {"layer_0": {"error": None, "far": 0.25}},
                 "attention": "muse"}) == {"loss": 1.0, "stages/forward": 0.5, "probe/layer_0/far": 0.25}


def test_events_of_a_run_that_goes_on_have_every_step_once(tmp_path):
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Monitor(CONFIG, tmp_path, done=done) as monitor:
            for step in steps:
                monitor.step(step, {"loss": 10.0 * done + step, "stages": {"forward": 0.5}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    assert "train/stages/forward" in events.Tags()["scalars"]


def test_wandb_works_offline(tmp_path):
    pytest.importorskip("wandb")
    for done, step in ((0, 1), (1, 2)):
        with Monitor(CONFIG, tmp_path, "offline", done) as monitor:
            monitor.step(step, {"loss": 3.0, "stages": {"forward": 0.5}})
        if not done:
            kept = (tmp_path / "wandb-id").read_text()
    name = (tmp_path / "wandb-id").read_text()
    assert name == kept
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs and all(run.endswith(name) for run in runs), "one run, that went on"
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    (tmp_path / "wandb-id").write_text("")  # as a kill may leave it
    with Monitor(CONFIG, tmp_path, "offline"):
        assert (tmp_path / "wandb-id").read_text()
