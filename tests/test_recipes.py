"""The shell recipes with stand-ins for the programs they call, and launch.mpi under mpirun itself."""
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "launch").glob("*.sh"))


def stand_in(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def environment(folder, **more):
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **more}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_programs_their_shell_understands(recipe):
    assert os.access(recipe, os.X_OK)
    shell = recipe.read_text().splitlines()[0].removeprefix("#!")
    subprocess.run([shell, "-n", recipe], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", recipe], check=True)


@pytest.mark.parametrize("arguments, wanted", [
    (["2", "8", "node1", "--node-rank", "1", "-m", "a b"],
     "--nnodes 2 --nproc-per-node 8 --master-addr node1 --master-port 29500 --node-rank 1 -m a b:"),
    (["2:4", "8", "node1:400", "--max-restarts", "3", "-m", "x"],
     "--nnodes 2:4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:400 --max-restarts 3 -m x:1"),
])
def test_torchrun_is_static_with_a_node_rank_and_elastic_without(tmp_path, arguments, wanted):
    stand_in(tmp_path, "torchrun", 'echo "$*:${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-}" $OMP_NUM_THREADS')
    found = subprocess.run([ROOT / "launch" / "torchrun.sh", *arguments], capture_output=True, text=True, check=True,
                           env=environment(tmp_path, OMP_NUM_THREADS="3"))
    assert found.stdout == f"{wanted} 3\n"
    usage = subprocess.run([ROOT / "launch" / "torchrun.sh"], capture_output=True, text=True)
    assert usage.returncode == 2 and "launch/torchrun.sh NODES GPUS FIRST" in usage.stderr


@pytest.fixture
def slurm(tmp_path):
    """Starts launch/slurm.sh with a torchrun that does `text`; scontrol writes down what it was asked."""
    stand_in(tmp_path, "scontrol", f'echo "$*" >> {tmp_path}/asked; [ "$1" != show ] || printf "n1\\nn2\\n"')
    stand_in(tmp_path, "srun",
             f'echo "$1 $2 $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" > {tmp_path}/srun; shift 2; exec "$@"')

    def start(text):
        stand_in(tmp_path, "torchrun", f"echo \"$*\" > {tmp_path}/started; {text}")
        return subprocess.Popen(["bash", ROOT / "launch" / "slurm.sh", "-m", "launch.train"], env=environment(
            tmp_path, SLURM_JOB_ID="123", SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4",
            SLURM_CPUS_PER_TASK="96"))

    return start


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_job_ends_with_the_status_of_the_run(slurm, tmp_path, status):
    assert slurm(f"exit {status}").wait(20) == status
    assert (tmp_path / "started").read_text() == (
        "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id 123 --rdzv-endpoint n1:20123 -m launch.train\n")
    assert (tmp_path / "srun").read_text() == "--cpus-per-task=96 --kill-on-bad-exit=1 1\n"
    assert "requeue" not in (tmp_path / "asked").read_text()


def test_slurm_job_that_is_told_to_stop_lets_it_save_and_is_requeued(slurm, tmp_path):
    job = slurm(f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 1' TERM; sleep 60 & wait")
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert (tmp_path / "saved").exists(), "it waits for the ranks"
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 123"


MODULE = """
import os, sys, time
said = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS"
print("rank", *(os.environ[name] for name in said), sys.argv[1:])
sys.stdout.flush()
if sys.argv[1:] == ["fail"] and os.environ["RANK"] == "1":
    raise ValueError("rank 1 has failed")
if sys.argv[1:] == ["fail"]:
    time.sleep(300)
"""


def mpirun(folder, *arguments):
    pytest.importorskip("mpi4py")
    if not Path(sysconfig.get_path("scripts"), "mpirun").exists() and shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    (folder / "a_program.py").write_text(MODULE)
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [ROOT / "launch" / "mpirun.sh", "-np", "2", "--oversubscribe", "-x", "PYTHONPATH", "-x", "MASTER_PORT",
         sys.executable, "-m", "launch.mpi", "a_program", *arguments], capture_output=True, text=True, timeout=100,
        env={**inherited, "PATH": path, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "MASTER_PORT": "1234",
             "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})


def test_mpi_ranks_know_their_place(tmp_path):
    found = mpirun(tmp_path, "well")
    assert found.returncode == 0, found.stderr
    assert sorted(found.stdout.splitlines()) == ["rank 0 2 0 1234 1 ['well']", "rank 1 2 1 1234 1 ['well']"]


def test_an_mpi_rank_that_fails_ends_all(tmp_path):
    found = mpirun(tmp_path, "fail")
    assert found.returncode != 0 and "ValueError: rank 1 has failed" in found.stderr
