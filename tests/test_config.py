"""MuseConfig: defaults, presets, TOML, and refusals that name the field and the fix."""
import dataclasses
import pickle
import re

import pytest

from muse_dist import MuseConfig
from muse_dist.config import PRESETS

DEFAULTS = {
    "block": 4096, "halo": 1, "leaf": 64, "group": 64, "anchors": 4, "remote_anchors": 1, "remote_leaf": 32,
    "opened": 16, "tolerance": 0.0, "sinks": 1, "trace": True, "causal": True, "exchange": "moments", "backend": "auto",
    "tiles": "", "cuda_graphs": False,
}


def test_fields_defaults_and_help():
    assert dataclasses.asdict(MuseConfig()) == DEFAULTS
    for f in dataclasses.fields(MuseConfig):
        assert len(f.metadata["help"].split()) >= 5, f.name


def test_is_a_frozen_value():
    config = MuseConfig(block=512, opened=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block = 256
    assert config == MuseConfig(block=512, opened=3) and hash(config) == hash(MuseConfig(block=512, opened=3))
    assert config != MuseConfig(block=512, opened=4)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="block"):
        dataclasses.replace(config, block=500)


def test_the_smallest_and_odd_sizes_are_allowed():
    MuseConfig(block=1, leaf=1, group=1, anchors=1, remote_leaf=1, sinks=1)
    MuseConfig(block=12, leaf=3, group=6, anchors=2, remote_leaf=12, sinks=4, opened=10_000, halo=10_000)


@pytest.mark.parametrize("field", [name for name, value in DEFAULTS.items() if type(value) is int])
@pytest.mark.parametrize("value", [True, 2.0, "64", None])
def test_integers_must_be_integers(field, value):
    with pytest.raises(TypeError, match=rf"{field}.*int"):
        MuseConfig(**{field: value})


@pytest.mark.parametrize("field", ["trace", "causal"])
@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_switches_must_be_booleans(field, value):
    with pytest.raises(TypeError, match=rf"{field}.*bool"):
        MuseConfig(**{field: value})


@pytest.mark.parametrize("value", [True, "0.1", None])
def test_the_tolerance_must_be_a_number(value):
    with pytest.raises(TypeError, match=r"tolerance.*float"):
        MuseConfig(tolerance=value)


def test_whole_numbers_are_taken_for_the_tolerance():
    assert type(MuseConfig(tolerance=0).tolerance) is float and MuseConfig(tolerance=0) == MuseConfig()


@pytest.mark.parametrize("field", ["exchange", "backend"])
def test_names_must_be_known_strings(field):
    with pytest.raises(TypeError, match=rf"{field}.*str"):
        MuseConfig(**{field: 1})
    with pytest.raises(ValueError, match=rf"{field}.*'{DEFAULTS[field]}'"):
        MuseConfig(**{field: "nonsense"})


@pytest.mark.parametrize(("changes", "words"), [
    ({"block": 0}, "block=0.*at least 1"),
    ({"leaf": 0}, "leaf=0.*at least 1"),
    ({"group": -64}, "group=-64.*at least 1"),
    ({"halo": -1}, "halo=-1.*at least 0"),
    ({"opened": -1}, "opened=-1.*at least 0"),
    ({"sinks": -1}, "sinks=-1.*at least 0"),
    ({"tolerance": -0.1}, "tolerance=-0.1.*from 0 to below 1"),
    ({"tolerance": 1}, "tolerance=1.0.*from 0 to below 1"),
    ({"tolerance": float("nan")}, "tolerance=nan.*from 0 to below 1"),
    ({"anchors": 0}, "anchors=0.*at least 1"),
    ({"remote_anchors": 0}, "remote_anchors=0.*at least 1"),
    ({"remote_leaf": 0}, "remote_leaf=0.*at least 1"),
    ({"anchors": 3}, "anchors=3.*power of two"),
    ({"block": 512, "anchors": 16}, "anchors=16.*at most.*8"),
    ({"remote_anchors": 8}, "remote_anchors=8.*at most.*4"),
    ({"remote_anchors": 3}, "remote_anchors=3.*power of two"),
    ({"block": 256, "sinks": 5}, "sinks=5.*at most.*4"),
    ({"leaf": 8192}, "block=4096.*leaf=8192"),
])
def test_impossible_values_name_the_field_and_the_limit(changes, words):
    with pytest.raises(ValueError, match=words):
        MuseConfig(**changes)


@pytest.mark.parametrize("part", ["leaf", "group", "remote_leaf"])
@pytest.mark.parametrize(("block", "size"), [(100, 64), (192, 64), (4095, 64), (40, 64), (100, 7)])
def test_a_block_is_a_part_times_a_power_of_two_and_the_proposed_block_works(part, block, size):
    others = {"leaf": 1, "group": 1, "remote_leaf": 1, "anchors": 1, "sinks": 0}
    with pytest.raises(ValueError, match=rf"block={block}.*{part}={size}") as refused:
        MuseConfig(**{**others, "leaf": block, "group": block, "remote_leaf": block, part: size, "block": block})
    proposed = int(re.search(r"take block=(\d+)", str(refused.value)).group(1))
    assert proposed % size == 0
    MuseConfig(**{**others, "leaf": size, "group": size, "remote_leaf": size, "block": proposed})


@pytest.mark.parametrize(("key", "hint"), [
    ("blok", "'block'"), ("leafs", "'leaf'"), ("open", "'opened'"), ("remote_leafs", "'remote_leaf'"),
    ("zzz", "remote_anchors"),  # nothing is near: all known keys are listed
])
def test_unknown_keys_are_refused_with_the_nearest_known_one(key, hint):
    with pytest.raises(ValueError, match=f"'{key}'.*{hint}"):
        MuseConfig.from_dict({key: 1})
    with pytest.raises(ValueError, match=f"'{key}'.*{hint}"):
        MuseConfig.from_dict({"preset": "fast", key: 1})


def test_from_dict_reads_fields_and_presets():
    assert MuseConfig.from_dict({}) == MuseConfig()
    assert MuseConfig.from_dict({"block": 2048, "trace": False}) == MuseConfig(block=2048, trace=False)
    assert MuseConfig.from_dict({"preset": "paper", "causal": False}) == MuseConfig.paper(causal=False)
    assert MuseConfig.from_dict(dataclasses.asdict(MuseConfig(halo=3))) == MuseConfig(halo=3)
    given = {"preset": "fast"}
    MuseConfig.from_dict(given)
    assert given == {"preset": "fast"}, "the caller's mapping was changed"
    for bad in ("fats", 3, None, ["fast"]):
        if bad is not None:
            with pytest.raises((TypeError, ValueError), match=r"preset.*(paper|fast|accurate)"):
                MuseConfig.from_dict({"preset": bad})


def test_presets():
    paper = MuseConfig.paper()
    assert (paper.block, paper.block // paper.leaf) == (8192, 64)
    assert (paper.halo, paper.sinks, paper.opened, paper.trace) == (0, 0, 0, False)
    fast, accurate = MuseConfig.fast(), MuseConfig.accurate()
    near = [config.block * (1 + config.halo) for config in (fast, accurate)]
    assert near[0] < near[1]
    for name in PRESETS:
        preset = getattr(MuseConfig, name)
        assert MuseConfig.preset(name) == preset() and preset(causal=False).causal is False
        assert MuseConfig.preset(name, halo=2) == dataclasses.replace(preset(), halo=2)
        with pytest.raises(ValueError, match="block"):
            preset(block=100)
    with pytest.raises(ValueError, match=r"'quick'.*paper.*fast.*accurate"):
        MuseConfig.preset("quick")


def write(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_from_toml_with_and_without_a_table(tmp_path):
    want = MuseConfig(block=2048, trace=False, exchange="kv")
    plain = 'block = 2048\ntrace = false\nexchange = "kv"\n'
    assert MuseConfig.from_toml(write(tmp_path, plain)) == want
    assert MuseConfig.from_toml(str(write(tmp_path, "[model]\nlayers = 2\n[muse]\n" + plain))) == want
    assert MuseConfig.from_toml(write(tmp_path, "")) == MuseConfig()
    assert MuseConfig.from_toml(write(tmp_path, "[muse]\n")) == MuseConfig()
    assert MuseConfig.from_toml(write(tmp_path, '[muse]\npreset = "fast"\nhalo = 2\n')) == MuseConfig.fast(halo=2)


@pytest.mark.parametrize(("text", "kind", "words"), [
    ("[muse]\nblok = 2048\n", ValueError, "'blok'.*'block'"),
    ("blok = 2048\n", ValueError, "'blok'.*'block'"),
    ("[model]\nlayers = 2\n", ValueError, "'model'"),
    ("[muse]\nblock = 2048.0\n", TypeError, "block.*int"),
    ("[muse]\nblock = 100\n", ValueError, "block=100"),
    ("[muse]\ntrace = 1\n", TypeError, "trace.*bool"),
    ("[muse]\nblock = [2048]\n", TypeError, "block.*int"),
    ("muse = 3\n", (TypeError, ValueError), "muse.*table"),
    ("[muse\n", ValueError, "line 1"),
])
def test_bad_toml_is_refused(tmp_path, text, kind, words):
    with pytest.raises(kind, match=words):
        MuseConfig.from_toml(write(tmp_path, text))
