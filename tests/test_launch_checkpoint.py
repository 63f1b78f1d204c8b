"""Checkpoints by themselves: what is in them, when it is copied, how many stay, what is refused."""
import json
import os
import pickletools
import resource
import signal
import threading

import pytest
import torch

from launch import storage
from launch.checkpoint import Checkpoints
from launch.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), "zigzag")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors(value):
    return {"model.w": torch.full((40, 3), value), "model.b": torch.full((5,), value, dtype=torch.bfloat16),
            "optimizer.w.step": torch.tensor(value)}


def saved(folder, *steps, keep=3):
    found = Checkpoints(folder, ALONE, keep)
    for step in steps:
        assert found.save(step, tensors(float(step)), {"step": step}) == []
    assert found.wait() == []
    return found


def test_what_is_saved_comes_back_in_place(tmp_path):
    found = saved(tmp_path, 7)
    there = tensors(0.0)
    places = {name: x.data_ptr() for name, x in there.items()}
    found.load(7, there)
    for name, x in tensors(7.0).items():
        assert torch.equal(there[name], x) and there[name].dtype == x.dtype and there[name].data_ptr() == places[name]
    assert found.state(7) == {"step": 7} and found.newest() == (7, [])


def test_the_state_is_that_of_the_call_however_late_it_is_written(tmp_path, monkeypatch):
    go, write = threading.Event(), storage.SafeWriter.write_data

    def late(*arguments):
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(storage.SafeWriter, "write_data", late)
    found, live = Checkpoints(tmp_path, ALONE, 3), tensors(1.0)
    found.save(1, live, {})
    for x in live.values():
        x.fill_(9.0)  # the next step
    assert found.poll() == [] and found.steps() == [], "it is being written while training goes on"
    go.set()
    assert found.wait() == []
    found.load(1, live)
    assert all(torch.equal(live[name], x) for name, x in tensors(1.0).items())


def test_the_last_few_stay(tmp_path):
    found = saved(tmp_path, 1, 2, 10, 11, keep=2)
    assert found.steps() == [10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000011"]


def test_no_file_is_a_pickle_and_reading_unpickles_nothing(tmp_path, monkeypatch):
    found = saved(tmp_path, 3)
    names = sorted(path.name for path in found.path(3).iterdir())
    assert names == ["index.json", "manifest.json", "rank-00000.safetensors", "state.json"]
    for path in found.path(3).iterdir():
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", None)
    monkeypatch.setattr(torch, "load", None)
    there = tensors(0.0)
    assert found.newest() == (3, [])
    found.load(3, there)
    assert there["model.w"][0, 0] == 3.0


def test_what_a_killed_writer_left_is_removed_and_never_read(tmp_path):
    found = saved(tmp_path, 3)
    (tmp_path / "step-000000004.partial").mkdir()
    (tmp_path / "step-000000004.partial" / "rank-00000.safetensors").write_bytes(b"half")
    assert found.steps() == [3] and found.newest() == (3, [])
    assert not (tmp_path / "step-000000004.partial").exists()


def test_every_state_a_kill_can_leave_is_whole_or_not_there(tmp_path, monkeypatch):
    """Stop the writer before each of its writes, syncs and renames: the checkpoint before stays the newest."""
    found = saved(tmp_path, 1)
    calls = []

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) == stop_at:
                raise Killed
            return function(*arguments, **options)
        return call

    for owner, name in ((storage, "save_file"), (storage, "sync"), (storage, "describe_file"), (os, "fsync"),
                        (storage.Path, "write_text"), (storage.Path, "rename")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    stop_at = 0
    writer = storage.SafeWriter(tmp_path / "step-000000002.partial", tmp_path / "step-000000002", 0, {"step": 2})
    stops = 0
    for stop_at in range(1, 100):  # noqa: B007
        calls.clear()
        try:
            torch.distributed.checkpoint.save(tensors(2.0), storage_writer=writer)
        except BaseException:
            stops += 1
            step = found.steps()[-1]
            assert storage.problem_with(found.path(step)) is None
            if step == 2:  # the rename was done, only the folder's own sync was not
                break
            continue
        break
    assert stops > 10 and found.newest() == (2, [])


def test_a_full_disk_is_said_and_cleaned_up(tmp_path):
    found = saved(tmp_path, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        found.save(2, tensors(2.0), {})
        (trouble,) = found.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)
    assert "the checkpoint of step 2 could not be written" in trouble
    assert "newest whole one is that of step 1" in trouble
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert found.save(3, tensors(3.0), {}) == [] and found.wait() == [], "the next one is tried again"
    assert found.newest() == (3, [])


@pytest.mark.parametrize("change, message", [
    (lambda x: x.pop("model.b"), "model.b has shape .5. there and none here"),
    (lambda x: x.update(more=torch.zeros(2)), "more has shape none there and .2. here"),
    (lambda x: x.update({"model.w": torch.zeros(3, 40)}), r"model.w has shape .40, 3. there and .3, 40. here"),
])
def test_another_model_is_refused(tmp_path, change, message):
    found, there = saved(tmp_path, 1), tensors(0.0)
    change(there)
    with pytest.raises(ValueError, match=f"is of another model: {message}"):
        found.load(1, there)


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    found = saved(tmp_path, 1)
    manifest = found.path(1) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    manifest.write_text(json.dumps(content))
    assert "outside the folder" in storage.problem_with(found.path(1))
