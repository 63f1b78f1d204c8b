"""The section "muse" of a DeepSpeed config: what it may say, and what is refused with which words."""
from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("deepspeed")

from muse_dist import MuseConfig
from muse_dist.deepspeed_section import MuseSection, read_config, without_total

REST = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
SECTION = {"preset": "fast", "opened": 8, "context_parallel_size": 4, "layers": "1-3,6", "layout": "contiguous",
           "timeout_seconds": 30}
CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "deepspeed").glob("*.json"))


def config(changes=None, **section):
    return {**REST, **(changes or {}), "muse": {"context_parallel_size": 2, **section}}


@pytest.mark.parametrize("form", ["dict", "path", "base64"])
def test_section_is_read_and_taken_out(form, tmp_path):
    values = {**REST, "muse": SECTION}
    given = values
    if form == "path":
        given = tmp_path / "ds.json"
        given.write_text("# a comment\n" + json.dumps(values))  # HJSON, as DeepSpeed reads it
    elif form == "base64":
        given = base64.urlsafe_b64encode(json.dumps(values).encode()).decode()
    section, rest = read_config(given)
    assert section == MuseSection(MuseConfig.fast(opened=8), 4, "1-3,6", "contiguous", 30)
    assert rest == REST
    rest["zero_optimization"]["stage"] = 0
    assert values == {**REST, "muse": SECTION}


def test_layers_are_counted_from_zero():
    section = read_config({**REST, "muse": SECTION})[0]
    assert section.chosen_layers(8) == {1, 2, 3, 6}
    assert read_config(config())[0].chosen_layers(3) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"muse.layers='1-3,6': the model has 6 layers, 0 to 5"):
        section.chosen_layers(6)


@pytest.mark.parametrize("section, message", [
    ({"blok": 64}, r"unknown key 'blok' in the section \"muse\"; did you mean 'block'\?"),
    ({"context_parallel": 2}, "did you mean 'context_parallel_size'"),
    ({"layer": "1"}, "did you mean 'layers'"),
    ({"zzz": 1}, "known keys: anchors, backend, block"),
    ({"block": 100}, "block=100 is not leaf=64 times a power of two"),
    ({"context_parallel_size": 0}, "context_parallel_size=0: must be a whole number of ranks, at least 1"),
    ({"context_parallel_size": True}, "context_parallel_size=True"),
    ({"layout": "ring"}, "layout='ring': must be one of contiguous, zigzag"),
    ({"timeout_seconds": -1}, "timeout_seconds=-1: must be a positive number"),
    *[({"layers": bad}, "must be \"all\", or numbers and ranges") for bad in ("", "3-1", "a", "1-2-3", 4, [1, 2])],
])
def test_bad_sections_are_refused_with_the_fix(section, message):
    with pytest.raises(ValueError, match=message):
        read_config(config(**section))


@pytest.mark.parametrize("changes, message", [
    ({"zero_optimization": {"stage": 3, "reduce_scatter": False}}, "reduce_scatter=false.*leave it at true"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size: not supported"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size: not supported"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients: not supported"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients: .*leave it out"),
    ({"checkpoint": {"writer": {"decoupled": True}}}, "checkpoint.writer: does not know ranks.*leave it out"),
    ({"datastates_ckpt": {}}, "datastates_ckpt: is still writing.*leave it out"),
    ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: not supported"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: the loss is scaled for"),
    ({"activation_checkpointing": {"partition_activations": True}}, "partition_activations: ranks hold different"),
    ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size: tensor parallelism is not supported"),
    ({"sequence_parallel_size": 2}, "\"sequence_parallel_size\": use muse.context_parallel_size instead"),
])
def test_settings_of_deepspeed_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(config(changes))
    if "context" in message or "gradient" in message:
        return
    problem = {"zero_optimization": {"stage": 3, "reduce_scatter": False}, "sequence_parallel_size": 2}
    with pytest.raises(ValueError, match="sequence_parallel_size.*; .*reduce_scatter"):  # all at once
        read_config(config(problem))


@pytest.mark.parametrize("key", ["zero_optimization", "activation_checkpointing", "tensor_parallel", "checkpoint"])
def test_sections_of_deepspeed_may_be_null_and_nothing_else(key):
    assert read_config(config({key: None}))[1][key] is None
    with pytest.raises(TypeError, match=f"\"{key}\" must be a section .* not True"):
        read_config(config({key: True}))


def test_one_rank_a_sequence_leaves_deepspeed_its_choices():
    changes = {"zero_optimization": {"stage": 3, "reduce_scatter": False}, "gradient_predivide_factor": 2.0}
    assert read_config(config(changes, context_parallel_size=1))[1] == {**REST, **changes}


@pytest.mark.parametrize("sizes, replicas, wanted", [
    ((12, 2, 3), 2, (None, 2, 3)),
    ((12, 2, None), 2, (None, 2, 3)),
    ((12, None, 3), 2, (None, 2, 3)),
    ((12, None, None), 2, (None, 6, 1)),
    ((None, 2, 3), 2, (None, 2, 3)),
    ((12, "auto", 3), 2, (12, "auto", 3)),
    ((12, 0, 3), 2, (12, 0, 3)),
])
def test_batches_are_given_by_rank_alone(sizes, replicas, wanted):
    assert without_total(batch(sizes), replicas) == batch(wanted)


@pytest.mark.parametrize("sizes", [(12, 2, 2), (12, 5, None), (2, 4, None), (12, None, 5), (13, None, None)])
def test_batches_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=f"train_batch_size={sizes[0]} is not .* leave out train_batch_size"):
        without_total(batch(sizes), 2)


def batch(sizes):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {name: size for name, size in zip(names, sizes) if size is not None}


@pytest.mark.parametrize("values, message", [
    (REST, "has no section \"muse\"; add \"muse\""),
    ({**REST, "mus": {}}, "is 'mus' meant to be it"),
])
def test_a_missing_section_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read_config(values)


def test_a_section_that_is_no_section_is_refused():
    with pytest.raises(TypeError, match="must be a section"):
        read_config({**REST, "muse": 2})


def test_universal_checkpoints_must_be_the_last_ones(tmp_path):
    from muse_dist.deepspeed_checkpoint import load

    def universal(tag=None):
        return load(SimpleNamespace(load_universal_checkpoint=lambda: True), tmp_path, tag)

    assert universal() is None
    (tmp_path / "latest").write_text("global_step8")
    with pytest.raises(ValueError, match="global_step8, is not universal .none is.*ds_to_universal --input_folder"):
        universal()
    (tmp_path / "latest_universal").write_text("global_step4_universal")
    with pytest.raises(ValueError, match="global_step4_universal is.*take load_universal out of the config"):
        universal()
    with pytest.raises(FileNotFoundError, match="global_step4_universal"):  # what is named is looked for
        universal("global_step4_universal")
    (tmp_path / "latest_universal").write_text("global_step8_universal")
    with pytest.raises(FileNotFoundError, match="global_step8_universal"):
        universal()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_project_are_right(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    section, rest = read_config(path)
    assert section.context_parallel_size > 1
    assert DeepSpeedConfig(rest).gradient_clipping == 1.0
