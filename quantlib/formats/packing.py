"""Packing of codes into words: a dense little-endian bit stream, one per row.

Code `j` of a row takes bits `j*bits .. (j+1)*bits - 1` of the row's stream, least significant bit
first, with no padding between codes: 3, 5, 6 and 7-bit codes cross word borders. This is the layout
of compressed-tensors >= 0.18 (and, transposed, of GPTQ's files), so the bytes on disk are
`ceil(K*bits/8)` and no width is a special case.

Eight codes fill exactly `bits` bytes. So a row is read as 64-bit words of eight bytes, one code
each, and the codes are moved together in three steps (1+1, 2+2, 4+4 codes) by masks and shifts:
twelve passes over an eighth as many elements as there are codes, whatever the width. Unpacking runs
the same steps backwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import FormatError

_MOVES = ((1, 8), (2, 16), (4, 32))
"""(codes already side by side, distance in bits between such runs) of the three steps."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, K] codes below 2^bits -> uint8 [rows, ceil(K*bits/8)], bits past the last code
    zero."""
    _check_codes(codes, bits)
    rows, length = codes.shape
    if bits == 8:
        return codes.clone()
    octets = codes.new_zeros(rows, -(-length // 8) * 8)
    octets[:, :length] = codes
    words = octets.view(torch.int64)
    for run, distance in _MOVES:
        low = _mask(run * bits, 2 * distance)
        high = words >> (distance - run * bits)
        words = (words & low).bitwise_or_(high.bitwise_and_(low << (run * bits)))
    stream = words.view(torch.uint8).view(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return stream[:, : packed_bytes(length, bits)].contiguous()


def unpack_bits(stream: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [rows, >= ceil(length*bits/8)] -> uint8 [rows, length]."""
    _check_bits(bits)
    if stream.dtype != torch.uint8 or stream.dim() != 2:
        raise FormatError(f"a packed stream is uint8 [rows, bytes], not {_describe(stream)}")
    if stream.shape[1] < packed_bytes(length, bits):
        raise FormatError(
            f"{length} codes of {bits} bits need {packed_bytes(length, bits)} bytes per row, "
            f"but the packed tensor has {stream.shape[1]}: it is truncated or of another width"
        )
    if bits == 8:
        return stream[:, :length].clone()
    rows, blocks = stream.shape[0], -(-length // 8)
    used = stream[:, : blocks * bits]
    whole = used.shape[1] // bits
    octets = stream.new_zeros(rows, blocks, 8)
    octets[:, :whole, :bits] = used[:, : whole * bits].reshape(rows, whole, bits)
    if whole < blocks:
        rest = used[:, whole * bits :]
        octets[:, whole, : rest.shape[1]] = rest
    words = octets.view(torch.int64)
    for run, distance in reversed(_MOVES):
        low = _mask(run * bits, 2 * distance)
        high = (words & (low << (run * bits))) << (distance - run * bits)
        words = (words & low).bitwise_or_(high)
    return words.view(torch.uint8).view(rows, -1)[:, :length].contiguous()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, K] codes below 2^bits -> int32 [rows, ceil(K*bits/32)], least significant bits
    first.

    Raises FormatError when a code does not fit, or the tensor is not a uint8 matrix.
    """
    stream = pack_bits(codes, bits)
    words = packed_words(codes.shape[1], bits)
    padded = stream.new_zeros(stream.shape[0], words * 4)
    padded[:, : stream.shape[1]] = stream
    return padded.view(torch.int32)


def unpack_codes(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack_codes`: int32 [rows, ceil(length*bits/32)] -> uint8 [rows, length].

    Raises FormatError when the number of words is not the one that `length` codes fill: a padded
    layout (each word holding floor(32/bits) codes, compressed-tensors < 0.18) is caught here
    instead of decoding to noise.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.dim() != 2:
        raise FormatError(f"packed codes are int32 [rows, words], not {_describe(words)}")
    if words.shape[1] != packed_words(length, bits):
        raise FormatError(
            f"{length} codes of {bits} bits fill {packed_words(length, bits)} words per row, but "
            f"the packed tensor has {words.shape[1]}: it has another width, or was written without "
            "dense packing"
        )
    # A transposed single column counts as contiguous and yet has a stride `view` cannot take.
    rows = words.clone(memory_format=torch.contiguous_format)
    return unpack_bits(rows.view(torch.uint8), bits, length)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points uint8 [N, G] below 2^bits -> int32 [ceil(N*bits/32), G], packed along N."""
    return pack_codes(zeros.t(), bits).t().contiguous()


def unpack_zeros(words: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_zeros`: int32 [ceil(N*bits/32), G] -> uint8 [N, G], with N = `rows`."""
    return unpack_codes(words.t(), bits, rows).t().contiguous()


def packed_bytes(length: int, bits: int) -> int:
    """Bytes of a dense stream of `length` codes."""
    return -(-length * bits // 8)


def packed_words(length: int, bits: int) -> int:
    """int32 words of a dense stream of `length` codes."""
    return -(-length * bits // 32)


def _mask(width: int, distance: int) -> int:
    """`width` ones at every multiple of `distance` in 64 bits. Below 8-bit codes it never reaches
    the sign."""
    return sum(((1 << width) - 1) << position for position in range(0, 64, distance))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(f"codes have 1 to 8 bits, not {bits}")


def _check_codes(codes: Tensor, bits: int) -> None:
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise FormatError(f"codes to pack are uint8 [rows, K], not {_describe(codes)}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise FormatError(f"code {int(codes.max())} does not fit in {bits} bits")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
