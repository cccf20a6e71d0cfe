"""Modules compute from tiles on the CPU, hold nothing else then, and give packed tensors back."""

import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from torch import Tensor, nn

from quantlib.formats import QuantizedWeight, Scheme, dequantize, pack, quantize_rtn
from quantlib.kernels import ops
from quantlib.kernels.layouts import TiledWeight
from quantlib.runtime import packed_module
from quantlib.runtime.modules import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, TiedHead
from quantlib.runtime.packed_module import PackedModule
from quantlib.runtime.row_blocks import join_row_blocks, row_block

pytestmark = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled kernels here")

SCHEMES = ["w4g64", "w3g16z", "w4g32z4s4", "nvfp4", "w5tz"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(scheme: str, rows: int = 40, columns: int = 72) -> QuantizedWeight:
    return quantize_rtn(random(rows, columns), Scheme.parse(scheme).segments(columns))


def linear_of(weight: QuantizedWeight) -> QuantizedLinear:
    segments = tuple(part.segment for part in weight.segments)
    module = QuantizedLinear(weight.shape[1], weight.shape[0], segments, device="meta")
    module.exchange_packed("weight", segments, pack(weight))
    return module


def tiled_linear(scheme: str) -> tuple[QuantizedLinear, dict[str, Tensor], Tensor, Tensor]:
    """A module after its first call; its packed tensors by buffer name; an input and its output."""
    weight = quantized(scheme)
    module, x = linear_of(weight), random(3, 72, seed=1)
    y = module(x)
    assert is_tiled(module)
    return module, {f"weight{suffix}": tensor for suffix, tensor in pack(weight).items()}, x, y


def is_tiled(module: PackedModule) -> bool:
    """Whether tiles are all that the module holds."""
    return isinstance(module.handles("weight")[0], TiledWeight) and not list(module.buffers())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_has_the_packed_tensors_and_changes_nothing(scheme: str) -> None:
    module, tensors, x, y = tiled_linear(scheme)
    assert_same(dict(module.state_dict()), tensors)
    assert_same({f"weight{s}": t for s, t in module.packed_tensors("weight").items()}, tensors)
    assert is_tiled(module)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_buffers_asked_for_by_name_come_back(scheme: str) -> None:
    module, tensors, x, y = tiled_linear(scheme)
    assert_same({name: getattr(module, name) for name in tensors}, tensors)
    assert_same(dict(module.named_buffers()), tensors)
    assert torch.equal(module(x), y)
    assert is_tiled(module)
    assert torch.equal(module.get_buffer("weight_packed"), tensors["weight_packed"])


def test_a_buffer_that_is_set_is_the_one_computed_with() -> None:
    module, tensors, x, y = tiled_linear("w4g64")
    module.weight_scale = 2 * tensors["weight_scale"]
    assert torch.equal(module(x), 2 * y)


def test_a_state_dict_can_be_loaded_into_a_tiled_module() -> None:
    module, tensors, x, y = tiled_linear("w3g16z")
    other = linear_of(quantize_rtn(random(40, 72, seed=5), Scheme.parse("w3g16z").segments(72)))
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    model = nn.Sequential(other)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in tensors.items()}, assign=True)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda module: torch.load(saved(module), weights_only=False),
    ],
)
def test_copies_and_pickles_carry_packed_tensors(
    duplicate: Callable[[nn.Module], QuantizedLinear],
) -> None:
    module, tensors, x, y = tiled_linear("w4g32z4s4")
    copied = duplicate(module)
    assert_same(dict(copied.named_buffers()), tensors)
    assert is_tiled(module)
    copied.weight_row_scale.zero_()
    assert not copied(x).any()
    assert torch.equal(module(x), y)


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_a_cast_keeps_the_tiles_and_a_move_gives_them_up() -> None:
    module, tensors, x, y = tiled_linear("w3g16z")
    before = module.handles("weight")[0]
    assert module.to(torch.bfloat16).handles("weight")[0] is before
    assert torch.equal(module(x), y)
    module.to("meta")
    assert {name: buffer.device.type for name, buffer in module.named_buffers()} == dict.fromkeys(
        tensors, "meta"
    )
    assert module.packed_device("weight").type == "meta"


def test_a_weight_can_be_exchanged_for_one_of_another_format() -> None:
    module, _, x, _ = tiled_linear("w4g64")
    other = quantized("w8")
    module.exchange_packed("weight", Scheme.parse("w8").segments(72), pack(other))
    torch.testing.assert_close(module(x), x @ dequantize(other).T, rtol=1e-5, atol=1e-5)


def test_a_tied_head_shares_the_tiles_of_its_embedding() -> None:
    weight = quantized("w4g64")
    segments = tuple(part.segment for part in weight.segments)
    embedding = QuantizedEmbedding(40, 72, segments, device="meta")
    embedding.exchange_packed("weight", segments, pack(weight))
    head = TiedHead(embedding)
    assert torch.equal(embedding(torch.tensor([7])), dequantize(weight)[[7]])
    handle = embedding.handles("weight")[0]
    head(random(1, 72))
    assert embedding.handles("weight")[0] is handle


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [5, 32])
def test_experts_are_tiled_one_by_one_and_come_back_as_a_stack(scheme: str, rows: int) -> None:
    weight = quantized(scheme, 3 * rows, 64)
    segments = tuple(part.segment for part in weight.segments)
    module = QuantizedExperts(
        {"down_proj": (3, rows, 64)}, {"down_proj": segments}, {}, lambda x: x, device="meta"
    )
    module.exchange_packed("down_proj", segments, pack(weight))
    handles = module.handles("down_proj")
    assert [handle.shape for handle in handles] == [(rows, 64)] * 3
    assert not list(module.buffers())
    assert_same(module.packed_tensors("down_proj"), pack(weight))
    blocks = [row_block(pack(weight), segments, i * rows, rows) for i in range(3)]
    assert_same(join_row_blocks(blocks, segments, rows), pack(weight))


def test_the_first_calls_of_several_threads_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    tile, together = packed_module.tile, threading.Barrier(4)
    monkeypatch.setattr(packed_module, "tile", lambda weight: made.append(1) or tile(weight))
    weight, x = quantized("w4g64", 600, 512), random(3, 512)
    module = linear_of(weight)

    def call(_: int) -> Tensor:
        together.wait()
        return module(x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(4)))
    assert made == [1]
    assert all(torch.equal(y, found[0]) for y in found)


def test_a_compiled_module_computes_from_its_tiles_or_its_buffers() -> None:
    for calls_before in (0, 1):
        module, x = linear_of(quantized("w4g64")), random(3, 72, seed=1)
        expected = copy.deepcopy(module)(x)
        for _ in range(calls_before):
            module(x)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)


def test_resident_memory_is_that_of_one_form() -> None:
    process = psutil.Process()
    columns, size = 4096, 64 << 20
    rows = 2 * size // columns  # 4-bit codes
    before = process.memory_info().rss
    segments = Scheme.parse("w4g128").segments(columns)
    module = QuantizedLinear(columns, rows, segments)
    for buffer in module.buffers():
        buffer.view(torch.uint8).fill_(0x11)
    x = random(1, columns)
    y = module(x)
    held = process.memory_info().rss - before
    del buffer
    # Tiles, what pads them, and what torch and the allocator keep in a process that has done other
    # things before; with both forms it would be twice the packed bytes at least.
    assert held <= 1.6 * module.packed_bytes()
    state = module.state_dict()
    assert state["weight_packed"].nbytes == size
    del module, state
    assert process.memory_info().rss - before <= 0.6 * size
    assert torch.isfinite(y).all()
