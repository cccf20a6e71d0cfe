"""Tiling moves every number to the place that `layouts.places` says, and back without a trace."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import FormatError, UsageError
from quantlib.formats import decode_scales
from quantlib.formats.elements import decode_float
from quantlib.kernels import layouts
from quantlib.kernels.cpu import library as cpu

from .schemes import EVERY, MIXED

SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
any_scheme = st.sampled_from(EVERY)


def bits_at(memory: bytes, place: tuple[int, int], bits: int) -> int:
    """`bits` bits of a tile's memory from a place on."""
    offset, shift = place
    pair = memory[offset] | memory[offset + 1] << 8
    return pair >> shift & ((1 << bits) - 1)


def check_places(part, places: layouts.Places, tiles: Tensor) -> None:
    """Codes, scales, zero points and factors of some rows and columns are where they should be."""
    form, (rows, length) = part.segment.format, part.codes.shape
    memory, codes = tiles.numpy().tobytes(), part.codes.tolist()
    zeros = None if part.zero is None else part.zero.tolist()
    columns = {0, 3, 4, 15, 16, 31, 33, 64, 127, 128, 130, length // 2, length - 1}
    stored, factors, own, groups = [], [], [], []
    for n, k in product(range(rows), sorted(column for column in columns if column < length)):
        assert bits_at(memory, places.code(n, k), form.bits) == codes[n][k], (n, k)
        group = k // form.group_size if form.group_size > 0 else 0
        row = n if len(part.scale) > 1 else 0
        if zeros is not None:
            assert bits_at(memory, places.zero(n, k), form.zero_bits) == zeros[row][group], (n, k)
        offset, factor = places.scale(n, k), places.factor(n)
        stored.append(list(memory[offset : offset + places.scale_bytes]))
        factors.append(list(memory[factor : factor + 4]))
        own.append(row)
        groups.append(group)
    numbers = stored_scales(torch.tensor(stored, dtype=torch.uint8), form)
    found = numbers * torch.tensor(factors, dtype=torch.uint8).view(torch.float32)[:, 0]
    expected = decode_scales(part.scale, part.row_scale, form)[own, groups]
    # A two-level scale is the same number by another rounding.
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)


def stored_scales(stored: Tensor, form) -> Tensor:
    """Numbers of scales as tiles hold them, uint8 [count, bytes of a scale]."""
    if form.scale == "f16":
        return stored.view(torch.float16)[:, 0].float()
    if form.scale == "e4m3":
        return decode_float(stored, "e4m3")[:, 0]
    if form.scale == "e8m0":
        return 2.0 ** (stored[:, 0].float() - 127)
    return (stored[:, 0] & ((1 << form.scale_bits) - 1)).float()


@pytest.mark.parametrize("scheme", EVERY)
def test_every_number_is_where_the_layout_says(library, draw, scheme):
    for rows, length in ((37, 100), (16, 300)):
        weight, packed = draw(rows, [(scheme, length), ("w5g16z", 40)], seed=length)
        tiled = layouts.tile(packed)
        assert tiled.nbytes == layouts.tiled_bytes(weight.shape, packed.segments)
        for part, places in zip(weight.segments, layouts.places(weight.shape, packed.segments)):
            check_places(part, places, tiled.memory)


@pytest.mark.parametrize("scheme", EVERY)
def test_the_packed_tensors_come_back_bit_for_bit(library, draw, isa, scheme):
    for rows, length in product((1, 16, 33, 70), (1, 31, 300)):
        _, packed = draw(rows, [(scheme, length), ("w4g64", 96)], seed=rows)
        check_inverse(library, packed, isa)


@SETTINGS
@given(
    parts=st.lists(st.tuples(any_scheme, st.integers(1, 700)), min_size=1, max_size=4),
    rows=st.integers(1, 130),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_mixture_of_segments_comes_back(library, draw, parts, rows, threads, seed):
    _, packed = draw(rows, parts, seed=seed)
    for isa in filter(library.supports, cpu.ISAS[1:]):
        check_inverse(library, packed, isa, threads)


def check_inverse(library, packed, isa: str, threads: int = 1) -> None:
    """Tiles do not depend on the instruction set that made them, and give the tensors back."""
    tensors = list(packed.tensors.values())
    memory = library.pack(tensors, packed.layout, isa=isa, threads=threads)
    portable = library.pack(tensors, packed.layout, isa="portable", threads=1)
    used = layouts.places(packed.shape, packed.segments)[-1].end
    assert torch.equal(memory[:used], portable[:used])
    found = library.unpack(memory, packed.layout, isa=isa, threads=threads)
    for suffix, tensor, expected in zip(packed.tensors, found, tensors):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), suffix


def test_scales_at_the_ends_of_float16_come_back(library, draw):
    """Row scales are kept as a quotient, which must not lose a bit of them."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16)  # all finite ones
    _, packed = draw(len(halves), [("w4g16s5", 16)])
    for scheme in ("w4g16s4", "w4g16s5", "w4g16s6", "w4g16s7", "w4g16s8"):
        _, packed = draw(len(halves), [(scheme, 16)])
        packed.tensors["_row_scale"].copy_(halves)
        again = layouts.tile(packed).to_packed()
        assert torch.equal(again.tensors["_row_scale"], halves), scheme


@pytest.mark.parametrize("parts", MIXED)
def test_a_tiled_weight_says_what_it_is(library, draw, parts):
    _, packed = draw(70, parts)
    tiled = layouts.tile(packed)
    assert tiled.shape == packed.shape
    assert tiled.segments == packed.segments
    assert tiled.layout == layouts.TILES + packed.layout
    assert tiled.memory.data_ptr() % 64 == 0
    again = layouts.from_memory(tiled.memory, tiled.layout)
    for suffix, tensor in again.to_packed().tensors.items():
        assert torch.equal(tensor, packed.tensors[suffix])


def test_memory_of_another_weight_is_refused(library, draw):
    _, packed = draw(70, [("w4g64", 96)])
    tiled = layouts.tile(packed)
    with pytest.raises(FormatError, match="are not the tiles of a weight"):
        layouts.from_memory(tiled.memory[:-64], tiled.layout)


def test_tiles_without_a_compiler_are_refused_with_a_sentence(draw, without_library):
    _, packed = draw(4, [("w4", 8)])
    with pytest.raises(UsageError, match=r"compiled CPU kernels.*install a C\+\+ compiler"):
        layouts.tile(packed)


def test_memory_is_given_back_and_never_shared(library):
    """Large blocks have mappings of their own, small ones share slabs."""
    generator = torch.Generator().manual_seed(0)
    held: dict[int, Tensor] = {}
    for step in range(300):
        size = int(2 ** (torch.rand((), generator=generator) * 17 + 7))
        size *= 64 if step % 50 == 0 else 1
        held[step] = library.allocate(size).fill_(step % 251)
        if step % 3:
            victim = list(held)[int(torch.randint(len(held), (), generator=generator))]
            del held[victim]
    for step, memory in held.items():
        assert bool((memory == step % 251).all())
