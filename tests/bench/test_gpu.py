"""The GPU's benchmark where there is none: a sentence; and what it would refuse to time."""

import torch

from quantlib.bench import gpu


def test_without_a_gpu_it_is_a_sentence(capsys):
    if torch.cuda.is_available():
        return
    assert gpu.main(["--quick"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_wrong_result_is_not_timed():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).half()

    def right(x):
        return torch.nn.functional.linear(x, weight)

    assert gpu._wrong(right, weight, 3) == ""
    assert "is off by" in gpu._wrong(lambda x: right(x).roll(1, 1), weight, 3)
    assert "is off by" in gpu._wrong(lambda x: right(x) * torch.nan, weight, 3)


def test_a_peer_that_raises_is_named_with_its_reason():
    missing: dict[str, str] = {}

    def broken(dense):
        raise ImportError("no module named vllm")

    rows = gpu._of_peer("marlin", broken, torch.zeros(4, 64), (1,), missing)
    assert rows == []
    assert missing == {"marlin, 4x64": "ImportError: no module named vllm"}
