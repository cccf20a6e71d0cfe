"""Kernel (b)'s layouts lose nothing, waste nothing, and put every code where the tensor cores'
manual says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.kernels.cuda import fragments
from quantlib.kernels.cuda import integer_layout as layout

KINDS = pytest.mark.parametrize("kind", layout.KINDS, ids=["bytes", "nibbles", "unsigned", "mixed"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("element", "registers", "rows", "columns"),
    [
        (fragments.left_integer, fragments.LEFT_REGISTERS, 16, 256),
        (fragments.right_integer, fragments.RIGHT_REGISTERS, 256, 8),
    ],
    ids=["left", "right"],
)
def test_lanes_share_a_matrix_out_without_gap_or_overlap(element, registers, rows, columns, bits):
    rows, columns = (rows, columns // bits) if rows == 16 else (rows // bits, columns)
    owned = [
        element(lane, register, index, bits)
        for lane in range(fragments.LANES)
        for register in range(registers)
        for index in range(32 // bits)
    ]
    assert len(owned) == len(set(owned)) == rows * columns
    assert set(owned) == {(row, column) for row in range(rows) for column in range(columns)}


@KINDS
def test_a_strip_has_every_place_once(kind):
    rows, columns = layout.strip_places(kind.token_bits)
    places = (rows * kind.step_columns + columns).flatten()
    assert sorted(places.tolist()) == list(range(16 * kind.step_columns))


def codes_of(kind, rows, columns, seed, token=False):
    generator = torch.Generator().manual_seed(seed)
    bits = kind.token_bits if token else kind.weight_bits
    low = 0 if token and kind.unsigned else -(1 << bits - 1)
    return torch.randint(low, low + (1 << bits), (rows, columns), generator=generator).to(
        torch.int8
    )


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(layout.KINDS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
def test_codes_come_back(kind, rows, columns, seed):
    codes = codes_of(kind, rows, columns, seed)
    memory = layout.pack_weight(codes, kind)
    steps = -(-columns // kind.step_columns)
    assert memory.shape == (-(-rows // 16), steps, kind.strip_bytes)
    assert torch.equal(layout.unpack_weight(memory, kind, (rows, columns)), codes)
    tokens = codes_of(kind, rows, columns, seed, token=True)
    lines = layout.pack_tokens(tokens, kind)
    assert lines.shape == (rows, 64 * steps)
    assert torch.equal(layout.unpack_tokens(lines, kind, columns), tokens)


@KINDS
def test_memory_comes_back(kind):
    """So no byte is wasted: any memory is some weight's."""
    generator = torch.Generator().manual_seed(kind.number)
    memory = torch.randint(0, 256, (2, 3, kind.strip_bytes), generator=generator).to(torch.uint8)
    codes = layout.unpack_weight(memory, kind, (32, 3 * kind.step_columns))
    assert torch.equal(layout.pack_weight(codes, kind), memory)


def test_a_lane_reads_its_registers_side_by_side():
    """The 16 bytes from 16 * lane on are the four registers of the first instruction."""
    codes = codes_of(layout.BYTES, 16, 64, 0)
    memory = layout.pack_weight(codes, layout.BYTES).view(torch.int8).flatten()
    for lane in (0, 5, 31):
        for register in range(4):
            for index in range(4):
                row, column = fragments.left_integer(lane, register, index, 8)
                assert memory[16 * lane + 4 * register + index] == codes[row, column]


def test_lanes_find_their_rows_scales_together():
    assert layout.pair_rows(torch.arange(32))[:6].tolist() == [0, 8, 1, 9, 2, 10]


def test_what_is_no_matrix_of_codes_is_a_sentence():
    with pytest.raises(FormatError, match=r"an int8 matrix \[N, K\]"):
        layout.pack_weight(torch.zeros(3, 4), layout.BYTES)
