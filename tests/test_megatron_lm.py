"""`--attention muse` with a real checkout of Megatron-LM: `make test-megatron MEGATRON_LM=path`.

The checkout needs what its own README says, without CUDA, Transformer Engine and apex: six, pybind11, make and g++.
"""
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.test_megatron_launcher import recipe

ROOT = Path(__file__).parents[1]
CHECKOUT = os.environ.get("MEGATRON_LM")

pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="make test-megatron MEGATRON_LM=path")

MODEL = ("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
         "--seq-length 256 --max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm "
         "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --use-cpu-initialization")
TRAINING = ("--micro-batch-size 1 --global-batch-size 4 --train-iters 3 --lr 1e-1 --lr-decay-iters 10 --log-interval 1 "
            "--eval-iters 1 --eval-interval 100 --ckpt-format torch_dist --mock-data "
            "--tokenizer-type NullTokenizer --vocab-size 8191 --num-workers 0 "
            "--attention-dropout 0 --hidden-dropout 0 --calculate-per-token-loss "
            "--no-create-attention-mask-in-dataloader --distributed-backend gloo")
PLAIN = ("--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion "
         "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion")
MUSE = ("--attention muse --muse-block 16 --muse-leaf 4 --muse-group 8 --muse-anchors 2 --muse-remote-leaf 4 "
        "--muse-opened 2 --muse-exchange kv")
NEAR = f"{MUSE} --muse-halo 15"  # 16 blocks: everything is near


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder of what Megatron-LM calls to learn about CUDA and Python: the Python here, and a CUDA that is not."""
    folder = tmp_path_factory.mktemp("tools") / "bin"
    folder.mkdir()
    for name, answer in (("nvcc", "Cuda compilation tools, release 12.4, V12.4.1"),
                         ("python3-config", sysconfig.get_config_var("EXT_SUFFIX"))):
        (folder / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (folder / name).chmod(0o755)
    return folder.parent


def pretrain(tools, ranks, *options):
    """Losses of the steps that `pretrain_gpt.py` prints, by their numbers, and all it says."""
    command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), str(ROOT / "tests" / "megatron_lm.py"),
               f"{CHECKOUT}/pretrain_gpt.py", str(tools), *" ".join((MODEL, TRAINING, PLAIN, *options)).split()]
    folders = [str(tools / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": ":".join(folders), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1",
                   "TORCHDYNAMO_DISABLE": "1"}
    found = subprocess.run(command, text=True, capture_output=True, check=False, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    steps = re.findall(r"iteration +(\d+)/ .*lm loss: ([\d.E+-]+)", found.stdout)
    return {int(step): float(loss) for step, loss in steps}, found.stdout


@pytest.fixture(scope="module")
def start(tools, tmp_path_factory):
    """A checkpoint after one step of exact attention: without a GPU, more ranks would draw other weights."""
    folder = tmp_path_factory.mktemp("start")
    _, said = pretrain(tools, 1, f"--save {folder} --save-interval 1 --exit-interval 1")
    assert "muse:" not in said
    return f"--load {folder}"


@pytest.fixture(scope="module")
def alone(tools, start):
    """Losses of MuSe on one rank."""
    losses, said = pretrain(tools, 1, MUSE, start)
    assert said.count("muse: layers 1-2 use MuseConfig(") == 1, "Megatron-LM parses its options more than once"
    assert sorted(losses) == [2, 3] and losses[3] < losses[2]
    return losses


def test_context_parallel_training_and_a_checkpoint_that_goes_on_with_one_rank(tools, start, alone, tmp_path):
    """Without Transformer Engine and apex, resuming alone changes Megatron's next loss: so both runs are resumed."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        losses, _ = pretrain(tools, ranks, MUSE, start, f"--context-parallel-size {ranks} --save {folder}",
                             "--save-interval 2 --exit-interval 2")
        assert losses == pytest.approx({2: alone[2]}, rel=1e-6)
        found[ranks], _ = pretrain(tools, 1, MUSE, f"--load {folder}")
    assert sorted(found[1]) == [3]
    assert found[2] == pytest.approx(found[1], rel=1e-6)


def test_a_near_field_that_covers_everything_is_exact_attention(tools, start, alone):
    exact, _ = pretrain(tools, 1, start)
    near, _ = pretrain(tools, 2, NEAR, start, "--context-parallel-size 2")
    assert near == pytest.approx(exact, rel=1e-6)
    assert max(abs(near[step] / alone[step] - 1) for step in near) > 1e-5


CHECK = """
import sys
sys.path.insert(0, {checkout!r})
sys.argv = ["pretrain_gpt.py", *sys.argv[1:]]
from muse_dist.megatron_patch.__main__ import add_to_megatron
add_to_megatron()
from megatron.training.arguments import parse_args
args = parse_args()
from megatron.core.transformer.attention import SelfAttention
print("parsed", args.num_layers, SelfAttention.__init__.__module__)
"""


def test_the_parser_of_a_real_checkout(tmp_path):
    (tmp_path / "check.py").write_text(CHECK.format(checkout=CHECKOUT))
    usual = "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 65536 --micro-batch-size 1 " \
        "--context-parallel-size 4 --max-position-embeddings 65536 --bf16"
    command = [sys.executable, "-W", "ignore", str(tmp_path / "check.py"), *usual.split(), "--attention", "muse"]
    bad = subprocess.run([*command, "--sft", "--attention-backend", "local"], text=True, capture_output=True,
                         check=False)
    assert bad.returncode == 1
    for problem in ("attention_dropout=0.1", "sft=True", "attention_backend=local", "create_attention_mask"):
        assert f"  - {problem}" in bad.stderr
    good = subprocess.run([*command, "--attention-dropout", "0", "--no-create-attention-mask-in-dataloader"], text=True,
                          capture_output=True, check=False)
    assert good.returncode == 0, good.stderr
    assert "muse: layers 1-24 use MuseConfig(" in good.stdout and "parsed 24" in good.stdout
    _, _, _, *options = recipe("echo", "--", CHECKOUT, "--mock-data", "--tokenizer-type", "NullTokenizer",
                               "--vocab-size", "50257").stdout.split()
    ours = subprocess.run([*command[:4], *options], text=True, capture_output=True, check=False)
    assert ours.returncode == 0, ours.stderr
    assert "exchange='moments'" in ours.stdout and "each of 8 context-parallel ranks receives" in ours.stdout
    exact = subprocess.run(command[:-2], text=True, capture_output=True, check=False)
    assert exact.returncode == 0 and "muse:" not in exact.stdout
