"""`launch.bench attention`: every number of a row, what it refuses, and that one failure does not end the rest."""
import json
import math
from contextlib import contextmanager

import pytest
import torch
from tests.ranks import run_ranks

from launch import bench_attention, bench_check, bench_plots, bench_rivals
from launch.bench import _parser, main
from launch.bench_check import Check, check_muse, check_rival, scaled, with_timed
from launch.bench_exact import Rows, Window, choose_rows, exact_rows, only_rows, squared_errors
from launch.bench_inputs import Shape, make_inputs
from launch.bench_rivals import Problem
from launch.ranks import Ranks
from muse_dist import MuseConfig, muse_attention

SMALL = ["block=32", "leaf=8", "group=8", "remote_leaf=8", "anchors=2", "opened=2"]
SET = [word for text in SMALL for word in ("--set", text)]
CONFIG = MuseConfig.fast(block=32, leaf=8, group=8, remote_leaf=8, anchors=2, opened=2)
QUICK = ["--dim", "16", "--heads", "4", "--kv-heads", "2", "--seconds", "0", "--error-rows", "48", "--device", "cpu",
         "--preset", "fast", *SET]
ALONE = Ranks(0, 1, torch.device("cpu"), "zigzag")


def problem(dtype=torch.float32, causal=True, tokens=200):
    return Problem(Shape(4, 2, tokens, 16), causal, dtype, ALONE)


def wrong_value(q, k, v, **options):
    return 1.01 * muse_attention(q, k, v, **options)


def wrong_gradient(q, k, v, **options):
    out = muse_attention(q, k, v, **options)
    return out + 0.01 * (k.mean() - k.mean().detach())


def not_a_number(q, k, v, **options):
    return muse_attention(q, k, v, **options) * torch.nan


# ---------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_the_check_passes_what_is_right(dtype, causal):
    config = MuseConfig.from_dict({**json.loads(CONFIG.encoded), "causal": causal})
    check = check_muse(config, problem(dtype, causal))
    assert check.passed and 0 < check.worst <= 1 and "fp64" in check.what


@pytest.mark.parametrize("broken", [wrong_value, wrong_gradient, not_a_number])
def test_the_check_finds_wrong_values_and_wrong_gradients(broken, monkeypatch):
    def attention(*tensors, config):  # the backend under test only, not its twin
        return (broken if config.backend == "auto" else muse_attention)(*tensors, config=config)

    monkeypatch.setattr(bench_check, "muse_attention", attention)
    assert not check_muse(CONFIG, problem()).passed


def test_the_check_finds_clusters_worse_than_the_twins(monkeypatch):
    def attention(q, k, v, *, config):
        if config.backend == "auto":  # the same arithmetic with fewer leaves opened
            config = MuseConfig.from_dict({**json.loads(config.encoded), "opened": 0, "sinks": 0})
        return muse_attention(q, k, v, config=config)

    monkeypatch.setattr(bench_check, "muse_attention", attention)
    assert not check_muse(CONFIG, problem()).passed


@pytest.mark.parametrize("preset", ["fast", "accurate", "paper"])
def test_scaled_settings_keep_leaves_groups_and_what_is_opened(preset):
    config = MuseConfig.preset(preset)
    small = scaled(config)
    assert small.block <= 512 and small.block % (4 * config.leaf) == 0
    kept = ("leaf", "group", "remote_leaf", "opened", "halo", "trace", "sinks", "causal", "exchange", "backend")
    assert [getattr(small, name) for name in kept] == [getattr(config, name) for name in kept]


@pytest.mark.parametrize(("error", "passed"), [(1e-5, True), (2e-3, False), (math.nan, False)])
def test_rivals_are_held_to_exact_attention(error, passed):
    assert check_rival({"out": 1e-6, "dk": error}, torch.bfloat16, 9).passed is passed


@pytest.mark.parametrize(("worst", "error", "passed"), [
    (0.5, 0.99, True), (0.5, 1.0, False), (0.5, math.inf, False), (0.5, math.nan, False), (1.5, 0.1, False)])
def test_the_timed_results_must_be_better_than_zeros(worst, error, passed):
    check = with_timed(Check("short", worst), {"out": 0.1, "dq": 0.2, "dk": error, "dv": 0.3}, 9)
    assert check.passed is passed and check.what.startswith("short; ")


def test_a_check_without_a_number_fails():
    assert not Check("", math.nan).passed


# -------------------------------------------------------------------------------------------------------- one device


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of two lengths, and the folder of the figures."""
    folder = tmp_path_factory.mktemp("bench")
    main(["attention", "--tokens", "96", "200", *QUICK, "--profile", "--json", str(folder / "rows.jsonl"),
          "--out", str(folder / "figures")])
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()], folder / "figures"


def test_a_row_a_variant_and_length(measured):
    rows, _ = measured
    names = ["cudnn", "flash", "efficient", "flash_attn", "flash_attn_3", "flex_window_32", "fast"]
    assert [(row["tokens"], row["variant"]) for row in rows] == [(n, name) for n in (96, 200) for name in names]
    assert {row["inputs"] for row in rows} == {"gaussian"} and {row["rows_checked"] for row in rows} == {48}
    why = {row["variant"]: row["failed"] for row in rows if "failed" in row}
    assert set(why) == {"cudnn", "efficient", "flash_attn", "flash_attn_3", "flex_window_32"}
    assert "GPU" in why["cudnn"] and "not installed" in why["flash_attn"]


def test_speed_ups_are_ratios_of_medians(measured):
    rows, _ = measured
    for flash, fast in zip(*([row for row in rows if row["variant"] == name] for name in ("flash", "fast"))):
        assert flash["speedup"] == 1 and fast["speedup_over"] == "flash" and fast["check"]["passed"]
        assert fast["speedup"] == flash["both"]["median"] / fast["both"]["median"]
        assert 0 < fast["forward"]["low"] <= fast["forward"]["median"] <= fast["forward"]["high"]
        assert fast["both"]["repeats"] == 3 and fast["backend"] == "torch" and fast["config"]["block"] == 32


def test_errors_are_those_on_the_very_same_inputs(measured):
    rows, _ = measured
    inputs = make_inputs(Shape(4, 2, 200, 16), None, torch.device("cpu"), torch.float32)
    places = choose_rows(200, 48, torch.device("cpu"))
    sparse = only_rows(inputs.dout, places)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = muse_attention(*leaves, config=CONFIG)
    dq, dk, dv = torch.autograd.grad(out, leaves, sparse)
    found = Rows(out[:, :, places], dq[:, :, places], dk, dv)
    wanted = squared_errors(found, exact_rows(*(x.detach() for x in leaves), sparse, places, True))
    fast, flash = rows[-1], rows[-6]
    assert fast["error"] == pytest.approx(wanted, rel=1e-4) and fast["error"]["out"] > 1e-4
    assert flash["variant"] == "flash" and max(flash["error"].values()) < 1e-10
    assert fast["cosine"]["dk"] < flash["cosine"]["dk"] == pytest.approx(1)


def test_stages_are_those_of_muse(measured):
    rows, _ = measured
    assert [("stages" in row) for row in rows] == [row["variant"] == "fast" for row in rows]
    names = {"order", "choice", "near field", "far field", "merge", "near field backward", "far field backward"}
    assert names <= {stage["stage"] for stage in rows[-1]["stages"]}


def test_every_number_of_key_heads_is_measured_checked_and_drawn(tmp_path, monkeypatch):
    checked = []
    real = bench_attention.check_muse

    def check(config, problem):
        checked.append(problem.shape.kv_heads)
        return real(config, problem)

    monkeypatch.setattr(bench_attention, "check_muse", check)
    words = [*QUICK, "--kv-heads", "4", "1", "--rivals", "none", "--json", str(tmp_path / "rows.jsonl")]
    main(["attention", "--tokens", "96", "64", *words])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["kv_heads"], row["tokens"]) for row in rows] == [(4, 96), (4, 64), (1, 96), (1, 64)]
    assert checked == [4, 1] and all(row["check"]["passed"] for row in rows)
    titles = []
    monkeypatch.setattr(bench_plots, "_title", lambda row: titles.append((row["dim"], row["kv_heads"])) or "")
    bench_plots.plot(rows, tmp_path)
    assert titles == [(16, 1), (16, 4)] * 2


def test_every_near_field_has_its_window():
    windows = [Window(32, 1), Window(64, 1), Window(64, 0)]
    found = [rival for rival in bench_rivals.rivals(ALONE, windows, True) if rival.window]
    assert [rival.name for rival in found] == ["flex_window_32", "flex_window_64_halo_1", "flex_window_64_halo_0"]
    assert [rival.window for rival in found] == windows
    options = _parser().parse_args(["attention", *QUICK, "--preset", "fast", "accurate", "paper", "--set", "block=128",
                                    "--rivals", "flex_window"])
    names = [variant.name for variant in bench_attention._prepare(ALONE, options).variants]
    assert names == ["flex_window_128_halo_1", "flex_window_128_halo_0", "fast", "accurate", "paper"]


def test_figures_are_images(measured):
    _, folder = measured
    for name in ("time.png", "error.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (folder / name).stat().st_size > 5000


def test_what_fails_its_check_gets_no_speed_up_and_a_bad_exit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_check, "muse_attention", wrong_value)
    with pytest.raises(SystemExit, match="failed the check: fast"):
        main(["attention", "--tokens", "96", *QUICK, "--rivals", "flash", "--json", str(tmp_path / "rows.jsonl")])
    flash, fast = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert fast["check"]["passed"] is False and "speedup" not in fast and flash["speedup"] == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("fast"))
    assert "FAILED" in line and "x " not in line.split("FAILED")[0]


def test_timed_results_that_are_wrong_at_that_length_get_no_speed_up(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_rivals, "muse_attention", lambda q, k, v, **_: 0 * muse_attention(q, k, v, config=CONFIG))
    with pytest.raises(SystemExit, match="failed the check: fast"):
        main(["attention", "--tokens", "96", *QUICK, "--rivals", "flash", "--json", str(tmp_path / "rows.jsonl")])
    _, fast = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert fast["error"]["out"] == 1 and not fast["check"]["passed"] and "speedup" not in fast


def test_no_speed_ups_over_a_baseline_that_is_wrong(monkeypatch, tmp_path):
    @contextmanager
    def late(name, problem):
        yield lambda q, k, v: 1.1 * q + k.mean() + v.mean()

    monkeypatch.setattr(bench_rivals, "sdpa", late)
    with pytest.raises(SystemExit, match="cudnn, efficient, flash"):
        main(["attention", "--tokens", "96", *QUICK, "--json", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "speedup" in row]


def test_the_death_of_one_rival_is_its_row(monkeypatch, tmp_path, capsys):
    @contextmanager
    def dies(package, problem):
        yield lambda q, k, v: torch.empty(1 << 60)

    monkeypatch.setattr(bench_rivals, "packaged_flash", dies)
    main(["attention", "--tokens", "96", *QUICK, "--acausal", "--json", str(tmp_path / "rows.jsonl")])
    rows = {row["variant"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert "memory" in rows["flash_attn"]["failed"] or "allocate" in rows["flash_attn"]["failed"]
    assert rows["fast"]["speedup"] > 0 and rows["flash"]["check"]["passed"]
    assert not rows["fast"]["causal"] and not rows["fast"]["config"]["causal"]
    assert "acausal" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--rivals", "cuddn"], "unknown; known are cudnn"), (["--baseline", "cudnn", "--rivals", "flash"], "not measured"),
    (["--set", "opened"], "NAME=VALUE"), (["--set", "blok=3"], "block"), (["--model", "/nowhere"], "neither"),
    (["--preset", "quick"], "unknown"), (["--graphs"], "needs GPUs"),
])
def test_bad_options_name_themselves_and_the_fix(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["attention", "--tokens", "96", *QUICK, *words])
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- two ranks


def over_ranks(words):
    import torch.distributed as dist

    group = dist.group.WORLD
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "zigzag", group, group)
    rows = []
    bench_attention.write_line = lambda path, row: rows.append(row)
    bench_attention.run_ranks(ranks, _parser().parse_args(words))
    return rows


def graphs_over_ranks():
    try:
        over_ranks(["attention", "--tokens", "96", *QUICK, "--graphs"])
    except ValueError as error:
        return str(error)


def test_graphs_of_ranks_are_a_setting():
    for message in run_ranks(2, graphs_over_ranks):
        assert "--graphs" in message and "--set cuda_graphs=true" in message


def stages_on_ranks(name):
    """What the profile of MuSe on ranks must name: its computations and its exchanges, both ways."""
    twice = ["near field", "far field", *(["remote", "moments"] if name == "fast moments" else [])]
    exchanges = {
        "fast moments": ["halo and sinks", "anchors", "moments", "moments gradients", "halo and sinks gradients"],
        "fast kv": ["keys and values", "key order", "keys and values gradients"]}[name]
    return {"order", "choice", "merge", "pack", "unpack", *twice, *(f"{stage} backward" for stage in twice),
            *(f"{step} {exchange}" for step in ("post", "wait for") for exchange in exchanges)}


def test_ranks_are_measured_side_by_side():
    # JSON lines are the first rank's. No rival here: torch's needs GPUs, and DeepSpeed compiles extensions for minutes.
    words = ["attention", "--tokens", "256", *QUICK, "--rivals", "cp_allgather_cudnn", "--profile",
             "--json", "unused"]
    first, second = run_ranks(2, over_ranks, words)
    rows = {row["variant"]: row for row in first}
    assert second == [] and list(rows) == ["cp_allgather_cudnn", "fast moments", "fast kv"]
    assert "GPU" in rows["cp_allgather_cudnn"]["failed"]
    for name in ("fast moments", "fast kv"):
        assert rows[name]["check"]["passed"] and rows[name]["ranks"] == 2 and rows[name]["layout"] == "zigzag"
        assert "2 ranks against one process" in rows[name]["check"]["what"]
        assert stages_on_ranks(name) <= {stage["stage"] for stage in rows[name]["stages"]}
    assert rows["fast kv"]["error"]["out"] < rows["fast moments"]["error"]["out"] < 1
    alone = make_inputs(Shape(4, 2, 256, 16), None, torch.device("cpu"), torch.float32)
    places = choose_rows(256, 48, torch.device("cpu"))
    sparse = only_rows(alone.dout, places)
    wanted = exact_rows(alone.q, alone.k, alone.v, sparse, places, True)
    out = muse_attention(alone.q, alone.k, alone.v, config=CONFIG)[:, :, places]
    assert rows["fast kv"]["error"]["out"] == pytest.approx(((out - wanted.out).norm() / wanted.out.norm()).item() ** 2,
                                                            rel=1e-3)
