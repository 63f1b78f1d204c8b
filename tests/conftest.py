"""Shared by all tests."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, by whichever test that is


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes: threads of each would wait for the others' cores
        torch.set_num_threads(1)
