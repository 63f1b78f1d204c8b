"""Shared by all tests."""
import torch


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes: threads of each would wait for the others' cores
        torch.set_num_threads(1)
