"""`--attention muse` for Megatron-LM's scripts, against a stand-in with its modules' interfaces.

Megatron-LM cannot be installed from a registry; tests/test_megatron_lm.py is for a checkout of it.
"""
import argparse
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from muse_dist import MuseConfig
from muse_dist.layout import Layout, is_far
from muse_dist.megatron_patch.__main__ import main
from muse_dist.megatron_patch.options import add_options, parse_layers, read_options, show_layers
from muse_dist.megatron_patch.predict import exact_flops, muse_flops, read_step, report

ROOT = Path(__file__).parents[1]

# The three modules of a checkout that matter: the script's imports, the parser, and the arguments' validation.
TRAINING = "from megatron.training.initialize import get_args, initialize_megatron\n"
ARGUMENTS = '''
import argparse, os

def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = argparse.ArgumentParser(description="Megatron-LM Arguments", allow_abbrev=False)
    parser = add_megatron_arguments(parser)
    args = parser.parse_args()
    args.rank, args.world_size = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    return args

def add_megatron_arguments(parser):
    for name in ("num-layers", "hidden-size", "num-attention-heads", "seq-length", "micro-batch-size",
                 "global-batch-size", "kv-channels", "mtp-num-layers"):
        parser.add_argument("--" + name, type=int)
    for name in ("tensor-model-parallel-size", "context-parallel-size", "pipeline-model-parallel-size",
                 "num-query-groups"):
        parser.add_argument("--" + name, type=int, default=1)
    for name in ("bf16", "fp16", "sft", "reset-attention-mask", "group-query-attention", "qk-clip"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--window-size", type=int)
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--yaml-cfg")
    parser.add_argument("--spec", nargs="*")
    parser.add_argument("--no-create-attention-mask-in-dataloader", action="store_false",
                        dest="create_attention_mask_in_dataloader")
    return parser
'''
INITIALIZE = '''
from megatron.training.arguments import parse_args

def initialize_megatron():
    global parsed
    parse_args()  # as its services do, each for itself
    parsed = parse_args()
    print("GPU memory is taken now", flush=True)

def get_args():
    return parsed
'''
SCRIPT = '''
"""The smallest of scripts that trains: it parses, builds a GPT from Megatron-core's stock spec and runs one step."""
import sys
sys.path.append("%(root)s")
import torch
from megatron.training import get_args, initialize_megatron
from tests.megatron_cpu import cuda_as_cpu

if __name__ == "__main__":
    initialize_megatron()
    args = get_args()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import import_module
    with cuda_as_cpu():
        torch.distributed.init_process_group("gloo", init_method="file://%(folder)s/rendezvous", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        impl = {"transformer_impl": args.transformer_impl} if hasattr(TransformerConfig, "transformer_impl") else {}
        config = TransformerConfig(
            num_layers=args.num_layers, hidden_size=args.hidden_size, num_attention_heads=args.num_attention_heads,
            attention_dropout=args.attention_dropout, hidden_dropout=0.0, use_cpu_initialization=True, **impl)
        spec = get_gpt_layer_local_spec() if args.spec is None else import_module(args.spec)
        model = GPTModel(config, spec, 64, args.seq_length, position_embedding_type="rope")
        for layer in model.decoder.layers:
            core = layer.self_attention.core_attention
            print("layer", layer.layer_number, type(core).__name__, getattr(getattr(core, "muse", None), "block", None))
        tokens = torch.arange(args.seq_length)[None] %% 64
        model(tokens, tokens, None, labels=tokens).mean().backward()
        print("trained", sys.argv[1:3], flush=True)
'''
USUAL = ["--num-layers", "3", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "64",
         "--micro-batch-size", "1", "--bf16", "--attention-dropout", "0", "--no-create-attention-mask-in-dataloader"]
MUSE = ["--attention", "muse", "--muse-block", "16", "--muse-leaf", "4", "--muse-group", "8", "--muse-anchors", "2",
        "--muse-remote-leaf", "4"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A stand-in for a checkout of Megatron-LM."""
    folder = tmp_path_factory.mktemp("Megatron-LM")
    (folder / "megatron" / "training").mkdir(parents=True)
    for name, text in (("__init__", TRAINING), ("arguments", ARGUMENTS), ("initialize", INITIALIZE)):
        (folder / "megatron" / "training" / f"{name}.py").write_text(text)
    (folder / "pretrain_gpt.py").write_text(SCRIPT % {"root": ROOT, "folder": folder})
    return folder


def launch(checkout, *options, script="pretrain_gpt.py", launcher=("-m", "muse_dist.megatron_patch"), **environment):
    """The finished process of a launched script."""
    pytest.importorskip("megatron.core", reason="needs pip install muse_dist[megatron]")
    (checkout / "rendezvous").unlink(missing_ok=True)
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(checkout / script), *options], cwd=ROOT, text=True,
        capture_output=True, check=False, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def test_a_stock_script_trains_with_muse_in_the_chosen_layers(checkout):
    found = launch(checkout, *USUAL, *MUSE, "--muse-layers", "2-3")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].startswith("muse: layers 2-3 use MuseConfig(block=16,")
    assert "FLOPs of attention" in lines[1]
    assert lines[2:6] == ["GPU memory is taken now", "layer 1 DotProductAttention None", "layer 2 MuseCoreAttention 16",
                          "layer 3 MuseCoreAttention 16"]
    assert lines[6] == "trained ['--num-layers', '3']", "the script sees its own command line"


def test_without_the_option_nothing_changes(checkout):
    found = launch(checkout, *USUAL)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("DotProductAttention") == 3 and "muse:" not in found.stdout


def test_the_spec_option_needs_no_launcher(checkout):
    (checkout / "spec_of_mine.py").write_text(
        "from muse_dist import MuseConfig\nfrom muse_dist.megatron_patch.spec import layer_spec\n"
        "small = layer_spec(MuseConfig(block=8, leaf=4, group=4, anchors=2, remote_leaf=4))\n")
    found = launch(checkout, *USUAL, "--transformer-impl", "local", "--spec", "spec_of_mine", "small", launcher=(),
                   PYTHONPATH=f"{checkout}:{ROOT}")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("MuseCoreAttention 8") == 3


def test_every_problem_in_one_message_before_anything_is_built(checkout):
    found = launch(checkout, *USUAL[:-3], *MUSE, "--context-parallel-size", "4", "--seq-length", "72", "--sft",
                   "--reset-attention-mask", "--qk-clip", "--window-size", "9", "--attention-backend", "local",
                   "--muse-layers", "2-4", "--mtp-num-layers", "1", "--transformer-impl", "local", "--no-muse-causal")
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "GPU memory" not in found.stdout
    lines = [line for line in found.stderr.splitlines() if line.startswith("  - ")]
    for problem, fix in (
        ("attention_dropout=0.1", "--attention-dropout 0"), ("sft=True", "--sft out"),
        ("qk_clip=True", "--qk-clip out"), ("reset_attention_mask=True", "--reset-attention-mask out"),
        ("window_size=9", "--window-size out"),
        ("attention_backend=local", "--attention-backend out"), ("causal=False", "--no-muse-causal out"),
        ("create_attention_mask", "--no-create-attention-mask-in-dataloader"), ("--seq-length 72", "multiple of 128"),
        ("there is no layer 4", "--num-layers is 3"), ("--mtp-num-layers", "leave --muse-layers out"),
        ("--transformer-impl local", "--transformer-impl transformer_engine"),
    ):
        assert sum(problem in line and fix in line for line in lines) == 1, (problem, lines)
    assert len(lines) == 12


@pytest.mark.parametrize(("options", "wanted"), [
    (["--muse-block", "16"], "--muse-block: no effect on exact attention; add --attention muse"),
    (["--attention", "muse", "--muse-block", "100"], "block=100"),
    (["--attention", "muse", "--muse-layers", "3-2"], "--muse-layers='3-2'"),
    (["--attention", "muse", "--muse-config", "nowhere.toml"], "nowhere.toml"),
    (["--attention", "muse", "--muse-preset", "best"], "preset='best'"),
])
def test_bad_options_are_named(options, wanted):
    with pytest.raises((ValueError, OSError), match=re.escape(wanted)):
        parse(*options)


def test_a_script_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        main([str(tmp_path / "pretrain_nothing.py")])


def test_megatron_core_without_its_training_package(tmp_path):
    pytest.importorskip("megatron.core", reason="needs pip install muse_dist[megatron]")
    if importlib.util.find_spec("megatron.training") is not None:
        pytest.skip("since 0.17 megatron-core brings megatron.training")
    (tmp_path / "alone.py").write_text("")
    found = launch(tmp_path, script="alone.py")
    assert found.returncode == 1 and "Megatron-LM checkout" in found.stderr


def parse(*arguments):
    return read_options(add_options(argparse.ArgumentParser(allow_abbrev=False)).parse_args(arguments))


def test_the_readme_shows_options_that_exist():
    command = re.search(r"-m muse_dist.megatron_patch \S+ (.*?) \.\.\.$", (ROOT / "README.md").read_text(), re.M | re.S)
    words = command[1].replace("\\\n", " ").split()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--attention-dropout", "--context-parallel-size"):
        parser.add_argument(name)
    for name in ("--calculate-per-token-loss", "--no-create-attention-mask-in-dataloader"):
        parser.add_argument(name, action="store_true")
    choice = read_options(add_options(parser).parse_args(words))
    assert choice == (MuseConfig.fast(), frozenset(range(2, 25)))


def test_every_field_is_an_option_with_its_help():
    helped = " ".join(add_options(argparse.ArgumentParser()).format_help().split())
    values = {"block": 1024, "halo": 2, "leaf": 32, "group": 32, "anchors": 8, "remote_anchors": 2, "remote_leaf": 16,
              "opened": 3, "sinks": 2, "trace": False, "causal": False, "exchange": "kv", "backend": "torch",
              "cuda_graphs": True, "tolerance": 0.01, "tiles": "tiles.json"}
    assert set(values) == {field.name for field in dataclasses.fields(MuseConfig)}
    arguments = ["--attention", "muse"]
    for field in dataclasses.fields(MuseConfig):
        name = field.name.replace("_", "-")
        assert " ".join(field.metadata["help"].split())[:30] in helped
        value = values[field.name]
        flags = {True: [f"--muse-{name}"], False: [f"--no-muse-{name}"]}
        arguments += flags[value] if isinstance(value, bool) else [f"--muse-{name}", str(value)]
    assert parse(*arguments).config == MuseConfig(**values)
    assert parse("--attention", "muse").config == MuseConfig()
    assert parse() is None


def test_presets_and_files_are_where_options_start_from(tmp_path):
    path = tmp_path / "muse.toml"
    path.write_text('[muse]\npreset = "fast"\nopened = 5\n')
    assert parse("--attention", "muse", "--muse-preset", "accurate", "--muse-opened", "7").config \
        == MuseConfig.accurate(opened=7)
    assert parse("--attention", "muse", "--muse-config", str(path), "--muse-halo", "3").config \
        == MuseConfig.fast(opened=5, halo=3)
    with pytest.raises(ValueError, match="give one of them"):
        parse("--attention", "muse", "--muse-config", str(path), "--muse-preset", "fast")


def test_layers_are_read_as_they_are_shown():
    assert parse_layers("2-4,8, 9") == {2, 3, 4, 8, 9}
    assert show_layers(parse_layers("8,2-4,9,12")) == "2-4,8-9,12"
    for text in ("", "0", "a", "2-", "-3", "4-2", "1,,2", "1.5", "²"):
        with pytest.raises(ValueError, match="--muse-layers"):
            parse_layers(text)


def counted_flops(config, shape, ranks):
    """`muse_flops`, pair by pair."""
    batch, heads, kv_heads, tokens, dim = shape
    layout = Layout("zigzag", ranks, tokens, config.block)
    total, chunk_anchors = 0, set()
    for i in range(layout.chunks * layout.chunk_blocks):
        far = [j for j in range(i + 1) if is_far(i, j, config)]
        for row in range(config.block):
            near = row + 1 + config.block * (i - len(far))
            opened = (min(config.opened, tokens // config.leaf) + config.sinks) * config.leaf if far else 0
            total += 4 * heads * dim * (near + opened)
        for j in far:
            local = config.exchange == "kv" or layout.block_owner(i) == layout.block_owner(j)
            leaf = config.leaf if local else config.remote_leaf
            total += 4 * heads * dim * config.block * config.block // leaf
            if local:
                total += 6 * kv_heads * dim * config.block * config.anchors
            else:
                chunk_anchors.add((i // layout.chunk_blocks, j))
    return batch * (total + len(chunk_anchors) * 6 * kv_heads * dim * config.block * config.remote_anchors)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("exchange", ["moments", "kv"])
def test_flops_are_those_counted_pair_by_pair(ranks, exchange):
    config = MuseConfig(block=16, leaf=4, group=8, anchors=2, remote_leaf=8, opened=3, exchange=exchange)
    shape = (2, 4, 2, 256, 8)
    assert muse_flops(config, shape, ranks) == counted_flops(config, shape, ranks)
    assert exact_flops(shape) == sum(2 * 4 * 4 * 8 * (row + 1) for row in range(256))
    assert muse_flops(dataclasses.replace(config, halo=15), shape, ranks) == exact_flops(shape)


def test_the_report_counts_steps_layers_and_ranks():
    args = argparse.Namespace(
        num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=65536, micro_batch_size=1, bf16=True,
        fp16=False, tensor_model_parallel_size=2, context_parallel_size=4, pipeline_model_parallel_size=2,
        global_batch_size=8, kv_channels=None, group_query_attention=True, num_query_groups=4)
    step = read_step(args, world_size=32)
    assert (step.data_ranks, step.dim, step.kv_heads, step.sequences) == (2, 64, 4, 8)
    choice = parse("--attention", "muse", "--muse-layers", "1-12")
    lines = report(choice, step)
    shape = (1, 16, 4, 65536, 64)
    assert f"{3.5 * 12 * 8 * exact_flops(shape):.3g} exact" in lines[1]
    assert f"{3.5 * 12 * 8 * muse_flops(choice.config, shape, 4):.3g} FLOPs" in lines[1]
    from muse_dist import traffic

    wanted = traffic(choice.config, (1, 8, 2, 65536, 64), 4)
    assert f"receives {12 * 4 / 2 * sum(wanted.moments.values()):.3g} bytes" in lines[2]
    assert f"{12 * 4 / 2 * sum(wanted.ring.values()):.3g} in a ring" in lines[2]
    args.num_layers = None
    assert read_step(args, 32) is None and "checkpoint" in report(choice, None)[1]


def recipe(*options):
    """The arguments that launch/megatron.sh gives a launcher."""
    command = [str(ROOT / "launch" / "megatron.sh"), *options]
    return subprocess.run(command, text=True, capture_output=True, check=False)


def test_the_recipe_hands_its_launcher_the_options_and_then_the_users():
    show = 'echo "$CUDA_DEVICE_MAX_CONNECTIONS" "$@"'
    found = recipe("sh", "-c", show, "--", "../Megatron-LM", "--seq-length", "131072")
    connections, *arguments = found.stdout.split()
    assert connections == "1"
    assert arguments[:2] == ["muse_dist.megatron_patch", "../Megatron-LM/pretrain_gpt.py"]  # sh takes the -m before
    assert arguments[-2:] == ["--seq-length", "131072"] and arguments.count("--seq-length") == 2
    ours = [x for x in arguments if x.startswith(("--muse", "--attention"))]
    assert ours and all(x in add_options(argparse.ArgumentParser()).format_help() or x == "--attention-dropout"
                        for x in ours)
    for wrong in ([], ["torchrun"], ["--", "../Megatron-LM"]):
        found = recipe(*wrong)
        assert found.returncode == 2 and "LAUNCHER... -- CHECKOUT" in found.stderr
