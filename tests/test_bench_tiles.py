"""Tuned tiles: what the tuner takes and refuses, the file, and that the settings use it, in Triton's interpreter."""
import dataclasses
import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from launch import bench, bench_tiles
from launch.bench_check import check_muse
from launch.bench_inputs import Shape
from launch.bench_rivals import Problem
from launch.ranks import Ranks
from muse_dist import MuseConfig, muse_attention
from muse_dist.kernels import tiles, triton_far
from muse_dist.kernels.triton_common import Tile
from tests.kernel_cases import QUIET

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tiles of the CPU's interpreter"),
    *QUIET,
]
CONFIG = MuseConfig(block=32, leaf=8, group=16, anchors=1, remote_leaf=8, opened=2, backend="triton")
CLASS = "float32 head dim 16 leaf 16 group 16"


def test_the_fastest_tile_that_is_right_is_taken():
    fit, slow, wrong, large = (Tile(16, 16, 4, stages) for stages in (1, 2, 3, 4))
    times = {None: 10.0, fit: 7.0, slow: 9.0, wrong: 1.0}

    def run(tile):
        if tile == large:
            raise OutOfResources(1, 0, "shared memory")
        run.last = tile
        return torch.ones(4) * (2 if tile == wrong else 1), torch.tensor([-torch.inf, 1.0])

    def clock(function):
        function()
        return times[run.last]

    seen = torch.ones(1, 1, 1, dtype=torch.bool)
    row = bench_tiles.tune("far_field", run, seen, [fit, slow, wrong, large], clock)
    assert row == bench_tiles.Row("far_field", 10.0, 7.0, fit, 4, 2)
    assert bench_tiles.tune("far_field", run, seen, [wrong, large], clock).tile is None
    times[fit] = 9.9  # no more than noise
    assert bench_tiles.tune("far_field", run, seen, [fit], clock).tile is None


def test_the_command_writes_what_the_settings_read(tmp_path, monkeypatch, capsys):
    """Every operator runs with every tile, and results agree; the file keeps what it held."""
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"another GPU": {CLASS: {"moments": [32, 32, 4, 2]}}}))
    tried = []
    monkeypatch.setattr(bench_tiles, "candidates", lambda dim, dtype: [Tile(32, 32, 4, 1)])

    def clock(function):
        function()
        tried.append(function)
        return 10.0 / len(tried)  # every tile is faster than the one before it

    monkeypatch.setattr(bench_tiles, "milliseconds", clock)
    settings = [word for name in ("block", "leaf", "group", "anchors", "remote_leaf", "opened", "backend")
                for word in ("--set", f"{name}={getattr(CONFIG, name)}")]
    bench.main(["tiles", "--out", str(path), "--tokens", "160", "--dim", "16", "--heads", "2", "--device", "cpu",
                "--dtype", "float32", *settings, "--set", "tolerance=0"])
    assert "0 unfit" in capsys.readouterr().out
    table = json.loads(path.read_text())
    assert table["another GPU"] == {CLASS: {"moments": [32, 32, 4, 2]}}
    assert table["cpu"][CLASS] == {operator: [32, 32, 4, 1] for operator in tiles.OPERATORS}

    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 160, 16, generator=make).requires_grad_() for _ in range(3))
    seen = []
    launch = triton_far.FarCall.launch
    monkeypatch.setattr(triton_far.FarCall, "launch", lambda call, tile: seen.append(tile) or launch(call, tile))
    found = []
    for config in (CONFIG, dataclasses.replace(CONFIG, tiles=str(path))):
        out = muse_attention(q, k, v, config=config)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert seen[-3:] == [Tile(32, 32, 4, 1)] * 3 and Tile(32, 32, 4, 1) not in seen[:3]
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    problem = Problem(Shape(2, 2, 160, 16), True, torch.float32, Ranks(0, 1, torch.device("cpu"), "zigzag"))
    assert check_muse(dataclasses.replace(CONFIG, tiles=str(path)), problem).passed, "its twin in fp64 has no tiles"


@pytest.mark.parametrize("text, message", [
    (None, "cannot be read"), ("{", "cannot be read"), ("[]", r"must hold \[rows"),
    ('{"cpu": {"x": {"far": [16, 16, 4, 1]}}}', r"must hold \[rows"),
    *((f'{{"cpu": {{"x": {{"far_field": {tile}}}}}}}', r"must hold \[rows") for tile in (
        [16, 24, 4, 1], [8, 16, 4, 1], [16, 512, 4, 1], [16, 16, 2, 1], [16, 16, 4, 0], [16, 16, 4], [16, 16, 4, 1.5])),
    ('{"cpu": {"x": {"far_field": [16, 16, 4, 1]}}}', f"has none for {CLASS} on cpu; tune them"),
])
def test_files_that_do_not_serve_are_refused(tmp_path, text, message):
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    q = torch.zeros(1, 1, 160, 16)
    with pytest.raises(ValueError, match=message):
        muse_attention(q, q, q, config=dataclasses.replace(CONFIG, tiles=str(path)))


def test_plain_kernels_have_no_tiles(tmp_path):
    q = torch.zeros(1, 1, 160, 16)
    with pytest.raises(ValueError, match="only the GPU kernels have tiles"):
        muse_attention(q, q, q, config=dataclasses.replace(CONFIG, tiles="x.json", backend="torch"))


def test_an_operator_that_is_best_as_pinned_loses_its_old_tile(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"cpu": {CLASS: {"moments": [32, 32, 4, 2], "far_field": [32, 32, 4, 2]}}}))
    monkeypatch.setattr(bench_tiles, "candidates", lambda dim, dtype: [])
    monkeypatch.setattr(bench_tiles, "milliseconds", lambda function: 1.0)
    settings = [word for name in ("block", "leaf", "group", "anchors", "remote_leaf", "opened", "backend")
                for word in ("--set", f"{name}={getattr(CONFIG, name)}")]
    command = ["tiles", "--out", str(path), "--tokens", "160", "--dim", "16", "--heads", "1", "--device", "cpu",
               "--dtype", "float32", "--operators", "moments", *settings]
    bench.main([*command, "--set", "tolerance=0"])
    assert json.loads(path.read_text()) == {"cpu": {CLASS: {"far_field": [32, 32, 4, 2]}}}
    with pytest.raises(SystemExit):
        bench.main(command)  # Gaussian inputs, of which a tolerance opens nothing


def test_choices_agree_by_what_they_open():
    some = torch.full((100, 33), -1)
    other = some.clone()
    other[0, 0] = 3
    assert bench_tiles._agree(some, some) and not bench_tiles._agree(some, other)
