"""Ranks that share sequences under DeepSpeed compute what one process of plain PyTorch does."""
from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("deepspeed")

from tests.deepspeed_runs import CASES, CASES_OF_FOUR, Case, alone, run_cases
from tests.ranks import run_ranks

TWO = [name for name in CASES if name not in CASES_OF_FOUR]


@functools.cache
def one(model, accumulation, clip, data_size=1):
    """The run in one process; how ranks share it changes nothing."""
    return alone(Case(0, model=model, accumulation=accumulation, clip=clip), data_size)


@pytest.fixture(scope="module")
def two():
    """What both ranks found, by name of the case: one set of processes for all cases."""
    return run_ranks(2, run_cases, TWO, limit=200)


@pytest.fixture(scope="module")
def four():
    return run_ranks(4, run_cases, list(CASES_OF_FOUR), limit=200)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_one_process(two, name):
    case = CASES[name]
    check([rank[name] for rank in two], one(case.model, case.accumulation, case.clip))


@pytest.mark.parametrize("name", CASES_OF_FOUR)
def test_four_ranks_train_as_one_process(four, name):
    case = CASES[name]
    check([rank[name] for rank in four], one(case.model, case.accumulation, case.clip, 4 // case.context))


def check(found, wanted):
    """Every rank's losses, gradient norms and change of every parameter are those of one process, to rounding."""
    for rank in found:
        assert rank["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert rank["norm"] == pytest.approx(wanted["norm"], rel=1e-4)
        assert rank["change"].keys() == wanted["change"].keys()
        for name, change in wanted["change"].items():
            assert torch.dist(rank["change"][name], change) < 1e-4 * change.norm(), name
            assert change.norm() > 0, name
