"""DeepSpeed runs as users start them, with three launchers, and the recipe of DeepSpeed's own."""
from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
import torch

pytest.importorskip("deepspeed")

from tests.deepspeed_runs import CASES, alone
from tests.launchers import ROOT, finish, free_port, mpirun, start, torchrun
from tests.test_deepspeed import check
from tests.test_train_deepspeed import SMALL

PROGRAM = str(ROOT / "tests" / "deepspeed_runs.py")
# Every stage of ZeRO, one after the other in the same processes.
SAME = ("stage 1, accumulation, clipping", "stage 2, own model, DeepSpeed recomputes", "stage 3, small buckets")


def deepspeed_on_two_nodes(folder):
    """Two addresses of this machine stand for two nodes, each of which starts its own part."""
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    port = free_port()
    return [start([str(ROOT / "launch" / "deepspeed.sh"), str(folder), "--hostfile", str(folder / "hosts"), "--no_ssh",
                   "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port,
                   PROGRAM, str(folder), *SAME]) for rank in range(2)]


def by_torchrun(folder):
    return [start(torchrun(folder, PROGRAM, str(folder), *SAME))]


def by_mpirun(folder):
    return [start(mpirun(folder, PROGRAM, str(folder), *SAME))]


@pytest.mark.parametrize("launcher", [by_torchrun, deepspeed_on_two_nodes, by_mpirun])
def test_every_launcher_trains_as_one_process(launcher, tmp_path):
    processes = launcher(tmp_path)
    output = "\n".join(finish(*processes))
    assert [process.returncode for process in processes] == [0] * len(processes), output
    for name in SAME:
        check([torch.load(tmp_path / f"{name}.pt")], alone(CASES[name]))


def test_deepspeed_recipe_does_not_take_lost_ranks_for_success(tmp_path):
    (tmp_path / "finished").touch()  # of an earlier run
    (tmp_path / "nothing.py").touch()
    process = start([str(ROOT / "launch" / "deepspeed.sh"), str(tmp_path), "--num_gpus", "1", "--master_port",
                     free_port(), str(tmp_path / "nothing.py")])
    assert "finished is missing" in finish(process)[0]
    assert process.returncode == 1


def test_the_deepspeed_recipe_starts_the_training_command(tmp_path):
    """Twice: what is finished is not trained again, and still a success."""
    (tmp_path / "small.toml").write_text(SMALL.replace("steps = 4", "steps = 1"))
    command = [str(ROOT / "launch" / "deepspeed.sh"), str(tmp_path / "small"), "--num_gpus", "2", "--master_port",
               free_port(), "--module", "launch.train", "--config", str(tmp_path / "small.toml"), "--out",
               str(tmp_path), "--engine", "deepspeed", "--device", "cpu"]
    for said in ("plots, results and model", "is finished after 1 steps"):
        process = start(command)
        output, = finish(process)
        assert process.returncode == 0 and said in output, output
        assert (tmp_path / "small" / "finished").exists()


def test_the_deepspeed_recipe_says_how_it_is_used():
    found = subprocess.run([str(ROOT / "launch" / "deepspeed.sh"), "runs/a"], text=True, capture_output=True)
    assert found.returncode == 2 and "launch/deepspeed.sh FOLDER [OPTION OF deepspeed]... PROGRAM" in found.stderr


def is_rank(process):
    """Whether a process is a rank of the recipe; one that has just ended is none."""
    try:
        words = process.cmdline()
        return words[-1:] == ["sleep"] and "deepspeed.launcher" not in " ".join(words) and "RANK" in process.environ()
    except psutil.Error:
        return False


def test_stopping_the_deepspeed_recipe_stops_its_ranks(tmp_path):
    recipe = start([str(ROOT / "launch" / "deepspeed.sh"), str(tmp_path), "--num_gpus", "2", "--master_port",
                    free_port(), PROGRAM, "sleep"])
    deadline = time.monotonic() + 200
    while len(ranks := [p for p in psutil.Process(recipe.pid).children(recursive=True) if is_rank(p)]) < 2:
        assert time.monotonic() < deadline and recipe.poll() is None
        time.sleep(0.1)
    recipe.terminate()
    finish(recipe)
    assert recipe.returncode == 143
    assert not psutil.wait_procs(ranks, timeout=60)[1]


@pytest.mark.parametrize("more, message", [
    ([], "muse.context_parallel_size=2 does not divide the 1 processes of the run; take a divisor of 1"),
    (["--tokens", "0"], "argument --tokens: 0 must be at least 1")])
def test_the_example_says_what_is_wrong_without_a_traceback(tmp_path, more, message):
    rank = ["env", "RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    run = start([*rank, sys.executable, "-m", "launch.deepspeed_example", "--tokens", "1024", "--out", str(tmp_path),
                 *more])
    output, = finish(run)
    assert run.returncode == 2 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith(f"python -m launch.deepspeed_example: error: {message}")
