"""Ranks that share sequences under DeepSpeed compute what one process of plain PyTorch does."""
from __future__ import annotations

import functools
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from filelock import FileLock

pytest.importorskip("deepspeed")

from muse_dist.deepspeed_checkpoint import RESHARD
from muse_dist.deepspeed_ranks import join_processes
from tests.deepspeed_runs import CASES, CASES_OF_FOUR, STEPS, Case, alone
from tests.deepspeed_worlds import on_more_or_less, on_two_ranks
from tests.ranks import run_ranks

TWO = [name for name in CASES if name not in CASES_OF_FOUR]


@functools.cache
def one(model, accumulation, clip, data_size=1, **muse):
    """The run in one process; how ranks share it changes nothing."""
    return alone(Case(0, model=model, accumulation=accumulation, clip=clip, muse=muse), data_size)


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Calls a function once for all processes of pytest: ranks start slowly, and many tests read what they did."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent

    def call(name, function):
        file = folder / f"deepspeed-{name}.pt"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                torch.save(function(folder), file)
        return torch.load(file, weights_only=False)

    return call


@pytest.fixture(scope="session")
def two(once):
    """What both ranks found: one set of processes for all cases. They leave checkpoints."""
    return once("two", lambda folder: run_ranks(2, on_two_ranks, TWO, str(folder), limit=250))


@pytest.fixture(scope="session")
def converted(once, two):
    """The folder of the checkpoints, made universal where ZeRO sharded them."""
    return once("converted", convert)


def convert(folder):
    for stage in (1, 2, 3):
        command = RESHARD.format(folder=folder / str(stage), tag="global_step3").split(", and")[0]
        subprocess.run([sys.executable, *command.split()[1:]], check=True, capture_output=True,
                       env={**os.environ, "DS_ACCELERATOR": "cpu"})
    return str(folder)


@pytest.fixture(scope="session")
def four(once, converted):
    return once("four", lambda _: run_ranks(4, on_more_or_less, list(CASES_OF_FOUR), converted, limit=250))


@pytest.fixture(scope="session")
def single(once, converted):
    return once("single", lambda _: run_ranks(1, on_more_or_less, [], converted, limit=250))


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_one_process(two, name):
    case = CASES[name]
    muse = {key: value for key, value in case.muse.items() if key in ("exchange", "layers")}
    wanted = one(case.model, case.accumulation, case.clip, **muse)
    if "bf16" not in case.json:
        check([rank[0][name] for rank in two], wanted)
        return
    plain = alone(case)  # in bf16, too: ranks may add no more error than it has
    for rank in two:
        # Before the first step all weights are equal, and clipping to a small norm cannot hide a wrong scale.
        assert rank[0][name]["norm"][0] == pytest.approx(wanted["norm"][0], rel=0.05)
        assert distance(rank[0][name], wanted) < 1.5 * distance(plain, wanted) < 0.5


def distance(found, wanted):
    """Relative distance of the changes of all parameters."""
    changes = [torch.cat([x.flatten() for x in run["change"].values()]) for run in (found, wanted)]
    return (torch.dist(*changes) / changes[1].norm()).item()


@pytest.mark.parametrize("name", CASES_OF_FOUR)
def test_four_ranks_train_as_one_process(four, name):
    case = CASES[name]
    check([rank[0][name] for rank in four], one(case.model, case.accumulation, case.clip, 4 // case.context))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_of_two_ranks_goes_on_with_another_number(two, request, ranks, stage):
    wanted = two[0][1][stage]
    for _, (found, problem) in request.getfixturevalue("single" if ranks == 1 else "four"):
        assert found[stage]["state"] == {"sequences": 17}
        assert found[stage]["steps"] == 2 * STEPS
        assert found[stage]["rate"] == pytest.approx(wanted["rate"])
        check([found[stage]], wanted)
        assert "another number of ranks" in problem and "ds_to_universal --input_folder" in problem


REFUSED = {
    "other tokens": "ranks that share a sequence got different ones",
    "other labels": "or different labels",
    "other length": "ranks that share a sequence got different ones",
    "bad length": "tokens: 50 tokens over 2 ranks do not make whole blocks",
    "bad shape": "must both be [B, N]",
    "no engine": "use engine.muse.loss",
    "too many ranks": "context_parallel_size=4 does not divide the 2 processes",
    "no MuSe in own model": "has no MuSe layer of these ranks; build it with parallel.attention()",
    "layers of own model": "muse.layers: is for models of transformers",
    "too few layers": "the model has 2 layers, 0 to 1",
    "other config": "config: differs from the one given to join",
    "mpu": "mpu: the groups come from the config",
    "args": "args.deepspeed_config: pass the path as config=",
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_is_told_what_is_wrong(two, name):
    for _, _, said in two:
        assert REFUSED[name] in said[name]


def test_ranks_that_share_a_sequence_read_the_same_training_data(two):
    first, second = (said["loader"] for _, _, said in two)
    assert first == second and len(first.split(",")) == 8  # one replica reads all of it


def test_sequences_are_padded_if_asked(two):
    shapes, labelled = zip(*(said["padded"].split("] ") for _, _, said in two))
    assert shapes == ("[1, 32", "[1, 32")
    assert sum(map(int, labelled)) == 49  # of 50 tokens the last has no successor


def test_a_process_that_was_not_told_its_gpu_is_told_how(monkeypatch):
    import deepspeed

    monkeypatch.setattr(deepspeed, "get_accelerator", lambda: mock.Mock(device_name=lambda: "cuda"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK is not set.*start the run with torchrun, deepspeed or mpirun"):
        join_processes(1, 10.0)


def test_a_rank_hears_of_another_ones_problem(two):
    for name, problem in (("bad length of rank 1", "63 tokens over 2 ranks"), ("bad shape of rank 1", "must both be")):
        first, second = (said[name] for _, _, said in two)
        assert "another rank that shares the sequence could not use its batch" in first
        assert problem in second


def check(found, wanted):
    """Every rank's losses, gradient norms and change of every parameter are those of one process, to rounding."""
    for rank in found:
        assert rank["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert rank["norm"] == pytest.approx(wanted["norm"], rel=1e-4)
        assert rank["change"].keys() == wanted["change"].keys()
        for name, change in wanted["change"].items():
            assert torch.dist(rank["change"][name], change) < 1e-4 * change.norm(), name
            assert change.norm() > 0, name
