"""Triton's interpreter, or a reason to skip."""

import pytest
import torch

from quantlib.kernels.triton import launch


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton is installed, and was told to interpret before it was imported."""
    if reason := launch.why_not(torch.device("cpu")):
        pytest.skip(reason)
