"""The training command: its settings, its data, that it learns, and what it leaves behind."""
import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from launch import train as command
from launch.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from launch.data import SEPARATOR, Corpus, load_corpus
from launch.model import attention, build_model, held_out_losses, register_attentions, token_losses
from launch.monitor import Monitor
from launch.report import by_position, table
from muse_dist import MuseConfig

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
MUSE = MuseConfig(block=32, leaf=8, group=16, anchors=2, remote_leaf=8, opened=2)
SMALL = RunConfig(name="small", model=ModelConfig(layers=1, width=32, heads=2, kv_heads=1, mlp=64),
                  train=TrainConfig(steps=6, batch=2, warmup=2, lr=5e-3, threads=1),
                  data=DataConfig(context=128, held_out_sequences=4), muse=MUSE)


class Quiet:
    """A monitor that only remembers."""

    def __init__(self):
        self.losses = []

    def step(self, step, metrics):
        self.losses.append(metrics["loss"])


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(SMALL.data)


def changed(config=SMALL, **tables):
    """`config` with some fields of some tables changed."""
    return dataclasses.replace(config, **{
        name: dataclasses.replace(getattr(config, name), **values) for name, values in tables.items()})


def trained(config, corpus, name="muse"):
    model = build_model(config, CPU)
    with attention(model, name):
        command.train(model, corpus, config, monitor := Quiet())
    return model.eval(), monitor.losses


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_tiny_config_has_a_far_field_and_small_cost():
    config = RunConfig.from_toml(TINY)
    assert config.name == "tiny"
    assert 2048 <= config.data.context <= 4096
    assert config.near_reach * 4 <= config.data.context, "most tokens must have a far field"


def test_settings_survive_writing_and_overrides_win(tmp_path):
    (tmp_path / "x.toml").write_text(SMALL.to_toml())
    assert RunConfig.from_toml(tmp_path / "x.toml", name="small") == SMALL
    other = RunConfig.from_toml(tmp_path / "x.toml", steps=99, seed=7)
    assert (other.name, other.train.steps, other.train.seed, other.muse) == ("x", 99, 7, MUSE)


@pytest.mark.parametrize("text, error, message", [
    ("[modle]\nlayers = 2", ValueError, "'modle'.*known: .model."),
    ("steps = 3", ValueError, "'steps'"),
    ("[train]\nstep = 3", ValueError, "'step' in .train.; did you mean 'steps'"),
    ("[train]\nsteps = 3.0", TypeError, "train.steps=3.0 must be int, not float"),
    ("[train]\nsteps = true", TypeError, "train.steps=True must be int, not bool"),
    ("[train]\nsteps = 0", ValueError, "train.steps=0 must be at least 1"),
    ("[train]\nlr = 0", ValueError, "train.lr=0.0 must be positive"),
    ("[model]\nheads = 3", ValueError, "model.width=128 must be heads=3 times an even head dim"),
    ("[model]\nheads = 4\nkv_heads = 3", ValueError, "model.kv_heads=3 must divide heads=4"),
    ("[data]\nheld_out_every = 1", ValueError, "data.held_out_every=1 must be at least 2"),
    ("[muse]\nblok = 64", ValueError, "'blok'.*did you mean 'block'"),
    ("[muse]\ncausal = false", ValueError, "muse.causal=false"),
])
def test_settings_that_cannot_be_are_refused(tmp_path, text, error, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(error, match=message):
        RunConfig.from_toml(tmp_path / "x.toml")


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_is_one_folder(name):
    with pytest.raises(ValueError, match="name="):
        RunConfig(name=name)


# ----------------------------------------------------------------------------------------------------------------- data


def write_files(folder, sizes):
    for i, size in enumerate(sizes):
        (folder / f"{i:02}.py").write_bytes(bytes([i]) * size)


def test_every_nth_file_is_held_out_and_files_are_whole(tmp_path):
    write_files(tmp_path, [5, 6, 7, 8, 9, 10])
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("left out")
    (tmp_path / "notes.txt").write_text("left out")
    found = load_corpus(DataConfig(context=4, held_out_every=3), tmp_path)
    files = [[i] * size + [SEPARATOR] for i, size in enumerate([5, 6, 7, 8, 9, 10])]
    assert found.held_out.tolist() == files[2] + files[5]
    assert found.train.tolist() == files[0] + files[1] + files[3] + files[4]


def test_too_little_text_is_refused(tmp_path):
    write_files(tmp_path, [50, 5])
    with pytest.raises(ValueError, match=r"6 tokens for held_out.*data.context=20.*smaller context"):
        load_corpus(DataConfig(context=20, held_out_every=2), tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="0 tokens for train in 0 Python files"):
        load_corpus(DataConfig(context=20), tmp_path / "none")


def test_sequences_are_cuts_of_the_right_stream():
    stream = np.arange(100, dtype=np.uint16)
    found = Corpus(stream, stream + 100, context=10)
    drawn = found.sequences(200, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 11) and drawn.dtype == torch.int64
    assert (drawn.diff(dim=1) == 1).all()
    assert drawn.min() == 0 and drawn.max() == 99, "the ends of the stream are never drawn"
    assert torch.equal(drawn, found.sequences(200, torch.Generator().manual_seed(0)))
    held_out = found.held_out_sequences(3)
    assert held_out[:, 0].tolist() == [100, 144, 189] and (held_out.diff(dim=1) == 1).all()
    assert found.held_out_sequences(1)[0, 0] == 100


def test_entropy_of_known_frequencies():
    found = Corpus(np.zeros(9, np.uint16), np.array([1, 1, 2, 3], np.uint16), context=2)
    assert found.held_out_entropy() == pytest.approx(1.5 * np.log(2))


def test_the_standard_library_is_enough(corpus):
    assert len(corpus.train) > 2_000_000 and len(corpus.held_out) > 200_000
    assert corpus.train.max() == SEPARATOR
    assert 2.5 < corpus.held_out_entropy() < 4.0


# ------------------------------------------------------------------------------------------------------------- training


def test_attentions_differ_exactly_where_there_is_a_far_field(corpus):
    model = build_model(SMALL, CPU).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # sharper attention than at the start of training
    sequences = corpus.held_out_sequences(2)
    losses = {}
    for name in ("muse", "exact", "near"):
        with attention(model, name):
            losses[name] = held_out_losses(model, sequences)
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
    curves = {name: trained(SMALL, corpus, name)[1] for name in ("muse", "exact", "near")}
    assert curves["muse"] != curves["exact"] and curves["muse"] != curves["near"]
    assert curves["muse"] == pytest.approx(curves["exact"], rel=1e-3)
    whole = changed(muse={"block": 128})  # one block: MuSe is exact attention
    assert trained(whole, corpus)[1] == pytest.approx(trained(whole, corpus, "exact")[1], rel=1e-5)


def test_it_learns_more_than_the_frequencies_of_bytes(corpus):
    config = changed(train={"steps": 80, "batch": 16, "warmup": 5, "lr": 1e-2})
    model, curve = trained(config, corpus)
    assert curve[0] > 5.0
    assert held_out_losses(model, corpus.held_out_sequences(32)).mean() < corpus.held_out_entropy() - 0.4


def test_a_loss_that_is_no_number_stops_the_run(corpus):
    with pytest.raises(FloatingPointError, match=r"the loss of step \d+ is (nan|inf).*train.lr"):
        trained(changed(train={"lr": 1e30, "steps": 20, "warmup": 0}), corpus)


def test_losses_are_those_of_transformers(corpus):
    model = build_model(SMALL, CPU)
    sequences = corpus.held_out_sequences(3)
    assert token_losses(model, sequences).shape == (3, SMALL.data.context)
    expected = model(sequences, labels=sequences).loss  # shifts the labels itself
    torch.testing.assert_close(token_losses(model, sequences).mean(), expected)


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
        command.main(arguments)
        command.main(arguments)  # replaces the first
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
    assert all(re.fullmatch(r"step \d/5  loss \d\.\d{3}  [\d,]+ tokens/s  \d\d:\d\d left", line) for line in lines)


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
    register_attentions(MUSE)
    model = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="muse").eval()
    loss = held_out_losses(model, corpus.held_out_sequences(SMALL.data.held_out_sequences)).mean().item()
    assert loss == pytest.approx(json.loads((folder / "results.json").read_text())["loss"]["muse"], rel=1e-5)


def test_a_table_without_a_far_field(run):
    results = json.loads((run[0] / "results.json").read_text())
    results["far_loss"] = dict.fromkeys(results["far_loss"])
    assert re.search(r"exact attention +\d\.\d{4} +- +\d\.\d{3} s", table(results))


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
])
def test_the_command_explains_what_is_wrong(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.pick_device("auto") == CPU
    with pytest.raises(ValueError, match="no GPU; take --device cpu"):
        command.pick_device("cuda")


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
