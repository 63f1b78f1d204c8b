"""The training command on two ranks that share every sequence."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from launch import model
from launch.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from launch.corpus import ArrayTokens, Corpus
from launch.engine import TorchEngine
from launch.monitor import Silent
from launch.ranks import Ranks
from launch.scaling_speed import random_tokens
from launch.trainer import Trainer
from muse_dist import MuseConfig, traffic
from tests.launched import Launcher
from tests.ranks import run_ranks

SETTINGS = """
[model]
layers = 1
width = 32
heads = 2
kv_heads = 1
mlp = 64
[train]
steps = 5
warmup = 1
batch = 2
threads = 1
compare = true
layout = "{layout}"
[data]
context = 256
held_out_sequences = 2
[muse]
block = 32
leaf = 8
group = 16
anchors = 2
remote_leaf = 8
opened = 2
"""


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as found:
        yield found


def run(launcher, folder, layout, ranks):
    """results.json of a run, and what it printed."""
    (folder / "small.toml").write_text(SETTINGS.format(layout=layout))
    started = launcher.start(["--config", folder / "small.toml", "--name", f"{layout}{ranks}", "--out", folder,
                              "--device", "cpu"], ranks, folder)
    assert started.wait(200) == [0] * ranks, started.output()
    return json.loads((folder / f"{layout}{ranks}" / "results.json").read_text()), started.output()


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_two_ranks_learn_what_one_does(launcher, tmp_path, layout):
    alone, _ = run(launcher, tmp_path, layout, 1)
    both, printed = run(launcher, tmp_path, layout, 2)
    first = both["first_steps"]["loss"]
    assert first["one rank"] == pytest.approx(alone["history"]["loss"][:3], rel=1e-6)
    assert first["2 ranks, kv"] == pytest.approx(first["one rank"], rel=1e-6)
    assert both["history"]["loss"] == pytest.approx(alone["history"]["loss"], rel=1e-3)
    assert both["history"]["loss"] != alone["history"]["loss"], "moments are not the one-device result"
    assert both["loss"]["exact"] == pytest.approx(alone["loss"]["exact"], rel=1e-3)
    assert len(both["position_loss"]["muse"]) == 256
    assert "bytes, of which halo and sinks" in printed and "2 ranks, kv" in printed


def test_the_traffic_of_a_step_is_what_is_predicted(launcher, tmp_path):
    results, _ = run(launcher, tmp_path, "zigzag", 2)
    config = MuseConfig(block=32, leaf=8, group=16, anchors=2, remote_leaf=8, opened=2)
    wanted = traffic(config, (2, 2, 1, 256, 16), 2, dtype=torch.float32, rank=0)
    assert results["first_steps"]["traffic"] == {
        "moments": wanted.moments, "kv": wanted.kv, "ring": wanted.ring}


def on_a_rank(logits):
    """Losses of three steps with sharded weights, `logits` tokens through the head at a time."""
    model.LOGITS = logits
    config = RunConfig("sharded", ModelConfig(1, 16, 2, 1, 32),
                       TrainConfig(steps=3, shard=True, recompute=True), DataConfig(context=128),
                       muse=MuseConfig(block=16, leaf=8, group=8, anchors=1, remote_leaf=8, opened=2))
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"), "zigzag", *(dist.new_group() for _ in range(3)))
    rows, tokens = [], ArrayTokens(np.arange(5000) % 61, np.array([0]))
    Trainer(TorchEngine(config, ranks, 64), Corpus(tokens, tokens, 128, 64), config, ranks, Silent(rows)).run()
    return [row["loss"] for row in rows]


def test_sharded_heads_work_in_pieces():
    """As long contexts need them; recomputed in the backward, when the weights must be whole once more."""
    pieces, whole = (run_ranks(2, on_a_rank, logits)[0] for logits in (20, 4096))
    assert len(pieces) == 3 and pieces == pytest.approx(whole, rel=1e-6)


def in_turn(runs):
    """Losses of the steps of (context, attention) runs, one after the other in the same processes."""
    group, *more = (dist.new_group() for _ in range(3))
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"), "zigzag", group, *more)
    found = []
    for context, attention in runs:
        config = RunConfig("turn", ModelConfig(2, 16, 2, 1, 32),
                           TrainConfig(steps=3, recompute=True, attention=attention), DataConfig(context=context),
                           muse=MuseConfig(block=16, leaf=4, group=4, anchors=2, remote_leaf=4, opened=2))
        rows, corpus = [], random_tokens(config)
        Trainer(TorchEngine(config, ranks, corpus.vocabulary), corpus, config, ranks, Silent(rows)).run()
        found.append([row["loss"] for row in rows])
    return found


def test_a_run_does_not_leave_its_attention_to_the_next():
    """As speed alone is timed: long contexts first, then chunks of one block; each as in processes of its own."""
    runs = [(256, "muse"), (256, "exact"), (64, "muse"), (64, "exact"), (128, "muse")]
    shared = run_ranks(2, in_turn, runs)[0]
    assert shared == [run_ranks(2, in_turn, [one])[0][0] for one in runs]
    assert shared[2] != shared[3], "64 tokens have a far field"


def test_a_context_that_does_not_divide_is_refused_by_all(launcher, tmp_path):
    text = SETTINGS.format(layout="zigzag").replace("context = 256", "context = 200")
    (tmp_path / "small.toml").write_text(text)
    started = launcher.start(["--config", tmp_path / "small.toml", "--out", tmp_path, "--device", "cpu"], 2, tmp_path)
    assert started.wait() == [2, 2]
    for path in started.outputs:
        assert "200 tokens over 2 ranks" in path.read_text() and "multiple of 128" in path.read_text()


def test_torchrun_restarts_what_was_killed_and_it_goes_on(tmp_path):
    text = SETTINGS.format(layout="zigzag").replace("compare = true", "compare = false")
    (tmp_path / "small.toml").write_text(text.replace("steps = 5", "steps = 20") + "[log]\ncheckpoint_every = 1\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         "-m", "launch.train", "--config", str(tmp_path / "small.toml"), "--out", str(tmp_path), "--device", "cpu"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics, deadline = tmp_path / "small" / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert "going on after step" in printed
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 21))


@pytest.mark.parametrize("layout, ranks, context, block", [
    ("zigzag", 4, 65536, 8192), ("zigzag", 1, 65536, 65536), ("contiguous", 4, 65536, 16384),
    ("zigzag", 3, 24576, 4096), ("zigzag", 2, 24576, 2048), ("zigzag", 4, 6, 1024)])
def test_exact_attention_on_ranks_takes_blocks_as_large_as_its_chunks(layout, ranks, context, block):
    config = RunConfig("c", muse=MuseConfig.fast(), data=DataConfig(context=context), train=TrainConfig(layout=layout))
    found = model.exact_settings(config, ranks)
    assert found.block == block and found.exchange == "kv" and found.block * found.halo >= context
