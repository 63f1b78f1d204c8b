"""Shared by all tests."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, by whichever test that is


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes: threads of each would wait for the others' cores
        torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory():
    """What torch.empty returns is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
