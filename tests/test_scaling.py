"""A small sweep on the CPU: rows, failures, going on, and the report; and the report of rows that are made up."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import scaling
from launch.plan_step import scaling_step
from launch.scaling_report import PLOTS, draw, groups, main_table, scaling_table, strong, weak, write_report
from launch.scaling_row import measured
from launch.scaling_runs import ending, slots

ROOT = Path(__file__).parents[1]
SETTINGS = """
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
mlp = 32
[train]
batch = 2
warmup = 2
threads = 1
[data]
context = 128
held_out_sequences = 1
[log]
checkpoint_every = 0
[muse]
block = 16
leaf = 8
group = 8
anchors = 1
remote_leaf = 8
opened = 1
"""


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "small.toml").write_text(SETTINGS)
    return ["--config", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "5",
            "--skip", "1"]


def rows_in(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_sweep_keeps_failures_and_goes_on(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    sweep = [*arguments, "--attention", "muse", "--ranks", "1", "2"]
    # 48 tokens make three blocks: one rank reads them, two cannot share them.
    assert scaling.main([*sweep, "--context", "48"]) == 1
    good, bad = rows_in(out)
    assert "do not make whole blocks" in bad["failed"] and bad["ranks"] == 2 and bad["failed"].startswith("exit status")
    assert good["tokens"] == 96 and good["steps"] == 5 and len(good["losses"]) == 5
    assert good["tokens_per_second"] == pytest.approx(96 / good["seconds"])
    assert good["fastest"] <= good["seconds"] <= good["slowest"]
    assert good["memory_bytes"] > 0 and good["stages"]["backward"] > 0
    assert good["vocabulary"] == 257, "one token a byte, and one between files"
    assert scaling_step(good).setup.shape.parameters == good["parameters"]
    assert not (out / "small-48-1-muse" / "checkpoints").exists()

    changed = (out / "rows.jsonl").stat().st_mtime_ns
    assert scaling.main([*sweep, "--context", "48"]) == 1
    assert (out / "rows.jsonl").stat().st_mtime_ns == changed, "nothing runs twice"
    assert scaling.main(["--report", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "## Failed" in printed and "| small" in printed
    for name in ("report.md", "report.jsonl", "report-speed.png", "report-loss.png"):
        assert (out / name).stat().st_size > 100
    assert not (out / "report-strong.png").exists(), "one number of ranks has no line"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_sweep_ends_its_run_and_goes_on_inside_it(arguments, tmp_path, number):
    out = tmp_path / "out"
    sweep = [*arguments[:-4], "--steps", "4000", "--attention", "exact"]
    process = subprocess.Popen([sys.executable, "-m", "launch.scaling", *sweep], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = out / "small-128-1-exact" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not (out / "rows.jsonl").exists()
    behind = metrics.read_text().count("\n")
    assert 3 < behind < 4000
    time.sleep(0.3)
    assert metrics.read_text().count("\n") == behind, "nothing runs on"
    log = (out / "small-128-1-exact" / "log.txt").read_text()
    assert "stopped by SIGTERM after step" in log

    sweep[sweep.index("4000")] = str(behind + 3)
    assert scaling.main(sweep) == 0
    row, = rows_in(out)
    assert row["steps"] == behind + 3
    assert f"going on after step {behind}" in (out / "small-128-1-exact" / "log.txt").read_text()


def test_what_nohup_has_switched_off_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_rows_of_other_settings_are_refused_or_measured_again(arguments, tmp_path, capsys):
    sweep = [*arguments, "--attention", "exact", "--speed-only"]
    assert scaling.main(sweep) == 0
    first, = rows_in(tmp_path / "out")
    assert first["asked"] == {"changes": ["data.context=128", "train.shard=false"], "data": None, "steps": 5, "skip": 1,
                              "speed_only": True, "engine": "torch"}
    for more, what in ((["--set", "train.batch=1"], "changes was"), (["--steps", "6"], "steps was 5 and is now 6"),
                       (["--skip", "2"], "skip was 1 and is now 2")):
        with pytest.raises(SystemExit):
            scaling.main([*sweep, *more])
        said = capsys.readouterr().err
        assert f"has 1 of these runs with other settings (small-128-1-exact: {what}" in said
        assert "take another --out, or --retry to run them again" in said
    assert rows_in(tmp_path / "out") == [first]
    assert scaling.main([*sweep, "--set", "train.batch=1", "--retry"]) == 0
    assert [row["tokens"] for row in rows_in(tmp_path / "out")] == [256, 128]
    assert scaling.main([*arguments, "--attention", "exact", "--retry"]) == 0
    assert scaling.main([*arguments, "--attention", "exact", "--steps", "3", "--retry"]) == 0
    assert [len(row["losses"]) for row in rows_in(tmp_path / "out")] == [0, 0, 5, 3], "a trained run starts afresh"


def test_a_run_of_wandb_gets_the_table_and_the_plots(tmp_path, monkeypatch):
    logged = {}

    class Wandb:
        @contextlib.contextmanager
        def init(self, **options):
            logged.update(options)
            yield SimpleNamespace(log=logged.update)

        def Table(self, columns, data):
            return [dict(zip(columns, line, strict=True)) for line in data]

        def Image(self, path):
            return Path(path).read_bytes()[1:4]

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    for row in (made(), made(ranks=2, speed=180.0)):
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert scaling.main(["--report", "--out", str(tmp_path), "--wandb", "offline"]) == 0
    assert [row["tokens/s"] for row in logged["runs"]] == ["100", "180"] and logged["mode"] == "offline"
    assert [name for name, value in logged.items() if value == b"PNG"] == ["strong", "speed", "loss"]


def test_a_report_of_nothing_leaves_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--report", "--out", str(tmp_path / "none")])
    assert "has no rows; start without --report" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_run_that_takes_too_long_is_a_row_that_says_so(arguments, tmp_path):
    assert scaling.main([*arguments, "--attention", "muse", "--limit", "0.5"]) == 1
    row, = rows_in(tmp_path / "out")
    assert row["failed"] == "not done in 0.5 s; --retry goes on with it"
    assert scaling.read_done(tmp_path / "out" / "rows.jsonl").keys() == {scaling.Job("small", 128, 1, "muse")}


def test_a_line_cut_off_is_measured_again_and_another_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"model": "a", "context": 1, "ranks": 1, "attention": "muse"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "ranks": 2})[:-9])
    assert list(scaling.read_done(path)) == [scaling.Job("a", 1, 1, "muse")]
    assert path.read_text() == json.dumps(row) + "\n"
    path.write_text('{"model": "a"}\n')
    with pytest.raises(ValueError, match="line 1: is no row of launch.scaling"):
        scaling.read_done(path)


def test_speed_alone_is_timed_in_shared_processes_side_by_side(arguments, tmp_path, capfd):
    out, page = tmp_path / "out", tmp_path / "pages" / "day-scaling.md"
    sweep = [*arguments, "--attention", "muse", "--speed-only", "--side-by-side", "2", "--set", "train.batch=1",
             "train.shard=true"]
    assert scaling.main([*sweep, "--context", "96", "64", "128", "--ranks", "2", "1", "--page", str(page)]) == 1
    rows = {scaling.Job(row["model"], row["context"], row["ranks"], row["attention"]): row for row in rows_in(out)}
    assert len(rows) == len(rows_in(out)) == 6
    for job, row in rows.items():
        if (job.context, job.ranks) == (96, 2):  # three blocks a rank are no two chunks
            assert "do not make whole blocks" in row["failed"], "and what came after it was timed"
            continue
        assert row["steps"] == 5 and row["losses"] == [] and row["tokens"] == job.context, row
        assert row["config"]["train"]["shard"] == (job.ranks == 2)
        assert row["first_step"] > 0 and row["memory_bytes"] > 0
        assert (row["received_bytes"] > 0) == (job.ranks == 2)
        assert scaling_step(row).setup.shape.parameters == row["parameters"]
    assert not list(out.glob("small-*")), "nothing is left of a run but its row"
    assert [json.loads(line)["ranks"] for line in page.with_suffix(".jsonl").read_text().splitlines()].count(2) == 3
    assert "Measured on CPU" in page.read_text() and "Up to 2 runs stood side by side" in page.read_text()
    assert "![day-scaling-strong](day-scaling-strong.png)" in page.read_text()
    assert "findfont" not in capfd.readouterr().err
    assert scaling.main([*sweep, "--context", "64", "--ranks", "1"]) == 1, "nothing to do, and one run had failed"


def test_a_speed_run_that_takes_too_long_does_not_keep_the_others(arguments, tmp_path):
    slow = [*arguments, "--steps", "20000", "--limit", "0.5", "--speed-only", "--context", "64", "--attention", "exact"]
    assert scaling.main(slow) == 1
    row, = rows_in(tmp_path / "out")
    assert row["failed"] == "not done in 0.5 s"


def test_bad_steps_are_said_and_every_start_keeps_its_log(arguments, tmp_path, capsys):
    """Weights that a step makes huge end every run by `train.bad_step`: the second starts afresh and fails too."""
    out = tmp_path / "out"
    sweep = [*arguments, "--attention", "muse", "exact", "--speed-only", "--context", "64", "--ranks", "2"]
    assert scaling.main([*sweep, "--set", "train.lr=1e30", "train.warmup=0"]) == 1
    progress = capsys.readouterr().err
    for row, attention in zip(rows_in(out), ("muse", "exact"), strict=True):
        assert row["failed"].startswith("exit status 1: FloatingPointError: step 2 is bad: the "), row
        log = out / "speed" / "small-64-2-muse" / f"small-64-2-{attention}.log"
        assert row["log"] == str(log) and row["attention"] == attention
        assert f"small-64-2-{attention}: {row['failed']} (log: {log})" in progress
        assert "in _bad_step" in log.read_text()


def test_runs_are_dealt_out_by_what_they_cost():
    jobs = [scaling.Job("a", context, 1, "exact") for context in (8, 1, 2, 3, 2)]
    dealt = scaling.shares(jobs, 2, lambda job: job.context)
    assert [[job.context for job in share] for share in dealt] == [[8], [1, 2, 3, 2]]
    assert scaling.shares(jobs[:1], 4, lambda job: 1.0) == [jobs[:1]]


def test_slots_are_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,8")
    gpu = torch.device("cuda")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(gpu, 2, 4)] == ["2,3", "5,7"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(gpu, 1, 2)] == ["2", "3"]
    assert slots(gpu, 8, 4) == [{}] and slots(torch.device("cpu"), 8, 3) == [{}] * 3


def made(model="a", context=1024, ranks=1, attention="muse", speed=100.0, seed=0, path="tokens", **more):
    return {"model": model, "context": context, "ranks": ranks, "attention": attention, "tokens": context,
            "seconds": context / speed, "tokens_per_second": speed, "memory_bytes": 2 ** 30, "received_bytes": 2 ** 20,
            "losses": [3.0, 2.5], "held_out": None, "device": "made up", "torch": "2", "side_by_side": 1,
            "parameters": len(model), **more,
            "config": {"train": {"batch": 1, "seed": seed, "lr": 1.0, "warmup": 0}, "data": {"path": path}}}


def test_strong_and_weak_scaling_compare_what_belongs_together(tmp_path):
    rows = [made(), made(ranks=2, speed=180.0), made(context=2048, ranks=2, speed=160.0), made(model="b"),
            made(ranks=4, attention="exact")]
    assert [[row["ranks"] for row in group] for group in groups(rows, strong).values()] == [[1, 2]]
    assert [[row["context"] for row in group] for group in groups(rows, weak).values()] == [[1024, 2048]]
    table = scaling_table(rows, strong)
    assert "1.80x" in table and "90%" in table and "exact" not in table
    assert "80%" in scaling_table(rows, weak)
    assert scaling_table(rows[:1], strong).startswith("No runs to compare")
    assert main_table(rows).count("\n") == len(rows) + 1 and "2.500" in main_table(rows)
    page = tmp_path / "page.md"
    assert "## Failed" not in write_report(rows, page)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "page-loss.png", "page-speed.png", "page-strong.png", "page-weak.png", "page.jsonl", "page.md"]
    text = write_report([{**made(), "failed": "out of memory"}], page)
    assert "out of memory" in text and "![" not in page.read_text() and "No run was finished" in text


def test_losses_are_averaged_and_compared_with_exact_attention_on_the_same_tokens():
    exact = [10.0 - 0.1 * step for step in range(40)]
    rows = [made(attention="exact", losses=exact), made(losses=[x + 0.5 for x in exact], held_out=1.23456),
            made(model="b", losses=[x - 0.25 for x in exact]), made(context=2048, losses=exact),
            made(losses=exact, model="c", seed=1), made(losses=exact, model="d", path="other")]
    found = PLOTS["difference"].series(rows)
    assert [line.group for line in found] == ["a, 1024 tokens, 1 rank(s)", "b, 1024 tokens, 1 rank(s)"]
    for points, gap in zip(found.values(), (0.5, -0.25)):
        assert [x for x, _ in points] == [1024 * step for step in range(2, 41)]
        assert [y for _, y in points] == pytest.approx([gap] * 39)
    averages = next(iter(PLOTS["loss"].series(rows).values()))
    assert averages[0] == pytest.approx((2048, 9.95)) and averages[-1] == pytest.approx((40960, 6.15))
    assert "1.2346" in main_table(rows)


def test_plots_hide_no_line_and_say_what_they_show(tmp_path, monkeypatch):
    """Many lines, all alike: the legend stands beside them, and thin and dashed ones lie on wide and solid ones."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: figures.append(figure))
    rows = [made(model=model, context=context, ranks=ranks, attention=attention, speed=20.0 ** ranks)
            for model in "abc" for context in (1024, 2048) for ranks in (1, 2) for attention in ("exact", "muse")]
    for plot in PLOTS.values():
        series = plot.series(rows)
        draw(tmp_path / "plot.png", plot, series)
        figure = figures.pop()
        figure.draw_without_rendering()
        (axes,), (legend,) = figure.axes, figure.legends
        assert axes.get_title() == plot.title and axes.get_xlabel() == plot.x and axes.get_ylabel() == plot.y
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        lines = axes.get_lines()
        assert len({line.get_label() for line in lines}) == len(lines) == len(series) + (
            plot in (PLOTS["strong"], PLOTS["difference"])), "and a line of what would be ideal, or of exact attention"
        looks = {(line.get_color(), line.get_linestyle()) for line in lines}
        assert len(looks) == len(lines), "no two lines look the same"
        assert axes.get_yscale() == ("linear" if plot in (PLOTS["loss"], PLOTS["difference"]) else "log")
        thin = [line for line in lines if line.get_label().endswith("2 rank(s), exact")]
        assert plot is not PLOTS["loss"] or thin and all(
            lines.index(line) > lines.index(other) for line in thin for other in lines
            if other.get_label().endswith("1 rank(s), muse"))


def test_times_leave_the_first_steps_out(tmp_path):
    config = {"model": {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp": 32}, "data": {"context": 64},
              "train": {"batch": 2, "attention": "muse"}}
    (tmp_path / "results.json").write_text(json.dumps(
        {"config": config, "loss": {"muse": 2.0}, "torch": "x", "parameters": 100 * 16 + 2352}))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, seconds in enumerate((9.0, 1.0, 3.0, 2.0), 1):
            file.write(json.dumps({"step": step, "seconds": seconds, "memory_bytes": step, "received_bytes": 7,
                                   "loss": 1.0, "stages": {"forward": seconds / 2}, "flop_utilisation": 0.1}) + "\n")
    row = measured(tmp_path, 1)
    assert (row["fastest"], row["seconds"], row["slowest"]) == (1.0, 2.0, 3.0)
    assert row["stages"] == {"forward": 1.0} and row["memory_bytes"] == 4 and row["flop_utilisation"] == 0.1
    assert row["vocabulary"] == 100 and row["tokens_per_second"] == 64.0
    with pytest.raises(ValueError, match="--skip 4 leaves none of the 4 steps"):
        measured(tmp_path, 4)


@pytest.mark.parametrize("arguments, message", [
    ([], "--config: give at least one"), (["--report"], "has no rows; start without --report"),
    (["--config", "configs/tiny.toml", "configs/../configs/tiny.toml"], "two files have the same name"),
    (["--config", "missing.toml"], "missing.toml"), (["--steps", "3"], "--skip 3 leaves none of the 3 steps"),
    (["--speed-only", "--keep"], "leaves nothing but rows: leave --data and --keep out"),
    *[([option, value], f"argument {option}: {value} must be at least 1") for option, value in (
        ("--side-by-side", "0"), ("--ranks", "0"), ("--ranks", "-1"), ("--context", "0"), ("--steps", "0"))],
    (["--limit", "nan"], "argument --limit: nan must be a finite number above 0"),
    (["--config", "configs/tiny.toml", "--set", "data.context=64"], "--set data.context: rows are told apart by what "
     "--context says; say it there")])
def test_command_names_what_cannot_be(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        scaling.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
