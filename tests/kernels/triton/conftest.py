"""Where the Triton kernels run: in the interpreter, or (`-m gpu`) on a GPU."""

import os

import pytest
import torch

from quantlib.kernels.triton import launch


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton is installed, and was told to interpret before it was imported."""
    if reason := launch.why_not(torch.device("cpu")):
        pytest.skip(reason)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The interpreter's, and a GPU's: one test for both."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("kernels are interpreted: run with TRITON_INTERPRET=0")
    found = torch.device(request.param)
    if reason := launch.why_not(found):
        pytest.skip(reason)
    return found
