"""What may come from outside and must not hurt: addresses, shapes, numbers, and many callers.

Memory errors and races that give the right answer all the same are `make sanitize`'s to find.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.kernels import layouts, tile_reference
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight

from .schemes import EVERY

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
any_parts = st.lists(st.tuples(st.sampled_from(EVERY), st.integers(1, 200)), min_size=1, max_size=3)
unusual = st.sampled_from(
    [torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e30, 1e-45, -1e-40, -0.0]
)


def moved(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` bytes after an address that 64 divides."""
    room = torch.zeros(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset
    # Through a buffer: torch's own views of bytes as numbers must be aligned, a mapped file is not.
    copy = torch.frombuffer(room.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
    room[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return copy.view(tensor.shape)


def same_numbers(found: Tensor, expected: Tensor) -> bool:
    """Equal, or both not a number."""
    return torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5)) and torch.equal(
        found.isnan(), expected.isnan()
    )


@SETTINGS
@given(parts=any_parts, rows=st.integers(1, 70), offset=st.integers(1, 63))
def test_tensors_of_a_checkpoint_may_lie_anywhere(library, draw, parts, rows, offset):
    """Safetensors promises no alignment of what it maps, and a vector is 64 bytes."""
    _, packed = draw(rows, parts)
    stored = list(packed.tensors.values())
    for isa in filter(library.supports, cpu.ISAS[1:]):
        tiles = library.pack([moved(t, offset) for t in stored], packed.layout, isa=isa)
        for tensor, again in zip(stored, library.unpack(tiles, packed.layout, isa=isa)):
            assert torch.equal(tensor, again), isa
        expected = layouts.tile(packed)
        found = library.describe(tiles, packed.layout)
        assert torch.equal(
            library.dequantize(found, isa=isa), library.dequantize(expected.description)
        )


@SETTINGS
@given(
    parts=any_parts,
    rows=st.integers(1, 70),
    tokens=st.integers(1, 20),
    threads=st.integers(1, 3),
    line=st.integers(1, 15),
    mode=st.sampled_from(["exact", "int8"]),
)
def test_activations_need_the_alignment_of_a_float_and_no_more(
    library, draw, parts, rows, tokens, threads, line, mode
):
    _, packed = draw(rows, parts)
    tiled = layouts.tile(packed)
    x = torch.randn(tokens, tiled.shape[1], generator=torch.Generator().manual_seed(tokens))
    bias = torch.linspace(-1, 1, rows)
    for isa in filter(library.supports, cpu.ISAS[1:]):
        expected = library.linear(tiled.description, x, bias, mode, isa=isa, threads=1)
        found = library.linear(
            tiled.description, moved(x, 4 * line), moved(bias, 4 * line), mode, isa, threads
        )
        assert same_numbers(found, expected), isa


@SETTINGS
@given(
    parts=any_parts,
    rows=st.integers(1, 40),
    tokens=st.integers(1, 16),
    places=st.lists(st.tuples(st.integers(0, 10**6), unusual), min_size=1, max_size=6),
    mode=st.sampled_from(["exact", "int8"]),
)
def test_unusual_numbers_are_treated_as_the_reference_treats_them(
    library, draw, parts, rows, tokens, places, mode
):
    """Every output is the reference's, infinities and NaNs in the same places."""
    weight, packed = draw(rows, parts)
    tiled = layouts.tile(packed)
    x = torch.randn(tokens, tiled.shape[1], generator=torch.Generator().manual_seed(rows))
    for place, number in places:
        x.view(-1)[place % x.numel()] = number
    expected = tile_reference.linear(x, weight, None, mode)
    for isa in filter(library.supports, cpu.ISAS[1:]):
        found = library.linear(tiled.description, x, None, mode, isa=isa, threads=2)
        assert same_numbers(found, expected), isa


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_a_bad_token_harms_no_other(library, draw, isa, mode):
    """Tokens share registers and panels; 13 is more than one and no multiple of any."""
    _, packed = draw(70, [("w4g64", 200), ("w8", 31), ("mxfp4", 64)])
    tiled = layouts.tile(packed)
    x = torch.randn(13, 295, generator=torch.Generator().manual_seed(1))
    clean = library.linear(tiled.description, x, None, mode, isa=isa)
    for bad, number in ((0, torch.nan), (6, torch.inf), (12, -3.4e38)):
        spoiled = x.clone()
        spoiled[bad, ::7] = number
        found = library.linear(tiled.description, spoiled, None, mode, isa=isa)
        others = [token for token in range(13) if token != bad]
        assert torch.equal(found[others], clean[others])
        assert not torch.equal(found[bad], clean[bad])


def test_weights_are_made_used_and_dropped_on_many_threads_at_once(library, draw):
    """As when several texts start at once on a model that was just loaded."""
    packed = [draw(96, [("w3g32z", 160), ("w8", 32 * i)], seed=i)[1] for i in range(1, 4)]

    def work(index: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        source: PackedWeight = packed[index % 3]
        tiled = layouts.tile(source, threads=1 + index % 3)
        x = torch.full((2, tiled.shape[1]), 0.5)
        y = library.linear(tiled.description, x, None, "int8", threads=1 + index % 2)
        rows = library.dequantize(tiled.description, range(5, 60))
        return y, rows, list(tiled.to_packed().tensors.values())

    expected = [work(index) for index in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for index, (y, rows, tensors) in enumerate(pool.map(work, range(120))):
            wanted = expected[index % 3]
            assert torch.equal(y, wanted[0])
            assert torch.equal(rows, wanted[1])
            assert all(map(torch.equal, tensors, wanted[2]))
