"""The devices that a test runs on: one body for the CPU, where it runs in every suite, and for a GPU, where there is one."""

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def NEEDS_GPU(test):
    """Mark a test that only a GPU can run."""
    for mark in GPU:
        test = mark(test)
    return test


CPU_AND_GPU = pytest.mark.parametrize(
    "device",
    [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=GPU)],
    ids=lambda device: device.type,
)


def on_gpu(*values):
    """Parameters of a case that only a GPU has."""
    return pytest.param(*values, marks=GPU)


def settle(device: torch.device) -> None:
    """Wait for what a GPU was asked for, so that its errors belong to the test that made them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
