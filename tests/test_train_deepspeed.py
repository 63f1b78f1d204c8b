"""The training command with DeepSpeed's engine: what PyTorch's computes, and checkpoints that both read."""
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from launch.checkpoint import Checkpoints
from launch.config import DataConfig, DeepSpeedConfig, ModelConfig, RunConfig, TrainConfig
from launch.corpus import ArrayTokens, Corpus
from launch.engine import make_engine
from launch.monitor import Silent
from launch.ranks import Ranks
from launch.trainer import Trainer
from muse_dist import MuseConfig
from tests.launched import PROBED_RUN, Launcher
from tests.ranks import run_ranks

pytest.importorskip("deepspeed")

ENGINES = {"torch": ("torch", 2), "zero 1": ("deepspeed", 1), "zero 2": ("deepspeed", 2), "zero 3": ("deepspeed", 3)}
# Who goes on with whose checkpoint.
GOES_ON = {"zero 3": "torch", "zero 1": "zero 3", "zero 2": "zero 1", "torch": "zero 2"}
STEPS, SAVED = 6, 3
ALONE = Ranks(0, 1, torch.device("cpu"), "zigzag")
LEFT_OUT = 2  # the number of a step that the guard is made to call bad


def settings(name):
    engine, stage = ENGINES[name]
    return RunConfig(
        "run", ModelConfig(2, 32, 2, 1, 64),
        TrainConfig(steps=STEPS, batch=3, micro_batch=1, warmup=2, lr=5e-3, clip=0.5, engine=engine, bad_step="skip"),
        DataConfig(context=128), deepspeed=DeepSpeedConfig(stage),
        muse=MuseConfig(block=16, leaf=8, group=8, anchors=1, remote_leaf=8, opened=2, exchange="kv"))


def ranks_of(size):
    """This process among sets of `size` that share sequences."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    groups = [dist.new_group(list(range(at, at + size))) for at in range(0, world, size)]
    group = groups[rank // size] if size > 1 else None
    return Ranks(rank % size, size, torch.device("cpu"), "zigzag", group, dist.new_group(), dist.new_group(),
                 rank // size, world // size)


def trainer_of(name, ranks, folder):
    config, tokens, rows = settings(name), ArrayTokens(np.arange(5000) % 61, np.array([0])), []
    trainer = Trainer(make_engine(config, ranks, 64), Corpus(tokens, tokens, 128, 64), config, ranks, Silent(rows),
                      Checkpoints(Path(folder, name), ranks, 3))
    return trainer, rows


def spoil(trainer):
    """Have one step called bad although its gradients are sound: they must not reach the next one."""
    judge = trainer.guard.problem
    trainer.guard.problem = lambda loss, norm: "made up" if trainer.step + 1 == LEFT_OUT else judge(loss, norm)


def shown(rows):
    return [(row["loss"], row["gradient_norm"], row["skipped"]) for row in rows]


def train_and_save(folder):
    """Every engine for all steps, with a checkpoint on the way."""
    ranks, found = ranks_of(dist.get_world_size()), {}
    for name in ENGINES:
        trainer, rows = trainer_of(name, ranks, folder)
        spoil(trainer)
        trainer.run(SAVED)
        trainer.engine.save_model(Path(folder, f"{name} model"))
        trainer.checkpoints = None  # the last one stays that of `SAVED`
        trainer.run()
        found[name] = shown(rows)
    return found


def go_on(folder):
    """Every engine from another one's checkpoint, on ranks that each read sequences of their own."""
    ranks, found = ranks_of(1), {}
    for name, saver in GOES_ON.items():
        trainer, rows = trainer_of(name, ranks, folder)
        trainer.checkpoints = Checkpoints(Path(folder, saver), ranks, 3)
        trainer.resume(SAVED)
        trainer.checkpoints = None
        trainer.run()
        found[name] = shown(rows)
    return found


def check(name, found, wanted):
    assert [row[2] for row in found] == [row[2] for row in wanted], name
    for i in range(2):
        assert [row[i] for row in found] == pytest.approx([row[i] for row in wanted], rel=1e-5), name


def test_every_engine_computes_the_same_and_goes_on_with_any_checkpoint(tmp_path):
    """At last on three ranks, which do not divide the parameters. One test: most of its time is the start of ranks."""
    two = run_ranks(2, train_and_save, str(tmp_path))
    wanted = two[0]["torch"]
    assert [row[2] for row in wanted] == [0, 1, 0, 0, 0, 0]
    assert max(row[1] for row in wanted) > settings("torch").train.clip, "clipping must matter"
    for rank in two:
        for name, found in rank.items():
            check(name, found, wanted)
    for name, found in run_ranks(3, go_on, str(tmp_path))[0].items():
        check(name, found, wanted[SAVED:])
    models = [LlamaForCausalLM.from_pretrained(tmp_path / f"{name} model").state_dict() for name in ENGINES]
    for model in models[1:]:
        assert model.keys() == models[0].keys()
        for key, value in models[0].items():
            torch.testing.assert_close(model[key], value, rtol=1e-4, atol=1e-6)


SMALL = PROBED_RUN + "[deepspeed]\nstage = 3\n"


def test_the_command_trains_goes_on_and_reports(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    command = ["--config", tmp_path / "small.toml", "--out", tmp_path, "--device", "cpu", "--engine", "deepspeed"]
    with Launcher() as launcher:
        start = functools.partial(launcher.start, ranks=2, folder=tmp_path, environment={"DS_ACCELERATOR": "cpu"})
        first = start([*command, "--steps", 2])
        assert first.wait(200) == [0, 0], first.output()
        second = start(command)
        assert second.wait(200) == [0, 0], second.output()
    assert "going on after step 2" in second.output()
    assert "OVERFLOW" not in second.output() and "deprecated" not in second.output()
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    assert results["config"]["train"]["engine"] == "deepspeed" and len(results["history"]["loss"]) == 4
    rows = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[1]["probe"]["layer_0"]["error"] > 0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "small" / "model").num_parameters() == results["parameters"]


def test_one_process_is_refused():
    with pytest.raises(ValueError, match="there is one; start it with torchrun, or take 'torch'"):
        make_engine(settings("zero 2"), ALONE, 64)


def test_it_says_that_deepspeed_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="DeepSpeed is not installed; pip install"):
        make_engine(settings("zero 2"), dataclasses.replace(ALONE, gradients=object()), 64)


@pytest.mark.parametrize("changes, message", [
    ({"compare": True}, "train.compare=true.*set it to false"),
    ({"shard": True}, "train.shard=true.*deepspeed.stage=3"),
    ({"optimizer": "apex"}, "train.optimizer='apex'; take 'adamw'"),
    ({"engine": "apex"}, "train.engine='apex' must be one of torch, deepspeed, megatron"),
])
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings("zero 2").train, **changes)


def test_settings_of_deepspeed_for_another_engine_are_refused():
    zero = settings("zero 3")
    with pytest.raises(ValueError, match="deepspeed. has settings that train.engine='torch' does not read"):
        dataclasses.replace(zero, train=dataclasses.replace(zero.train, engine="torch"))


def test_a_stage_that_is_none_is_refused():
    with pytest.raises(ValueError, match="deepspeed.stage=0 must be 1, 2 or 3"):
        DeepSpeedConfig(0)
