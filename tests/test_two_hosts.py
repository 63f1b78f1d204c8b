"""One training run on two hosts: two network namespaces of this machine and a cable between them, which is pulled."""
import json
import shlex
import stat

import pytest

from tests.launched import Launcher, small_run, write_pattern
from tests.two_hosts import TwoHosts, wait_until, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"two hosts need root and iproute2: {REASON}")
STEPS = 24


class Case:
    """A run's folder, and what is in it."""

    def __init__(self, folder):
        self.folder = folder
        self.train = ["launch.train", "--config", folder / "run.toml", "--out", folder, "--device", "cpu"]
        write_pattern(folder)
        (folder / "run.toml").write_text(small_run(STEPS, folder, timeout=8))

    def losses(self):
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    def said(self, name):
        return (self.folder / name).read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of the same run on two ranks of one host."""
    case = Case(tmp_path_factory.mktemp("undisturbed"))
    with Launcher() as launcher:
        run = launcher.start(case.train[1:], 2, case.folder)
        assert run.wait() == [0, 0], run.output()
    return case.losses()


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def finish(case, processes, names, seconds):
    """Exit statuses; the hosts' output where one is late."""
    wait_until(lambda: all(process.poll() is not None for process in processes), seconds,
               lambda: "the end of:\n" + "\n".join(map(case.said, names)))
    return [process.poll() for process in processes]


def train_until(case, processes, steps, names):
    wait_until(lambda: len(case.losses()) >= steps or any(process.poll() is not None for process in processes), 120,
               lambda: "training: " + "\n".join(map(case.said, names)))
    assert len(case.losses()) < STEPS, "it was over before anything happened"
    assert [process.poll() for process in processes] == [None, None], "\n".join(map(case.said, names))


def test_a_cut_ends_in_a_clear_error_and_mpirun_goes_on_where_torchrun_was(case, undisturbed):
    with TwoHosts(case.folder) as hosts:
        names = ["torchrun-0", "torchrun-1"]
        processes = [hosts.start(i, ["launch/torchrun.sh", 2, 1, "host0", "--node-rank", i, "-m", *case.train],
                                 case.folder / names[i]) for i in range(2)]
        train_until(case, processes, 5, names)
        hosts.pull()
        assert all(finish(case, processes, names, 90)), "a run that was cut off is no success"
        behind = len(case.losses())
        assert behind < STEPS
        for i, name in enumerate(names):
            assert f"rank {i}: no progress for 8 s in step" in case.said(name)
            assert "failed (exitcode: 70)" in case.said(name)
        hosts.plug()

        agent = case.folder / "agent"  # stands for ssh: agent HOST COMMAND...
        agent.write_text(f'#!/bin/sh\nshift\nexec {shlex.join(hosts.enter(1))} sh -c "$*"\n')
        agent.chmod(agent.stat().st_mode | stat.S_IXUSR)
        command = ["env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "launch/mpirun.sh", "-np", 2,
                   "--host", "host0:1,host1:1", "--prtemca", "plm_ssh_agent", agent, "python", "-m", "launch.mpi"]
        mpirun = hosts.start(0, [*command, *case.train], case.folder / "mpirun")
        assert finish(case, [mpirun], ["mpirun"], 200) == [0], case.said("mpirun")
    assert "on 2 x cpu" in case.said("mpirun") and "going on after step" in case.said("mpirun")
    assert case.losses() == undisturbed, "no step was lost or repeated"


def test_elastic_ranks_start_again_by_themselves_when_the_link_is_back(case, undisturbed):
    with TwoHosts(case.folder) as hosts:
        names = ["torchrun-0", "torchrun-1"]
        processes = [hosts.start(i, ["launch/torchrun.sh", 2, 1, "host0:29511", "--max-restarts", 3, "-m", *case.train],
                                 case.folder / names[i]) for i in range(2)]
        train_until(case, processes, 5, names)
        hosts.pull()
        wait_until(lambda: all("no progress for 8 s in step" in case.said(name) for name in names), 60,
                   lambda: "an error on both hosts")
        hosts.plug()
        assert finish(case, processes, names, 200) == [0, 0], "\n".join(map(case.said, names))
    assert "going on after step" in "".join(map(case.said, names))
    assert case.losses() == undisturbed
