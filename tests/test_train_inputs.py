"""What the training command reads: its settings and its data."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config import DataConfig, LogConfig, ModelConfig, RunConfig, TrainConfig, parse_changes
from launch.corpus import SEPARATOR, ArrayTokens, Corpus, load_corpus, permuted
from muse_dist import MuseConfig
from tests.launched import write_pattern

TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
MUSE = MuseConfig(block=32, leaf=8, group=16, anchors=2, remote_leaf=8, opened=2)
SMALL = RunConfig(name="small", model=ModelConfig(layers=1, width=32, heads=2, kv_heads=1, mlp=64),
                  train=TrainConfig(steps=6, batch=2, warmup=2, lr=5e-3, threads=1, compare=True),
                  data=DataConfig(context=128, held_out_sequences=4), log=LogConfig(checkpoint_every=2), muse=MUSE)


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_tiny_config_has_a_far_field_and_small_cost():
    config = RunConfig.from_toml(TINY)
    assert config.name == "tiny"
    assert 2048 <= config.data.context <= 4096
    assert config.near_reach * 4 <= config.data.context, "most tokens must have a far field"


def test_settings_survive_writing_and_overrides_win(tmp_path):
    (tmp_path / "x.toml").write_text(SMALL.to_toml())
    assert RunConfig.from_toml(tmp_path / "x.toml", name="small") == SMALL
    other = RunConfig.from_toml(tmp_path / "x.toml", changes={"train.steps": 99, "train.seed": 7})
    assert (other.name, other.train.steps, other.train.seed, other.muse) == ("x", 99, 7, MUSE)


@pytest.mark.parametrize("text, error, message", [
    ("[modle]\nlayers = 2", ValueError, "'modle'.*known: .model."),
    ("steps = 3", ValueError, "'steps'"),
    ("[train]\nstep = 3", ValueError, "'step' in .train.; did you mean 'steps'"),
    ("[train]\nsteps = 3.0", TypeError, "train.steps=3.0 must be int, not float"),
    ("[train]\nsteps = true", TypeError, "train.steps=True must be int, not bool"),
    ("[train]\nsteps = 0", ValueError, "train.steps=0 must be at least 1"),
    ("[train]\nlr = 0", ValueError, "train.lr=0.0 must be positive"),
    ("[train]\nlr = nan", ValueError, "train.lr=nan must be a finite number"),
    ("[train]\nspike = inf", ValueError, "train.spike=inf must be a finite number"),
    ("[model]\nrope_theta = inf", ValueError, "model.rope_theta=inf must be a finite number"),
    ("[deepspeed]\nstage = 3", ValueError, "train.engine='torch' does not read"),
    ("[model]\nheads = 3", ValueError, "model.width=128 must be heads=3 times an even head dim"),
    ("[model]\nheads = 4\nkv_heads = 3", ValueError, "model.kv_heads=3 must divide heads=4"),
    ("[data]\npath = 'tokens'\nheld_out_every = 5", ValueError, "held_out_every=5 is not read with data.path.*leave"),
    ("[data]\nheld_out_every = 1", ValueError, "data.held_out_every=1 must be at least 2"),
    ("[train]\noptimizer = 'sgd'", ValueError, "train.optimizer='sgd' must be one of adamw, apex"),
    ("[train]\nexact_first = 1.5", ValueError, "train.exact_first=1.5 is a fraction"),
    ("[train]\ncompare = true\nshard = true", ValueError, "train.compare=true.*train.shard=true"),
    ("[log]\nkeep = 0", ValueError, "log.keep=0 must be at least 1"),
    ("[muse]\nblok = 64", ValueError, "'blok'.*did you mean 'block'"),
    ("[muse]\ncausal = false", ValueError, "muse.causal=false"),
])
def test_settings_that_cannot_be_are_refused(tmp_path, text, error, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(error, match=message):
        RunConfig.from_toml(tmp_path / "x.toml")


def test_changes_from_the_command_line():
    assert parse_changes(["train.lr=1e-3", "muse.exchange=kv", "train.shard=true", "data.path='a b'"]) == {
        "train.lr": 1e-3, "muse.exchange": "kv", "train.shard": True, "data.path": "a b"}
    with pytest.raises(ValueError, match="'lr' must be KEY=VALUE"):
        parse_changes(["lr"])


def test_every_config_is_read_and_fits_its_ranks():
    found = {path.stem: RunConfig.from_toml(path) for path in TINY.parent.glob("*.toml")}
    assert set(found) == {"tiny", "30m", "125m", "350m", "1b", "8b"}
    for config in found.values():
        ranks = 8 if config.name == "8b" else 2
        assert config.data.context % (2 * ranks * config.muse.block) == 0
        assert config.near_reach < config.data.context


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
    assert found.held_out.array.tolist() == files[2] + files[5]
    assert found.train.array.tolist() == files[0] + files[1] + files[3] + files[4]
    assert [found.train.document(at) for at in (0, 5, 6, 13, 14)] == [(0, 0), (0, 5), (1, 0), (2, 0), (2, 1)]


def test_too_little_text_is_refused(tmp_path):
    write_files(tmp_path, [50, 5])
    with pytest.raises(ValueError, match=r"6 tokens for held_out.*data.context=20.*smaller context"):
        load_corpus(DataConfig(context=20, held_out_every=2), tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="0 tokens for train"):
        load_corpus(DataConfig(context=20), tmp_path / "none")


def stream(tokens):
    return ArrayTokens(np.arange(tokens, dtype=np.uint16), np.array([0]))


def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order():
    found = Corpus(stream(1000), ArrayTokens(np.arange(100) + 1000, np.array([0])), context=10)
    assert found.windows == 99
    epochs = [found.sequences(at, 99, seed=3) for at in (0, 99)]
    for epoch in epochs:
        assert epoch.shape == (99, 11) and epoch.dtype == torch.int64
        assert (epoch.diff(dim=1) == 1).all(), "sequences are cuts of the stream"
        starts = epoch[:, 0].sort().values
        assert (starts.diff() == 10).all() and starts[0] < 10, "no token is lost or repeated in an epoch"
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], found.sequences(0, 99, seed=4))
    assert torch.equal(found.sequences(50, 7, seed=3), epochs[0][50:57]), "any place can be read without those before"
    held_out = found.held_out_sequences(3)
    assert held_out[:, 0].tolist() == [1000, 1044, 1089] and (held_out.diff(dim=1) == 1).all()
    assert found.held_out_sequences(1)[0, 0] == 1000


@given(count=st.integers(1, 300), seed=st.integers(0, 5), epoch=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_permutation_meets_every_place_once(count, seed, epoch):
    assert sorted(permuted(place, count, seed, epoch) for place in range(count)) == list(range(count))


def test_the_permutation_is_what_it_was():
    """Checkpoints hold a position in it: a change would lose and repeat tokens."""
    assert [permuted(place, 1000, 0, 0) for place in range(6)] == [607, 396, 417, 678, 484, 231]


def test_entropy_of_known_frequencies():
    found = Corpus(stream(9), ArrayTokens(np.array([1, 1, 2, 3], np.uint16), np.array([0])), context=2)
    assert found.held_out_entropy() == pytest.approx(1.5 * np.log(2))


def test_the_standard_library_is_enough():
    corpus = load_corpus(SMALL.data)
    assert len(corpus.train) > 2_000_000 and len(corpus.held_out) > 200_000
    assert corpus.train.array.max() == SEPARATOR
    assert 2.5 < corpus.held_out_entropy() < 4.0


ABOUT = '{"vocabulary": 64, "digest": "pattern", "train": {"tokens": 20000}, "held_out": {"tokens": 1000}}'


@pytest.mark.parametrize("text, message", [
    (ABOUT[:ABOUT.index("}")], r"is cut off or no JSON \(Expecting .,. delim.*; write the tokens again"),
    ("", "is cut off or no JSON"), ("\xff", "is cut off or no JSON"), ("[" * 100_000, "is cut off or no JSON"),
    ("[]", "is no table"), ("{}", "has no int 'vocabulary'"),
    (ABOUT.replace("train", "trian"), "has no dict 'train'; write the tokens again"),
    (ABOUT.replace('"digest": "pattern", ', ""), "has no str 'digest'"),
    (ABOUT.replace('"tokens": 1000', '"tokens": null'), "has no int 'tokens' in 'held_out'"),
])
def test_a_damaged_data_json_is_named(tmp_path, text, message):
    write_pattern(tmp_path)
    path, config = tmp_path / "data.json", DataConfig(path=str(tmp_path), context=16)
    path.write_text(ABOUT)
    assert len(load_corpus(config).train) == 20_000, "the whole one is read"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path} {message}"):
        load_corpus(config)
