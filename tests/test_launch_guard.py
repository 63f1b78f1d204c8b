"""Bad steps, hanging ranks and signals; optimizers that are refused."""
import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist

from launch import storage, train
from launch.checkpoint import Checkpoints
from launch.config import DataConfig, LogConfig, ModelConfig, RunConfig, TrainConfig
from launch.corpus import load_corpus
from launch.engine import TorchEngine
from launch.guard import WINDOW, LossGuard, StopSignal, only_run
from launch.monitor import Silent
from launch.optimizer import fused_adam, make_optimizer, set_steps
from launch.ranks import Ranks
from launch.trainer import Trainer
from muse_dist import MuseConfig
from tests.ranks import outcomes, run_ranks

ALONE = Ranks(0, 1, torch.device("cpu"), "zigzag")
SMALL = RunConfig(name="small", model=ModelConfig(layers=2, width=16, heads=2, kv_heads=1, mlp=32),
                  train=TrainConfig(steps=5, batch=1, warmup=0, lr=1e-3, threads=1), data=DataConfig(context=64),
                  log=LogConfig(checkpoint_every=0),
                  muse=MuseConfig(block=16, leaf=8, group=8, anchors=1, remote_leaf=8, opened=1))


class Spoiled(TorchEngine):
    """An engine whose loss is made wrong in some steps."""

    def __init__(self, losses, config):
        super().__init__(config, ALONE, 257)
        self.losses, self.seen = losses, 0

    def gradients(self, sequences, watch):
        self.seen += 1
        return super().gradients(sequences, watch) * self.losses.get(self.seen, 1.0)


class Said(Silent):
    """Remembers what is said, too."""

    def __init__(self, rows):
        super().__init__(rows)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def run(losses, tmp_path, **train):
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, **train))
    rows, engine = [], Spoiled(losses, config)
    trainer = Trainer(engine, load_corpus(config.data), config, ALONE, Silent(rows), folder=tmp_path)
    return trainer, engine, rows


def test_a_bad_step_is_left_out_and_written_down(tmp_path):
    before = None
    trainer, engine, rows = run({3: math.nan}, tmp_path, bad_step="skip")
    trainer.run(2)
    before = {name: x.clone() for name, x in engine.tensors().items()}
    trainer.run(3)
    assert all(torch.equal(before[name], x) for name, x in engine.tensors().items()), "nothing was learned from it"
    trainer.run()
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0] and engine.updates == 4
    assert [row["first_sequence"] for row in rows] == [0, 1, 2, 3, 4], "its sequences are behind"
    (path,) = tmp_path.iterdir()
    about = json.loads(path.read_text())
    assert path.name == "bad-step-000000003.json" and about["step"] == 3 and about["problem"] == "the loss is nan"
    assert about["sequences"] == [trainer.corpus.describe(2, 0)]
    assert set(about["attention"]) == {"layer_0", "layer_1"}
    assert about["attention"]["layer_1"]["not_finite"] == 0


def test_a_bad_step_stops_the_run_if_asked_or_if_there_are_too_many(tmp_path):
    trainer, _, rows = run({2: math.inf}, tmp_path)
    with pytest.raises(FloatingPointError, match="step 2 is bad: the loss is inf; bad-step-000000002.json.*train.lr"):
        trainer.run()
    assert len(rows) == 1
    trainer, _, rows = run(dict.fromkeys((2, 3, 4), math.nan), tmp_path, bad_step="skip", max_skipped=2)
    with pytest.raises(FloatingPointError, match="step 4 is bad"):
        trainer.run()
    assert len(rows) == 3


def test_statistics_say_which_layer_is_broken(tmp_path):
    trainer, engine, _ = run({}, tmp_path)
    with torch.no_grad():
        engine.model.model.layers[1].self_attn.k_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1 is bad: the loss is nan"):
        trainer.run()
    found = json.loads((tmp_path / "bad-step-000000001.json").read_text())["attention"]
    assert found["layer_0"]["not_finite"] == 0 and found["layer_0"]["k"] > 0
    assert found["layer_1"]["not_finite"] > 0 and found["layer_1"]["k"] is None


class SpoiledOnOne(TorchEngine):
    """An engine whose last hidden states are NaN in the third step, on rank 1 alone."""

    seen = 0

    def gradients(self, sequences, watch):
        self.seen += 1
        if self.seen != 3 or self.ranks.rank != 1:
            return super().gradients(sequences, watch)
        hook = self.model.model.norm.register_forward_hook(lambda module, inputs, output: output * math.nan)
        try:
            share = super().gradients(sequences, watch)
        finally:
            hook.remove()
        assert share.isnan()
        return share


def rows_of_a_rank(folder, policy):
    """Steps of one of two ranks: whether each was left out, and its loss; and the sum of a weight at the end."""
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"), "zigzag", dist.new_group(), dist.new_group(),
                  dist.new_group())
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, bad_step=policy))
    rows, engine = [], SpoiledOnOne(config, ranks, 257)
    trainer = Trainer(engine, load_corpus(config.data), config, ranks, Silent(rows), folder=folder)
    trainer.run(2)
    before = {name: x.clone() for name, x in engine.tensors().items()}
    trainer.run(3)
    assert all(torch.equal(before[name], x) for name, x in engine.tensors().items()), "nothing was learned from it"
    trainer.run()
    return [(row["skipped"], row["loss"]) for row in rows], engine.model.lm_head.weight.sum().item()


def test_a_bad_step_of_one_rank_is_left_out_on_all(tmp_path):
    first, second = run_ranks(2, rows_of_a_rank, tmp_path, "skip")
    assert [skipped for skipped, _ in first[0]] == [0, 0, 1, 0, 0]
    assert [math.isnan(loss) for _, loss in first[0]] == [False, False, True, False, False]
    assert repr(first) == repr(second) and math.isfinite(first[1]), "the ranks have the same weights"
    (path,) = tmp_path.iterdir()
    about = json.loads(path.read_text())
    assert path.name == "bad-step-000000003.json" and about["problem"] == "the loss is nan"
    assert set(about["attention"]) == {"layer_0", "layer_1"}


def test_a_bad_step_of_one_rank_stops_all(tmp_path):
    for found in outcomes(2, rows_of_a_rank, tmp_path, "stop"):
        assert not found.died and "FloatingPointError: step 3 is bad: the loss is nan" in found.error
    assert [path.name for path in tmp_path.iterdir()] == ["bad-step-000000003.json"]


def checkpoints_at_a_stop(folder):
    """Checkpoints that are there when one of two ranks stops for a bad step, of one whose writing takes a while."""
    write = storage.SafeWriter.write_data
    storage.SafeWriter.write_data = lambda *arguments: time.sleep(2) or write(*arguments)
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"), "zigzag", dist.new_group(), dist.new_group(),
                  dist.new_group(backend="gloo"))
    config = dataclasses.replace(SMALL, log=LogConfig(checkpoint_every=2))
    checkpoints = Checkpoints(folder / "checkpoints", ranks, 3)
    trainer = Trainer(SpoiledOnOne(config, ranks, 257), load_corpus(config.data), config, ranks, Silent(), checkpoints)
    with pytest.raises(FloatingPointError, match="step 3 is bad"):
        trainer.run()
    ranks.collect(None)
    return checkpoints.steps()


def test_a_checkpoint_that_is_being_written_outlives_a_bad_step(tmp_path):
    assert run_ranks(2, checkpoints_at_a_stop, tmp_path) == [[2], [2]]


def test_a_full_disk_does_not_end_a_run_that_is_to_leave_a_step_out(tmp_path):
    (tmp_path / "bad-step-000000002.json").mkdir()  # nothing can be written there
    trainer, _, rows = run({2: math.nan}, tmp_path, bad_step="skip")
    trainer.monitor = said = Said(rows)
    trainer.run()
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0, 0]
    assert said.lines == ["step 2 is bad: the loss is nan; bad-step-000000002.json cannot be written: Is a directory. "
                          "It is left out"]


def test_a_spike_is_told_from_what_is_usual():
    guard = LossGuard(TrainConfig(spike=1.0))
    assert guard.problem(9.0, 1.0) is None, "nothing is usual yet"
    for _ in range(WINDOW):
        assert guard.problem(2.0, 1.0) is None
    assert guard.problem(2.9, 1.0) is None
    assert "the loss of 3.1000 is more than train.spike=1.0 above the usual 2.0000" in guard.problem(3.1, 1.0)
    assert guard.skipped == 1 and guard.problem(2.0, math.nan) == "the gradient's norm is nan" and guard.skipped == 2
    again = LossGuard(TrainConfig(spike=1.0), **json.loads(json.dumps(guard.state())))
    assert again.skipped == 2 and again.problem(3.1, 1.0) is not None and again.problem(2.0, 1.0) is None
    assert again.skipped == 0
    assert LossGuard(TrainConfig(spike=0.0), [2.0] * WINDOW).problem(50.0, 1.0) is None


def test_sigterm_is_noted_and_the_old_answer_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().listening() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("hang, told", [
    ("time.sleep(60)", True),
    # A loop in C that never lets Python run: faulthandler alone can show it.
    ("ctypes.PyDLL(None).sleep(60)", False),
])
def test_a_hanging_process_shows_its_stack_and_ends(hang, told):
    code = ("import ctypes, time\nfrom launch import guard\n"
            "def stuck():\n    " + hang + "\n"
            "dog = guard.Watchdog(0.5, 3, reserve=0.5)\n"
            "for _ in range(3):\n    dog.feed('step 6')\n    time.sleep(0.3)\n"
            "dog.feed('step 7')\nstuck()\n")
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=50, check=False)
    assert result.returncode == (70 if told else 1)
    assert 'line 4 in stuck' in result.stderr
    assert ("rank 3: no progress for 0.5 s in step 7" in result.stderr) == told


def test_apex_is_known_by_its_fused_modules(monkeypatch):
    def found(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)

    found()
    with pytest.raises(ValueError, match="apex is not installed; build https://github.com/NVIDIA/apex"):
        fused_adam()
    found("apex")  # the registry's, another project
    with pytest.raises(ValueError, match="is not NVIDIA's.*amp_C.*pip's apex is another project; uninstall it"):
        fused_adam()
    found("apex", "amp_C")
    with pytest.raises(ValueError, match="is installed and does not load .No module named 'amp_C'.*build"):
        fused_adam()
    monkeypatch.setitem(sys.modules, "amp_C", types.SimpleNamespace())
    for name in ("apex", "apex.optimizers"):  # the registry's, beside extensions that NVIDIA's has left
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__path__=[]))
    with pytest.raises(ValueError, match="is installed and does not load .*FusedAdam.*parts are of two projects"):
        fused_adam()
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam="the class"))
    assert fused_adam() == "the class"
    config = dataclasses.replace(SMALL.train, optimizer="apex")
    with pytest.raises(ValueError, match="needs a GPU; take 'adamw'"):
        make_optimizer(torch.nn.Linear(2, 2), config)
    with pytest.raises(ValueError, match="train.shard=true"):
        make_optimizer(torch.nn.Linear(2, 2), dataclasses.replace(config, shard=True))


def test_an_optimizer_that_counts_by_group_is_told_its_steps():
    optimizer = types.SimpleNamespace(param_groups=[{"lr": 1.0, "step": 0}, {"lr": 1.0}])
    set_steps(optimizer, 7)
    assert optimizer.param_groups == [{"lr": 1.0, "step": 7}, {"lr": 1.0}]


def test_a_folder_is_waited_for_if_its_run_may_just_be_ending(tmp_path, monkeypatch):
    with ExitStack() as other:
        other.enter_context(only_run(tmp_path))
        with (pytest.raises(ValueError, match="is in use by another run, process .* take another --out"),
              only_run(tmp_path, "--out")):
            pass
        timer = threading.Timer(0.5, other.close)
        timer.start()
        begun = time.monotonic()
        with only_run(tmp_path, patience=30.0):
            assert 0.4 < time.monotonic() - begun < 20
        timer.join()
    assert train._patience() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun started the processes again
    assert train._patience() > 90, "NFS takes up to a minute and a half to let go of a dead host's lock"
