"""A GPT trained with Megatron-core's own data parallelism, optimizer and schedules, split in every way it offers."""
import dataclasses

import pytest
import torch
from filelock import FileLock

from muse_dist import MuseConfig
from tests.megatron_checkpoints import can_restore_distributed
from tests.megatron_cpu import Case, train_cases
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="needs pip install muse_dist[megatron]")

KV = MuseConfig(block=16, leaf=4, group=8, anchors=2, remote_leaf=4, opened=2, exchange="kv")
MOMENTS = dataclasses.replace(KV, exchange="moments")
NEAR = dataclasses.replace(KV, halo=15)  # 16 blocks: everything is near
SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FOUR = {"num_layers": 4}
DISTRIBUTED = {"distributed_optimizer": True, "dtype": torch.float32}  # the widest that it knows
EXPERTS = {"num_moe_experts": 2, "moe_router_topk": 2}


def cases(folder):
    """All of them run on the same four ranks; those that no parallelism splits read different sequences."""
    return {
        "one": Case(KV), "exact": Case(None), "scaled": Case(NEAR, model={"apply_query_key_layer_scaling": True}),
        "cp2": Case(KV, cp=2, save=f"{folder}/checkpoint"), "resumed": Case(KV, load=f"{folder}/checkpoint"),
        "near cp2": Case(NEAR, cp=2),
        "masked": Case(KV, masked=True), "masked cp2": Case(KV, cp=2, masked=True),
        "masked cp4": Case(KV, cp=4, masked=True),
        "tp2 cp2 selective": Case(KV, tp=2, cp=2, model=SELECTIVE),
        "tp2 cp2 sequence parallel": Case(KV, tp=2, cp=2, model={"sequence_parallel": True}),
        "pp2 cp2 full": Case(KV, pp=2, cp=2, model=FULL),
        "moments": Case(MOMENTS, cp=2), "moments full": Case(MOMENTS, cp=2, model=FULL),
        "four layers": Case(KV, model=FOUR), "four layers pp2 vp2": Case(KV, pp=2, vp=2, model=FOUR),
        "experts": Case(KV, model=EXPERTS), "experts cp2": Case(KV, cp=2, model=EXPERTS),
        "exact experts": Case(None, model=EXPERTS), "near experts cp2": Case(NEAR, cp=2, model=EXPERTS),
        "bf16": Case(MOMENTS, cp=2, dtype=torch.bfloat16),
        "distributed": Case(KV, cp=2, **DISTRIBUTED),
    } | ({} if not can_restore_distributed() else {
        "distributed": Case(KV, cp=2, save=f"{folder}/distributed", **DISTRIBUTED),
        "distributed resumed": Case(KV, load=f"{folder}/distributed", **DISTRIBUTED),
    })


@pytest.fixture(scope="module")
def trained(tmp_path_factory, worker_id):
    """What every rank found in every case. With several test processes one trains, and the others read its results."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id == "master":
        return run_ranks(4, train_cases, cases(folder), limit=400)
    path = folder.parent / "megatron.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            torch.save(run_ranks(4, train_cases, cases(folder), limit=400), path)
    return torch.load(path, weights_only=False)


def assert_same(trained, name, reference, steps=slice(None)):
    """Loss, gradient norm and parameters of a case are those of another, on every rank.

    Megatron sums gradient norms in fp32 whatever the parameters are, and tensor parallelism splits the sum.
    """
    wanted = trained[0][reference]
    for found in (rank[name] for rank in trained):
        losses, norms = zip(*found.history)
        wanted_losses, wanted_norms = zip(*wanted.history[steps])
        assert norms == pytest.approx(wanted_norms, rel=2e-7)
        if None not in losses:
            assert losses == pytest.approx(wanted_losses, rel=1e-9)
        assert found.parameters.keys() <= wanted.parameters.keys()
        for key, (value, dim) in found.parameters.items():
            expected = wanted.parameters[key][0]
            if dim is not None:
                size = value.shape[dim]
                expected = expected.narrow(dim, found.tp_rank * size % expected.shape[dim], size)
            assert (value - expected).norm() <= 1e-8 * expected.norm(), (name, key)
    together = {key for rank in trained for key in rank[name].parameters}
    assert together == set(wanted.parameters)
    assert any(None not in next(zip(*rank[name].history)) for rank in trained)


def far_apart(one, other):
    """Largest relative difference of the losses."""
    return max(abs(a - b) / b for (a, _), (b, _) in zip(one.history, other.history))


@pytest.mark.parametrize("name", ["cp2", "tp2 cp2 selective", "tp2 cp2 sequence parallel", "pp2 cp2 full"])
def test_split_models_learn_what_one_rank_does(trained, name):
    assert_same(trained, name, "one")


@pytest.mark.parametrize("name", ["masked cp2", "masked cp4"])
def test_ranks_and_micro_batches_with_unequal_numbers_of_tokens_that_count(trained, name):
    assert_same(trained, name, "masked")
    assert far_apart(trained[0]["masked"], trained[0]["one"]) > 1e-3


def test_virtual_pipeline_stages(trained):
    assert_same(trained, "four layers pp2 vp2", "four layers")


def test_experts(trained):
    assert_same(trained, "experts cp2", "experts")
    assert_same(trained, "near experts cp2", "exact experts")
    assert far_apart(trained[0]["experts"], trained[0]["exact experts"]) > 1e-4


@pytest.mark.parametrize("name", ["near cp2", "scaled"])
def test_a_near_field_that_covers_everything_is_megatrons_exact_attention(trained, name):
    assert_same(trained, name, "exact")


def test_the_far_field_makes_a_difference_and_so_does_what_ranks_exchange(trained):
    found = trained[0]
    assert far_apart(found["one"], found["exact"]) > 1e-3
    assert far_apart(found["moments"], found["one"]) > 1e-3
    assert far_apart(found["moments"], found["exact"]) < 0.02, "an approximation of it all the same"


def test_a_checkpoint_of_two_context_parallel_ranks_goes_on_with_one(trained):
    assert_same(trained, "resumed", "cp2", slice(2, 3))


def test_exchanges_that_run_again_in_the_backward(trained):
    assert_same(trained, "moments full", "moments")


def test_the_distributed_optimizer(trained):
    """In fp32, the widest it knows: Adam makes much of the rounding of small gradients."""
    wanted = trained[0]["one"]
    for found in (rank["distributed"] for rank in trained):
        for step, expected in zip(found.history, wanted.history):
            assert step == pytest.approx(expected, rel=1e-3)
        for key, (value, _) in found.parameters.items():
            expected = wanted.parameters[key][0]
            assert (value - expected).norm() <= 1e-2 * expected.norm(), key


def test_a_checkpoint_of_the_distributed_optimizer_goes_on_with_one_context_parallel_rank(trained):
    if "distributed resumed" not in trained[0]:
        pytest.skip("this megatron-core cannot restore it on CPU")
    wanted = trained[0]["distributed"]
    for found in (rank["distributed resumed"] for rank in trained):
        (last,) = found.history
        assert last == pytest.approx(wanted.history[2], rel=1e-6)
        for key, (value, _) in found.parameters.items():
            expected = wanted.parameters[key][0]
            assert (value - expected).norm() <= 1e-6 * expected.norm(), key


def test_bf16(trained):
    found = trained[0]["bf16"]
    assert far_apart(found, trained[0]["moments"]) < 0.02
    assert {value.dtype for value, _ in found.parameters.values()} == {torch.bfloat16}
