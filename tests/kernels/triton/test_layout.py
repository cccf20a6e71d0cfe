"""The Triton kernels' layout is a bijection, and lies as its description says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats.weight import effective_scale
from quantlib.kernels.triton import layout


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 20),
    columns=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_packing_has_an_inverse_and_no_waste(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    memory = layout.pack_codes(codes, bits)
    assert memory.numel() == -(-columns // 128) * rows * 16 * bits
    assert torch.equal(layout.unpack_codes(memory, bits, (rows, columns)), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_column_lies_where_the_description_says(bits):
    """One code of all ones at a time: its bits, and no others, are set, at the described places."""
    rows, tiles = 3, 2
    for row, column in ((0, 0), (2, 37), (1, 127), (2, 128), (0, 255), (1, 200)):
        codes = torch.zeros(rows, 256, dtype=torch.uint8)
        codes[row, column] = (1 << bits) - 1
        memory = layout.pack_codes(codes, bits)
        wanted = torch.zeros_like(memory)
        tile, inside, begin = column // 128, column % 128, 0
        for width in layout.planes(bits):
            field, byte = divmod(inside, 16 * width)
            at = begin + (tile * rows + row) * 16 * width + byte
            wanted[at] = ((1 << width) - 1) << field * width
            begin += tiles * rows * 16 * width
        assert torch.equal(memory, wanted)


@pytest.mark.parametrize("scheme", ["w4g64zs6", "w3g128", "w8", "w5t", "fp8", "mxfp4", "nvfp4"])
def test_scales_and_factors_are_the_formats_own(draw, scheme):
    weight, _ = draw(37, [(scheme, 200)])
    own, part = weight.segments[0], layout.pack(weight).segments[0]
    unit = layout.element_unit(own.segment.format)
    assert part.codes.numel() == 2 * 37 * 16 * own.segment.format.bits
    scale = part.factors[:, None].double() / unit
    if own.segment.format.scale == "e8m0":
        scale = scale * torch.exp2(part.scale.double() - 127).t()
    elif part.scale is not None:
        scale = scale * part.scale.double().t()
    # Two-level scales are two float32 roundings away: the factor's, and the reference's own.
    torch.testing.assert_close(
        scale.expand(-1, own.scale.shape[1]), effective_scale(own).double(), rtol=2.0**-22, atol=0
    )


def test_codes_that_are_no_matrix_are_a_sentence():
    with pytest.raises(FormatError, match=r"uint8 matrix \[N, K\], not torch\.int32"):
        layout.pack_codes(torch.zeros(3, 4, dtype=torch.int32), 4)
    with pytest.raises(FormatError, match="2 to 8 bits here, not 9"):
        layout.planes(9)
