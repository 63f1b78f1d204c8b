"""The GPU kernels on ranks that share a sequence, through Triton's interpreter: equal to plain PyTorch on one."""
import dataclasses

import torch

from tests.brute import error
from tests.ranks import run_ranks
from tests.sharded import Case, joined, small


def steps(cases):
    return [case.step() for case in cases]


def test_equals_the_plain_kernels():
    """Both exchanges and layouts, causal and not; several anchors a chunk, so that blocks share anchors."""
    cases = []
    for exchange, causal, layout in (("moments", True, "zigzag"), ("moments", False, "contiguous"),
                                     ("kv", True, "zigzag")):
        config = small(block=16, leaf=8, group=8, remote_leaf=8, remote_anchors=2, halo=0, exchange=exchange,
                       causal=causal, backend="triton")
        cases.append(Case(config, 64, layout, 1, 1, dim=8, dtype=torch.float32, seed=len(cases)))
    found = run_ranks(2, steps, cases, limit=600)
    for i, case in enumerate(cases):
        plain = dataclasses.replace(case, config=dataclasses.replace(case.config, backend="torch"))
        want = plain.reference(2)
        for a, b in zip(joined([x[i] for x in found], case.layout), want, strict=True):
            assert error(a, b) <= 1e-4, case
