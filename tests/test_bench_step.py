"""launch.bench step: every attention is a row, with what it measured or why it could not."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("deepspeed")

from launch.bench import main
from launch.bench_step import add_command, make_job, measure, step_table

ROOT = Path(__file__).parents[1]
SMALL = ["--config", "configs/tiny.toml", "--tokens", "512", "--device", "cpu", "--warmup", "1", "--steps", "2"]


def test_rows_side_by_side_in_one_run(tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "launch.bench", "step", *SMALL, "--stage", "3", "--json", str(rows), "--attention",
               "moments", "ulysses", "torch-cp"]
    found = subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                           text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
    moments, ulysses, ring = map(json.loads, rows.read_text().splitlines())
    for row in (moments, ulysses):
        assert row["ranks"] == 2 and row["tokens"] == 512 and row["stage"] == 3 and row["recompute"]
        assert len(row["seconds"]) == 2 and len(row["losses"]) == 3 and row["memory_gib"] is None
        assert min(row["seconds"]) <= row["step_seconds"] <= max(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(512 / row["step_seconds"])
    # The same weights and sequences: far fields of a few leaves cost little at the start of training.
    assert moments["losses"] == pytest.approx(ulysses["losses"], abs=0.05)
    assert ring["error"] == "NotImplementedError: torch's context_parallel has no attention for the CPU"
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["attention", "moments", "ulysses", "torch-cp"]
    assert lines[2].endswith("1.00x") and "no attention for the CPU" in lines[3]


@pytest.mark.parametrize("most, late_ranks, timed", [("1000", 0, 4), ("1000", 1, 1), ("0", 0, 1), (None, 1, 4)])
def test_a_row_ends_when_its_time_is_over_on_any_rank(most, late_ranks, timed, monkeypatch):
    from launch.step_row import time_steps

    monkeypatch.chdir(ROOT)
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["step", *SMALL, "--steps", "4", *([] if most is None else ["--seconds", most])])
    engine = mock.MagicMock()  # of a model that learns nothing
    engine.module.config.vocab_size = 7
    engine.muse.shard.return_value = {}, None
    engine.muse.loss.return_value = torch.ones(())
    engine.muse.ranks.device = torch.device("cpu")
    engine.muse.ranks.sum = lambda x: x + late_ranks
    found = time_steps(engine, make_job(options, "moments", 2, "cpu"), time.perf_counter())
    assert len(found["seconds"]) == timed and len(found["losses"]) == 1 + timed


@pytest.mark.parametrize("arguments, message", [
    (["--set", "block=100"], "block=100 is not leaf=16 times a power of two"),
    (["--tokens", "500"], "500 tokens over 2 ranks do not make whole blocks"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--set", "blok=128"], "did you mean 'block'"),
    (["--config", "configs/none.toml"], "none.toml"),
])
def test_what_cannot_be_is_said_at_once(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("launch.bench_step.measure", lambda *_: pytest.fail("a row was started"))
    with pytest.raises(SystemExit) as stop:
        main(["step", *SMALL, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_takes_too_long_is_a_row():
    job = {"attention": "kv", "ranks": 1, "device": "cpu"}
    assert measure(job, limit=0.5)["error"].startswith("not done in 0.5 s")


def row(name, speed, loss):
    return {"attention": name, "step_seconds": 1.0, "seconds": [1.0], "tokens_per_second": speed, "memory_gib": 2.0,
            "loss": loss}


def test_speed_ups_are_over_the_fastest_exact_attention():
    table = step_table([row("moments", 300, 5.1), row("ulysses", 100, 5.0), row("torch-cp", 200, 5.0)]).splitlines()
    assert [line.split()[-1] for line in table[1:]] == ["1.50x", "0.50x", "1.00x"]


def test_no_speed_up_where_exact_attentions_disagree():
    table = step_table([row("moments", 300, 5.1), row("ulysses", 100, 5.0), row("torch-cp", 200, 5.1)]).splitlines()
    assert [line.split()[-1] for line in table[1:4]] == ["-"] * 3 and "differ by more than" in table[4]
    failed = {"attention": "ulysses", "error": "ValueError: no"}
    assert step_table([row("moments", 300, 5.1), failed]).splitlines()[1].endswith("-")
