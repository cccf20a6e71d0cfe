"""What a launch is made of: memory, pieces, and a weight that becomes numbers for many tokens."""

import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.kernels import workspace
from quantlib.kernels.triton import launch, layout
from quantlib.kernels.triton.configurations import Configuration

from .bounds import moved

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
PARTS = [("w4g64z6", 192), ("nvfp4", 64)]


def sample(draw, device, tokens, dtype, rows=70):
    weight, _ = draw(rows, PARTS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 256, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    return layout.pack(moved(weight, device)), x.to(device), bias.to(device)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("biased", [True, False])
def test_many_tokens_multiply_the_weights_numbers(draw, device, dtype, biased):
    weight, x, bias = sample(draw, device, 9, dtype)
    numbers = launch.dequantize(weight, dtype)
    found = launch.dense_linear(x, weight, bias if biased else None)
    assert found.dtype == dtype
    wanted = x.double() @ numbers.double().t() + (bias.double() if biased else 0)
    mass = x.double().abs() @ numbers.double().abs().t() + bias.double().abs()
    # 256 sums and a bias in float32 (a GPU's tensor cores may cut), and one rounding.
    bound = 257 * 2.0**-23 * mass + torch.finfo(dtype).eps * wanted.abs()
    assert ((found.double() - wanted).abs() <= bound).all()


def test_each_row_becomes_numbers_once_in_pieces_that_fit(draw, device, monkeypatch):
    weight, x, bias = sample(draw, device, 9, F32)
    whole = launch.dense_linear(x, weight, bias)
    pieces = []
    original = launch._dequantize

    def noted(weight, out, ids, first=0):
        pieces.append((first, len(out)))
        original(weight, out, ids, first)

    monkeypatch.setattr(launch, "_dequantize", noted)
    monkeypatch.setattr(workspace, "BYTES", 4 * 256 * 32)  # 32 rows
    found = launch.dense_linear(x, weight, bias)
    assert pieces == [(0, 32), (32, 32), (64, 6)]
    # The same numbers; torch may add the columns of a narrower matrix in another order.
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(workspace, "BYTES", 4 * 255)
    with pytest.raises(FormatError, match="256 columns is beyond what one launch can hold"):
        launch.dense_linear(x, weight, bias)


class Calls(TorchDispatchMode):
    """Notes the operators of torch that make or fill tensors; views are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Nothing:
    """A kernel that does nothing: the interpreter's own copies are not a GPU's."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("splits", [1, 2])
def test_a_launch_asks_for_no_memory_but_its_results(draw, interpreter, monkeypatch, splits):
    """So a captured graph replays it: partial sums and numbers are in the stream's workspace."""
    from quantlib.kernels.triton import gemm, rows

    weight, x, bias = sample(draw, torch.device("cpu"), 5, F16)
    codes, scales = torch.zeros(5, 256, dtype=torch.int8), torch.ones(5, 1)
    rounding = (ActivationSegment(0, 256, ActivationFormat(8)),)
    given = Configuration(16, 16, 4, 2, splits)
    calls = {
        "numbers": lambda: launch.linear(x, weight, bias, given),
        "integers": lambda: launch.integer_linear(
            codes, scales, weight, rounding, bias, F16, given
        ),
        "dense": lambda: launch.dense_linear(x, weight, bias),
    }
    for kernel in ((gemm, "multiply"), (gemm, "add_parts"), (rows, "dequantize_rows")):
        monkeypatch.setattr(*kernel, Nothing())
    for name, call in calls.items():
        call()  # plans, tables, the stream's workspace
        with Calls() as noted:
            call()
        product = ["aten.addmm.out"] if name == "dense" else []
        assert noted.names == ["aten.new_empty.default", *product], name


def test_a_stream_has_one_workspace_and_shares_it_with_no_other():
    device = torch.device("cpu")  # threads are its streams
    own, flags = workspace.partial_sums(device), workspace.flags(device)
    assert workspace.partial_sums(device).data_ptr() == own.data_ptr()
    assert own.nbytes == workspace.BYTES
    assert not flags.any()
    others: list[int] = []

    def other() -> None:
        others.extend(
            (workspace.partial_sums(device).data_ptr(), workspace.flags(device).data_ptr())
        )

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert not {own.data_ptr(), flags.data_ptr()} & set(others)


@pytest.mark.parametrize(
    ("capability", "usable"), [((7, 5), False), ((8, 0), True), ((12, 0), True)]
)
def test_a_gpu_that_triton_does_not_know_is_a_sentence(
    interpreter, monkeypatch, capability, usable
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    reason = launch.why_not(torch.device("cuda"))
    assert (reason == "") == usable
    if not usable:
        assert reason == "Triton's kernels need compute capability 8.0, and Tesla T4 has 7.5"
