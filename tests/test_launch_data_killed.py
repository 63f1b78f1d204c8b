"""launch.data when its processes are killed, and when it is started twice."""
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from launch import data as command
from launch import data_sources
from tests.test_launch_data import TEXTS, lines


def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_said_with_what_helps(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 20))
    monkeypatch.setattr(data_sources, "UNIT", 3000)
    monkeypatch.setattr(command, "encode_unit", dies)
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "2"])
    assert "processes was killed" in (said := capsys.readouterr().err) and "fewer than --workers 2" in said


@pytest.fixture
def running(tmp_path):
    """launch.data in the middle of its work, with two processes; the first one stands still."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(["word " * 400] * 20_000))
    with subprocess.Popen([sys.executable, "-m", "launch.data", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"),
                           "--out", str(tmp_path / "out"), "--workers", "2"], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while len(list((tmp_path / "out" / "parts").glob("*.bin.*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2 and process.poll() is None
        yield process, workers
        process.kill()


def test_the_processes_of_a_killed_command_end_and_it_goes_on(running, tmp_path):
    process, workers = running
    process.kill()
    process.wait()
    left = psutil.wait_procs(workers, timeout=60)[1]
    for worker in left:
        worker.kill()
    assert not left, "they wait for work that never comes"
    assert command.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "out"),
                         "--workers", "1"]) == 0
    about = json.loads((tmp_path / "out" / "data.json").read_text())
    assert about["train"]["documents"] + about["held_out"]["documents"] == 40_000
    assert about["train"]["tokens"] + about["held_out"]["tokens"] == 40_000 * 2001
    assert not (tmp_path / "out" / "parts").exists()


def test_a_second_command_for_the_folder_is_refused(running, tmp_path, capsys):
    process, _ = running
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
    said = capsys.readouterr().err
    assert f"is in use by another run, process {process.pid} on " in said and "take another --out" in said
