"""DeepSpeed runs of each launcher that lose a rank: it is killed, or hangs, and the run ends and can go on."""
from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("deepspeed")

from tests.launchers import ROOT, deepspeed, finish, mpirun, rank_process, started, torchrun

PROGRAM = str(ROOT / "tests" / "deepspeed_runs.py")


def example_of(folder, steps):
    """The example program, which saves after every fourth step."""
    return ["-m", "launch.deepspeed_example", "--tokens", "1024", "--out", str(folder), "--save-every", "4",
            "--steps", str(steps)]


def losses(folder):
    """(step, loss) in the order of logging."""
    file = folder / "loss.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.mark.parametrize("launcher", [torchrun, deepspeed, mpirun])
def test_a_killed_rank_ends_the_run_and_a_restart_resumes(launcher, tmp_path):
    with started(launcher, tmp_path, *example_of(tmp_path, steps=1000)) as run:
        deadline = time.monotonic() + 200
        while len(losses(tmp_path)) < 6:
            assert time.monotonic() < deadline and run.poll() is None, finish(run)
            time.sleep(0.05)
        rank_process(tmp_path, 1).kill()
        killed = time.monotonic()
        output, = finish(run)
        assert time.monotonic() - killed < 60  # the timeout of the config
    assert run.returncode != 0
    # mpirun ends the others before they can say that one is gone, and says so itself; torchrun does after a tenth of a
    # second, in which the other need not have come to an exchange.
    if launcher is mpirun:
        assert "process rank 1 with" in output and "exited on signal 9" in " ".join(output.split()), output
    elif launcher is torchrun and "closing signal SIGTERM" in output:
        assert "Signal 9 (SIGKILL) received" in output and "rank      : 1" in output, output
    else:
        assert "rank 0 of 2 stops in step" in output and "Start the run again from its last checkpoint" in output

    before = losses(tmp_path)
    last = len(before) + 2
    with started(launcher, tmp_path, *example_of(tmp_path, last)) as again:
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


@pytest.mark.parametrize("launcher, stage, where, how", [
    (torchrun, 1, "shard", "sleep"), (torchrun, 3, "step", "sleep"), (deepspeed, 3, "step", "stop"),
    (mpirun, 1, "shard", "stop"), (mpirun, 3, "step", "sleep")])
def test_a_stuck_rank_ends_the_run_within_the_timeout(launcher, stage, where, how, tmp_path):
    with started(launcher, tmp_path, PROGRAM, "hang", str(tmp_path), str(stage), where, how) as run:
        output, = finish(run)
        ended = time.time()
    assert run.returncode != 0
    assert "rank 0 of 2 stops in step 2" in output and "did not answer within 10 s" in output
    last = max(float(line.split()[-1]) for line in output.splitlines() if line.startswith("done 0"))
    assert 9 < ended - last < 10 + 60  # for the launcher to end the other, which takes long on a busy machine
