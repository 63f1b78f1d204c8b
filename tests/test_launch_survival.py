"""Runs that are killed, told to stop, started on other ranks, or robbed of their disk, and go on as if nothing was."""
import os
import random
import signal
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launched import DAY, Case, Launcher, assert_same, small_run, write_pattern
from tests.launchers import deepspeed, finish, mpirun, rank_process, started, torchrun


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pattern(folder)
    return folder


@pytest.fixture
def case(launcher, data, tmp_path):
    return Case(launcher, data, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(launcher, data, tmp_path_factory):
    """A run of 12 steps on two ranks that nothing happens to."""
    case = Case(launcher, data, tmp_path_factory.mktemp("undisturbed"))
    case.finish()
    return case


@pytest.fixture(scope="module")
def longer(launcher, data, tmp_path_factory):
    """One of 40 steps, so that a launcher that is told to stop comes before the end."""
    case = Case(launcher, data, tmp_path_factory.mktemp("longer"), 40)
    case.finish()
    return case


@pytest.mark.timeout(600)
def test_twenty_kills_lose_and_repeat_nothing(launcher, data, tmp_path):
    steps = 90
    (tmp_path / "calm").mkdir(), (tmp_path / "hit").mkdir()
    calm, hit = (Case(launcher, data, tmp_path / name, steps) for name in ("calm", "hit"))
    calm.finish()
    rng, reached = random.Random(0), []
    for _ in range(20):
        run, starting = hit.start(), rng.random() < 0.2
        if starting:
            time.sleep(rng.uniform(0, 1))
        else:
            hit.wait_for_steps(run, rng.randint(1, 4))
            time.sleep(rng.uniform(0, 0.05))  # also in the middle of a step, or of a checkpoint
        victim = rng.randrange(2)
        assert run.poll() == [None, None], run.output()
        run.kill(victim)
        if starting:  # who waits for others to come waits long: here it is torchrun that ends all
            run.kill(1 - victim)
        codes = run.wait()
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0, run.output()
        reached.append(len(hit.rows()))
    assert reached[-1] < steps, "it was over before the last kill"
    assert reached[-1] > 10, "nothing went on"
    assert "going on after step" in hit.finish()
    assert_same(hit, calm)


def test_a_run_that_is_stopped_before_its_first_step_goes_on(case, undisturbed):
    run = case.start(2, "--set", "train.compare=true")  # which takes a while before
    deadline = time.monotonic() + 60
    while not case.run_folder.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    run.kill(0, signal.SIGTERM)
    assert run.wait() == [0, 0], run.output()
    case.finish()
    assert_same(case, undisturbed)


def test_sigterm_saves_and_ends_well(case, undisturbed):
    run = case.start()
    case.wait_for_steps(run, 3)
    run.kill(1, signal.SIGTERM)  # one rank hears of it, all stop
    assert run.wait() == [0, 0], run.output()
    step = len(case.rows())
    assert 3 <= step < 12 and f"stopped by SIGTERM after step {step}" in run.output()
    assert case.checkpoints()[-1].name == f"step-{step:09}"
    assert f"going on after step {step}" in case.finish()
    assert_same(case, undisturbed)


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_second_run_in_the_folder_is_refused_and_does_no_harm(case, undisturbed, tmp_path, fresh):
    run = case.start()
    case.wait_for_steps(run, 1)
    (tmp_path / "second").mkdir()
    arguments = ["--config", case.folder / "run.toml", "--out", case.folder, "--device", "cpu", *fresh]
    second = case.launcher.start(arguments, 2, tmp_path / "second")
    run.kill(0, signal.SIGSTOP)  # so that it is surely there all the while
    assert second.wait() == [2, 2], second.output()
    run.kill(0, signal.SIGCONT)
    assert f"{case.run_folder} is in use by another run, process {run.pids[0]} on " in second.output()
    assert "take another --name" in second.output()
    assert run.wait() == [0, 0], run.output()
    assert_same(case, undisturbed)


def training(case, starter):
    """The training command for a launcher."""
    mpi = ["launch.mpi"] if starter is mpirun else []
    return ["-m", *mpi, "launch.train", "--config", str(case.folder / "run.toml"), "--out", str(case.folder),
            "--device", "cpu"]


def wait_for_steps(case, run, steps):
    deadline = time.monotonic() + 120
    while len(case.rows()) < steps:
        assert time.monotonic() < deadline and run.poll() is None, finish(run)
        time.sleep(0.005)


@pytest.mark.parametrize("starter, number", [
    (torchrun, signal.SIGTERM), (deepspeed, signal.SIGTERM), (mpirun, signal.SIGUSR1)])
def test_a_launcher_that_is_told_to_stop_has_its_ranks_save(starter, number, launcher, data, longer, tmp_path):
    case = Case(launcher, data, tmp_path, len(longer.rows()))
    with started(starter, case.folder, *training(case, starter)) as run:
        wait_for_steps(case, run, 3)
        run.send_signal(number)
        output, = finish(run)
    step = len(case.rows())
    assert f"stopped by SIGTERM after step {step};" in output
    assert case.checkpoints()[-1].name == f"step-{step:09}"
    assert f"going on after step {step}" in case.finish()
    assert_same(case, longer)


@pytest.mark.parametrize("starter", [torchrun, mpirun])
def test_a_frozen_rank_ends_the_run_of_a_launcher(starter, case, data):
    """SIGTERM does not reach it: torchrun kills it after half a minute. test_deepspeed_lost.py has DeepSpeed's."""
    (case.folder / "run.toml").write_text(small_run(10_000, data, timeout=4))
    with started(starter, case.folder, *training(case, starter)) as run:
        wait_for_steps(case, run, 3)
        rank_process(case.folder, 1).send_signal(signal.SIGSTOP)
        frozen = time.monotonic()
        output, = finish(run)
    assert run.returncode != 0
    assert "rank 0: no progress for 4 s in step" in output, output
    assert 3 < time.monotonic() - frozen < 4 + 60


def test_broken_checkpoints_are_named_and_skipped(case):
    case.finish(2, "--set", "log.keep=9")
    two, four, six, eight, ten, twelve = case.checkpoints()
    broken = "rank-00001.safetensors"
    os.truncate(twelve / broken, (twelve / broken).stat().st_size // 2)
    content = bytearray((ten / broken).read_bytes())
    content[-1] ^= 1
    (ten / broken).write_bytes(content)
    (eight / broken).unlink()
    os.truncate(six / "manifest.json", 20)
    for path in four.iterdir():
        path.unlink()
    printed = case.finish(2, "--set", "log.keep=9")
    for path, why in ((twelve, broken + " has "), (ten, broken + " is not what was written"),
                      (eight, broken + " cannot be read"), (six, "manifest.json is no manifest"),
                      (four, "manifest.json cannot be read")):
        assert f"warning: {path} is skipped: {why}" in printed
    assert "going on after step 2" in printed
    assert [row["step"] for row in case.rows()] == list(range(1, 13))
    assert len(case.checkpoints()) == 6


def test_no_whole_checkpoint_is_an_error_not_a_new_start(case):
    case.finish(1, "--steps", "4")
    for path in case.checkpoints():
        (path / "manifest.json").unlink()
    run = case.start(1, "--steps", "5")
    assert run.wait() == [2]
    assert "no checkpoint is whole; --fresh starts again" in run.output() and "step-000000002" in run.output()


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_other_ranks_go_on_with_the_same_data(case, undisturbed, before, after):
    case.finish(before, "--steps", "6")
    printed = case.finish(after)
    assert "going on after step 6" in printed and f"on {after} x cpu" in printed
    assert [row["first_sequence"] for row in case.rows()] == list(range(0, 24, 2))
    # MuSe on two ranks is not MuSe on one, and six steps have another schedule: near, not equal.
    losses = [row["loss"] for row in case.rows()]
    assert losses == pytest.approx([row["loss"] for row in undisturbed.rows()], rel=0.05)


def test_ranks_that_share_nothing_or_weights_compute_the_same(launcher, data, tmp_path):
    """Exact attention does not depend on the ranks: one rank, two replicas, two shares, sharded weights."""
    curves, weights = {}, {}
    for name, ranks, more in (("one", 1, []), ("replicas", 2, ["train.context_parallel=1"]), ("shared", 2, []),
                              ("sharded", 2, ["train.shard=true", "train.micro_batch=1"])):
        (tmp_path / name).mkdir()
        case = Case(launcher, data, tmp_path / name, 6)
        case.finish(ranks, "--attention", "exact", "--set", "log.keep=9", *more)
        curves[name], weights[name] = [row["loss"] for row in case.rows()], case.weights()
    for name in ("replicas", "shared", "sharded"):
        assert curves[name] == pytest.approx(curves["one"], rel=1e-5), name
        for key, value in weights["one"].items():
            np.testing.assert_allclose(weights[name][key], value, atol=2e-4, err_msg=name)


def test_sharded_weights_go_on_in_one_piece(launcher, data, tmp_path):
    """From two ranks with half of every weight each to one, and back, with exact attention: the same curve."""
    calm, moved = (Case(launcher, data, tmp_path / name) for name in ("calm", "moved") if not (
        tmp_path / name).mkdir())
    exact = ("--attention", "exact")
    calm.finish(1, *exact)
    for last, ranks, more in ((4, 2, "true"), (8, 1, "false"), (12, 2, "true")):
        run = moved.start(ranks, *exact, "--set", f"train.shard={more}")
        deadline = time.monotonic() + 60
        while len(moved.rows()) < last and None in run.poll() and time.monotonic() < deadline:
            time.sleep(0.005)
        run.kill(0, signal.SIGTERM)
        assert run.wait() == [0] * ranks, run.output()
    assert len(moved.rows()) == 12
    assert [row["loss"] for row in moved.rows()] == pytest.approx([row["loss"] for row in calm.rows()], rel=1e-5)


def test_a_full_disk_costs_a_checkpoint_not_the_run(case, undisturbed):
    """Files may not grow beyond 12000 bytes: the metrics of six steps fit, no rank's tensors do."""
    run = case.start(2, "--steps", "6", limit=12_000)
    codes = run.wait()
    assert all(codes), run.output()
    printed = run.output()
    assert "warning: the checkpoint of step 2 could not be written: rank" in printed and "There is none yet" in printed
    assert "step 6/6" in printed, "training went on"
    assert "RuntimeError: the checkpoint of step 6 could not be written" in printed
    assert not list((case.run_folder / "checkpoints").iterdir()), "what was half written is gone"
    case.finish()
    assert_same(case, undisturbed)


def test_data_that_ends_early_is_named_and_what_was_learned_is_kept(case, undisturbed, data, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (case.folder / "run.toml").write_text(small_run(12, copy))
    run = case.start()
    case.wait_for_steps(run, 3)
    os.truncate(copy / "train.bin", 0)
    codes = run.wait()
    assert all(codes), run.output()
    assert f"OSError: {copy / 'train.bin'} ends before token" in run.output()
    step = len(case.rows())
    assert case.checkpoints()[-1].name == f"step-{step:09}"
    run = case.start()
    assert run.wait() == [2, 2] and "is cut off or belongs to another index" in run.output()
    (copy / "train.bin").write_bytes((data / "train.bin").read_bytes())
    assert f"going on after step {step}" in case.finish()
    assert_same(case, undisturbed)


def test_a_clock_that_goes_back_changes_nothing(case, undisturbed):
    """After two steps, by a day, and on; the run is then stopped, and goes on before the time at which it began."""
    early = (case.run_folder / "metrics.jsonl", 2)
    run = case.start(early=early)
    case.wait_for_steps(run, 4)
    run.kill(0, signal.SIGTERM)
    assert run.wait() == [0, 0], run.output()
    first, = (case.run_folder / "tensorboard").iterdir()
    newest = case.checkpoints()[-1]
    assert newest.name == f"step-{len(case.rows()):09}"
    assert f"going on after step {len(case.rows())}" in case.finish(early=early)
    assert_same(case, undisturbed)
    assert [path.name for path in case.checkpoints()] == [path.name for path in undisturbed.checkpoints()]
    assert all(0 < row["seconds"] < 60 for row in case.rows())
    second, = set((case.run_folder / "tensorboard").iterdir()) - {first}
    before, after = (EventAccumulator(str(path)).Reload().Scalars("train/loss") for path in (first, second))
    assert [event.step for event in before + after] == list(range(1, 13))
    begin, *later = [event.wall_time for event in before + after]  # the clock that the run itself has read
    assert all(begin - DAY - 600 < when < begin - DAY + 600 for when in later)


def test_dates_of_checkpoints_do_not_count(case):
    case.finish(2, "--steps", "4")
    oldest, newest = case.checkpoints()
    for path in (newest, *newest.iterdir()):  # the newest checkpoint has the oldest date
        os.utime(path, (1, 1))
    for path in (oldest, *oldest.iterdir()):
        os.utime(path, (2**31, 2**31))
    assert "going on after step 4" in case.finish(2, "--steps", "5")
    assert [row["step"] for row in case.rows()] == [1, 2, 3, 4, 5]
    assert all(row["seconds"] > 0 for row in case.rows())


def test_other_data_or_another_seed_is_refused(case, data, tmp_path):
    case.finish(1, "--steps", "2")
    run = case.start(1, "--seed", "3")
    assert run.wait() == [2] and "was made with seed 0, and here it is 3" in run.output()
    run = case.start(1, "--set", "data.context=64")
    assert run.wait() == [2] and "was made with data" in run.output()
    run = case.start(1, "--set", "model.width=32")
    assert run.wait() == [2] and "is of another model" in run.output() and "[64, 16] there and [64, 32] here" in (
        run.output())


def test_a_rank_that_hangs_shows_its_stack_and_ends(case):
    run = case.start(2, "--set", "train.timeout=4")
    case.wait_for_steps(run, 2)
    run.kill(1, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while run.poll()[0] is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.kill(1)
    assert run.wait()[0] == 70
    printed = run.outputs[0].read_text()
    for part in ("rank 0: no progress for 4 s in step", "trainer.py", "most recent call first"):
        assert part in printed


def test_a_rank_that_hangs_after_the_last_step_ends_the_run_too(case):
    run = case.start(2, "--steps", "2", "--set", "train.timeout=4", "data.held_out_sequences=100000")
    case.wait_for_steps(run, 2)
    deadline = time.monotonic() + 60
    while not case.checkpoints() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    run.kill(1, signal.SIGSTOP)
    frozen = time.monotonic()
    while run.poll()[0] is None and time.monotonic() < frozen + 60:
        time.sleep(0.05)
    run.kill(1)
    assert run.wait()[0] == 70, run.output()
    printed = run.outputs[0].read_text()
    assert "rank 0: no progress for 4 s in the measuring at the end" in printed and "compare.py" in printed
