"""Packed codes are a dense bit stream: equal to compressed-tensors', lossless both ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import (
    pack_bits,
    pack_codes,
    pack_zeros,
    packed_bytes,
    packed_words,
    unpack_bits,
    unpack_codes,
    unpack_zeros,
)

# Words of 32 ascending signed values from -2^(b-1) on, wrapping, computed with compressed-tensors
# 0.18's packer and checked there against an independent bit stream.
VECTORS = {
    3: "88fac688 c688fac6 fac688fa",
    4: "76543210 fedcba98 76543210 fedcba98",
    5: "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb",
    6: "440c2040 a2481c61 3ce34c2c 544d2450 a6585d65 7de75c6d",
    7: "40608080 880e1828 68c16284 88901e38 58a94264 668c982e 3e78e9c3",
}


def random_codes(rows: int, length: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, length), generator=generator).to(torch.uint8)


def bit_stream(row: list[int], bits: int) -> int:
    """The specification in one line: code j at bit j*bits of one long integer."""
    return sum(code << (bits * index) for index, code in enumerate(row))


matrices = st.builds(
    lambda rows, length, bits, seed: (random_codes(rows, length, bits, seed), bits),
    st.integers(1, 5), st.one_of(st.integers(1, 70), st.sampled_from([128, 576, 577])),
    st.integers(1, 8), st.integers(0, 2**31),
)  # fmt: skip


@pytest.mark.parametrize("bits", VECTORS)
def test_words_equal_the_published_vectors(bits: int) -> None:
    # -2^(b-1) + i is stored with the offset 2^(b-1): the stored codes are 0, 1, 2, ...
    codes = (torch.arange(32) % (1 << bits)).to(torch.uint8)[None]
    words = [f"{word & 0xFFFFFFFF:08x}" for word in pack_codes(codes, bits)[0].tolist()]
    assert " ".join(words) == VECTORS[bits]


def test_zero_points_are_packed_along_rows() -> None:
    stored = torch.tensor([[-8], [-1], [0], [7]]) + 8
    assert pack_zeros(stored.to(torch.uint8), 4).tolist() == [[0xF870]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [1, 31, 33, 576])
def test_words_equal_those_of_compressed_tensors(bits: int, length: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="compressed-tensors >= 0.18 (a development dependency) is not installed",
    )
    codes = random_codes(4, length, bits)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_codes(codes, bits), helpers.pack_to_int32(signed, bits))
    along_rows = helpers.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack_zeros(codes, bits), along_rows)


@given(matrices)
def test_packing_is_the_bit_stream_of_the_definition(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    stream = pack_bits(codes, bits)
    assert stream.shape == (codes.shape[0], packed_bytes(codes.shape[1], bits))
    for row, packed in zip(codes.tolist(), stream, strict=True):
        expected = bit_stream(row, bits)
        assert int.from_bytes(bytes(packed.tolist()), "little") == expected


@given(matrices)
def test_unpacking_undoes_packing(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    rows, length = codes.shape
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packed_words(length, bits))
    assert torch.equal(unpack_codes(words, bits, length), codes)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, length), codes)
    assert torch.equal(unpack_zeros(pack_zeros(codes, bits), bits, rows), codes)


@given(matrices)
def test_words_are_the_stream_with_zero_bytes_after_it(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    as_bytes = pack_codes(codes, bits).view(torch.uint8)
    used = packed_bytes(codes.shape[1], bits)
    assert torch.equal(as_bytes[:, :used], pack_bits(codes, bits))
    assert not as_bytes[:, used:].any()


def test_packing_reads_any_strides() -> None:
    codes = random_codes(40, 66, 5)
    part = codes[::3, 1:60:2]
    assert torch.equal(pack_codes(part, 5), pack_codes(part.contiguous(), 5))
    words = pack_codes(part, 5)
    assert torch.equal(unpack_codes(words.t().contiguous().t(), 5, part.shape[1]), part)


def test_packing_leaves_its_input_alone() -> None:
    codes = random_codes(3, 64, 8)
    before = codes.clone()
    pack_bits(codes, 8).zero_()
    unpack_bits(codes, 8, 64).zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    with pytest.raises(FormatError, match=f"does not fit in {bits} bits"):
        pack_codes(torch.tensor([[1 << bits]], dtype=torch.uint8), bits)


def test_wrong_types_widths_and_sizes_are_refused() -> None:
    codes = random_codes(2, 40, 3)
    words = pack_codes(codes, 3)
    with pytest.raises(FormatError, match="uint8"):
        pack_codes(codes.to(torch.int32), 3)
    with pytest.raises(FormatError, match="1 to 8 bits"):
        pack_codes(codes, 9)
    with pytest.raises(FormatError, match="int32"):
        unpack_codes(words.to(torch.int64), 3, 40)
    with pytest.raises(FormatError, match="4 words"):
        unpack_codes(words[:, :3], 3, 40)
    with pytest.raises(FormatError, match="truncated"):
        unpack_bits(pack_bits(codes, 3)[:, :-1], 3, 40)


def test_the_padded_layout_of_older_files_is_refused() -> None:
    # compressed-tensors < 0.18 put ten 3-bit codes in a word: 576 codes took 58 words, not 54.
    with pytest.raises(FormatError, match="dense packing"):
        unpack_codes(torch.zeros(2, 58, dtype=torch.int32), 3, 576)


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_that_fill_one_word_row_unpack(bits: int) -> None:
    # [1, G] packed zero points: transposed, a single column whose strides are not those of a row
    zeros = (torch.arange(2 * 5).view(2, 5) % (1 << bits)).to(torch.uint8)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits), bits, 2), zeros)
