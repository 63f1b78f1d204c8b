"""The training command: that it learns, and what it leaves behind."""
import dataclasses
import json
import math
import re
import sys
import types
from functools import partial
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from launch import model as model_module
from launch import report
from launch import train as command
from launch.config import DataConfig, LogConfig, ModelConfig, RunConfig, TrainConfig
from launch.corpus import load_corpus
from launch.engine import TorchEngine
from launch.model import attention, build_model, held_out_losses, register_attentions, token_losses
from launch.monitor import Monitor, Silent
from launch.optimizer import learning_rate
from launch.options import pick_device
from launch.ranks import Ranks
from launch.report import by_position, table
from launch.trainer import Trainer
from muse_dist import MuseConfig

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
MUSE = MuseConfig(block=32, leaf=8, group=16, anchors=2, remote_leaf=8, opened=2)
SMALL = RunConfig(name="small", model=ModelConfig(layers=1, width=32, heads=2, kv_heads=1, mlp=64),
                  train=TrainConfig(steps=6, batch=2, warmup=2, lr=5e-3, threads=1, compare=True),
                  data=DataConfig(context=128, held_out_sequences=4), log=LogConfig(checkpoint_every=2), muse=MUSE)
ALONE = Ranks(0, 1, CPU, "zigzag")


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(SMALL.data)


def changed(config=SMALL, **tables):
    """`config` with some fields of some tables changed."""
    return dataclasses.replace(config, **{
        name: dataclasses.replace(getattr(config, name), **values) for name, values in tables.items()})


def trained(config, corpus):
    """The model, and the loss of every step."""
    rows = []
    engine = TorchEngine(config, ALONE, corpus.vocabulary)
    Trainer(engine, corpus, config, ALONE, Silent(rows)).run()
    return engine.model.eval(), [row["loss"] for row in rows]


def losses_on(model, sequences):
    return held_out_losses(partial(token_losses, model), sequences)


# ------------------------------------------------------------------------------------------------------------- training


def test_attentions_differ_exactly_where_there_is_a_far_field(corpus):
    model = build_model(SMALL, CPU).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # sharper attention than at the start of training
    sequences = corpus.held_out_sequences(2)
    losses = {}
    for name in ("muse", "exact", "near"):
        with attention(model, name):
            losses[name] = losses_on(model, sequences)
    assert model.config._attn_implementation == "muse"
    reach = SMALL.near_reach
    for name in ("muse", "near"):
        torch.testing.assert_close(losses[name][:, :reach], losses["exact"][:, :reach])
    error = {name: (losses[name] - losses["exact"])[:, reach:].square().mean() for name in ("muse", "near")}
    assert 0 < error["muse"] < error["near"] / 2


def test_attention_is_restored_after_an_error():
    model = build_model(SMALL, CPU)
    with pytest.raises(KeyError), attention(model, "exact"):
        raise KeyError
    assert model.config._attn_implementation == "muse"


def test_same_seed_same_curve(corpus):
    first, again, other = (trained(changed(train={"seed": seed}), corpus)[1] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_it_trains_with_muse_and_not_with_something_else(corpus):
    muse, exact = (trained(changed(train={"attention": name}), corpus)[1] for name in ("muse", "exact"))
    assert muse != exact and muse == pytest.approx(exact, rel=1e-3)
    whole = changed(muse={"block": 128})  # one block: MuSe is exact attention
    assert trained(whole, corpus)[1] == pytest.approx(exact, rel=1e-5)


def test_the_first_steps_use_exact_attention_if_asked(corpus):
    half, exact = (trained(changed(train=settings), corpus)[1] for settings in (
        {"exact_first": 0.5}, {"attention": "exact"}))
    assert half[:3] == exact[:3] and half[3] != exact[3]


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(TrainConfig(steps=10, warmup=4, lr=2.0), step) for step in range(1, 11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(a > b > 0 for a, b in zip(rates[3:], rates[4:]))
    assert rates[7] == pytest.approx(1 + np.cos(np.pi * 4 / 7))
    assert learning_rate(TrainConfig(steps=3, warmup=0, lr=2.0), 1) == 2.0


def test_sequences_in_pieces_learn_the_same(corpus):
    whole, pieces = (trained(changed(train={"batch": 4, "micro_batch": size}), corpus)[1] for size in (0, 1))
    assert pieces == pytest.approx(whole, rel=1e-5)


def test_logits_in_pieces_change_nothing(corpus, monkeypatch):
    whole = trained(SMALL, corpus)[1]
    monkeypatch.setattr(model_module, "LOGITS", 48)
    assert trained(SMALL, corpus)[1] == pytest.approx(whole, rel=1e-6)


def test_recomputed_activations_change_nothing(corpus):
    assert trained(changed(train={"recompute": True}), corpus)[1] == trained(SMALL, corpus)[1]


def test_it_learns_more_than_the_frequencies_of_bytes(corpus):
    config = changed(train={"steps": 80, "batch": 16, "warmup": 5, "lr": 1e-2})
    model, curve = trained(config, corpus)
    assert curve[0] > 5.0
    assert losses_on(model, corpus.held_out_sequences(32)).mean() < corpus.held_out_entropy() - 0.4


def test_a_loss_that_is_no_number_stops_the_run(corpus):
    with pytest.raises(FloatingPointError, match=r"step \d+ is bad: the (loss|gradient's norm) is (nan|inf).*train.lr"):
        trained(changed(train={"lr": 1e30, "steps": 20, "warmup": 0}), corpus)


def test_losses_are_those_of_transformers(corpus):
    model = build_model(SMALL, CPU)
    sequences = corpus.held_out_sequences(3)
    assert token_losses(model, sequences).shape == (3, SMALL.data.context)
    expected = model(sequences, labels=sequences).loss  # shifts the labels itself
    torch.testing.assert_close(token_losses(model, sequences).mean(), expected)


@pytest.mark.parametrize("piece", [4096, 48])
def test_the_loss_of_every_token_and_its_gradient(corpus, monkeypatch, piece):
    """All logits at once, and in pieces of which the last is short, against the definition, weights on all losses."""
    monkeypatch.setattr(model_module, "LOGITS", piece)
    model, sequences = build_model(SMALL, CPU), corpus.held_out_sequences(2)
    logits = model(sequences[:, :-1]).logits.double()
    expected = logits.logsumexp(-1) - logits.gather(-1, sequences[:, 1:, None])[..., 0]
    found = token_losses(model, sequences)
    torch.testing.assert_close(found, expected.float())
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), parameters) for x in (found, expected)), strict=True):
        assert (a - b).square().mean() <= 1e-8 * b.square().mean()


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run of the command. Returns its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    (out / "small.toml").write_text(SMALL.to_toml())
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
        arguments = ["--config", str(out / "small.toml"), "--out", str(out), "--name", "named", "--steps", "5",
                     "--device", "cpu"]
        assert command.main(arguments) == 0
        assert command.main(arguments) == 0  # nothing is left to do
        assert command.main([*arguments, "--fresh"]) == 0  # replaces the first
    return out / "named", "\n".join(lines)


def test_the_command_leaves_its_results(run):
    folder, printed = run
    results = json.loads((folder / "results.json").read_text())
    expected = dataclasses.replace(changed(train={"steps": 5}), name="named")
    assert RunConfig.from_toml(folder / "config.toml", name="named") == expected
    assert len(results["history"]["loss"]) == 5
    assert set(results["loss"]) == {"muse", "exact", "near"}
    for name, loss in results["loss"].items():
        assert loss == pytest.approx(np.mean(results["position_loss"][name]), rel=1e-5)
        assert results["far_loss"][name] == pytest.approx(
            np.mean(results["position_loss"][name][SMALL.near_reach:]), rel=1e-5)
        assert results["step_seconds"][name] > 0
        assert f"{loss:.4f}" in printed
    assert f"{results['unigram_entropy']:.4f}" in printed
    for plot in ("loss.png", "positions.png"):
        image = matplotlib.image.imread(folder / plot)
        assert image.shape[0] > 300 and image.std() > 0.05, f"{plot} is blank"


def test_plain_lines_where_stdout_is_no_terminal(run):
    lines = [line for line in run[1].splitlines() if line.startswith("step ")]
    assert len(lines) == 2 * 5
    assert "is finished after 5 steps. --steps takes more, --fresh starts again" in run[1]
    line = re.compile(r"step \d/5  loss \d\.\d{3}  [\d,]+ tokens/s  \d\d:\d\d left  \d\.\d\d GB")
    assert all(line.fullmatch(found) for found in lines)


def test_the_events_hold_every_step_of_the_last_run_only(run):
    folder, _ = run
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    history = json.loads((folder / "results.json").read_text())["history"]
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5]
    assert [event.value for event in losses] == pytest.approx(history["loss"], rel=1e-6)
    assert {"train/lr", "train/gradient_norm", "train/tokens_per_second", "held_out/muse"} <= set(
        events.Tags()["scalars"])


def test_the_saved_model_has_the_reported_loss(run, corpus):
    folder, _ = run
    assert (folder / "model" / "model.safetensors").exists()
    register_attentions(SMALL)
    model = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="muse").eval()
    loss = losses_on(model, corpus.held_out_sequences(SMALL.data.held_out_sequences)).mean().item()
    assert loss == pytest.approx(json.loads((folder / "results.json").read_text())["loss"]["muse"], rel=1e-5)


def test_a_table_without_a_far_field(run):
    results = json.loads((run[0] / "results.json").read_text())
    results["far_loss"] = dict.fromkeys(results["far_loss"])
    assert re.search(r"same weights, exact attention +\d\.\d{4} +- +\d\.\d{3} s", table(results))


def test_a_run_has_its_report_only_when_all_of_it_is_written(run, tmp_path, monkeypatch):
    """What has results.json is finished and never reported again."""
    results = json.loads((run[0] / "results.json").read_text())

    def full(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    for owner, name in ((matplotlib.figure.Figure, "savefig"), (report.Path, "replace")):
        with monkeypatch.context() as disk, pytest.raises(OSError, match="No space left"):
            disk.setattr(owner, name, full)
            report.write_report(results, tmp_path)
        assert not (tmp_path / "results.json").exists()
    report.write_report({**results, "unigram_entropy": math.nan}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == {**results, "unigram_entropy": None}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "loss.png", "positions.png"}


def test_a_report_without_steps(run, tmp_path):
    """Somebody has removed metrics.jsonl."""
    results = json.loads((run[0] / "results.json").read_text())
    results["history"] = {name: [] for name in results["history"]}
    report.write_report(results, tmp_path)
    assert "5 steps of 2 x 128 tokens on 1 x cpu" in table(results), table(results)


@pytest.mark.parametrize("length", [2, 3, 100, 2048])
def test_every_position_is_in_one_stretch(length):
    centres, means = by_position(np.ones(length))
    assert (means == 1).all() and (np.diff(centres) > 0).all()
    end = 0
    for centre in centres:  # a stretch of the positions `end` + 1, ... has its middle at `centre`
        start, end = end, round(2 * centre - end - 1)
        assert end > start
    assert end == length


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Monitor(SMALL, tmp_path) as monitor:
        for step in range(1, 7):
            monitor.step(step, {"loss": 1.0 + step})
    shown = capsys.readouterr().out
    assert "100%" in shown and "loss=7.000" in shown and "tokens/s" in shown and "<00:00" in shown
    assert "step 1/6" not in shown


@pytest.mark.parametrize("arguments, message", [
    ([], "--config"),
    (["--config", "missing.toml"], "missing.toml"),
    (["--config", str(TINY), "--steps", "0"], "train.steps=0"),
    (["--config", str(TINY), "--name", "a/b"], "name='a/b'"),
    (["--config", str(TINY), "--wandb", "yes"], "--wandb"),
    (["--config", str(TINY), "--context-parallel", "2"], "train.context_parallel=2 must divide the 1 processes"),
])
def test_the_command_explains_what_is_wrong(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    (b"train.steps = ", "file.toml is no TOML file: Invalid value"),
    (b"\xff\xfe[train]", "file.toml is no TOML file: 'utf-8'"),
    (b"train = 3", "file.toml: train must be a table, which starts with the line [train]"),
    (b"muse = 3", "file.toml: muse must be a table"),
    (b"[[model]]", "file.toml: model must be a table"),
])
def test_a_file_that_is_none_is_named(tmp_path, capsys, content, message):
    (tmp_path / "file.toml").write_bytes(content)
    for more in ([], ["--steps", "3"]):
        with pytest.raises(SystemExit) as stop:
            command.main(["--config", str(tmp_path / "file.toml"), "--out", str(tmp_path), *more])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(ValueError, match="no GPU; take --device cpu"):
        pick_device("cuda")


def test_wandb_is_asked_for_and_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        command.main(["--config", str(TINY), "--out", str(tmp_path), "--wandb", "offline"])
    assert "pip install 'muse_dist[wandb]'" in capsys.readouterr().err


def test_wandb_gets_the_mode_and_every_step(tmp_path, monkeypatch):
    logged, started, ended = [], {}, []
    log = types.SimpleNamespace(log=lambda values, step: logged.append((step, values["loss"])), summary={},
                                finish=lambda exit_code: ended.append(exit_code))
    wandb = types.SimpleNamespace(init=lambda **values: started.update(values) or log)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Monitor(SMALL, tmp_path, "offline") as monitor:
        monitor.step(1, {"loss": 2.0})
        monitor.summary({"muse": 1.5})
    assert (started["mode"], started["name"], started["dir"]) == ("offline", "small", str(tmp_path))
    assert started["config"]["muse"]["block"] == 32
    assert logged == [(1, 2.0)] and log.summary == {"held_out/muse": 1.5} and ended == [0]
    with pytest.raises(KeyError), Monitor(SMALL, tmp_path, "offline"):
        raise KeyError
    assert ended == [0, 1]
