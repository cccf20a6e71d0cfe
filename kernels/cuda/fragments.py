"""Who holds what in a tensor core instruction: PTX ISA manual, "Matrix Fragments for
mma.m16n8k16 with floating point type", 16-bit elements, those for mma.m16n8k32 (bytes) and
mma.m16n8k64 (nibbles), and those for the sparse mma.m16n8k32 of 16-bit elements, whose left operand
is that of mma.m16n8k16 in the columns that are kept.

A matrix is spread over the 32 lanes of a warp: each holds some registers of 32 bits, each register
two elements that are neighbours along k (the left operand's columns, the right operand's rows).
With `group = lane / 4` and `member = lane % 4`, the manual's formulas are written out here; layouts
are derived by enumerating them, never by hand.
"""

from __future__ import annotations

LANES = 32
ROWS, COLUMNS, DEPTH = 16, 8, 16
"""m, n and k of the instruction."""
LEFT_REGISTERS, RIGHT_REGISTERS, SUM_REGISTERS = 4, 2, 4
"""Of a lane; a register of sums is one float."""


def left_element(lane: int, register: int, side: int) -> tuple[int, int]:
    """(row, column) of 16 x 16 that a lane's register holds in its low (side 0) or high half.

    The manual: element a_i, i = 2 register + side, is in row `group` for i in 0, 1, 4, 5, else
    `group + 8`, and in column `2 member + i % 2`, plus 8 for i >= 4.
    """
    group, member, i = lane // 4, lane % 4, 2 * register + side
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, member * 2 + i % 2 + (8 if i >= 4 else 0)


def right_element(lane: int, register: int, side: int) -> tuple[int, int]:
    """(row, column) of 16 x 8.

    The manual: element b_i is in row `2 member + i % 2`, plus 8 for i >= 2, and column `group`.
    """
    group, member, i = lane // 4, lane % 4, 2 * register + side
    return member * 2 + i % 2 + (8 if i >= 2 else 0), group


def sum_element(lane: int, register: int) -> tuple[int, int]:
    """(row, column) of 16 x 8.

    The manual: element c_i is in row `group` for i < 2, else `group + 8`, and in column
    `2 member + i % 2`.
    """
    group, member = lane // 4, lane % 4
    return (group if register < 2 else group + 8), member * 2 + register % 2


def left_integer(lane: int, register: int, index: int, bits: int) -> tuple[int, int]:
    """(row, column) of 16 x 256 / bits that a lane's register has as its element number `index`.

    The manual: element a_i, i counting through registers, is in row `group` in registers 0 and 2,
    else `group + 8`, and in column `each member + index` for `each` elements to a register, plus
    half the depth in registers 2 and 3.
    """
    group, member, each = lane // 4, lane % 4, 32 // bits
    row = group if register % 2 == 0 else group + 8
    return row, member * each + index + (4 * each if register >= 2 else 0)


def right_integer(lane: int, register: int, index: int, bits: int) -> tuple[int, int]:
    """(row, column) of 256 / bits x 8.

    The manual: element b_i is in row `each member + index`, plus half the depth in register 1, and
    in column `group`.
    """
    group, member, each = lane // 4, lane % 4, 32 // bits
    return member * each + index + (4 * each if register else 0), group


PLACES = 16
"""Of kept columns, two bits each, in a lane's register of `place_element`."""


def place_element(lane: int, index: int) -> tuple[int, int, int]:
    """(pair, row, kept column of 16) whose place among its four columns a lane's register holds at
    bit `2 index`, for a sparse mma.m16n8k32 that takes places from this pair of every four lanes.

    The manual ("Sparse matrix storage", "Sparse MMA metadata layout for m16n8k32"): the selector
    names lanes 0 and 1 of every four, or 2 and 3; the first of them has the columns 0 to 15, the
    second 16 to 31, in the low half of row `group`, in the high half of `group + 8`.
    """
    group, member = lane // 4, lane % 4
    return member // 2, group + 8 * (index // 8), 8 * (member % 2) + index % 8
