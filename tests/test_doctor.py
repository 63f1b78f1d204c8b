"""Every check of launch.doctor, on what is well and on what is not; then the command on one rank and on two."""
import errno
import importlib.util
import itertools
import os
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import doctor
from launch.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from launch.doctor_checks import (
    Finding, check_brakes, check_data, check_disk, check_settings, check_shared, check_versions, compare_versions,
    judge_disk, ok, predicted,
)
from launch.doctor_links import (
    DeviceState, Link, check_clocks, check_links, check_sums, judge_clocks, judge_devices, judge_links, rounds,
)
from launch.optimizer import check_optimizer
from launch.ranks import Ranks
from muse_dist import MuseConfig
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
MUSE = MuseConfig(block=64, leaf=16, group=16, anchors=2, remote_leaf=16, opened=2)
CONFIG = RunConfig("run", model=ModelConfig(vocabulary=300), train=TrainConfig(steps=10),
                   data=DataConfig(context=1024), muse=MUSE)
ONE = Ranks(0, 1, torch.device("cpu"), "zigzag")
TWO = replace(ONE, size=2, gradients=object())
HOSTS = ["a", "a", "b", "b"]


def levels(findings):
    return [finding.level for finding in findings]


def changed(table, **values):
    return replace(CONFIG, **{table: replace(getattr(CONFIG, table), **values)})


@pytest.mark.parametrize("config, ranks, level, words", [
    (CONFIG, 1, "ok", ""),
    (CONFIG, 4, "ok", ""),
    (CONFIG, 3, "problem", "do not make whole blocks of 64"),
    (changed("train", context_parallel=2), 3, "problem", "context_parallel=2 does not divide 3"),
    (changed("train", context_parallel=1), 3, "problem", "train.batch=2 is no multiple of the 3 sets"),
    (changed("train", shard=True), 1, "problem", "train.shard=true with one rank"),
    (changed("data", context=128), 1, "warning", "has no far field"),
    (changed("log", checkpoint_every=0), 1, "warning", "loses everything"),
])
def test_settings(config, ranks, level, words):
    found = check_settings(config, replace(ONE, size=ranks))
    assert level in levels(found)
    assert level == "ok" or any(words in finding.text and finding.mend for finding in found)
    assert level == "problem" or "problem" not in levels(found)


@pytest.mark.parametrize("engine, ranks, words, mend", [
    ("deepspeed", ONE, "there is one", "start it with torchrun"), ("megatron", ONE, "there is one", "torchrun"),
    ("megatron", TWO, "trains on GPUs only, and the run is on cpu", "take --device cuda"),
    ("deepspeed", replace(TWO, device=torch.device("cuda")), "computes on cpu here, and the run is on cuda",
     "set DS_ACCELERATOR=cuda")])
def test_an_engine_that_cannot_run_here_is_a_problem(engine, ranks, words, mend, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = check_settings(changed("train", engine=engine, attention="exact"), ranks)
    assert any(one.level == "problem" and words in one.text and mend in one.mend for one in found)


@pytest.mark.parametrize("device, there, changes, words, mend", [
    ("cpu", ("apex", "amp_C"), {}, "needs a GPU", "take 'adamw'"),
    ("cuda", ("apex", "amp_C"), {"shard": True}, "does not know sharded weights", "take 'adamw'"),
    ("cuda", (), {}, "apex is not installed", "build https://github.com/NVIDIA/apex"),
    ("cuda", ("apex",), {}, "is not NVIDIA's", "uninstall it and build https"),
    ("cuda", ("apex", "amp_C", "broken"), {}, "is installed and does not load", "uninstall it and build https"),
    ("cuda", ("apex", "amp_C"), {}, "", "")])
def test_an_optimizer_that_cannot_run_here_is_a_problem(device, there, changes, words, mend, monkeypatch):
    """In launch.train's own words: both ask one function."""
    broken = "broken" in there
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setitem(sys.modules, "amp_C", None if broken else types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam="the class"))
    config = changed("train", optimizer="apex", attention="exact", **changes)
    found = check_settings(config, replace(TWO, device=torch.device(device)))
    problems = [one for one in found if one.level == "problem"]
    assert [words in one.text and mend in one.mend for one in problems] == [True] * bool(words), problems
    with pytest.raises(ValueError) if words else nullcontext() as refused:
        check_optimizer(config.train, torch.device(device))
    assert not words or str(refused.value) == f"{problems[0].text}; {problems[0].mend}"


def test_a_missing_package_of_the_engine_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = check_settings(changed("train", engine="deepspeed"), TWO)
    assert any("DeepSpeed is not installed" in one.text and "pip install" in one.mend for one in found)
    versions, = check_versions(ONE, "deepspeed")
    assert "deepspeed " in versions.text and "deepspeed" not in check_versions(ONE)[0].text


def test_data_that_is_missing_too_small_or_of_other_tokens(tmp_path):
    assert levels(check_data(CONFIG)) == ["ok"]
    assert levels(check_data(changed("train", steps=10 ** 6))) == ["warning"]
    missing, = check_data(changed("data", path=str(tmp_path / "missing")))
    assert missing.level == "problem" and "missing" in missing.text
    other, = check_data(changed("model", vocabulary=100))
    assert other.level == "problem" and "take model.vocabulary=257" in other.mend


def test_versions_must_agree():
    good = {"python": "3.11.1", "torch": "2.7.1+cu126", "triton": "3.3", "nccl": "2.26"}
    assert levels(compare_versions([good] * 3)) == ["ok"]
    odd, = compare_versions([good, {**good, "nccl": "2.20"}, good])
    assert odd.level == "problem" and odd.text == "nccl is 2.20 and 2.26 (rank 1)"
    old, = compare_versions([{**good, "torch": "2.5.1"}])
    assert "too old" in old.text
    without, = compare_versions([{**good, "triton": "none"}])
    assert "triton is missing" in without.text
    assert levels(compare_versions([{**good, "triton": "none", "nccl": "none"}])) == ["ok"], "the CPU needs none"


def test_limits_and_forgotten_variables():
    assert not check_brakes({"NCCL_DEBUG": "INFO", "NCCL_P2P_DISABLE": "0"})
    found, = check_brakes({"NCCL_P2P_DISABLE": "1"})
    assert found.level == "warning" and found.mend == "unset NCCL_P2P_DISABLE"
    assert levels(check_shared(64 << 20, replace(ONE, size=8))) == ["problem"]
    assert not check_shared(64 << 20, ONE) and not check_shared(8 << 30, replace(ONE, size=8))


def test_disk_space_and_speed(tmp_path):
    gigabyte = 10 ** 9
    assert levels(judge_disk(tmp_path, 100 * gigabyte, 1e9, 10 * gigabyte, 3)) == ["ok"]
    full, = judge_disk(tmp_path, 39 * gigabyte, 1e9, 10 * gigabyte, 3)
    assert full.level == "problem" and "3 checkpoints and one being written take 40.0 GB" in full.text
    slow, = judge_disk(tmp_path, 100 * gigabyte, 1e7, 10 * gigabyte, 3)
    assert slow.level == "warning" and "takes 1000 s at 10 MB/s" in slow.text
    found, = check_disk(CONFIG, tmp_path / "new" / "checkpoints", ONE, 1)
    assert found.level == "ok" and not list((tmp_path / "new" / "checkpoints").iterdir())
    (tmp_path / "file").write_text("")
    found, = check_disk(CONFIG, tmp_path / "file" / "checkpoints", ONE, 1)
    assert found.level == "problem" and "file" in found.text


def test_a_disk_that_is_full_is_not_taken_for_one_that_is_not_shared(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    found, = check_disk(CONFIG, tmp_path, ONE, 1)
    assert found.level == "problem" and "there is no room" in found.text and "None" not in found.text
    assert "make room" in found.mend and not list(tmp_path.iterdir())


def test_a_rank_that_does_not_see_the_folder_is_named(tmp_path):
    class Two(Ranks):  # the other rank has nothing mounted there
        def collect(self, value):
            return [value, value if not isinstance(value, float) else "No such file or directory: x"]

    found, = check_disk(CONFIG, tmp_path, Two(0, 2, torch.device("cpu"), "zigzag"), 1)
    assert found.level == "problem" and found.text.endswith("(rank 1)") and "mount it on every node" in found.mend


def gpu(number, **changes):
    return DeviceState("H200", f"host {number}", (9, 0), 0.99, 7e14)._replace(**changes)


@pytest.mark.parametrize("changes, level, words", [
    ({}, "ok", "4 x H200, 700 TFLOP/s"), ({"speed": 4e14}, "problem", "at 400 TFLOP/s, 700 elsewhere (rank 2)"),
    ({"free_share": 0.5}, "warning", "50% of a GPU's memory"), ({"identity": "host 0"}, "problem", "share a GPU"),
    ({"capability": (7, 5)}, "problem", "older than Ampere"), ({"name": "A100"}, "warning", "different GPUs")])
def test_devices(changes, level, words):
    states = [gpu(0), gpu(1), gpu(2, **changes), gpu(3)]
    found, = judge_devices(states)
    assert found.level == level and words in found.text


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8, 13])
def test_all_pairs_meet_once(world):
    plans = [rounds(world, rank) for rank in range(world)]
    met = []
    for number in range(len(plans[0])):
        for rank, plan in enumerate(plans):
            peer = plan[number]
            assert peer is None or plans[peer][number] == rank, "both know of it"
            if peer is not None and rank < peer:
                met.append((rank, peer))
    assert sorted(met) == list(itertools.combinations(range(world), 2))
    assert 40 < len(rounds(1000, 7)) < 64


def test_links_slower_than_expected_or_than_others():
    def links(**slow):
        return [Link(low, high, slow.get(f"p{low}{high}", 1e11 if HOSTS[low] == HOSTS[high] else 2e10))
                for low, high in itertools.combinations(range(4), 2)]

    assert levels(judge_links(links(), HOSTS, 1.2e11, 3e10)) == ["ok", "ok"]
    inside, between = judge_links(links(p01=1e10), HOSTS, 1.2e11, None)
    assert inside.level == "problem" and "ranks 0 (a) and 1 (a): 10.00 GB/s" in inside.text and between.level == "ok"
    _, between = judge_links(links(p13=1e9), HOSTS, None, None)
    assert between.level == "warning" and "1 are slow: ranks 1 (a) and 3 (b)" in between.text
    _, between = judge_links(links(), HOSTS, None, 1e11)
    assert between.level == "problem" and "4 are slow" in between.text, "all are: the wrong network"


def test_clocks():
    assert levels(judge_clocks([100.0, 100.5, 101.0])) == ["ok"]
    found, = judge_clocks([100.0, 100.1, 160.0])
    assert found.level == "warning" and "60.0 s apart" in found.text and found.text.endswith("(rank 2)")


def test_prediction_of_memory_and_time():
    config = RunConfig.from_toml(ROOT / "configs" / "1b.toml")
    fits, = predicted(config, "H200", 8, 8, 141 << 30)
    assert fits.level == "ok" and "s a step, most of it" in fits.text
    too_much, = predicted(replace(config, train=replace(config.train, recompute=False)), "H200", 2, 2, 64 << 30)
    assert too_much.level == "problem" and "train.recompute=true" in too_much.mend
    impossible, = predicted(config, "H200", 3, 8, 141 << 30)
    assert impossible.level == "warning" and "do not make whole blocks" in impossible.text


def test_findings_of_all_ranks_are_told_once():
    good, bad = ok("host", "fine"), Finding("problem", "data", "is missing", "mount it")
    assert doctor._merged([[good], [good], [good, bad]]) == [good, bad.on([2])]
    text = doctor.report([bad, good], ONE)
    assert text.splitlines()[0] == "ok      host: fine" and text.splitlines()[-1].startswith("not ready: 1 rank(s)")


def exchanged(late):
    """The checks that need several ranks; the clock of the last is `late` seconds off."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, world, torch.device("cpu"), "zigzag", dist.group.WORLD, dist.group.WORLD, dist.group.WORLD)
    offset = late if rank == world - 1 else 0.0
    return [check_sums(ranks), check_links(ranks, None, None), check_links(ranks, 1e6, None),
            check_clocks(ranks, lambda: time.time() + offset)]


def test_ranks_measure_their_links_and_clocks():
    everyone = run_ranks(3, exchanged, 50.0)
    assert everyone[0] == everyone[1] == everyone[2], "all ranks have the same findings"
    sums, links, impossible, clocks = everyone[0]
    assert levels(sums) == ["ok"] and links[0].text.startswith("3 pairs inside nodes: median ")
    assert impossible[0].level == "problem" and "3 are slow" in impossible[0].text, "a million GB/s"
    assert clocks[0].level == "warning" and clocks[0].text.endswith("(rank 2)")


def test_command_on_one_rank(tmp_path, capsys):
    common = ["--config", str(ROOT / "configs" / "tiny.toml"), "--device", "cpu", "--out", str(tmp_path), "--megabytes",
              "1"]
    assert doctor.main(common) == 0
    text = capsys.readouterr().out
    for part in ("versions", "data", "disk", "attention: runs on backend torch", "ready: 1 rank(s) on cpu"):
        assert part in text
    assert doctor.main([*common, "--data", str(tmp_path / "none"), "--optimizer", "apex", "--name", "other"]) == 1
    text = capsys.readouterr().out
    assert f"PROBLEM data: {tmp_path / 'none'} has no data.json" in text
    assert "PROBLEM settings: train.optimizer='apex' needs a GPU\n        take 'adamw'" in text
    assert (tmp_path / "other" / "checkpoints").is_dir(), "where launch.train would write with these options"
    assert doctor.main([*common, "--engine", "deepspeed", "--attention", "exact", "--set", "train.compare=false"]) == 1
    text = capsys.readouterr().out
    assert "PROBLEM settings: train.engine='deepspeed'" in text and "attention: runs on backend" not in text
    with pytest.raises(SystemExit) as stop:
        doctor.main([*common, "--set", "train.nothing=1"])
    assert stop.value.code == 2 and "unknown key 'nothing'" in capsys.readouterr().err
    for option, value in (("--per-node", "0"), ("--intra", "-1"), ("--inter", "nan"), ("--megabytes", "0"),
                          ("--timeout", "-5")):
        with pytest.raises(SystemExit) as stop:
            doctor.main([*common, option, value])
        assert stop.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


def test_command_on_two_ranks(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launch.doctor",
         "--config", "configs/tiny.toml", "--device", "cpu", "--out", str(tmp_path), "--megabytes", "1"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "1 pairs inside nodes" in found.stdout and "ready: 2 rank(s) on cpu, 0 problem(s)" in found.stdout


def test_a_rank_that_waits_in_vain_says_what_to_look_at(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    found = subprocess.run(
        [sys.executable, "-m", "launch.doctor", "--config", "configs/tiny.toml", "--device", "cpu", "--out",
         str(tmp_path), "--timeout", "2"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and "PROBLEM ranks: they did not come together" in found.stderr
