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
    (["2", "8", "node1", "-m", "x"],
     "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500 -m x:1"),
    (["1:2", "8", "node1", "-m", "x"],
     "--nnodes 1:2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500 -m x:1"),
    (["1", "8", "localhost", "-m", "x"],  # any free port: another run on this node may have 29500
     "--nnodes 1 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m x:1"),
])
def test_torchrun_is_static_with_a_node_rank_and_elastic_without(tmp_path, arguments, wanted):
    stand_in(tmp_path, "torchrun", 'echo "$*:${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-}" $OMP_NUM_THREADS')
    found = subprocess.run([ROOT / "launch" / "torchrun.sh", *arguments], capture_output=True, text=True, check=True,
                           env=environment(tmp_path, OMP_NUM_THREADS="3"))
    assert found.stdout == f"{wanted} 3\n"
    usage = subprocess.run([ROOT / "launch" / "torchrun.sh"], capture_output=True, text=True)
    assert usage.returncode == 2 and "launch/torchrun.sh NODES GPUS FIRST" in usage.stderr


class Slurm:
    """Slurm's commands as stand-ins; what they were asked is in the file `asked`.

    As the true ones do, srun that gets SIGTERM kills its task, and scancel tells the task and not srun.
    """

    def __init__(self, folder):
        self.folder = folder
        self.preempted = "None"
        stand_in(folder, "srun", f'echo "$1 $2 $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" > {folder}/srun; shift 2\n'
                                 f'"$@" & task=$!; echo $task > {folder}/task\n'
                                 "trap 'kill -KILL $task; exit 137' TERM; wait $task; exit $?")
        stand_in(folder, "scancel", f'echo "scancel $*" >> {folder}/asked; kill -TERM $(cat {folder}/task)')

    def start(self, text, **more):
        """The recipe as a job, with a torchrun that does `text`."""
        stand_in(self.folder, "scontrol", f"""echo "$*" >> {self.folder}/asked
case "$1 $2" in "show hostnames") printf "n1\\nn2\\n" ;; "show job") echo "PreemptTime={self.preempted}" ;; esac""")
        stand_in(self.folder, "torchrun", f"echo \"$*\" > {self.folder}/started; {text}")
        return subprocess.Popen(["bash", ROOT / "launch" / "slurm.sh", "-m", "launch.train"], env=environment(
            self.folder, SLURM_JOB_ID="123", SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2", SLURM_CPUS_PER_TASK="96",
            **{"SLURM_GPUS_ON_NODE": "4", **more}))

    def start_and_save(self, **more):
        """As `start`, with a torchrun that trains until it gets SIGTERM, and then takes a while to save."""
        job = self.start(f"trap 'sleep 0.5; touch {self.folder}/saved; exit 1' TERM; touch {self.folder}/trains; "
                         "sleep 60 & wait", **more)
        self.wait_for("trains")
        return job

    def wait_for(self, name):
        """Until there is a file."""
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"there is no {name}"
            time.sleep(0.02)
        time.sleep(0.2)

    def preempt(self):
        """What Slurm does: it tells the processes of srun's task, and nobody else."""
        os.kill(int((self.folder / "task").read_text()), signal.SIGTERM)

    def asked(self):
        """The last thing that the job asked for."""
        return (self.folder / "asked").read_text().splitlines()[-1]


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_job_ends_with_the_status_of_the_run(slurm, tmp_path, status):
    assert slurm.start(f"exit {status}").wait(20) == status
    assert (tmp_path / "started").read_text() == (
        "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id 123 --rdzv-endpoint n1:20123 -m launch.train\n")
    assert (tmp_path / "srun").read_text() == "--cpus-per-task=96 --kill-on-bad-exit=1 1\n"
    assert "requeue" not in (tmp_path / "asked").read_text()


def test_slurm_job_whose_time_is_nearly_up_lets_it_save_and_is_requeued(slurm, tmp_path):
    job = slurm.start_and_save()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (tmp_path / "saved").exists(), "it waits for the ranks"
    assert "scancel --signal=TERM 123.0" in (tmp_path / "asked").read_text() and slurm.asked() == "requeue 123"


def test_slurm_job_that_is_preempted_lets_it_save_and_is_requeued(slurm, tmp_path):
    slurm.preempted = "2026-11-23T03:23:10"
    job = slurm.start_and_save()
    slurm.preempt()
    assert job.wait(20) == 0
    assert (tmp_path / "saved").exists() and slurm.asked() == "requeue 123"


def test_slurm_job_that_is_cancelled_lets_it_save_and_is_not_requeued(slurm, tmp_path):
    job = slurm.start_and_save()
    job.send_signal(signal.SIGTERM)
    slurm.preempt()
    assert job.wait(20) == 1
    assert (tmp_path / "saved").exists(), "it waits for the ranks"
    assert "requeue" not in (tmp_path / "asked").read_text()


def test_slurm_job_of_an_array_asks_for_itself_only(slurm):
    job = slurm.start_and_save(SLURM_ARRAY_JOB_ID="120", SLURM_ARRAY_TASK_ID="3")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0 and slurm.asked() == "requeue 120_3"


def test_slurm_job_is_not_requeued_for_ever(slurm, tmp_path, capfd):
    job = slurm.start_and_save(SLURM_RESTART_COUNT="100")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 1 and (tmp_path / "saved").exists()
    assert "requeue" not in (tmp_path / "asked").read_text() and "after 100 restarts" in capfd.readouterr().err


def test_slurm_job_without_a_step_to_tell_ends_srun(slurm, tmp_path):
    stand_in(tmp_path, "scancel", "exit 1")
    job = slurm.start_and_save()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0 and slurm.asked() == "requeue 123" and not (tmp_path / "saved").exists()


def test_slurm_counts_gpus_where_it_does_not_know_them_and_says_how_it_is_used(slurm, tmp_path):
    assert slurm.start("exit 0", SLURM_GPUS_ON_NODE="").wait(20) == 0
    assert "--nproc-per-node gpu " in (tmp_path / "started").read_text()
    usage = subprocess.run([ROOT / "launch" / "slurm.sh", "-m", "launch.train"], capture_output=True, text=True,
                           env=environment(tmp_path, SLURM_JOB_ID=""))
    assert usage.returncode == 2 and "sbatch launch/slurm.sh -m launch.train" in usage.stderr


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
