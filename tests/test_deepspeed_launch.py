"""DeepSpeed runs as users start them: three launchers, ranks that die and ranks that hang."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("deepspeed")

from tests.deepspeed_runs import CASES, alone
from tests.test_deepspeed import check
from tests.test_train_deepspeed import SMALL

ROOT = Path(__file__).parents[1]
PROGRAM = str(ROOT / "tests" / "deepspeed_runs.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EXAMPLE = ["-m", "launch.deepspeed_example", "--tokens", "1024"]
CASE = "stage 3, own model, DeepSpeed recomputes"


def start(command, **environment):
    """A launcher in a process group of its own; what it and its ranks say goes to one pipe."""
    scripts = sysconfig.get_path("scripts")
    variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
                  **environment}
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def finish(*processes, limit=200):
    """The output of launchers that must end; whatever they leave behind is killed."""
    try:
        return [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(folder):
    return [start([*TORCHRUN, PROGRAM, str(folder), CASE])]


def deepspeed_on_two_nodes(folder):
    """Two addresses of this machine stand for two nodes, each of which starts its own part."""
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    port = free_port()
    return [start([str(ROOT / "launch" / "deepspeed.sh"), str(folder), "--hostfile", str(folder / "hosts"), "--no_ssh",
                   "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port,
                   PROGRAM, str(folder), CASE]) for rank in range(2)]


def mpirun(folder):
    return [start([str(ROOT / "launch" / "mpirun.sh"), "-np", "2", "--oversubscribe", "-x", "MASTER_PORT",
                   sys.executable, PROGRAM, str(folder), CASE],
                  MASTER_PORT=free_port(), OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")]


@pytest.mark.parametrize("launcher", [torchrun, deepspeed_on_two_nodes, mpirun])
def test_every_launcher_trains_as_one_process(launcher, tmp_path):
    processes = launcher(tmp_path)
    output = "\n".join(finish(*processes))
    assert [process.returncode for process in processes] == [0] * len(processes), output
    check([torch.load(tmp_path / f"{CASE}.pt")], alone(CASES[CASE]))


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
    alone_here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": free_port()}
    run = start([sys.executable, *EXAMPLE, "--out", str(tmp_path), *more], **alone_here)
    output, = finish(run)
    assert run.returncode == 2 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith(f"python -m launch.deepspeed_example: error: {message}")


def example_of(folder, steps):
    """The example program, which saves after every fourth step."""
    return [*TORCHRUN, *EXAMPLE, "--out", str(folder), "--save-every", "4", "--steps", str(steps)]


def losses(folder):
    """(step, loss) in the order of logging."""
    file = folder / "loss.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def rank_process(launcher, rank):
    """The process of a rank below a launcher."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if process.environ().get("RANK") == str(rank) and "launch.deepspeed_example" in process.cmdline():
                return process
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"no process of rank {rank}")


def test_a_killed_rank_ends_the_run_and_a_restart_resumes(tmp_path):
    run = start(example_of(tmp_path, steps=1000))
    deadline = time.monotonic() + 200
    while len(losses(tmp_path)) < 6:
        assert time.monotonic() < deadline and run.poll() is None, finish(run)
        time.sleep(0.05)
    rank_process(run, 1).kill()
    killed = time.monotonic()
    output, = finish(run)
    assert time.monotonic() - killed < 60  # the timeout of the config
    assert run.returncode != 0
    assert "rank 0 of 2 stops in step" in output and "Start the run again from its last checkpoint" in output

    before = losses(tmp_path)
    last = len(before) + 2
    again = start(example_of(tmp_path, last))
    output, = finish(again)
    assert again.returncode == 0, output
    assert f"resumed after step {len(before) // 4 * 4}" in output
    after = losses(tmp_path)[len(before):]
    # Nothing is lost but the steps since the checkpoint, and these come out as they did before.
    assert [step for step, _ in after] == list(range(len(before) // 4 * 4 + 1, last + 1))
    repeated = dict(before).keys() & dict(after).keys()
    assert repeated
    for step in repeated:
        assert dict(after)[step] == pytest.approx(dict(before)[step], rel=1e-6)


@pytest.mark.parametrize("stage, where", [(1, "shard"), (3, "step")])
def test_a_stuck_rank_ends_the_run_within_the_timeout(stage, where):
    run = start([*TORCHRUN, PROGRAM, "hang", str(stage), where])
    output, = finish(run)
    ended = time.time()
    assert run.returncode != 0
    assert "rank 0 of 2 stops in step 2" in output and "did not answer within 10 s" in output
    last = max(float(line.split()[-1]) for line in output.splitlines() if line.startswith("done 0"))
    assert 9 < ended - last < 10 + 60  # for the launcher to end the other, which takes long on a busy machine
