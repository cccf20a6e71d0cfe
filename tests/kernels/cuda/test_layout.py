"""Layouts lose nothing, waste nothing, and put every code where the tensor cores' manual says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.kernels.cuda import fragments, layout

WIDTHS = pytest.mark.parametrize("bits", layout.WIDTHS)


@pytest.mark.parametrize(
    ("element", "registers", "sides", "shape"),
    [
        (fragments.left_element, fragments.LEFT_REGISTERS, 2, (16, 16)),
        (fragments.right_element, fragments.RIGHT_REGISTERS, 2, (16, 8)),
        (lambda lane, r, _: fragments.sum_element(lane, r), fragments.SUM_REGISTERS, 1, (16, 8)),
    ],
    ids=["left", "right", "sum"],
)
def test_lanes_share_a_matrix_out_without_gap_or_overlap(element, registers, sides, shape):
    owned = [
        element(lane, register, side)
        for lane in range(fragments.LANES)
        for register in range(registers)
        for side in range(sides)
    ]
    assert len(owned) == len(set(owned)) == shape[0] * shape[1]
    assert set(owned) == {(row, column) for row in range(shape[0]) for column in range(shape[1])}


def test_a_register_holds_neighbours_along_k():
    for lane in range(fragments.LANES):
        for register in range(fragments.LEFT_REGISTERS):
            (row, column), (other_row, other) = (
                fragments.left_element(lane, register, side) for side in range(2)
            )
            assert (other_row, other) == (row, column + 1)
        for register in range(fragments.RIGHT_REGISTERS):
            (row, column), (other, other_column) = (
                fragments.right_element(lane, register, side) for side in range(2)
            )
            assert (other, other_column) == (row + 1, column)


@WIDTHS
def test_sixteen_codes_fill_every_bit_of_a_half_once(bits):
    used = [
        (piece.word, piece.position + bit)
        for code in layout.pieces(bits)
        for piece in code
        for bit in range(piece.count)
    ]
    assert len(layout.pieces(bits)) == layout.PAIRS
    assert sorted(used) == [(word, bit) for word in range(bits) for bit in range(16)]


@WIDTHS
def test_the_pieces_of_a_code_are_all_of_its_bits(bits):
    for code in layout.pieces(bits):
        covered = [piece.first + bit for piece in code for bit in range(piece.count)]
        assert covered == list(range(bits))


def test_a_unit_has_every_place_once():
    rows, columns = layout.unit_places()
    assert sorted((rows * 32 + columns).flatten().tolist()) == list(range(1024))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(layout.WIDTHS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    seed=st.integers(0, 2**32),
)
def test_codes_come_back(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    memory = layout.pack_codes(codes, bits)
    assert memory.shape == (-(-columns // 64), -(-rows // 32), 2, 128 * bits)
    assert torch.equal(layout.unpack_codes(memory, bits, (rows, columns)), codes)


@WIDTHS
def test_memory_comes_back(bits):
    """So no byte is wasted: any memory is some weight's."""
    generator = torch.Generator().manual_seed(bits)
    memory = torch.randint(0, 256, (2, 3, 2, 128 * bits), generator=generator).to(torch.uint8)
    codes = layout.unpack_codes(memory, bits, (96, 128))
    assert torch.equal(layout.pack_codes(codes, bits), memory)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 70), groups=st.integers(1, 5), zeros=st.booleans(), seed=st.integers(0, 99)
)
def test_scales_and_zero_points_come_back(rows, groups, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(rows, groups, generator=generator).half() for _ in range(1 + zeros)]
    memory = layout.pack_meta(parts[0], parts[1] if zeros else None)
    assert memory.shape == (groups, -(-rows // 32) * 32, 1 + zeros)
    found = layout.unpack_meta(memory, rows)
    assert all(torch.equal(*pair) for pair in zip(found, parts, strict=True))


def test_lanes_find_their_rows_scales_together():
    """A lane multiplies rows r and r + 8 of 16: their scales are neighbours, zero points behind."""
    scale, zero = torch.arange(32.0)[:, None], torch.arange(32.0)[:, None] + 100
    assert layout.pack_meta(scale, None).flatten()[:6].tolist() == [0, 8, 1, 9, 2, 10]
    both = layout.pack_meta(scale, zero).flatten()
    assert both[:8].tolist() == [0, 8, 100, 108, 1, 9, 101, 109]
    assert both[32:36].tolist() == [16, 24, 116, 124]


def test_what_is_no_matrix_of_codes_is_a_sentence():
    with pytest.raises(FormatError, match="2 to 8 bits, not 9"):
        layout.pieces(9)
    with pytest.raises(FormatError, match=r"a uint8 matrix \[N, K\]"):
        layout.pack_codes(torch.zeros(3, 4), 4)
