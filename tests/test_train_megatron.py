"""The training command with Megatron's engine: what PyTorch's computes, and checkpoints that both read."""
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from launch.checkpoint import Checkpoints
from launch.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from launch.corpus import ArrayTokens, Corpus
from launch.engine import make_engine
from launch.megatron_model import build_gpt, transformer_config
from launch.monitor import Silent
from launch.ranks import Ranks
from launch.train import main
from launch.trainer import Trainer
from muse_dist import ByteCounter, MuseConfig
from tests.launched import PROBED_RUN
from tests.megatron_cpu import cuda_as_cpu
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="needs pip install muse_dist[megatron]")

CPU = torch.device("cpu")
STEPS, SAVED, LEFT_OUT = 6, 3, 2  # LEFT_OUT is the number of a step that the guard is made to call bad


def settings(engine, **train):
    """Exact attention in the first step, MuSe in the others; two heads read a key/value head."""
    return RunConfig(
        "run", ModelConfig(2, 32, 4, 2, 64),
        TrainConfig(steps=STEPS, batch=3, micro_batch=2, warmup=2, lr=5e-3, clip=0.5, engine=engine, bad_step="skip",
                    exact_first=0.2, **train),
        DataConfig(context=128),
        muse=MuseConfig(block=16, leaf=8, group=8, anchors=1, remote_leaf=8, opened=2, exchange="kv"))


CASES = {"torch": settings("torch"), "megatron": settings("megatron"),
         "recompute": settings("megatron", recompute=True), "bf16": settings("megatron")}
LOGITS = 48  # tokens whose logits Megatron's engine has at a time: two pieces a rank, and three where it reads all


def ranks_of(size):
    """This process among sets of `size` that share sequences."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(at, at + size))) for at in range(0, world, size)]
    group = groups[rank // size] if size > 1 else None
    return Ranks(rank % size, size, CPU, "zigzag", group, dist.new_group(), dist.new_group(), rank // size,
                 world // size)


def trainer_of(config, ranks, folder):
    tokens, rows, counter = ArrayTokens(np.arange(5000) ** 2 % 61, np.array([0])), [], ByteCounter()
    trainer = Trainer(make_engine(config, ranks, 64, counter), Corpus(tokens, tokens, 128, 64), config, ranks,
                      Silent(rows), Checkpoints(Path(folder), ranks, 3), counter)
    return trainer, rows


@contextlib.contextmanager
def megatron_on_cpu(dtype=torch.float32):
    """Megatron finds the CPU where it asks for CUDA, and computes in `dtype`."""
    with cuda_as_cpu(), mock.patch("launch.megatron_engine.compute_dtype", lambda device: dtype), \
            mock.patch("launch.megatron_model.LOGITS", LOGITS):
        yield


def shown(rows):
    return [(row["loss"], row["gradient_norm"], row["skipped"], row["received_bytes"]) for row in rows]


def train_and_save(folder):
    """Every case on two ranks that share sequences, and bf16 once more from its checkpoint."""
    ranks, found = ranks_of(dist.get_world_size()), {}
    for name, config in CASES.items():
        with megatron_on_cpu(torch.bfloat16 if name == "bf16" else torch.float32):
            found[name] = train(name, trainer_of(config, ranks, f"{folder}/{name}"), folder)
    with megatron_on_cpu(torch.bfloat16):
        found["bf16 resumed"] = resumed(trainer_of(CASES["bf16"], ranks, f"{folder}/bf16"))
        found["devices"] = devices(CASES["bf16"])
    return found


def devices(config):
    """Where the numbers of a GPT lie if the GPU is another device than the CPU: here one without memory."""
    with mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta")):
        gpt = build_gpt(config, transformer_config(config.model, 2, torch.bfloat16), 64)
    return {tensor.device.type for tensor in [*gpt.parameters(), *gpt.buffers(), gpt.rotary_pos_emb.inv_freq]}


def train(name, trainer_and_rows, folder):
    """All steps, with a checkpoint on the way; one of them is called bad although its gradients are sound.

    Returns what the steps showed, the probe, the weights at the start, and how large Adam's first gradients were.
    """
    trainer, rows = trainer_and_rows
    start = {key: whole(value) for key, value in trainer.engine.tensors().items()}
    judge = trainer.guard.problem
    trainer.guard.problem = lambda loss, norm: "made up" if trainer.step + 1 == LEFT_OUT else judge(loss, norm)
    trainer.run(1)
    gradients = {key: whole(value).sqrt() for key, value in trainer.engine.tensors().items() if "exp_avg_sq" in key}
    trainer.run(SAVED)
    probed = trainer._probe(trainer.corpus.sequences(0, 1, 0), [0, 1])
    trainer.engine.save_model(Path(folder, f"{name} model"))
    trainer.checkpoints = None  # the last one stays that of `SAVED`
    trainer.run()
    return shown(rows), probed, start, gradients


def whole(tensor):
    """What all ranks have of a tensor, a copy."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def resumed(trainer_and_rows):
    """The steps after the checkpoint."""
    trainer, rows = trainer_and_rows
    trainer.resume(SAVED)
    trainer.checkpoints = None
    trainer.run()
    return shown(rows)


def go_on(folder):
    """Either engine from the other's checkpoint, on ranks that each read sequences of their own."""
    with megatron_on_cpu():
        return {name: resumed(trainer_of(CASES[name], ranks_of(1), f"{folder}/{saver}"))
                for name, saver in (("torch", "megatron"), ("megatron", "torch"))}


def check(name, found, wanted):
    assert [row[2] for row in found] == [row[2] for row in wanted], name
    for i in range(2):
        assert [row[i] for row in found] == pytest.approx([row[i] for row in wanted], rel=1e-5), (name, i)


def check_same_as_torch(first, second):
    """Loss, norm and bytes received of every step, the probe, and the weights at the start."""
    wanted, probed, start, _ = first["torch"]
    assert [row[2] for row in wanted] == [0, 1, 0, 0, 0, 0]
    assert max(row[1] for row in wanted) > CASES["torch"].train.clip, "clipping must matter"
    assert all(row[3] > 0 for row in wanted)
    for name in ("megatron", "recompute"):
        for rank in (first, second):
            check(name, rank[name][0], wanted)
            for layer, numbers in probed.items():
                assert rank[name][1][layer] == pytest.approx(numbers, rel=1e-4), (name, layer)
    assert [row[3] for row in first["megatron"][0]] == [row[3] for row in wanted], "bytes received"
    assert first["megatron"][2].keys() == start.keys()
    assert all(torch.equal(value, first["megatron"][2][key]) for key, value in start.items())


def check_bf16(first):
    """It starts from fp32 weights that are not rounded, and goes on as if it had never stopped."""
    rows, _, start, _ = first["bf16"]
    assert all(torch.equal(value, start[key]) for key, value in first["torch"][2].items()), "rounded weights"
    assert first["bf16 resumed"] == rows[SAVED:]
    wanted = [row[0] for row in first["torch"][0]]
    assert [row[0] for row in rows] == pytest.approx(wanted, rel=1e-2)
    assert [row[0] for row in rows] != pytest.approx(wanted, rel=1e-5), "not computed in bf16"


def test_megatron_computes_what_torch_does_and_either_goes_on_with_the_others_checkpoint(tmp_path):
    """At last on three ranks, which do not divide the parameters. One test: most of its time is the start of ranks."""
    first, second = run_ranks(2, train_and_save, str(tmp_path))
    check_same_as_torch(first, second)
    check_bf16(first)
    assert first["devices"] == {"meta"}
    for name, found in run_ranks(3, go_on, str(tmp_path))[0].items():
        check(name, found, first["torch"][0][SAVED:])
    models = {name: LlamaForCausalLM.from_pretrained(tmp_path / f"{name} model").state_dict() for name in CASES}
    for name in ("megatron", "recompute"):
        assert models[name].keys() == models["torch"].keys()
        for key, value in models["torch"].items():
            found = models[name][key]
            assert (found - value).norm() <= 3e-5 * value.norm(), (name, key)
            # Adam divides by gradients: where one is about its epsilon of 1e-8, its rounding alone moves a weight.
            tied = key.replace("lm_head", "model.embed_tokens")
            large = first["torch"][3][f"optimizer.{tied}.exp_avg_sq"] > 1e-7
            assert large.float().mean() > 0.9
            torch.testing.assert_close(found[large], value[large], rtol=1e-4, atol=1e-6)


def command(folder, port):
    """`python -m launch.train` twice on this rank, as torchrun would start it. What it printed."""
    rank, printed = dist.get_rank(), []
    dist.destroy_process_group()
    arguments = ["--config", f"{folder}/small.toml", "--out", folder, "--device", "cpu", "--engine", "megatron"]
    for start, more in enumerate((["--steps", "2"], [])):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                          TORCHELASTIC_RESTART_COUNT=str(start))
        output = Path(folder, f"output-{rank}-{start}.txt")
        with megatron_on_cpu(), output.open("w") as text, contextlib.redirect_stdout(text), \
                contextlib.redirect_stderr(text):
            assert main([*arguments, *more]) == 0
        printed.append(output.read_text())
    return printed


def test_the_command_trains_goes_on_and_reports(tmp_path):
    (tmp_path / "small.toml").write_text(PROBED_RUN)
    # A port looked for beforehand may be another's when the ranks come to it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (first, second), _ = run_ranks(2, command, str(tmp_path), store.port)
    assert "going on after step 2" in second
    assert "deprecated" not in first + second and "not installed" not in first + second, first
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    assert results["config"]["train"]["engine"] == "megatron" and len(results["history"]["loss"]) == 4
    rows = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[1]["probe"]["layer_0"]["error"] > 0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "small" / "model").num_parameters() == results["parameters"]


def test_what_megatron_cannot_do_is_refused_at_once_with_all_fixes():
    with pytest.raises(ValueError) as refused:
        settings("megatron", compare=True, shard=True, optimizer="apex", layout="contiguous")
    for line in ("train.compare=true.*set it to false", "train.shard=true.*set it to false",
                 "train.optimizer='apex'; take 'adamw'", "train.layout='contiguous'; take 'zigzag'"):
        refused.match(f"(?s)train.engine='megatron' does not work with.*{line}")


def test_one_process_no_gpu_and_no_megatron_are_refused(monkeypatch):
    alone = Ranks(0, 1, CPU, "zigzag")
    with pytest.raises(ValueError, match="there is one; start it with torchrun, or take 'torch'"):
        make_engine(settings("megatron"), alone, 64)
    many = dataclasses.replace(alone, gradients=object())
    with pytest.raises(ValueError, match="trains on GPUs only, and the run is on cpu; take --device cuda"):
        make_engine(settings("megatron"), many, 64)
    monkeypatch.setattr("launch.megatron_engine.compute_dtype", lambda device: torch.float32)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ValueError, match="megatron-core is not installed; pip install"):
        make_engine(settings("megatron"), many, 64)
