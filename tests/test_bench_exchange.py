"""`launch.bench exchange`: bytes and times of what ranks send each other, and the same layer sending nothing."""
import json

import pytest
import torch
import torch.distributed as dist

from launch import bench_exchange
from launch.bench import _parser, main
from launch.bench_comm import Recorder, Silent
from launch.bench_timing import step
from launch.ranks import Ranks
from muse_dist import ByteCounter, MuseConfig
from muse_dist.comm import Communicator
from tests.ranks import run_ranks

SMALL = {"block": 32, "leaf": 8, "group": 8, "remote_leaf": 8, "anchors": 2, "opened": 2}
WORDS = ["exchange", "--tokens", "256", "--dim", "16", "--heads", "4", "--kv-heads", "2", "--seconds", "0", "--device",
         "cpu", *(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}"))]
NAMES = {"moments": ["halo and sinks", "anchors", "moments", "moments gradients", "halo and sinks gradients"],
         "kv": ["keys and values", "key order", "keys and values gradients"]}


def joined():
    group = dist.group.WORLD
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "zigzag", group, group)


def shard(seed, exchange, tokens=128):
    config = MuseConfig.fast(exchange=exchange, **SMALL)
    generator = torch.Generator().manual_seed(seed)
    *leaves, dout = (torch.randn(1, h, tokens, 16, generator=generator, dtype=torch.float64) for h in (4, 2, 2, 4))
    return config, [x.requires_grad_() for x in leaves], dout


class Counted:
    """Counts the collectives of torch.distributed while it is entered."""

    def __enter__(self):
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        self.calls, self.kept = [], {name: getattr(dist, name) for name in (gather, "all_to_all_single")}
        for name, function in self.kept.items():
            setattr(dist, name, self.counting(name, function))
        return self.calls

    def counting(self, name, function):
        def call(*arguments, **options):
            self.calls.append(name)
            return function(*arguments, **options)

        return call

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(dist, name, function)


def compare(exchange):
    """Collectives, results and shapes of a layer as it is, recorded, repeated, and silent."""
    ranks = joined()
    config, leaves, dout = shard(ranks.rank, exchange)
    with Counted() as plain:
        wanted = step(bench_exchange._layer(config, Communicator(ranks.group), ranks), leaves, dout)
    counter = ByteCounter()
    recorder = Recorder(ranks.group, counter)
    with Counted() as recorded:
        found = step(bench_exchange._layer(config, recorder, ranks), leaves, dout)
    with Counted() as repeated:
        for name in recorder.names:
            recorder.repeat(name)
    silent = Silent(ranks.group)
    with Counted() as nothing:
        runs = [step(bench_exchange._layer(config, silent, ranks), leaves, dout) for _ in range(2)]
    same = all(torch.equal(a, b) for a, b in zip(wanted, found))
    finite = all(torch.equal(a, b) and a.isfinite().all() and a.shape == c.shape for a, b, c in zip(*runs, wanted))
    return (plain, recorded, sorted(repeated), nothing, same, finite, recorder.names, list(counter.received),
            torch.equal(runs[0][0], wanted[0]))


@pytest.mark.parametrize("exchange", ["moments", "kv"])
def test_recorded_exchanges_can_run_alone_and_silent_layers_send_nothing(exchange):
    for plain, recorded, repeated, nothing, same, finite, names, counted, alike in run_ranks(2, compare, exchange):
        assert plain == recorded and same
        assert repeated == sorted(plain) and len(plain) >= 3
        assert names == counted == NAMES[exchange]
        assert nothing == [] and finite
        assert not alike  # what others would have sent was not there


def command(words, shares):
    """Rows and output of the command on this rank; `shares` stands for what a trace of GPUs would show."""
    import contextlib
    import io

    rows, text = [], io.StringIO()
    bench_exchange.write_line = lambda path, row: rows.append(row)
    if shares is not None:
        bench_exchange.trace_overlap = lambda problem, config, path: shares
    problem = None
    with contextlib.redirect_stdout(text):
        try:
            bench_exchange.run_ranks(joined(), _parser().parse_args(words))
        except (SystemExit, ValueError) as error:
            problem = str(error)
    return rows, text.getvalue(), problem


def test_rows_have_bytes_times_and_what_is_exposed(tmp_path):
    path = tmp_path / "trace.json"
    first, second = run_ranks(2, command, [*WORDS, "--json", "unused", "--trace", str(path)], None)
    rows, text, problem = first
    assert problem is None and second == ([], "", None)
    assert [row["exchange"] for row in rows] == ["moments", "kv"]
    for row in rows:
        json.dumps(row)
        assert row["as_predicted"] and list(row["received"]) == list(row["alone"]) == NAMES[row["exchange"]]
        assert row["kv_heads"] == 2 and row["dtype"] == "float32" and row["config"]["block"] == 32
        assert row["alone_seconds"] == pytest.approx(sum(one["median"] for one in row["alone"].values()))
        exposed = row["layer"]["both"]["median"] - row["silent"]["both"]["median"]
        assert row["exposed_seconds"] == pytest.approx(exposed)
        assert row["exposed_share"] == pytest.approx(exposed / row["layer"]["both"]["median"])
        assert 0 <= row["hidden_share"] <= 1
        assert row["overlap"] == {"forward": None, "backward": None} and row["check"]["worst"] <= 1
    apart = rows[0]["received"]
    others = sum(count for name, count in apart.items() if "halo" not in name)
    assert f"{'all but halo and sinks':<28}{others:>16,}" in text
    ratio = others / sum(rows[1]["received"].values())  # whose halo and sinks come with all other keys
    assert f"moments / kv: {ratio:.2%}" in text
    assert "no NCCL kernels" in text
    traces = sorted(p.name for p in tmp_path.iterdir())
    assert traces == ["trace-256-kv.json", "trace-256-moments.json"]
    names = {event.get("name") for event in json.loads((tmp_path / traces[1]).read_text())["traceEvents"]}
    assert {"bench::forward", "bench::backward"} <= names


@pytest.mark.parametrize(("shares", "message"), [
    ({"forward": 0.9, "backward": 0.0}, "256 tokens, moments, backward"), ({"forward": 0.9, "backward": 0.1}, None)])
def test_a_trace_in_which_nothing_overlaps_is_a_failure(shares, message):
    (_, text, problem), _ = run_ranks(2, command, [*WORDS, "--trace", "unused.json"], shares)
    assert "forward 90.0%" in text
    assert problem is None if message is None else message in problem and "forward" not in problem


def wrong(words):
    from launch import bench_check

    real = bench_check.muse_attention
    bench_check.muse_attention = lambda *tensors, **options: 1.01 * real(*tensors, **options)
    return command(words, None)


def test_no_times_where_the_ranks_are_wrong():
    for _, text, problem in run_ranks(2, wrong, WORDS):
        assert "no times are printed" in problem and "alone" not in text


def test_one_rank_is_told_to_bring_others(capsys):
    with pytest.raises(SystemExit):
        main(WORDS)
    assert "torchrun" in capsys.readouterr().err
